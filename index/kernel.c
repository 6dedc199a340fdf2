// Arithmetic on key rows: conversion, inner products, distances, exponentials.
//
// Invariant: one fixed order of operations. A sum of n products runs in 16 lanes, lane i adding the elements i, i+16,
// i+32, ...; the lanes are then added as a tree. The kernels are written once, in GNU vectors (kernel_lanes.h), and
// compiled for each instruction set in vectors as wide as it has. Pure functions; any thread.
#include "index/kernel.h"

#include "index/sketch.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// No page's exponent is above this one over the reference.
#define EXPONENT_MAX  80.0f

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
#define KERNEL_TARGET __attribute__((target("avx2")))
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

const struct dci_kernel *dci_kernel_at(uint32_t number)
{
    const struct dci_kernel *found[4] = {&kernel_portable, NULL, NULL, NULL};
#if defined(__x86_64__)
    uint32_t count = 1;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
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

float dci_encode(const float *x, uint32_t n, int8_t *codes)
{
    const float nothing = 0x1p-100f;
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    float largest = 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        const float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
    }
    if (largest < nothing) {
        memset(codes, 0, n);
        return 0.0f;
    }
    const float step = largest / 127.0f, inverse = 127.0f / largest;
    for (uint32_t i = 0; i < n; i++) {
        codes[i] = (int8_t)((x[i] * inverse + round) - round);
    }
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
