// Codes: the rotation, keys in 8 and in 4 bits, what they say of inner products, and that index_check looks at them.
#include "test_index_owner.h"

#include "index/tree.h"

static double dot_of(const float *a, const float *b, uint32_t n)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static const float nothing[INDEX_HEAD_DIM_MAX];

static void codes_are_the_nearest(void **state)
{
    (void)state;
    struct rng rng = rng_begin(60);
    float x[INDEX_HEAD_DIM_MAX];
    int8_t codes[INDEX_HEAD_DIM_MAX];
    int32_t sum;
    for (uint32_t round = 0; round < 500; round++) {
        const float size = powf(10.0f, (float)rng_below(&rng, 36) - 18.0f);
        const uint32_t n = 16 * (1 + rng_below(&rng, 16));
        float largest = 0.0f;
        for (uint32_t i = 0; i < n; i++) {
            x[i] = size * rng_normal(&rng);
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        }
        for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
            const struct dci_kernel *kernel = dci_kernel_at(k);
            const int32_t most = round % 2 == 0 ? 127 : DCI_PROBE_MOST;
            float step;
            if (round % 2 == 0) {
                step = kernel->encode8(x, n, codes, &sum);
            } else {
                struct dci_probe probe;
                kernel->probe(x, nothing, n, codes, &probe);
                step = probe.step;
                sum = probe.sum;
            }
            bool reaches_the_end = false;
            for (uint32_t i = 0; i < n; i++) {
                assert_true(fabsf(x[i] - step * (float)codes[i]) <= 0.5001f * step);
                assert_true(codes[i] >= -most && codes[i] <= most);
                reaches_the_end = reaches_the_end || codes[i] == most || codes[i] == -most;
                sum -= codes[i];
            }
            assert_int_equal(sum, 0);
            assert_true(reaches_the_end && fabsf(step * (float)most - largest) <= 1e-6f * largest);
        }
    }
    memset(x, 0, sizeof x);
    x[3] = 1e-40f; // next to nothing
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        memset(codes, 1, sizeof codes);
        assert_true(dci_kernel_at(k)->encode8(x, 64, codes, &sum) == 0.0f);
        assert_int_equal(sum, 0);
        for (uint32_t i = 0; i < 64; i++) {
            assert_int_equal(codes[i], 0);
        }
    }
}

// The transform is its own inverse where no sign changes, and keeps norms and inner products.
static void hadamard_keeps_inner_products(void **state)
{
    (void)state;
    struct rng rng = rng_begin(79);
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        for (uint32_t n = 16; n <= 256; n *= 2) {
            float a[256], b[256], x[256], y[256], signs[256], ones[256];
            for (uint32_t i = 0; i < n; i++) {
                x[i] = a[i] = rng_normal(&rng);
                y[i] = b[i] = rng_normal(&rng);
                signs[i] = rng_below(&rng, 2) == 0 ? 1.0f : -1.0f;
                ones[i] = 1.0f;
            }
            dci_kernel_at(k)->hadamard(x, n, signs);
            dci_kernel_at(k)->hadamard(y, n, signs);
            assert_true(fabs(dot_of(x, x, n) - dot_of(a, a, n)) < 1e-5 * dot_of(a, a, n));
            assert_true(fabs(dot_of(x, y, n) - dot_of(a, b, n)) < 1e-4);
            dci_kernel_at(k)->hadamard(x, n, ones);
            for (uint32_t i = 0; i < n; i++) {
                assert_true(fabsf(x[i] - signs[i] * a[i]) < 1e-5f);
            }
            // One coordinate is spread over all, with the signs of a row of the matrix.
            memset(x, 0, sizeof x);
            x[5] = 1.0f;
            dci_kernel_at(k)->hadamard(x, n, ones);
            for (uint32_t i = 0; i < n; i++) {
                const float sign = __builtin_popcount(i & 5) % 2 == 0 ? 1.0f : -1.0f;
                assert_true(fabsf(x[i] - sign / sqrtf((float)n)) < 1e-6f);
            }
        }
    }
}

// The index's rotation, also where head_dim is no power of two.
static void rotation_keeps_inner_products(void **state)
{
    (void)state;
    struct rng rng = rng_begin(80);
    for (uint32_t dim = 16; dim <= 256; dim += 16) {
        struct heap heap = {0};
        const struct index_params params = {.head_dim = dim, .dtype = INDEX_FP32, .seed = rng_next(&rng)};
        const struct owner owner = owner_begin(&params, &heap, NULL);
        float a[256], b[256], x[256], y[256], largest = 0.0f;
        for (uint32_t i = 0; i < dim; i++) {
            x[i] = a[i] = i == 1 ? 100.0f : rng_normal(&rng); // one coordinate stands out
            y[i] = b[i] = rng_normal(&rng);
        }
        dci_rotate(owner.index, x);
        dci_rotate(owner.index, y);
        assert_true(fabs(dot_of(x, x, dim) - dot_of(a, a, dim)) < 1e-5 * dot_of(a, a, dim));
        assert_true(fabs(dot_of(x, y, dim) - dot_of(a, b, dim)) < 1e-3);
        for (uint32_t i = 0; i < dim; i++) {
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        }
        assert_true(largest < 45.0f);
        index_destroy(owner.index);
    }
}

// What a 5-bit code stands for, in coordinates.
static void decode5(const uint8_t *code, float scale, uint32_t n, float *out)
{
    const uint32_t half = dci_row_bytes(n);
    for (uint32_t i = 0; i < n; i++) {
        const int32_t low = i < half ? code[i] & 15 : code[i - half] >> 4, top = code[half + i / 8] >> (i % 8) & 1;
        out[i] = scale * 0.5f * (float)(2 * (16 * top + low) - 31);
    }
}

// Inner products with a code are right on average and never far off.
static void codes_of_5_bits_are_unbiased(void **state)
{
    (void)state;
    struct rng rng = rng_begin(81);
    static const uint32_t dims[] = {16, 48, 64, 80, 128, 256};
    for (uint32_t d = 0; d < sizeof dims / sizeof dims[0]; d++) {
        const uint32_t n = dims[d], rounds = rounds_of(2000);
        double bias = 0.0, along = 0.0, square = 0.0, worst = 0.0;
        for (uint32_t round = 0; round < rounds; round++) {
            float residual[256], query[256], decoded[256], spread2;
            uint8_t code[160];
            const float size = powf(10.0f, (float)rng_below(&rng, 20) - 8.0f);
            for (uint32_t i = 0; i < n; i++) {
                residual[i] = size * rng_normal(&rng);
                query[i] = rng_normal(&rng);
            }
            const float scale = dci_kernel_best()->encode5(residual, nothing, n, code, &spread2);
            decode5(code, scale, n, decoded);
            const double norm = sqrt(dot_of(residual, residual, n)), query_norm = sqrt(dot_of(query, query, n));
            assert_true(fabs((double)spread2 - dot_of(decoded, decoded, n)) <= 1e-4 * norm * norm);
            // The residual itself is met, but for the rounding of the scale: that is how the scale is chosen.
            assert_true(fabs(dot_of(decoded, residual, n) - norm * norm) <= 4e-3 * norm * norm);
            // In units of the deviation of an inner product with a random query.
            const double off = (dot_of(decoded, query, n) - dot_of(residual, query, n)) / (norm * query_norm) * sqrt(n);
            double off2 = 0.0;
            for (uint32_t i = 0; i < n; i++) {
                off2 += pow((double)decoded[i] - (double)residual[i], 2);
            }
            bias += off / rounds;
            along += off * (dot_of(residual, query, n) / (norm * query_norm) * sqrt(n)) / rounds;
            square += off * off / rounds;
            worst = fmax(worst, sqrt(off2) / norm);
        }
        printf("%u: bias %.4f, slope %.4f, deviation %.4f, farthest %.4f\n", n, bias, along, sqrt(square), worst);
        const double noise = sqrt(square / rounds);
        assert_true(fabs(bias) < 5.0 * noise && fabs(along) < 6.0 * noise);
        assert_true(sqrt(square) < 0.075);
        assert_true(worst < 0.25);
    }
}

static void codes_of_5_bits_at_the_limits(void **state)
{
    (void)state;
    float residual[64] = {0}, decoded[64], spread2 = 1.0f;
    uint8_t code[40];
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        memset(residual, 0, sizeof residual);
        assert_true(dci_kernel_at(k)->encode5(residual, nothing, 64, code, &spread2) == 0.0f);
        assert_true(spread2 == 0.0f);
        residual[7] = 1e-12f; // counts as nothing
        assert_true(dci_kernel_at(k)->encode5(residual, nothing, 64, code, &spread2) == 0.0f);
        assert_true(spread2 == 0.0f);
        residual[7] = 0x1p61f; // all in one coordinate, as large as keys can be apart
        const float scale = dci_kernel_at(k)->encode5(residual, nothing, 64, code, &spread2);
        assert_true(isfinite(scale) && isfinite(spread2) && scale > 0.0f);
        decode5(code, scale, 64, decoded);
        assert_true(decoded[7] > 0.5f * residual[7] && decoded[7] < 2.0f * residual[7]);
        for (uint32_t i = 0; i < 64; i++) {
            residual[i] = i % 2 == 0 ? 0x1p58f : -0x1p58f;
        }
        assert_true(isfinite(dci_kernel_at(k)->encode5(residual, nothing, 64, code, &spread2)) && isfinite(spread2));
    }
}

#define TOKENS 1500u

static struct owner built_owner(struct heap *heap, unsigned char **keys, struct rng *rng)
{
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_BF16, .page_tokens = 16, .seed = 5};
    *keys = keys_make(KEYS_CLUSTERED, INDEX_BF16, 32, TOKENS, rng);
    struct owner owner = owner_begin(&params, heap, *keys);
    for (uint32_t i = 0; i < 5; i++) {
        assert_int_equal(owner_append(&owner, TOKENS / 5), INDEX_OK);
        owner_build(&owner, 100000);
        owner_verify(&owner);
    }
    return owner;
}

static void assert_wrong(const struct owner *owner)
{
    char text[256] = "";
    assert_false(index_check(owner->index, text, sizeof text));
    assert_true(text[0] != '\0');
    assert_false(index_check(owner->index, NULL, 0));
}

// A wrong number is found, wherever it stands.
static void index_check_finds_what_is_wrong(void **state)
{
    (void)state;
    struct rng rng = rng_begin(64);
    struct heap heap = {0};
    unsigned char *keys;
    struct owner owner = built_owner(&heap, &keys, &rng);
    struct index *index = owner.index;
    for (uint32_t round = 0; round < 200; round++) {
        const uint32_t position = 16 + rng_below(&rng, (uint32_t)index_indexed(index) - 16);
        const struct index_place place = dci_place_of(index, position);
        struct page *page = dci_page(index, place.page);
        struct node *cell = dci_node(index, page->owner), *parent = dci_node(index, cell->parent);
        struct dci_block *block = dci_node_block(index, parent, cell->lane);
        const uint32_t lane = cell->lane % DCI_LANES;
        uint32_t *const numbers[] = {dci_place(index, position),
                                     &page->owner,
                                     &cell->parent,
                                     &cell->lane,
                                     &cell->count,
                                     &parent->count,
                                     &block->child[lane],
                                     &index->tokens,
                                     &index->leaf_pages,
                                     &index->nodes.used};
        for (uint32_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
            if (numbers[i] == &parent->count && parent->count == 1) {
                continue;
            }
            *numbers[i] ^= 1u;
            assert_wrong(&owner);
            *numbers[i] ^= 1u;
        }
        cell->level ^= 1u;
        assert_wrong(&owner);
        cell->level ^= 1u;
        float *const floats[] = {&block->unit[lane], &block->far[lane], &block->rows[lane], &block->norm2[lane],
                                 &cell->spread2};
        for (uint32_t i = 0; i < sizeof floats / sizeof floats[0]; i++) {
            const float kept = *floats[i];
            *floats[i] = 1.01f * kept + 0.01f;
            assert_wrong(&owner);
            *floats[i] = kept;
        }
        uint8_t *code = &block->codes[(rng_below(&rng, 8) * DCI_LANES + lane) * 4 + rng_below(&rng, 4)];
        *code ^= 4u;
        assert_wrong(&owner);
        *code ^= 4u;
        page->rows++;
        assert_wrong(&owner);
        page->rows--;
        owner_check(&owner);
    }
    owner_end(&owner);
    assert_int_equal(heap.bytes, 0);
    free(keys);
}

// Codes in the tree stand for the keys: anchor and code together are near the rotated key.
static void codes_stand_for_the_keys(void **state)
{
    (void)state;
    struct rng rng = rng_begin(82);
    for (uint32_t kind = 0; kind < KEYS_KINDS; kind++) {
        for (uint32_t policy = 0; policy < 2; policy++) {
            const struct index_params params = {
                .head_dim = 80, .dtype = INDEX_FP32, .page_tokens = 24, .policy = (enum index_policy)policy, .seed = 5};
            struct heap heap = {0};
            unsigned char *keys = keys_make((enum keys_kind)kind, INDEX_FP32, 80, 900, &rng);
            struct owner owner = owner_begin(&params, &heap, keys);
            assert_int_equal(owner_append(&owner, 900), INDEX_OK);
            owner_build(&owner, 100000);
            const struct index *index = owner.index;
            for (uint32_t p = 24; p < index_indexed(index); p++) {
                float key[INDEX_HEAD_DIM_MAX], anchor[INDEX_HEAD_DIM_MAX], decoded[INDEX_HEAD_DIM_MAX];
                uint8_t code[INDEX_HEAD_DIM_MAX];
                struct entry entry;
                const struct index_place place = dci_place_of(index, p);
                const struct page *page = dci_page(index, place.page);
                const struct node *cell = dci_node(index, page->owner);
                const struct dci_rows *rows = dci_rows_of(index, cell, page->part, place.row);
                const uint32_t lane = place.row % DCI_LANES, half = index->code_row_bytes;
                const uint32_t number = page->part * index->page_blocks + place.row / DCI_LANES;
                memcpy(code, dci_lows(index, cell, number) + (size_t)lane * half, half);
                for (uint32_t i = 0; i < 10; i++) {
                    code[half + i] = rows->signs[i * DCI_LANES + lane];
                }
                decode5(code, dci_scale_widen(rows->scales[lane]), 80, decoded);
                dci_entry_read(index, dci_node(index, cell->parent), cell->lane, &entry);
                dci_entry_anchor(index, &entry, anchor);
                memcpy(key, keys + (size_t)p * 320, 320);
                dci_rotate(index, key);
                double residual2 = 0.0, off2 = 0.0;
                for (uint32_t i = 0; i < 80; i++) {
                    residual2 += pow((double)key[i] - (double)anchor[i], 2);
                    off2 += pow((double)key[i] - (double)anchor[i] - (double)decoded[i], 2);
                }
                assert_true(sqrt(off2) <= 0.25 * sqrt(residual2) + 1e-7);
                assert_true(sqrt(residual2) <= 1.5 * (double)entry.far / (double)index->inverse_root_dim + 1e-7);
            }
            owner_end(&owner);
            free(keys);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(codes_are_the_nearest),         cmocka_unit_test(hadamard_keeps_inner_products),
        cmocka_unit_test(rotation_keeps_inner_products), cmocka_unit_test(codes_of_5_bits_are_unbiased),
        cmocka_unit_test(codes_of_5_bits_at_the_limits), cmocka_unit_test(index_check_finds_what_is_wrong),
        cmocka_unit_test(codes_stand_for_the_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
