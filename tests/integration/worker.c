// Calls of libicecache with their checks.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- checks ----

void status_check(ice_status status, ice_status expected, const char *call, const char *file, int line)
{
    if (status == expected)
        return;
    print_error("%s\n  is %s (%s), expected %s\n", call, ice_status_name(status), ice_last_error(),
                ice_status_name(expected));
    _fail(file, line);
}

void text_check(const char *text, const char *part, const char *file, int line)
{
    if (strstr(text, part))
        return;
    print_error("\"%s\"\n  does not contain \"%s\"\n", text, part);
    _fail(file, line);
}

// ---- handles ----

ice_client *client_connect(const char *sockets, uint64_t deadline_us, uint64_t staging_bytes)
{
    const struct ice_client_options options = {
        .socket_directory = sockets,
        .name = "test",
        .deadline_us = deadline_us,
        .staging_bytes = staging_bytes,
    };
    ice_client *client = NULL;
    assert_ok(ice_client_connect(&options, &client));
    return client;
}

struct ice_sequence_options sequence_options(const struct shape *shape)
{
    return (struct ice_sequence_options){
        .name_space = "tests",
        .model_digest = "model",
        .model_digest_bytes = 5,
        .layers = shape->layers,
        .kv_heads = shape->kv_heads,
        .query_heads = shape->query_heads,
        .head_dim = shape->head_dim,
        .dtype = shape->dtype,
    };
}

struct ice_landing_shape landing_shape(const struct shape *shape, uint32_t rows, uint32_t slots)
{
    return (struct ice_landing_shape){rows, shape->layers, shape->kv_heads, slots, shape->head_dim, shape->dtype};
}

ice_sequence *sequence_open(ice_client *client, const struct shape *shape)
{
    const struct ice_sequence_options options = sequence_options(shape);
    ice_sequence *sequence = NULL;
    assert_ok(ice_sequence_open(client, &options, 0, &sequence));
    return sequence;
}

ice_landing *landing_open(ice_client *client, const struct shape *shape, uint32_t rows, uint32_t slots)
{
    const struct ice_landing_shape options = landing_shape(shape, rows, slots);
    ice_landing *landing = NULL;
    assert_ok(ice_landing_open(client, &options, 0, &landing));
    return landing;
}

void worker_open(struct worker *worker, const char *sockets, const struct shape *shape, uint32_t rows, uint32_t slots)
{
    *worker = (struct worker){.shape = *shape, .rows = rows, .slots = slots};
    worker->client = client_connect(sockets, TEST_DEADLINE_US, 4u << 20);
    worker->landing = landing_open(worker->client, shape, rows, slots);
    worker->sequence = sequence_open(worker->client, shape);
}

void worker_close(struct worker *worker)
{
    ice_sequence_close(worker->sequence);
    ice_landing_close(worker->landing);
    ice_client_close(worker->client);
    *worker = (struct worker){0};
}

// ---- appends ----

void worker_append(const struct worker *worker, const struct history *history, uint64_t first, uint64_t n)
{
    const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, first);
    uint64_t length = 0;
    assert_ok(ice_append(worker->sequence, ICE_ALL_LAYERS, first, n, &source, 0, &length));
    assert_true(length >= first + n);
}

void worker_check_content(const struct worker *worker, const struct history *history, uint64_t first, uint64_t n)
{
    const size_t bytes = shape_row_bytes(&worker->shape);
    const uint64_t rows = n * worker->shape.kv_heads;
    uint8_t *keys = malloc(rows * bytes), *values = malloc(rows * bytes);
    assert_true(keys && values);
    const struct ice_kv_target target = {keys, values, rows * bytes, rows * bytes, 0, bytes, n * bytes};
    for (uint32_t layer = 0; layer < worker->shape.layers; layer++) {
        assert_ok(ice_read(worker->sequence, layer, first, n, &target, 0));
        for (uint32_t head = 0; head < worker->shape.kv_heads; head++) {
            assert_memory_equal(keys + head * n * bytes, history_key(history, layer, head, first), n * bytes);
            assert_memory_equal(values + head * n * bytes, history_value(history, layer, head, first), n * bytes);
        }
    }
    free(keys);
    free(values);
}

void sequence_wait_idle(ice_sequence *sequence, struct ice_sequence_info *info)
{
    uint64_t until = now_us() + TEST_DEADLINE_US;
    for (;;) {
        assert_ok(ice_sequence_info(sequence, 0, info));
        if (info->idle)
            return;
        assert_true(now_us() < until);
        sleep_us(1000);
    }
}

void worker_wait_idle(const struct worker *worker)
{
    struct ice_sequence_info info;
    sequence_wait_idle(worker->sequence, &info);
    // Pages of 16: the first batch is due at 16 + 256 + 64 tokens; then the newest 64 and less than a batch of 64 are
    // in the tail.
    const uint64_t own = info.length_min - info.shared_tokens;
    if (own >= 336)
        assert_true(info.indexed_min + 64 + 64 > info.length_min);
    else if (info.shared_tokens >= 336)
        assert_true(info.indexed_min + 64 + 64 > info.shared_tokens);
    else
        assert_true(info.indexed_min <= info.shared_tokens);
}

// ---- retrieves ----

void retrieve_init(struct retrieve *retrieve, const struct worker *worker, const struct history *history,
                   uint32_t layer, uint64_t first, uint32_t n)
{
    const struct shape *shape = &worker->shape;
    *retrieve = (struct retrieve){.sequence = worker->sequence, .first = first};
    retrieve->queries = malloc((size_t)n * shape->query_heads * shape_row_bytes(shape));
    assert_non_null(retrieve->queries);
    history_queries(history, layer, first, n, retrieve->queries);
    retrieve->options = (struct ice_retrieve_options){
        .landing = worker->landing,
        .layer = layer,
        .sequence_count = 1,
        .queries = n,
        .query_dtype = shape->dtype,
        .budget = worker->slots > ICE_DEFAULT_SINKS + ICE_DEFAULT_WINDOW
                      ? worker->slots - ICE_DEFAULT_SINKS - ICE_DEFAULT_WINDOW
                      : 1,
        .sinks = ICE_DEFAULT_SINKS,
        .window = ICE_DEFAULT_WINDOW,
    };
    retrieve_point(retrieve);
}

void retrieve_point(struct retrieve *retrieve)
{
    retrieve->options.sequences = &retrieve->sequence;
    retrieve->options.rows = &retrieve->row;
    retrieve->options.first_queries = &retrieve->first;
    retrieve->options.query_vectors = retrieve->queries;
    retrieve->options.keys = retrieve->keys;
    retrieve->options.values = retrieve->values;
}

void retrieve_ends(struct retrieve *retrieve, uint32_t budget, uint32_t sinks, uint32_t window)
{
    retrieve->options.budget = budget;
    retrieve->options.sinks = sinks;
    retrieve->options.window = window;
}

void retrieve_ride(struct retrieve *retrieve, const struct history *history)
{
    size_t bytes = (size_t)retrieve->options.queries * history->shape.kv_heads * shape_row_bytes(&history->shape);
    retrieve->keys = malloc(bytes);
    retrieve->values = malloc(bytes);
    assert_non_null(retrieve->keys);
    assert_non_null(retrieve->values);
    history_riding(history, retrieve->options.layer, retrieve->first, retrieve->options.queries, retrieve->keys,
                   retrieve->values);
    retrieve_point(retrieve);
}

void retrieve_fini(struct retrieve *retrieve)
{
    free(retrieve->queries);
    free(retrieve->keys);
    free(retrieve->values);
    *retrieve = (struct retrieve){0};
}

// ---- what a retrieve leaves ----

void landing_check(ice_landing *landing, uint32_t row, uint32_t layer, const struct history *history, uint32_t count,
                   uint64_t visible)
{
    size_t bytes = shape_row_bytes(&history->shape);
    for (uint32_t head = 0; head < history->shape.kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(landing, row, layer, head, &view));
        assert_int_equal(view.count, count);
        bool *seen = calloc(visible, sizeof *seen);
        assert_non_null(seen);
        for (uint32_t slot = 0; slot < view.count; slot++) {
            uint32_t position = view.positions[slot];
            assert_true(position < visible && !seen[position]);
            seen[position] = true;
            const uint8_t *key = (const uint8_t *)view.keys + slot * bytes;
            const uint8_t *value = (const uint8_t *)view.values + slot * bytes;
            if (memcmp(key, history_key(history, layer, head, position), bytes) != 0 ||
                memcmp(value, history_value(history, layer, head, position), bytes) != 0)
                fail_msg("layer %u head %u slot %u does not hold the bytes of position %u", layer, head, slot,
                         position);
        }
        free(seen);
    }
}

void landing_check_all(ice_landing *landing, uint32_t row, uint32_t layer, const struct history *history,
                       uint64_t visible)
{
    landing_check(landing, row, layer, history, (uint32_t)visible, visible);
    for (uint32_t head = 0; head < history->shape.kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(landing, row, layer, head, &view));
        for (uint32_t slot = 0; slot < view.count; slot++)
            assert_int_equal(view.positions[slot], slot);
    }
}

uint64_t bytes_digest(uint64_t digest, const void *bytes, size_t count)
{
    const uint8_t *at = bytes;
    digest ^= 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++)
        digest = (digest ^ at[i]) * 0x100000001b3u;
    return digest;
}

uint64_t landing_digest(ice_landing *landing, uint32_t row, uint32_t layer, const struct shape *shape)
{
    uint64_t digest = 0;
    for (uint32_t head = 0; head < shape->kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(landing, row, layer, head, &view));
        const size_t bytes = shape_row_bytes(shape);
        uint64_t tokens = 0; // in any order
        for (uint32_t slot = 0; slot < view.count; slot++) {
            uint64_t token = bytes_digest(0, &view.positions[slot], sizeof *view.positions);
            token = bytes_digest(token, (const uint8_t *)view.keys + slot * bytes, bytes);
            tokens += bytes_digest(token, (const uint8_t *)view.values + slot * bytes, bytes);
        }
        digest = bytes_digest(digest, &view.count, sizeof view.count);
        digest = bytes_digest(digest, &tokens, sizeof tokens);
    }
    return digest;
}
