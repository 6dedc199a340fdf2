// What is searched: lanes of keys and the queries asked of them, generated or read from a trace.
#ifndef ICECACHE_BENCH_DATA_H
#define ICECACHE_BENCH_DATA_H

#include "index/index.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct data_lane {
    float *keys;      // [token][head_dim]
    void *rows;       // the same numbers in the dtype that is handed to the index
    float *queries;   // [query][query head][head_dim]
    uint32_t *stands; // [query]: the query's position; it sees the tokens 0 .. stands
};

struct data {
    char name[128];
    uint32_t tokens, head_dim, query_heads, query_count, lane_count;
    enum index_dtype dtype;
    uint32_t sinks, window; // outside the selection
    float scale;            // of the softmax
    struct data_lane *lanes;
};

enum data_kind { DATA_ATTENTION, DATA_GAUSS };

// Generated data, rounded to fp16 as a model's keys are. False when there is no memory.
bool data_generate(struct data *data, enum data_kind kind, uint32_t tokens, uint32_t head_dim, uint32_t query_heads,
                   uint32_t query_count, uint32_t lane_count, uint64_t seed);
// The last query_count decode steps of a trace, one lane for each layer and KV head.
bool data_open_trace(struct data *data, const char *folder, uint32_t query_count, uint32_t sinks, uint32_t window,
                     char *error, size_t error_bytes);
void data_fini(struct data *data); // accepts a zeroed struct

// Tokens that query `query` may select from: first .. end-1; it sees 0 .. stands.
void data_range(const struct data *data, const struct data_lane *lane, uint32_t query, uint32_t *first, uint32_t *end);
size_t data_row_bytes(const struct data *data);

float data_of_half(uint16_t half);
uint16_t data_half_of(float value); // nearest, ties to even; finite values of at most 65504

// The two generators, for one lane: keys [token][head_dim], queries [query][head][head_dim].
struct generator_shape {
    uint32_t tokens, head_dim, query_heads, query_count;
    bool steps; // attention: the queries are those of consecutive decode steps, and resemble each other as such
};
bool generate_attention(const struct generator_shape *shape, uint64_t seed, float *keys, float *queries);
void generate_gauss(const struct generator_shape *shape, uint64_t seed, float *keys, float *queries);

#endif
