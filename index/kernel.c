// Arithmetic on key rows: conversion, inner products, distances, exponentials.
//
// Invariant: one fixed order of operations. A sum of n products runs in 16 lanes, lane i adding the elements i, i+16,
// i+32, ...; the lanes are then added as a tree. The kernels are written once, in GNU vectors (kernel_lanes.h), and
// compiled for each instruction set in vectors as wide as it has. Pure functions; any thread.
#include "index/kernel.h"

#include <float.h>
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

// Estimates: no exponent above this one over the reference, no deviation of scores outside these bounds.
#define EXPONENT_MAX  80.0f
#define DEVIATION_MAX 12.0f
#define UNIT_LEAST    1.0e-20f

// How many deviations above the anchor's score the best of a cell's tokens is hoped to be, and the farthest one.
#define HOPE_DEVIATIONS 2.0f
#define FAR_DEVIATIONS  1.5f

// Phi(x) is nearly 1 / (1 + exp(-1.702 x)).
#define PHI_SLOPE 1.702f

// Scores have heavier tails than a normal distribution: what a cell may add to the selection is estimated with a
// deviation this much larger.
#define TAIL_MARGIN 1.15f

// Step of a 5-bit code, and the squared norm that counts as nothing.
#define CODE_STEP        DCI_CODE_STEP
#define CODE_NORM2_LEAST 0x1p-60f
#define CODE_LEAST       0x1p-100f // the largest element of what an 8-bit code takes as nothing

// The largest sum of the sizes of four table codes, before they are rounded.
#define TABLE_SUM_MAX 125.0f

// Is it the head_dim of many models, for which loops are unrolled? Neither that nor forced inlining under the
// address sanitizer, where compiling takes minutes then, nor where the compiler does not optimise and refuses it.
#if defined(__SANITIZE_ADDRESS__)
#define KERNEL_SANITIZED 1
#elif defined(__has_feature) // of clang, which has no such macro
#if __has_feature(address_sanitizer)
#define KERNEL_SANITIZED 1
#endif
#endif
#if defined(KERNEL_SANITIZED) || !defined(__OPTIMIZE__)
#define KERNEL_FIXED(n, dim) ((void)(dim), false)
#define KERNEL_LEAST(n, dim) (n)
#define KERNEL_INLINE
#define KERNEL_UNROLLED
#else
#define KERNEL_INLINE        __attribute__((always_inline))
#define KERNEL_UNROLLED      _Pragma("GCC unroll 64")
#define KERNEL_FIXED(n, dim) ((n) == (dim))
#define KERNEL_LEAST(n, dim) (dim) // where no other is left
#endif

#define DOTS_PORTABLE 0
#define DOTS_AVX2     1
#define DOTS_VNNI     2

#define KERNEL_SET    portable
#define KERNEL_TARGET
#define KERNEL_WIDTH 4
#define KERNEL_DOTS  DOTS_PORTABLE
#include "index/kernel_lanes.h"

#if defined(__x86_64__)
#define KERNEL_SET    avx2
#define KERNEL_TARGET __attribute__((target("avx2,f16c")))
#define KERNEL_WIDTH  8
#define KERNEL_DOTS   DOTS_AVX2
#include "index/kernel_lanes.h"

#define KERNEL_SET    avx512
#define KERNEL_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#define KERNEL_WIDTH  16
#define KERNEL_DOTS   DOTS_AVX2
#include "index/kernel_lanes.h"

#define KERNEL_SET    avx512vnni
#define KERNEL_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")))
#define KERNEL_WIDTH  16
#define KERNEL_DOTS   DOTS_VNNI
#include "index/kernel_lanes.h"
#endif

#if defined(__x86_64__)
// Conversion of halves; not every compiler can be asked for it.
static bool has_f16c(void)
{
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const struct dci_kernel *dci_kernel_at(uint32_t number)
{
    const struct dci_kernel *found[4] = {&kernel_portable, NULL, NULL, NULL};
#if defined(__x86_64__)
    uint32_t count = 1;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && has_f16c()) {
        found[count++] = &kernel_avx2;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        found[count++] = &kernel_avx512;
        if (__builtin_cpu_supports("avx512vnni")) {
            found[count++] = &kernel_avx512vnni;
        }
    }
#endif
    return number < 4 ? found[number] : NULL;
}

const struct dci_kernel *dci_kernel_best(void)
{
    const struct dci_kernel *best = &kernel_portable;
    for (uint32_t i = 1; dci_kernel_at(i) != NULL; i++) {
        best = dci_kernel_at(i);
    }
    return best;
}

typedef uint8_t table __attribute__((vector_size(16)));

// A group's table: for 4 bits, the sum of the codes whose bit is set, less that of the negative ones.
static void table_fill(const int32_t *codes, int32_t negative, uint8_t *out)
{
    const uint8_t y = 255;
    const table bits[4] = {
        {0, y, 0, y, 0, y, 0, y, 0, y, 0, y, 0, y, 0, y},
        {0, 0, y, y, 0, 0, y, y, 0, 0, y, y, 0, 0, y, y},
        {0, 0, 0, 0, y, y, y, y, 0, 0, 0, 0, y, y, y, y},
        {0, 0, 0, 0, 0, 0, 0, 0, y, y, y, y, y, y, y, y},
    };
    const table zero = {0};
    table sum = zero - (uint8_t)negative;
    for (uint32_t i = 0; i < 4; i++) {
        sum += bits[i] & (zero + (uint8_t)codes[i]);
    }
    memcpy(out, &sum, sizeof sum);
}

float dci_tables_make(const float *x, uint32_t n, uint8_t *tables, int32_t *zero)
{
    // The first and the third group of 16 elements are read from the low halves of two bytes.
    static const uint32_t order[4] = {0, 2, 1, 3};
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    int32_t codes[INDEX_HEAD_DIM_MAX];
    float largest = 0.0f;
    for (uint32_t i = 0; i < n; i += 4) {
        const float sum = (fabsf(x[i]) + fabsf(x[i + 1])) + (fabsf(x[i + 2]) + fabsf(x[i + 3]));
        largest = sum > largest ? sum : largest;
    }
    const float step = largest > CODE_LEAST ? largest / TABLE_SUM_MAX : 0.0f,
                inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        codes[i] = (int32_t)((x[i] * inverse + round) - round);
    }
    int32_t all_negative = 0, all = 0;
    for (uint32_t i = 0; i < n; i += 4) {
        int32_t negative = 0;
        for (uint32_t j = i; j < i + 4; j++) {
            negative += codes[j] < 0 ? codes[j] : 0;
            all += codes[j];
        }
        table_fill(codes + i, negative, tables + (size_t)(i / 16 * 4 + order[i / 4 % 4]) * 16);
        all_negative += negative;
    }
    *zero = all - 2 * all_negative;
    return step;
}

float dci_exp(float x)
{
    return kernel_portable.exp_one(x);
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

float dci_sum_lanes(const float *lanes)
{
    floats_portable parts[4];
    memcpy(parts, lanes, sizeof parts);
    return sum_lanes_portable(parts);
}

float dci_max_lanes(const float *lanes)
{
    return max_lanes_portable(lanes);
}
