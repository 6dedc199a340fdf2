// The worker's side of a request: connect, prefill, and one retrieve per layer, budget and decode step.
#include "attention.h"
#include "replay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define APPEND_DEADLINE_US (60ull * 1000 * 1000)
#define BUILD_DEADLINE_S   300.0
#define BUILD_POLL_NS      (2l * 1000 * 1000)

double replay_now_s(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int replay_connect(struct replay *replay)
{
    const struct replay_options *options = replay->options;
    const struct trace *trace = &replay->trace;
    const struct ice_client_options client_options = {
        .socket_directory = options->socket_directory,
        .name = options->name,
    };
    ice_status status = ice_client_connect(&client_options, &replay->client);
    if (status != ICE_OK) {
        return replay_fail(replay, "connect", status);
    }
    // One row per budget, so that each budget finds its own last selection in place and only the change is sent.
    const struct ice_landing_shape shape = {
        .rows = options->budget_count,
        .layers = trace->layers,
        .kv_heads = trace->kv_heads,
        .slots = replay->slots,
        .head_dim = trace->head_dim,
        .dtype = trace->dtype,
    };
    status = ice_landing_open(replay->client, &shape, 0, &replay->landing);
    if (status != ICE_OK) {
        return replay_fail(replay, "open landing", status);
    }
    const struct ice_sequence_options sequence_options = {
        .model_digest = trace->name,
        .model_digest_bytes = strnlen(trace->name, 64),
        .layers = trace->layers,
        .kv_heads = trace->kv_heads,
        .query_heads = trace->query_heads,
        .head_dim = trace->head_dim,
        .dtype = trace->dtype,
        .max_tokens = trace->tokens,
    };
    status = ice_sequence_open(replay->client, &sequence_options, 0, &replay->sequence);
    return status == ICE_OK ? REPLAY_OK : replay_fail(replay, "open sequence", status);
}

static int append_prompt(struct replay *replay)
{
    const struct trace *trace = &replay->trace;
    for (uint32_t layer = 0; layer < trace->layers; layer++) {
        size_t row_bytes = (size_t)trace->head_dim * trace_element_bytes(trace);
        const struct ice_kv_source source = {
            .keys = trace->keys[layer].data,
            .values = trace->values[layer].data,
            .keys_bytes = trace->keys[layer].data_bytes,
            .values_bytes = trace->values[layer].data_bytes,
            .token_stride = row_bytes,
            .head_stride = trace->tokens * row_bytes,
        };
        ice_status status =
            ice_append(replay->sequence, layer, 0, trace->first_query, &source, APPEND_DEADLINE_US, NULL);
        if (status != ICE_OK) {
            return replay_fail(replay, "append", status);
        }
        replay_progress(replay, "prompt of %llu tokens, layer %u of %u", (unsigned long long)trace->first_query,
                        layer + 1, trace->layers);
    }
    return REPLAY_OK;
}

int replay_prefill(struct replay *replay)
{
    double start_s = replay_now_s();
    int result = append_prompt(replay);
    if (result != REPLAY_OK) {
        return result;
    }
    replay->append_s = replay_now_s() - start_s;
    replay_progress(replay, "indexing");
    struct ice_sequence_info info;
    for (;;) {
        ice_status status = ice_sequence_info(replay->sequence, 0, &info);
        if (status != ICE_OK) {
            return replay_fail(replay, "ask for the sequence's state", status);
        }
        if (info.idle) {
            break;
        }
        if (replay_now_s() - start_s > BUILD_DEADLINE_S) {
            return replay_fail(replay, "wait for the index", ICE_TIMEOUT);
        }
        const struct timespec pause = {.tv_nsec = BUILD_POLL_NS};
        (void)nanosleep(&pause, NULL);
    }
    replay->ready_s = replay_now_s() - start_s;
    replay->build_cpu_s = 1e-6 * (double)info.build_us;
    return REPLAY_OK;
}

// The step's vectors lie apart in the trace, head by head: an engine has them in one piece.
struct step_vectors {
    uint8_t *queries, *keys, *values;
};

static void gather(const struct replay *replay, uint32_t step, uint32_t layer, const struct step_vectors *vectors)
{
    const struct trace *trace = &replay->trace;
    size_t row_bytes = (size_t)trace->head_dim * trace_element_bytes(trace);
    for (uint32_t head = 0; head < trace->query_heads; head++) {
        memcpy(vectors->queries + head * row_bytes, trace_query(trace, layer, head, step), row_bytes);
    }
    for (uint32_t head = 0; head < trace->kv_heads; head++) {
        uint64_t position = trace->first_query + step;
        memcpy(vectors->keys + head * row_bytes, trace_key(trace, layer, head, position), row_bytes);
        memcpy(vectors->values + head * row_bytes, trace_value(trace, layer, head, position), row_bytes);
    }
}

int replay_retrieve(struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index,
                    struct ice_retrieve_result *result, double *elapsed_us)
{
    const struct trace *trace = &replay->trace;
    uint8_t local[64 << 10]; // enough for most shapes
    size_t row_bytes = (size_t)trace->head_dim * trace_element_bytes(trace);
    size_t all_bytes = (trace->query_heads + 2 * (size_t)trace->kv_heads) * row_bytes;
    uint8_t *memory = all_bytes <= sizeof(local) ? local : malloc(all_bytes);
    if (memory == NULL) {
        return replay_fail(replay, "gather a step's vectors", ICE_NO_MEMORY);
    }
    const struct step_vectors vectors = {
        .queries = memory,
        .keys = memory + trace->query_heads * row_bytes,
        .values = memory + (trace->query_heads + trace->kv_heads) * row_bytes,
    };
    gather(replay, step, layer, &vectors);
    uint64_t position = trace->first_query + step;
    bool is_first = budget_index == 0;
    const struct ice_retrieve_options options = {
        .landing = replay->landing,
        .layer = layer,
        .sequence_count = 1,
        .sequences = &replay->sequence,
        .rows = &budget_index,
        .first_queries = &position,
        .queries = 1,
        .query_vectors = vectors.queries,
        .query_dtype = trace->dtype,
        .keys = is_first ? vectors.keys : NULL,
        .values = is_first ? vectors.values : NULL,
        .budget = replay->options->budgets[budget_index],
        .sinks = replay->options->sinks,
        .window = replay->options->window,
    };
    double start_s = replay_now_s();
    ice_status status = ice_retrieve(replay->client, &options, result);
    *elapsed_us = 1e6 * (replay_now_s() - start_s);
    if (memory != local) {
        free(memory);
    }
    return status == ICE_OK ? REPLAY_OK : replay_fail(replay, "retrieve", status);
}

// Attention of one KV head's queries over its landing slots, into outputs; keeps the positions.
static int attend(struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index, uint32_t kv_head,
                  float *scratch)
{
    const struct trace *trace = &replay->trace;
    struct ice_landing_view view;
    ice_status status = ice_landing_view(replay->landing, budget_index, layer, kv_head, &view);
    if (status != ICE_OK) {
        return replay_fail(replay, "look at the landing", status);
    }
    if (view.count == 0 || view.count > replay->slots) {
        return replay_fail(replay, "the landing's count is impossible", ICE_INTERNAL);
    }
    size_t row_bytes = (size_t)trace->head_dim * trace_element_bytes(trace);
    size_t cell = replay_cell(replay, step, layer, budget_index);
    uint32_t *positions = replay->positions + (cell * trace->kv_heads + kv_head) * replay->slots;
    for (uint32_t i = 0; i < view.count; i++) {
        uint64_t position = view.positions[i];
        positions[i] = view.positions[i];
        if (position > trace->first_query + step) {
            return replay_fail(replay, "the landing holds a position after the query", ICE_INTERNAL);
        }
        if (memcmp((const char *)view.keys + i * row_bytes, trace_key(trace, layer, kv_head, position), row_bytes) !=
                0 ||
            memcmp((const char *)view.values + i * row_bytes, trace_value(trace, layer, kv_head, position),
                   row_bytes) != 0) {
            replay->wrong_rows++;
        }
    }
    replay->counts[cell * trace->kv_heads + kv_head] = view.count;
    float *keys = scratch;
    float *values = keys + (size_t)replay->slots * trace->head_dim;
    float *weights = values + (size_t)replay->slots * trace->head_dim;
    attention_to_float(keys, view.keys, (size_t)view.count * trace->head_dim, trace->dtype);
    attention_to_float(values, view.values, (size_t)view.count * trace->head_dim, trace->dtype);
    uint32_t group = trace->query_heads / trace->kv_heads;
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        float query[256];
        attention_to_float(query, trace_query(trace, layer, head, step), trace->head_dim, trace->dtype);
        attention_weights(weights, query, keys, view.count, trace->head_dim, replay->scale);
        float *output = replay->outputs + (cell * trace->query_heads + head) * trace->head_dim;
        attention_output(output, weights, values, view.count, trace->head_dim);
    }
    return REPLAY_OK;
}

static int decode_cell(struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index, float *scratch)
{
    const struct trace *trace = &replay->trace;
    struct replay_row *row = &replay->rows[budget_index];
    struct ice_retrieve_result retrieved;
    double elapsed_us = 0;
    int result = replay_retrieve(replay, step, layer, budget_index, &retrieved, &elapsed_us);
    if (result != REPLAY_OK) {
        return result;
    }
    size_t calls = (size_t)replay->steps * trace->layers;
    replay->latencies_us[budget_index * calls + (size_t)step * trace->layers + layer] = (float)elapsed_us;
    row->bytes_moved += retrieved.bytes_moved;
    row->partial += retrieved.partial;
    for (uint32_t head = 0; head < retrieved.head_count; head++) {
        row->estimated_mass += (double)retrieved.masses[head] / ((double)calls * retrieved.head_count);
    }
    for (uint32_t kv_head = 0; kv_head < trace->kv_heads && result == REPLAY_OK; kv_head++) {
        result = attend(replay, step, layer, budget_index, kv_head, scratch);
    }
    return result;
}

int replay_decode(struct replay *replay)
{
    const struct trace *trace = &replay->trace;
    float *scratch = calloc((size_t)replay->slots * (2 * (size_t)trace->head_dim + 1), sizeof(*scratch));
    if (scratch == NULL) {
        return replay_fail(replay, "attention's memory", ICE_NO_MEMORY);
    }
    int result = REPLAY_OK;
    for (uint32_t step = 0; step < replay->steps && result == REPLAY_OK; step++) {
        if (step % 128 == 0) {
            replay_progress(replay, "decode step %u of %u", step, replay->steps);
        }
        for (uint32_t layer = 0; layer < trace->layers; layer++) {
            for (uint32_t i = 0; i < replay->options->budget_count && result == REPLAY_OK; i++) {
                result = decode_cell(replay, step, layer, i, scratch);
            }
        }
    }
    free(scratch);
    struct ice_sequence_info info;
    if (result == REPLAY_OK && ice_sequence_info(replay->sequence, 0, &info) == ICE_OK) {
        replay->pool_bytes = info.pool_bytes;
        replay->index_bytes = info.index_bytes;
    }
    return result;
}
