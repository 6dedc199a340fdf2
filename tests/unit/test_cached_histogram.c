// The latency histogram: its quantiles against the sorted values, at every magnitude.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/histogram.h"

#include <stdlib.h>

#define COUNT 2000u

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void test_error_bound(void **state)
{
    (void)state;
    static uint64_t values[COUNT];
    static const double quantiles[] = {0, 0.1, 0.5, 0.9, 0.99, 0.999, 1};
    for (unsigned bits = 1; bits <= 64; bits++) {
        static struct histogram histogram;
        histogram = (struct histogram){0};
        uint64_t x = bits;
        for (unsigned i = 0; i < COUNT; i++) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            values[i] = (x ^ x >> 33) >> (64 - bits);
            histogram_add(&histogram, values[i]);
        }
        qsort(values, COUNT, sizeof *values, compare);
        for (unsigned q = 0; q < sizeof quantiles / sizeof *quantiles; q++) {
            unsigned rank = (unsigned)(quantiles[q] * COUNT);
            uint64_t exact = values[rank < COUNT ? rank : COUNT - 1];
            uint64_t got = histogram_quantile(&histogram, quantiles[q]);
            assert_true(got >= exact);
            assert_true(got - exact <= exact / 16);
            assert_true(got <= values[COUNT - 1]);
        }
        assert_int_equal(histogram.count, COUNT);
        assert_int_equal(histogram.max, values[COUNT - 1]);
    }
}

static void test_ends(void **state)
{
    (void)state;
    static struct histogram histogram;
    assert_int_equal(histogram_quantile(&histogram, 0.5), 0);
    histogram_add(&histogram, 0);
    assert_int_equal(histogram_quantile(&histogram, 1), 0);
    histogram_add(&histogram, UINT64_MAX);
    assert_true(histogram_quantile(&histogram, 0.99) == UINT64_MAX);
    assert_true(histogram_quantile(&histogram, 0) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_error_bound), cmocka_unit_test(test_ends)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
