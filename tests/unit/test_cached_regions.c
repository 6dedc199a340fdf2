// A pool in several regions, as on a machine with several NUMA nodes: how slabs are numbered, that frames come from all
// regions and go back to theirs, and that nothing is left where one region cannot be had.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// The real table, seen as a machine with `nodes` nodes, on one of which there is no memory.
static struct env env, real;
static uint32_t nodes;
static int failing_node;
static uint32_t mapped;   // guarded by lock, as the next
static uint64_t asked[4]; // bytes by node
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint32_t list_nodes(struct env *env_, int *ids, uint32_t capacity)
{
    (void)env_;
    assert_true(nodes <= capacity);
    for (uint32_t i = 0; i < nodes; i++)
        ids[i] = (int)i;
    return nodes;
}

static int map_region(struct env *env_, const struct env_region_request *request, struct env_region *out)
{
    (void)env_;
    *out = (struct env_region){.node = request->node};
    if (request->node == failing_node) {
        strcpy(out->reasons, "this node is full");
        return -ENOMEM;
    }
    struct env_region_request there = *request;
    there.node = ENV_NODE_ANY;
    int error = real.map_region(&real, &there, out);
    out->node = request->node;
    pthread_mutex_lock(&lock);
    mapped += error == 0;
    if (request->node >= 0)
        asked[request->node] = request->bytes;
    pthread_mutex_unlock(&lock);
    return error;
}

static void unmap_region(struct env *env_, struct env_region *region)
{
    (void)env_;
    assert_non_null(region->base);
    mapped--;
    real.unmap_region(&real, region);
}

static int setup(void **state)
{
    (void)state;
    env_linux_init(&env);
    real = env;
    env.nodes = list_nodes;
    env.map_region = map_region;
    env.unmap_region = unmap_region;
    failing_node = -2;
    mapped = 0;
    memset(asked, 0, sizeof asked);
    return 0;
}

static int map(uint64_t slabs, uint32_t rungs, struct pool_regions *regions)
{
    const struct pool_wish wish = {.capacity_bytes = slabs * POOL_SLAB_BYTES, .rungs = rungs};
    return pool_regions_map(&env, &wish, regions);
}

// Every slab has one place, every address in it leads back to it, and no other address does.
static void expect_numbered(const struct pool_regions *regions)
{
    for (uint32_t slab = 0; slab < regions->slab_count; slab++) {
        uint8_t *base = pool_regions_slab(regions, slab);
        assert_int_equal((uintptr_t)base % POOL_SLAB_BYTES, 0);
        assert_int_equal(pool_regions_find(regions, base), slab);
        assert_int_equal(pool_regions_find(regions, base + POOL_SLAB_BYTES - 1), slab);
        memset(base, (int)slab, POOL_SLAB_BYTES);
    }
    for (uint32_t slab = 0; slab < regions->slab_count; slab++) {
        const uint8_t *base = pool_regions_slab(regions, slab);
        assert_int_equal(base[0], slab & 0xff); // no other slab's writing
        assert_int_equal(base[POOL_SLAB_BYTES - 1], slab & 0xff);
    }
    for (uint32_t i = 0; i < regions->count; i++) {
        const uint8_t *base = regions->region[i].base;
        const uint32_t before = pool_regions_find(regions, base - 1);
        const uint32_t behind = pool_regions_find(regions, base + regions->region[i].bytes);
        // Outside, or another region that happens to lie beside it.
        assert_true(before == regions->slab_count || before != regions->slabs_before[i]);
        assert_true(behind == regions->slab_count || behind != regions->slabs_before[i + 1] - 1);
    }
    assert_int_equal(pool_regions_find(regions, NULL), regions->slab_count);
    assert_int_equal(pool_regions_find(regions, (void *)UINTPTR_MAX), regions->slab_count);
}

static void test_numbers(void **state)
{
    (void)state;
    static const uint32_t rungs[] = {ENV_RUNGS_ALL, ENV_RUNG(ENV_HUGE_NONE),
                                     ENV_RUNG(ENV_HUGE_COLLAPSED) | ENV_RUNG(ENV_HUGE_NONE)};
    for (nodes = 0; nodes <= 4; nodes++) {
        for (uint64_t slabs = 1; slabs <= 9; slabs += 2) {
            struct pool_regions regions;
            const uint32_t count = nodes < 2 ? 1 : slabs < nodes ? (uint32_t)slabs : nodes;
            assert_int_equal(map(slabs, rungs[slabs % 3], &regions), 0);
            assert_int_equal(regions.count, count);
            assert_int_equal(mapped, count);
            assert_int_equal(regions.slab_count, slabs);
            for (uint32_t i = 0; i < count; i++) {
                const uint64_t of_node = regions.region[i].bytes / POOL_SLAB_BYTES;
                assert_true(of_node == slabs / count || of_node == slabs / count + 1); // equal parts
                assert_int_equal(regions.region[i].node, count == 1 ? ENV_NODE_ANY : (int)i);
            }
            expect_numbered(&regions);
            pool_regions_unmap(&env, &regions);
            assert_int_equal(mapped, 0);
        }
    }
}

static void test_one_fails(void **state)
{
    (void)state;
    nodes = 3;
    for (failing_node = 0; failing_node < 3; failing_node++) {
        struct pool_regions regions;
        assert_int_equal(map(6, ENV_RUNGS_ALL, &regions), -ENOMEM);
        assert_int_equal(mapped, 0);
        assert_string_equal(regions.region[regions.worst].reasons, "this node is full");
    }
}

static bool never(void *owner, uint64_t done_bytes)
{
    (void)done_bytes;
    ++*(uint32_t *)owner;
    return false;
}

static bool always(void *owner, uint64_t done_bytes)
{
    uint64_t *most = owner;
    *most = done_bytes > *most ? done_bytes : *most;
    return true;
}

static void test_watch(void **state)
{
    (void)state;
    uint32_t calls = 0;
    uint64_t most = 0;
    struct pool_regions regions;
    struct env_watch watch = {never, &calls};
    const struct pool_wish wish = {.capacity_bytes = 512u << 20, .rungs = ENV_RUNG(ENV_HUGE_NONE), .watch = &watch};
    nodes = 2;
    assert_int_equal(pool_regions_map(&env, &wish, &regions), -ECANCELED);
    assert_int_equal(calls, 1); // told once, not asked again
    assert_int_equal(mapped, 0);
    watch = (struct env_watch){always, &most};
    assert_int_equal(pool_regions_map(&env, &wish, &regions), 0);
    assert_true(most <= wish.capacity_bytes);
    assert_int_equal(asked[0] + asked[1], wish.capacity_bytes);
    pool_regions_unmap(&env, &regions);
}

// All frames of a pool in three regions, in turn from all of them, and all back.
static void test_pool(void **state)
{
    (void)state;
    enum { SLABS = 7, PER_SLAB = 8, FRAMES = SLABS * PER_SLAB };
    const uint64_t frame_bytes = POOL_SLAB_BYTES / PER_SLAB;
    struct pool_regions regions;
    struct pool *pool;
    struct pool_usage usage;
    uint8_t *frames[FRAMES];
    bool from[3] = {false};
    nodes = 3;
    assert_int_equal(map(SLABS, ENV_RUNGS_ALL, &regions), 0);
    assert_int_equal(pool_create(&env, &regions, &pool), 0);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < FRAMES; i++) {
            frames[i] = pool_acquire(pool, NULL, frame_bytes);
            assert_non_null(frames[i]);
            memset(frames[i], i, frame_bytes);
            for (uint32_t r = 0; r < 3; r++)
                from[r] |= (uintptr_t)frames[i] - (uintptr_t)regions.region[r].base < regions.region[r].bytes;
        }
        assert_null(pool_acquire(pool, NULL, frame_bytes));
        for (int i = 0; i < FRAMES; i++) {
            const int at = (i * 11 + round) % FRAMES; // every one once, not in order
            assert_int_equal(frames[at][0], at);
            assert_int_equal(frames[at][frame_bytes - 1], at);
            pool_release(pool, frames[at]);
        }
    }
    assert_true(from[0] && from[1] && from[2]);
    pool_usage(pool, &usage);
    assert_int_equal(usage.capacity_bytes, SLABS * POOL_SLAB_BYTES);
    assert_int_equal(usage.used_bytes, 0);
    assert_true(usage.huge_bytes <= usage.capacity_bytes);
    pool_destroy(pool);
    assert_int_equal(mapped, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_numbers, setup),
        cmocka_unit_test_setup(test_one_fails, setup),
        cmocka_unit_test_setup(test_watch, setup),
        cmocka_unit_test_setup(test_pool, setup),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
