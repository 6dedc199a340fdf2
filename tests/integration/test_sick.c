// Faults of the disk under a running daemon: one place that cannot be read, writes that fail, a disk that dies, syncs
// that fail, transfers that are cut, a folder that goes, a device that hangs. Each ends in a named error or in a
// fallback that is documented; what is in memory is served, and nothing wrong ever is.
#include "load.h"
#include "manifests.h"
#include "power.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

#define OPTIONS(engine)                                                                                                \
    {                                                                                                                  \
        DAEMON_WITH_DISK("2m", "64m"), "--drain-ms", "500", "--hibernate-ms", "0", "--spill-engine", engine, NULL      \
    }
static const char *const by_threads[] = OPTIONS("threads"), *const by_either[] = OPTIONS("auto");

// Both engines where both are to be had: each test runs with one and with the other.
#define SICK_TEST(function)                                                                                            \
    {#function, function, setup_sick, teardown_sick, (void *)(uintptr_t)by_either},                                    \
    {                                                                                                                  \
#function " (threads)", function, setup_sick, teardown_sick, (void *)(uintptr_t)by_threads                     \
    }

static struct sick *sick;
static struct load_ledger ledger;

static int setup_sick(void **state)
{
    int failed = daemon_setup_stopped(state);
    struct daemon *daemon = *state;
    ledger.count = 0;
    sick = sick_open(daemon);
    sick->close_wait_ns = 1000000000u;
    daemon_start(daemon);
    return failed;
}

static int teardown_sick(void **state)
{
    atomic_store(&sick->hangs, false);
    sick_close(*state, sick);
    return daemon_teardown(state);
}

static json_t *spill_stats(const struct daemon *daemon)
{
    json_t *stats = stats_read(daemon), *spill = json_object_get(stats, "spill");
    assert_non_null(spill);
    json_incref(spill);
    json_decref(stats);
    return spill;
}

static bool is_off(const struct daemon *daemon)
{
    json_t *spill = spill_stats(daemon);
    const bool off = json_is_true(json_object_get(spill, "off"));
    json_decref(spill);
    return off;
}

static uint64_t spill_number(const struct daemon *daemon, const char *name)
{
    json_t *spill = spill_stats(daemon);
    const uint64_t number = stats_number(spill, name);
    json_decref(spill);
    return number;
}

static void expect_log(const struct daemon *daemon, const char *part)
{
    static char text[1 << 20];
    for (uint64_t until = now_us() + TEST_DEADLINE_US;; sleep_us(5000)) {
        daemon_read_log(daemon, text, sizeof text);
        if (strstr(text, part))
            return;
        if (now_us() >= until)
            fail_msg("the log does not say \"%s\"", part);
    }
}

static void append(struct worker *worker, const struct history *history, uint64_t first, uint64_t n)
{
    const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, first);
    assert_ok(ice_append(worker->sequence, ICE_ALL_LAYERS, first, n, &source, 0, NULL));
}

static void expect_all(const struct worker *worker, const struct history *history, uint64_t length)
{
    bool equal = false;
    assert_ok(load_read(worker, history, length, &equal));
    assert_true(equal);
}

static ice_status attach(struct worker *worker, uint32_t document, uint32_t blocks)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    const struct ice_sequence_options options = sequence_options(&load_shape);
    load_hashes(document, hashes);
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
    return ice_sequence_attach(worker->client, &options, hashes, blocks, 0, 0, &worker->sequence, NULL);
}

static ice_status seal(struct worker *worker, uint32_t document, uint32_t blocks)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    load_hashes(document, hashes);
    return ice_sequence_seal(worker->sequence, hashes, blocks, 0, NULL);
}

// ---- reads ----

// A page that cannot be read is lost to its lane; all else is served, and can be sealed and attached to.
static void one_bad_place(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    struct manifest manifest;
    bool equal;
    load_open(&worker, daemon);
    for (uint32_t document = 0; document < 2; document++)
        load_seal(&ledger, &worker, document, 40);
    manifest_read(&manifest, daemon->spill, ledger.seals[0].id);
    const struct manifest_lane *lane = &manifest.lanes[3]; // layer 1, head 1
    atomic_store(&sick->bad_from, lane->pages[lane->page_count / 2] * 4096ull);
    atomic_store(&sick->bad_until, lane->pages[lane->page_count / 2] * 4096ull + 1);
    load_history(&history, 0);
    assert_ok(attach(&worker, 0, 40));
    assert_refused(load_read(&worker, &history, 640, &equal), ICE_PAGE_LOST, "layer 1, KV head 1");
    expect_log(daemon, "cannot be read back from the spill file: Input/output error");
    for (int again = 0; again < 20; again++)
        assert_status(load_read(&worker, &history, 640, &equal), ICE_PAGE_LOST);
    struct retrieve retrieve; // of all of it
    ice_landing *landing = landing_open(worker.client, &load_shape, 1, 640);
    retrieve_init(&retrieve, &worker, &history, 1, 639, 1);
    retrieve_ends(&retrieve, 560, 16, 64);
    retrieve.options.landing = landing;
    for (int again = 0; again < 3; again++)
        assert_refused(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_PAGE_LOST, "layer 1, KV head 1");
    retrieve_fini(&retrieve);
    ice_landing_close(landing);
    // The other layer.
    retrieve_init(&retrieve, &worker, &history, 0, 639, 1);
    retrieve_ends(&retrieve, 100, 16, 64);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(worker.landing, 0, 0, &history, 180, 640);
    retrieve_fini(&retrieve);
    // What cannot all be read cannot be sealed.
    append(&worker, &history, 640, 160);
    assert_refused(seal(&worker, 0, 50), ICE_PAGE_LOST, "the disk has lost");
    assert_false(is_off(daemon));
    assert_true(spill_number(daemon, "pages_lost") > 0);
    history_destroy(&history);
    load_history(&history, 1);
    assert_ok(attach(&worker, 1, 40));
    expect_all(&worker, &history, 640);
    append(&worker, &history, 640, 160);
    assert_ok(seal(&worker, 1, 50));
    worker_close(&worker);
    history_destroy(&history);
    manifest_free(&manifest);
}

// ---- writes ----

// Those that fail are tried again; the pages stay in memory meanwhile.
static void some_writes_fail(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    load_open(&worker, daemon);
    load_history(&history, 0);
    ice_sequence *sequences[3];
    for (int i = 0; i < 3; i++) {
        sequences[i] = worker.sequence = sequence_open(worker.client, &load_shape);
        atomic_store(&sick->write_error, -EIO);
        atomic_store(&sick->write_failures, 5); // fewer than end the disk
        append(&worker, &history, 0, LOAD_TOKENS_MAX);
    }
    for (int i = 0; i < 3; i++) {
        worker.sequence = sequences[i];
        expect_all(&worker, &history, LOAD_TOKENS_MAX);
    }
    expect_log(daemon, "a page cannot be written to the spill file: Input/output error; it stays in memory");
    assert_true(spill_number(daemon, "write_errors") >= 5);
    assert_false(is_off(daemon));
    for (int i = 0; i < 2; i++)
        ice_sequence_close(sequences[i]);
    assert_ok(seal(&worker, 0, LOAD_BLOCKS_MAX));
    worker_close(&worker);
    history_destroy(&history);
}

// ---- a disk that dies ----

static void expect_no_disk(struct worker *worker, const char *text)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    const struct ice_sequence_options options = sequence_options(&load_shape);
    uint64_t tokens;
    load_hashes(0, hashes);
    assert_refused(ice_sequence_seal(worker->sequence, hashes, 10, 0, NULL), ICE_DISK_FAILED, text);
    assert_refused(ice_prefix_lookup(worker->client, &options, hashes, 10, 0, &tokens), ICE_DISK_FAILED, text);
    assert_refused(attach(worker, 0, 10), ICE_DISK_FAILED, text);
}

// Nothing can be read or written: the tier is off, what is in memory is served, and there is the pool.
static void dead(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker, other;
    struct history history;
    bool equal;
    load_open(&worker, daemon);
    load_history(&history, 0);
    load_seal(&ledger, &worker, 0, 20);
    ice_sequence_close(worker.sequence); // else the other worker would share what is in memory
    worker.sequence = sequence_open(worker.client, &load_shape);
    append(&worker, &history, 0, 160); // in memory
    load_open(&other, daemon);
    assert_ok(attach(&other, 0, 20)); // asleep
    atomic_store(&sick->write_failures, UINT32_MAX);
    atomic_store(&sick->write_error, -EIO);
    atomic_store(&sick->read_error, -EIO);
    assert_refused(load_read(&other, &history, 320, &equal), ICE_PAGE_LOST, "the disk has lost");
    // Appends beyond the pool, until the daemon has seen enough failures.
    ice_sequence *filler = sequence_open(other.client, &load_shape);
    ice_status status = ICE_OK;
    const struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    for (int i = 0; i < 8 && status == ICE_OK; i++) {
        ice_sequence_close(other.sequence);
        other.sequence = filler;
        filler = sequence_open(other.client, &load_shape);
        status = ice_append(filler, ICE_ALL_LAYERS, 0, LOAD_TOKENS_MAX, &source, 0, NULL);
        ice_sequence *kept = sequence_open(other.client, &load_shape);
        if (status == ICE_OK)
            status = ice_append(kept, ICE_ALL_LAYERS, 0, LOAD_TOKENS_MAX, &source, 0, NULL);
        if (status == ICE_OK)
            ice_sequence_close(kept);
    }
    assert_refused(status, ICE_POOL_FULL, "the page pool is full");
    expect_log(daemon, "is switched off: Input/output error; pages that are only there are lost");
    assert_true(is_off(daemon));
    json_t *spill = spill_stats(daemon);
    assert_text(json_string_value(json_object_get(spill, "reason")), "Input/output error");
    json_decref(spill);
    worker_close(&other); // the pool has room again
    append(&worker, &history, 160, 320);
    expect_all(&worker, &history, 480);
    expect_no_disk(&worker, "has failed and is switched off");
    worker.sequence = sequence_open(worker.client, &load_shape);
    append(&worker, &history, 0, 480);
    expect_all(&worker, &history, 480);
    worker_close(&worker);
    history_destroy(&history);
}

// One sync that fails is one too many: no seal is answered any more, and after the next start none of it is there.
static void failed_sync(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    load_open(&worker, daemon);
    load_seal(&ledger, &worker, 0, 30);
    load_history(&history, 1);
    ice_sequence_close(worker.sequence);
    worker.sequence = sequence_open(worker.client, &load_shape);
    append(&worker, &history, 0, 480);
    atomic_store(&sick->sync_error, -EIO);
    for (int i = 0; i < 3; i++)
        assert_refused(seal(&worker, 1, 30), ICE_DISK_FAILED, "a sync of the daemon's spill file has failed");
    expect_log(daemon, "the spill file cannot be synced: Input/output error");
    assert_false(is_off(daemon));
    expect_all(&worker, &history, 480);
    assert_ok(attach(&worker, 0, 30));
    worker_close(&worker);
    load_check(&ledger, daemon);
    daemon_kill(daemon);
    daemon_start(daemon);
    load_check(&ledger, daemon);
    history_destroy(&history);
}

static void unremovable(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    load_open(&worker, daemon);
    load_seal(&ledger, &worker, 0, 30);
    load_seal(&ledger, &worker, 1, 30);
    const uint64_t id = ledger.seals[0].id;
    atomic_store(&sick->unlink_error, -EROFS);
    for (int i = 0; i < 2; i++)
        assert_refused(ice_prefix_remove_from(worker.client, "tests", id, 0), ICE_DISK_FAILED,
                       "may be back after a restart");
    assert_status(attach(&worker, 0, 30), ICE_UNKNOWN_PREFIX);
    worker_close(&worker);
    daemon_stop(daemon); // nothing leaks
    daemon_start(daemon);
    load_check(&ledger, daemon); // it is back
    atomic_store(&sick->unlink_error, 0);
    load_remove(&ledger, daemon, 1);
    load_check(&ledger, daemon);
}

// The file system cannot be read at the start: what is sealed there is not listed, and not thrown away.
static void unreadable_at_start(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    load_open(&worker, daemon);
    load_seal(&ledger, &worker, 0, 30);
    load_seal(&ledger, &worker, 1, 30);
    worker_close(&worker);
    daemon_stop(daemon);
    atomic_store(&sick->read_error, -EIO);
    daemon_start(daemon);
    expect_log(daemon, "cannot be read: Input/output error; it is left alone");
    atomic_store(&sick->read_error, 0);
    load_open(&worker, daemon);
    assert_status(attach(&worker, 0, 30), ICE_UNKNOWN_PREFIX);
    struct load_ledger others = {.count = 0};
    load_seal(&others, &worker, 2, 60); // not over what is there
    worker_close(&worker);
    daemon_stop(daemon);
    daemon_start(daemon);
    ledger.seals[ledger.count++] = others.seals[0];
    load_check(&ledger, daemon);
}

// ---- half transfers ----

static void cut_transfers(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    atomic_store(&sick->shortens, true);
    load_open(&worker, daemon);
    for (uint32_t document = 0; document < 5; document++)
        load_seal(&ledger, &worker, document, 60);
    worker_close(&worker);
    load_check(&ledger, daemon);
    daemon_kill(daemon);
    daemon_start(daemon);
    load_check(&ledger, daemon);
    assert_false(is_off(daemon));
}

// ---- the folder goes ----

static void folder_removed(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    char output[64];
    load_open(&worker, daemon);
    load_history(&history, 0);
    worker.sequence = sequence_open(worker.client, &load_shape);
    append(&worker, &history, 0, 320);
    const char *const remove[] = {"/bin/rm", "-rf", daemon->spill, NULL};
    assert_int_equal(child_run(remove, output, sizeof output), 0);
    assert_refused(seal(&worker, 0, 20), ICE_DISK_FAILED, "has failed and is switched off");
    expect_log(daemon, "is switched off: Stale file handle");
    assert_true(is_off(daemon));
    append(&worker, &history, 320, 160);
    expect_all(&worker, &history, 480);
    expect_no_disk(&worker, "has failed and is switched off");
    worker_close(&worker);
    history_destroy(&history);
}

// ---- a device that hangs ----

static uint64_t stop_and_wait(struct daemon *daemon, int exit_status)
{
    const uint64_t from = now_us();
    daemon_signal(daemon, SIGTERM);
    child_expect_exit(&daemon->child, exit_status);
    return now_us() - from;
}

// Of layer 1: sinks, window and `budget` others.
static void look_init(struct retrieve *retrieve, const struct worker *worker, const struct history *history,
                      uint32_t budget, uint64_t deadline_us)
{
    retrieve_init(retrieve, worker, history, 1, 959, 1);
    retrieve_ends(retrieve, budget, 16, 64);
    retrieve->options.deadline_us = deadline_us;
}

// A row is the daemon's until it has answered, also where the worker has stopped waiting.
static void look_until_whole(struct worker *worker, struct retrieve *retrieve)
{
    struct ice_retrieve_result result = {.partial = true};
    retrieve->options.deadline_us = TEST_DEADLINE_US;
    for (uint64_t until = now_us() + TEST_DEADLINE_US; result.partial;) {
        const ice_status status = ice_retrieve(worker->client, &retrieve->options, &result);
        assert_true((status == ICE_OK || status == ICE_BUSY) && now_us() < until);
    }
}

static void expect_part(struct worker *worker, const struct history *history, uint32_t most)
{
    struct ice_landing_view view;
    for (uint32_t head = 0; head < load_shape.kv_heads; head++) {
        assert_ok(ice_landing_view(worker->landing, 0, 1, head, &view));
        assert_true(view.count < most);
        for (uint32_t slot = 0; slot < view.count; slot++) {
            const size_t bytes = shape_row_bytes(&load_shape);
            const uint8_t *key = (const uint8_t *)view.keys + slot * bytes;
            const uint8_t *value = (const uint8_t *)view.values + slot * bytes;
            assert_memory_equal(key, history_key(history, 1, head, view.positions[slot]), bytes);
            assert_memory_equal(value, history_value(history, 1, head, view.positions[slot]), bytes);
        }
    }
}

// Retrieves answer what is in memory at their deadline, or that the tree is not; when the device comes back all is as
// before.
static void hangs_for_a_while(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    load_open(&worker, daemon);
    load_history(&history, 0);
    load_seal(&ledger, &worker, 0, 60);
    for (int awake = 0; awake < 2; awake++) {
        assert_ok(attach(&worker, 0, 60));
        if (awake) {
            look_init(&retrieve, &worker, &history, 1, TEST_DEADLINE_US);
            look_until_whole(&worker, &retrieve); // brings the tree and some pages
            retrieve_fini(&retrieve);
        }
        atomic_store(&sick->hangs, true);
        look_init(&retrieve, &worker, &history, 170, 300000);
        const uint64_t from = now_us();
        const ice_status status = ice_retrieve(worker.client, &retrieve.options, &result);
        assert_true(now_us() - from < 2000000);
        assert_status(status, awake ? ICE_OK : ICE_TIMEOUT);
        if (awake) {
            assert_true(result.partial);
            expect_part(&worker, &history, 250);
        }
        atomic_store(&sick->hangs, false);
        look_until_whole(&worker, &retrieve);
        landing_check(worker.landing, 0, 1, &history, 250, 960);
        retrieve_fini(&retrieve);
        expect_all(&worker, &history, 960);
    }
    worker_close(&worker);
    load_check(&ledger, daemon);
    history_destroy(&history);
}

// The end comes also where reads, writes and a sealing never will be answered.
static void hangs_at_the_end(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker, sealing;
    struct history history;
    struct retrieve retrieve;
    load_open(&worker, daemon);
    load_history(&history, 0);
    load_seal(&ledger, &worker, 0, 60);
    load_open(&sealing, daemon);
    sealing.sequence = sequence_open(sealing.client, &load_shape);
    append(&sealing, &history, 0, 320);
    atomic_store(&sick->hangs, true); // before the attach, which lets the lanes wake
    assert_ok(attach(&worker, 0, 60));
    retrieve_init(&retrieve, &worker, &history, 1, 959, 1);
    retrieve_ends(&retrieve, 100, 16, 64);
    retrieve.options.deadline_us = 200000;
    assert_status(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_TIMEOUT);
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    load_hashes(1, hashes);
    assert_status(ice_sequence_seal(sealing.sequence, hashes, 20, 300000, NULL), ICE_TIMEOUT);
    // --drain-ms, then what the device gets to answer, twice at most.
    assert_true(stop_and_wait(daemon, 1) < 5000000);
    expect_log(daemon, "the disk does not answer; leaving");
    atomic_store(&sick->hangs, false);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    worker_close(&sealing);
    daemon_start(daemon);
    load_check(&ledger, daemon);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        SICK_TEST(one_bad_place),       SICK_TEST(some_writes_fail), SICK_TEST(dead),
        SICK_TEST(failed_sync),         SICK_TEST(unremovable),      SICK_TEST(cut_transfers),
        SICK_TEST(unreadable_at_start), SICK_TEST(folder_removed),   SICK_TEST(hangs_for_a_while),
        SICK_TEST(hangs_at_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
