// K, V and queries for the tests: deterministic, in every dtype, and what full attention makes of them.
#ifndef ICECACHE_TESTS_HISTORY_H
#define ICECACHE_TESTS_HISTORY_H

#include "client/icecache.h"

#include "child.h"

struct shape {
    uint32_t layers, kv_heads, query_heads, head_dim;
    ice_dtype dtype;
};

size_t shape_row_bytes(const struct shape *shape); // of one token of one head, K or V
uint32_t shape_group(const struct shape *shape);   // query heads per KV head
const char *shape_text(const struct shape *shape); // for messages; static

// The tokens of one sequence, [layer][head][token][head_dim], packed. Keys lie in clusters, as keys do.
struct history {
    struct shape shape;
    uint64_t length, seed;
    uint8_t *keys, *values;
    size_t side_bytes;
};
// Histories of equal shape and seed agree in all tokens that both have.
void history_create(struct history *history, const struct shape *shape, uint64_t length, uint64_t seed);
void history_destroy(struct history *history);
uint8_t *history_key(const struct history *history, uint32_t layer, uint32_t head, uint64_t position);
uint8_t *history_value(const struct history *history, uint32_t layer, uint32_t head, uint64_t position);
// For ice_append: tokens from `first` on of one layer, or of all (ICE_ALL_LAYERS).
struct ice_kv_source history_source(const struct history *history, uint32_t layer, uint64_t first);
// K and V of positions first .. first+n-1 of one layer as they ride along with a retrieve, [token][head][head_dim].
void history_riding(const struct history *history, uint32_t layer, uint64_t first, uint32_t n, uint8_t *keys,
                    uint8_t *values);
// Queries of n positions, [query][query_head][head_dim], in the shape's dtype. Near the keys of some cluster.
void history_queries(const struct history *history, uint32_t layer, uint64_t first, uint32_t n, uint8_t *queries);

// One vector, deterministic in all arguments; `cluster` picks a centre.
void vector_make(float *out, uint32_t head_dim, uint64_t seed, uint64_t lane, uint64_t cluster, uint64_t number);
void vector_encode(const float *in, uint32_t count, ice_dtype dtype, void *out);
void vector_decode(const void *in, uint32_t count, ice_dtype dtype, float *out);

// softmax(q K^T / sqrt(head_dim)) V of one query over `count` rows, in order: one fixed order of operations.
void attention(const struct shape *shape, const float *query, const void *keys, const void *values, uint64_t count,
               float *out);
// The mass of each of positions 0 .. visible-1 for the queries of a KV head, summed over query heads and positions and
// normalised to 1; query i stands at first + i.
void attention_masses(const struct history *history, uint32_t layer, uint32_t kv_head, const uint8_t *queries,
                      uint64_t first, uint32_t n, double *masses);
// The `budget` heaviest of positions from .. until-1, ascending; ties to the lower position. Answers how many.
uint32_t masses_best(const double *masses, uint64_t from, uint64_t until, uint32_t budget, uint32_t *positions);

#endif
