// The page pool: classes, promises, slabs that return, exhaustion; a random model against counters; threads.
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

#define SLABS  4u
#define HALF   (POOL_SLAB_BYTES / 2)
#define EIGHTH (POOL_SLAB_BYTES / 8)

static struct env env;

static struct pool *create(uint64_t bytes)
{
    struct pool *pool = NULL;
    struct pool_regions regions;
    const struct pool_wish wish = {.capacity_bytes = bytes, .rungs = ENV_RUNGS_ALL};
    env_linux_init(&env);
    assert_int_equal(pool_regions_map(&env, &wish, &regions), 0);
    assert_int_equal(pool_create(&env, &regions, &pool), 0);
    return pool;
}

static uint64_t used(struct pool *pool)
{
    struct pool_usage usage;
    pool_usage(pool, &usage);
    return usage.used_bytes;
}

static void test_capacity(void **state)
{
    (void)state;
    struct pool *pool = create(POOL_SLAB_BYTES + 1);
    struct pool_usage usage;
    pool_usage(pool, &usage);
    assert_int_equal(usage.capacity_bytes, 2 * POOL_SLAB_BYTES);
    assert_int_equal(usage.used_bytes, 0);
    pool_destroy(pool);
    pool_destroy(NULL);
    struct pool_regions regions;
    assert_int_equal(pool_regions_map(&env, &(struct pool_wish){.rungs = ENV_RUNGS_ALL}, &regions), -EINVAL);
    const struct pool_wish endless = {.capacity_bytes = UINT64_MAX, .rungs = ENV_RUNGS_ALL};
    assert_int_equal(pool_regions_map(&env, &endless, &regions), -EINVAL);
}

// Every frame is there, aligned, apart from the others; the next is refused; all come back.
static void test_exhaustion(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {4096, EIGHTH, HALF, POOL_SLAB_BYTES, 1536};
    struct pool *pool = create(SLABS * POOL_SLAB_BYTES);
    for (unsigned s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint64_t count = SLABS * (POOL_SLAB_BYTES / sizes[s]);
        uint8_t **frames = malloc(count * sizeof *frames);
        assert_non_null(frames);
        for (uint64_t i = 0; i < count; i++) {
            frames[i] = pool_acquire(pool, NULL, sizes[s]);
            assert_non_null(frames[i]);
            assert_int_equal((uintptr_t)frames[i] % 64, 0);
            memset(frames[i], (int)(i & 0xff), sizes[s]);
        }
        assert_null(pool_acquire(pool, NULL, sizes[s]));
        assert_int_equal(used(pool), count * sizes[s]);
        for (uint64_t i = 0; i < count; i++) {
            assert_int_equal(frames[i][0], i & 0xff);
            assert_int_equal(frames[i][sizes[s] - 1], i & 0xff);
            pool_release(pool, frames[i]);
        }
        assert_int_equal(used(pool), 0); // the slabs serve the next size
        free(frames);
    }
    pool_destroy(pool);
}

static void test_promises(void **state)
{
    (void)state;
    struct pool *pool = create(SLABS * POOL_SLAB_BYTES);
    struct pool_reservation mine = {0}, other = {0};
    assert_true(pool_reserve(pool, &mine, HALF, 2 * SLABS - 2)); // three slabs of four
    assert_false(pool_reserve(pool, &other, EIGHTH, 9));         // two slabs
    assert_int_equal(other.rest_frames, 0);
    assert_true(pool_reserve(pool, &other, EIGHTH, 8));
    assert_null(pool_acquire(pool, NULL, 4096)); // all is promised
    void *frames[2 * SLABS];
    for (unsigned i = 0; i < 2 * SLABS - 2; i++)
        assert_non_null(frames[i] = pool_acquire(pool, &mine, HALF));
    assert_int_equal(mine.rest_frames, 0);
    assert_null(pool_acquire(pool, &mine, HALF));
    pool_unreserve(pool, &other, EIGHTH);
    assert_non_null(frames[2 * SLABS - 2] = pool_acquire(pool, &mine, HALF));
    assert_non_null(frames[2 * SLABS - 1] = pool_acquire(pool, NULL, HALF));
    assert_null(pool_acquire(pool, NULL, HALF));
    for (unsigned i = 0; i < 2 * SLABS; i++)
        pool_release(pool, frames[i]);
    assert_int_equal(used(pool), 0);
    // A reservation is set, not added to.
    assert_true(pool_reserve(pool, &mine, HALF, 8));
    assert_true(pool_reserve(pool, &mine, HALF, 2));
    assert_true(pool_reserve(pool, &other, POOL_SLAB_BYTES, 3));
    pool_unreserve(pool, &mine, HALF);
    pool_unreserve(pool, &other, POOL_SLAB_BYTES);
    pool_destroy(pool);
}

// More sizes than classes: those that nobody uses any more make room.
static void test_classes(void **state)
{
    (void)state;
    struct pool *pool = create((POOL_CLASSES_MAX + 1) * POOL_SLAB_BYTES);
    void *frames[POOL_CLASSES_MAX];
    for (unsigned i = 0; i < POOL_CLASSES_MAX; i++)
        assert_non_null(frames[i] = pool_acquire(pool, NULL, 64 * (i + 1)));
    assert_null(pool_acquire(pool, NULL, 64 * (POOL_CLASSES_MAX + 1)));
    pool_release(pool, frames[7]);
    assert_non_null(frames[7] = pool_acquire(pool, NULL, 64 * (POOL_CLASSES_MAX + 1)));
    for (unsigned i = 0; i < POOL_CLASSES_MAX; i++)
        pool_release(pool, frames[i]);
    assert_int_equal(used(pool), 0);
    pool_destroy(pool);
}

static uint64_t next_random(uint64_t *seed)
{
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t x = *seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t new_seed(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 20;
    const char *given = getenv("ICECACHE_TEST_SEED");
    if (given)
        seed = strtoull(given, NULL, 0);
    print_message("ICECACHE_TEST_SEED=%lu\n", seed);
    return seed;
}

// Reference: what is promised is always there, nobody else gets it, the bytes add up, contents stay apart.
#define HELD_MAX 4096u
#define HOLDERS  6u

struct model {
    struct pool *pool;
    uint64_t seed, sizes[HOLDERS], bytes;
    struct pool_reservation reservations[HOLDERS];
    struct {
        uint8_t *frame;
        uint64_t size;
        uint8_t mark;
    } held[HELD_MAX];
    uint32_t count;
};

static void model_acquire(struct model *model, uint32_t holder, bool promised)
{
    struct pool_reservation *reservation = promised ? &model->reservations[holder] : NULL;
    bool certain = promised && reservation->rest_frames > 0;
    uint64_t rest = promised ? reservation->rest_frames : 0;
    uint64_t size = model->sizes[holder];
    uint8_t *frame = model->count < HELD_MAX ? pool_acquire(model->pool, reservation, size) : NULL;
    if (model->count == HELD_MAX)
        return;
    assert_true(!certain || frame);
    if (!frame)
        return;
    assert_true(!promised || reservation->rest_frames == rest - certain);
    uint8_t mark = (uint8_t)next_random(&model->seed);
    memset(frame, mark, size);
    model->held[model->count].frame = frame;
    model->held[model->count].size = size;
    model->held[model->count++].mark = mark;
    model->bytes += size;
}

static void model_release(struct model *model, uint32_t i)
{
    uint64_t size = model->held[i].size;
    for (uint64_t at = 0; at < size; at += 509)
        assert_int_equal(model->held[i].frame[at], model->held[i].mark);
    pool_release(model->pool, model->held[i].frame);
    model->bytes -= size;
    model->held[i] = model->held[--model->count];
}

static void test_random(void **state)
{
    (void)state;
    static struct model model;
    model = (struct model){.pool = create(8 * POOL_SLAB_BYTES),
                           .seed = new_seed(),
                           .sizes = {4096, 8192, 8192, EIGHTH, HALF - 64, POOL_SLAB_BYTES}};
    for (int step = 0; step < 60000; step++) {
        uint64_t random = next_random(&model.seed);
        uint32_t holder = (uint32_t)(random >> 8) % HOLDERS;
        switch (random % 8) {
        case 0:
        case 1:
        case 2:
            model_acquire(&model, holder, random & 256);
            break;
        case 3:
        case 4:
        case 5:
            if (model.count > 0)
                model_release(&model, (uint32_t)(random >> 20) % model.count);
            break;
        case 6: {
            uint64_t before = model.reservations[holder].rest_frames;
            uint64_t frames = (random >> 20) % (2 * POOL_SLAB_BYTES / model.sizes[holder] + 1);
            if (!pool_reserve(model.pool, &model.reservations[holder], model.sizes[holder], frames))
                assert_int_equal(model.reservations[holder].rest_frames, before);
            break;
        }
        default:
            pool_unreserve(model.pool, &model.reservations[holder], model.sizes[holder]);
        }
        assert_int_equal(used(model.pool), model.bytes);
    }
    for (uint32_t i = 0; i < HOLDERS; i++)
        pool_unreserve(model.pool, &model.reservations[i], model.sizes[i]);
    while (model.count > 0)
        model_release(&model, 0);
    // Nothing stays promised: all of it can be had.
    for (uint32_t i = 0; i < 8; i++)
        model_acquire(&model, HOLDERS - 1, false);
    assert_int_equal(model.bytes, 8 * POOL_SLAB_BYTES);
    while (model.count > 0)
        model_release(&model, 0);
    pool_destroy(model.pool);
}

static void *hammer(void *argument)
{
    struct pool *pool = argument;
    struct pool_reservation reservation = {0};
    for (int round = 0; round < 200; round++) {
        void *frames[16];
        if (!pool_reserve(pool, &reservation, 4096u << (round % 3), 16))
            continue;
        for (int i = 0; i < 16; i++) {
            frames[i] = pool_acquire(pool, &reservation, 4096u << (round % 3));
            if (!frames[i])
                return "a promised frame was refused";
            memset(frames[i], round, 4096);
        }
        for (int i = 0; i < 16; i++)
            pool_release(pool, frames[i]);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    struct pool *pool = create(SLABS * POOL_SLAB_BYTES);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, hammer, pool), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        assert_null(wrong);
    }
    assert_int_equal(used(pool), 0);
    pool_destroy(pool);
}

static uint64_t slab_of(struct pool *pool, const void *frame)
{
    return pool_offset(pool, frame) / POOL_SLAB_BYTES;
}

static uint64_t later_ns;

static uint64_t now_later(struct env *unused)
{
    (void)unused;
    return later_ns;
}

// Frames of one size hold all slabs. One that is wanted for another size hands out nothing more, and is kept for it.
static void test_wanted(void **state)
{
    (void)state;
    struct pool *pool = create(2 * POOL_SLAB_BYTES);
    void *halves[4], *eighth;
    env.now_ns = now_later;
    later_ns = 1000;
    for (int i = 0; i < 4; i++)
        assert_non_null(halves[i] = pool_acquire(pool, NULL, HALF));
    pool_want(pool, EIGHTH); // the slabs have only just become what they are
    assert_int_equal(pool_given_up(pool), POOL_SLAB_NONE);
    later_ns += POOL_KEEP_NS;
    pool_release(pool, halves[3]);
    pool_want(pool, HALF); // there is one
    assert_int_equal(pool_given_up(pool), POOL_SLAB_NONE);
    pool_want(pool, EIGHTH);
    assert_int_equal(pool_given_up(pool), slab_of(pool, halves[2])); // the one with fewer in use
    assert_null(pool_acquire(pool, NULL, HALF));
    assert_null(pool_acquire(pool, NULL, EIGHTH));
    pool_release(pool, halves[2]);
    assert_int_equal(pool_given_up(pool), POOL_SLAB_NONE);
    assert_null(pool_acquire(pool, NULL, HALF)); // kept for the other size
    assert_non_null(eighth = pool_acquire(pool, NULL, EIGHTH));
    assert_int_equal(used(pool), 2 * HALF + EIGHTH);
    pool_release(pool, eighth);
    assert_non_null(halves[2] = pool_acquire(pool, NULL, HALF)); // nobody wants it any more
    pool_release(pool, halves[1]);
    later_ns += POOL_KEEP_NS;
    struct pool_reservation mine = {0};
    assert_true(pool_reserve(pool, &mine, HALF, 2));
    pool_want(pool, EIGHTH); // what is promised is not given up
    assert_int_equal(pool_given_up(pool), POOL_SLAB_NONE);
    pool_unreserve(pool, &mine, HALF);
    pool_want(pool, EIGHTH);
    assert_int_not_equal(pool_given_up(pool), POOL_SLAB_NONE);
    pool_release(pool, halves[0]);
    pool_release(pool, halves[2]);
    later_ns += POOL_KEEP_NS;
    pool_want(pool, EIGHTH); // who wanted it has not come: anybody may have it
    for (int i = 0; i < 4; i++)
        assert_non_null(halves[i] = pool_acquire(pool, NULL, HALF));
    for (int i = 0; i < 4; i++)
        pool_release(pool, halves[i]);
    assert_int_equal(used(pool), 0);
    pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_capacity), cmocka_unit_test(test_exhaustion), cmocka_unit_test(test_wanted),
        cmocka_unit_test(test_promises), cmocka_unit_test(test_classes),    cmocka_unit_test(test_random),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
