// Unit tests of the scans: every instruction set's kernels against the portable ones, and the stream's selection
// against a plain one.
#include "random.h"
#include "scan.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TOKENS_MAX 5000u

static const char *const names[] = {"avx2", "avx512vnni"};

struct lane {
    uint32_t tokens, dim, heads;
    float *rows, *queries;
    void *memory[SCAN_FORMATS];
    struct scan_keys keys[SCAN_FORMATS];
    struct scan_query query[SCAN_FORMATS];
};

static void lane_init(struct lane *lane, uint32_t tokens, uint32_t dim, uint32_t heads, uint64_t seed)
{
    struct random random;
    random_init(&random, seed);
    *lane = (struct lane){.tokens = tokens, .dim = dim, .heads = heads};
    lane->rows = malloc((size_t)tokens * dim * sizeof(float));
    lane->queries = malloc((size_t)heads * dim * sizeof(float));
    assert_true(lane->rows != NULL && lane->queries != NULL);
    for (size_t i = 0; i < (size_t)tokens * dim; i++) {
        lane->rows[i] = (float)random_normal(&random) + (i % dim == 3 ? 5.0f : 0.0f);
    }
    for (size_t i = 0; i < (size_t)heads * dim; i++) {
        lane->queries[i] = (float)random_normal(&random) * 2;
    }
    for (uint32_t f = 0; f < SCAN_FORMATS; f++) {
        // No byte more than promised is written; the read-ahead is only a hint.
        lane->memory[f] = aligned_alloc(64, scan_keys_bytes(f, tokens, dim));
        assert_non_null(lane->memory[f]);
        scan_keys_pack(&lane->keys[f], f, lane->rows, tokens, dim, lane->memory[f]);
        scan_query_init(&lane->query[f], f, lane->queries, heads, dim, 1 / sqrtf((float)dim));
    }
}

static void lane_fini(struct lane *lane)
{
    free(lane->rows);
    free(lane->queries);
    for (uint32_t f = 0; f < SCAN_FORMATS; f++) {
        free(lane->memory[f]);
    }
}

static uint32_t blocks_of(const struct lane *lane)
{
    return (lane->tokens + SCAN_LANES - 1) / SCAN_LANES;
}

static void *scores_of(const struct lane *lane, const struct scan_ops *ops, enum scan_format format)
{
    const size_t count = (size_t)blocks_of(lane) * lane->heads * SCAN_LANES;
    void *scores = calloc(count, sizeof(float));
    assert_non_null(scores);
    ops->score[format](&lane->keys[format], &lane->query[format], 0, blocks_of(lane), scores);
    return scores;
}

static void same_integers(void **state)
{
    (void)state;
    static const uint32_t dims[] = {16, 64, 128, 208, 256}, heads[] = {1, 2, 3, 4, 5, 8, 13};
    for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
        for (size_t h = 0; h < sizeof heads / sizeof heads[0]; h++) {
            struct lane lane;
            lane_init(&lane, 16 * 9 + 5, dims[d], heads[h], d * 100 + h);
            int32_t *wanted = scores_of(&lane, &scan_ops_portable, SCAN_I8);
            for (size_t n = 0; n < sizeof names / sizeof names[0]; n++) {
                const struct scan_ops *ops = scan_ops_named(names[n]);
                if (ops == NULL) {
                    print_message("no %s here\n", names[n]);
                    continue;
                }
                int32_t *got = scores_of(&lane, ops, SCAN_I8);
                assert_memory_equal(got, wanted, blocks_of(&lane) * lane.heads * SCAN_LANES * sizeof(int32_t));
                free(got);
            }
            free(wanted);
            lane_fini(&lane);
        }
    }
}

// The largest sums that codes can give must not saturate anywhere.
static void extreme_codes(void **state)
{
    (void)state;
    struct lane lane;
    lane_init(&lane, 16, 256, 4, 1);
    memset(lane.memory[SCAN_I8], 255, (size_t)16 * 256);
    memset(lane.query[SCAN_I8].words, 0x81, sizeof(int32_t) * 4 * 64); // -127
    for (uint32_t h = 0; h < 4; h++) {
        lane.query[SCAN_I8].sum[h] = -127 * 256;
    }
    for (size_t n = 0; n < sizeof names / sizeof names[0]; n++) {
        const struct scan_ops *ops = scan_ops_named(names[n]);
        int32_t *got = scores_of(&lane, ops != NULL ? ops : &scan_ops_portable, SCAN_I8);
        for (uint32_t i = 0; i < 64; i++) {
            assert_int_equal(got[i], -127 * 127 * 256);
        }
        free(got);
    }
    lane_fini(&lane);
}

static double logit(const struct lane *lane, uint32_t head, uint32_t token)
{
    double sum = 0;
    for (uint32_t j = 0; j < lane->dim; j++) {
        sum += (double)lane->queries[head * lane->dim + j] * (double)lane->rows[(size_t)token * lane->dim + j];
    }
    return sum / sqrt(lane->dim);
}

static void float_scores_are_dots(void **state)
{
    (void)state;
    struct lane lane;
    lane_init(&lane, 333, 64, 3, 7);
    static const char *const all[] = {"portable", "avx2", "avx512vnni"};
    for (size_t n = 0; n < sizeof all / sizeof all[0]; n++) {
        const struct scan_ops *ops = scan_ops_named(all[n]);
        for (enum scan_format f = SCAN_F32; ops != NULL && f <= SCAN_BF16; f++) {
            float *got = scores_of(&lane, ops, f);
            for (uint32_t i = 0; i < lane.tokens; i++) {
                for (uint32_t h = 0; h < lane.heads; h++) {
                    const float score = got[((size_t)(i / 16) * lane.heads + h) * SCAN_LANES + i % 16];
                    assert_true(fabs((double)score - logit(&lane, h, i)) < (f == SCAN_F32 ? 1e-4 : 0.1));
                }
            }
            free(got);
        }
    }
    lane_fini(&lane);
}

// Mean softmax over the heads, by definition.
static void masses_of(const struct lane *lane, uint32_t visible, double *masses)
{
    memset(masses, 0, lane->tokens * sizeof *masses);
    for (uint32_t h = 0; h < lane->heads; h++) {
        double sum = 0;
        for (uint32_t i = 0; i < visible; i++) {
            sum += exp(logit(lane, h, i));
        }
        for (uint32_t i = 0; i < visible; i++) {
            masses[i] += exp(logit(lane, h, i)) / sum / lane->heads;
        }
    }
}

static int descending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

static void check_selection(const struct lane *lane, const struct scan_ops *ops, enum scan_format format,
                            uint32_t visible, uint32_t low, uint32_t high, uint32_t budget)
{
    static double masses[TOKENS_MAX], best[TOKENS_MAX];
    static struct scan_selected selected[TOKENS_MAX];
    static bool taken[TOKENS_MAX];
    struct scan_stream *stream = scan_stream_create(ops, budget, lane->heads);
    assert_non_null(stream);
    const uint32_t count =
        scan_select(stream, &lane->keys[format], &lane->query[format], visible, low, high, budget, selected);
    assert_int_equal(count, budget < high - low ? budget : high - low);
    masses_of(lane, visible, masses);
    memcpy(best, masses + low, (high - low) * sizeof *best);
    qsort(best, high - low, sizeof *best, descending);
    double wanted = 0, got = 0;
    memset(taken, 0, sizeof taken);
    for (uint32_t i = 0; i < count; i++) {
        assert_in_range(selected[i].position, low, high - 1);
        assert_false(taken[selected[i].position]);
        taken[selected[i].position] = true;
        got += masses[selected[i].position];
        wanted += best[i];
    }
    assert_true(got > wanted * (format == SCAN_F32 ? 0.9999 : 0.99));
    scan_stream_destroy(stream);
}

static void selections_are_the_best(void **state)
{
    (void)state;
    static const char *const all[] = {"portable", "avx2", "avx512vnni"};
    static const uint32_t heads[] = {1, 2, 4, 8};
    for (size_t h = 0; h < sizeof heads / sizeof heads[0]; h++) {
        struct lane lane;
        lane_init(&lane, TOKENS_MAX - 3, 64, heads[h], 40 + h);
        for (size_t n = 0; n < sizeof all / sizeof all[0]; n++) {
            const struct scan_ops *ops = scan_ops_named(all[n]);
            for (enum scan_format f = SCAN_F32; ops != NULL && f < SCAN_FORMATS; f++) {
                check_selection(&lane, ops, f, lane.tokens, 0, lane.tokens, 64);
                check_selection(&lane, ops, f, 4001, 16, 4001 - 64, 256);
                check_selection(&lane, ops, f, 70, 10, 40, 64);
            }
        }
        lane_fini(&lane);
    }
}

static void partition_moves_the_largest(void **state)
{
    (void)state;
    struct random random;
    random_init(&random, 5);
    for (uint32_t n = 1; n < 200; n += 7) {
        float values[200];
        uint32_t order[200];
        for (uint32_t i = 0; i < n; i++) {
            values[i] = (float)random_below(&random, 40); // with ties
            order[i] = i;
        }
        float before[200];
        memcpy(before, values, sizeof values);
        const uint32_t count = 1 + random_below(&random, n);
        scan_partition(values, order, n, count);
        float least = values[0], most = -1;
        for (uint32_t i = 0; i < n; i++) {
            assert_true(values[i] == before[order[i]]);
            least = i < count && values[i] < least ? values[i] : least;
            most = i >= count && values[i] > most ? values[i] : most;
        }
        assert_true(least >= most);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_integers),
        cmocka_unit_test(extreme_codes),
        cmocka_unit_test(float_scores_are_dots),
        cmocka_unit_test(selections_are_the_best),
        cmocka_unit_test(partition_moves_the_largest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
