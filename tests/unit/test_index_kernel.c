// Kernels: exact conversions, the same bits on every instruction set, and T_K / T_Q.
#include "test_index_owner.h"

#include "index/tree.h"

static void fp16_is_exact(void **state)
{
    (void)state;
    uint16_t halves[16];
    float out[16];
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        for (uint32_t base = 0; base < 65536; base += 16) {
            for (uint32_t i = 0; i < 16; i++) {
                halves[i] = (uint16_t)(base + i);
            }
            dci_kernel_at(k)->widen(INDEX_FP16, halves, 16, out);
            for (uint32_t i = 0; i < 16; i++) {
                const float expected = half_to_float(halves[i]);
                if (isnan(expected)) {
                    assert_true(isnan(out[i]));
                } else {
                    assert_memory_equal(&out[i], &expected, sizeof expected);
                }
            }
        }
    }
}

static void bf16_is_the_upper_half(void **state)
{
    (void)state;
    uint16_t halves[16];
    uint32_t out[16];
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        for (uint32_t base = 0; base < 65536; base += 16) {
            for (uint32_t i = 0; i < 16; i++) {
                halves[i] = (uint16_t)(base + i);
            }
            dci_kernel_at(k)->widen(INDEX_BF16, halves, 16, (float *)out);
            for (uint32_t i = 0; i < 16; i++) {
                assert_int_equal(out[i], (base + i) << 16);
            }
        }
    }
}

// Every instruction set against the portable kernels, bit for bit.
static void all_sets_agree(void **state)
{
    (void)state;
    struct rng rng = rng_begin(11);
    const struct dci_kernel *base = dci_kernel_at(0);
    enum { VIEWS = 3 };
    for (uint32_t round = 0; round < 200; round++) {
        const uint32_t n = 16 * (1 + rng_below(&rng, 16));
        float queries[VIEWS * 256], rows[16 * 256], scores[2][VIEWS * 16], preview[2][16], masses[2][16];
        float top[2][VIEWS], total[2][VIEWS], reference[VIEWS], exponents[37];
        for (uint32_t i = 0; i < VIEWS * n; i++) {
            queries[i] = rng_normal(&rng);
        }
        for (uint32_t i = 0; i < 16 * n; i++) {
            rows[i] = rng_normal(&rng) * (round % 2 == 0 ? 1.0f : 100.0f);
        }
        for (uint32_t i = 0; i < 37; i++) {
            exponents[i] = 20.0f * rng_normal(&rng);
        }
        for (uint32_t k = 1; dci_kernel_at(k) != NULL; k++) {
            const struct dci_kernel *kernels[2] = {base, dci_kernel_at(k)};
            float dot[2], distance[2], sum[2], one[2];
            for (uint32_t s = 0; s < 2; s++) {
                dot[s] = kernels[s]->dot(queries, rows, n);
                distance[s] = kernels[s]->distance2(queries, rows, n);
                sum[s] = kernels[s]->exp_sum(exponents, 37);
                one[s] = kernels[s]->exp_one(exponents[0]);
                kernels[s]->score16(queries, VIEWS, rows, n, 0.1f, scores[s]);
                scores[s][5] = DCI_HIDDEN;
                for (uint32_t v = 0; v < VIEWS; v++) {
                    top[s][v] = v == 0 ? DCI_HIDDEN : 0.5f;
                    total[s][v] = v == 0 ? 0.0f : 2.0f;
                    reference[v] = 1.0f;
                }
                kernels[s]->fold16(scores[s], VIEWS, reference, top[s], total[s], preview[s]);
                kernels[s]->weigh16(scores[s], VIEWS, top[s], reference, masses[s]);
            }
            assert_memory_equal(&dot[0], &dot[1], sizeof dot[0]);
            assert_memory_equal(&distance[0], &distance[1], sizeof distance[0]);
            assert_memory_equal(&sum[0], &sum[1], sizeof sum[0]);
            assert_memory_equal(&one[0], &one[1], sizeof one[0]);
            assert_memory_equal(scores[0], scores[1], sizeof scores[0]);
            assert_memory_equal(top[0], top[1], sizeof top[0]);
            assert_memory_equal(total[0], total[1], sizeof total[0]);
            assert_memory_equal(preview[0], preview[1], sizeof preview[0]);
            assert_memory_equal(masses[0], masses[1], sizeof masses[0]);
        }
    }
}

static void sums_are_right(void **state)
{
    (void)state;
    struct rng rng = rng_begin(12);
    const struct dci_kernel *kernel = dci_kernel_best();
    for (uint32_t round = 0; round < 200; round++) {
        const uint32_t n = 16 * (1 + rng_below(&rng, 16));
        float a[256], b[256];
        double dot = 0.0, distance = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            a[i] = rng_normal(&rng);
            b[i] = rng_normal(&rng);
            dot += (double)a[i] * (double)b[i];
            distance += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        }
        assert_true(fabs((double)kernel->dot(a, b, n) - dot) < 1e-4);
        assert_true(fabs((double)kernel->distance2(a, b, n) - distance) < 1e-4 * distance);
    }
    for (float x = -87.0f; x < 88.0f; x += 0.0137f) {
        const double expected = exp((double)x);
        assert_true(fabs((double)dci_exp(x) - expected) < 4e-7 * expected);
    }
    assert_true(dci_exp(-88.0f) == 0.0f && dci_exp(DCI_HIDDEN) == 0.0f && dci_exp(-INFINITY) == 0.0f);
    assert_true(dci_exp(1e30f) < INFINITY && dci_exp(0.0f) == 1.0f);
    for (float x = 1e-30f; x < 1e30f; x *= 1.37f) {
        const double expected = log((double)x);
        assert_true(fabs((double)dci_log(x) - expected) < 1e-6 * (fabs(expected) + 1.0));
    }
    assert_true(dci_log(1.0f) == 0.0f);
}

// Running log-sum-exp over blocks, with hidden lanes, against double precision.
static void fold_is_a_log_sum_exp(void **state)
{
    (void)state;
    struct rng rng = rng_begin(13);
    for (uint32_t round = 0; round < 100; round++) {
        float top = DCI_HIDDEN, total = 0.0f, preview[16];
        const float reference = 0.0f;
        double sum = 0.0;
        const float stretch = round % 3 == 0 ? 30.0f : 1.0f;
        for (uint32_t block = 0; block < 8; block++) {
            float scores[16];
            for (uint32_t i = 0; i < 16; i++) {
                scores[i] = rng_below(&rng, 4) == 0 ? DCI_HIDDEN : stretch * rng_normal(&rng);
                sum += scores[i] == DCI_HIDDEN ? 0.0 : exp((double)scores[i]);
            }
            dci_kernel_best()->fold16(scores, 1, &reference, &top, &total, preview);
        }
        assert_true(fabs((double)top + log((double)total) - log(sum)) < 1e-5);
    }
}

// In the space of T_K and T_Q the nearest key is the one with the largest inner product (paper, section 3.1), and
// dci_affinity orders keys by their distance there.
static void transforms_order_by_inner_product(void **state)
{
    (void)state;
    struct rng rng = rng_begin(14);
    enum { DIM = 32, KEYS = 60 };
    float keys[KEYS][DIM], mapped[KEYS][DIM + 1], query[DIM], mapped_query[DIM + 1];
    for (uint32_t round = 0; round < 50; round++) {
        float norm2[KEYS], norm2_max = 0.0f;
        for (uint32_t k = 0; k < KEYS; k++) {
            const float length = 0.1f + (float)rng_below(&rng, 100) / 10.0f;
            for (uint32_t j = 0; j < DIM; j++) {
                keys[k][j] = length * rng_normal(&rng);
            }
            norm2[k] = dci_kernel_at(0)->dot(keys[k], keys[k], DIM);
            norm2_max = norm2[k] > norm2_max ? norm2[k] : norm2_max;
        }
        for (uint32_t j = 0; j < DIM; j++) {
            query[j] = rng_normal(&rng);
        }
        dci_transform_query(query, DIM, mapped_query);
        for (uint32_t k = 0; k < KEYS; k++) {
            double length = 0.0;
            dci_transform_key(keys[k], DIM, sqrtf(norm2_max), mapped[k]);
            for (uint32_t j = 0; j <= DIM; j++) {
                length += (double)mapped[k][j] * (double)mapped[k][j];
            }
            assert_true(fabs(length - 1.0) < 1e-5);
        }
        double to_query[KEYS], inner[KEYS], to_first[KEYS], affinity[KEYS];
        for (uint32_t k = 0; k < KEYS; k++) {
            to_query[k] = to_first[k] = 0.0;
            for (uint32_t j = 0; j <= DIM; j++) {
                to_query[k] += pow((double)mapped[k][j] - (double)mapped_query[j], 2);
                to_first[k] += pow((double)mapped[k][j] - (double)mapped[0][j], 2);
            }
            inner[k] = (double)dci_kernel_at(0)->dot(query, keys[k], DIM);
            const float dot = dci_kernel_at(0)->dot(keys[0], keys[k], DIM);
            affinity[k] = (double)dci_affinity(dot, dci_slack(norm2[0], norm2_max), dci_slack(norm2[k], norm2_max));
        }
        for (uint32_t a = 0; a < KEYS; a++) {
            for (uint32_t b = 0; b < KEYS; b++) {
                if (to_query[a] < to_query[b] - 1e-5) {
                    assert_true(inner[a] > inner[b]);
                }
                if (to_first[a] < to_first[b] - 1e-5) {
                    assert_true(affinity[a] > affinity[b]);
                }
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fp16_is_exact),         cmocka_unit_test(bf16_is_the_upper_half),
        cmocka_unit_test(all_sets_agree),        cmocka_unit_test(sums_are_right),
        cmocka_unit_test(fold_is_a_log_sum_exp), cmocka_unit_test(transforms_order_by_inner_product),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
