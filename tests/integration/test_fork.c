// Forks, truncations and shared prefixes: what they cost, how deep they go, what is refused. What they hold is
// test_model.c's.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

static const char *const large[] = {
    "--pool-bytes", "512m", "--index-bytes", "256m", "--shared-bytes", "64m", "--shards", "2", NULL};
static const char *const with_disk[] = {DAEMON_WITH_DISK("64m", "256m"), NULL};

enum { FORKS = 100, DEPTH = 63 }; // of forks where each was appended to

static ice_sequence *fork_of(ice_sequence *parent, uint64_t tokens)
{
    ice_sequence *child = NULL;
    assert_ok(ice_sequence_fork(parent, tokens, 0, &child));
    return child;
}

static uint64_t bytes_held(const struct stats_held *held)
{
    return held->pool_bytes + held->index_bytes;
}

static int by_size(const void *a, const void *b)
{
    const uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static void append_to_all(struct worker *worker, ice_sequence *const *forks, const struct history *history,
                          uint64_t first, uint64_t n)
{
    ice_sequence *own = worker->sequence;
    for (uint32_t i = 0; i < FORKS; i++) {
        worker->sequence = forks[i];
        worker_append(worker, history, first, n);
    }
    worker->sequence = own;
}

// 100 forks of a prefix of 128k tokens may cost 1 % of it. A fork's cost does not depend on the prefix, so that a
// shorter one is held against as much of a longer one.
static void cost(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    struct stats_held before, at_fork, one, hundred, nothing;
    ice_sequence *forks[FORKS];
    uint64_t us[FORKS];
    const uint64_t tokens = scaled_count(8192, 131072);
    stats_held(daemon, &nothing);
    history_create(&history, &shape, tokens + 200, 7);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, &history, 0, tokens);
    worker_wait_idle(&worker);
    stats_held(daemon, &before);
    for (uint32_t i = 0; i < FORKS; i++) {
        us[i] = now_us();
        forks[i] = fork_of(worker.sequence, ICE_ALL_TOKENS);
        us[i] = now_us() - us[i];
    }
    stats_held(daemon, &at_fork);
    append_to_all(&worker, forks, &history, tokens, 1);
    stats_held(daemon, &one);
    append_to_all(&worker, forks, &history, tokens + 1, 99);
    stats_held(daemon, &hundred);
    const double prefix = (double)(bytes_held(&before) - nothing.index_bytes), share = (double)tokens / 131072;
    qsort(us, FORKS, sizeof *us, by_size);
    print_message(
        "%llu tokens, %.1f MB; 100 forks %.3f %% of 128k tokens, with 1 token each %.2f %%, with 100 %.2f %%; "
        "a fork takes %llu us (median, with its round trip)\n",
        (unsigned long long)tokens, prefix / 1e6,
        100 * share * (double)(bytes_held(&at_fork) - bytes_held(&before)) / prefix,
        100 * share * (double)(bytes_held(&one) - bytes_held(&before)) / prefix,
        100 * share * (double)(bytes_held(&hundred) - bytes_held(&before)) / prefix, (unsigned long long)us[FORKS / 2]);
    assert_int_equal(at_fork.pool_bytes, before.pool_bytes);
    assert_true((double)(bytes_held(&at_fork) - bytes_held(&before)) * share <= prefix / 100);
    for (uint32_t i = 0; i < FORKS; i++)
        ice_sequence_close(forks[i]);
    worker_check_content(&worker, &history, 0, tokens);
    worker_close(&worker);
    stats_wait(daemon, &nothing, TEST_DEADLINE_US);
    history_destroy(&history);
}

// A fork of a fork, and so on, each with tokens of its own; selections go through all of it.
static void depth(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    struct stats_held before;
    ice_sequence *line[DEPTH + 1];
    const uint64_t step = 40, length = (DEPTH + 1) * step;
    stats_held(daemon, &before);
    history_create(&history, &shape, length, 8);
    worker_open(&worker, daemon->sockets, &shape, 1, (uint32_t)length);
    for (uint32_t i = 0; i <= DEPTH; i++) {
        worker_append(&worker, &history, i * step, step);
        line[i] = worker.sequence;
        if (i < DEPTH)
            worker.sequence = fork_of(worker.sequence, ICE_ALL_TOKENS);
    }
    ice_sequence *one_more = NULL;
    assert_refused(ice_sequence_fork(worker.sequence, ICE_ALL_TOKENS, 0, &one_more), ICE_LIMIT, "chain of 64");
    for (uint32_t i = 0; i < DEPTH; i += 2)
        ice_sequence_close(line[i]);
    struct ice_sequence_info info;
    sequence_wait_idle(worker.sequence, &info);
    worker_check_content(&worker, &history, 0, length);
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 1, length - 1, 1);
    retrieve_ends(&retrieve, (uint32_t)length - 80, 16, 64);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 1, &history, length);
    retrieve_ends(&retrieve, 100, 16, 64);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(worker.landing, 0, 1, &history, 180, length);
    retrieve_fini(&retrieve);
    // Cut below its own tokens, the chain is shorter, and it can be forked again.
    assert_ok(ice_sequence_truncate(worker.sequence, 3 * step + 5, 0));
    worker_check_content(&worker, &history, 0, 3 * step + 5);
    worker_append(&worker, &history, 3 * step + 5, 700);
    one_more = fork_of(worker.sequence, ICE_ALL_TOKENS);
    ice_sequence_close(one_more);
    for (uint32_t i = 1; i < DEPTH; i += 2)
        ice_sequence_close(line[i]);
    worker_close(&worker);
    stats_wait(daemon, &before, TEST_DEADLINE_US);
    history_destroy(&history);
}

static void refused(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    ice_sequence *child = NULL;
    history_create(&history, &shape, 400, 9);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    child = fork_of(worker.sequence, ICE_ALL_TOKENS); // of nothing
    ice_sequence_close(child);
    worker_append(&worker, &history, 0, 200);
    assert_refused(ice_sequence_fork(worker.sequence, 201, 0, &child), ICE_OUT_OF_BOUNDS, "shortest layer has 200");
    assert_refused(ice_sequence_truncate(worker.sequence, 201, 0), ICE_OUT_OF_BOUNDS, "longest layer has 200");
    assert_status(ice_sequence_fork(NULL, 0, 0, &child), ICE_INVALID_ARGUMENT);
    assert_status(ice_sequence_fork(worker.sequence, 0, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_status(ice_sequence_truncate(NULL, 0, 0), ICE_INVALID_ARGUMENT);
    // In the middle of a step there is nothing that all layers have behind the shared tokens.
    const struct ice_kv_source source = history_source(&history, 0, 200);
    assert_ok(ice_append(worker.sequence, 0, 200, 1, &source, 0, NULL));
    assert_refused(ice_sequence_fork(worker.sequence, 200, 0, &child), ICE_CONFLICT, "not equally long");
    assert_ok(ice_sequence_truncate(worker.sequence, 200, 0));
    child = fork_of(worker.sequence, 200);
    ice_sequence_close(worker.sequence);
    worker.sequence = child;
    worker_check_content(&worker, &history, 0, 200);
    worker_close(&worker);
    history_destroy(&history);
}

// A landing's row that holds tokens which have been truncated takes nothing of them over.
static void no_stale_slots(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct history old, fresh;
    struct retrieve retrieve;
    history_create(&old, &shape, 900, 10);
    history_create(&fresh, &shape, 900, 11);
    for (uint32_t layer = 0; layer < shape.layers; layer++) { // alike up to 600
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            const size_t bytes = 600 * shape_row_bytes(&shape);
            memcpy(history_key(&fresh, layer, head, 0), history_key(&old, layer, head, 0), bytes);
            memcpy(history_value(&fresh, layer, head, 0), history_value(&old, layer, head, 0), bytes);
        }
    }
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, &old, 0, 900);
    retrieve_init(&retrieve, &worker, &old, 1, 899, 1);
    retrieve_ends(&retrieve, 300, 16, 64);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(worker.landing, 0, 1, &old, 380, 900);
    ice_sequence *child = fork_of(worker.sequence, ICE_ALL_TOKENS);
    assert_ok(ice_sequence_truncate(worker.sequence, 600, 0)); // a cut of the chain: it has been forked
    for (uint32_t again = 0; again < 2; again++) {             // then of its own tokens
        worker_append(&worker, &fresh, 600, 300);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        landing_check(worker.landing, 0, 1, &fresh, 380, 900);
        assert_ok(ice_sequence_truncate(worker.sequence, 600, 0));
    }
    ice_sequence_close(worker.sequence);
    worker.sequence = child;
    worker_check_content(&worker, &old, 0, 900);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&old);
    history_destroy(&fresh);
}

// Who is attached to the same prefix shares its pages and its tree, also with whoever has sealed it.
static void equal_prompts(void **state)
{
    struct daemon *daemon = *state;
    enum { BLOCKS = 125, TOKENS = BLOCKS * 16, ATTACHED = 5 };
    static uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    static uint32_t tokens[TOKENS];
    struct worker worker;
    struct history history;
    struct stats_held before, one, all;
    const struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *attached[ATTACHED];
    for (uint32_t i = 0; i < TOKENS; i++)
        tokens[i] = i;
    assert_ok(ice_block_hashes(tokens, TOKENS, 16, NULL, 0, hashes));
    stats_held(daemon, &before);
    history_create(&history, &shape, TOKENS, 12);
    worker_open(&worker, daemon->sockets, &shape, 1, 512);
    worker_append(&worker, &history, 0, TOKENS);
    worker_wait_idle(&worker);
    assert_ok(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, NULL));
    for (int again = 0; again < 2; again++) { // with the one that sealed it, and without
        stats_held(daemon, &one);
        for (uint32_t i = 0; i < ATTACHED; i++) {
            ice_sequence *own = worker.sequence;
            assert_ok(ice_sequence_attach(worker.client, &options, hashes, BLOCKS, 0, 0, &attached[i], NULL));
            worker.sequence = attached[i];
            worker_check_content(&worker, &history, 0, TOKENS);
            worker.sequence = own;
        }
        stats_held(daemon, &all);
        if (again == 0) {
            assert_int_equal(all.pages, one.pages);
            assert_true(all.index_bytes - one.index_bytes < (one.index_bytes - before.index_bytes) / 4);
            ice_sequence_close(worker.sequence);
            worker.sequence = attached[0];
            for (uint32_t i = 1; i < ATTACHED; i++)
                ice_sequence_close(attached[i]);
        } else {
            assert_int_equal(all.pages, one.pages);
            for (uint32_t i = 0; i < ATTACHED; i++)
                ice_sequence_close(attached[i]);
        }
    }
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(cost, large),
        DAEMON_TEST_WITH(depth, large),
        DAEMON_TEST_WITH(refused, large),
        DAEMON_TEST_WITH(no_stale_slots, large),
        DAEMON_TEST_WITH(equal_prompts, with_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
