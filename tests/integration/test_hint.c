// Hints: what they bring is what the retrieve needs, they change no answer, they keep nobody waiting, and where what
// they bring is not asked for they are followed less.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// 512 pages of 16 tokens at head_dim 64 in two bytes.
static const char *const tiny_pool[] = {DAEMON_WITH_DISK("2m", "256m"), NULL};
static const char *const sleeps_soon[] = {DAEMON_WITH_DISK("2m", "256m"), "--hibernate-ms", "200", NULL};
static const char *const large_pool[] = {DAEMON_WITH_DISK("256m", "512m"), NULL};

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 4096, SLOTS = 400, BUDGET = 200, SINKS = 16, WINDOW = 64 };

static struct history history;

// Queries as they would stand at a position, of which nothing else is looked at.
static ice_status hint_send(ice_client *client, ice_sequence *sequence, uint32_t layer, uint64_t position,
                            struct ice_hint_result *result)
{
    const size_t bytes = shape.query_heads * shape_row_bytes(&shape);
    uint8_t *queries = malloc(bytes);
    assert_non_null(queries);
    history_queries(&history, layer, position, 1, queries);
    const struct ice_hint_options options = {.layer = layer,
                                             .sequence_count = 1,
                                             .sequences = &sequence,
                                             .query_vectors = queries,
                                             .query_dtype = shape.dtype,
                                             .budget = BUDGET,
                                             .sinks = SINKS,
                                             .window = WINDOW};
    const ice_status status = ice_hint(client, &options, result);
    free(queries);
    return status;
}

static struct ice_hint_result hint(const struct worker *worker, uint32_t layer, uint64_t position)
{
    struct ice_hint_result result = {.pages = 77, .lanes = 77};
    assert_ok(hint_send(worker->client, worker->sequence, layer, position, &result));
    return result;
}

// A retrieve with the queries of a position; what it selects.
static uint64_t select_at(const struct worker *worker, uint32_t layer, uint64_t position)
{
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    retrieve_init(&retrieve, worker, &history, layer, position, 1);
    retrieve_ends(&retrieve, BUDGET, SINKS, WINDOW);
    retrieve.options.resend = true; // slots in ascending order: the digest is the selection's
    assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
    assert_false(result.partial);
    landing_check(worker->landing, 0, layer, &history, BUDGET + SINKS + WINDOW, position + 1);
    retrieve_fini(&retrieve);
    return landing_digest(worker->landing, 0, layer, &worker->shape);
}

// Everything else of the pool.
static void push_out(const struct worker *worker, ice_sequence *other)
{
    struct worker with = *worker;
    with.sequence = other;
    worker_check_content(&with, &history, 0, LENGTH); // twice the pool
}

struct counts {
    uint64_t read, hinted, used, wasted, dropped, in_flight, asleep, hints, late_hints;
};

static struct counts counts_of(const struct daemon *daemon)
{
    json_t *stats = stats_read(daemon);
    const struct counts counts = {
        .read = stats_number(stats, "spill.pages_read"),
        .hinted = stats_number(stats, "spill.hinted"),
        .used = stats_number(stats, "spill.hinted_used"),
        .wasted = stats_number(stats, "spill.hinted_wasted"),
        .dropped = stats_number(stats, "spill.hinted_dropped"),
        .in_flight = stats_number(stats, "spill.in_flight"),
        .asleep = stats_number(stats, "spill.hibernated"),
        .hints = stats_number(stats, "hints"),
        .late_hints = stats_number(stats, "service.hints_late"),
    };
    json_decref(stats);
    return counts;
}

// All that was asked for has been read.
static struct counts wait_read(const struct daemon *daemon, uint64_t pages)
{
    for (const uint64_t until = now_us() + TEST_DEADLINE_US;; sleep_us(1000)) {
        const struct counts counts = counts_of(daemon);
        if (counts.hinted >= pages && counts.in_flight == 0)
            return counts;
        assert_true(now_us() < until);
    }
}

static void open_two(const struct daemon *daemon, struct worker *worker, ice_sequence **other)
{
    worker_open(worker, daemon->sockets, &shape, 1, SLOTS);
    *other = sequence_open(worker->client, &shape);
    struct worker with = *worker;
    with.sequence = *other;
    worker_append(worker, &history, 0, LENGTH);
    worker_append(&with, &history, 0, LENGTH);
    worker_wait_idle(worker);
    worker_wait_idle(&with);
}

static void close_two(struct worker *worker, ice_sequence *other)
{
    ice_sequence_close(other);
    worker_close(worker);
}

// A retrieve with the queries that were hinted at reads nothing, selects what it does without, and all that the hint
// has brought was of use.
static void brings_what_is_needed(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker;
    ice_sequence *other;
    open_two(daemon, &worker, &other);
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        push_out(&worker, other);
        const uint64_t cold = select_at(&worker, layer, LENGTH - 1);
        push_out(&worker, other);
        const struct counts before = counts_of(daemon);
        const struct ice_hint_result result = hint(&worker, layer, LENGTH - 1);
        assert_int_equal(result.lanes, shape.kv_heads);
        assert_true(result.pages > 0 && result.pages <= shape.kv_heads * (BUDGET + SINKS + WINDOW));
        const struct counts read = wait_read(daemon, before.hinted + result.pages);
        assert_int_equal(read.hinted, before.hinted + result.pages);
        assert_int_equal(read.hints, before.hints + 1);
        assert_int_equal(read.dropped, 0);
        assert_true(select_at(&worker, layer, LENGTH - 1) == cold);
        const struct counts after = counts_of(daemon);
        assert_int_equal(after.used - before.used, result.pages);
        assert_int_equal(after.read, read.read);
        // Again: all of it is there.
        assert_int_equal(hint(&worker, layer, LENGTH - 1).pages, 0);
    }
    close_two(&worker, other);
}

// Without a disk, and where nothing has left memory.
static void searches_nothing_that_is_in_memory(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    assert_int_equal(hint(&worker, 0, 5).lanes, 0); // it is empty
    worker_append(&worker, &history, 0, LENGTH);
    const struct ice_hint_result result = hint(&worker, 0, LENGTH - 1);
    assert_int_equal(result.pages, 0);
    assert_int_equal(result.lanes, 0);
    worker_close(&worker);
}

// Pages that nobody asks for: after some hints the lanes are searched once in sixteen. Then they are asked for.
static void is_followed_less_where_it_is_of_no_use(void **state)
{
    const struct daemon *daemon = *state;
    enum { HINTS = 160 };
    struct worker worker;
    ice_sequence *other;
    uint32_t lanes = 0;
    open_two(daemon, &worker, &other);
    for (uint32_t i = 0; i < 8; i++) {
        push_out(&worker, other);
        const struct counts before = counts_of(daemon);
        const struct ice_hint_result result = hint(&worker, 0, 100 + 37 * i);
        wait_read(daemon, before.hinted + result.pages);
    }
    push_out(&worker, other);
    const struct counts wasted = counts_of(daemon);
    assert_true(wasted.wasted >= 128 && wasted.used * 3 < wasted.wasted);
    for (uint32_t i = 0; i < HINTS; i++)
        lanes += hint(&worker, 0, 100 + 37 * i).lanes;
    assert_true(lanes > 0 && lanes <= shape.kv_heads * (HINTS / 16 + 1));
    // The other layer is judged for itself.
    push_out(&worker, other);
    assert_int_equal(hint(&worker, 1, LENGTH - 1).lanes, shape.kv_heads);
    close_two(&worker, other);
}

// Nobody takes the answers; requests of all kinds beside them, on sequences that are forked, cut and closed.
static void keeps_nobody_waiting(void **state)
{
    const struct daemon *daemon = *state;
    enum { MORE = 64 };
    const uint32_t rounds = scaled_count(20, 60);
    struct worker worker;
    ice_sequence *other;
    open_two(daemon, &worker, &other);
    const struct counts before = counts_of(daemon);
    uint64_t length = LENGTH;
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct retrieve retrieve;
            assert_ok(hint_send(worker.client, worker.sequence, layer, 11 * round, NULL));
            assert_ok(hint_send(worker.client, other, 1 - layer, 13 * round, NULL));
            retrieve_init(&retrieve, &worker, &history, layer, length, 1);
            retrieve_ends(&retrieve, BUDGET, SINKS, WINDOW);
            retrieve_ride(&retrieve, &history);
            assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
            retrieve_fini(&retrieve);
            landing_check(worker.landing, 0, layer, &history, BUDGET + SINKS + WINDOW, length + 1);
        }
        length++;
        ice_sequence *fork = NULL;
        assert_ok(hint_send(worker.client, worker.sequence, round % 2, 17 * round, NULL));
        assert_ok(ice_sequence_fork(worker.sequence, length - round % 7, 0, &fork));
        struct worker with = worker;
        with.sequence = fork;
        assert_ok(hint_send(worker.client, fork, round % 2, 19 * round, NULL));
        worker_append(&with, &history, length - round % 7, 3);
        assert_ok(hint_send(worker.client, fork, round % 2, 23 * round, NULL));
        worker_check_content(&with, &history, length - 300, 296);
        assert_ok(hint_send(worker.client, fork, 0, round, NULL));
        ice_sequence_close(fork);
        if (round % 10 == 9) {
            assert_ok(hint_send(worker.client, worker.sequence, 0, round, NULL));
            assert_ok(ice_sequence_truncate(worker.sequence, length - 5, 0));
            length -= 5;
        }
    }
    worker_check_content(&worker, &history, 0, length);
    const struct counts after = counts_of(daemon);
    assert_true(after.hints > before.hints + rounds && after.hinted > before.hinted);
    close_two(&worker, other);
    assert_true(length + 3 <= LENGTH + MORE); // the history's
}

static void wait_asleep(const struct daemon *daemon, uint64_t lanes)
{
    for (const uint64_t until = now_us() + TEST_DEADLINE_US; counts_of(daemon).asleep != lanes; sleep_us(1000))
        assert_true(now_us() < until);
}

// The first hint lets it wake, and is no more than that.
static void wakes_what_sleeps(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker;
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    wait_asleep(daemon, shape.layers * shape.kv_heads);
    assert_int_equal(hint(&worker, 0, LENGTH - 1).pages, 0);
    wait_asleep(daemon, 0);
    const struct counts before = counts_of(daemon);
    const struct ice_hint_result result = hint(&worker, 0, LENGTH - 1);
    assert_int_equal(result.lanes, shape.kv_heads);
    wait_read(daemon, before.hinted + result.pages);
    select_at(&worker, 0, LENGTH - 1);
    assert_int_equal(counts_of(daemon).used - before.used, result.pages);
    worker_close(&worker);
}

// What has no time any more is not followed.
static void comes_too_late(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker;
    ice_sequence *other;
    open_two(daemon, &worker, &other);
    push_out(&worker, other);
    const size_t bytes = shape.query_heads * shape_row_bytes(&shape);
    uint8_t *queries = calloc(1, bytes);
    assert_non_null(queries);
    const struct ice_hint_options options = {.sequence_count = 1,
                                             .sequences = &worker.sequence,
                                             .query_vectors = queries,
                                             .query_dtype = shape.dtype,
                                             .budget = BUDGET,
                                             .deadline_us = 1};
    const struct counts before = counts_of(daemon);
    uint32_t sent = 0;
    for (uint32_t i = 0; i < 50; i++)
        sent += ice_hint(worker.client, &options, NULL) == ICE_OK; // a microsecond may not even do for sending it
    assert_true(sent > 0);
    for (const uint64_t until = now_us() + TEST_DEADLINE_US; counts_of(daemon).hints < before.hints + sent;)
        assert_true(now_us() < until);
    const struct counts after = counts_of(daemon);
    assert_int_equal(after.hinted, before.hinted);
    assert_int_equal(after.late_hints, before.late_hints + sent);
    free(queries);
    close_two(&worker, other);
}

static void refuses_what_makes_no_sense(void **state)
{
    const struct daemon *daemon = *state;
    static const uint32_t anchors[] = {0, 0};
    struct worker worker;
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    struct ice_sequence_options like = sequence_options(&shape);
    like.anchor_layers = anchors;
    ice_sequence *follows = NULL, *both[2], *none = NULL;
    assert_ok(ice_sequence_open(worker.client, &like, 0, &follows));
    const struct shape wide = {2, 2, 4, 128, ICE_BF16};
    both[0] = worker.sequence;
    both[1] = sequence_open(worker.client, &wide);
    uint8_t queries[2 * 4 * 128 * 2] = {0};
    const struct ice_hint_options good = {.sequence_count = 1,
                                          .sequences = &worker.sequence,
                                          .query_vectors = queries,
                                          .query_dtype = ICE_BF16,
                                          .budget = BUDGET};
    struct ice_hint_options bad;
    struct ice_hint_result result;
#define REFUSED(change, status, text)                                                                                  \
    bad = good;                                                                                                        \
    change;                                                                                                            \
    assert_refused(ice_hint(worker.client, &bad, &result), status, text);                                              \
    assert_refused(ice_hint(worker.client, &bad, NULL), status, text)
    REFUSED(bad.budget = 0, ICE_INVALID_ARGUMENT, "options.budget is 0");
    REFUSED(bad.sequence_count = 0, ICE_INVALID_ARGUMENT, "options.sequence_count is 0");
    REFUSED(bad.sequence_count = 257, ICE_TOO_LARGE, "options.sequence_count is 257");
    REFUSED(bad.queries = 257, ICE_TOO_LARGE, "options.queries is 257");
    REFUSED(bad.query_dtype = (ice_dtype)9, ICE_INVALID_ARGUMENT, "options.query_dtype 9");
    REFUSED(bad.query_vectors = NULL, ICE_INVALID_ARGUMENT, "options.query_vectors is NULL");
    REFUSED(bad.sequences = NULL, ICE_INVALID_ARGUMENT, "options.sequences is NULL");
    REFUSED(bad.sequences = &none, ICE_INVALID_ARGUMENT, "options.sequences[0] is NULL");
    REFUSED(bad.layer = 2, ICE_UNKNOWN_LAYER, "the sequence has 2 layers");
    REFUSED((bad.sequences = &follows, bad.layer = 1), ICE_SHAPE_MISMATCH, "layer 1 follows layer 0");
    REFUSED((bad.sequences = both, bad.sequence_count = 2), ICE_SHAPE_MISMATCH, "options.sequences[1] has another");
    REFUSED(bad.sinks = 1u << 31, ICE_TOO_LARGE, "above");
#undef REFUSED
    assert_refused(ice_hint(worker.client, NULL, NULL), ICE_INVALID_ARGUMENT, "options is NULL");
    assert_status(ice_hint(NULL, &good, NULL), ICE_INVALID_ARGUMENT);
    // Twice the same, which only the daemon knows of.
    both[1] = both[0];
    bad = good;
    bad.sequences = both;
    bad.sequence_count = 2;
    assert_refused(ice_hint(worker.client, &bad, &result), ICE_INVALID_ARGUMENT, "name each sequence once");
    assert_ok(ice_hint(worker.client, &good, &result));
    worker_close(&worker);
}

int main(void)
{
    history_create(&history, &shape, LENGTH + 64, 31);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(brings_what_is_needed, tiny_pool),
        DAEMON_TEST(searches_nothing_that_is_in_memory),
        DAEMON_TEST_WITH(searches_nothing_that_is_in_memory, large_pool),
        DAEMON_TEST_WITH(is_followed_less_where_it_is_of_no_use, tiny_pool),
        DAEMON_TEST_WITH(keeps_nobody_waiting, tiny_pool),
        DAEMON_TEST_WITH(wakes_what_sleeps, sleeps_soon),
        DAEMON_TEST_WITH(comes_too_late, tiny_pool),
        DAEMON_TEST(refuses_what_makes_no_sense),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    history_destroy(&history);
    return failed;
}
