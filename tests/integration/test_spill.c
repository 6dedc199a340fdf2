// Sequences larger than the pool: what is read, selected and appended is the same bytes as without a disk, however
// little of it is in memory; a full spill file refuses before anything is half-appended.
#include "worker.h"

#include <stdlib.h>
#include <string.h>

// The smallest pool there is: 512 pages of 16 tokens at head_dim 64 in two bytes.
static const char *const tiny_pool[] = {DAEMON_WITH_DISK("2m", "64m"), NULL};
static const char *const small_disk[] = {DAEMON_WITH_DISK("2m", "4m"), NULL};

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

static uint64_t retrieve_digest(struct worker *worker, const struct history *history, uint32_t layer, uint64_t first,
                                uint32_t budget, bool ride)
{
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    retrieve_init(&retrieve, worker, history, layer, first, 1);
    retrieve_ends(&retrieve, budget, 16, 64);
    if (ride)
        retrieve_ride(&retrieve, history);
    assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
    assert_false(result.partial);
    landing_check(worker->landing, 0, layer, history, budget + 80, first + 1);
    retrieve_fini(&retrieve);
    return landing_digest(worker->landing, 0, layer, &worker->shape);
}

// Eight times the pool: 16,384 tokens x 4 lanes are 16 MiB.
static void larger_than_the_pool(void **state)
{
    const struct daemon *daemon = *state;
    enum { LENGTH = 16384, STEPS = 40 };
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH + STEPS, 21);
    worker_open(&worker, daemon->sockets, &shape, 1, LENGTH);
    for (uint64_t first = 0; first < LENGTH; first += 4096) {
        worker_append(&worker, &history, first, 4096);
        retrieve_digest(&worker, &history, 0, first + 4095, 100, false);
    }
    worker_wait_idle(&worker);
    worker_check_content(&worker, &history, 0, LENGTH);
    worker_check_content(&worker, &history, 5000, 100);
    for (uint64_t step = 0; step < STEPS; step++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++)
            retrieve_digest(&worker, &history, layer, LENGTH + step, 64 + (uint32_t)step, true);
    }
    worker_append(&worker, &history, LENGTH - 1000, 1000); // again: compared with what is on the disk
    worker_check_content(&worker, &history, LENGTH - 10, 10 + STEPS);
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 1, LENGTH - 1, 1);
    retrieve_ends(&retrieve, LENGTH - 80, 16, 64);
    retrieve.options.deadline_us = TEST_DEADLINE_US;
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 1, &history, LENGTH);
    retrieve_fini(&retrieve);
    json_t *stats = stats_read(daemon);
    assert_true(stats_number(stats, "bytes.pool") <= 2u << 20);
    json_decref(stats);
    worker_close(&worker);
    history_destroy(&history);
}

// The same appends with and without a disk: the same tree, the same selections.
static void selects_as_without_a_disk(void **state)
{
    enum { LENGTH = 6000 };
    struct daemon *daemon = *state;
    uint64_t digests[2][24];
    const char *const *with_disk = daemon->options;
    for (int disk = 0; disk < 2; disk++) {
        struct history history;
        struct worker worker;
        daemon_stop(daemon);
        daemon->options = disk ? with_disk : daemon_default_options;
        daemon_start(daemon);
        history_create(&history, &shape, LENGTH + 12, 22);
        worker_open(&worker, daemon->sockets, &shape, 1, 512);
        worker_append(&worker, &history, 0, LENGTH);
        worker_wait_idle(&worker);
        for (uint32_t i = 0; i < 24; i++)
            digests[disk][i] = retrieve_digest(&worker, &history, i % 2, LENGTH + i / 2, 256, true);
        worker_close(&worker);
        history_destroy(&history);
    }
    assert_memory_equal(digests[0], digests[1], sizeof digests[0]);
}

// An append that the spill file has no room for has no effect; closing another sequence makes room.
static void refuses_what_does_not_fit(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint64_t length = 1;
    history_create(&history, &shape, 6000, 23);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    const struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    assert_refused(ice_append(worker.sequence, ICE_ALL_LAYERS, 0, 6000, &source, 0, &length), ICE_SPILL_FULL,
                   "--spill-bytes");
    assert_int_equal(length, 0);
    worker_append(&worker, &history, 0, 2000);
    ice_sequence *other = sequence_open(worker.client, &shape);
    assert_status(ice_append(other, ICE_ALL_LAYERS, 0, 2500, &source, 0, &length), ICE_SPILL_FULL);
    assert_int_equal(length, 0);
    worker_check_content(&worker, &history, 0, 2000);
    ice_sequence_close(worker.sequence);
    worker.sequence = NULL;
    for (uint64_t until = now_us() + TEST_DEADLINE_US;
         ice_append(other, ICE_ALL_LAYERS, 0, 2500, &source, 0, &length) != ICE_OK; sleep_us(1000))
        assert_true(now_us() < until);
    assert_int_equal(length, 2500);
    ice_sequence_close(other);
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(larger_than_the_pool, tiny_pool),
        DAEMON_TEST_WITH(selects_as_without_a_disk, tiny_pool),
        DAEMON_TEST_WITH(refuses_what_does_not_fit, small_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
