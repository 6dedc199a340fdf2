// A trace: what one request's attention looked like. A folder with manifest.json and, per layer, keys and values
// [kv_head, token, head_dim] and the queries of the last tokens [query_head, step, head_dim], all after RoPE.
#ifndef ICECACHE_EXAMPLES_TRACE_H
#define ICECACHE_EXAMPLES_TRACE_H

#include "npy.h"

#include "icecache.h"

#include <stdbool.h>
#include <stdint.h>

#define TRACE_LAYERS_MAX 512u

struct trace {
    char name[128];
    uint32_t layers, kv_heads, query_heads, head_dim;
    uint64_t tokens;
    uint64_t first_query;                // position of the first decode step; tokens before it are the prompt
    uint32_t steps;                      // decode steps, at positions first_query ...
    ice_dtype dtype;                     // of keys, values and queries
    struct npy *keys, *values, *queries; // [layer]
};

// False, with a text that names the file and what is wrong; *out is written on success only.
bool trace_open(const char *folder, struct trace *out, char *error, size_t error_bytes);
// Accepts a zeroed struct.
void trace_close(struct trace *trace);

uint32_t trace_element_bytes(const struct trace *trace);
// Row [head_dim] of one token or query, in the trace's dtype. Borrowed until trace_close.
const void *trace_key(const struct trace *trace, uint32_t layer, uint32_t kv_head, uint64_t position);
const void *trace_value(const struct trace *trace, uint32_t layer, uint32_t kv_head, uint64_t position);
const void *trace_query(const struct trace *trace, uint32_t layer, uint32_t query_head, uint32_t step);

#endif
