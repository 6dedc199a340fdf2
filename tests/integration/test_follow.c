// Layer reuse: a layer that follows an anchor gets the K and V of the tokens that the anchor's retrieve has selected in
// that row, bit for bit, without a tree and without queries.
#include "worker.h"

#include <stdlib.h>
#include <string.h>

static const struct shape shape = {4, 2, 4, 64, ICE_BF16};
static const uint32_t anchors[] = {0, 0, 2, 2};
enum { LENGTH = 2500, SLOTS = 256, BUDGET = 100 };

static void follow_open(struct worker *worker, const struct daemon *daemon, uint32_t rows)
{
    worker_open(worker, daemon->sockets, &shape, rows, SLOTS);
    ice_sequence_close(worker->sequence);
    struct ice_sequence_options options = sequence_options(&shape);
    options.anchor_layers = anchors;
    assert_ok(ice_sequence_open(worker->client, &options, 0, &worker->sequence));
}

static bool holds(const struct ice_landing_view *view, uint32_t position)
{
    for (uint32_t slot = 0; slot < view->count; slot++) {
        if (view->positions[slot] == position)
            return true;
    }
    return false;
}

static void expect_followed(const struct worker *worker, uint32_t row, uint32_t layer)
{
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        struct ice_landing_view anchor, own;
        assert_ok(ice_landing_view(worker->landing, row, anchors[layer], head, &anchor));
        assert_ok(ice_landing_view(worker->landing, row, layer, head, &own));
        assert_int_equal(anchor.count, own.count);
        for (uint32_t slot = 0; slot < own.count; slot++)
            assert_true(holds(&anchor, own.positions[slot]));
    }
}

// One decode step: each layer appends its K and V and is asked for.
static void step(struct worker *worker, const struct history *history, uint64_t position)
{
    float mass = 0;
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        retrieve_init(&retrieve, worker, history, layer, position, 1);
        retrieve_ends(&retrieve, BUDGET, 16, 64);
        retrieve_ride(&retrieve, history);
        if (anchors[layer] != layer)
            retrieve.options.query_vectors = NULL;
        assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
        assert_int_equal(result.counts[0], BUDGET + 80);
        landing_check(worker->landing, 0, layer, history, BUDGET + 80, position + 1);
        if (anchors[layer] == layer)
            mass = result.masses[1];
        else
            expect_followed(worker, 0, layer);
        assert_true(result.masses[1] == mass);
        assert_int_equal(anchors[layer] == layer, result.versions[0] != 0);
        retrieve_fini(&retrieve);
    }
}

static void decode_steps(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct ice_sequence_info info;
    history_create(&history, &shape, LENGTH, 1009);
    follow_open(&worker, daemon, 1);
    worker_append(&worker, &history, 0, LENGTH - 30);
    sequence_wait_idle(worker.sequence, &info); // layers without a tree have nothing to cluster
    for (uint64_t position = LENGTH - 30; position < LENGTH; position++)
        step(&worker, &history, position);
    worker_check_content(&worker, &history, 0, LENGTH);
    worker_close(&worker);
    history_destroy(&history);
}

static ice_status ask(struct worker *worker, const struct history *history, uint32_t row, uint32_t layer,
                      uint32_t budget, uint32_t sinks, uint32_t window)
{
    struct retrieve retrieve;
    retrieve_init(&retrieve, worker, history, layer, LENGTH - 1, 1);
    retrieve.row = row;
    retrieve_ends(&retrieve, budget, sinks, window);
    if (anchors[layer] != layer)
        retrieve.options.query_vectors = NULL;
    const ice_status status = ice_retrieve(worker->client, &retrieve.options, NULL);
    retrieve_fini(&retrieve);
    return status;
}

// Its sinks and window are its own; what it cannot follow is refused by name, and harms nothing.
static void ends_and_refusals(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 1013);
    follow_open(&worker, daemon, 2);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    assert_refused(ask(&worker, &history, 0, 1, BUDGET, 16, 64), ICE_INVALID_ARGUMENT,
                   "layer 1 follows layer 0, of which row 0 holds no selection");
    assert_ok(ask(&worker, &history, 0, 0, BUDGET, 16, 64));
    assert_refused(ask(&worker, &history, 1, 1, BUDGET, 16, 64), ICE_INVALID_ARGUMENT, "row 1 holds no selection");
    assert_refused(ask(&worker, &history, 0, 3, BUDGET, 16, 64), ICE_INVALID_ARGUMENT, "layer 3 follows layer 2");
    assert_refused(ask(&worker, &history, 0, 1, BUDGET - 1, 16, 64), ICE_TOO_LARGE, "of which 100 tokens");
    assert_ok(ask(&worker, &history, 0, 1, BUDGET, 16, 64));
    expect_followed(&worker, 0, 1);
    // With smaller ends those of the anchor count as selected.
    assert_refused(ask(&worker, &history, 0, 1, BUDGET, 16, 60), ICE_TOO_LARGE, "of which 104 tokens");
    assert_ok(ask(&worker, &history, 0, 1, BUDGET + 20, 0, 60));
    expect_followed(&worker, 0, 1);
    landing_check(worker.landing, 0, 1, &history, BUDGET + 80, LENGTH);
    assert_ok(ask(&worker, &history, 0, 1, BUDGET, 16, 140));
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(worker.landing, 0, 1, head, &view));
        for (uint32_t i = 0; i < 140; i++)
            assert_true(holds(&view, LENGTH - 1 - i));
    }
    // The row goes to another sequence: what it held is nobody's.
    ice_sequence *first = worker.sequence;
    struct ice_sequence_options options = sequence_options(&shape);
    options.anchor_layers = anchors;
    assert_ok(ice_sequence_open(worker.client, &options, 0, &worker.sequence));
    worker_append(&worker, &history, 0, LENGTH);
    assert_refused(ask(&worker, &history, 0, 1, BUDGET, 16, 64), ICE_INVALID_ARGUMENT, "row 0 holds no selection");
    ice_sequence_close(worker.sequence);
    worker.sequence = first;
    // Queries of a layer that has its own tree are missed.
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 2, LENGTH - 1, 1);
    retrieve_point(&retrieve);
    retrieve.options.query_vectors = NULL;
    assert_refused(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_INVALID_ARGUMENT, "query_vectors");
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&history);
}

// All of a sequence: slot i holds position i in layers that follow, too; several sequences in one request.
static void everything(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 1019);
    follow_open(&worker, daemon, 2);
    worker_append(&worker, &history, 0, SLOTS);
    struct ice_sequence_options options = sequence_options(&shape);
    options.anchor_layers = anchors;
    ice_sequence *sequences[2] = {worker.sequence, NULL};
    assert_ok(ice_sequence_open(worker.client, &options, 0, &sequences[1]));
    worker.sequence = sequences[1];
    worker_append(&worker, &history, 0, SLOTS - 10);
    const uint32_t rows[] = {0, 1};
    const uint64_t firsts[] = {SLOTS - 1, SLOTS - 11};
    uint8_t *queries = calloc(2 * shape.query_heads, shape_row_bytes(&shape));
    assert_non_null(queries);
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        const struct ice_retrieve_options both = {
            .landing = worker.landing,
            .layer = layer,
            .sequence_count = 2,
            .sequences = sequences,
            .rows = rows,
            .first_queries = firsts,
            .query_vectors = anchors[layer] == layer ? queries : NULL,
            .query_dtype = ICE_BF16,
            .budget = SLOTS - 80,
            .sinks = 16,
            .window = 64,
        };
        assert_ok(ice_retrieve(worker.client, &both, NULL));
        landing_check_all(worker.landing, 0, layer, &history, SLOTS);
        landing_check_all(worker.landing, 1, layer, &history, SLOTS - 10);
    }
    free(queries);
    ice_sequence_close(sequences[1]);
    worker.sequence = sequences[0];
    worker_close(&worker);
    history_destroy(&history);
}

// On the disk, asleep, and sealed: a sequence that is attached follows as it did.
static void on_the_disk(void **state)
{
    const struct daemon *daemon = *state;
    static uint8_t hashes[LENGTH / 16][ICE_HASH_BYTES];
    uint32_t tokens[LENGTH];
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 1021);
    follow_open(&worker, daemon, 1);
    worker_append(&worker, &history, 0, LENGTH - 20);
    worker_wait_idle(&worker);
    for (uint64_t position = LENGTH - 20; position < LENGTH - 10; position++)
        step(&worker, &history, position);
    for (uint32_t i = 0; i < LENGTH; i++)
        tokens[i] = i;
    assert_ok(ice_block_hashes(tokens, LENGTH - 10, 16, NULL, 0, hashes));
    assert_ok(ice_sequence_seal(worker.sequence, hashes, (LENGTH - 10) / 16, 0, NULL));
    sleep_us(300000); // it falls asleep
    step(&worker, &history, LENGTH - 10);
    ice_sequence_close(worker.sequence);
    struct ice_sequence_options options = sequence_options(&shape);
    uint64_t attached = 0;
    options.anchor_layers = anchors;
    assert_ok(
        ice_sequence_attach(worker.client, &options, hashes, (LENGTH - 10) / 16, 0, 0, &worker.sequence, &attached));
    assert_int_equal(attached, (LENGTH - 10) / 16 * 16);
    for (uint64_t position = attached; position < attached + 5; position++)
        step(&worker, &history, position);
    worker_close(&worker);
    history_destroy(&history);
}

static const char *const spill_options[] = {DAEMON_WITH_DISK("4m", "64m"), "--hibernate-ms", "60", NULL};

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(decode_steps),
        DAEMON_TEST(ends_and_refusals),
        DAEMON_TEST(everything),
        cmocka_unit_test_prestate_setup_teardown(on_the_disk, daemon_setup, daemon_teardown,
                                                 (void *)(uintptr_t)spill_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
