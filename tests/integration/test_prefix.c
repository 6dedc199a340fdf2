// Sealed prefixes and sleep: what is sealed is found, attached and selected from as before, bit for bit, also after a
// restart and a kill; another identity finds nothing; a sequence that has slept answers as one that has not.
#include "worker.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const with_disk[] = {DAEMON_WITH_DISK("4m", "128m"), "--hibernate-ms", "0", NULL};
static const char *const sleepy[] = {DAEMON_WITH_DISK("4m", "128m"), "--hibernate-ms", "150", NULL};

enum { LENGTH = 3000, BLOCKS = LENGTH / 16, SEALED = BLOCKS * 16, LOOKS = 12 };

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

static void make_hashes(uint8_t hashes[BLOCKS][ICE_HASH_BYTES], uint32_t seed)
{
    static uint32_t tokens[LENGTH];
    for (uint32_t i = 0; i < LENGTH; i++)
        tokens[i] = i * 7919 + seed;
    assert_ok(ice_block_hashes(tokens, SEALED, 16, NULL, 0, hashes));
}

// What retrieves at the end of the sealed part return: positions, K and V, and the estimated masses.
static void look(struct worker *worker, const struct history *history, uint64_t length, uint64_t digests[LOOKS])
{
    for (uint32_t i = 0; i < LOOKS; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        const uint32_t layer = i % shape.layers;
        retrieve_init(&retrieve, worker, history, layer, length - 1 - i, 1);
        retrieve_ends(&retrieve, 100 + i, 16, 64);
        assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
        assert_false(result.partial);
        landing_check(worker->landing, 0, layer, history, 180 + i, length - i);
        digests[i] = bytes_digest(landing_digest(worker->landing, 0, layer, &shape), result.masses,
                                  result.head_count * sizeof *result.masses);
        retrieve_fini(&retrieve);
    }
}

// A client with a landing, and no sequence.
static void open_client(struct worker *worker, const struct daemon *daemon)
{
    worker_open(worker, daemon->sockets, &shape, 1, 512);
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
}

static void attach(struct worker *worker, const void *hashes, size_t count, uint64_t tokens_max, uint64_t expected)
{
    const struct ice_sequence_options options = sequence_options(&shape);
    uint64_t tokens = 0;
    assert_ok(ice_sequence_attach(worker->client, &options, hashes, count, tokens_max, 0, &worker->sequence, &tokens));
    assert_int_equal(tokens, expected);
}

static void seal_history(const struct daemon *daemon, struct history *history, uint8_t hashes[BLOCKS][ICE_HASH_BYTES],
                         uint64_t digests[LOOKS], uint64_t *build_us)
{
    struct worker worker;
    struct ice_seal_result sealed;
    struct ice_sequence_info info;
    history_create(history, &shape, LENGTH + 400, 41);
    make_hashes(hashes, 1);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, history, 0, SEALED);
    worker_wait_idle(&worker);
    look(&worker, history, SEALED, digests);
    assert_ok(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, &sealed));
    assert_int_equal(sealed.tokens, SEALED);
    assert_false(sealed.known);
    assert_ok(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, &sealed));
    assert_true(sealed.known);
    sequence_wait_idle(worker.sequence, &info);
    *build_us = info.build_us;
    // It goes on as before, and the sealed part stays what it is.
    worker_append(&worker, history, SEALED, 300);
    worker_wait_idle(&worker);
    worker_check_content(&worker, history, 0, SEALED + 300);
    worker_close(&worker);
}

static void expect_attached(const struct daemon *daemon, const struct history *history, const void *hashes,
                            const uint64_t digests[LOOKS])
{
    struct worker worker;
    uint64_t again[LOOKS], tokens;
    struct ice_sequence_info info;
    const struct ice_sequence_options options = sequence_options(&shape);
    open_client(&worker, daemon);
    assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, SEALED);
    attach(&worker, hashes, BLOCKS, 0, SEALED);
    look(&worker, history, SEALED, again);
    assert_memory_equal(again, digests, sizeof again);
    sequence_wait_idle(worker.sequence, &info);
    assert_int_equal(info.build_us, 0); // nothing was clustered again
    worker_check_content(&worker, history, 0, SEALED);
    worker_append(&worker, history, SEALED, 300);
    worker_wait_idle(&worker);
    worker_check_content(&worker, history, 0, SEALED + 300);
    look(&worker, history, SEALED + 300, again);
    worker_close(&worker);
}

static void survives(void **state)
{
    struct daemon *daemon = *state;
    struct history history;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    uint64_t digests[LOOKS], build_us;
    seal_history(daemon, &history, hashes, digests, &build_us);
    assert_true(build_us > 0);
    for (int i = 0; i < 2; i++)
        expect_attached(daemon, &history, hashes, digests);
    daemon_stop(daemon);
    daemon_start(daemon);
    expect_attached(daemon, &history, hashes, digests);
    daemon_kill(daemon);
    daemon_start(daemon);
    for (int i = 0; i < 2; i++)
        expect_attached(daemon, &history, hashes, digests);
    history_destroy(&history);
}

static void only_its_own(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES], others[BLOCKS][ICE_HASH_BYTES];
    uint64_t digests[LOOKS], build_us, tokens = 1;
    seal_history(daemon, &history, hashes, digests, &build_us);
    make_hashes(others, 2);
    open_client(&worker, daemon);
    const struct ice_sequence_options own = sequence_options(&shape);
    struct ice_sequence_options options = own;
    assert_ok(ice_prefix_lookup(worker.client, &options, others, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, 0);
    assert_status(ice_sequence_attach(worker.client, &options, others, BLOCKS, 0, 0, &worker.sequence, &tokens),
                  ICE_UNKNOWN_PREFIX);
    memcpy(others, hashes, 100 * ICE_HASH_BYTES); // another continuation
    assert_ok(ice_prefix_lookup(worker.client, &options, others, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, 1600);
#define FINDS_NOTHING(field, value)                                                                                    \
    do {                                                                                                               \
        options = own;                                                                                                 \
        options.field = (value);                                                                                       \
        assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));                             \
        assert_int_equal(tokens, 0);                                                                                   \
        assert_status(ice_sequence_attach(worker.client, &options, hashes, BLOCKS, 0, 0, &worker.sequence, &tokens),   \
                      ICE_UNKNOWN_PREFIX);                                                                             \
    } while (0)
    FINDS_NOTHING(name_space, "other");
    FINDS_NOTHING(model_digest, "other");
    FINDS_NOTHING(layers, 3);
    FINDS_NOTHING(kv_heads, 4);
    FINDS_NOTHING(query_heads, 8);
    FINDS_NOTHING(head_dim, 80);
    FINDS_NOTHING(dtype, ICE_FP16);
    FINDS_NOTHING(block_tokens, 8);
    FINDS_NOTHING(tp_size, 2);
    // More than is there cannot be sealed.
    attach(&worker, hashes, 100, 0, 1600);
    assert_refused(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, NULL), ICE_POSITION_GAP, "whole blocks");
    worker_close(&worker);
    history_destroy(&history);
}

// Attached to a part of what was sealed: the rest is cut off, in the middle of pages, and the sequence goes its own
// way.
static void a_part_of_it(void **state)
{
    const struct daemon *daemon = *state;
    struct history history, other;
    struct worker worker;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    uint64_t digests[LOOKS], again[LOOKS], build_us;
    static const uint64_t limits[] = {16, 100, 1000, 2990};
    seal_history(daemon, &history, hashes, digests, &build_us);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        const uint64_t length = limits[i] / 16 * 16;
        open_client(&worker, daemon);
        attach(&worker, hashes, BLOCKS, limits[i], length);
        worker_check_content(&worker, &history, 0, length);
        history_create(&other, &shape, LENGTH, 41); // the same beginning
        worker_append(&worker, &other, length, 700 < LENGTH - length ? 700 : LENGTH - length);
        worker_check_content(&worker, &other, 0, length);
        worker_close(&worker);
        history_destroy(&other);
    }
    open_client(&worker, daemon);
    attach(&worker, hashes, BLOCKS, 0, SEALED);
    look(&worker, &history, SEALED, again);
    assert_memory_equal(again, digests, sizeof again);
    worker_close(&worker);
    history_destroy(&history);
}

static uint64_t spill_bytes(const struct daemon *daemon)
{
    json_t *stats = stats_read(daemon);
    const uint64_t bytes = stats_number(stats, "spill.bytes");
    json_decref(stats);
    return bytes;
}

static void wait_for_spill_bytes(const struct daemon *daemon, uint64_t expected)
{
    for (uint64_t until = now_us() + TEST_DEADLINE_US; spill_bytes(daemon) != expected; sleep_us(2000))
        assert_true(now_us() < until);
}

// Its room is free when it is removed and nobody is attached; it is not there after a restart either.
static void removed(void **state)
{
    struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    uint64_t digests[LOOKS], again[LOOKS], build_us, tokens = 1;
    struct ice_seal_result sealed;
    const struct ice_sequence_options options = sequence_options(&shape);
    seal_history(daemon, &history, hashes, digests, &build_us);
    open_client(&worker, daemon);
    attach(&worker, hashes, BLOCKS, 0, SEALED);
    assert_ok(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, &sealed));
    assert_true(sealed.known);
    assert_ok(ice_prefix_remove_from(worker.client, "tests", sealed.prefix_id, 0));
    assert_status(ice_prefix_remove_from(worker.client, "tests", sealed.prefix_id, 0), ICE_UNKNOWN_PREFIX);
    assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, 0);
    look(&worker, &history, SEALED, again); // who is attached lives on
    assert_memory_equal(again, digests, sizeof again);
    worker_close(&worker);
    wait_for_spill_bytes(daemon, 0);
    daemon_stop(daemon);
    daemon_start(daemon);
    assert_int_equal(spill_bytes(daemon), 0);
    history_destroy(&history);
}

// A manifest that is cut, or a spill file that is another one: missing, never served.
static void what_is_damaged_is_missing(void **state)
{
    struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    uint64_t digests[LOOKS], build_us, tokens = 1;
    char path[512] = "";
    const struct ice_sequence_options options = sequence_options(&shape);
    for (int round = 0; round < 3; round++) {
        seal_history(daemon, &history, hashes, digests, &build_us);
        daemon_stop(daemon);
        DIR *folder = opendir(daemon->spill);
        assert_non_null(folder);
        for (struct dirent *each; (each = readdir(folder)) != NULL;) {
            if (strstr(each->d_name, ".seal"))
                snprintf(path, sizeof path, "%s/%s", daemon->spill, each->d_name);
        }
        closedir(folder);
        if (round == 0) {
            assert_int_equal(truncate(path, 5000), 0);
        } else if (round == 1) {
            const int fd = open(path, O_RDWR);
            assert_int_equal(pwrite(fd, "x", 1, 300), 1);
            close(fd);
        } else {
            snprintf(path, sizeof path, "%s/data", daemon->spill);
            assert_int_equal(unlink(path), 0);
        }
        daemon_start(daemon);
        open_client(&worker, daemon);
        assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 0);
        assert_int_equal(spill_bytes(daemon), 0);
        worker_close(&worker);
        history_destroy(&history);
    }
}

// ---- sleep ----

static uint64_t asleep(const struct daemon *daemon)
{
    json_t *stats = stats_read(daemon);
    const uint64_t lanes = stats_number(stats, "spill.hibernated");
    json_decref(stats);
    return lanes;
}

static void sleeps_and_wakes(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint64_t digests[LOOKS], again[LOOKS];
    struct stats_held held;
    history_create(&history, &shape, LENGTH + 400, 43);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    look(&worker, &history, LENGTH, digests);
    for (int round = 0; round < 3; round++) {
        for (uint64_t until = now_us() + TEST_DEADLINE_US; asleep(daemon) != 4; sleep_us(5000))
            assert_true(now_us() < until);
        stats_held(daemon, &held);
        assert_int_equal(held.pool_bytes, 0);
        assert_true(held.index_bytes < 100000);
        if (round == 0) {
            look(&worker, &history, LENGTH, again);
            assert_memory_equal(again, digests, sizeof again);
        } else if (round == 1) {
            worker_append(&worker, &history, LENGTH, 200);
            worker_check_content(&worker, &history, 0, LENGTH + 200);
        }
    }
    worker_close(&worker); // asleep
    wait_for_spill_bytes(daemon, 0);
    history_destroy(&history);
}

// Requests come just when it falls asleep.
static void woken_at_any_moment(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint64_t digests[LOOKS], again[LOOKS];
    uint64_t random = random_seed("woken_at_any_moment");
    history_create(&history, &shape, LENGTH + 400, 44);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    look(&worker, &history, LENGTH, digests);
    for (uint32_t round = 0; round < scaled_count(20, 200); round++) {
        sleep_us(140000 + random_below(&random, 40000));
        look(&worker, &history, LENGTH, again);
        assert_memory_equal(again, digests, sizeof again);
    }
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(survives, with_disk),
        DAEMON_TEST_WITH(only_its_own, with_disk),
        DAEMON_TEST_WITH(a_part_of_it, with_disk),
        DAEMON_TEST_WITH(removed, with_disk),
        DAEMON_TEST_WITH(what_is_damaged_is_missing, with_disk),
        DAEMON_TEST_WITH(sleeps_and_wakes, sleepy),
        DAEMON_TEST_WITH(woken_at_any_moment, sleepy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
