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

// Views as sketches see them: queries in int8, and what turns an inner product of codes into a score.
struct dci_views {
    uint32_t count, head_dim;
    const int8_t *codes;  // [view][head_dim]
    const int32_t *zeros; // per view: what a sketch of nothing but code 128 scores in codes
    const float *steps;   // per view: softmax scale * scale of the codes
    const float *bases;   // per view: score of the tree's base
    const float *norms;   // per view: deviation of the scores for an isotropic deviation of 1 of the keys
};

struct sketch;

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

    // Sketches: 16 pages at once. A page's exponent is the log of the estimated mass of its tokens.
    // centers[view][16] = estimated score of the mean. The inner products of codes are exact.
    void (*centers16)(const struct dci_views *views, const struct sketch *sketch, float *centers);
    // Adds the exponents to the running log-sum-exp of every view.
    void (*survey16)(const struct dci_views *views, const struct sketch *sketch, const float *centers, float *top,
                     float *total);
    // merits[16] = mean over the views of exp(hoped-for best score - reference), masses[16] the same of the exponents
    // (NULL: not wanted).
    void (*merits16)(const struct dci_views *views, const struct sketch *sketch, const float *centers,
                     const float *reference, float *merits, float *masses);
    // Adds to rest[view] the sum over the pages of weights[16] * exp(exponent - top), each at most rows * exp(top).
    void (*rest16)(const struct dci_views *views, const struct sketch *sketch, const float *centers, const float *top,
                   const float *weights, float *rest);
};

// The best one for this machine.
const struct dci_kernel *dci_kernel_best(void);
// All that this machine can run, for tests: NULL past the end. 0 is the portable one.
const struct dci_kernel *dci_kernel_at(uint32_t number);

// Codes of n elements: nearest integers to x / step, -127 .. 127. Returns the step; 0 where all elements are next to 0.
float dci_encode(const float *x, uint32_t n, int8_t *codes);

float dci_exp(float x); // 0 below -87, limited to exp(88)
float dci_log(float x); // of a normal positive number

#endif
