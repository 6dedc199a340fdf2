// Records of landings against a plain model of the slots: over random selections, what is kept was there, and every
// slot holds what its entry says.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "gpu/record.h"
#include "proto/dtype.h"

#include <stdlib.h>

enum { SLOTS = 40, TOKENS = 120, NOTHING = 0xffffffff };

static const struct landing_shape shape = {3, 2, 2, SLOTS, 16, DTYPE_BF16};

struct scene {
    struct records records;
    struct record_cell *cell;
    uint32_t slots[SLOTS]; // the position in each, as a worker's memory has it
    uint32_t scratch[4 * SLOTS];
};

static void scene_init(struct scene *scene)
{
    assert_int_equal(records_init(&scene->records, &shape), ICE_OK);
    assert_true(record_scratch_count(SLOTS) <= sizeof scene->scratch / sizeof scene->scratch[0]);
    scene->cell = records_cell(&scene->records, 1, 1, 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        scene->slots[i] = NOTHING;
}

// A random subset, ascending. Returns how many.
static uint32_t choose(uint32_t *positions, uint32_t visible, uint32_t most)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < visible && count < most; i++) {
        if ((uint32_t)rand() % visible < most)
            positions[count++] = i;
    }
    return count;
}

static bool was_there(const struct scene *scene, uint32_t held, uint32_t position)
{
    for (uint32_t i = 0; i < held; i++) {
        if (scene->slots[i] == position)
            return true;
    }
    return false;
}

// What is not kept is put; then the slots below the count hold each entry's position once.
static void put_and_check(struct scene *scene)
{
    const struct record_cell *cell = scene->cell;
    for (uint32_t i = 0; i < cell->count; i++) {
        const struct record_entry *entry = &cell->entries[i];
        if (entry->slot == RECORD_NO_SLOT)
            continue;
        if (entry->is_kept)
            assert_int_equal(scene->slots[entry->slot], entry->position);
        scene->slots[entry->slot] = entry->position;
    }
    record_settle(scene->cell);
    bool used[SLOTS] = {false};
    for (uint32_t i = 0; i < cell->count; i++) {
        const struct record_entry *entry = &cell->entries[i];
        assert_true(entry->slot < cell->count && !used[entry->slot]);
        used[entry->slot] = true;
        assert_int_equal(scene->slots[entry->slot], entry->position);
        assert_true(i == 0 || cell->entries[i - 1].position < entry->position);
    }
}

static void plans_keep_what_is_there(void **state)
{
    (void)state;
    static struct scene scene;
    uint32_t kept_all = 0;
    scene_init(&scene);
    srand(7);
    for (uint32_t round = 0; round < 4000; round++) {
        uint32_t positions[SLOTS], held = scene.cell->count, changed = 0;
        const bool everything = round % 5 == 4;
        const uint32_t visible = everything ? 1 + (uint32_t)rand() % SLOTS : TOKENS;
        uint32_t count = choose(positions, visible, everything ? visible : 1 + (uint32_t)rand() % SLOTS);
        for (count = everything ? 0 : count; everything && count < visible; count++)
            positions[count] = count;
        for (uint32_t i = 0; i < count; i++)
            changed += !was_there(&scene, held, positions[i]);
        const struct record_wish wish = {positions, count, everything, round % 11 == 10};
        assert_int_equal(record_plan(scene.cell, &wish, scene.scratch), changed);
        assert_int_equal(scene.cell->count, count);
        for (uint32_t i = 0; i < count; i++) {
            assert_int_equal(scene.cell->entries[i].position, positions[i]);
            assert_false(scene.cell->entries[i].is_kept && wish.resend);
            if (everything || wish.resend)
                assert_int_equal(scene.cell->entries[i].slot, i);
            kept_all += scene.cell->entries[i].is_kept;
        }
        put_and_check(&scene);
        // Again: nothing is to be done.
        const struct record_wish again = {positions, count, everything, false};
        assert_int_equal(record_plan(scene.cell, &again, scene.scratch), 0);
        for (uint32_t i = 0; i < count; i++)
            assert_true(scene.cell->entries[i].is_kept);
        put_and_check(&scene);
    }
    assert_true(kept_all > 1000);
    records_fini(&scene.records);
}

// What an interrupted retrieve has left is not taken for anything.
static void unsettled_is_unknown(void **state)
{
    (void)state;
    static struct scene scene;
    static const uint32_t positions[] = {3, 5, 9};
    const struct record_wish wish = {positions, 3, false, false};
    scene_init(&scene);
    assert_int_equal(record_plan(scene.cell, &wish, scene.scratch), 3);
    assert_int_equal(record_plan(scene.cell, &wish, scene.scratch), 3);
    record_settle(scene.cell);
    assert_int_equal(record_plan(scene.cell, &wish, scene.scratch), 0);
    record_settle(scene.cell);
    struct record_cell *other = records_cell(&scene.records, 0, 1, 0);
    assert_int_equal(record_plan(other, &wish, scene.scratch), 3);
    record_settle(other);
    records_forget_row(&scene.records, 1);
    assert_int_equal(record_plan(scene.cell, &wish, scene.scratch), 3);
    assert_int_equal(record_plan(other, &wish, scene.scratch), 0);
    records_fini(&scene.records);
}

static void cut_leaves_what_can_be_had(void **state)
{
    (void)state;
    static struct scene scene;
    uint32_t lost_all = 0, moved_all = 0;
    scene_init(&scene);
    srand(11);
    for (uint32_t round = 0; round < 4000; round++) {
        uint32_t positions[SLOTS];
        bool have_row[SLOTS];
        const uint32_t count = choose(positions, TOKENS, 1 + (uint32_t)rand() % SLOTS);
        const struct record_wish wish = {positions, count, false, false};
        (void)record_plan(scene.cell, &wish, scene.scratch);
        uint32_t had = 0;
        bool was_kept[SLOTS];
        for (uint32_t i = 0; i < count; i++) {
            have_row[i] = rand() % 2;
            was_kept[i] = scene.cell->entries[i].is_kept;
            had += have_row[i];
        }
        record_cut(scene.cell, have_row, scene.scratch);
        uint32_t left = 0;
        for (uint32_t i = 0; i < count; i++) {
            const struct record_entry *entry = &scene.cell->entries[i];
            assert_true(!entry->is_kept || was_kept[i]);
            if (entry->slot == RECORD_NO_SLOT)
                assert_false(have_row[i]);
            else
                assert_true(have_row[i] || entry->is_kept);
            left += entry->slot != RECORD_NO_SLOT;
            lost_all += entry->slot == RECORD_NO_SLOT;
            moved_all += was_kept[i] && !entry->is_kept;
        }
        assert_true(left >= had);
        put_and_check(&scene);
        assert_int_equal(scene.cell->count, left);
    }
    assert_true(lost_all > 100 && moved_all > 100);
    records_fini(&scene.records);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans_keep_what_is_there),
        cmocka_unit_test(unsettled_is_unknown),
        cmocka_unit_test(cut_leaves_what_can_be_had),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
