// Unit tests of the tree under measurement: its rows follow the plans, its clustering keeps up with insertions, and the
// masses that it is judged by are those of the definition.
#include "reference.h"
#include "tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#define TOKENS    3000u
#define BATCH_MAX 512u // no batch of the index is larger

struct built {
    struct data data;
    struct arena index_arena, row_arena;
    struct tree tree;
    struct tree_costs costs;
};

static void build(struct built *built, enum index_policy policy, bool with_values)
{
    *built = (struct built){0};
    assert_true(data_generate(&built->data, DATA_ATTENTION, TOKENS, 32, 2, 4, 1, 11));
    const struct tree_memory memory = {&built->index_arena, &built->row_arena, with_values};
    assert_true(tree_create(&built->tree, &memory, &built->data, policy, 5));
    assert_true(tree_build(&built->tree, &built->data, built->data.lanes, TOKENS / 2, &built->costs));
    for (uint32_t i = TOKENS / 2; i < TOKENS; i++) {
        assert_true(tree_insert(&built->tree, &built->data, built->data.lanes, i, &built->costs, NULL));
    }
}

static void clear(struct built *built)
{
    tree_destroy(&built->tree);
    assert_int_equal(built->index_arena.live_bytes, 0);
    assert_int_equal(built->row_arena.live_bytes, 0);
    arena_fini(&built->index_arena);
    arena_fini(&built->row_arena);
    data_fini(&built->data);
}

static void check_rows(const struct built *built)
{
    const struct rows *rows = &built->tree.rows;
    const size_t key_bytes = data_row_bytes(&built->data);
    for (uint32_t i = 0; i < TOKENS; i++) {
        struct index_place place;
        index_locate(built->tree.index, i, 1, &place);
        const uint8_t *row = rows_at(rows, place), *wanted = (const uint8_t *)built->data.lanes[0].rows + i * key_bytes;
        assert_memory_equal(row, wanted, key_bytes);
        if (rows->row_bytes > key_bytes) {
            assert_true(rows_is_right(row, row + key_bytes, wanted, key_bytes));
            assert_false(rows_is_right(row, row, wanted, key_bytes));
        }
    }
}

static void rows_follow_plans(void **state)
{
    (void)state;
    for (enum index_policy policy = INDEX_MEANS; policy <= INDEX_PROMOTION; policy++) {
        for (int with_values = 0; with_values < 2; with_values++) {
            struct built built;
            build(&built, policy, with_values != 0);
            check_rows(&built);
            assert_true(tree_drain(&built.tree, &built.costs));
            check_rows(&built);
            // Pages that are not in use are given back.
            uint32_t in_use = 0, provided = 0;
            for (uint32_t page = 0; page < built.tree.rows.room; page++) {
                const bool used =
                    page < index_page_bound(built.tree.index) && index_page_rows(built.tree.index, page) > 0;
                in_use += used;
                provided += built.tree.rows.pages[page] != NULL;
            }
            assert_int_equal(provided, in_use);
            clear(&built);
        }
    }
}

static void clustering_keeps_up(void **state)
{
    (void)state;
    for (enum index_policy policy = INDEX_MEANS; policy <= INDEX_PROMOTION; policy++) {
        struct built built;
        build(&built, policy, false);
        assert_true(tree_drain(&built.tree, &built.costs));
        assert_true(built.costs.behind <= BATCH_MAX);
        assert_int_equal(built.costs.build_tokens, TOKENS / 2);
        assert_int_equal(built.costs.inserted, TOKENS - TOKENS / 2);
        assert_true(built.costs.build_ns > 0 && built.costs.insert_ns > 0);
        clear(&built);
    }
}

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static void needed_is_the_least(void **state)
{
    (void)state;
    static float sorted[TOKENS];
    struct data data;
    struct arena arena = {0};
    struct scan_keys keys;
    struct reference reference;
    assert_true(data_generate(&data, DATA_ATTENTION, TOKENS, 32, 2, 4, 1, 12));
    data.sinks = 3;
    data.window = 20;
    void *memory = arena_acquire(&arena, scan_keys_bytes(SCAN_F32, TOKENS, 32));
    assert_non_null(memory);
    scan_keys_pack(&keys, SCAN_F32, data.lanes[0].keys, TOKENS, 32, memory);
    assert_true(reference_create(&reference, &data, data.lanes, &keys, scan_ops_best()));
    for (uint32_t q = 0; q < data.query_count; q++) {
        uint32_t first, end, wanted = 0;
        data_range(&data, data.lanes, q, &first, &end);
        for (uint32_t i = first; i < end; i++) {
            sorted[i - first] = reference.masses[(size_t)q * TOKENS + i];
        }
        qsort(sorted, end - first, sizeof sorted[0], descending);
        double sum = reference.ends[q];
        while (sum < 0.4) {
            sum += (double)sorted[wanted++];
        }
        assert_int_equal(reference_needed(&reference, q, 0.4, TOKENS), wanted);
        assert_int_equal(reference_needed(&reference, q, 0.4, wanted), wanted);
        assert_int_equal(reference_needed(&reference, q, 0.4, wanted - 1), UINT32_MAX);
        assert_int_equal(reference_needed(&reference, q, reference.ends[q] / 2, 10), 0);
    }
    reference_fini(&reference);
    arena_fini(&arena);
    data_fini(&data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_follow_plans),
        cmocka_unit_test(clustering_keeps_up),
        cmocka_unit_test(needed_is_the_least),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
