// Equal tokens, equal trees, equal selections: in two workers at once, in a new daemon, with any cut of the appends.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PREFILL = 1500, STEPS = 200, SLOTS = 512 }; // STEPS: at most
static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

// ---- the worker ----

// Appends 0 .. PREFILL-1 in cuts: by layer or all at once, of one size or of random ones.
static void append_in_cuts(struct worker *worker, const struct history *history, uint64_t cut_seed)
{
    uint64_t state = cut_seed;
    for (uint64_t first = 0; first < PREFILL;) {
        uint64_t n = cut_seed == 0 ? PREFILL : cut_seed == 1 ? 1 : 1 + random_below(&state, 300);
        n = n < PREFILL - first ? n : PREFILL - first;
        for (uint32_t layer = 0; cut_seed % 2 == 1 && layer < shape.layers; layer++) {
            const struct ice_kv_source source = history_source(history, layer, first);
            assert_ok(ice_append(worker->sequence, layer, first, n, &source, 0, NULL));
        }
        if (cut_seed % 2 == 0)
            worker_append(worker, history, first, n);
        first += n;
    }
}

// The selection of one retrieve and what is said about it.
static uint64_t retrieve_once(struct worker *worker, struct retrieve *retrieve, uint64_t digest)
{
    struct ice_retrieve_result result;
    assert_ok(ice_retrieve(worker->client, &retrieve->options, &result));
    assert_false(result.partial);
    digest = bytes_digest(digest, result.counts, result.head_count * sizeof *result.counts);
    digest = bytes_digest(digest, result.masses, result.head_count * sizeof *result.masses);
    digest = bytes_digest(digest, result.indexed, result.head_count * sizeof *result.indexed);
    digest = bytes_digest(digest, result.versions, result.head_count * sizeof *result.versions);
    uint64_t landing = landing_digest(worker->landing, 0, retrieve->options.layer, &shape);
    return bytes_digest(digest, &landing, sizeof landing);
}

static uint64_t retrieve_many(struct worker *worker, const struct history *history, uint64_t length, uint64_t digest)
{
    for (uint64_t i = 0; i < 40; i++) {
        struct retrieve retrieve;
        retrieve_init(&retrieve, worker, history, (uint32_t)i % shape.layers, length - 1 - i * 7, i % 3 == 2 ? 4 : 1);
        retrieve_ends(&retrieve, i % 2 ? 64 : 256, i % 5 ? 16 : 0, i % 4 ? 64 : 0);
        retrieve.options.granularity = i % 7 == 3 ? ICE_PAGE_WISE : ICE_TOKEN_WISE;
        retrieve.options.coverage = i % 11 == 5 ? 0.8f : 0;
        digest = retrieve_once(worker, &retrieve, digest);
        retrieve_fini(&retrieve);
    }
    return digest;
}

// Decode steps; selections are compared where the clustering has caught up.
static uint64_t decode(struct worker *worker, const struct history *history, uint64_t digest)
{
    const uint64_t length = PREFILL + scaled_rounds(STEPS, STEPS);
    for (uint64_t position = PREFILL; position < length; position++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, worker, history, layer, position, 1);
            retrieve_ends(&retrieve, 64, 16, 64);
            retrieve_ride(&retrieve, history);
            assert_ok(ice_retrieve(worker->client, &retrieve.options, NULL));
            retrieve_fini(&retrieve);
        }
        if (position % 50 == 0) {
            worker_wait_idle(worker);
            digest = retrieve_many(worker, history, position + 1, digest);
        }
    }
    worker_wait_idle(worker);
    return retrieve_many(worker, history, length, digest);
}

// select SOCKETS SEED CUT_SEED: prints the digest of all that was selected.
static int run_select(int argc, char **argv)
{
    assert_int_equal(argc, 4);
    struct history history;
    struct worker worker;
    history_create(&history, &shape, PREFILL + STEPS, strtoull(argv[2], NULL, 10));
    worker_open(&worker, argv[1], &shape, 1, SLOTS);
    append_in_cuts(&worker, &history, strtoull(argv[3], NULL, 10));
    worker_wait_idle(&worker);
    uint64_t digest = retrieve_many(&worker, &history, PREFILL, 0);
    digest = decode(&worker, &history, digest);
    printf("%016llx\n", (unsigned long long)digest);
    fflush(stdout);
    worker_close(&worker);
    history_destroy(&history);
    return 0;
}

// ---- the tests ----

static void select_start(struct child *child, const struct daemon *daemon, const char *seed, const char *cut_seed)
{
    const char *arguments[] = {"select", daemon->sockets, seed, cut_seed, NULL};
    child_start_role(child, arguments);
}

static uint64_t select_finish(struct child *child)
{
    char line[64];
    assert_true(child_read_line(child, line, sizeof line));
    child_expect_exit(child, 0);
    return strtoull(line, NULL, 16);
}

static uint64_t select_run(const struct daemon *daemon, const char *seed, const char *cut_seed)
{
    struct child child;
    select_start(&child, daemon, seed, cut_seed);
    return select_finish(&child);
}

static void two_workers_agree(void **state)
{
    const struct daemon *daemon = *state;
    struct child a, b;
    select_start(&a, daemon, "5", "0");
    select_start(&b, daemon, "5", "0");
    uint64_t digest_a = select_finish(&a), digest_b = select_finish(&b);
    assert_int_equal(digest_a, digest_b);
    assert_int_not_equal(select_run(daemon, "6", "0"), digest_a); // the digest sees other keys
}

static void any_cut_gives_the_same_tree(void **state)
{
    const struct daemon *daemon = *state;
    uint64_t digest = select_run(daemon, "5", "0");
    static const char *const cuts[] = {"1", "2", "3", "4"};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++)
        assert_int_equal(select_run(daemon, "5", cuts[i]), digest);
}

static void a_new_daemon_gives_the_same_tree(void **state)
{
    struct daemon *daemon = *state;
    uint64_t digest = select_run(daemon, "5", "0");
    daemon_stop(daemon);
    daemon_start(daemon);
    assert_int_equal(select_run(daemon, "5", "0"), digest);
    daemon_kill(daemon);
    // Neither the number of threads nor the sizes of the shares count.
    static const char *const options[] = {
        "--pool-bytes", "128m", "--index-bytes", "128m", "--shared-bytes", "64m", "--shards", "3", NULL};
    daemon->options = options;
    daemon_start(daemon);
    assert_int_equal(select_run(daemon, "5", "3"), digest);
}

// A budget below everything, nothing indexed: hardly less than the mass of the exact best (8-bit codes rank the tail).
static void unindexed_selection_is_nearly_exact(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    const uint64_t length = 250;
    double masses[250];
    uint32_t best[64];
    history_create(&history, &shape, length, 31);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, length);
    for (uint32_t i = 0; i < 20; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        uint32_t queries = i % 4 == 3 ? 3 : 1;
        uint64_t first = length - 3 - i;
        retrieve_init(&retrieve, &worker, &history, i % 2, first, queries);
        retrieve_ends(&retrieve, 24, 16, 64);
        retrieve.options.resend = true; // in order
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            struct ice_landing_view view;
            double kept = 0, chosen = 0, possible = 0;
            attention_masses(&history, i % 2, head, retrieve.queries, first, queries, masses);
            uint64_t visible = first + queries;
            assert_int_equal(masses_best(masses, 16, visible - 64, 24, best), 24);
            assert_ok(ice_landing_view(worker.landing, 0, i % 2, head, &view));
            assert_int_equal(view.count, 16 + 24 + 64);
            for (uint32_t slot = 0; slot < 24; slot++) {
                chosen += masses[view.positions[16 + slot]];
                possible += masses[best[slot]];
            }
            assert_true(chosen >= 0.995 * possible);
            for (uint32_t slot = 0; slot < view.count; slot++)
                kept += masses[view.positions[slot]];
            assert_float_equal(result.masses[head], (float)kept, 1e-3f);
        }
        retrieve_fini(&retrieve);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// After clustering: nearly the mass of the exact best (codes rank the tokens), and an honest estimate of it.
static void indexed_selection_is_near(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    const uint64_t length = 3000;
    double *masses = malloc(length * sizeof *masses), found = 0, possible = 0, estimated = 0;
    uint32_t best[64];
    assert_non_null(masses);
    history_create(&history, &shape, length, 37);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, length);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 20; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        uint64_t first = length - 1 - i;
        retrieve_init(&retrieve, &worker, &history, i % 2, first, 1);
        retrieve_ends(&retrieve, 64, 0, 0);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        assert_true(result.indexed[0] > length - 128);
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            struct ice_landing_view view;
            attention_masses(&history, i % 2, head, retrieve.queries, first, 1, masses);
            assert_ok(ice_landing_view(worker.landing, 0, i % 2, head, &view));
            assert_int_equal(view.count, 64);
            for (uint32_t slot = 0; slot < 64; slot++)
                found += masses[view.positions[slot]];
            (void)masses_best(masses, 0, first + 1, 64, best);
            for (uint32_t slot = 0; slot < 64; slot++)
                possible += masses[best[slot]];
            estimated += (double)result.masses[head];
        }
        landing_check(worker.landing, 0, i % 2, &history, 64, first + 1);
        retrieve_fini(&retrieve);
    }
    print_message("mass of the selection %.3f of the exact best's, estimated %.3f of what it is\n", found / possible,
                  estimated / found);
    assert_true(found >= 0.98 * possible);
    assert_true(estimated > 0.7 * found && estimated < 1.3 * found);
    worker_close(&worker);
    history_destroy(&history);
    free(masses);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{"select", run_select}};
    int status;
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &status))
        return status;
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(two_workers_agree),
        DAEMON_TEST(any_cut_gives_the_same_tree),
        DAEMON_TEST(a_new_daemon_gives_the_same_tree),
        DAEMON_TEST(unindexed_selection_is_nearly_exact),
        DAEMON_TEST(indexed_selection_is_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
