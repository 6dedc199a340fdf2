// The kernels in vectors of KERNEL_WIDTH floats (4, 8 or 16), included by kernel.c once per instruction set.
// KERNEL_SET names the copy, KERNEL_TARGET is its target attribute. Sixteen lanes are KERNEL_PARTS vectors; whatever
// the width, lane i holds the same elements and the lanes are added in the same order. No include guard, on purpose.
// Vectors travel by pointer, so that no calling convention depends on the width of a register.
#define KERNEL_PARTS        (16 / KERNEL_WIDTH)
#define KERNEL_PASTE2(a, b) a##_##b
#define KERNEL_PASTE(a, b)  KERNEL_PASTE2(a, b)
#define NAME(name)          KERNEL_PASTE(name, KERNEL_SET)
#define LOCAL               KERNEL_TARGET static inline KERNEL_INLINE
#define ENTRY               KERNEL_TARGET static

typedef float NAME(floats) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint8_t NAME(bytes) __attribute__((vector_size(KERNEL_WIDTH)));
typedef int8_t NAME(codes8) __attribute__((vector_size(KERNEL_WIDTH)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * KERNEL_WIDTH)));
typedef int16_t NAME(shorts) __attribute__((vector_size(2 * KERNEL_WIDTH)));
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

// mask ? a : b, lane by lane.
LOCAL void NAME(choose)(const NAME(ints) * mask, const NAME(floats) * a, const NAME(floats) * b, NAME(floats) * out)
{
    *out = (NAME(floats))((*mask & (NAME(ints)) * a) | (~*mask & (NAME(ints)) * b));
}

// a < b ? a : b and a > b ? a : b, which is what the instructions of these names do, to the last case.
LOCAL void NAME(least)(const NAME(floats) * a, const NAME(floats) * b, NAME(floats) * out)
{
#if KERNEL_WIDTH == 16
    *out = (NAME(floats))_mm512_min_ps((__m512)*a, (__m512)*b);
#elif KERNEL_WIDTH == 8
    *out = (NAME(floats))_mm256_min_ps((__m256)*a, (__m256)*b);
#else
    const NAME(ints) is_less = *a < *b;
    NAME(choose)(&is_less, a, b, out);
#endif
}

LOCAL void NAME(most)(const NAME(floats) * a, const NAME(floats) * b, NAME(floats) * out)
{
#if KERNEL_WIDTH == 16
    *out = (NAME(floats))_mm512_max_ps((__m512)*a, (__m512)*b);
#elif KERNEL_WIDTH == 8
    *out = (NAME(floats))_mm256_max_ps((__m256)*a, (__m256)*b);
#else
    const NAME(ints) is_more = *a > *b;
    NAME(choose)(&is_more, a, b, out);
#endif
}

// exp by 2^k * e^f, |f| <= ln(2)/2, e^f by its series to f^6 (relative error below 2e-7). 0 below -87, also for what
// does not count; limited to exp(88).
LOCAL void NAME(exp_lanes)(const NAME(floats) * in, NAME(floats) * out)
{
    const NAME(floats) zero = {0};
    const NAME(floats) low = zero - 87.0f, high = zero + 88.0f;
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    const NAME(ints) alive = *in >= low;
    NAME(floats) x;
    NAME(most)(in, &low, &x);
    NAME(least)(&x, &high, &x);
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

#if KERNEL_WIDTH == 16
LOCAL void NAME(widen_half)(const uint16_t *in, NAME(floats) * out)
{
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)in));
    memcpy(out, &wide, sizeof wide);
}
#elif KERNEL_WIDTH == 8
LOCAL void NAME(widen_half)(const uint16_t *in, NAME(floats) * out)
{
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)in));
    memcpy(out, &wide, sizeof wide);
}
#else
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
#endif

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

ENTRY float NAME(exp_one)(float x)
{
    const NAME(floats) zero = {0}, in = zero + x;
    NAME(floats) out;
    NAME(exp_lanes)(&in, &out);
    return out[0];
}

#include "index/kernel_dots.h"

LOCAL void NAME(dots_of)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    if (count == DOTS_VIEWS) { // a constant, so that the sums stay in registers
        NAME(dots)(codes, query, n, DOTS_VIEWS, dots);
    } else if (count == 2) {
        NAME(dots)(codes, query, n, 2, dots);
    } else {
        NAME(dots)(codes, query, n, 1, dots);
    }
}

LOCAL uint32_t NAME(group_of)(uint32_t left)
{
    return left >= DOTS_VIEWS ? DOTS_VIEWS : left >= 2 ? 2 : 1;
}

LOCAL void NAME(load_lanes)(const float *from, uint32_t part, NAME(floats) * out)
{
    memcpy(out, from + part * KERNEL_WIDTH, sizeof *out);
}

LOCAL void NAME(store_lanes)(float *to, uint32_t part, const NAME(floats) * in)
{
    memcpy(to + part * KERNEL_WIDTH, in, sizeof *in);
}

ENTRY void NAME(centers16)(const struct dci_views *views, const struct dci_block *block, float *centers)
{
    const NAME(floats) zero = {0};
    const NAME(floats) hidden = zero + DCI_HIDDEN;
    uint32_t count;
    for (uint32_t first = 0; first < views->count; first += count) {
        int32_t dots[DOTS_VIEWS * DCI_LANES];
        count = NAME(group_of)(views->count - first);
        NAME(dots_of)(block->codes, views->codes + (size_t)first * views->head_dim, views->head_dim, count, dots);
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) step, rows;
            NAME(load_lanes)(block->step, part, &step);
            NAME(load_lanes)(block->rows, part, &rows);
            const NAME(ints) used = rows > zero;
            for (uint32_t v = 0; v < count; v++) {
                NAME(ints) dot;
                memcpy(&dot, dots + v * DCI_LANES + part * KERNEL_WIDTH, sizeof dot);
                const NAME(floats) wide =
                    __builtin_convertvector(dot - DOTS_ZERO * views->sums[first + v], NAME(floats));
                NAME(floats) center = wide * (step * views->steps[first + v]) + views->bases[first + v];
                NAME(choose)(&used, &center, &hidden, &center);
                NAME(store_lanes)(centers + (size_t)(first + v) * DCI_LANES, part, &center);
            }
        }
    }
}

#include "index/kernel_estimates.h"
#include "index/kernel_rows.h"

ENTRY void NAME(add)(float *sum, const float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n / KERNEL_WIDTH; i++) {
        NAME(floats) a, b;
        NAME(load_lanes)(sum, i, &a);
        NAME(load_lanes)(x, i, &b);
        a += b;
        NAME(store_lanes)(sum, i, &a);
    }
}

#include "index/kernel_keys.h"

#include "index/kernel_divide.h"

#define KERNEL_TEXT2(x) #x
#define KERNEL_TEXT(x)  KERNEL_TEXT2(x)

static const struct dci_kernel NAME(kernel) = {
    .name = KERNEL_TEXT(KERNEL_SET),
    .widen = NAME(widen),
    .dot = NAME(dot),
    .largest16 = NAME(largest16),
    .encode7 = NAME(encode7),
    .dots7 = NAME(dots7),
    .sums7 = NAME(sums7),
    .rest16 = NAME(rest16),
    .balance16 = NAME(balance16),
    .add = NAME(add),
    .hadamard = NAME(hadamard),
    .encode5 = NAME(encode5),
    .exp_one = NAME(exp_one),
    .near16 = NAME(near16),
    .centers16 = NAME(centers16),
    .signs16 = NAME(signs16),
    .score16 = NAME(score16),
    .tokens16 = NAME(tokens16),
    .sift16 = NAME(sift16),
    .survey16 = NAME(survey16),
    .hopes16 = NAME(hopes16),
    .merits16 = NAME(merits16),
    .above16 = NAME(above16),
    .below16 = NAME(below16),
    .encode8 = NAME(encode8),
    .decode8 = NAME(decode8),
    .probe = NAME(probe),
    .promise16 = NAME(promise16),
    .spread16 = NAME(spread16),
    .exps16 = NAME(exps16),
    .mix16 = NAME(mix16),
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
#undef DOTS_ZERO
