// Unit tests of the generators and of fp16: the distribution is what it is meant to be, and a seed fixes it.
#include "data.h"
#include "random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void normals(void **state)
{
    (void)state;
    struct random random;
    random_init(&random, 3);
    double sums[5] = {0};
    const int count = 400000;
    for (int i = 0; i < count; i++) {
        const double x = random_normal(&random);
        for (int power = 1; power < 5; power++) {
            sums[power] += pow(x, power) / count;
        }
    }
    assert_true(fabs(sums[1]) < 0.01 && fabs(sums[2] - 1) < 0.01 && fabs(sums[3]) < 0.03 && fabs(sums[4] - 3) < 0.08);
}

static void chosen_are_distinct(void **state)
{
    (void)state;
    struct random random;
    random_init(&random, 4);
    for (int round = 0; round < 100; round++) {
        uint32_t chosen[6];
        random_choose(&random, 16, 6, chosen);
        uint32_t seen = 0;
        for (int i = 0; i < 6; i++) {
            assert_in_range(chosen[i], 0, 15);
            seen |= 1u << chosen[i];
        }
        assert_int_equal(__builtin_popcount(seen), 6);
    }
}

static void halves_round_trip(void **state)
{
    (void)state;
    for (uint32_t half = 0; half < 0x10000; half++) {
        if ((half & 0x7c00u) != 0x7c00u) { // finite
            assert_int_equal(data_half_of(data_of_half((uint16_t)half)), half);
        }
    }
    assert_int_equal(data_half_of(1.0f + 0x1p-11f), 0x3c00);     // a tie goes to even
    assert_int_equal(data_half_of(1.0f + 3 * 0x1p-11f), 0x3c02); // likewise
    assert_int_equal(data_half_of(1.0f + 0x1.02p-11f), 0x3c01);  // above the tie
    assert_true(isinf(data_of_half(0x7c00)) && isnan(data_of_half(0x7e00)));
}

struct statistics {
    double mean_norm, mean_top; // of keys; of queries' heads: attention of the best 256 tokens
    double low_top, high_top;   // tenth parts at the ends
    uint32_t massive;           // channels whose mean is large
};

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double top_share(const struct data *data, const float *query, uint32_t count)
{
    const float *keys = data->lanes[0].keys;
    float *logits = malloc(data->tokens * sizeof *logits);
    assert_non_null(logits);
    for (uint32_t i = 0; i < data->tokens; i++) {
        float dot = 0;
        for (uint32_t j = 0; j < data->head_dim; j++) {
            dot += keys[(size_t)i * data->head_dim + j] * query[j];
        }
        logits[i] = dot * data->scale;
    }
    qsort(logits, data->tokens, sizeof *logits, descending);
    double sum = 0, best = 0;
    for (uint32_t i = 0; i < data->tokens; i++) {
        const double mass = exp((double)(logits[i] - logits[0]));
        sum += mass;
        best += i < count ? mass : 0;
    }
    free(logits);
    return best / sum;
}

static struct statistics statistics_of(const struct data *data)
{
    struct statistics result = {0};
    double means[INDEX_HEAD_DIM_MAX] = {0};
    for (uint32_t i = 0; i < data->tokens; i++) {
        double square = 0;
        for (uint32_t j = 0; j < data->head_dim; j++) {
            const double x = (double)data->lanes[0].keys[(size_t)i * data->head_dim + j];
            square += x * x;
            means[j] += x / data->tokens;
        }
        result.mean_norm += sqrt(square) / data->tokens;
    }
    for (uint32_t j = 0; j < data->head_dim; j++) {
        result.massive += fabs(means[j]) > 3;
    }
    double tops[256];
    const uint32_t heads = data->query_count * data->query_heads;
    assert_in_range(heads, 10, 256);
    for (uint32_t i = 0; i < heads; i++) {
        tops[i] = top_share(data, data->lanes[0].queries + (size_t)i * data->head_dim, 256);
        result.mean_top += tops[i] / heads;
    }
    qsort(tops, heads, sizeof *tops, ascending);
    result.low_top = tops[heads / 10];
    result.high_top = tops[heads - 1 - heads / 10];
    return result;
}

static void attention_is_attention_like(void **state)
{
    (void)state;
    struct data data;
    assert_true(data_generate(&data, DATA_ATTENTION, 8192, 128, 4, 32, 1, 11));
    const struct statistics found = statistics_of(&data);
    print_message("norm %.1f, best 256: mean %.2f, tenths %.2f and %.2f, massive channels %u\n", found.mean_norm,
                  found.mean_top, found.low_top, found.high_top, found.massive);
    assert_true(found.mean_norm > 17 && found.mean_norm < 26);
    assert_in_range(found.massive, 5, 7);
    assert_true(found.mean_top > 0.5 && found.mean_top < 0.9);
    assert_true(found.low_top < 0.55 && found.high_top > 0.9);
    data_fini(&data);
}

static void neighbours_share_clusters(void **state)
{
    (void)state;
    struct data data;
    assert_true(data_generate(&data, DATA_ATTENTION, 4096, 64, 2, 16, 1, 5));
    const float *keys = data.lanes[0].keys;
    double next = 0, far = 0;
    for (uint32_t i = 0; i + 2000 < data.tokens; i++) {
        for (uint32_t j = 0; j < 64; j++) {
            const double a = (double)(keys[i * 64 + j] - keys[(i + 1) * 64 + j]);
            const double b = (double)(keys[i * 64 + j] - keys[(i + 1999) * 64 + j]);
            next += a * a;
            far += b * b;
        }
    }
    assert_true(next < 0.8 * far);
    data_fini(&data);
}

// Which tokens are among the 64 with the largest mass, summed over the heads.
static void choose(const float *keys, uint32_t tokens, const float *queries, const struct generator_shape *shape,
                   bool *chosen)
{
    double *mass = calloc(tokens, sizeof *mass), *sorted = malloc(tokens * sizeof *sorted);
    double *logits = malloc(tokens * sizeof *logits);
    assert_true(mass != NULL && sorted != NULL && logits != NULL);
    for (uint32_t h = 0; h < shape->query_heads; h++) {
        double sum = 0;
        for (uint32_t i = 0; i < tokens; i++) {
            double dot = 0;
            for (uint32_t j = 0; j < shape->head_dim; j++) {
                dot += (double)(keys[(size_t)i * shape->head_dim + j] * queries[h * shape->head_dim + j]);
            }
            logits[i] = exp(dot / sqrt(shape->head_dim) - 40);
            sum += logits[i];
        }
        for (uint32_t i = 0; i < tokens; i++) {
            mass[i] += logits[i] / sum;
        }
    }
    memcpy(sorted, mass, tokens * sizeof *sorted);
    qsort(sorted, tokens, sizeof *sorted, ascending);
    for (uint32_t i = 0; i < tokens; i++) {
        chosen[i] = mass[i] >= sorted[tokens - 64];
    }
    free(mass);
    free(sorted);
    free(logits);
}

// Adds the share of a step's best tokens that were those of the step before, and of 8 steps before.
static void add_kept(bool steps, uint64_t seed, double *next, double *later)
{
    enum { TOKENS = 4096, STEPS = 48, DIM = 64 };
    const struct generator_shape shape = {TOKENS, DIM, 4, STEPS, steps};
    float *keys = malloc(sizeof(float) * TOKENS * DIM), *queries = malloc(sizeof(float) * STEPS * 4 * DIM);
    bool *chosen = malloc((size_t)STEPS * TOKENS);
    assert_true(keys != NULL && queries != NULL && chosen != NULL);
    assert_true(generate_attention(&shape, seed, keys, queries));
    for (uint32_t step = 0; step < STEPS; step++) {
        const bool *now = chosen + (size_t)step * TOKENS;
        choose(keys, TOKENS, queries + (size_t)step * 4 * DIM, &shape, chosen + (size_t)step * TOKENS);
        for (uint32_t i = 0; i < TOKENS; i++) {
            *next += step >= 1 && now[i] && *(now + i - TOKENS) ? 1.0 / 64 / (STEPS - 1) : 0;
            *later += step >= 8 && now[i] && *(now + i - 8 * TOKENS) ? 1.0 / 64 / (STEPS - 8) : 0;
        }
    }
    free(keys);
    free(queries);
    free(chosen);
}

// The longer the sequence, the less independent queries share; here it is a fifth.
static void steps_resemble_each_other(void **state)
{
    (void)state;
    double next = 0, later = 0, alone = 0, alone_later = 0;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        add_kept(true, seed, &next, &later);
        add_kept(false, seed, &alone, &alone_later);
    }
    print_message("kept: %.3f by the next step, %.3f by the 8th; %.3f and %.3f by independent queries\n", next / 6,
                  later / 6, alone / 6, alone_later / 6);
    assert_true(next > 1.3 * alone && next / 6 < 0.5);
    assert_true(later < 0.75 * next && fabs(alone - alone_later) < 0.2 * alone);
}

static void gauss_has_no_structure(void **state)
{
    (void)state;
    struct data data;
    assert_true(data_generate(&data, DATA_GAUSS, 8192, 128, 4, 16, 1, 12));
    const struct statistics found = statistics_of(&data);
    assert_true(fabs(found.mean_norm - 11.3) < 0.2);
    assert_int_equal(found.massive, 0);
    assert_true(found.mean_top < 0.4);
    data_fini(&data);
}

static void seeds_fix_the_data(void **state)
{
    (void)state;
    struct data a, b, c;
    assert_true(data_generate(&a, DATA_ATTENTION, 512, 32, 2, 3, 2, 7));
    assert_true(data_generate(&b, DATA_ATTENTION, 512, 32, 2, 3, 2, 7));
    assert_true(data_generate(&c, DATA_ATTENTION, 512, 32, 2, 3, 2, 8));
    const size_t bytes = (size_t)512 * 32 * sizeof(float);
    assert_memory_equal(a.lanes[1].keys, b.lanes[1].keys, bytes);
    assert_memory_equal(a.lanes[1].queries, b.lanes[1].queries, (size_t)3 * 2 * 32 * sizeof(float));
    assert_memory_not_equal(a.lanes[1].keys, c.lanes[1].keys, bytes);
    assert_memory_not_equal(a.lanes[0].keys, a.lanes[1].keys, bytes);
    for (size_t i = 0; i < (size_t)512 * 32; i++) {
        assert_true(data_of_half(((const uint16_t *)a.lanes[0].rows)[i]) == a.lanes[0].keys[i]);
    }
    data_fini(&a);
    data_fini(&b);
    data_fini(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(normals),
        cmocka_unit_test(chosen_are_distinct),
        cmocka_unit_test(halves_round_trip),
        cmocka_unit_test(attention_is_attention_like),
        cmocka_unit_test(neighbours_share_clusters),
        cmocka_unit_test(steps_resemble_each_other),
        cmocka_unit_test(gauss_has_no_structure),
        cmocka_unit_test(seeds_fix_the_data),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
