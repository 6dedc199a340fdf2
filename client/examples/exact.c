// With sinks + window + budget of at least the sequence's length a retrieve returns everything: slot i holds position
// i, and attention over the landing is full attention, bit for bit.
#include "attention.h"
#include "replay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct scratch {
    float *memory;
    float *keys, *values; // [slot, head_dim]
    float *weights;       // [slot]
};

static int mismatch(const struct replay *replay, uint32_t step, uint32_t layer, uint32_t kv_head, const char *what,
                    uint64_t at)
{
    (void)fprintf(stderr, "icecache-replay: %s: not exact: step %u, layer %u, KV head %u: %s %llu\n",
                  replay->options->name, step, layer, kv_head, what, (unsigned long long)at);
    return REPLAY_FAILED;
}

// Attention over `count` rows in the trace's type.
static void attend(const struct replay *replay, const struct scratch *scratch, const float *query, const void *keys,
                   const void *values, size_t count, float *output)
{
    const struct trace *trace = &replay->trace;
    attention_to_float(scratch->keys, keys, count * trace->head_dim, trace->dtype);
    attention_to_float(scratch->values, values, count * trace->head_dim, trace->dtype);
    attention_weights(scratch->weights, query, scratch->keys, count, trace->head_dim, replay->scale);
    attention_output(output, scratch->weights, scratch->values, count, trace->head_dim);
}

static int check_head(const struct replay *replay, uint32_t step, uint32_t layer, uint32_t kv_head,
                      const struct scratch *scratch)
{
    const struct trace *trace = &replay->trace;
    struct ice_landing_view view;
    ice_status status = ice_landing_view(replay->landing, 0, layer, kv_head, &view);
    if (status != ICE_OK) {
        return replay_fail(replay, "look at the landing", status);
    }
    uint64_t count = trace->first_query + step + 1;
    if (view.count != count) {
        return mismatch(replay, step, layer, kv_head, "slots filled:", view.count);
    }
    const void *keys = trace_key(trace, layer, kv_head, 0);
    const void *values = trace_value(trace, layer, kv_head, 0);
    size_t row_bytes = (size_t)trace->head_dim * trace_element_bytes(trace);
    for (uint64_t i = 0; i < count; i++) {
        if (view.positions[i] != i) {
            return mismatch(replay, step, layer, kv_head, "another position in slot", i);
        }
        if (memcmp((const char *)view.keys + i * row_bytes, (const char *)keys + i * row_bytes, row_bytes) != 0) {
            return mismatch(replay, step, layer, kv_head, "other bits in the key of position", i);
        }
        if (memcmp((const char *)view.values + i * row_bytes, (const char *)values + i * row_bytes, row_bytes) != 0) {
            return mismatch(replay, step, layer, kv_head, "other bits in the value of position", i);
        }
    }
    uint32_t group = trace->query_heads / trace->kv_heads;
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        float query[256];
        float output[256];
        float full[256];
        attention_to_float(query, trace_query(trace, layer, head, step), trace->head_dim, trace->dtype);
        attend(replay, scratch, query, view.keys, view.values, view.count, output);
        attend(replay, scratch, query, keys, values, count, full);
        if (memcmp(output, full, trace->head_dim * sizeof(float)) != 0) {
            return mismatch(replay, step, layer, kv_head, "another output of query head", head);
        }
    }
    return REPLAY_OK;
}

static int check_step(struct replay *replay, uint32_t step, uint32_t layer, const struct scratch *scratch)
{
    struct ice_retrieve_result retrieved;
    double elapsed_us = 0;
    int result = replay_retrieve(replay, step, layer, 0, &retrieved, &elapsed_us);
    for (uint32_t kv_head = 0; kv_head < replay->trace.kv_heads && result == REPLAY_OK; kv_head++) {
        result = check_head(replay, step, layer, kv_head, scratch);
    }
    return result;
}

int replay_exact(struct replay *replay)
{
    size_t elements = (size_t)replay->slots * replay->trace.head_dim;
    struct scratch scratch = {.memory = malloc((2 * elements + replay->slots) * sizeof(float))};
    if (scratch.memory == NULL) {
        return replay_fail(replay, "attention's memory", ICE_NO_MEMORY);
    }
    scratch.keys = scratch.memory;
    scratch.values = scratch.keys + elements;
    scratch.weights = scratch.values + elements;
    int result = REPLAY_OK;
    for (uint32_t step = 0; step < replay->steps && result == REPLAY_OK; step++) {
        if (step % 16 == 0) {
            replay_progress(replay, "exact check, step %u of %u", step, replay->steps);
        }
        for (uint32_t layer = 0; layer < replay->trace.layers && result == REPLAY_OK; layer++) {
            result = check_step(replay, step, layer, &scratch);
        }
    }
    free(scratch.memory);
    return result;
}
