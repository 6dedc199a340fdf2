// Opening of trace folders: the manifest's numbers are checked against the arrays, so that the accessors need no
// checks.
#include "trace.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reader {
    const char *folder;
    char *error;
    size_t error_bytes;
};

static bool refuse(const struct reader *reader, const char *why)
{
    (void)snprintf(reader->error, reader->error_bytes, "%s/manifest.json: %s", reader->folder, why);
    return false;
}

static bool read_count(const struct reader *reader, const json_t *manifest, const char *key, uint64_t most,
                       uint64_t *out)
{
    const json_t *value = json_object_get(manifest, key);
    json_int_t count = json_integer_value(value);
    if (!json_is_integer(value) || count < 1 || (uint64_t)count > most) {
        (void)snprintf(reader->error, reader->error_bytes, "%s/manifest.json: %s must be a number from 1 to %llu",
                       reader->folder, key, (unsigned long long)most);
        return false;
    }
    *out = (uint64_t)count;
    return true;
}

static bool read_manifest(const struct reader *reader, const json_t *manifest, struct trace *trace)
{
    uint64_t layers;
    uint64_t kv_heads;
    uint64_t query_heads;
    uint64_t head_dim;
    if (!read_count(reader, manifest, "n", UINT32_MAX, &trace->tokens) ||
        !read_count(reader, manifest, "n_layers", TRACE_LAYERS_MAX, &layers) ||
        !read_count(reader, manifest, "kv_heads", 256, &kv_heads) ||
        !read_count(reader, manifest, "q_heads", 1024, &query_heads) ||
        !read_count(reader, manifest, "head_dim", 256, &head_dim)) {
        return false;
    }
    if (query_heads % kv_heads != 0 || head_dim % 16 != 0) {
        return refuse(reader, "q_heads must be a multiple of kv_heads, and head_dim a multiple of 16");
    }
    trace->layers = (uint32_t)layers;
    trace->kv_heads = (uint32_t)kv_heads;
    trace->query_heads = (uint32_t)query_heads;
    trace->head_dim = (uint32_t)head_dim;
    const json_t *range = json_object_get(manifest, "q_positions");
    json_int_t first = json_integer_value(json_array_get(range, 0));
    json_int_t end = json_integer_value(json_array_get(range, 1));
    if (first < 1 || end <= first || (uint64_t)end > trace->tokens) {
        return refuse(reader, "q_positions must be [first, end] with 1 <= first < end <= n");
    }
    trace->first_query = (uint64_t)first;
    trace->steps = (uint32_t)(end - first);
    const char *name = json_string_value(json_object_get(manifest, "name"));
    (void)snprintf(trace->name, sizeof(trace->name), "%s", name != NULL ? name : reader->folder);
    return true;
}

static bool open_array(const struct reader *reader, struct trace *trace, const char *letter, uint32_t layer,
                       const uint64_t shape[3], struct npy *out)
{
    char path[4096];
    (void)snprintf(path, sizeof(path), "%s/L%u_%s.npy", reader->folder, layer, letter);
    if (!npy_open(path, out, reader->error, reader->error_bytes)) {
        return false;
    }
    if (out->kind != 'f' || out->rank != 3 || memcmp(out->shape, shape, 3 * sizeof(shape[0])) != 0) {
        (void)snprintf(reader->error, reader->error_bytes, "%s: its shape or type does not match manifest.json", path);
        return false;
    }
    ice_dtype dtype = out->element_bytes == 4 ? ICE_FP32 : ICE_FP16;
    if (trace->dtype != 0 && trace->dtype != dtype) {
        (void)snprintf(reader->error, reader->error_bytes, "%s: all arrays must have one type", path);
        return false;
    }
    trace->dtype = dtype;
    return true;
}

static bool open_arrays(const struct reader *reader, struct trace *trace)
{
    const uint64_t kv_shape[3] = {trace->kv_heads, trace->tokens, trace->head_dim};
    const uint64_t query_shape[3] = {trace->query_heads, trace->steps, trace->head_dim};
    trace->keys = calloc(trace->layers, sizeof(*trace->keys));
    trace->values = calloc(trace->layers, sizeof(*trace->values));
    trace->queries = calloc(trace->layers, sizeof(*trace->queries));
    if (trace->keys == NULL || trace->values == NULL || trace->queries == NULL) {
        return refuse(reader, "no memory");
    }
    for (uint32_t layer = 0; layer < trace->layers; layer++) {
        if (!open_array(reader, trace, "K", layer, kv_shape, &trace->keys[layer]) ||
            !open_array(reader, trace, "V", layer, kv_shape, &trace->values[layer]) ||
            !open_array(reader, trace, "Q", layer, query_shape, &trace->queries[layer])) {
            return false;
        }
    }
    return true;
}

bool trace_open(const char *folder, struct trace *out, char *error, size_t error_bytes)
{
    struct reader reader = {folder, error, error_bytes};
    char path[4096];
    (void)snprintf(path, sizeof(path), "%s/manifest.json", folder);
    json_error_t parse_error;
    json_t *manifest = json_load_file(path, 0, &parse_error);
    if (manifest == NULL) {
        (void)snprintf(error, error_bytes, "%s: %s", path, parse_error.text);
        return false;
    }
    struct trace trace = {0};
    bool is_read = read_manifest(&reader, manifest, &trace);
    json_decref(manifest);
    if (!is_read || !open_arrays(&reader, &trace)) {
        trace_close(&trace);
        return false;
    }
    *out = trace;
    return true;
}

static void close_arrays(struct npy *arrays, uint32_t count)
{
    for (uint32_t i = 0; arrays != NULL && i < count; i++) {
        npy_close(&arrays[i]);
    }
    free(arrays);
}

void trace_close(struct trace *trace)
{
    close_arrays(trace->keys, trace->layers);
    close_arrays(trace->values, trace->layers);
    close_arrays(trace->queries, trace->layers);
    *trace = (struct trace){0};
}

uint32_t trace_element_bytes(const struct trace *trace)
{
    return trace->dtype == ICE_FP32 ? 4 : 2;
}

static const void *row(const struct trace *trace, const struct npy *array, uint64_t index)
{
    return (const char *)array->data + index * trace->head_dim * trace_element_bytes(trace);
}

const void *trace_key(const struct trace *trace, uint32_t layer, uint32_t kv_head, uint64_t position)
{
    return row(trace, &trace->keys[layer], kv_head * trace->tokens + position);
}

const void *trace_value(const struct trace *trace, uint32_t layer, uint32_t kv_head, uint64_t position)
{
    return row(trace, &trace->values[layer], kv_head * trace->tokens + position);
}

const void *trace_query(const struct trace *trace, uint32_t layer, uint32_t query_head, uint32_t step)
{
    return row(trace, &trace->queries[layer], (uint64_t)query_head * trace->steps + step);
}
