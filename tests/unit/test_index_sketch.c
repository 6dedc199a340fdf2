// Sketches: codes, exact inner products and estimates on every instruction set, and what index_check sees of them.
#include "test_index_owner.h"

#include "index/search.h"

#define VIEWS_MAX 9u

struct scene {
    struct sketch *sketch;
    struct dci_views views;
    int8_t codes[VIEWS_MAX * INDEX_HEAD_DIM_MAX];
    int32_t zeros[VIEWS_MAX];
    float steps[VIEWS_MAX], bases[VIEWS_MAX], norms[VIEWS_MAX];
    _Alignas(64) unsigned char room[sizeof(struct sketch) + SKETCH_LANES * INDEX_HEAD_DIM_MAX];
};

static uint8_t page_code(const struct scene *scene, uint32_t lane, uint32_t element)
{
    return scene->sketch->codes[element / 4 * 4 * SKETCH_LANES + lane * 4 + element % 4];
}

// Codes at their limits in some lanes and views, random ones in the others; one lane that is not in use.
static void scene_init(struct scene *scene, uint32_t views, uint32_t dim, struct rng *rng)
{
    struct sketch *sketch = scene->sketch = (struct sketch *)(void *)scene->room;
    for (uint32_t i = 0; i < SKETCH_LANES * dim; i++) {
        const uint32_t lane = i / 4 % SKETCH_LANES;
        sketch->codes[i] = (uint8_t)(lane == 0 ? 255 : lane == 1 ? 0 : lane == 2 ? 1 : rng_below(rng, 256));
    }
    for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
        const bool is_used = lane != 7;
        sketch->rows[lane] = is_used ? 1 + rng_below(rng, 16) : 0;
        sketch->scale[lane] = is_used ? 0.01f + (float)rng_below(rng, 100) / 100.0f : 0.0f;
        sketch->unit[lane] = is_used ? (float)rng_below(rng, 300) / 100.0f : 0.0f;
        sketch->hope[lane] = is_used ? (float)rng_below(rng, 900) / 100.0f : 0.0f;
        sketch->log_rows[lane] = is_used ? dci_log((float)sketch->rows[lane]) : DCI_HIDDEN;
        sketch->reach[lane] = is_used ? sqrtf(2.0f * sketch->log_rows[lane]) : 1.0f;
    }
    for (uint32_t v = 0; v < views; v++) {
        for (uint32_t i = 0; i < dim; i++) {
            const int32_t random = (int32_t)rng_below(rng, 255) - 127;
            scene->codes[v * dim + i] = (int8_t)(v == 0 ? 127 : v == 1 ? -127 : random);
        }
        scene->zeros[v] = (int32_t)rng_below(rng, 2000) - 1000;
        scene->steps[v] = 1e-4f * (1.0f + (float)rng_below(rng, 10));
        scene->bases[v] = rng_normal(rng);
        scene->norms[v] = (float)rng_below(rng, 300) / 100.0f;
    }
    scene->views = (struct dci_views){views, dim, scene->codes, scene->zeros, scene->steps, scene->bases, scene->norms};
}

static void codes_are_the_nearest(void **state)
{
    (void)state;
    struct rng rng = rng_begin(60);
    float x[INDEX_HEAD_DIM_MAX];
    int8_t codes[INDEX_HEAD_DIM_MAX];
    for (uint32_t round = 0; round < 500; round++) {
        const float size = powf(10.0f, (float)rng_below(&rng, 36) - 18.0f);
        float largest = 0.0f;
        for (uint32_t i = 0; i < 64; i++) {
            x[i] = size * rng_normal(&rng);
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        }
        const float step = dci_encode(x, 64, codes);
        bool reaches_the_end = false;
        for (uint32_t i = 0; i < 64; i++) {
            assert_true(fabsf(x[i] - step * (float)codes[i]) <= 0.5001f * step);
            assert_true(codes[i] >= -127);
            reaches_the_end = reaches_the_end || codes[i] == 127 || codes[i] == -127;
        }
        assert_true(reaches_the_end && fabsf(step * 127.0f - largest) <= 1e-6f * largest);
    }
    memset(x, 0, sizeof x);
    x[3] = 1e-40f; // next to nothing
    memset(codes, 1, sizeof codes);
    assert_true(dci_encode(x, 64, codes) == 0.0f);
    for (uint32_t i = 0; i < 64; i++) {
        assert_int_equal(codes[i], 0);
    }
}

// With scales of 1 a center is the inner product itself: below 2^24, so that fp32 holds it.
static void inner_products_are_exact(void **state)
{
    (void)state;
    struct rng rng = rng_begin(61);
    static struct scene scene;
    for (uint32_t round = 0; round < 200; round++) {
        const uint32_t views = 1 + rng_below(&rng, VIEWS_MAX), dim = 16 * (1 + rng_below(&rng, 16));
        float centers[VIEWS_MAX * SKETCH_LANES];
        scene_init(&scene, views, dim, &rng);
        for (uint32_t i = 0; i < SKETCH_LANES; i++) {
            scene.sketch->scale[i] = 1.0f;
        }
        for (uint32_t v = 0; v < views; v++) {
            scene.steps[v] = 1.0f;
            scene.bases[v] = 0.0f;
        }
        for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
            dci_kernel_at(k)->centers16(&scene.views, scene.sketch, centers);
            for (uint32_t v = 0; v < views; v++) {
                for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
                    int64_t sum = -(int64_t)scene.zeros[v];
                    for (uint32_t i = 0; i < dim; i++) {
                        sum += (int64_t)page_code(&scene, lane, i) * scene.codes[v * dim + i];
                    }
                    assert_int_equal((int64_t)centers[v * SKETCH_LANES + lane], sum);
                }
            }
        }
    }
}

struct estimates {
    float centers[VIEWS_MAX * SKETCH_LANES];
    float top[VIEWS_MAX], total[VIEWS_MAX], rest[VIEWS_MAX];
    float merits[SKETCH_LANES], alone[SKETCH_LANES], masses[SKETCH_LANES];
};

static void estimate(const struct dci_kernel *kernel, const struct scene *scene, const float *weights,
                     struct estimates *out)
{
    float reference[VIEWS_MAX];
    memset(out, 0, sizeof *out);
    for (uint32_t v = 0; v < scene->views.count; v++) {
        out->top[v] = v == 0 ? DCI_HIDDEN : 0.5f;
        out->total[v] = v == 0 ? 0.0f : 2.0f;
        reference[v] = 3.0f;
    }
    kernel->centers16(&scene->views, scene->sketch, out->centers);
    kernel->survey16(&scene->views, scene->sketch, out->centers, out->top, out->total);
    kernel->merits16(&scene->views, scene->sketch, out->centers, reference, out->merits, out->masses);
    kernel->merits16(&scene->views, scene->sketch, out->centers, reference, out->alone, NULL);
    kernel->rest16(&scene->views, scene->sketch, out->centers, reference, weights, out->rest);
}

static void estimates_are_the_same_everywhere(void **state)
{
    (void)state;
    struct rng rng = rng_begin(62);
    static struct scene scene;
    static struct estimates found[2];
    for (uint32_t round = 0; round < 300; round++) {
        float weights[SKETCH_LANES];
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 16 * (1 + rng_below(&rng, 16)), &rng);
        for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
            weights[lane] = (float)rng_below(&rng, 2);
        }
        estimate(dci_kernel_at(0), &scene, weights, &found[0]);
        assert_memory_equal(found[0].merits, found[0].alone, sizeof found[0].merits);
        for (uint32_t k = 1; dci_kernel_at(k) != NULL; k++) {
            estimate(dci_kernel_at(k), &scene, weights, &found[1]);
            assert_memory_equal(&found[0], &found[1], sizeof found[0]);
        }
    }
}

static double exponent_of(const struct scene *scene, uint32_t v, uint32_t lane, double center)
{
    const struct sketch *sketch = scene->sketch;
    const double deviation = (double)sketch->unit[lane] * (double)scene->norms[v], reach = (double)sketch->reach[lane];
    return center +
           (deviation < reach ? (double)sketch->log_rows[lane] + deviation * deviation / 2 : reach * deviation);
}

// Against double precision: log-sum-exp of the exponents, merits and masses relative to the reference, the capped rest.
static void estimates_follow_their_formulas(void **state)
{
    (void)state;
    struct rng rng = rng_begin(63);
    static struct scene scene;
    static struct estimates found;
    for (uint32_t round = 0; round < 100; round++) {
        const uint32_t views = 1 + rng_below(&rng, VIEWS_MAX);
        float weights[SKETCH_LANES];
        double merits[SKETCH_LANES] = {0}, masses[SKETCH_LANES] = {0};
        scene_init(&scene, views, 32, &rng);
        for (uint32_t v = 0; v < views; v++) {
            scene.steps[v] *= 0.01f; // exponents below the limit
        }
        for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
            weights[lane] = (float)rng_below(&rng, 2);
        }
        estimate(dci_kernel_best(), &scene, weights, &found);
        for (uint32_t v = 0; v < views; v++) {
            double all = v == 0 ? 0.0 : 2.0 * exp(0.5), rest = 0.0;
            for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
                const double center = (double)found.centers[v * SKETCH_LANES + lane];
                const double exponent = exponent_of(&scene, v, lane, center);
                const double cap = (double)scene.sketch->log_rows[lane];
                merits[lane] += exp(center + (double)scene.norms[v] * (double)scene.sketch->hope[lane] - 3.0) / views;
                masses[lane] += exp(exponent - 3.0) / views;
                all += exp(exponent);
                rest += (double)weights[lane] * exp(exponent - 3.0 < cap ? exponent - 3.0 : cap);
            }
            assert_true(fabs((double)found.top[v] + log((double)found.total[v]) - log(all)) < 1e-4);
            assert_true(fabs((double)found.rest[v] - rest) <= 1e-4 * (rest + 1e-6));
        }
        for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
            assert_true(fabs((double)found.merits[lane] - merits[lane]) <= 1e-4 * (merits[lane] + 1e-6));
            assert_true(fabs((double)found.masses[lane] - masses[lane]) <= 1e-4 * (masses[lane] + 1e-6));
        }
        assert_true(found.masses[7] == 0.0f); // the lane that is not in use
    }
}

#define TOKENS 1500u

static struct owner built_owner(struct heap *heap, unsigned char **keys, struct rng *rng)
{
    const struct index_params params = {32, INDEX_BF16, 16, 0.0f, 5};
    *keys = keys_make(KEYS_CLUSTERED, INDEX_BF16, 32, TOKENS, rng);
    struct owner owner = owner_begin(&params, heap, *keys);
    for (uint32_t i = 0; i < 5; i++) { // a bulk build and insertions
        assert_int_equal(owner_append(&owner, TOKENS / 5), INDEX_OK);
        owner_build(&owner, 100000);
        owner_verify(&owner);
    }
    return owner;
}

// Every number of a sketch is looked at by index_check, and so are the lanes behind the last page.
static void a_wrong_sketch_is_found(void **state)
{
    (void)state;
    struct rng rng = rng_begin(64);
    struct heap heap = {0};
    unsigned char *keys;
    struct owner owner = built_owner(&heap, &keys, &rng);
    const struct tree *tree = owner.index->tree;
    const uint32_t words = (uint32_t)(sizeof(struct sketch) / (SKETCH_LANES * sizeof(uint32_t)));
    char text[256];
    for (uint32_t round = 0; round < 50; round++) {
        const uint32_t slot = rng_below(&rng, tree->pages), lane = slot % SKETCH_LANES;
        struct sketch *sketch = dci_sketch_at(tree, slot / SKETCH_LANES);
        uint32_t *numbers = (uint32_t *)(void *)sketch;
        for (uint32_t i = 0; i < words; i++) {
            numbers[i * SKETCH_LANES + lane] ^= 1u;
            assert_false(index_check(owner.index, text, sizeof text));
            numbers[i * SKETCH_LANES + lane] ^= 1u;
        }
        uint8_t *code = &sketch->codes[rng_below(&rng, 8) * 64 + lane * 4 + rng_below(&rng, 4)];
        *code ^= 1u;
        assert_false(index_check(owner.index, text, sizeof text));
        *code ^= 1u;
        owner_check(&owner);
    }
    assert_true(tree->pages % SKETCH_LANES != 0);
    dci_sketch_at(tree, tree->pages / SKETCH_LANES)->rows[tree->pages % SKETCH_LANES] = 1;
    assert_false(index_check(owner.index, text, sizeof text));
    owner_end(&owner);
    assert_int_equal(heap.bytes, 0);
    free(keys);
}

// A page leaves: the last slot's page takes its place, and comes back as the last one.
static void slots_stay_dense(void **state)
{
    (void)state;
    struct rng rng = rng_begin(65);
    struct heap heap = {0};
    unsigned char *keys;
    struct owner owner = built_owner(&heap, &keys, &rng);
    struct tree *tree = owner.index->tree;
    for (uint32_t round = 0; round < 100; round++) {
        const uint32_t last = tree->pages - 1, slot = round == 0 ? last : rng_below(&rng, tree->pages);
        const uint32_t page = dci_sketch_at(tree, slot / SKETCH_LANES)->page[slot % SKETCH_LANES];
        dci_sketch_remove(owner.index, tree, page, tree->pages);
        assert_int_equal(dci_sketch_at(tree, last / SKETCH_LANES)->page[last % SKETCH_LANES], TREE_NONE);
        dci_sketch_write(owner.index, tree, last, page);
        owner_check(&owner);
    }
    owner_end(&owner);
    free(keys);
}

// Estimates that are not kept are computed again, to the same selection.
static void estimates_may_be_made_again(void **state)
{
    (void)state;
    struct rng rng = rng_begin(66);
    struct heap heap = {0};
    unsigned char *keys;
    struct owner owner = built_owner(&heap, &keys, &rng);
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search;
    assert_int_equal(index_search_create(&allocator, &search), INDEX_OK);
    float queries[3 * 32];
    for (uint32_t i = 0; i < 3 * 32; i++) {
        queries[i] = 2.0f * rng_normal(&rng);
    }
    const struct index_query query = {.queries = queries,
                                      .query_count = 1,
                                      .head_count = 3,
                                      .first_position = TOKENS - 1,
                                      .scale = 0.2f,
                                      .budget = 64,
                                      .sinks = 4,
                                      .window = 16,
                                      .coverage = 0.9f};
    struct index_selected kept[64];
    uint32_t kept_count = 0;
    for (uint32_t round = 0; round < 2; round++) {
        struct index_selection selection;
        const struct index_selected *tokens;
        assert_int_equal(index_search_reserve(search, owner.index, &query), INDEX_OK);
        assert_int_equal(index_search_begin(search, owner.index, &query), INDEX_OK);
        assert_true(search->center_blocks >= dci_sketch_blocks(owner.index->tree->pages));
        search->center_blocks = round == 0 ? search->center_blocks : 1;
        while (!index_search_step(search, 100)) {
        }
        index_search_finish(search, &selection, &tokens);
        assert_true(selection.count > 0 && selection.count <= 64);
        assert_true(selection.scanned < TOKENS);
        if (round == 0) {
            kept_count = selection.count;
            memcpy(kept, tokens, kept_count * sizeof kept[0]);
        }
        assert_int_equal(selection.count, kept_count);
        assert_memory_equal(tokens, kept, kept_count * sizeof kept[0]);
    }
    index_search_destroy(search);
    owner_end(&owner);
    free(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(codes_are_the_nearest),
        cmocka_unit_test(inner_products_are_exact),
        cmocka_unit_test(estimates_are_the_same_everywhere),
        cmocka_unit_test(estimates_follow_their_formulas),
        cmocka_unit_test(a_wrong_sketch_is_found),
        cmocka_unit_test(slots_stay_dense),
        cmocka_unit_test(estimates_may_be_made_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
