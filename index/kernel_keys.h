// Arithmetic on keys that come into the tree: their rotation and their codes. Included by kernel_lanes.h once per
// instruction set, with its macros. No include guard, on purpose.

// The butterfly of stride h inside a vector: x[i] + x[i ^ h] where i has no bit h, else x[i ^ h] - x[i].
#define BUTTERFLY(x, h, ...)                                                                                           \
    do {                                                                                                               \
        const NAME(floats) turned = __builtin_shufflevector(x, x, __VA_ARGS__);                                        \
        NAME(ints) minus;                                                                                              \
        for (int lane = 0; lane < KERNEL_WIDTH; lane++) {                                                              \
            minus[lane] = (lane & (h)) != 0 ? INT32_MIN : 0;                                                           \
        }                                                                                                              \
        x = turned + (NAME(floats))((NAME(ints))x ^ minus);                                                            \
    } while (0)

LOCAL void NAME(butterflies)(NAME(floats) * in)
{
    NAME(floats) x = *in;
#if KERNEL_WIDTH == 16
    BUTTERFLY(x, 8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    BUTTERFLY(x, 4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    BUTTERFLY(x, 2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    BUTTERFLY(x, 1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif KERNEL_WIDTH == 8
    BUTTERFLY(x, 4, 4, 5, 6, 7, 0, 1, 2, 3);
    BUTTERFLY(x, 2, 2, 3, 0, 1, 6, 7, 4, 5);
    BUTTERFLY(x, 1, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    BUTTERFLY(x, 2, 2, 3, 0, 1);
    BUTTERFLY(x, 1, 1, 0, 3, 2);
#endif
    *in = x;
}

// Two levels of butterflies between vectors, of strides 2h and h.
LOCAL void NAME(butterflies4)(NAME(floats) * v, uint32_t h)
{
    const NAME(floats) a = v[0] + v[2 * h], b = v[h] + v[3 * h], c = v[0] - v[2 * h], d = v[h] - v[3 * h];
    v[0] = a + b;
    v[h] = a - b;
    v[2 * h] = c + d;
    v[3 * h] = c - d;
}

// n is a constant where this is compiled in, so that all loops are unrolled and vectors stay in registers.
LOCAL void NAME(hadamard_of)(float *x, uint32_t n, const float *signs)
{
    NAME(floats) v[INDEX_HEAD_DIM_MAX / KERNEL_WIDTH];
    const uint32_t count = n / KERNEL_WIDTH;
    // 1 / sqrt(n) for a power of two, to the last bit on every machine: the root is correctly rounded.
    const float norm = 1.0f / sqrtf((float)n);
    KERNEL_UNROLLED
    for (uint32_t i = 0; i < count; i++) {
        NAME(floats) sign;
        NAME(load_lanes)(x, i, &v[i]);
        NAME(load_lanes)(signs, i, &sign);
        v[i] *= sign;
    }
    uint32_t h = count / 2;
    KERNEL_UNROLLED
    for (; h > 1; h /= 4) {
        KERNEL_UNROLLED
        for (uint32_t i = 0; i < count / 4; i++) {
            NAME(butterflies4)(v + i / (h / 2) * 2 * h + i % (h / 2), h / 2);
        }
    }
    KERNEL_UNROLLED
    for (uint32_t i = 0; h == 1 && i < count; i += 2) {
        const NAME(floats) a = v[i], b = v[i + 1];
        v[i] = a + b;
        v[i + 1] = a - b;
    }
    KERNEL_UNROLLED
    for (uint32_t i = 0; i < count; i++) {
        NAME(butterflies)(&v[i]);
        v[i] *= norm;
        NAME(store_lanes)(x, i, &v[i]);
    }
}

ENTRY void NAME(hadamard)(float *x, uint32_t n, const float *signs)
{
    if (KERNEL_FIXED(n, 256)) {
        NAME(hadamard_of)(x, 256, signs);
    } else if (KERNEL_FIXED(n, 128)) {
        NAME(hadamard_of)(x, 128, signs);
    } else if (KERNEL_FIXED(n, 64)) {
        NAME(hadamard_of)(x, 64, signs);
    } else if (KERNEL_FIXED(n, 32)) {
        NAME(hadamard_of)(x, 32, signs);
    } else {
        NAME(hadamard_of)(x, KERNEL_LEAST(n, 16), signs);
    }
}

// Sixteen small integers in a byte each.
LOCAL void NAME(narrow)(const NAME(ints) * wide, uint8_t *out)
{
#if KERNEL_WIDTH == 8
    const __m256i words = _mm256_packs_epi32((__m256i)wide[0], (__m256i)wide[1]); // quarters 0 2 1 3
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    const __m128i bytes = _mm_packs_epi16(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
    memcpy(out, &bytes, sizeof bytes);
#else
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        const NAME(bytes) bytes = __builtin_convertvector(wide[part], NAME(bytes));
        memcpy(out + part * KERNEL_WIDTH, &bytes, sizeof bytes);
    }
#endif
}

LOCAL void NAME(subtract)(const float *a, const float *b, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n / KERNEL_WIDTH; i++) {
        NAME(floats) x, y;
        NAME(load_lanes)(a, i, &x);
        NAME(load_lanes)(b, i, &y);
        x = x - y;
        NAME(store_lanes)(out, i, &x);
    }
}

// The largest code is `limit`.
LOCAL float NAME(encode8_of)(const float *x, uint32_t n, int32_t limit, int8_t *codes, int32_t *sum)
{
    const NAME(floats) zero = {0};
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    NAME(floats) largest[KERNEL_PARTS] = {{0}};
    for (uint32_t i = 0; i < n / KERNEL_WIDTH; i++) {
        NAME(floats) size, negative;
        NAME(load_lanes)(x, i, &size);
        negative = zero - size;
        NAME(most)(&size, &negative, &size);
        NAME(most)(&largest[i % KERNEL_PARTS], &size, &largest[i % KERNEL_PARTS]);
    }
    float lanes[DCI_LANES];
    memcpy(lanes, largest, sizeof lanes);
    const float most = NAME(max_lanes)(lanes);
    *sum = 0;
    if (most < CODE_LEAST) {
        memset(codes, 0, n);
        return 0.0f;
    }
    const float step = most / (float)limit, inverse = (float)limit / most;
    NAME(ints) sums = {0};
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        NAME(ints) wide[KERNEL_PARTS];
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) code;
            NAME(load_lanes)(x + i, part, &code);
            code = (code * inverse + round) - round;
            wide[part] = __builtin_convertvector(code, NAME(ints));
            sums += wide[part];
        }
        NAME(narrow)(wide, (uint8_t *)codes + i);
    }
    for (uint32_t i = 0; i < KERNEL_WIDTH; i++) {
        *sum += sums[i];
    }
    return step;
}

ENTRY float NAME(encode8)(const float *x, uint32_t n, int8_t *codes, int32_t *sum)
{
    return KERNEL_FIXED(n, 128)  ? NAME(encode8_of)(x, 128, 127, codes, sum)
           : KERNEL_FIXED(n, 64) ? NAME(encode8_of)(x, 64, 127, codes, sum)
                                 : NAME(encode8_of)(x, n, 127, codes, sum);
}

LOCAL void NAME(probe_of)(const float *key, const float *base, uint32_t n, int8_t *codes, struct dci_probe *probe)
{
    float off[INDEX_HEAD_DIM_MAX];
    NAME(subtract)(key, base, n, off);
    probe->codes = codes;
    probe->norm2 = NAME(dot_lanes)(off, off, n);
    probe->step = NAME(encode8_of)(off, n, DCI_PROBE_MOST, codes, &probe->sum);
}

ENTRY void NAME(probe)(const float *key, const float *base, uint32_t n, int8_t *codes, struct dci_probe *probe)
{
    if (KERNEL_FIXED(n, 128)) {
        NAME(probe_of)(key, base, 128, codes, probe);
    } else if (KERNEL_FIXED(n, 64)) {
        NAME(probe_of)(key, base, 64, codes, probe);
    } else {
        NAME(probe_of)(key, base, n, codes, probe);
    }
}

ENTRY void NAME(decode8)(const int8_t *codes, float step, const float *base, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n / KERNEL_WIDTH; i++) {
        NAME(codes8) narrow;
        NAME(floats) x;
        memcpy(&narrow, codes + i * KERNEL_WIDTH, sizeof narrow);
        NAME(load_lanes)(base, i, &x);
        x = x + step * __builtin_convertvector(narrow, NAME(floats));
        NAME(store_lanes)(out, i, &x);
    }
}

// From 5-bit codes, one a byte, to a code on its way: the low bits, then the top bits.
LOCAL void NAME(code_pack)(const uint8_t *codes, uint32_t n, uint8_t *code)
{
    const uint32_t half = dci_row_bytes(n);
    uint32_t i = 0;
    for (; i < n - half; i++) {
        code[i] = (uint8_t)((codes[i] & 15) | codes[half + i] << 4);
    }
    for (; i < half; i++) {
        code[i] = codes[i] & 15;
    }
    for (i = 0; i < n; i += 8) { // bit 4 of eight bytes
        uint64_t word;
        memcpy(&word, codes + i, sizeof word);
        code[half + i / 8] = (uint8_t)((((word >> 4) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
    }
}

// 32 equal steps of the width that is best for normal coordinates; the scale is chosen so that inner products are right
// on average (RaBitQ, arXiv 2405.12497, section 3.2).
LOCAL float NAME(encode5_of)(const float *key, const float *anchor, uint32_t n, uint8_t *code, float *spread2)
{
    float residual[INDEX_HEAD_DIM_MAX];
    uint8_t codes[INDEX_HEAD_DIM_MAX];
    NAME(subtract)(key, anchor, n, residual);
    const NAME(floats) zero = {0};
    const NAME(floats) least = zero, most = zero + 31.0f;
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    const float norm2 = NAME(dot_lanes)(residual, residual, n);
    *spread2 = 0.0f;
    if (!(norm2 > CODE_NORM2_LEAST)) {
        memset(codes, 15, sizeof codes);
        NAME(code_pack)(codes, n, code);
        return 0.0f;
    }
    const float inverse = 1.0f / (CODE_STEP * sqrtf(norm2 / (float)n));
    NAME(floats) products[KERNEL_PARTS] = {{0}}, squares[KERNEL_PARTS] = {{0}};
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        NAME(ints) wide[KERNEL_PARTS];
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) in, x;
            NAME(load_lanes)(residual + i, part, &in);
            x = in * inverse + 15.5f;
            NAME(most)(&x, &least, &x);
            NAME(least)(&x, &most, &x);
            x = (x + round) - round;
            wide[part] = __builtin_convertvector(x, NAME(ints));
            x = x - 15.5f;
            products[part] += x * in;
            squares[part] += x * x;
        }
        NAME(narrow)(wide, codes + i);
    }
    NAME(code_pack)(codes, n, code);
    const float scale = dci_scale_round(norm2 / NAME(sum_lanes)(products));
    *spread2 = scale * scale * NAME(sum_lanes)(squares);
    return scale;
}

ENTRY float NAME(encode5)(const float *key, const float *anchor, uint32_t n, uint8_t *code, float *spread2)
{
    return KERNEL_FIXED(n, 128)  ? NAME(encode5_of)(key, anchor, 128, code, spread2)
           : KERNEL_FIXED(n, 64) ? NAME(encode5_of)(key, anchor, 64, code, spread2)
                                 : NAME(encode5_of)(key, anchor, n, code, spread2);
}

// Inner products of 16 8-bit codes with a probe.
LOCAL void NAME(dots_probe)(const uint8_t *codes, const int8_t *probe, uint32_t n, int32_t *dots)
{
#if KERNEL_DOTS == DOTS_AVX2
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (uint32_t i = 0; i < n; i += 8) {
        int32_t words[2];
        memcpy(words, probe + i, sizeof words);
        const __m256i a = _mm256_set1_epi32(words[0]), b = _mm256_set1_epi32(words[1]);
        const __m256i *at = (const __m256i *)(const void *)(codes + (size_t)i * DCI_LANES);
        // Four products of at most 255 * DCI_PROBE_MOST fit in 16 bits.
        const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_loadu_si256(at), a),
                                             _mm256_maddubs_epi16(_mm256_loadu_si256(at + 2), b));
        const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_loadu_si256(at + 1), a),
                                              _mm256_maddubs_epi16(_mm256_loadu_si256(at + 3), b));
        sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(low, ones));
        sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(high, ones));
    }
    memcpy(dots, sum, DCI_LANES * sizeof dots[0]);
#else
    NAME(dots)(codes, probe, n, 1, dots);
#endif
}

// The first of the lanes with the least number; 0 where none is a number.
LOCAL uint32_t NAME(first_least)(const float *x)
{
#if KERNEL_WIDTH == 16
    const __m512 all = _mm512_loadu_ps(x);
    const uint32_t lanes = _mm512_cmp_ps_mask(all, _mm512_set1_ps(_mm512_reduce_min_ps(all)), _CMP_EQ_OQ);
#elif KERNEL_WIDTH == 8
    const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8), eight = _mm256_min_ps(low, high);
    __m256 least = _mm256_min_ps(eight, _mm256_permute2f128_ps(eight, eight, 1));
    least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4e));
    least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xb1));
    const int below8 = _mm256_movemask_ps(_mm256_cmp_ps(low, least, _CMP_EQ_OQ));
    const uint32_t lanes = (uint32_t)(below8 | _mm256_movemask_ps(_mm256_cmp_ps(high, least, _CMP_EQ_OQ)) << 8);
#else
    uint32_t lanes = 0;
    for (uint32_t i = 0, first = 0; i < DCI_LANES; i++) {
        if (x[i] < x[first]) {
            first = i;
        }
        lanes = 1u << first;
    }
#endif
    return lanes == 0 ? 0 : (uint32_t)__builtin_ctz(lanes);
}

ENTRY uint32_t NAME(near16)(const struct dci_probe *probe, const struct dci_block *block, uint32_t n, float *distances)
{
    const NAME(floats) zero = {0};
    const NAME(floats) unused = zero + FLT_MAX;
    int32_t dots[DCI_LANES];
    NAME(dots_probe)(block->codes, probe->codes, n, dots);
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(ints) dot;
        NAME(floats) step, norm2, rows, out;
        memcpy(&dot, dots + part * KERNEL_WIDTH, sizeof dot);
        NAME(load_lanes)(block->step, part, &step);
        NAME(load_lanes)(block->norm2, part, &norm2);
        NAME(load_lanes)(block->rows, part, &rows);
        const NAME(floats) product =
            __builtin_convertvector(dot - DCI_CODE_ZERO * probe->sum, NAME(floats)) * (step * probe->step);
        if (probe->norm2_max > 0.0f) {
            float slack[KERNEL_WIDTH];
            const float own = probe->norm2 < probe->norm2_max ? sqrtf(probe->norm2_max - probe->norm2) : 0.0f;
            for (uint32_t i = 0; i < KERNEL_WIDTH; i++) {
                slack[i] = norm2[i] < probe->norm2_max ? sqrtf(probe->norm2_max - norm2[i]) * own : 0.0f;
            }
            NAME(floats) slacks;
            memcpy(&slacks, slack, sizeof slacks);
            out = probe->norm2_max - (product + slacks);
        } else {
            out = (norm2 + probe->norm2) - 2.0f * product;
        }
        const NAME(ints) used = rows > zero;
        NAME(choose)(&used, &out, &unused, &out);
        NAME(store_lanes)(distances, part, &out);
    }
    return NAME(first_least)(distances);
}

#undef BUTTERFLY
