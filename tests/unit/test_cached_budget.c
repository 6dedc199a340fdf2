// The byte budget: caps, promises, and that other takers leave promised bytes alone.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/budget.h"

static void test_cap(void **state)
{
    (void)state;
    struct budget budget;
    budget_init(&budget, 100);
    assert_true(budget_take(&budget, NULL, 60));
    assert_false(budget_take(&budget, NULL, 41));
    assert_false(budget_take(&budget, NULL, UINT64_MAX));
    assert_true(budget_take(&budget, NULL, 40));
    assert_int_equal(budget_used(&budget), 100);
    budget_give(&budget, 100);
    assert_int_equal(budget_used(&budget), 0);
    budget_fini(&budget);
}

static void test_promises(void **state)
{
    (void)state;
    struct budget budget;
    struct reservation mine = {0}, other = {0};
    budget_init(&budget, 100);
    assert_true(budget_reserve(&budget, &mine, 70));
    assert_false(budget_reserve(&budget, &other, 31));
    assert_false(budget_reserve(&budget, &other, UINT64_MAX));
    assert_false(budget_take(&budget, NULL, 31));
    assert_true(budget_take(&budget, NULL, 30));
    assert_true(budget_take(&budget, &mine, 50));
    assert_int_equal(mine.rest_bytes, 20);
    assert_false(budget_take(&budget, &mine, 21)); // beyond the promise there is nothing
    assert_int_equal(mine.rest_bytes, 20);
    budget_give(&budget, 30);
    assert_true(budget_take(&budget, &mine, 30)); // 20 promised and 10 free
    assert_int_equal(mine.rest_bytes, 0);
    assert_true(budget_reserve(&budget, &mine, 20));
    assert_true(budget_reserve(&budget, &mine, 5)); // set, not added
    assert_true(budget_reserve(&budget, &other, 15));
    assert_false(budget_take(&budget, NULL, 1));
    budget_unreserve(&budget, &mine);
    budget_unreserve(&budget, &other);
    assert_true(budget_take(&budget, NULL, 20));
    budget_give(&budget, 100);
    assert_int_equal(budget_used(&budget), 0);
    assert_int_equal(budget.promised_bytes, 0);
    budget_fini(&budget);
}

static void *hammer(void *argument)
{
    struct budget *budget = argument;
    struct reservation reservation = {0};
    for (int i = 0; i < 5000; i++) {
        if (budget_reserve(budget, &reservation, 10)) {
            if (!budget_take(budget, &reservation, 10))
                return "a promise was broken";
            budget_give(budget, 10);
        }
        if (budget_take(budget, NULL, 7))
            budget_give(budget, 7);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    struct budget budget;
    pthread_t threads[4];
    budget_init(&budget, 25);
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, hammer, &budget), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        assert_null(wrong);
    }
    assert_int_equal(budget_used(&budget), 0);
    assert_int_equal(budget.promised_bytes, 0);
    budget_fini(&budget);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cap), cmocka_unit_test(test_promises),
                                       cmocka_unit_test(test_threads)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
