// The tree: places as the owner sees them for every shape of lane, and that the tree is a function of seed and keys.
#include "test_index_owner.h"

#include "index/tree.h"

static const uint32_t dims[] = {16, 48, 64, 80, 128, 256}, pages[] = {1, 3, 8, 16, 20, 64, 256};
enum { DIMS = sizeof dims / sizeof dims[0], PAGES = sizeof pages / sizeof pages[0] };

static struct index_params params_random(struct rng *rng, enum index_policy policy)
{
    static const float ratios[] = {0.0f, 1.0f / 8.0f, 1.0f / 16.0f, 1.0f / 50.0f, 1.0f / 64.0f};
    return (struct index_params){
        .head_dim = dims[rng_below(rng, rng_below(rng, 4) == 0 ? DIMS : 3)],
        .dtype = (enum index_dtype)(1 + rng_below(rng, 3)),
        .page_tokens = pages[rng_below(rng, PAGES)],
        .policy = policy,
        .promotion_ratio = ratios[rng_below(rng, sizeof ratios / sizeof ratios[0])],
        .seed = rng_next(rng),
    };
}

static void refuses_bad_parameters(void **state)
{
    (void)state;
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_params bad[12];
    struct index *index = NULL;
    for (uint32_t i = 0; i < 12; i++) {
        bad[i] = (struct index_params){.head_dim = 64, .dtype = INDEX_FP16};
    }
    bad[0].head_dim = 0;
    bad[1].head_dim = 24;
    bad[2].head_dim = 272;
    bad[3].dtype = (enum index_dtype)0;
    bad[4].dtype = (enum index_dtype)4;
    bad[5].page_tokens = 257;
    bad[6].promotion_ratio = 0.126f;
    bad[7].promotion_ratio = 0.015f;
    bad[8].promotion_ratio = NAN;
    bad[9].promotion_ratio = -0.1f;
    bad[10].policy = (enum index_policy)2;
    bad[11].policy = (enum index_policy) - 1;
    for (uint32_t i = 0; i < 12; i++) {
        assert_int_equal(index_create(&bad[i], &allocator, &index), INDEX_INVALID);
        assert_null(index);
    }
    index_destroy(NULL);
    index_search_destroy(NULL);
    assert_int_equal(heap.acquired, 0);
}

// The first page and the newest tokens are outside the tree, and what is indexed is inside.
static void verify_ends(const struct owner *owner)
{
    const struct index *index = owner->index;
    struct index_shape shape;
    uint32_t live = 0;
    index_shape(index, &shape);
    assert_true(index_indexed(index) == 0 || index_indexed(index) + INDEX_RECENT <= owner->length);
    for (uint32_t p = 0; p < owner->length; p++) {
        const bool is_leaf = dci_page(index, dci_place_of(index, p).page)->state == PAGE_LEAF;
        assert_int_equal(is_leaf, p >= owner->params.page_tokens && p < index_indexed(index));
        live += is_leaf ? 1 : 0;
    }
    assert_int_equal(shape.level_counts[0], live);
    assert_int_equal(index_build_is_due(index), false);
    assert_true(owner->length <
                index_indexed(index) + owner->params.page_tokens + 256 + INDEX_RECENT + 2 * owner->params.page_tokens);
}

// Appends of random sizes, builds in slices, plans dropped now and then; every commit is verified byte by byte.
static void one_lane(struct rng *rng, const struct index_params *params, enum keys_kind kind, uint32_t n)
{
    struct heap heap = {0};
    unsigned char *keys = keys_make(kind, params->dtype, params->head_dim, n, rng);
    struct owner owner = owner_begin(params, &heap, keys);
    const uint32_t most = n > 1000 ? 400 : 40;
    while (owner.length < n || index_build_is_due(owner.index)) {
        const uint32_t left = n - owner.length, some = 1 + rng_below(rng, rng_below(rng, 3) == 0 ? 400 : most);
        assert_int_equal(owner_append(&owner, some < left ? some : left), INDEX_OK);
        owner_check(&owner);
        for (uint32_t step = rng_below(rng, 6); step > 0; step--) {
            const enum index_build_state build = owner_step(&owner, 1 + rng_below(rng, 100000));
            owner_check(&owner);
            if (build != INDEX_BUILD_PLAN) {
                continue;
            }
            if (rng_below(rng, 4) == 0) {
                owner_drop_plan(&owner);
                owner_verify(&owner);
                continue;
            }
            const uint64_t before = index_indexed(owner.index);
            owner_carry_out(&owner, NULL, NULL);
            assert_true(index_indexed(owner.index) > before);
            owner_verify(&owner);
        }
        assert_int_equal(index_bytes(owner.index), heap.bytes);
    }
    owner_verify(&owner);
    verify_ends(&owner);
    owner_end(&owner);
    assert_int_equal(heap.bytes, 0);
    assert_int_equal(heap.blocks, 0);
    free(keys);
}

static void every_kind_of_key(void **state)
{
    (void)state;
    struct rng rng = rng_begin(21);
    for (uint32_t kind = 0; kind < KEYS_KINDS; kind++) {
        for (uint32_t policy = 0; policy < 2; policy++) {
            for (uint32_t round = 0; round < rounds_of(2); round++) {
                const struct index_params params = params_random(&rng, (enum index_policy)policy);
                one_lane(&rng, &params, (enum keys_kind)kind, 1200 + rng_below(&rng, 600));
                one_lane(&rng, &params, (enum keys_kind)kind, rng_below(&rng, 700));
            }
        }
    }
}

static void every_shape(void **state)
{
    (void)state;
    struct rng rng = rng_begin(20);
    for (uint32_t i = 0; i < DIMS * PAGES * 3 * 2; i++) {
        const struct index_params params = {
            .head_dim = dims[i % DIMS],
            .page_tokens = pages[i / DIMS % PAGES],
            .dtype = (enum index_dtype)(1 + i / DIMS / PAGES % 3),
            .policy = (enum index_policy)(i / DIMS / PAGES / 3),
            .seed = i,
        };
        one_lane(&rng, &params, (enum keys_kind)rng_below(&rng, KEYS_KINDS), 600 + rng_below(&rng, 600));
    }
}

static void small_lengths(void **state)
{
    (void)state;
    struct rng rng = rng_begin(22);
    for (uint32_t i = 0; i < PAGES; i++) {
        const uint32_t page = pages[i], first = (page + 256) / page * page; // the end of the first batch
        const uint32_t lengths[] = {0,          1,          page - 1,          page,
                                    page + 1,   2 * page,   first - 1,         first + 63,
                                    first + 64, first + 65, first + 64 + page, first + 64 + page + 64};
        for (uint32_t j = 0; j < sizeof lengths / sizeof lengths[0]; j++) {
            struct index_params params = params_random(&rng, (enum index_policy)(j % 2));
            params.page_tokens = page;
            one_lane(&rng, &params, KEYS_CLUSTERED, lengths[j]);
        }
    }
}

// Trees of several levels, so that nodes above the cells are divided too.
static void many_levels(void **state)
{
    (void)state;
    struct rng rng = rng_begin(23);
    for (uint32_t policy = 0; policy < 2; policy++) {
        const struct index_params params = {.head_dim = 16,
                                            .dtype = INDEX_FP32,
                                            .page_tokens = policy == 0 ? 1 : 4,
                                            .policy = (enum index_policy)policy,
                                            .promotion_ratio = 0.125f,
                                            .seed = 7};
        const uint32_t n = 7000;
        struct heap heap = {0};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_shape shape;
        while (owner.length < n) {
            assert_int_equal(owner_append(&owner, 500), INDEX_OK);
            owner_build(&owner, 5000);
            owner_check(&owner);
        }
        owner_verify(&owner);
        index_shape(owner.index, &shape);
        assert_true(shape.levels >= (policy == 0 ? 4 : 5));
        assert_int_equal(shape.level_counts[shape.levels - 1], 1);
        for (uint32_t l = 2; l < shape.levels; l++) { // no level is nearly as large as the one below
            assert_true(3 * shape.level_counts[l] < 2 * shape.level_counts[l - 1] || shape.level_counts[l] <= 2);
        }
        owner_end(&owner);
        free(keys);
    }
}

// With promotion a level holds about r times the nodes of the one below.
static void levels_follow_the_ratio(void **state)
{
    (void)state;
    struct rng rng = rng_begin(35);
    static const uint32_t fanouts[] = {8, 16, 32, 64};
    for (uint32_t i = 0; i < 4; i++) {
        const struct index_params params = {.head_dim = 16,
                                            .dtype = INDEX_FP32,
                                            .page_tokens = 4,
                                            .policy = INDEX_PROMOTION,
                                            .promotion_ratio = 1.0f / (float)fanouts[i],
                                            .seed = 7};
        struct heap heap = {0};
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 6000, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_shape shape;
        assert_int_equal(owner_append(&owner, 6000), INDEX_OK);
        owner_build(&owner, 100000);
        index_shape(owner.index, &shape);
        for (uint32_t l = 2; l + 1 < shape.levels; l++) {
            const double ratio = (double)shape.level_counts[l] / shape.level_counts[l - 1];
            assert_true(ratio * fanouts[i] > 0.6 && ratio * fanouts[i] < 2.1);
        }
        owner_end(&owner);
        free(keys);
    }
}

// Two indexes hold the same tree: digests, shapes, and places up to the numbers of the pages.
static void assert_same(const struct owner *a, const struct owner *b)
{
    struct index_shape shape_a, shape_b;
    index_shape(a->index, &shape_a);
    index_shape(b->index, &shape_b);
    assert_int_equal(index_indexed(a->index), index_indexed(b->index));
    assert_int_equal(index_version(a->index), index_version(b->index));
    assert_int_equal(shape_a.levels, shape_b.levels);
    assert_memory_equal(shape_a.level_counts, shape_b.level_counts, sizeof shape_a.level_counts);
    assert_int_equal(shape_a.pages, shape_b.pages);
    assert_int_equal(shape_a.leaf_pages, shape_b.leaf_pages);
    assert_int_equal(a->length, b->length);
    const uint32_t n = a->length;
    struct index_place *at_a = calloc(n, sizeof *at_a), *at_b = calloc(n, sizeof *at_b);
    uint32_t *to_b = malloc(index_page_bound(a->index) * sizeof *to_b);
    uint32_t *to_a = malloc(index_page_bound(b->index) * sizeof *to_a);
    memset(to_b, 0xff, index_page_bound(a->index) * sizeof *to_b);
    memset(to_a, 0xff, index_page_bound(b->index) * sizeof *to_a);
    index_locate(a->index, 0, n, at_a);
    index_locate(b->index, 0, n, at_b);
    for (uint32_t p = 0; p < n; p++) {
        assert_int_equal(at_a[p].row, at_b[p].row);
        if (to_b[at_a[p].page] == UINT32_MAX) {
            to_b[at_a[p].page] = at_b[p].page;
            assert_int_equal(to_a[at_b[p].page], UINT32_MAX);
            to_a[at_b[p].page] = at_a[p].page;
        }
        assert_int_equal(to_b[at_a[p].page], at_b[p].page);
    }
    free(at_a);
    free(at_b);
    free(to_a);
    free(to_b);
}

static void assert_same_answers(struct rng *rng, const struct owner *a, const struct owner *b)
{
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search_a, *search_b;
    assert_int_equal(index_search_create(&allocator, &search_a), INDEX_OK);
    assert_int_equal(index_search_create(&allocator, &search_b), INDEX_OK);
    float queries[2 * 256];
    for (uint32_t i = 0; i < 2 * a->params.head_dim; i++) {
        queries[i] = rng_normal(rng);
    }
    for (uint32_t page_wise = 0; page_wise < 2; page_wise++) {
        const struct index_query query = {.queries = queries,
                                          .query_count = 1,
                                          .head_count = 2,
                                          .first_position = a->length - 1,
                                          .scale = 0.2f,
                                          .budget = 48,
                                          .sinks = 4,
                                          .window = 16,
                                          .page_wise = page_wise == 1};
        const struct answer x = search_run(search_a, a->index, &query, UINT32_MAX, UINT32_MAX);
        const struct answer y = search_run(search_b, b->index, &query, 1 + rng_below(rng, 200), UINT32_MAX);
        selection_verify(a, &query, &x);
        selection_verify(b, &query, &y);
        assert_int_equal(x.selection.count, y.selection.count);
        assert_int_equal(x.selection.scanned, y.selection.scanned);
        assert_memory_equal(&x.selection.selected_mass, &y.selection.selected_mass, sizeof(float));
        for (uint32_t i = 0; i < x.selection.count; i++) {
            assert_int_equal(x.tokens[i].position, y.tokens[i].position);
            assert_int_equal(x.tokens[i].place.row, y.tokens[i].place.row);
            assert_memory_equal(&x.tokens[i].mass, &y.tokens[i].mass, sizeof(float));
        }
    }
    index_search_destroy(search_a);
    index_search_destroy(search_b);
    assert_int_equal(heap.blocks, 0);
}

// Appends, slices, drops and searches in any order lead to the same tree, and to the same answers.
static void same_tree_however_cut(void **state)
{
    (void)state;
    struct rng rng = rng_begin(24);
    for (uint32_t round = 0; round < rounds_of(4 * KEYS_KINDS); round++) {
        const struct index_params params = params_random(&rng, (enum index_policy)(round / KEYS_KINDS % 2));
        const uint32_t n = 600 + rng_below(&rng, 1700);
        const enum keys_kind kind = (enum keys_kind)(round % KEYS_KINDS);
        struct heap heap = {0};
        unsigned char *keys = keys_make(kind, params.dtype, params.head_dim, n, &rng);
        struct owner whole = owner_begin(&params, &heap, keys), pieces = owner_begin(&params, &heap, keys);
        pieces.stride = pieces.row_bytes;
        assert_int_equal(owner_append(&whole, n), INDEX_OK);
        owner_build(&whole, UINT64_MAX);
        while (pieces.length < n) {
            const uint32_t left = n - pieces.length, some = 1 + rng_below(&rng, 90);
            assert_int_equal(owner_append(&pieces, some < left ? some : left), INDEX_OK);
            if (rng_below(&rng, 3) == 0 && owner_step(&pieces, rng_below(&rng, 3000)) == INDEX_BUILD_PLAN) {
                if (rng_below(&rng, 2) == 0) {
                    owner_drop_plan(&pieces);
                } else {
                    owner_carry_out(&pieces, NULL, NULL);
                }
            }
        }
        owner_build(&pieces, 1 + rng_below(&rng, 500));
        assert_same(&whole, &pieces);
        assert_same_answers(&rng, &whole, &pieces);
        owner_end(&whole);
        owner_end(&pieces);
        free(keys);
    }
}

static void seeds_and_keys_change_the_tree(void **state)
{
    (void)state;
    struct rng rng = rng_begin(25);
    for (uint32_t policy = 0; policy < 2; policy++) {
        struct index_params params = {
            .head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 16, .policy = (enum index_policy)policy, .seed = 1};
        struct heap heap = {0};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 600, &rng);
        uint64_t versions[3];
        for (uint32_t i = 0; i < 3; i++) {
            params.seed = i == 1 ? 2 : 1;
            if (i == 2) { // one key is another one
                memcpy(keys + 300 * 128, keys + 100 * 128, 128);
            }
            struct owner owner = owner_begin(&params, &heap, keys);
            assert_int_equal(index_version(owner.index), 0);
            assert_int_equal(owner_append(&owner, 600), INDEX_OK);
            assert_int_equal(index_version(owner.index), 0);
            owner_build(&owner, UINT64_MAX);
            versions[i] = index_version(owner.index);
            owner_end(&owner);
        }
        assert_true(versions[0] != versions[1] && versions[0] != versions[2] && versions[0] != 0);
        free(keys);
    }
}

// The version follows every batch, and keys that come later change it later.
static void version_follows_batches(void **state)
{
    (void)state;
    struct rng rng = rng_begin(32);
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 1};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 800, &rng);
    unsigned char *other = malloc(800 * 128);
    memcpy(other, keys, 800 * 128);
    memcpy(other + 500 * 128, keys, 300 * 128); // the same up to position 499
    struct owner a = owner_begin(&params, &heap, keys), b = owner_begin(&params, &heap, other);
    uint64_t last = 0;
    for (uint32_t n = 272; n <= 720; n += 64) {
        assert_int_equal(owner_append(&a, n + INDEX_RECENT - a.length), INDEX_OK);
        assert_int_equal(owner_append(&b, n + INDEX_RECENT - b.length), INDEX_OK);
        owner_build(&a, 1000);
        owner_build(&b, 1000);
        assert_int_equal(index_indexed(a.index), n);
        assert_true(index_version(a.index) != last);
        assert_int_equal(index_version(a.index) == index_version(b.index), n <= 500);
        last = index_version(a.index);
    }
    owner_end(&a);
    owner_end(&b);
    free(other);
    free(keys);
}

// A first batch of 256 behind the first page, then 64 or a page, each when 64 more tokens have come.
static void batches_end_at_fixed_counts(void **state)
{
    (void)state;
    static const struct {
        uint32_t page_tokens, length, indexed;
    } cases[] = {{16, 335, 0},    {16, 336, 272},  {16, 399, 272},  {16, 400, 336},  {16, 463, 336},  {16, 464, 400},
                 {24, 327, 0},    {24, 328, 264},  {24, 375, 264},  {24, 376, 312},  {256, 575, 0},   {256, 576, 512},
                 {256, 831, 512}, {256, 832, 768}, {1, 320, 0},     {1, 321, 257},   {1, 384, 257},   {1, 385, 321},
                 {100, 363, 0},   {100, 364, 300}, {100, 463, 300}, {100, 464, 400}, {16, 2000, 1936}};
    struct rng rng = rng_begin(33);
    for (uint32_t i = 0; i < 2 * sizeof cases / sizeof cases[0]; i++) {
        const uint32_t length = cases[i / 2].length, early = i % 2 == 0 ? 0 : length - 70; // at once, or in two parts
        const struct index_params params = {
            .head_dim = 16, .dtype = INDEX_FP16, .page_tokens = cases[i / 2].page_tokens, .seed = 1};
        struct heap heap = {0};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, length, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&owner, early), INDEX_OK);
        owner_build(&owner, 100000);
        assert_int_equal(owner_append(&owner, length - early), INDEX_OK);
        owner_build(&owner, 100000);
        assert_int_equal(index_indexed(owner.index), cases[i / 2].indexed);
        owner_end(&owner);
        free(keys);
    }
}

// Equal keys are equally near to every anchor: cells must stay within their size, and pages be filled.
static void equal_keys_fill_pages(void **state)
{
    (void)state;
    struct rng rng = rng_begin(34);
    for (uint32_t i = 0; i < 4; i++) {
        const struct index_params params = {
            .head_dim = 16, .dtype = INDEX_FP32, .page_tokens = 16, .policy = (enum index_policy)(i / 2), .seed = 1};
        struct heap heap = {0};
        unsigned char *keys = keys_make(i % 2 == 0 ? KEYS_EQUAL : KEYS_ZERO, params.dtype, params.head_dim, 4000, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_shape shape;
        assert_int_equal(owner_append(&owner, 4000), INDEX_OK);
        owner_build(&owner, 100000);
        owner_verify(&owner);
        index_shape(owner.index, &shape);
        assert_true(shape.fill > 11.0);
        owner_end(&owner);
        free(keys);
    }
}

// Pages of tokens that come in over time stay well filled.
static void pages_stay_filled(void **state)
{
    (void)state;
    struct rng rng = rng_begin(36);
    for (uint32_t i = 0; i < 4; i++) {
        const struct index_params params = {
            .head_dim = 64, .dtype = INDEX_BF16, .page_tokens = 16, .policy = (enum index_policy)(i / 2), .seed = 1};
        struct heap heap = {0};
        unsigned char *keys =
            keys_make(i % 2 == 0 ? KEYS_CLUSTERED : KEYS_GAUSSIAN, params.dtype, params.head_dim, 4000, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_shape shape;
        while (owner.length < 4000) {
            assert_int_equal(owner_append(&owner, 50), INDEX_OK);
            owner_build(&owner, 100000);
        }
        index_shape(owner.index, &shape);
        printf("policy %u, keys %u: %.1f tokens a page\n", i / 2, i % 2, shape.fill);
        assert_true(shape.fill > 11.0);
        owner_end(&owner);
        free(keys);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_bad_parameters),
        cmocka_unit_test(every_kind_of_key),
        cmocka_unit_test(every_shape),
        cmocka_unit_test(small_lengths),
        cmocka_unit_test(many_levels),
        cmocka_unit_test(levels_follow_the_ratio),
        cmocka_unit_test(same_tree_however_cut),
        cmocka_unit_test(seeds_and_keys_change_the_tree),
        cmocka_unit_test(version_follows_batches),
        cmocka_unit_test(batches_end_at_fixed_counts),
        cmocka_unit_test(equal_keys_fill_pages),
        cmocka_unit_test(pages_stay_filled),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
