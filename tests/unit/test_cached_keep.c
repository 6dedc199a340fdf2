// The merge of a last selection with a new ranking, against a plain model: sort all, take the best.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/keep.h"
#include "proto/dtype.h"

#include <stdlib.h>
#include <string.h>

enum { SLOTS = 50, TOKENS = 200, SINKS = 5 };

static const struct landing_shape shape = {1, 1, 1, SLOTS, 16, DTYPE_BF16};

// Is fewer than `most` of the tokens better than tokens[i]?
static bool is_among_best(const struct index_selected *tokens, uint32_t n, uint32_t i, uint32_t most)
{
    uint32_t better = 0;
    for (uint32_t j = 0; j < n; j++)
        better += tokens[j].mass > tokens[i].mass ||
                  (tokens[j].mass == tokens[i].mass && tokens[j].position < tokens[i].position);
    return better < most;
}

// `most` tokens of random positions from SINKS on, ascending, with few different masses.
static uint32_t random_tokens(struct index_selected *tokens, uint32_t most)
{
    uint32_t count = 0;
    for (uint32_t i = SINKS; i < TOKENS && count < most; i++) {
        if ((uint32_t)rand() % (TOKENS / 2) < most)
            tokens[count++] = (struct index_selected){.position = i, .mass = (float)(rand() % 8) / 64.0f};
    }
    return count;
}

static bool find(const struct index_selected *tokens, uint32_t n, uint32_t position)
{
    for (uint32_t i = 0; i < n; i++) {
        if (tokens[i].position == position)
            return true;
    }
    return false;
}

static void merges_as_the_model_does(void **state)
{
    (void)state;
    struct records records;
    struct index_selected scratch[3 * SLOTS], last[SLOTS], found[SLOTS], others[SLOTS];
    assert_int_equal(keep_scratch_count(SLOTS), sizeof scratch / sizeof scratch[0]);
    assert_int_equal(records_init(&records, &shape), ICE_OK);
    struct record_cell *cell = records_cell(&records, 0, 0, 0);
    srand(23);
    for (uint32_t round = 0; round < 5000; round++) {
        const uint32_t budget = 1 + (uint32_t)rand() % SLOTS, until = SINKS + (uint32_t)rand() % (TOKENS - SINKS);
        const struct keep_wish wish = {1 + (uint32_t)rand() % budget, budget, SLOTS, SINKS + round % 3, until, 0};
        const uint32_t last_count = random_tokens(last, 1 + (uint32_t)rand() % SLOTS);
        for (uint32_t i = 0; i < last_count; i++)
            cell->entries[i] = (struct record_entry){last[i].position, i & RECORD_NO_SLOT, 0, last[i].mass};
        cell->count = last_count;
        struct keep keep;
        keep_choose(&keep, cell, &wish, scratch);
        uint32_t wanted = 0;
        for (uint32_t i = 0; i < last_count; i++) {
            if (is_among_best(last, last_count, i, wish.keep) && last[i].position >= wish.from &&
                last[i].position < until)
                assert_int_equal(keep.tokens[wanted++].position, last[i].position);
        }
        assert_int_equal(keep.count, wanted);
        assert_int_equal(keep.is_whole, keep.count == budget);
        struct index_selection selection = {.count = random_tokens(found, budget)};
        uint32_t other_count = 0;
        for (uint32_t i = 0; i < selection.count; i++) {
            if (!find(keep.tokens, keep.count, found[i].position))
                others[other_count++] = found[i];
        }
        struct index_selected kept[SLOTS];
        memcpy(kept, keep.tokens, keep.count * sizeof *kept);
        const struct index_selected *merged = keep_merge(&keep, &selection, found, budget);
        uint32_t expected = keep.count;
        for (uint32_t i = 0; i < other_count; i++) {
            const bool is_in = is_among_best(others, other_count, i, budget - keep.count);
            assert_int_equal(find(merged, selection.count, others[i].position), is_in);
            expected += is_in;
        }
        assert_int_equal(selection.count, expected);
        for (uint32_t i = 0; i < keep.count; i++)
            assert_true(find(merged, selection.count, kept[i].position));
        float mass = 0;
        for (uint32_t i = 0; i < selection.count; i++) {
            assert_true(i == 0 || merged[i].position > merged[i - 1].position);
            mass += merged[i].mass;
        }
        assert_float_equal(mass, selection.selected_mass, 1e-5f);
    }
    records_fini(&records);
}

// Sinks and window are not kept, nothing is where nothing was settled, and all there is needs no keeping.
static void applies_to_selections(void **state)
{
    (void)state;
    struct records records;
    struct index_selected scratch[3 * SLOTS];
    static const uint32_t positions[] = {0, 7, 9, 30};
    uint32_t plan[8 * SLOTS];
    const struct record_wish ends = {positions, 4, false, false};
    struct keep_wish wish = {3, 3, SLOTS, 1, 30, 0};
    struct keep keep;
    assert_int_equal(records_init(&records, &shape), ICE_OK);
    struct record_cell *cell = records_cell(&records, 0, 0, 0);
    assert_false(keep_applies(cell, &wish));
    assert_int_equal(record_plan(cell, &ends, plan), 4);
    assert_false(keep_applies(cell, &wish));
    cell->entries[1].mass = cell->entries[2].mass = 0;
    record_settle(cell);
    assert_true(keep_applies(cell, &wish));
    keep_choose(&keep, cell, &wish, scratch);
    assert_int_equal(keep.count, 2);
    assert_false(keep.is_whole); // it does not fill the budget
    wish.keep = wish.budget = 29;
    assert_false(keep_applies(cell, &wish));
    records_fini(&records);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merges_as_the_model_does),
        cmocka_unit_test(applies_to_selections),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
