// Arithmetic on key rows: conversion, inner products, distances, exponentials.
//
// Invariant: one fixed order of operations. A sum of n products runs in 16 lanes, lane i adding the elements i, i+16,
// i+32, ...; the lanes are then added as a tree (8 and 8, 4 and 4, 2 and 2, 1 and 1). The bodies below are written once
// in GNU vectors of 16 lanes, which every compiler lowers to what the instruction set has, and are instantiated per
// instruction set. Pure functions; any thread.
#include "index/kernel.h"

#include <string.h>

typedef float lanes16 __attribute__((vector_size(64)));
typedef float lanes8 __attribute__((vector_size(32)));
typedef float lanes4 __attribute__((vector_size(16)));
typedef int32_t ints16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));
typedef uint16_t halves16 __attribute__((vector_size(32)));

// Inlined into functions of every instruction set; vectors travel by pointer, so that no calling convention depends on
// the width of a register.
#define BODY static inline __attribute__((always_inline))

#define SPLAT(x)                                                                                                       \
    {                                                                                                                  \
        (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x), (x)                                 \
    }

BODY float sum_body(const lanes16 *x)
{
    lanes8 half[2];
    memcpy(half, x, sizeof half);
    half[0] += half[1];
    lanes4 quarter[2];
    memcpy(quarter, &half[0], sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

BODY float max_body(const lanes16 *x)
{
    float lane[DCI_LANES];
    memcpy(lane, x, sizeof lane);
    for (uint32_t width = DCI_LANES / 2; width > 0; width /= 2) {
        for (uint32_t i = 0; i < width; i++) {
            lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
        }
    }
    return lane[0];
}

BODY void select_body(const ints16 *mask, const lanes16 *yes, const lanes16 *no, lanes16 *out)
{
    *out = (lanes16)((*mask & (ints16)*yes) | (~*mask & (ints16)*no));
}

// exp by 2^k * e^f, |f| <= ln(2)/2, e^f by its series to f^6 (relative error below 2e-7).
BODY void exp_body(const lanes16 *in, lanes16 *out)
{
    const lanes16 low = SPLAT(-87.0f), high = SPLAT(88.0f), log2e = SPLAT(1.44269504f);
    const lanes16 round = SPLAT(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const lanes16 ln2_high = SPLAT(0.693359375f), ln2_low = SPLAT(-2.12194440e-4f);
    const lanes16 c6 = SPLAT(1.38888889e-3f), c5 = SPLAT(8.33333333e-3f), c4 = SPLAT(4.16666667e-2f);
    const lanes16 c3 = SPLAT(1.66666667e-1f), c2 = SPLAT(0.5f), one = SPLAT(1.0f);
    const ints16 bias = SPLAT(127);

    const ints16 alive = *in >= low;
    ints16 fits = *in <= high;
    lanes16 x;
    select_body(&fits, in, &high, &x);
    select_body(&alive, &x, &low, &x);
    const lanes16 k = (x * log2e + round) - round;
    const lanes16 f = (x - k * ln2_high) - k * ln2_low;
    const lanes16 series = (((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f + one) * f + one;
    const ints16 exponent = (__builtin_convertvector(k, ints16) + bias) << 23;
    *out = (lanes16)(alive & (ints16)(series * (lanes16)exponent));
}

BODY float exp1_body(float x)
{
    const lanes16 in = SPLAT(x);
    lanes16 out;
    exp_body(&in, &out);
    return out[0];
}

BODY void widen_fp16_body(const uint16_t *in, lanes16 *out)
{
    const words16 magnitude_mask = SPLAT(0x7fffu), sign_mask = SPLAT(0x8000u), exponent_mask = SPLAT(0x7c00u);
    const words16 rebias = SPLAT(112u << 23), step = SPLAT(1u << 23), zero = SPLAT(0u);
    const lanes16 least = SPLAT(6.103515625e-05f); // 2^-14, the smallest normal fp16

    halves16 narrow;
    memcpy(&narrow, in, sizeof narrow);
    const words16 half = __builtin_convertvector(narrow, words16);
    const words16 exponent = half & exponent_mask;
    const words16 normal = ((half & magnitude_mask) << 13) + rebias;
    // A subnormal is read as 2^-14 * (1 + fraction), then the 2^-14 is taken away: exact, and no fp32 subnormal is
    // touched on the way, which many processors handle slowly.
    const words16 subnormal = (words16)((lanes16)(normal + step) - least);
    const words16 special = normal + rebias; // infinity and NaN: exponent 255
    const words16 is_subnormal = (words16)(exponent == zero), is_special = (words16)(exponent == exponent_mask);
    const words16 magnitude =
        (is_subnormal & subnormal) | (is_special & special) | (~(is_subnormal | is_special) & normal);
    *out = (lanes16)(magnitude | ((half & sign_mask) << 16));
}

BODY void widen_body(enum index_dtype dtype, const void *elements, uint32_t n, float *out)
{
    if (dtype == INDEX_FP32) {
        memcpy(out, elements, n * sizeof out[0]);
        return;
    }
    const uint16_t *in = elements;
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        lanes16 wide;
        if (dtype == INDEX_FP16) {
            widen_fp16_body(in + i, &wide);
        } else {
            halves16 narrow;
            memcpy(&narrow, in + i, sizeof narrow);
            wide = (lanes16)(__builtin_convertvector(narrow, words16) << 16);
        }
        memcpy(out + i, &wide, sizeof wide);
    }
}

BODY float dot_body(const float *a, const float *b, uint32_t n)
{
    lanes16 sum = SPLAT(0.0f);
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        lanes16 x, y;
        memcpy(&x, a + i, sizeof x);
        memcpy(&y, b + i, sizeof y);
        sum += x * y;
    }
    return sum_body(&sum);
}

BODY float distance2_body(const float *a, const float *b, uint32_t n)
{
    lanes16 sum = SPLAT(0.0f);
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        lanes16 x, y;
        memcpy(&x, a + i, sizeof x);
        memcpy(&y, b + i, sizeof y);
        const lanes16 difference = x - y;
        sum += difference * difference;
    }
    return sum_body(&sum);
}

BODY void score16_body(const float *queries, uint32_t views, const float *rows, uint32_t n, float scale, float *scores)
{
    for (uint32_t v = 0; v < views; v++) {
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            scores[v * DCI_LANES + i] = scale * dot_body(queries + (size_t)v * n, rows + (size_t)i * n, n);
        }
    }
}

BODY void fold16_body(const float *scores, uint32_t views, const float *reference, float *top, float *total,
                      float *preview)
{
    const lanes16 hidden = SPLAT(0.5f * DCI_HIDDEN);
    lanes16 sum = SPLAT(0.0f);
    for (uint32_t v = 0; v < views; v++) {
        lanes16 s, weight;
        memcpy(&s, scores + v * DCI_LANES, sizeof s);
        const ints16 visible = s > hidden;
        const float highest = max_body(&s);
        if (highest > top[v]) {
            total[v] *= exp1_body(top[v] - highest);
            top[v] = highest;
        }
        const lanes16 top16 = SPLAT(top[v]), reference16 = SPLAT(reference[v]);
        const lanes16 below_top = s - top16, below_reference = s - reference16;
        exp_body(&below_top, &weight);
        weight = (lanes16)(visible & (ints16)weight);
        total[v] += sum_body(&weight);
        exp_body(&below_reference, &weight);
        sum += (lanes16)(visible & (ints16)weight);
    }
    memcpy(preview, &sum, sizeof sum);
}

BODY void weigh16_body(const float *scores, uint32_t views, const float *top, const float *inverse, float *masses)
{
    const lanes16 hidden = SPLAT(0.5f * DCI_HIDDEN);
    lanes16 sum = SPLAT(0.0f);
    for (uint32_t v = 0; v < views; v++) {
        lanes16 s, weight;
        memcpy(&s, scores + v * DCI_LANES, sizeof s);
        const ints16 visible = s > hidden;
        const lanes16 top16 = SPLAT(top[v]), inverse16 = SPLAT(inverse[v]);
        const lanes16 below = s - top16;
        exp_body(&below, &weight);
        sum += (lanes16)(visible & (ints16)weight) * inverse16;
    }
    memcpy(masses, &sum, sizeof sum);
}

BODY float exp_sum_body(const float *x, uint32_t n)
{
    lanes16 sum = SPLAT(0.0f);
    for (uint32_t i = 0; i < n; i += DCI_LANES) {
        lanes16 in = SPLAT(DCI_HIDDEN), out;
        memcpy(&in, x + i, (n - i < DCI_LANES ? n - i : DCI_LANES) * sizeof x[0]);
        exp_body(&in, &out);
        sum += out;
    }
    return sum_body(&sum);
}

// One set of entry points per instruction set.
#define KERNEL_SET(set, label, target)                                                                                 \
    target static void widen_##set(enum index_dtype dtype, const void *elements, uint32_t n, float *out)               \
    {                                                                                                                  \
        if (dtype == INDEX_FP16) {                                                                                     \
            widen_body(INDEX_FP16, elements, n, out);                                                                  \
        } else if (dtype == INDEX_BF16) {                                                                              \
            widen_body(INDEX_BF16, elements, n, out);                                                                  \
        } else {                                                                                                       \
            widen_body(INDEX_FP32, elements, n, out);                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    target static float dot_##set(const float *a, const float *b, uint32_t n)                                          \
    {                                                                                                                  \
        return dot_body(a, b, n);                                                                                      \
    }                                                                                                                  \
    target static float distance2_##set(const float *a, const float *b, uint32_t n)                                    \
    {                                                                                                                  \
        return distance2_body(a, b, n);                                                                                \
    }                                                                                                                  \
    target static void score16_##set(const float *queries, uint32_t views, const float *rows, uint32_t n, float scale, \
                                     float *scores)                                                                    \
    {                                                                                                                  \
        score16_body(queries, views, rows, n, scale, scores);                                                          \
    }                                                                                                                  \
    target static void fold16_##set(const float *scores, uint32_t views, const float *reference, float *top,           \
                                    float *total, float *preview)                                                      \
    {                                                                                                                  \
        fold16_body(scores, views, reference, top, total, preview);                                                    \
    }                                                                                                                  \
    target static void weigh16_##set(const float *scores, uint32_t views, const float *top, const float *inverse,      \
                                     float *masses)                                                                    \
    {                                                                                                                  \
        weigh16_body(scores, views, top, inverse, masses);                                                             \
    }                                                                                                                  \
    target static float exp_sum_##set(const float *x, uint32_t n)                                                      \
    {                                                                                                                  \
        return exp_sum_body(x, n);                                                                                     \
    }                                                                                                                  \
    static const struct dci_kernel kernel_##set = {label,         widen_##set,  dot_##set,     distance2_##set,        \
                                                   score16_##set, fold16_##set, weigh16_##set, exp_sum_##set};

KERNEL_SET(portable, "portable", )
#if defined(__x86_64__)
KERNEL_SET(avx2, "avx2", __attribute__((target("avx2"))))
KERNEL_SET(avx512, "avx512", __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))))
#endif

const struct dci_kernel *dci_kernel_at(uint32_t number)
{
    const struct dci_kernel *found[3] = {&kernel_portable, NULL, NULL};
#if defined(__x86_64__)
    uint32_t count = 1;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        found[count++] = &kernel_avx2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        found[count++] = &kernel_avx512;
    }
#endif
    return number < 3 ? found[number] : NULL;
}

const struct dci_kernel *dci_kernel_best(void)
{
    const struct dci_kernel *best = &kernel_portable;
    for (uint32_t i = 1; dci_kernel_at(i) != NULL; i++) {
        best = dci_kernel_at(i);
    }
    return best;
}

float dci_exp(float x)
{
    return exp1_body(x);
}

// ln(m * 2^e) with m in [sqrt(1/2), sqrt(2)): 2 atanh((m - 1) / (m + 1)) + e ln 2.
float dci_log(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t root_half = 0x3f3504f3u;
    const int32_t exponent = (int32_t)(bits - root_half) >> 23;
    bits -= (uint32_t)exponent << 23;
    float m;
    memcpy(&m, &bits, sizeof m);
    const float y = (m - 1.0f) / (m + 1.0f), y2 = y * y;
    const float series = y * (2.0f + y2 * (0.66666667f + y2 * (0.4f + y2 * (0.28571429f + y2 * 0.22222222f))));
    return (float)exponent * 0.69314718f + series;
}
