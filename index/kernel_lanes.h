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

LOCAL float NAME(dot_lanes)(const float *a, const float *b, uint32_t n)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}};
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, y;
            memcpy(&x, a + i + part * KERNEL_WIDTH, sizeof x);
            memcpy(&y, b + i + part * KERNEL_WIDTH, sizeof y);
            sum[part] += x * y;
        }
    }
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
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            const float dot = NAME(dot_lanes)(queries + (size_t)v * n, rows + (size_t)i * n, n);
            scores[v * DCI_LANES + i] = scale * dot;
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
