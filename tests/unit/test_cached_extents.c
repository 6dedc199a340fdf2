// Extents: exhaustion, counts, promises, claims at start, slabs that return, memory that fails; a random run beside a
// naive model; threads.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/extents.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SLABS 4u
#define SLAB  EXTENTS_SLAB_BYTES
#define UNITS ((uint32_t)(EXTENTS_SLAB_BYTES / EXTENT_UNIT)) // in a slab

// Memory that is counted, and fails where `left` runs out.
struct counted {
    struct env env; // first
    struct env real;
    int64_t bytes, calls, left;
};

static void *counted_acquire(struct env *env, size_t bytes)
{
    struct counted *counted = (struct counted *)env;
    if (counted->left-- <= 0)
        return NULL;
    counted->calls++;
    counted->bytes += (int64_t)bytes;
    uint8_t *memory = counted->real.acquire(&counted->real, bytes);
    return memory ? memset(memory, 0xa5, bytes) : NULL;
}

static void counted_release(struct env *env, void *memory, size_t bytes)
{
    struct counted *counted = (struct counted *)env;
    if (memory)
        counted->bytes -= (int64_t)bytes;
    counted->real.release(&counted->real, memory, bytes);
}

static struct counted outside;

static struct extents *create(uint64_t bytes)
{
    struct extents *extents = NULL;
    outside = (struct counted){.left = INT64_MAX};
    env_linux_init(&outside.real);
    outside.env = outside.real;
    outside.env.acquire = counted_acquire;
    outside.env.release = counted_release;
    assert_int_equal(extents_create(&outside.env, bytes, &extents), 0);
    return extents;
}

static void destroy(struct extents *extents)
{
    extents_destroy(extents);
    assert_int_equal(outside.bytes, 0);
}

static uint64_t used(struct extents *extents)
{
    struct extents_usage usage;
    extents_usage(extents, &usage);
    return usage.used_bytes;
}

static void give(struct extents *extents, uint32_t extent)
{
    extents_release(extents, &extent, 1);
}

static void test_capacity(void **state)
{
    (void)state;
    struct extents *extents = create(2 * SLAB + SLAB - 1);
    struct extents_usage usage;
    extents_usage(extents, &usage);
    assert_int_equal(usage.capacity_bytes, 2 * SLAB);
    assert_int_equal(usage.used_bytes, 0);
    assert_int_equal(extents_acquire(extents, NULL, 0), EXTENT_NONE);
    assert_int_equal(extents_acquire(extents, NULL, SLAB + 1), EXTENT_NONE);
    destroy(extents);
    extents_destroy(NULL);
    assert_int_equal(extents_create(&outside.env, SLAB - 1, &extents), -EINVAL);
    assert_int_equal(extents_create(&outside.env, EXTENTS_BYTES_MAX + SLAB, &extents), -EFBIG);
    for (int64_t left = 0; left < 2; left++) {
        outside.left = left;
        assert_int_equal(extents_create(&outside.env, SLAB, &extents), -ENOMEM);
        assert_int_equal(outside.bytes, 0);
    }
}

// The largest file: every extent has its number, and memory follows what is used.
static void test_largest(void **state)
{
    (void)state;
    struct extents *extents = create(EXTENTS_BYTES_MAX);
    int64_t before = outside.bytes;
    assert_in_range(before, 1, 256 << 20);
    uint32_t last = (uint32_t)(EXTENTS_BYTES_MAX / EXTENT_UNIT) - 1;
    assert_true(extents_claim(extents, last, EXTENT_UNIT));
    assert_int_equal(extent_offset(last), EXTENTS_BYTES_MAX - EXTENT_UNIT);
    assert_false(extents_claim(extents, last + 1, EXTENT_UNIT));
    assert_false(extents_claim(extents, EXTENT_NONE, EXTENT_UNIT));
    assert_in_range(outside.bytes - before, 1, 2048);
    give(extents, last);
    destroy(extents);
}

// All of the file can be had, each piece once, in every size; all comes back for the next size.
static void test_exhaustion(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {EXTENT_UNIT,      2 * EXTENT_UNIT, 3 * EXTENT_UNIT - 1,
                                     65 * EXTENT_UNIT, SLAB / 2,        SLAB};
    struct extents *extents = create(SLABS * SLAB);
    for (unsigned s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint32_t units = (uint32_t)((sizes[s] + EXTENT_UNIT - 1) / EXTENT_UNIT), count = SLABS * (UNITS / units);
        uint32_t *list = malloc(count * sizeof *list);
        bool taken[SLABS * UNITS] = {false};
        assert_non_null(list);
        for (uint32_t i = 0; i < count; i++) {
            list[i] = extents_acquire(extents, NULL, sizes[s]);
            assert_in_range(list[i], 0, SLABS * UNITS - units);
            assert_int_equal(list[i] / UNITS, (list[i] + units - 1) / UNITS);
            for (uint32_t unit = list[i]; unit < list[i] + units; unit++) {
                assert_false(taken[unit]);
                taken[unit] = true;
            }
        }
        assert_int_equal(extents_acquire(extents, NULL, sizes[s]), EXTENT_NONE);
        assert_int_equal(used(extents), (uint64_t)count * units * EXTENT_UNIT);
        extents_release(extents, list, count);
        assert_int_equal(used(extents), 0);
        free(list);
    }
    destroy(extents);
}

static void test_counts(void **state)
{
    (void)state;
    struct extents *extents = create(SLAB);
    uint32_t list[3] = {extents_acquire(extents, NULL, SLAB / 2), EXTENT_NONE,
                        extents_acquire(extents, NULL, SLAB / 2)};
    extents_hold(extents, list, 3);
    extents_release(extents, list, 3);
    assert_int_equal(used(extents), SLAB);
    assert_int_equal(extents_acquire(extents, NULL, SLAB / 2), EXTENT_NONE);
    give(extents, list[2]);
    assert_int_equal(used(extents), SLAB / 2);
    assert_int_equal(extents_acquire(extents, NULL, SLAB / 2), list[2]);
    give(extents, list[2]);
    // Held too often, an extent stays, because it is not known any more when it could go.
    for (uint32_t i = 0; i < EXTENT_HOLDS_MAX + 10; i++)
        extents_hold(extents, list, 1);
    for (uint32_t i = 0; i < EXTENT_HOLDS_MAX + 20; i++)
        give(extents, list[0]);
    assert_int_equal(used(extents), SLAB / 2);
    destroy(extents);
}

static void test_promises(void **state)
{
    (void)state;
    struct extents *extents = create(SLABS * SLAB);
    struct extents_reservation mine = {0}, other = {0};
    assert_int_equal(extents_reserve(extents, &mine, SLAB / 2, 2 * SLABS - 2), 2 * SLABS - 2); // three slabs of four
    assert_int_equal(extents_reserve(extents, &other, SLAB / 8, 9), 8);                        // what is left
    assert_int_equal(other.rest, 8);
    assert_int_equal(extents_acquire(extents, NULL, EXTENT_UNIT), EXTENT_NONE); // all is promised
    assert_int_equal(extents_acquire(extents, NULL, SLAB / 8), EXTENT_NONE);
    assert_int_equal(extents_reserve(extents, &other, SLAB / 8, 3), 3); // set, not added to
    assert_int_equal(extents_acquire(extents, NULL, EXTENT_UNIT), EXTENT_NONE);
    uint32_t rest[5];
    for (int i = 0; i < 5; i++) // in the slab that the promise needs, beyond the promise
        assert_int_not_equal(rest[i] = extents_acquire(extents, NULL, SLAB / 8), EXTENT_NONE);
    assert_int_equal(extents_acquire(extents, NULL, SLAB / 8), EXTENT_NONE);
    uint32_t list[2 * SLABS];
    for (unsigned i = 0; i < 2 * SLABS - 2; i++)
        assert_int_not_equal(list[i] = extents_acquire(extents, &mine, SLAB / 2), EXTENT_NONE);
    assert_int_equal(mine.rest, 0);
    assert_int_equal(extents_acquire(extents, &mine, SLAB / 2), EXTENT_NONE);
    extents_unreserve(extents, &other, SLAB / 8);
    extents_release(extents, rest, 5);
    assert_int_not_equal(list[2 * SLABS - 2] = extents_acquire(extents, &mine, SLAB / 2), EXTENT_NONE);
    assert_int_not_equal(list[2 * SLABS - 1] = extents_acquire(extents, NULL, SLAB / 2), EXTENT_NONE);
    extents_release(extents, list, 2 * SLABS);
    assert_int_equal(used(extents), 0);
    assert_int_equal(extents_reserve(extents, &mine, SLAB + 1, 1), 0);
    assert_int_equal(extents_reserve(extents, &mine, 0, 1), 0);
    assert_int_equal(extents_reserve(extents, &mine, EXTENT_UNIT, UINT64_MAX), SLABS * UNITS);
    extents_unreserve(extents, &mine, EXTENT_UNIT);
    destroy(extents);
}

// At start, sealed prefixes say what is theirs.
static void test_claims(void **state)
{
    (void)state;
    struct extents *extents = create(SLABS * SLAB);
    struct extents_reservation promise = {0};
    assert_true(extents_claim(extents, UNITS + 6, 3 * EXTENT_UNIT));
    assert_true(extents_claim(extents, UNITS + 6, 3 * EXTENT_UNIT - 1));
    assert_false(extents_claim(extents, UNITS + 7, 3 * EXTENT_UNIT));                // across two of them
    assert_false(extents_claim(extents, UNITS + 8, 2 * EXTENT_UNIT));                // another size
    assert_false(extents_claim(extents, 2 * UNITS - 2, 3 * EXTENT_UNIT));            // the rest of a slab holds none
    assert_false(extents_claim(extents, SLABS * UNITS, EXTENT_UNIT));                // outside
    assert_false(extents_claim(extents, 0, SLAB + 1));                               // no size
    assert_false(extents_claim(extents, 0, 0));                                      // no size
    assert_true(extents_claim(extents, 2 * UNITS - UNITS % 3 - 3, 3 * EXTENT_UNIT)); // the last of the slab
    assert_int_equal(used(extents), 2 * 3 * EXTENT_UNIT);
    for (uint32_t i = 2; i < EXTENT_HOLDS_MAX - 1; i++)
        assert_true(extents_claim(extents, UNITS + 6, 3 * EXTENT_UNIT));
    assert_false(extents_claim(extents, UNITS + 6, 3 * EXTENT_UNIT)); // too often
    for (uint32_t i = 0; i < EXTENT_HOLDS_MAX - 1; i++)
        give(extents, UNITS + 6);
    assert_int_equal(used(extents), 3 * EXTENT_UNIT);
    // What is promised cannot be claimed, in a slab of its own or among the free ones of a class.
    uint64_t all = 3 * (UNITS / 3) + UNITS / 3 - 1;
    assert_int_equal(extents_reserve(extents, &promise, 3 * EXTENT_UNIT, UINT64_MAX), all);
    assert_false(extents_claim(extents, 0, SLAB));
    assert_false(extents_claim(extents, UNITS, 3 * EXTENT_UNIT));
    assert_int_equal(extents_reserve(extents, &promise, 3 * EXTENT_UNIT, all - 1), all - 1);
    assert_true(extents_claim(extents, UNITS, 3 * EXTENT_UNIT));
    while (promise.rest > 0)
        assert_int_not_equal(extents_acquire(extents, &promise, 3 * EXTENT_UNIT), EXTENT_NONE);
    destroy(extents);
}

// More sizes than classes: those that nobody uses any more make room.
static void test_classes(void **state)
{
    (void)state;
    struct extents *extents = create((EXTENTS_CLASSES_MAX + 1) * SLAB);
    uint32_t list[EXTENTS_CLASSES_MAX];
    for (uint32_t i = 0; i < EXTENTS_CLASSES_MAX; i++)
        assert_int_not_equal(list[i] = extents_acquire(extents, NULL, (i + 1) * EXTENT_UNIT), EXTENT_NONE);
    assert_int_equal(extents_acquire(extents, NULL, (EXTENTS_CLASSES_MAX + 1) * EXTENT_UNIT), EXTENT_NONE);
    give(extents, list[7]);
    assert_int_not_equal(list[7] = extents_acquire(extents, NULL, (EXTENTS_CLASSES_MAX + 1) * EXTENT_UNIT),
                         EXTENT_NONE);
    extents_release(extents, list, EXTENTS_CLASSES_MAX);
    assert_int_equal(used(extents), 0);
    destroy(extents);
}

// Memory: none for each extent, also where one comes and goes; what is promised needs none any more.
static void test_memory(void **state)
{
    (void)state;
    struct extents *extents = create(SLABS * SLAB);
    struct extents_reservation promise = {0};
    uint32_t list[SLABS * UNITS];
    give(extents, extents_acquire(extents, NULL, EXTENT_UNIT));
    int64_t calls = outside.calls;
    for (int i = 0; i < 100; i++)
        give(extents, extents_acquire(extents, NULL, EXTENT_UNIT));
    assert_int_equal(outside.calls, calls);
    for (uint32_t i = 0; i < SLABS * UNITS; i++)
        list[i] = extents_acquire(extents, NULL, EXTENT_UNIT);
    assert_in_range(outside.calls - calls, 1, SLABS);
    extents_release(extents, list, SLABS * UNITS);
    assert_int_equal(extents_reserve(extents, &promise, EXTENT_UNIT, UINT64_MAX), SLABS * UNITS);
    outside.left = 0;
    for (uint32_t i = 0; i < SLABS * UNITS; i++)
        assert_int_not_equal(list[i] = extents_acquire(extents, &promise, EXTENT_UNIT), EXTENT_NONE);
    extents_release(extents, list, SLABS * UNITS);
    // Without memory less is promised, and nothing is taken.
    assert_int_equal(extents_acquire(extents, NULL, SLAB), EXTENT_NONE);
    assert_false(extents_claim(extents, 0, SLAB));
    assert_int_equal(extents_reserve(extents, &promise, SLAB / 4, 7), 0);
    outside.left = 1;
    assert_int_equal(extents_reserve(extents, &promise, SLAB / 4, 7), 4);
    for (int i = 0; i < 4; i++)
        assert_int_not_equal(list[i] = extents_acquire(extents, &promise, SLAB / 4), EXTENT_NONE);
    extents_release(extents, list, 4);
    destroy(extents);
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

// The model knows of each unit whether it is used, by an extent of which size that starts where, and how often that is
// held. It finds by looking at everything whether room must be there.
#define MODEL_SLABS 6u
#define MODEL_UNITS (MODEL_SLABS * UNITS)
#define SIZES       5u

struct model {
    struct extents *extents;
    uint64_t seed;
    uint32_t units[SIZES];                     // of a size
    uint32_t size_of[MODEL_UNITS];             // by an extent's first unit
    uint32_t holds[MODEL_UNITS];               // by an extent's first unit
    uint32_t held[MODEL_UNITS], count;         // first units of what is held, once for each hold
    struct extents_reservation promise[SIZES]; // one for each size
    uint64_t used_bytes;
};

// Slabs without an extent in them, and extents of a size that are free in the slabs that hold some of it.
static void model_room(const struct model *model, uint32_t size, uint64_t *free_slabs, uint64_t *free_extents)
{
    *free_slabs = *free_extents = 0;
    for (uint32_t slab = 0; slab < MODEL_SLABS; slab++) {
        uint32_t used_by = SIZES, used_count = 0;
        for (uint32_t unit = slab * UNITS; unit < (slab + 1) * UNITS; unit++) {
            if (model->holds[unit] > 0) {
                used_by = model->size_of[unit];
                used_count++;
            }
        }
        *free_slabs += used_by == SIZES;
        *free_extents += used_by == size ? UNITS / model->units[size] - used_count : 0;
    }
}

// Do the promises of all sizes fit, if this one's is `rest` and it has `taken` free extents fewer?
static bool model_keeps(const struct model *model, uint32_t of, uint64_t rest, uint64_t taken, bool of_free_slab)
{
    uint64_t sum = 0, slabs = 0, there;
    for (uint32_t size = 0; size < SIZES; size++) {
        uint64_t per_slab = UNITS / model->units[size], wanted = size == of ? rest : model->promise[size].rest;
        model_room(model, size, &slabs, &there);
        if (size == of) {
            there += of_free_slab ? per_slab : 0;
            if (there < taken)
                return false;
            there -= taken;
        }
        sum += wanted > there ? (wanted - there + per_slab - 1) / per_slab : 0;
    }
    return sum + of_free_slab <= slabs;
}

static void model_take(struct model *model, uint32_t size, uint32_t unit)
{
    if (model->holds[unit]++ == 0)
        model->used_bytes += (uint64_t)model->units[size] * EXTENT_UNIT;
    model->size_of[unit] = size;
    model->held[model->count++] = unit;
}

// Is this unit the start of a place for the size, in a slab without other sizes?
static bool model_fits(const struct model *model, uint32_t size, uint32_t unit)
{
    uint32_t units = model->units[size], first = unit / UNITS * UNITS;
    if (unit % UNITS % units != 0 || unit % UNITS / units >= UNITS / units)
        return false;
    for (uint32_t other = first; other < first + UNITS; other++)
        if (model->holds[other] > 0 && model->size_of[other] != size)
            return false;
    return true;
}

static void model_acquire(struct model *model, uint32_t size, bool promised)
{
    struct extents_reservation *promise = promised ? &model->promise[size] : NULL;
    uint64_t slabs, there, rest = model->promise[size].rest;
    model_room(model, size, &slabs, &there);
    bool wanted = (promised && rest > 0) || model_keeps(model, size, rest, 1, there == 0);
    uint32_t extent = extents_acquire(model->extents, promise, (uint64_t)model->units[size] * EXTENT_UNIT);
    assert_int_equal(extent != EXTENT_NONE, wanted);
    assert_int_equal(model->promise[size].rest, rest - (promised && rest > 0));
    if (extent == EXTENT_NONE)
        return;
    assert_in_range(extent, 0, MODEL_UNITS - 1);
    assert_int_equal(model->holds[extent], 0);
    assert_true(model_fits(model, size, extent));
    model_take(model, size, extent);
}

static void model_claim(struct model *model, uint32_t size, uint32_t unit)
{
    bool fits = model_fits(model, size, unit);
    bool is_held = model->holds[unit] > 0;
    bool slab_is_free = true;
    for (uint32_t other = unit / UNITS * UNITS; other < (unit / UNITS + 1) * UNITS; other++)
        slab_is_free = slab_is_free && model->holds[other] == 0;
    bool wanted = fits && (is_held || model_keeps(model, size, model->promise[size].rest, 1, slab_is_free));
    bool claimed = extents_claim(model->extents, unit, (uint64_t)model->units[size] * EXTENT_UNIT);
    assert_int_equal(claimed, wanted);
    if (claimed)
        model_take(model, size, unit);
}

static void model_reserve(struct model *model, uint32_t size, uint64_t count)
{
    uint64_t got =
        extents_reserve(model->extents, &model->promise[size], (uint64_t)model->units[size] * EXTENT_UNIT, count);
    assert_int_equal(got, model->promise[size].rest);
    assert_in_range(got, 0, count);
    assert_true(model_keeps(model, size, got, 0, false));
    assert_true(got == count || !model_keeps(model, size, got + 1, 0, false)); // no more would have fitted
}

static void model_release(struct model *model, uint32_t i)
{
    uint32_t unit = model->held[i];
    give(model->extents, unit);
    model->held[i] = model->held[--model->count];
    if (--model->holds[unit] == 0)
        model->used_bytes -= (uint64_t)model->units[model->size_of[unit]] * EXTENT_UNIT;
}

static void model_step(struct model *model)
{
    uint64_t random = next_random(&model->seed);
    uint32_t size = (uint32_t)(random >> 8) % SIZES, which = (uint32_t)(random >> 20);
    bool room = model->count < MODEL_UNITS;
    switch (random % 16) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4:
        if (room)
            model_acquire(model, size, random & 256);
        break;
    case 5:
    case 6:
    case 7:
    case 8:
    case 9:
        if (model->count > 0)
            model_release(model, which % model->count);
        break;
    case 10:
        if (model->count > 0 && room) {
            extents_hold(model->extents, &model->held[which % model->count], 1);
            uint32_t unit = model->held[which % model->count];
            model_take(model, model->size_of[unit], unit);
        }
        break;
    case 11:
    case 12:
        if (room)
            model_claim(model, size, which % MODEL_UNITS / model->units[size] * model->units[size]);
        break;
    case 13:
        if (room)
            model_claim(model, size, which % MODEL_UNITS);
        break;
    case 14:
        model_reserve(model, size, which % (2 * UNITS / model->units[size] + 2));
        break;
    default:
        extents_unreserve(model->extents, &model->promise[size], (uint64_t)model->units[size] * EXTENT_UNIT);
    }
    assert_int_equal(used(model->extents), model->used_bytes);
}

static void test_random(void **state)
{
    (void)state;
    static struct model model;
    model = (struct model){
        .extents = create(MODEL_SLABS * SLAB), .seed = new_seed(), .units = {32, 48, 100, UNITS / 2, UNITS}};
    for (int i = 0; i < 30000; i++)
        model_step(&model);
    for (uint32_t size = 0; size < SIZES; size++)
        extents_unreserve(model.extents, &model.promise[size], (uint64_t)model.units[size] * EXTENT_UNIT);
    while (model.count > 0)
        model_release(&model, 0);
    // Nothing stays promised: all of it can be had.
    for (uint32_t i = 0; i < MODEL_SLABS; i++)
        model_acquire(&model, SIZES - 1, false);
    assert_int_equal(used(model.extents), MODEL_SLABS * SLAB);
    while (model.count > 0)
        model_release(&model, 0);
    destroy(model.extents);
}

static void *hammer(void *argument)
{
    struct extents *extents = argument;
    struct extents_reservation promise = {0};
    for (int round = 0; round < 200; round++) {
        uint32_t list[16];
        uint64_t bytes = EXTENT_UNIT << (round % 3);
        if (extents_reserve(extents, &promise, bytes, 16) != 16) {
            extents_unreserve(extents, &promise, bytes);
            continue;
        }
        for (int i = 0; i < 16; i++) {
            list[i] = extents_acquire(extents, &promise, bytes);
            if (list[i] == EXTENT_NONE)
                return "a promised extent was refused";
        }
        extents_hold(extents, list, 16);
        extents_release(extents, list, 16);
        extents_release(extents, list, 16);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    static struct env env; // the counts of the other one are of one thread
    struct extents *extents = NULL;
    env_linux_init(&env);
    assert_int_equal(extents_create(&env, SLABS * SLAB, &extents), 0);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, hammer, extents), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        assert_null(wrong);
    }
    assert_int_equal(used(extents), 0);
    extents_destroy(extents);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_capacity), cmocka_unit_test(test_largest),  cmocka_unit_test(test_exhaustion),
        cmocka_unit_test(test_counts),   cmocka_unit_test(test_promises), cmocka_unit_test(test_claims),
        cmocka_unit_test(test_classes),  cmocka_unit_test(test_memory),   cmocka_unit_test(test_random),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
