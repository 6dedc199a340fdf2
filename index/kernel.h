// Arithmetic of the index. Every function has one order of operations, written out in vectors of 16 lanes, and is
// compiled for several instruction sets: they all return the same bits (the build forbids contraction of a*b+c, and
// sums of products of codes are exact in integers).
#ifndef ICECACHE_INDEX_KERNEL_H
#define ICECACHE_INDEX_KERNEL_H

#include "index/index.h"

#define DCI_LANES 16u

// A score that does not count: the token is not visible to the query, or the lane is not in use.
#define DCI_HIDDEN (-3.0e38f)

// The merit of a cell that has been opened: below every hope, also that of a lane not in use.
#define DCI_TAKEN (-3.2e38f)

// Scores of real tokens are kept below this, so that no sum or difference of them overflows.
#define DCI_SCORE_MAX 1.0e30f

// What an 8-bit code stores for 0; 4-bit codes stand for the odd numbers -15 .. 15, in halves.
#define DCI_CODE_ZERO 128

// The same in codes of vectors that are divided.
#define DCI_MEMBER_ZERO 64

// Queries as codes see them: in int8, and what turns an inner product of codes into a score.
struct dci_views {
    uint32_t count, head_dim;
    const int8_t *codes; // [view][head_dim]
    const int32_t *sums; // per view: sum of its codes
    const float *steps;  // per view: softmax scale * step of the codes
    const float *bases;  // per view: score of the index's base
    const float *norms;  // per view: deviation of the scores for an isotropic deviation of 1 of the keys
};

// 16 entries of a node above the cells: their anchors in 8 bits, less the index's base, with what ranks them. Lane i of
// group g holds coordinates 4g .. 4g+3 of entry i.
struct dci_block {
    float step[DCI_LANES];  // of the codes
    float norm2[DCI_LANES]; // of the anchor as coded
    float unit[DCI_LANES];  // cells: root mean square distance of their tokens from the anchor, over sqrt(head_dim)
    float far[DCI_LANES];   // cells: the largest distance, over sqrt(head_dim)
    float rows[DCI_LANES];  // cells: tokens; 0 where a lane is not in use
    float reach[DCI_LANES]; // cells: deviations that the best of so many tokens is expected to lie above the rest
    uint32_t child[DCI_LANES];
    uint8_t codes[]; // [head_dim / 4][lane][4]
};

// 16 rows of a page: keys in 4 bits, less their cell's anchor. Lane i of group g holds coordinates 8g .. 8g+7 of row i:
// byte j coordinate 8g+j in its low half and 8g+4+j in its high half. Unused rows have position UINT32_MAX.
struct dci_rows {
    uint32_t positions[DCI_LANES];
    float scales[DCI_LANES];
    uint8_t codes[]; // [head_dim / 8][lane][4]
};

// A key in search of its cell. With codes of 6 bits, four products with 8-bit codes fit in 16 bits.
#define DCI_PROBE_MOST 31
struct dci_probe {
    const int8_t *codes; // of the key less the base, -DCI_PROBE_MOST .. DCI_PROBE_MOST
    int32_t sum;         // of the codes
    float step, norm2;
    float norm2_max; // c^2 of T_K; 0: plain distances
};

struct dci_kernel {
    const char *name;
    // n elements (multiple of 16) of the given type to fp32, exact, subnormals included.
    void (*widen)(enum index_dtype dtype, const void *elements, uint32_t n, float *out);
    float (*dot)(const float *a, const float *b, uint32_t n);
    void (*add)(float *sum, const float *x, uint32_t n); // sum[i] += x[i]
    // x[i] * signs[i] (1 or -1), then a Hadamard transform of n elements (a power of two, at least 16) that keeps
    // norms.
    void (*hadamard)(float *x, uint32_t n, const float *signs);
    // Codes of n elements: nearest integers to x / step, -127 .. 127. Returns the step; 0, and codes 0, where all
    // elements are next to 0. *sum gets the sum of the codes.
    float (*encode8)(const float *x, uint32_t n, int8_t *codes, int32_t *sum);
    // out[i] = base[i] + step * codes[i].
    void (*decode8)(const int8_t *codes, float step, const float *base, uint32_t n, float *out);
    // A key less the base as a probe, but for norm2_max; its codes are put in `codes` (borrowed by the probe).
    void (*probe)(const float *key, const float *base, uint32_t n, int8_t *codes, struct dci_probe *probe);
    // 4-bit code of a key less its cell's anchor: writes n / 2 bytes in groups of 4 as in dci_rows, returns the scale
    // (score of the code = scale * sum of code halves * q). *spread2 gets the squared norm of what the code stands for.
    float (*encode4)(const float *key, const float *anchor, uint32_t n, uint8_t *code, float *spread2);
    float (*exp_one)(float x);

    // Vectors that are divided, in 7 bits: codes[vector][n], DCI_MEMBER_ZERO for 0.
    // lanes[16] are raised to |x[i] - center[i]|.
    void (*largest16)(const float *x, const float *center, uint32_t n, float *lanes);
    // Codes of (x - center) * inverse, which lies in -63 .. 63. Returns the squared norm of what they stand for.
    int32_t (*encode7)(const float *x, const float *center, float inverse, uint32_t n, uint8_t *codes);
    // values[i] = inner product of vector order[i], as coded, with what the probe stands for.
    void (*dots7)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count,
                  const struct dci_probe *probe, float *values);
    // sums[n] of the codes of vectors order[0 .. count-1], the offset included.
    void (*sums7)(const uint8_t *codes, uint32_t n, const uint32_t *order, uint32_t count, int32_t *sums);

    // Distances of a probe to 16 entries: squared, or of their images under T_K. FLT_MAX where a lane is not in use.
    // Returns the nearest lane, the first one of equal ones.
    uint32_t (*near16)(const struct dci_probe *probe, const struct dci_block *block, uint32_t n, float *distances);
    // centers[view][16] = score of the anchor; DCI_HIDDEN where a lane is not in use.
    void (*centers16)(const struct dci_views *views, const struct dci_block *block, float *centers);
    // scores[view][16] of rows of a cell whose anchor scores anchors[view * DCI_LANES]; DCI_HIDDEN unless
    // low <= position < low + span. tops[view][16] are raised to them.
    void (*tokens16)(const struct dci_views *views, const struct dci_rows *rows, const float *anchors, uint32_t low,
                     uint32_t span, float *scores, float *tops);
    // centers16, and tops[view][16] are raised to the scores plus the log of the mean of exp of how far
    // their tokens' scores lie from them.
    void (*promise16)(const struct dci_views *views, const struct dci_block *block, float *centers, float *tops);
    // masses[view][16] = expected sums of exp(score - top[view]) of the tokens, and totals[view][16] are raised by
    // them.
    void (*survey16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                     const float *top, float *totals, float *masses);
    // hopes[16] = largest, over the views, of log mass that the best token may have.
    void (*hopes16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                    const float *reference, float *hopes);
    // merits[16] = expected mass, summed over the views, of the tokens whose mass is above exp(log_least); DCI_TAKEN
    // where it was that before, and where a lane is not in use. masses[view][16] = expected sum of exp(score -
    // reference) of all tokens.
    void (*merits16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                     const float *reference, float log_least, float *merits, float *masses);
    // totals[view][16] += masses[view][16] in lanes whose merit is not negative.
    void (*rest16)(uint32_t views, const float *masses, const float *merits, float *totals);
    // sums[view][16] += weight * (score - anchor)^2 of what is not hidden.
    void (*spread16)(uint32_t views, const float *scores, const float *anchors, float weight, float *sums);
    // Scores become exp(score - top[view]), and totals[view][16] are raised by them.
    void (*exp16)(float *scores, uint32_t views, const float *top, float *totals);
    // Is every lane's sum over the views of exp(score - reference[view]) below the bound? Then totals[view][16] are
    // raised by the terms. All to within 4 %, on average right.
    bool (*drop16)(const float *scores, uint32_t views, const float *reference, float bound, float *totals);
    // masses[16] = sum over the views of scores[view][16] * inverse[view].
    void (*mix16)(const float *scores, uint32_t views, const float *inverse, float *masses);
    // Bit i: x[i] >= bound; x[i] < bound.
    uint32_t (*above16)(const float *x, float bound);
    uint32_t (*below16)(const float *x, float bound);
    // masses[16] = sum over the views of exp(score - reference[view]), and totals[view][16] are raised by the terms.
    void (*weigh16)(const float *scores, uint32_t views, const float *reference, float *totals, float *masses);
};

// The best one for this machine.
const struct dci_kernel *dci_kernel_best(void);
// All that this machine can run, for tests: NULL past the end. 0 is the portable one.
const struct dci_kernel *dci_kernel_at(uint32_t number);

float dci_exp(float x);                  // 0 below -87, limited to exp(88)
float dci_log(float x);                  // of a normal positive number
float dci_sum_lanes(const float *lanes); // 16 lanes, added as a tree
float dci_max_lanes(const float *lanes);

#endif
