// The kernels in vectors of KERNEL_WIDTH floats (4, 8 or 16), included by kernel.c once per instruction set.
// KERNEL_SET names the copy, KERNEL_TARGET is its target attribute. Sixteen lanes are KERNEL_PARTS vectors; whatever
// the width, lane i holds the same elements and the lanes are added in the same order. No include guard, on purpose.
// Vectors travel by pointer, so that no calling convention depends on the width of a register.
#define KERNEL_PARTS        (16 / KERNEL_WIDTH)
#define KERNEL_PASTE2(a, b) a##_##b
#define KERNEL_PASTE(a, b)  KERNEL_PASTE2(a, b)
#define NAME(name)          KERNEL_PASTE(name, KERNEL_SET)
#define LOCAL               KERNEL_TARGET static inline __attribute__((always_inline))
#define ENTRY               KERNEL_TARGET static

typedef float NAME(floats) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * KERNEL_WIDTH)));
typedef float NAME(eight) __attribute__((vector_size(32)));
typedef float NAME(four) __attribute__((vector_size(16)));

// 16 lanes as a tree: 8 and 8, 4 and 4, 2 and 2, 1 and 1.
LOCAL float NAME(sum_lanes)(const NAME(floats) * x)
{
    NAME(four) sum;
#if KERNEL_WIDTH == 4
    sum = (x[0] + x[2]) + (x[1] + x[3]);
#else
    NAME(eight) sum8;
    NAME(four) quarters[2];
#if KERNEL_WIDTH == 8
    sum8 = x[0] + x[1];
#else
    NAME(eight) eighths[2];
    memcpy(eighths, x, sizeof eighths);
    sum8 = eighths[0] + eighths[1];
#endif
    memcpy(quarters, &sum8, sizeof quarters);
    sum = quarters[0] + quarters[1];
#endif
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

LOCAL float NAME(max_lanes)(const float *x)
{
    float lane[DCI_LANES / 2];
    for (uint32_t i = 0; i < DCI_LANES / 2; i++) {
        lane[i] = x[i] > x[i + DCI_LANES / 2] ? x[i] : x[i + DCI_LANES / 2];
    }
    for (uint32_t width = DCI_LANES / 4; width > 0; width /= 2) {
        for (uint32_t i = 0; i < width; i++) {
            lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
        }
    }
    return lane[0];
}

// exp by 2^k * e^f, |f| <= ln(2)/2, e^f by its series to f^6 (relative error below 2e-7). 0 below -87, also for what
// does not count; limited to exp(88).
LOCAL void NAME(exp_lanes)(const NAME(floats) * in, NAME(floats) * out)
{
    const NAME(floats) zero = {0};
    const NAME(floats) low = zero - 87.0f, high = zero + 88.0f;
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    const NAME(ints) alive = *in >= low, fits = *in <= high;
    NAME(floats) x = (NAME(floats))((fits & (NAME(ints)) * in) | (~fits & (NAME(ints))high));
    x = (NAME(floats))((alive & (NAME(ints))x) | (~alive & (NAME(ints))low));
    const NAME(floats) k = (x * 1.44269504f + round) - round;
    const NAME(floats) f = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    NAME(floats) series = f * 1.38888889e-3f + 8.33333333e-3f;
    series = series * f + 4.16666667e-2f;
    series = series * f + 1.66666667e-1f;
    series = series * f + 0.5f;
    series = series * f + 1.0f;
    series = series * f + 1.0f;
    const NAME(ints) power = (__builtin_convertvector(k, NAME(ints)) + 127) << 23;
    *out = (NAME(floats))(alive & (NAME(ints))(series * (NAME(floats))power));
}

LOCAL void NAME(widen_half)(const uint16_t *in, NAME(floats) * out)
{
    const float least = 6.103515625e-05f; // 2^-14, the smallest normal fp16
    NAME(halves) narrow;
    memcpy(&narrow, in, sizeof narrow);
    const NAME(words) half = __builtin_convertvector(narrow, NAME(words));
    const NAME(words) exponent = half & 0x7c00u;
    const NAME(words) normal = ((half & 0x7fffu) << 13) + (112u << 23);
    // A subnormal is read as 2^-14 * (1 + fraction), then the 2^-14 is taken away: exact, and no fp32 subnormal is
    // touched on the way, which many processors handle slowly.
    const NAME(words) subnormal = (NAME(words))((NAME(floats))(normal + (1u << 23)) - least);
    const NAME(words) special = normal + (112u << 23); // infinity and NaN: exponent 255
    const NAME(words) is_subnormal = (NAME(words))((NAME(ints))exponent == 0);
    const NAME(words) is_special = (NAME(words))((NAME(ints))exponent == 0x7c00);
    const NAME(words) is_normal = ~(is_subnormal | is_special);
    const NAME(words) magnitude = (is_subnormal & subnormal) | (is_special & special) | (is_normal & normal);
    *out = (NAME(floats))(magnitude | ((half & 0x8000u) << 16));
}

ENTRY void NAME(widen)(enum index_dtype dtype, const void *elements, uint32_t n, float *out)
{
    if (dtype == INDEX_FP32) {
        memcpy(out, elements, n * sizeof out[0]);
        return;
    }
    const uint16_t *in = elements;
    for (uint32_t i = 0; dtype == INDEX_FP16 && i < n; i += KERNEL_WIDTH) {
        NAME(floats) wide;
        NAME(widen_half)(in + i, &wide);
        memcpy(out + i, &wide, sizeof wide);
    }
    for (uint32_t i = 0; dtype == INDEX_BF16 && i < n; i += KERNEL_WIDTH) {
        NAME(halves) narrow;
        memcpy(&narrow, in + i, sizeof narrow);
        const NAME(words) wide = __builtin_convertvector(narrow, NAME(words)) << 16;
        memcpy(out + i, &wide, sizeof wide);
    }
}

// Products of two rows, summed up in 16 lanes.
LOCAL void NAME(dot_parts)(const float *a, const float *b, uint32_t n, NAME(floats) * sum)
{
    memset(sum, 0, KERNEL_PARTS * sizeof sum[0]);
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, y;
            memcpy(&x, a + i + part * KERNEL_WIDTH, sizeof x);
            memcpy(&y, b + i + part * KERNEL_WIDTH, sizeof y);
            sum[part] += x * y;
        }
    }
}

#if KERNEL_WIDTH == 16
// 16 times sum_lanes at once: at each step of the tree two vectors share one addition.
LOCAL void NAME(sum_rows)(const NAME(floats) rows[DCI_LANES][KERNEL_PARTS], float *sums)
{
    __m512 x[DCI_LANES];
    memcpy(x, rows, sizeof x);
    for (uint32_t i = 0; i < 8; i++) { // 8 and 8
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
    }
    for (uint32_t i = 0; i < 4; i++) { // 4 and 4
        x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
    }
    for (uint32_t i = 0; i < 2; i++) { // 2 and 2
        x[i] = _mm512_add_ps(_mm512_shuffle_ps(x[i], x[i + 2], 0x44), _mm512_shuffle_ps(x[i], x[i + 2], 0xee));
    }
    const __m512 mixed = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], 0x88), _mm512_shuffle_ps(x[0], x[1], 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_storeu_ps(sums, _mm512_permutexvar_ps(order, mixed));
}
#else
LOCAL void NAME(sum_rows)(const NAME(floats) rows[DCI_LANES][KERNEL_PARTS], float *sums)
{
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        sums[i] = NAME(sum_lanes)(rows[i]);
    }
}
#endif

LOCAL float NAME(dot_lanes)(const float *a, const float *b, uint32_t n)
{
    NAME(floats) sum[KERNEL_PARTS];
    NAME(dot_parts)(a, b, n, sum);
    return NAME(sum_lanes)(sum);
}

ENTRY float NAME(dot)(const float *a, const float *b, uint32_t n)
{
    return NAME(dot_lanes)(a, b, n);
}

ENTRY float NAME(distance2)(const float *a, const float *b, uint32_t n)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}};
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, y;
            memcpy(&x, a + i + part * KERNEL_WIDTH, sizeof x);
            memcpy(&y, b + i + part * KERNEL_WIDTH, sizeof y);
            const NAME(floats) difference = x - y;
            sum[part] += difference * difference;
        }
    }
    return NAME(sum_lanes)(sum);
}

ENTRY void NAME(score16)(const float *queries, uint32_t views, const float *rows, uint32_t n, float scale,
                         float *scores)
{
    for (uint32_t v = 0; v < views; v++) {
        NAME(floats) sums[DCI_LANES][KERNEL_PARTS];
        float dots[DCI_LANES];
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            NAME(dot_parts)(queries + (size_t)v * n, rows + (size_t)i * n, n, sums[i]);
        }
        NAME(sum_rows)((const NAME(floats)(*)[KERNEL_PARTS])sums, dots);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            scores[v * DCI_LANES + i] = scale * dots[i];
        }
    }
}

// weights[16] = exp(scores - base), 0 where the score does not count.
LOCAL void NAME(weights)(const float *scores, float base, NAME(floats) * weights)
{
    const NAME(floats) zero = {0};
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(floats) s;
        memcpy(&s, scores + part * KERNEL_WIDTH, sizeof s);
        const NAME(ints) visible = s > zero + 0.5f * DCI_HIDDEN;
        const NAME(floats) below = s - base;
        NAME(exp_lanes)(&below, &weights[part]);
        weights[part] = (NAME(floats))(visible & (NAME(ints))weights[part]);
    }
}

ENTRY float NAME(exp_one)(float x)
{
    const NAME(floats) zero = {0}, in = zero + x;
    NAME(floats) out;
    NAME(exp_lanes)(&in, &out);
    return out[0];
}

ENTRY void NAME(fold16)(const float *scores, uint32_t views, const float *reference, float *top, float *total,
                        float *preview)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}}, weights[KERNEL_PARTS];
    for (uint32_t v = 0; v < views; v++, scores += DCI_LANES) {
        const float highest = NAME(max_lanes)(scores);
        if (highest > top[v]) {
            total[v] *= NAME(exp_one)(top[v] - highest);
            top[v] = highest;
        }
        NAME(weights)(scores, top[v], weights);
        total[v] += NAME(sum_lanes)(weights);
        NAME(weights)(scores, reference[v], weights);
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            sum[part] += weights[part];
        }
    }
    memcpy(preview, sum, sizeof sum);
}

ENTRY void NAME(weigh16)(const float *scores, uint32_t views, const float *top, const float *inverse, float *masses)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}}, weights[KERNEL_PARTS];
    for (uint32_t v = 0; v < views; v++, scores += DCI_LANES) {
        NAME(weights)(scores, top[v], weights);
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            sum[part] += weights[part] * inverse[v];
        }
    }
    memcpy(masses, sum, sizeof sum);
}

ENTRY float NAME(exp_sum)(const float *x, uint32_t n)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}}, weights[KERNEL_PARTS];
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        float lanes[DCI_LANES];
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            lanes[lane] = i + lane < n ? x[i + lane] : DCI_HIDDEN;
        }
        NAME(weights)(lanes, 0.0f, weights);
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            sum[part] += weights[part];
        }
    }
    return NAME(sum_lanes)(sum);
}

// Inner products of the codes of 16 pages with those of up to four views, exact in integers.
#define DOTS_VIEWS 4u

#if KERNEL_DOTS == DOTS_VNNI
LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    __m512i sum[2][DOTS_VIEWS];
    for (uint32_t v = 0; v < DOTS_VIEWS; v++) {
        sum[0][v] = sum[1][v] = _mm512_setzero_si512();
    }
    for (uint32_t i = 0; i < n; i += 8) {
        const __m512i a = _mm512_loadu_si512(codes + (size_t)i * DCI_LANES);
        const __m512i b = _mm512_loadu_si512(codes + (size_t)(i + 4) * DCI_LANES);
        for (uint32_t v = 0; v < count; v++) {
            int32_t words[2];
            memcpy(words, query + (size_t)v * n + i, sizeof words);
            sum[0][v] = _mm512_dpbusd_epi32(sum[0][v], a, _mm512_set1_epi32(words[0]));
            sum[1][v] = _mm512_dpbusd_epi32(sum[1][v], b, _mm512_set1_epi32(words[1]));
        }
    }
    for (uint32_t v = 0; v < count; v++) {
        _mm512_storeu_si512(dots + v * DCI_LANES, _mm512_add_epi32(sum[0][v], sum[1][v]));
    }
}
#elif KERNEL_DOTS == DOTS_AVX2
// Sums of two products must fit in 16 bits: the codes lose their offset and go in as size and sign, the query's bytes
// take the sign (127 * 127 * 2 fits), and the offset's part is added back at the end.
LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    const __m256i zero_code = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    __m256i sum[2][DOTS_VIEWS], query_sum[DOTS_VIEWS];
    for (uint32_t v = 0; v < DOTS_VIEWS; v++) {
        sum[0][v] = sum[1][v] = query_sum[v] = _mm256_setzero_si256();
    }
    for (uint32_t i = 0; i < n; i += 4) {
        for (uint32_t half = 0; half < 2; half++) {
            const uint8_t *at = codes + (size_t)i * DCI_LANES + (size_t)half * 32;
            const __m256i code = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(const void *)at), zero_code);
            const __m256i size = _mm256_abs_epi8(code);
            for (uint32_t v = 0; v < count; v++) {
                int32_t word;
                memcpy(&word, query + (size_t)v * n + i, sizeof word);
                const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(word), code));
                sum[half][v] = _mm256_add_epi32(sum[half][v], _mm256_madd_epi16(pairs, ones));
            }
        }
        for (uint32_t v = 0; v < count; v++) {
            int32_t word;
            memcpy(&word, query + (size_t)v * n + i, sizeof word);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(64), _mm256_set1_epi32(word));
            query_sum[v] = _mm256_add_epi32(query_sum[v], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (uint32_t v = 0; v < count; v++) {
        const __m256i offset = _mm256_slli_epi32(query_sum[v], 1);
        for (uint32_t half = 0; half < 2; half++) {
            _mm256_storeu_si256((__m256i *)(void *)(dots + v * DCI_LANES + half * 8),
                                _mm256_add_epi32(sum[half][v], offset));
        }
    }
}
#else
LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    for (uint32_t v = 0; v < count; v++) {
        int32_t sum[DCI_LANES] = {0};
        for (uint32_t i = 0; i < n; i += 4) {
            const uint8_t *code = codes + (size_t)i * DCI_LANES;
            const int8_t *q = query + (size_t)v * n + i;
            for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                sum[lane] += code[4 * lane] * q[0] + code[4 * lane + 1] * q[1] + code[4 * lane + 2] * q[2] +
                             code[4 * lane + 3] * q[3];
            }
        }
        memcpy(dots + v * DCI_LANES, sum, sizeof sum);
    }
}
#endif

ENTRY void NAME(centers16)(const struct dci_views *views, const struct sketch *sketch, float *centers)
{
    uint32_t count;
    for (uint32_t first = 0; first < views->count; first += count) {
        int32_t dots[DOTS_VIEWS * DCI_LANES];
        const int8_t *query = views->codes + (size_t)first * views->head_dim;
        const uint32_t left = views->count - first;
        count = left >= DOTS_VIEWS ? DOTS_VIEWS : left >= 2 ? 2 : 1;
        if (count == DOTS_VIEWS) { // a constant, so that the sums stay in registers
            NAME(dots)(sketch->codes, query, views->head_dim, DOTS_VIEWS, dots);
        } else if (count == 2) {
            NAME(dots)(sketch->codes, query, views->head_dim, 2, dots);
        } else {
            NAME(dots)(sketch->codes, query, views->head_dim, 1, dots);
        }
        for (uint32_t v = 0; v < count; v++) {
            for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
                NAME(ints) dot;
                NAME(floats) scale;
                memcpy(&dot, dots + v * DCI_LANES + part * KERNEL_WIDTH, sizeof dot);
                memcpy(&scale, sketch->scale + part * KERNEL_WIDTH, sizeof scale);
                const NAME(floats) wide = __builtin_convertvector(dot - views->zeros[first + v], NAME(floats));
                const NAME(floats) center = wide * (scale * views->steps[first + v]) + views->bases[first + v];
                memcpy(centers + (size_t)(first + v) * DCI_LANES + part * KERNEL_WIDTH, &center, sizeof center);
            }
        }
    }
}

LOCAL void NAME(load_lanes)(const float *from, uint32_t part, NAME(floats) * out)
{
    memcpy(out, from + part * KERNEL_WIDTH, sizeof *out);
}

LOCAL void NAME(least)(const NAME(floats) * a, const NAME(floats) * b, NAME(floats) * out)
{
    const NAME(ints) is_less = *a < *b;
    *out = (NAME(floats))((is_less & (NAME(ints)) * a) | (~is_less & (NAME(ints)) * b));
}

// Log of the sum of exp of as many scores as the page has rows, spread around their center: while the deviation is
// small all of them carry it, else the largest few.
LOCAL void NAME(exponents)(const struct sketch *sketch, const float *centers, float norm, uint32_t part,
                           NAME(floats) * out)
{
    NAME(floats) center, unit, log_rows, reach;
    NAME(load_lanes)(centers, part, &center);
    NAME(load_lanes)(sketch->unit, part, &unit);
    NAME(load_lanes)(sketch->log_rows, part, &log_rows);
    NAME(load_lanes)(sketch->reach, part, &reach);
    const NAME(floats) deviation = unit * norm;
    const NAME(ints) by_all = deviation < reach;
    const NAME(floats) all = log_rows + 0.5f * deviation * deviation, few = reach * deviation;
    *out = center + (NAME(floats))((by_all & (NAME(ints))all) | (~by_all & (NAME(ints))few));
}

ENTRY void NAME(survey16)(const struct dci_views *views, const struct sketch *sketch, const float *centers, float *top,
                          float *total)
{
    for (uint32_t v = 0; v < views->count; v++, centers += DCI_LANES) {
        NAME(floats) exponent[KERNEL_PARTS], weights[KERNEL_PARTS];
        float lanes[DCI_LANES];
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(exponents)(sketch, centers, views->norms[v], part, &exponent[part]);
        }
        memcpy(lanes, exponent, sizeof lanes);
        const float highest = NAME(max_lanes)(lanes);
        if (highest > top[v]) {
            total[v] *= NAME(exp_one)(top[v] - highest);
            top[v] = highest;
        }
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            const NAME(floats) below = exponent[part] - top[v];
            NAME(exp_lanes)(&below, &weights[part]);
        }
        total[v] += NAME(sum_lanes)(weights);
    }
}

ENTRY void NAME(merits16)(const struct dci_views *views, const struct sketch *sketch, const float *centers,
                          const float *reference, float *merits, float *masses)
{
    const NAME(floats) zero = {0};
    const NAME(floats) limit = zero + EXPONENT_MAX;
    const float share = 1.0f / (float)views->count;
    NAME(floats) merit[KERNEL_PARTS] = {{0}}, mass[KERNEL_PARTS] = {{0}};
    for (uint32_t v = 0; v < views->count; v++, centers += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) center, hope, x, weight;
            NAME(load_lanes)(centers, part, &center);
            NAME(load_lanes)(sketch->hope, part, &hope);
            x = (center + hope * views->norms[v]) - reference[v];
            NAME(least)(&x, &limit, &x);
            NAME(exp_lanes)(&x, &weight);
            merit[part] += weight * share;
            if (masses != NULL) {
                NAME(exponents)(sketch, centers, views->norms[v], part, &x);
                x = x - reference[v];
                NAME(least)(&x, &limit, &x);
                NAME(exp_lanes)(&x, &weight);
                mass[part] += weight * share;
            }
        }
    }
    memcpy(merits, merit, sizeof merit);
    if (masses != NULL) {
        memcpy(masses, mass, sizeof mass);
    }
}

ENTRY void NAME(rest16)(const struct dci_views *views, const struct sketch *sketch, const float *centers,
                        const float *top, const float *weights, float *rest)
{
    for (uint32_t v = 0; v < views->count; v++, centers += DCI_LANES) {
        NAME(floats) sum[KERNEL_PARTS];
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, log_rows, weight;
            NAME(exponents)(sketch, centers, views->norms[v], part, &x);
            NAME(load_lanes)(sketch->log_rows, part, &log_rows);
            NAME(load_lanes)(weights, part, &weight);
            x = x - top[v];
            NAME(least)(&x, &log_rows, &x);
            NAME(exp_lanes)(&x, &sum[part]);
            sum[part] *= weight;
        }
        rest[v] += NAME(sum_lanes)(sum);
    }
}

#define KERNEL_TEXT2(x) #x
#define KERNEL_TEXT(x)  KERNEL_TEXT2(x)

static const struct dci_kernel NAME(kernel) = {
    .name = KERNEL_TEXT(KERNEL_SET),
    .widen = NAME(widen),
    .dot = NAME(dot),
    .distance2 = NAME(distance2),
    .score16 = NAME(score16),
    .fold16 = NAME(fold16),
    .weigh16 = NAME(weigh16),
    .exp_sum = NAME(exp_sum),
    .exp_one = NAME(exp_one),
    .centers16 = NAME(centers16),
    .survey16 = NAME(survey16),
    .merits16 = NAME(merits16),
    .rest16 = NAME(rest16),
};

#undef KERNEL_PARTS
#undef KERNEL_PASTE2
#undef KERNEL_PASTE
#undef NAME
#undef LOCAL
#undef ENTRY
#undef KERNEL_TEXT
#undef KERNEL_TEXT2
#undef KERNEL_SET
#undef KERNEL_TARGET
#undef KERNEL_WIDTH
#undef KERNEL_DOTS
#undef DOTS_VIEWS
