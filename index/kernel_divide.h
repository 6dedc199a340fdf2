// Arithmetic on vectors that are divided in two, in 7 bits: included by kernel_lanes.h once per instruction set, with
// its macros. All sums are exact in integers. No include guard, on purpose.
typedef uint8_t NAME(bytes16) __attribute__((vector_size(16)));
typedef uint16_t NAME(words16) __attribute__((vector_size(32)));
typedef int32_t NAME(ints16) __attribute__((vector_size(64)));

LOCAL void NAME(largest_of)(const float *x, const float *center, uint32_t n, float *lanes)
{
    const NAME(floats) zero = {0};
    NAME(floats) largest[KERNEL_PARTS];
    memcpy(largest, lanes, sizeof largest);
    for (uint32_t i = 0; i < n / KERNEL_WIDTH; i++) {
        NAME(floats) size, middle;
        NAME(load_lanes)(x, i, &size);
        NAME(load_lanes)(center, i, &middle);
        size = size - middle;
        const NAME(floats) negative = zero - size;
        NAME(most)(&size, &negative, &size);
        NAME(most)(&largest[i % KERNEL_PARTS], &size, &largest[i % KERNEL_PARTS]);
    }
    memcpy(lanes, largest, sizeof largest);
}

ENTRY void NAME(largest16)(const float *x, const float *center, uint32_t n, float *lanes)
{
    if (KERNEL_FIXED(n, 128)) {
        NAME(largest_of)(x, center, 128, lanes);
    } else {
        NAME(largest_of)(x, center, n, lanes);
    }
}

LOCAL int32_t NAME(encode7_of)(const float *x, const float *center, float inverse, uint32_t n, uint8_t *codes)
{
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    NAME(ints) squares = {0};
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        NAME(ints) wide[KERNEL_PARTS];
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) in, middle;
            NAME(load_lanes)(x + i, part, &in);
            NAME(load_lanes)(center + i, part, &middle);
            wide[part] = __builtin_convertvector(((in - middle) * inverse + round) - round, NAME(ints));
            squares += wide[part] * wide[part];
            wide[part] += DCI_MEMBER_ZERO;
        }
        NAME(narrow)(wide, codes + i);
    }
    int32_t sum = 0;
    for (uint32_t i = 0; i < KERNEL_WIDTH; i++) {
        sum += squares[i];
    }
    return sum;
}

ENTRY int32_t NAME(encode7)(const float *x, const float *center, float inverse, uint32_t n, uint8_t *codes)
{
    return KERNEL_FIXED(n, 128) ? NAME(encode7_of)(x, center, inverse, 128, codes)
                                : NAME(encode7_of)(x, center, inverse, n, codes);
}

// Sum of products of the bytes as they are.
LOCAL int32_t NAME(dot7)(const uint8_t *codes, const int8_t *probe, uint32_t n)
{
    int32_t dot = 0;
    uint32_t i = 0;
#if KERNEL_DOTS == DOTS_VNNI
    __m512i sum = _mm512_setzero_si512();
    for (; i + 64 <= n; i += 64) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes + i), _mm512_loadu_si512(probe + i));
    }
    dot = _mm512_reduce_add_epi32(sum);
#elif KERNEL_DOTS == DOTS_AVX2
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (; i + 64 <= n; i += 64) {
        const __m256i *x = (const __m256i *)(const void *)(codes + i), *q = (const __m256i *)(const void *)(probe + i);
        const __m256i low = _mm256_maddubs_epi16(_mm256_loadu_si256(x), _mm256_loadu_si256(q));
        const __m256i high = _mm256_maddubs_epi16(_mm256_loadu_si256(x + 1), _mm256_loadu_si256(q + 1));
        // Four products of at most 127 * DCI_PROBE_MOST fit in 16 bits.
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), ones));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    dot = _mm_cvtsi128_si32(four);
#endif
    for (; i < n; i++) {
        dot += codes[i] * probe[i];
    }
    return dot;
}

LOCAL void NAME(dots7_of)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count,
                          const struct dci_probe *probe, float *values)
{
    for (uint32_t i = 0; i < count; i++) {
        const int32_t dot = NAME(dot7)(codes + (size_t)order[i] * n, probe->codes, n);
        values[i] = probe->step * (float)(dot - DCI_MEMBER_ZERO * probe->sum);
    }
}

ENTRY void NAME(dots7)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count,
                       const struct dci_probe *probe, float *values)
{
    if (KERNEL_FIXED(n, 128)) {
        NAME(dots7_of)(codes, 128, order, count, probe, values);
    } else if (KERNEL_FIXED(n, 64)) {
        NAME(dots7_of)(codes, 64, order, count, probe, values);
    } else {
        NAME(dots7_of)(codes, n, order, count, probe, values);
    }
}

// Columns 0 .. columns-1, a constant, of some rows of codes.
LOCAL void NAME(sums7_of)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count, uint32_t columns,
                          int32_t *sums)
{
    memset(sums, 0, columns * sizeof sums[0]);
    for (uint32_t first = 0; first < count; first += 512) { // 512 * 127 fits in 16 bits
        const uint32_t end = count - first < 512 ? count : first + 512;
        NAME(words16) sum[4] = {{0}};
        for (uint32_t i = first; i < end; i++) {
            for (uint32_t part = 0; part < columns / 16; part++) {
                NAME(bytes16) x;
                memcpy(&x, codes + (size_t)order[i] * n + (size_t)part * 16, sizeof x);
                sum[part] += __builtin_convertvector(x, NAME(words16));
            }
        }
        for (uint32_t part = 0; part < columns / 16; part++) {
            NAME(ints16) wide;
            memcpy(&wide, sums + (size_t)part * 16, sizeof wide);
            wide += __builtin_convertvector(sum[part], NAME(ints16));
            memcpy(sums + (size_t)part * 16, &wide, sizeof wide);
        }
    }
}

ENTRY void NAME(sums7)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count, int32_t *sums)
{
    uint32_t i = 0;
    for (; i + 64 <= n; i += 64) {
        NAME(sums7_of)(codes + i, n, order, count, 64, sums + i);
    }
    for (; i < n; i += 16) {
        NAME(sums7_of)(codes + i, n, order, count, 16, sums + i);
    }
}
