// The tree: places and plans as the owner sees them, determinism, refused memory.
#include "test_index_owner.h"

#include "index/tree.h"

static struct index_params params_random(struct rng *rng)
{
    static const uint32_t pages[] = {1, 3, 8, 16, 16, 24, 64, 256};
    static const float ratios[] = {0.0f, 0.5f, 0.25f, 1.0f / 16.0f, 1.0f / 50.0f};
    return (struct index_params){
        .head_dim = 16 * (1 + rng_below(rng, rng_below(rng, 4) == 0 ? 16 : 4)),
        .dtype = (enum index_dtype)(1 + rng_below(rng, 3)),
        .page_tokens = pages[rng_below(rng, sizeof pages / sizeof pages[0])],
        .promotion_ratio = ratios[rng_below(rng, sizeof ratios / sizeof ratios[0])],
        .seed = rng_next(rng),
    };
}

static void refuses_bad_parameters(void **state)
{
    (void)state;
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    const struct index_params good = {.head_dim = 64, .dtype = INDEX_FP16};
    struct index_params bad[8];
    struct index *index = NULL;
    for (uint32_t i = 0; i < 8; i++) {
        bad[i] = good;
    }
    bad[0].head_dim = 0;
    bad[1].head_dim = 24;
    bad[2].head_dim = 272;
    bad[3].dtype = (enum index_dtype)0;
    bad[4].dtype = (enum index_dtype)4;
    bad[5].page_tokens = 257;
    bad[6].promotion_ratio = 0.7f;
    bad[7].promotion_ratio = NAN;
    for (uint32_t i = 0; i < 8; i++) {
        assert_int_equal(index_create(&bad[i], &allocator, &index), INDEX_INVALID);
        assert_null(index);
    }
    index_destroy(NULL);
    index_search_destroy(NULL);
    assert_int_equal(heap.acquired, 0);
}

// Appends of random sizes, builds in slices, plans dropped now and then; every commit is verified byte by byte.
static void one_lane(struct rng *rng, enum keys_kind kind, uint32_t n)
{
    const struct index_params params = params_random(rng);
    struct heap heap = {0};
    unsigned char *keys = keys_make(kind, params.dtype, params.head_dim, n, rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    while (owner.length < n || index_build_is_due(owner.index)) {
        const uint32_t left = n - owner.length, some = 1 + rng_below(rng, rng_below(rng, 3) == 0 ? 400 : 40);
        assert_int_equal(owner_append(&owner, some < left ? some : left), INDEX_OK);
        for (uint32_t step = rng_below(rng, 6); step > 0; step--) {
            if (index_build_step(owner.index, 1 + rng_below(rng, 100000)) != INDEX_BUILD_PLAN) {
                continue;
            }
            if (rng_below(rng, 4) == 0) {
                index_plan_drop(owner.index);
                assert_true(index_build_is_due(owner.index));
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
    struct index_shape shape;
    index_shape(owner.index, &shape);
    assert_int_equal(shape.level_counts[0], index_indexed(owner.index));
    for (uint32_t l = 1; l < shape.levels; l++) { // n_l = r * n_(l-1)
        const double ratio = params.promotion_ratio == 0.0f ? 1.0 / 32 : (double)params.promotion_ratio;
        assert_true(fabs(shape.level_counts[l] - ratio * shape.level_counts[l - 1]) < 1.01);
    }
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
        one_lane(&rng, (enum keys_kind)kind, 1200 + rng_below(&rng, 600));
        one_lane(&rng, (enum keys_kind)kind, rng_below(&rng, 700));
    }
}

static void small_lengths(void **state)
{
    (void)state;
    struct rng rng = rng_begin(22);
    const uint32_t lengths[] = {0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 320, 321, 1023, 1024, 1025};
    for (uint32_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        one_lane(&rng, KEYS_CLUSTERED, lengths[i]);
    }
}

// A tree of three levels, so that nodes are re-hung too.
static void many_levels(void **state)
{
    (void)state;
    struct rng rng = rng_begin(23);
    const struct index_params params = {16, INDEX_FP32, 8, 0.25f, 7};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 3000, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    struct index_shape shape;
    while (owner.length < 3000) {
        assert_int_equal(owner_append(&owner, 100), INDEX_OK);
        owner_build(&owner, 5000);
    }
    owner_verify(&owner);
    index_shape(owner.index, &shape);
    assert_true(shape.levels >= 4);
    assert_true(shape.level_counts[1] > 256); // so large that parents are found with a beam
    owner_end(&owner);
    free(keys);
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
        const struct index_query query = {queries, 1, 2, a->length - 1, 0.2f, 48, 4, 16, page_wise == 1, 0.0f, 0.0f};
        const struct answer x = search_run(search_a, a->index, &query, UINT32_MAX, UINT32_MAX);
        const struct answer y = search_run(search_b, b->index, &query, 1 + rng_below(rng, 200), UINT32_MAX);
        assert_int_equal(x.selection.count, y.selection.count);
        assert_int_equal(x.selection.scanned, y.selection.scanned);
        assert_memory_equal(&x.selection.selected_mass, &y.selection.selected_mass, sizeof(float));
        for (uint32_t i = 0; i < x.selection.count; i++) {
            assert_int_equal(x.tokens[i].position, y.tokens[i].position);
            assert_memory_equal(&x.tokens[i].mass, &y.tokens[i].mass, sizeof(float));
        }
    }
    index_search_destroy(search_a);
    index_search_destroy(search_b);
    assert_int_equal(heap.blocks, 0);
}

static void same_tree_however_cut(void **state)
{
    (void)state;
    struct rng rng = rng_begin(24);
    for (uint32_t round = 0; round < 10; round++) {
        const struct index_params params = params_random(&rng);
        const uint32_t n = 300 + rng_below(&rng, 1700);
        struct heap heap = {0};
        unsigned char *keys = keys_make((enum keys_kind)(round % KEYS_KINDS), params.dtype, params.head_dim, n, &rng);
        struct owner whole = owner_begin(&params, &heap, keys), pieces = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&whole, n), INDEX_OK);
        owner_build(&whole, UINT64_MAX);
        while (pieces.length < n) {
            const uint32_t left = n - pieces.length, some = 1 + rng_below(&rng, 90);
            assert_int_equal(owner_append(&pieces, some < left ? some : left), INDEX_OK);
            if (rng_below(&rng, 3) == 0 && index_build_step(pieces.index, rng_below(&rng, 3000)) == INDEX_BUILD_PLAN) {
                if (rng_below(&rng, 2) == 0) {
                    index_plan_drop(pieces.index);
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
    struct index_params params = {32, INDEX_FP32, 16, 0.0f, 1};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 600, &rng);
    uint64_t versions[3];
    for (uint32_t i = 0; i < 3; i++) {
        params.seed = i == 1 ? 2 : 1;
        if (i == 2) {
            unsigned char *other = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 600, &rng);
            memcpy(keys, other, 600 * 32 * sizeof(float));
            free(other);
        }
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(index_version(owner.index), 0);
        assert_int_equal(owner_append(&owner, 600), INDEX_OK);
        owner_build(&owner, UINT64_MAX);
        versions[i] = index_version(owner.index);
        owner_end(&owner);
    }
    assert_true(versions[0] != versions[1] && versions[0] != versions[2]);
    free(keys);
}

// The version follows every insertion, and keys that come later.
static void version_follows_insertions(void **state)
{
    (void)state;
    struct rng rng = rng_begin(32);
    const struct index_params params = {32, INDEX_FP32, 16, 0.0f, 1};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 400, &rng);
    unsigned char *other = malloc(400 * 128);
    memcpy(other, keys, 400 * 128);
    memcpy(other + 300 * 128, keys, 100 * 128); // the same up to position 299
    struct owner a = owner_begin(&params, &heap, keys), b = owner_begin(&params, &heap, other);
    uint64_t last = 0;
    for (uint32_t n = 256; n <= 384; n += 64) {
        assert_int_equal(owner_append(&a, n - a.length), INDEX_OK);
        assert_int_equal(owner_append(&b, n - b.length), INDEX_OK);
        owner_build(&a, 1000);
        owner_build(&b, 1000);
        assert_int_equal(index_indexed(a.index), n);
        assert_true(index_version(a.index) != last);
        assert_int_equal(index_version(a.index) == index_version(b.index), n <= 300);
        last = index_version(a.index);
    }
    owner_end(&a);
    owner_end(&b);
    free(other);
    free(keys);
}

// Builds happen at fixed counts: a batch of 64 or the page size's next multiple, everything at 256 * 4^j.
static void builds_happen_at_fixed_counts(void **state)
{
    (void)state;
    static const struct {
        uint32_t page_tokens, length, indexed;
    } cases[] = {{16, 255, 0},     {16, 256, 256},   {16, 319, 256},   {16, 320, 320},  {16, 1023, 960},
                 {16, 1024, 1024}, {16, 1087, 1024}, {24, 263, 0},     {24, 264, 264},  {24, 335, 264},
                 {24, 336, 336},   {24, 1055, 984},  {24, 1056, 1056}, {256, 511, 256}, {256, 512, 512}};
    struct rng rng = rng_begin(33);
    for (uint32_t i = 0; i < 2 * sizeof cases / sizeof cases[0]; i++) {
        const uint32_t length = cases[i / 2].length, early = i % 2 == 0 ? 0 : length - 70; // at once, or in two parts
        const struct index_params params = {16, INDEX_FP16, cases[i / 2].page_tokens, 0.0f, 1};
        struct heap heap = {0};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, length, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&owner, early), INDEX_OK);
        owner_build(&owner, 100000);
        assert_int_equal(owner_append(&owner, length - early), INDEX_OK);
        owner_build(&owner, 100000);
        assert_int_equal(index_indexed(owner.index), cases[i / 2].indexed);
        if (owner.index->tree != NULL) {
            const uint32_t base =
                (256 + cases[i / 2].page_tokens - 1) / cases[i / 2].page_tokens * cases[i / 2].page_tokens;
            assert_int_equal(owner.index->tree->bulk_tokens, length >= 4 * base ? 4 * base : base);
        }
        owner_end(&owner);
        free(keys);
    }
}

// Equal keys are equally near to every pivot; they must not all crowd into one cell.
static void equal_keys_spread_over_cells(void **state)
{
    (void)state;
    struct rng rng = rng_begin(34);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 1};
    struct heap heap = {0};
    for (enum keys_kind kind = KEYS_EQUAL; kind <= KEYS_ZERO; kind++) {
        unsigned char *keys = keys_make(kind, params.dtype, params.head_dim, 1800, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&owner, 1800), INDEX_OK);
        owner_build(&owner, 100000);
        const struct tree *tree = owner.index->tree;
        for (uint32_t i = 0; i < tree->levels[1].count; i++) {
            assert_true(dci_node(tree, 1, i)->weight <= 4 * 32);
        }
        owner_end(&owner);
        free(keys);
    }
}

// A store whose growth is refused half-way keeps what it had and no more.
static void stores_grow_all_or_nothing(void **state)
{
    (void)state;
    struct heap heap = {0};
    struct dci_memory memory = {.allocator = heap_allocator(&heap)};
    struct dci_store store;
    dci_store_init(&store, 32, 3);
    assert_true(dci_store_reserve(&store, &memory, 9));
    assert_int_equal(store.chunk_count, 2);
    const uint64_t bytes = heap.bytes;
    heap.refuse_at = heap.acquired + 2;
    assert_false(dci_store_reserve(&store, &memory, 32));
    assert_int_equal(store.chunk_count, 2);
    assert_int_equal(heap.bytes, bytes);
    dci_store_fini(&store, &memory);
    assert_int_equal(heap.blocks, 0);
    assert_int_equal(memory.bytes, 0);
}

// A dropped plan comes again, the same to the last move, though the tail has grown past the next boundary meanwhile.
static void dropped_plan_comes_again(void **state)
{
    (void)state;
    struct rng rng = rng_begin(26);
    const struct index_params params = {16, INDEX_BF16, 16, 0.0f, 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1100, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 330), INDEX_OK);
    for (uint32_t kind = 0; kind < 2; kind++) { // first a bulk build, then an insertion
        while (index_build_step(owner.index, 1000) != INDEX_BUILD_PLAN) {
        }
        struct index_plan plan, again;
        index_plan_get(owner.index, &plan);
        const uint32_t count = plan.move_count;
        struct index_move *moves = malloc(count * sizeof *moves);
        memcpy(moves, plan.moves, count * sizeof *moves);
        const uint64_t indexed = index_indexed(owner.index), version = index_version(owner.index);
        index_plan_drop(owner.index);
        assert_int_equal(index_indexed(owner.index), indexed);
        assert_int_equal(index_version(owner.index), version);
        owner_verify(&owner);
        if (kind == 1) {
            assert_int_equal(owner_append(&owner, 770), INDEX_OK);
        }
        assert_int_equal(index_build_step(owner.index, 1), INDEX_BUILD_PLAN);
        index_plan_get(owner.index, &again);
        assert_int_equal(again.move_count, count);
        assert_memory_equal(again.moves, moves, count * sizeof *moves);
        owner_carry_out(&owner, NULL, NULL);
        owner_verify(&owner);
        free(moves);
    }
    owner_build(&owner, 1000);
    owner_verify(&owner);
    owner_end(&owner);
    free(keys);
}

// Slices are short: no call does much more than it was asked to. Counted in calls, since there is no clock.
static void slices_are_bounded(void **state)
{
    (void)state;
    struct rng rng = rng_begin(27);
    const struct index_params params = {128, INDEX_FP32, 16, 0.0f, 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1024, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 1024), INDEX_OK);
    uint32_t coarse = 0, fine = 0;
    while (index_build_step(owner.index, 100000) == INDEX_BUILD_MORE) {
        coarse++;
    }
    owner_carry_out(&owner, NULL, NULL);
    struct owner second = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&second, 1024), INDEX_OK);
    while (index_build_step(second.index, 100) == INDEX_BUILD_MORE) {
        fine++;
    }
    assert_true(coarse < 10);
    assert_true(fine > 300); // 1024 tokens against 32 nodes, then the cuts
    owner_end(&owner);
    owner_end(&second);
    free(keys);
}

struct between {
    struct owner *owner;
    uint32_t n;
};
static void append_between(void *argument)
{
    struct between *between = argument;
    assert_int_equal(owner_append(between->owner, between->n), INDEX_OK);
}

static void appends_while_a_plan_is_pending(void **state)
{
    (void)state;
    struct rng rng = rng_begin(28);
    const struct index_params params = {32, INDEX_FP16, 24, 0.0f, 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 4000, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 500), INDEX_OK);
    while (owner.length < 3900) {
        const enum index_build_state build = index_build_step(owner.index, 20000);
        if (build == INDEX_BUILD_IDLE) {
            assert_int_equal(owner_append(&owner, 20), INDEX_OK);
        } else if (build == INDEX_BUILD_PLAN) {
            struct between between = {&owner, 1 + rng_below(&rng, 60)};
            owner_carry_out(&owner, append_between, &between);
            owner_verify(&owner);
        }
    }
    owner_end(&owner);
    free(keys);
}

// Prepare, then drop or commit, with a plan committed in between.
static void append_is_all_or_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(29);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 600, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    struct index_place places[600], again[600];
    assert_int_equal(owner_append(&owner, 330), INDEX_OK);
    const unsigned char *next = keys + 330 * owner.row_bytes;
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 100, places), INDEX_OK);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 100, again), INDEX_INVALID);
    assert_int_equal(index_length(owner.index), 330);
    owner_build(&owner, 1000); // a bulk build and an insertion, committed under the prepared append
    assert_int_equal(index_indexed(owner.index), 320);
    owner_check(&owner);
    index_append_drop(owner.index);
    owner_verify(&owner);
    const uint64_t bytes = index_bytes(owner.index);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 100, places), INDEX_OK);
    index_append_drop(owner.index);
    assert_int_equal(index_bytes(owner.index), bytes);
    assert_int_equal(owner_append(&owner, 100), INDEX_OK);
    assert_int_equal(owner_append(&owner, 0), INDEX_OK);
    owner_verify(&owner);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes - 1, 2, places), INDEX_INVALID);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, INDEX_TOKENS_MAX, places), INDEX_FULL);
    owner_verify(&owner);
    owner_end(&owner);
    free(keys);
}

static void strided_rows(void **state)
{
    (void)state;
    struct rng rng = rng_begin(30);
    struct heap heap = {0};
    const struct index_params params = {32, INDEX_FP16, 16, 0.0f, 5};
    unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 300, &rng);
    unsigned char *apart = calloc(300, 96);
    for (uint32_t p = 0; p < 300; p++) {
        memcpy(apart + p * 96, keys + p * 64, 64);
    }
    struct owner a = owner_begin(&params, &heap, keys), b = owner_begin(&params, &heap, keys);
    struct index_place places[300];
    assert_int_equal(owner_append(&a, 300), INDEX_OK);
    owner_build(&a, 1000);
    assert_int_equal(index_append_prepare(b.index, apart, 96, 300, places), INDEX_OK);
    index_append_commit(b.index);
    while (index_build_step(b.index, 1000) != INDEX_BUILD_PLAN) {
    }
    index_plan_commit(b.index);
    assert_int_equal(index_version(a.index), index_version(b.index));
    owner_end(&a);
    owner_end(&b);
    free(apart);
    free(keys);
}

static void keys_that_are_refused(void **state)
{
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e19f};
    for (uint32_t dtype = INDEX_BF16; dtype <= INDEX_FP32; dtype++) {
        struct heap heap = {0};
        const struct index_params params = {32, (enum index_dtype)dtype, 16, 0.0f, 5};
        struct rng rng = {3};
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, 32, 200, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_place places[100];
        assert_int_equal(owner_append(&owner, 40), INDEX_OK);
        for (uint32_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            unsigned char row[100 * 32 * 4] = {0};
            if (dtype == INDEX_FP16) {
                const uint16_t special = i == 0 ? 0x7e00 : i % 2 == 0 ? 0xfc00 : 0x7c00;
                memcpy(row + 99 * owner.row_bytes, &special, 2);
            } else {
                element_store(params.dtype, row + 99 * owner.row_bytes + 5 * dtype_size(params.dtype), bad[i]);
            }
            assert_int_equal(index_append_prepare(owner.index, row, owner.row_bytes, 100, places), INDEX_NOT_FINITE);
            owner_verify(&owner);
        }
        assert_int_equal(owner_append(&owner, 160), INDEX_OK);
        owner_verify(&owner);
        owner_end(&owner);
        free(keys);
    }
}

// ---- refused memory ----

// A small life of a lane; every call is repeated until it is granted. Returns the version.
static uint64_t short_life(struct heap *heap, const unsigned char *keys, bool *refused_forever)
{
    const struct index_params params = {16, INDEX_BF16, 8, 0.25f, 5};
    const struct index_allocator allocator = heap_allocator(heap);
    struct owner owner = {.params = params, .keys = keys, .row_bytes = 32};
    struct index_search *search = NULL;
    float queries[32];
    struct rng rng = {17};
    uint64_t version = 0;
    uint32_t patience = 6;
    for (uint32_t i = 0; i < 32; i++) {
        queries[i] = rng_normal(&rng);
    }
    while (index_create(&params, &allocator, &owner.index) != INDEX_OK) {
        if (--patience == 0) {
            *refused_forever = true;
            return 0;
        }
    }
    while (index_search_create(&allocator, &search) != INDEX_OK && --patience > 0) {
    }
    while (owner.length < 420 && patience > 0) {
        const uint32_t some = 1 + rng_below(&rng, 99), left = 420 - owner.length;
        const uint64_t before = heap->bytes;
        while (owner_append(&owner, some < left ? some : left) != INDEX_OK && --patience > 0) {
            owner_verify(&owner);
            assert_true(heap->bytes - before < 1024); // at most a table of chunks grew
        }
        for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_IDLE && patience > 0;) {
            build = index_build_step(owner.index, 2000);
            if (build == INDEX_BUILD_PLAN) {
                owner_carry_out(&owner, NULL, NULL);
                owner_verify(&owner);
            } else if (build == INDEX_BUILD_NO_MEMORY) {
                patience--;
                owner_verify(&owner);
            }
        }
        const struct index_query query = {queries, 1, 2, owner.length, 0.25f, 20, 4, 8, false, 0.0f, 0.0f};
        while (search != NULL && patience > 0 && owner.length > 0) {
            const struct answer answer = search_run(search, owner.index, &query, 1000, UINT32_MAX);
            if (answer.status == INDEX_OK) {
                selection_verify(&owner, &query, &answer);
                break;
            }
            assert_int_equal(answer.status, INDEX_NO_MEMORY);
            patience--;
        }
    }
    *refused_forever = patience == 0;
    version = index_version(owner.index);
    index_search_destroy(search);
    owner_end(&owner);
    return version;
}

static void every_allocation_may_fail(void **state)
{
    (void)state;
    struct rng rng = rng_begin(31);
    unsigned char *keys = keys_make(KEYS_CLUSTERED, INDEX_BF16, 16, 420, &rng);
    struct heap heap = {0};
    bool forever = false;
    const uint64_t version = short_life(&heap, keys, &forever);
    const uint64_t allocations = heap.acquired;
    assert_true(!forever && version != 0 && allocations > 50 && heap.blocks == 0);
    for (uint64_t at = 1; at <= allocations; at++) {
        for (uint32_t then = 0; then < 2; then++) { // only that one; that one and all that follow
            struct heap faulty = {.refuse_at = at, .refuse_after_too = then == 1};
            const uint64_t got = short_life(&faulty, keys, &forever);
            assert_true(faulty.refused);
            assert_int_equal(faulty.bytes, 0);
            assert_int_equal(faulty.blocks, 0);
            if (then == 0) {
                assert_false(forever);
                assert_int_equal(got, version);
            } else {
                assert_true(forever);
            }
        }
    }
    free(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_bad_parameters),
        cmocka_unit_test(every_kind_of_key),
        cmocka_unit_test(small_lengths),
        cmocka_unit_test(many_levels),
        cmocka_unit_test(same_tree_however_cut),
        cmocka_unit_test(seeds_and_keys_change_the_tree),
        cmocka_unit_test(version_follows_insertions),
        cmocka_unit_test(builds_happen_at_fixed_counts),
        cmocka_unit_test(equal_keys_spread_over_cells),
        cmocka_unit_test(stores_grow_all_or_nothing),
        cmocka_unit_test(dropped_plan_comes_again),
        cmocka_unit_test(slices_are_bounded),
        cmocka_unit_test(appends_while_a_plan_is_pending),
        cmocka_unit_test(append_is_all_or_nothing),
        cmocka_unit_test(strided_rows),
        cmocka_unit_test(keys_that_are_refused),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
