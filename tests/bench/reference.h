// The exact answer: attention masses of all tokens, the best selections, the best pages. Computed once per data set.
#ifndef ICECACHE_BENCH_REFERENCE_H
#define ICECACHE_BENCH_REFERENCE_H

#include "data.h"
#include "scan.h"

#include <stdbool.h>
#include <stdint.h>

#define REFERENCE_ALONE 64u // tokens of one head asked alone

struct reference {
    const struct data *data; // borrowed
    const struct data_lane *lane;
    float *masses;   // [query][token]: mean over the heads of their softmax over the tokens that the query sees
    uint32_t *alone; // [query][REFERENCE_ALONE]: the largest logits of head `query % query_heads`, ascending
    double *ends;    // [query]: mass of sinks and window
};

// False when there is no memory. `keys` are the lane's, as SCAN_F32.
bool reference_create(struct reference *reference, const struct data *data, const struct data_lane *lane,
                      const struct scan_keys *keys, const struct scan_ops *ops);
void reference_fini(struct reference *reference); // accepts a zeroed struct

// Mass of the best `budget` tokens that the query may select, sinks and window included.
double reference_best(const struct reference *reference, uint32_t query, uint32_t budget);
// The least number of tokens that reaches a mass together with sinks and window; UINT32_MAX: more than `most`.
uint32_t reference_needed(const struct reference *reference, uint32_t query, double mass, uint32_t most);
// Mass of the best `pages` pages, sinks and window included. page_of[token] < page_bound; NULL: pages of page_tokens
// consecutive tokens.
double reference_best_pages(const struct reference *reference, uint32_t query, const uint32_t *page_of,
                            uint32_t page_bound, uint32_t page_tokens, uint32_t pages);
// Mass of a selection, sinks and window included.
double reference_mass(const struct reference *reference, uint32_t query, const uint32_t *positions, uint32_t count);
// Share of the best of the head asked alone that is among the positions.
double reference_recall(const struct reference *reference, uint32_t query, const uint32_t *positions, uint32_t count);

#endif
