// The mixed load's plan: the same seed gives the same operations; they are those of sequences that come, grow without a
// gap, decode as long as they are there, and go; lengths stay within what is promised.
#include "serve_plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define OPERATIONS_MAX 100000u

static const struct plan_params params = {.seed = 5,
                                          .sequences = 8,
                                          .steps = 400,
                                          .prompt_least = 100,
                                          .prompt_most = 900,
                                          .chunk = 256,
                                          .decode_least = 5,
                                          .decode_most = 60};

struct model { // of one sequence
    bool is_there;
    uint32_t length;
};

struct walk {
    struct model models[PLAN_SEQUENCES_MAX];
    uint32_t counts[PLAN_KINDS];
};

static void check(struct walk *walk, const struct plan_op *op)
{
    struct model *model = &walk->models[op->sequence];
    walk->counts[op->kind]++;
    switch (op->kind) {
    case PLAN_OPEN:
        assert_false(model->is_there);
        *model = (struct model){true, 0};
        break;
    case PLAN_FORK:
        assert_false(model->is_there);
        assert_true(op->from != op->sequence && walk->models[op->from].is_there);
        assert_true(op->count > 0 && op->count % PLAN_BLOCK == 0 && op->count <= walk->models[op->from].length);
        *model = (struct model){true, op->count};
        break;
    case PLAN_APPEND:
        assert_true(model->is_there && op->first == model->length);
        assert_in_range(op->count, 1, params.chunk);
        model->length += op->count;
        break;
    case PLAN_RETRIEVE:
        assert_in_range(op->count, 1, params.sequences);
        for (uint32_t i = 0; i < op->count; i++) {
            struct model *of = &walk->models[op->list[i]];
            assert_true(of->is_there && of->length >= PLAN_BLOCK);
            assert_true(i == 0 || op->list[i] > op->list[i - 1]);
            assert_true(++of->length <= plan_length_most(&params));
        }
        break;
    case PLAN_INFO:
        assert_true(model->is_there);
        break;
    case PLAN_CLOSE:
        assert_true(model->is_there);
        model->is_there = false;
        break;
    default:
        fail();
    }
}

static void test_operations(void **state)
{
    (void)state;
    struct plan plan;
    struct walk walk = {0};
    struct plan_op op;
    uint32_t operations = 0;
    plan_init(&plan, &params);
    while (plan_next(&plan, &op)) {
        assert_in_range(op.sequence, 0, params.sequences - 1);
        assert_true(++operations < OPERATIONS_MAX);
        check(&walk, &op);
    }
    assert_false(plan_next(&plan, &op));
    for (uint32_t i = 0; i < params.sequences; i++) {
        assert_false(walk.models[i].is_there);
    }
    for (uint32_t kind = 0; kind < PLAN_KINDS; kind++) {
        assert_in_range(walk.counts[kind], 10, OPERATIONS_MAX);
    }
    assert_int_equal(walk.counts[PLAN_OPEN] + walk.counts[PLAN_FORK], walk.counts[PLAN_CLOSE]);
}

// Folds all that the operations of a seed say into one number.
static uint64_t fold(uint64_t seed)
{
    struct plan plan;
    struct plan_params of = params;
    struct plan_op op;
    uint64_t sum = 0;
    of.seed = seed;
    plan_init(&plan, &of);
    while (plan_next(&plan, &op)) {
        const uint32_t words[] = {op.kind, op.sequence, op.from, op.first, op.count};
        for (uint32_t i = 0; i < sizeof words / sizeof *words; i++) {
            sum = sum * 1000003 + words[i];
        }
        for (uint32_t i = 0; op.kind == PLAN_RETRIEVE && i < op.count; i++) {
            sum = sum * 1000003 + op.list[i];
        }
    }
    return sum;
}

static void test_seeds(void **state)
{
    (void)state;
    assert_true(fold(1) == fold(1));
    assert_true(fold(1) != fold(2));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_operations), cmocka_unit_test(test_seeds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
