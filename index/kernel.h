// Arithmetic of the index. Every function has one order of operations, written out in vectors of 16 lanes, and is
// compiled for several instruction sets: they all return the same bits (the build forbids contraction of a*b+c, and
// sums of products of codes are exact in integers).
#ifndef ICECACHE_INDEX_KERNEL_H
#define ICECACHE_INDEX_KERNEL_H

#include "index/index.h"

#include <string.h>

#define DCI_LANES 16u

// A score that does not count: the token is not visible to the query, or the lane is not in use.
#define DCI_HIDDEN (-3.0e38f)

// The merit of a cell that has been opened: below every hope, also that of a lane not in use.
#define DCI_TAKEN (-3.2e38f)

// Scores of real tokens are kept below this, so that no sum or difference of them overflows.
#define DCI_SCORE_MAX 1.0e30f

// What an 8-bit code stores for 0; 5-bit codes stand for -15.5 .. 15.5.
#define DCI_CODE_ZERO 128

// The same in codes of vectors that are divided.
#define DCI_MEMBER_ZERO 64

// rough exp: 2^23 / ln 2, and 2^23 * (127 - 0.0574).
#define DCI_ROUGH_SLOPE  12102203.0f
#define DCI_ROUGH_OFFSET 1064871852.0f

// What the top bits alone say of a residual r with root mean square m: r is taken as +-m / DCI_SIGN_MEAN in each
// coordinate (the mean of |x| of a normal distribution; RaBitQ, arXiv 2405.12497), which leaves an error of
// DCI_SIGN_NOISE * m |q| in its product with q. Steps of a 5-bit code in m (Max, 1960: 32 levels).
#define DCI_CODE_STEP  0.1881f
#define DCI_SIGN_MEAN  0.79788456f
#define DCI_SIGN_NOISE 0.7555f

// Queries as codes see them: in int8, and what turns an inner product of codes into a score.
struct dci_views {
    uint32_t count, head_dim;
    const int8_t *codes; // [view][head_dim]
    const int32_t *sums; // per view: sum of its codes
    const float *steps;  // per view: softmax scale * step of the codes
    const float *bases;  // per view: score of the index's base
    const float *norms;  // per view: deviation of the scores for an isotropic deviation of 1 of the keys
    // As the codes of tokens see them.
    uint32_t row_bytes;         // dci_row_bytes(head_dim)
    const int8_t *fine;         // [view][2][row_bytes]: the same codes where rows have their low bits, 0 in between
    const uint8_t *tables;      // [view][head_dim / 16][4][16]: for 4 top bits, the sum of the query's table codes
    const int32_t *table_zeros; // per view: what twice the sum of table entries is too much
    const float *table_steps;   // per view: softmax scale * step of the table codes
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

// 16 rows of a page: what is looked at first of them. The code of a coordinate is 16 b + low - 15.5; the top bits b of
// 8 coordinates are a byte, those of coordinates 8p .. 8p+3 in its low half. Unused rows have position UINT32_MAX.
struct dci_rows {
    uint32_t positions[DCI_LANES];
    uint16_t scales[DCI_LANES]; // the upper halves of floats
    uint8_t signs[];            // [head_dim / 8][lane]
};

// The low bits of a row's code: byte j holds coordinate j in its low half and coordinate dci_row_bytes + j in its high
// half.
static inline uint32_t dci_row_bytes(uint32_t head_dim)
{
    return (head_dim / 2 + 15) / 16 * 16;
}
// A code on its way: the low bits, then the top bits.
static inline uint32_t dci_code_bytes(uint32_t head_dim)
{
    return dci_row_bytes(head_dim) + head_dim / 8;
}

// 16 rows of cells, not necessarily of one.
struct dci_lanes {
    const uint8_t *rows[DCI_LANES]; // low bits; also where a lane is not live
    float scales[DCI_LANES];
    float live[DCI_LANES]; // 0: the lane does not count, and gets DCI_HIDDEN
    const int16_t *signs;  // [view][16]: from signs16
    const float *anchors;  // [view][16]: scores of the cells' anchors
};

// Where the scores of rows of one cell are asked for.
struct dci_target {
    uint32_t low, span;   // positions that count: low .. low + span - 1
    const float *anchors; // [view * DCI_LANES]: what the cell's anchor scores
    float *tops;          // [view][16]: raised to the scores
};

// A first look at rows of one cell: which may have a mass of at least `bar`?
struct dci_sieve {
    uint32_t low, span; // positions that count: low .. low + span - 1
    float bar;
    // Per view: the bits of a term (a rough exponential, see DCI_ROUGH_SLOPE) are sign sum * scale * factor + offset;
    // terms times the weight are without bias.
    const float *factors, *offsets, *weights;
};

// The upper half of a float, to nearest.
static inline uint16_t dci_scale_narrow(float scale)
{
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float dci_scale_widen(uint16_t narrow)
{
    const uint32_t bits = (uint32_t)narrow << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}
static inline float dci_scale_round(float scale)
{
    return dci_scale_widen(dci_scale_narrow(scale));
}

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
    // 5-bit code of a key less its cell's anchor: writes dci_code_bytes, returns the scale (score of the code = scale *
    // sum of code * q), a float of 16 bits. *spread2 gets the squared norm of what the code stands for.
    float (*encode5)(const float *key, const float *anchor, uint32_t n, uint8_t *code, float *spread2);
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
    // signs[view][16]: twice the sum of the query's table codes over the coordinates whose top bit is set, less the sum
    // over all.
    void (*signs16)(const struct dci_views *views, const struct dci_rows *rows, int16_t *signs);
    // signs16 and score16 of rows of one cell. lows: low bits of the first row; signs: room for [view][16]. Returns how
    // many count.
    uint32_t (*tokens16)(const struct dci_views *views, const struct dci_rows *rows, const uint8_t *lows,
                         const struct dci_target *target, int16_t *signs, float *scores);
    // scores[view][16]; tops[view][16] are raised to them.
    void (*score16)(const struct dci_views *views, const struct dci_lanes *lanes, float *scores, float *tops);
    // signs16; bit i: row i may have the mass; from bit 16 on, how many rows count. The terms of those that count and
    // have not, times their weight, are added to totals[view][16]. terms: room for [view][16].
    uint32_t (*sift16)(const struct dci_views *views, const struct dci_rows *rows, const struct dci_sieve *sieve,
                       int16_t *signs, float *terms, float *totals);
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
    // The same, but no more than rows[16] times best[view].
    void (*balance16)(uint32_t views, const float *masses, const float *merits, const float *rows, const float *best,
                      float *totals);
    // sums[view][16] += weight * (score - anchor)^2 of what is not hidden.
    void (*spread16)(uint32_t views, const float *scores, const float *anchors, float weight, float *sums);
    // exps[view][16] = exp(score - origin[view]), exp(80) at most; totals[view][16] (or NULL) are raised by them.
    void (*exps16)(const float *scores, uint32_t views, const float *origins, float *exps, float *totals);
    // masses[16] = sum over the views of exps[view][16] * units[view].
    void (*mix16)(const float *exps, uint32_t views, const float *units, float *masses);
    // Bit i: x[i] >= bound; x[i] < bound.
    uint32_t (*above16)(const float *x, float bound);
    uint32_t (*below16)(const float *x, float bound);
};

// The best one for this machine.
const struct dci_kernel *dci_kernel_best(void);
// All that this machine can run, for tests: NULL past the end. 0 is the portable one.
const struct dci_kernel *dci_kernel_at(uint32_t number);

// Tables of a query for the top bits of codes, see dci_views: codes of n elements, so small that the sum of a group of
// four fits in 7 bits. Returns the codes' step. *zero: what twice the sum of table entries is too much for the inner
// product with signs +-1.
float dci_tables_make(const float *x, uint32_t n, uint8_t *tables, int32_t *zero);

float dci_exp(float x);                  // 0 below -87, limited to exp(88)
float dci_log(float x);                  // of a normal positive number
float dci_sum_lanes(const float *lanes); // 16 lanes, added as a tree
float dci_max_lanes(const float *lanes);

#endif
