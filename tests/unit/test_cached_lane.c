// One lane with a real tree and a real pool, and nothing else of the daemon: what is appended is read back bit for bit
// through clustering, what fails leaves nothing behind, and an append's promise covers what it takes.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/server.h"
#include "proto/dtype.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS_MAX 20480u

struct bench {
    struct env env;
    struct config config;
    struct server server;
    struct shard shard;
    struct stem stem;
    struct lane lane;
    uint8_t *keys, *values, *out;
};

static void bench_init(struct bench *bench, uint32_t head_dim, uint32_t dtype, uint64_t page_tokens,
                       uint64_t index_bytes)
{
    *bench = (struct bench){.config = {.page_tokens = page_tokens, .seed = 1}};
    env_linux_init(&bench->env);
    bench->server.env = &bench->env;
    bench->server.config = &bench->config;
    budget_init(&bench->server.index_budget, index_bytes);
    struct pool_regions regions;
    const struct pool_wish wish = {.capacity_bytes = 96u << 20, .rungs = ENV_RUNGS_ALL};
    assert_int_equal(pool_regions_map(&bench->env, &wish, &regions), 0);
    assert_int_equal(pool_create(&bench->env, &regions, &bench->server.pool), 0);
    bench->shard.server = &bench->server;
    bench->server.shards = &bench->shard;
    assert_int_equal(tier_init(&bench->shard), 0);
    arena_init(&bench->shard.arena, &bench->env);
    struct stem *stem = &bench->stem;
    stem->server = &bench->server;
    stem->shape = (struct wire_shape){1, 1, 1, head_dim, dtype};
    stem->row_bytes = head_dim * dtype_bytes((enum dtype)dtype);
    stem->frame_bytes = page_tokens * 2 * stem->row_bytes;
    bench->lane.stem = stem;
    size_t bytes = TOKENS_MAX * stem->row_bytes;
    bench->keys = malloc(bytes);
    bench->values = malloc(bytes);
    bench->out = malloc(2 * bytes);
    assert_true(bench->keys && bench->values && bench->out);
    uint64_t x = head_dim;
    for (size_t i = 0; i < bytes / 2; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        uint16_t value = (uint16_t)(x >> 48), key = (uint16_t)(value & 0x8fffu); // small enough in every dtype
        memcpy(bench->values + 2 * i, &value, 2);
        memcpy(bench->keys + 2 * i, &key, 2);
    }
}

static uint64_t frames(struct bench *bench)
{
    struct pool_usage usage;
    pool_usage(bench->server.pool, &usage);
    assert_int_equal(usage.used_frames, atomic_load(&bench->stem.page_count));
    return usage.used_frames;
}

// Everything of the lane is given back.
static void bench_fini(struct bench *bench)
{
    shard_lane_forget(&bench->shard, &bench->lane);
    lane_destroy(&bench->lane, &bench->shard);
    pool_unreserve(bench->server.pool, &bench->stem.frames_promised, bench->stem.frame_bytes);
    budget_unreserve(&bench->server.index_budget, &bench->stem.index_promised);
    assert_int_equal(frames(bench), 0);
    assert_int_equal(budget_used(&bench->server.index_budget), 0);
    assert_int_equal(atomic_load(&bench->stem.index_bytes), 0);
    bench->env.release(&bench->env, bench->shard.places, bench->shard.places_bytes);
    tier_fini(&bench->shard);
    arena_fini(&bench->shard.arena);
    pool_destroy(bench->server.pool);
    budget_fini(&bench->server.index_budget);
    free(bench->keys);
    free(bench->values);
    free(bench->out);
}

static ice_status prepare(struct bench *bench, uint64_t first, uint32_t tokens)
{
    size_t row = bench->stem.row_bytes;
    struct lane_input input = {bench->keys + first * row, bench->values + first * row, row, first, tokens, 0};
    ice_status status;
    uint32_t slices = 0;
    do { // each but the last has stored or compared a whole slice
        status = lane_prepare(&bench->lane, &bench->shard, &input);
        slices++;
    } while (status == LANE_CUT);
    assert_true(slices <= 1 + 2 * tokens / (SERVER_APPEND_SLICE_BYTES / (uint32_t)(2 * row)));
    return status;
}

static void append(struct bench *bench, uint64_t first, uint32_t tokens)
{
    assert_int_equal(prepare(bench, first, tokens), ICE_OK);
    lane_commit(&bench->lane, &bench->shard);
}

static void expect_content(struct bench *bench, uint32_t tokens)
{
    size_t bytes = tokens * bench->stem.row_bytes;
    assert_int_equal(lane_length(&bench->lane), tokens);
    lane_read(&bench->lane, 0, tokens, bench->out, bench->out + bytes);
    assert_memory_equal(bench->out, bench->keys, bytes);
    assert_memory_equal(bench->out + bytes, bench->values, bytes);
}

static void build_all(struct bench *bench)
{
    enum lane_work work;
    while ((work = lane_build(&bench->lane, &bench->shard)) == LANE_MORE)
        ;
    assert_int_equal(work, LANE_IDLE);
    char text[256] = "";
    if (!index_check(bench->lane.index, text, sizeof text))
        fail_msg("%s", text);
}

static void test_append(void **state)
{
    (void)state;
    static struct bench bench;
    bench_init(&bench, 64, DTYPE_BF16, 16, 64u << 20);
    assert_int_equal(prepare(&bench, 1, 1), ICE_POSITION_GAP);
    append(&bench, 0, 100);
    append(&bench, 100, 1);
    append(&bench, 0, 101);  // again: no effect
    append(&bench, 50, 100); // overlaps
    expect_content(&bench, 150);
    uint64_t held = frames(&bench);
    assert_int_equal(held, 10);
    bench.keys[120 * bench.stem.row_bytes] ^= 1;
    assert_int_equal(prepare(&bench, 50, 200), ICE_CONFLICT);
    bench.keys[120 * bench.stem.row_bytes] ^= 1;
    bench.values[149 * bench.stem.row_bytes + 5] ^= 1;
    assert_int_equal(prepare(&bench, 149, 1), ICE_CONFLICT);
    bench.values[149 * bench.stem.row_bytes + 5] ^= 1;
    uint16_t bad = 0x7f80, good; // infinity
    memcpy(&good, bench.keys + 180 * bench.stem.row_bytes, 2);
    memcpy(bench.keys + 180 * bench.stem.row_bytes, &bad, 2);
    assert_int_equal(prepare(&bench, 150, 100), ICE_NOT_FINITE);
    memcpy(bench.keys + 180 * bench.stem.row_bytes, &good, 2);
    assert_int_equal(frames(&bench), held);
    assert_int_equal(prepare(&bench, 150, 100), ICE_OK);
    assert_true(frames(&bench) > held);
    lane_drop(&bench.lane, &bench.shard);
    assert_int_equal(frames(&bench), held);
    append(&bench, 150, 100);
    expect_content(&bench, 250);
    bench_fini(&bench);
}

// Appends between the slices of the clustering, prepared ones left open over slices, committed or dropped.
static void test_clustering(void **state)
{
    (void)state;
    static const uint32_t pages[] = {1, 7, 16, 256};
    for (unsigned p = 0; p < sizeof pages / sizeof *pages; p++) {
        static struct bench bench;
        bench_init(&bench, 32, DTYPE_FP16, pages[p], 64u << 20);
        uint64_t random = 12345;
        uint32_t length = 0;
        while (length < 6000) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            uint32_t tokens = 1 + (uint32_t)(random >> 40) % ((random >> 33) % 4 == 0 ? 900 : 40);
            uint32_t slices = (uint32_t)(random >> 20) % 6;
            assert_int_equal(prepare(&bench, length, tokens), ICE_OK);
            for (uint32_t i = 0; i < slices; i++)
                assert_int_not_equal(lane_build(&bench.lane, &bench.shard), LANE_STALLED);
            if (random >> 62 == 0) {
                lane_drop(&bench.lane, &bench.shard);
            } else {
                lane_commit(&bench.lane, &bench.shard);
                length += tokens;
            }
            if (random >> 60 == 5)
                expect_content(&bench, length);
        }
        build_all(&bench);
        expect_content(&bench, length);
        assert_int_equal(atomic_load(&bench.lane.indexed), index_indexed(bench.lane.index));
        assert_true(index_indexed(bench.lane.index) + 64 + 256 > length); // the newest tokens and less than a batch
        bench_fini(&bench);
    }
}

// The pool runs full in an append and in a clustering: nothing is lost, and it goes on when there is room.
static void test_pool_full(void **state)
{
    (void)state;
    static struct bench bench;
    bench_init(&bench, 64, DTYPE_FP32, 16, 64u << 20);
    struct pool_reservation all = {0};
    append(&bench, 0, 2000);
    uint64_t slab_frames = POOL_SLAB_BYTES / bench.stem.frame_bytes, free_frames = 48 * slab_frames - 125;
    assert_true(pool_reserve(bench.server.pool, &all, bench.stem.frame_bytes, free_frames));
    assert_int_equal(prepare(&bench, 2000, 100), ICE_POOL_FULL);
    assert_int_equal(frames(&bench), 125);
    enum lane_work work;
    while ((work = lane_build(&bench.lane, &bench.shard)) == LANE_MORE)
        ;
    assert_int_equal(work, LANE_STALLED);
    assert_int_equal(frames(&bench), 125);
    expect_content(&bench, 2000);
    pool_unreserve(bench.server.pool, &all, bench.stem.frame_bytes);
    build_all(&bench);
    expect_content(&bench, 2000);
    append(&bench, 2000, 100);
    expect_content(&bench, 2100);
    bench_fini(&bench);
}

// Takes all that is neither in use nor promised, or gives it back.
static uint64_t fill(struct bench *bench)
{
    struct budget *budget = &bench->server.index_budget;
    uint64_t free_bytes = budget->cap_bytes - budget->used_bytes - budget->promised_bytes;
    assert_true(budget_take(budget, NULL, free_bytes));
    return free_bytes;
}

struct promise {
    uint32_t head_dim, dtype, page_tokens;
    uint32_t before;       // tokens that are there already
    uint32_t tokens, part; // the append, in parts of this size
    bool builds;           // clustering goes on between the parts
};

// With nothing but its promise left in the budgets, an append of any length goes through, in parts of any size.
static void promise_holds(const struct promise *promise)
{
    static struct bench bench;
    const uint32_t before = promise->before, end = before + promise->tokens;
    bench_init(&bench, promise->head_dim, promise->dtype, promise->page_tokens, 256u << 20);
    struct stem *stem = &bench.stem;
    if (before > 0) {
        append(&bench, 0, before);
        build_all(&bench);
    }
    uint64_t bytes = lane_promise_bytes(stem, before, promise->tokens);
    assert_true(budget_reserve(&bench.server.index_budget, &stem->index_promised, bytes));
    assert_true(pool_reserve(bench.server.pool, &stem->frames_promised, stem->frame_bytes,
                             lane_promise_pages(stem, promise->tokens)));
    uint64_t filled = fill(&bench);
    for (uint32_t first = before; first < end; first += promise->part) {
        uint32_t n = end - first < promise->part ? end - first : promise->part;
        ice_status status = prepare(&bench, first, n);
        if (status != ICE_OK)
            fail_msg("head_dim %u, %s, pages of %u: %s at %u of %u tokens", promise->head_dim,
                     dtype_name((enum dtype)promise->dtype), promise->page_tokens, status_name((int)status), first,
                     end);
        lane_commit(&bench.lane, &bench.shard);
        if (promise->builds) {
            budget_give(&bench.server.index_budget, filled);
            build_all(&bench);
            filled = fill(&bench);
        }
    }
    budget_give(&bench.server.index_budget, filled);
    expect_content(&bench, end);
    bench_fini(&bench);
}

static void test_promise(void **state)
{
    (void)state;
    static const uint32_t pages[] = {1, 16, 100, 256};
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    const uint32_t dim_step = 240, page_step = 3; // the corners
#else
    const uint32_t dim_step = 80, page_step = 1;
#endif
    for (uint32_t head_dim = 16; head_dim <= 256; head_dim += dim_step)
        for (uint32_t dtype = DTYPE_BF16; dtype <= DTYPE_FP32; dtype++)
            for (unsigned p = 0; p < 4; p += page_step) {
                promise_holds(&(struct promise){head_dim, dtype, pages[p], 0, 20000, 1000, false});
                promise_holds(&(struct promise){head_dim, dtype, pages[p], 0, 700, 33, false});
                promise_holds(&(struct promise){head_dim, dtype, pages[p], 0, 2, 1, false});
            }
    for (unsigned p = 0; p < 4; p += page_step) {
        promise_holds(&(struct promise){16, DTYPE_BF16, pages[p], 0, 6000, 20, true});
        promise_holds(&(struct promise){16, DTYPE_BF16, pages[p], 0, 20000, 2500, true});
        promise_holds(&(struct promise){16, DTYPE_BF16, pages[p], 5000, 300, 30, true});
        promise_holds(&(struct promise){16, DTYPE_BF16, pages[p], 8190, 12000, 1000, false});
        promise_holds(&(struct promise){16, DTYPE_BF16, pages[p], 8191, 2, 1, false});
    }
}

// A plan that is ready waits for searches that are cut, and for nothing else: not for selections that wait for pages.
static void test_commit_waits_for_cuts(void **state)
{
    (void)state;
    static struct bench bench;
    enum lane_work work;
    bench_init(&bench, 64, DTYPE_BF16, 16, 64u << 20);
    append(&bench, 0, 2000);
    bench.lane.cuts = bench.lane.gathers = 1;
    while ((work = lane_build(&bench.lane, &bench.shard)) == LANE_MORE)
        assert_true(bench.lane.commit_since_ns == 0);
    assert_int_equal(work, LANE_FETCHES);
    assert_true(bench.lane.commit_since_ns != 0);
    assert_int_equal(atomic_load(&bench.lane.indexed), 0);
    assert_int_equal(lane_build(&bench.lane, &bench.shard), LANE_FETCHES);
    expect_content(&bench, 2000);
    bench.lane.cuts = 0;
    bench.shard.woken = false;
    assert_int_equal(lane_build(&bench.lane, &bench.shard), LANE_MORE);
    assert_true(bench.lane.commit_since_ns == 0 && atomic_load(&bench.lane.indexed) > 0);
    assert_true(bench.shard.woken); // the selection that waits looks again where its tokens lie
    bench.lane.gathers = 0;
    build_all(&bench);
    expect_content(&bench, 2000);
    bench_fini(&bench);
}

// What a truncation has room for is what there is when it is prepared: clustering rests until it is carried out.
static void test_truncation_and_clustering(void **state)
{
    (void)state;
    static struct bench bench;
    for (uint32_t tokens = 330; tokens < 420; tokens += 3) {
        bench_init(&bench, 64, DTYPE_BF16, 16, 64u << 20);
        append(&bench, 0, tokens);
        shard_lane_due(&bench.shard, &bench.lane);
        assert_true(bench.lane.due || tokens < 336);
        const bool due = bench.lane.due;
        assert_int_equal(lane_truncate_prepare(&bench.lane, &bench.shard), ICE_OK);
        assert_false(bench.lane.due);
        lane_truncate_drop(&bench.lane, &bench.shard);
        assert_int_equal(bench.lane.due, due);
        assert_int_equal(lane_truncate_prepare(&bench.lane, &bench.shard), ICE_OK);
        assert_int_equal(frames(&bench) * sizeof(uint32_t) > bench.shard.places_bytes, 0);
        lane_truncate(&bench.lane, &bench.shard, 0);
        assert_int_equal(frames(&bench), 0);
        append(&bench, 0, 100);
        expect_content(&bench, 100);
        bench_fini(&bench);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_commit_waits_for_cuts),
                                       cmocka_unit_test(test_truncation_and_clustering),
                                       cmocka_unit_test(test_append),
                                       cmocka_unit_test(test_clustering),
                                       cmocka_unit_test(test_pool_full),
                                       cmocka_unit_test(test_promise)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
