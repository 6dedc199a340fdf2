// Arithmetic on key rows. Every function has one order of operations, written out in vectors of 16 lanes, and is
// compiled for several instruction sets: they all return the same bits (the build forbids contraction of a*b+c).
#ifndef ICECACHE_INDEX_KERNEL_H
#define ICECACHE_INDEX_KERNEL_H

#include "index/index.h"

#define DCI_LANES 16u

// A score that does not count: the token is not visible to the query, or the lane is padding.
#define DCI_HIDDEN (-3.0e38f)

// Scores of real tokens are kept below this, so that no sum or difference of them overflows.
#define DCI_SCORE_MAX 1.0e30f

struct dci_kernel {
    const char *name;
    // n elements (multiple of 16) of the given type to fp32, exact, subnormals included.
    void (*widen)(enum index_dtype dtype, const void *elements, uint32_t n, float *out);
    float (*dot)(const float *a, const float *b, uint32_t n);
    float (*distance2)(const float *a, const float *b, uint32_t n);
    // 16 rows against every view: scores[view][16] = scale * query . row.
    void (*score16)(const float *queries, uint32_t views, const float *rows, uint32_t n, float scale, float *scores);
    // Adds 16 scores of every view to its running log-sum-exp (top[v] + log total[v]). preview[16] becomes the sum over
    // the views of exp(score - reference[v]).
    void (*fold16)(const float *scores, uint32_t views, const float *reference, float *top, float *total,
                   float *preview);
    // masses[16] = sum over the views of exp(score - top[v]) * inverse[v].
    void (*weigh16)(const float *scores, uint32_t views, const float *top, const float *inverse, float *masses);
    // Sum of exp(x[i]).
    float (*exp_sum)(const float *x, uint32_t n);
    float (*exp_one)(float x);
};

// The best one for this machine.
const struct dci_kernel *dci_kernel_best(void);
// All that this machine can run, for tests: NULL past the end. 0 is the portable one.
const struct dci_kernel *dci_kernel_at(uint32_t number);

float dci_exp(float x); // 0 below -87, limited to exp(88)
float dci_log(float x); // of a normal positive number

#endif
