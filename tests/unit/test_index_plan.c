// Appends, rows, plans and refused memory: what is promised between the index and its owner.
#include "test_index_owner.h"

#include "index/tree.h"

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

// Elements of a slab are acquired in the order in which they were released last; what was reserved is not refused.
static void slabs_give_the_last_released_first(void **state)
{
    (void)state;
    struct heap heap = {0};
    struct dci_memory memory = {.allocator = heap_allocator(&heap)};
    struct dci_slab slab;
    uint32_t id;
    dci_slab_init(&slab, 8, 2);
    for (uint32_t i = 0; i < 6; i++) {
        assert_true(dci_slab_acquire(&slab, &memory, &id));
        assert_int_equal(id, i);
    }
    dci_slab_release(&slab, 2);
    dci_slab_release(&slab, 4);
    assert_int_equal(slab.used, 4);
    assert_true(dci_slab_reserve(&slab, &memory, 7));
    heap.refuse_at = heap.acquired + 1;
    heap.refuse_after_too = true;
    static const uint32_t expected[] = {4, 2, 6, 7, 8, 9, 10};
    for (uint32_t i = 0; i < 7; i++) {
        assert_true(dci_slab_acquire(&slab, &memory, &id));
        assert_int_equal(id, expected[i]);
    }
    while (dci_slab_acquire(&slab, &memory, &id)) {
        assert_true(id < 12); // the rest of the chunk
    }
    assert_int_equal(slab.used, slab.bound);
    dci_slab_fini(&slab, &memory);
    assert_int_equal(heap.blocks, 0);
}

static struct index_moves_copy {
    struct index_move *moves;
    uint32_t count, new_pages, released_pages;
} plan_copy(const struct index *index)
{
    struct index_plan plan;
    index_plan_get(index, &plan);
    struct index_moves_copy copy = {malloc((plan.move_count + 1) * sizeof *plan.moves), plan.move_count,
                                    plan.new_page_count, plan.released_page_count};
    memcpy(copy.moves, plan.moves, plan.move_count * sizeof *plan.moves);
    return copy;
}

// A dropped plan comes again, the same to the last move, though the tail has grown meanwhile.
static void dropped_plan_comes_again(void **state)
{
    (void)state;
    struct rng rng = rng_begin(26);
    const struct index_params params = {.head_dim = 16, .dtype = INDEX_BF16, .page_tokens = 16, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1100, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 500), INDEX_OK);
    for (uint32_t kind = 0; kind < 4; kind++) { // first the first batch, then others
        owner_build_plan(&owner, 1000);
        const struct index_moves_copy first = plan_copy(owner.index);
        struct index_shape before, after;
        index_shape(owner.index, &before);
        const uint64_t indexed = index_indexed(owner.index), version = index_version(owner.index);
        owner_drop_plan(&owner);
        assert_int_equal(index_indexed(owner.index), indexed);
        assert_int_equal(index_version(owner.index), version);
        owner_verify(&owner);
        assert_int_equal(owner_append(&owner, kind == 1 ? 300 : 3), INDEX_OK);
        assert_int_equal(owner_step(&owner, 1), INDEX_BUILD_PLAN);
        index_shape(owner.index, &after);
        assert_memory_equal(after.level_counts, before.level_counts, sizeof after.level_counts);
        const struct index_moves_copy again = plan_copy(owner.index);
        assert_int_equal(again.count, first.count);
        assert_int_equal(again.new_pages, first.new_pages);
        assert_int_equal(again.released_pages, first.released_pages);
        assert_memory_equal(again.moves, first.moves, first.count * sizeof *first.moves);
        owner_carry_out(&owner, NULL, NULL);
        owner_verify(&owner);
        free(first.moves);
        free(again.moves);
    }
    owner_build(&owner, 1000);
    owner_verify(&owner);
    owner_end(&owner);
    free(keys);
}

// What a build has made before its commit is not in the shape.
static void shape_is_of_the_tree(void **state)
{
    (void)state;
    struct rng rng = rng_begin(37);
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_BF16, .page_tokens = 8, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1500, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 1500), INDEX_OK);
    while (index_build_is_due(owner.index)) {
        struct index_shape before, after;
        index_shape(owner.index, &before);
        owner_build_plan(&owner, 1000);
        index_shape(owner.index, &after);
        assert_int_equal(after.levels, before.levels);
        assert_memory_equal(after.level_counts, before.level_counts, sizeof after.level_counts);
        assert_int_equal(after.pages, before.pages);
        assert_int_equal(after.leaf_pages, before.leaf_pages);
        owner_carry_out(&owner, NULL, NULL);
    }
    owner_end(&owner);
    free(keys);
}

// Slices are short: no call does much more than it was asked to. Counted in calls, since there is no clock.
static void slices_are_bounded(void **state)
{
    (void)state;
    struct rng rng = rng_begin(27);
    const struct index_params params = {.head_dim = 128, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1104, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    static const uint64_t units[] = {1000000, 100, 1};
    uint32_t calls[3] = {0};
    for (uint32_t i = 0; i < 3; i++) {
        struct owner one = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&one, 1104), INDEX_OK);
        for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_IDLE;) {
            build = owner_step(&one, units[i]);
            calls[i] += build == INDEX_BUILD_MORE ? 1 : 0;
            if (build == INDEX_BUILD_PLAN) {
                owner_carry_out(&one, NULL, NULL);
            }
        }
        owner_end(&one);
    }
    printf("%u, %u and %u calls\n", calls[0], calls[1], calls[2]);
    assert_true(calls[0] < 14); // 1 + 12 batches
    assert_true(calls[1] > 150);
    assert_true(calls[2] >= 1024 + 768); // each token is loaded, and routed but for the first batch
    owner_end(&owner);
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
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP16, .page_tokens = 24, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 4000, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 500), INDEX_OK);
    while (owner.length < 3900) {
        const enum index_build_state build = owner_step(&owner, 20000);
        if (build == INDEX_BUILD_IDLE || build == INDEX_BUILD_ROWS) {
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

// The pages that a build asks for are those of its tokens, in order, then leaves, each named once.
static void rows_that_are_asked_for(void **state)
{
    (void)state;
    struct rng rng = rng_begin(38);
    const struct index_params params = {.head_dim = 16, .dtype = INDEX_FP32, .page_tokens = 8, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 3000, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    uint32_t asked = 0, opened = 0;
    assert_int_equal(owner_append(&owner, 3000), INDEX_OK);
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_IDLE;) {
        build = index_build_step(owner.index, 100000);
        if (build == INDEX_BUILD_PLAN) {
            owner_carry_out(&owner, NULL, NULL);
        } else if (build == INDEX_BUILD_ROWS) {
            const uint32_t *pages;
            uint32_t count;
            index_rows_get(owner.index, &pages, &count);
            for (uint32_t i = 0; i < count; i++) {
                const struct page *page = dci_page(owner.index, pages[i]);
                const bool is_open = page->state == PAGE_OPEN;
                assert_true(is_open || page->state == PAGE_LEAF);
                assert_true(!is_open || page->owner == 8 + 8 * opened);
                opened += is_open ? 1 : 0;
                asked += is_open ? 0 : 1;
                for (uint32_t j = 0; j < i; j++) {
                    assert_true(pages[i] != pages[j]);
                }
            }
            owner_lend(&owner);
        }
    }
    assert_int_equal(8 + 8 * opened, index_indexed(owner.index));
    assert_true(asked > 100);
    assert_true(asked < 3000); // most tokens join a cell without it
    owner_end(&owner);
    free(keys);
}

// Prepare, then drop or commit, with plans committed in between.
static void append_is_all_or_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(29);
    const struct index_params params = {.head_dim = 16, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 600, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    struct index_place places[600], again[600];
    assert_int_equal(owner_append(&owner, 410), INDEX_OK);
    const unsigned char *next = keys + 410 * owner.row_bytes;
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 100, places), INDEX_OK);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 100, again), INDEX_INVALID);
    assert_int_equal(index_length(owner.index), 410);
    owner_build(&owner, 1000); // two batches, committed under the prepared append
    assert_int_equal(index_indexed(owner.index), 336);
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
    assert_int_equal(index_append_prepare(owner.index, NULL, owner.row_bytes, 1, places), INDEX_INVALID);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, 1, NULL), INDEX_INVALID);
    assert_int_equal(index_append_prepare(owner.index, next, owner.row_bytes, INDEX_TOKENS_MAX, places), INDEX_FULL);
    owner_verify(&owner);
    owner_end(&owner);
    free(keys);
}

// In slices of any length a prepared append is what it is at once; a slice that is refused leaves those before it.
static void append_in_slices(void **state)
{
    (void)state;
    enum { TOKENS = 500 };
    struct rng rng = rng_begin(31);
    const struct index_params params = {.head_dim = 16, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 5};
    struct heap heap = {0};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 100 + TOKENS, &rng);
    for (uint32_t slice = 1; slice < TOKENS; slice = slice * 3 + 4) {
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_place places[TOKENS], sliced[TOKENS], ignored[TOKENS];
        assert_int_equal(owner_append(&owner, 100), INDEX_OK);
        const size_t row = owner.row_bytes;
        const unsigned char *next = keys + 100 * row;
        float *bad = calloc(params.head_dim, sizeof *bad);
        bad[3] = NAN;
        assert_int_equal(index_append_more(owner.index, next, row, 1), INDEX_INVALID); // nothing is prepared
        assert_int_equal(index_append_prepare(owner.index, next, row, TOKENS, places), INDEX_OK);
        index_append_drop(owner.index);
        const uint64_t bytes = index_bytes(owner.index);
        for (uint32_t round = 0; round < 2; round++) {
            assert_int_equal(index_append_prepare(owner.index, next, row, slice, ignored), INDEX_OK);
            for (uint32_t done = slice, n; done < TOKENS; done += n) {
                n = slice < TOKENS - done ? slice : TOKENS - done;
                assert_int_equal(index_append_more(owner.index, bad, row, 1), INDEX_NOT_FINITE);
                assert_int_equal(index_append_more(owner.index, next + done * row, row, n), INDEX_OK);
            }
            index_append_places(owner.index, 100, TOKENS, sliced);
            for (uint32_t i = 0; i < TOKENS; i++)
                assert_int_equal(sliced[i].row, places[i].row);
            if (round == 0) {
                index_append_drop(owner.index);
                assert_int_equal(index_bytes(owner.index), bytes);
            }
        }
        index_append_drop(owner.index);
        owner_verify(&owner);
        owner_end(&owner);
        free(bad);
    }
    free(keys);
}

static void strided_rows(void **state)
{
    (void)state;
    struct rng rng = rng_begin(30);
    struct heap heap = {0};
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP16, .page_tokens = 16, .seed = 5};
    unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 340, &rng);
    unsigned char *apart = calloc(340, 96);
    for (uint32_t p = 0; p < 340; p++) {
        memcpy(apart + p * 96, keys + p * 64, 64);
    }
    struct owner a = owner_begin(&params, &heap, keys), b = owner_begin(&params, &heap, keys);
    struct index_place places[340];
    assert_int_equal(owner_append(&a, 340), INDEX_OK);
    owner_build(&a, 1000);
    assert_int_equal(index_append_prepare(b.index, apart, 96, 340, places), INDEX_OK);
    memset(apart, 0xff, 340 * 96); // it has its codes
    index_append_commit(b.index);
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_PLAN;) {
        build = index_build_step(b.index, 1000);
        if (build == INDEX_BUILD_ROWS) {
            const void *rows[340];
            const uint32_t *pages;
            uint32_t count;
            index_rows_get(b.index, &pages, &count);
            for (uint32_t i = 0; i < count; i++) {
                rows[i] = keys + dci_page(b.index, pages[i])->owner * 64;
            }
            index_rows_give(b.index, rows, 64);
        }
    }
    index_plan_commit(b.index);
    assert_int_equal(index_version(a.index), index_version(b.index));
    owner_end(&a);
    owner_end(&b);
    free(apart);
    free(keys);
}

// An owner whose rows are not what was appended gets a tree that is of no use, but in order.
static void rows_that_are_no_numbers(void **state)
{
    (void)state;
    static unsigned char garbage[16 * 32 * 4];
    char text[256];
    memset(garbage, 0xff, sizeof garbage);
    struct rng rng = rng_begin(31);
    struct heap heap = {0};
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 5};
    unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 2000, &rng);
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 1000), INDEX_OK);
    owner_build(&owner, 1000);
    assert_int_equal(owner_append(&owner, 1000), INDEX_OK);
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_IDLE;) {
        build = index_build_step(owner.index, 1000);
        if (build == INDEX_BUILD_PLAN) {
            index_plan_commit(owner.index);
            assert_true(index_check(owner.index, text, sizeof text));
        } else if (build == INDEX_BUILD_ROWS) {
            const void *rows[2000];
            const uint32_t *pages;
            uint32_t count;
            index_rows_get(owner.index, &pages, &count);
            for (uint32_t i = 0; i < count; i++) {
                rows[i] = garbage;
            }
            index_rows_give(owner.index, rows, 32 * 4);
        }
    }
    assert_true(index_indexed(owner.index) + 2 * INDEX_RECENT >= 2000);
    owner_end(&owner);
    free(keys);
}

static void keys_that_are_refused(void **state)
{
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f, 0x1.1p58f};
    for (uint32_t dtype = INDEX_BF16; dtype <= INDEX_FP32; dtype++) {
        struct heap heap = {0};
        const struct index_params params = {
            .head_dim = 32, .dtype = (enum index_dtype)dtype, .page_tokens = 16, .seed = 5};
        struct rng rng = {3};
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, 32, 200, &rng);
        struct owner owner = owner_begin(&params, &heap, keys);
        struct index_place places[100];
        assert_int_equal(owner_append(&owner, 40), INDEX_OK);
        const uint64_t bytes = heap.bytes;
        for (uint32_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            unsigned char row[100 * 32 * 4] = {0};
            if (dtype == INDEX_FP16) {
                const uint16_t special = i == 0 ? 0x7e00 : i % 2 == 0 ? 0xfc00 : 0x7c00;
                memcpy(row + 99 * owner.row_bytes, &special, 2);
            } else {
                element_store(params.dtype, row + 99 * owner.row_bytes + 5 * dtype_size(params.dtype), bad[i]);
            }
            assert_int_equal(index_append_prepare(owner.index, row, owner.row_bytes, 100, places), INDEX_NOT_FINITE);
            assert_int_equal(heap.bytes, bytes);
            owner_verify(&owner);
        }
        if (dtype != INDEX_FP16) { // exactly at the bound
            unsigned char row[32 * 4] = {0};
            element_store(params.dtype, row, 0x1p58f);
            assert_int_equal(index_append_prepare(owner.index, row, owner.row_bytes, 1, places), INDEX_OK);
            index_append_drop(owner.index);
        }
        assert_int_equal(owner_append(&owner, 160), INDEX_OK);
        owner_verify(&owner);
        owner_end(&owner);
        free(keys);
    }
}

// Sums over a whole page of keys that are just not refused stay finite.
static void keys_at_the_bound(void **state)
{
    (void)state;
    for (uint32_t policy = 0; policy < 2; policy++) {
        enum { DIM = 16, TOKENS = 700 };
        struct heap heap = {0};
        struct rng rng = {8 + policy};
        const struct index_params params = {
            .head_dim = DIM, .dtype = INDEX_FP32, .page_tokens = 256, .policy = (enum index_policy)policy, .seed = 6};
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, DIM, TOKENS, &rng);
        float *elements = (float *)(void *)keys;
        for (uint32_t t = 0; t < TOKENS; t++) {
            double norm2 = 0.0;
            for (uint32_t j = 0; j < DIM; j++) {
                norm2 += (double)elements[t * DIM + j] * (double)elements[t * DIM + j];
            }
            for (uint32_t j = 0; j < DIM; j++) {
                elements[t * DIM + j] = (float)((double)elements[t * DIM + j] / sqrt(norm2) * 0x1.ffp57);
            }
        }
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&owner, TOKENS), INDEX_OK);
        owner_build(&owner, 1000);
        owner_verify(&owner);
        assert_true(index_indexed(owner.index) > 256);
        owner_end(&owner);
        free(keys);
    }
}

// ---- refused memory ----

enum { LIFE_TOKENS = 560, PATIENCE = 6 };

struct life {
    struct owner owner;
    struct index_search *search;
    struct rng rng;
    float queries[32];
    uint32_t patience;
};

static void life_append(struct life *life, const struct heap *heap)
{
    struct owner *owner = &life->owner;
    const uint32_t some = 1 + rng_below(&life->rng, 99), left = LIFE_TOKENS - owner->length;
    const uint64_t before = heap->bytes;
    while (owner_append(owner, some < left ? some : left) != INDEX_OK && --life->patience > 0) {
        owner_verify(owner);
        assert_true(heap->bytes - before < 8192); // at most tables of chunks, and the chunk of the next token
    }
}

static void life_build(struct life *life)
{
    struct owner *owner = &life->owner;
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_IDLE && life->patience > 0;) {
        build = owner_step(owner, 2000);
        if (build == INDEX_BUILD_PLAN) {
            owner_carry_out(owner, NULL, NULL);
            owner_verify(owner);
        } else if (build == INDEX_BUILD_NO_MEMORY) {
            life->patience--;
            owner_verify(owner);
        }
    }
}

static void life_search(struct life *life)
{
    const struct owner *owner = &life->owner;
    const struct index_query query = {.queries = life->queries,
                                      .query_count = 1,
                                      .head_count = 2,
                                      .first_position = owner->length,
                                      .scale = 0.25f,
                                      .budget = 20,
                                      .sinks = 4,
                                      .window = 8};
    while (life->search != NULL && life->patience > 0 && owner->length > 0) {
        const struct answer answer = search_run(life->search, owner->index, &query, 1000, UINT32_MAX);
        if (answer.status == INDEX_OK) {
            selection_verify(owner, &query, &answer);
            break;
        }
        assert_int_equal(answer.status, INDEX_NO_MEMORY);
        life->patience--;
    }
}

// A small life of a lane; every call is repeated until it is granted. Returns the version; 0: patience ended.
static uint64_t short_life(struct heap *heap, const struct index_params *params, const unsigned char *keys)
{
    const struct index_allocator allocator = heap_allocator(heap);
    struct life life = {.owner = {.params = *params, .keys = keys, .row_bytes = 32}, .rng = {17}, .patience = PATIENCE};
    for (uint32_t i = 0; i < 32; i++) {
        life.queries[i] = rng_normal(&life.rng);
    }
    while (index_create(params, &allocator, &life.owner.index) != INDEX_OK) {
        if (--life.patience == 0) {
            return 0;
        }
    }
    while (index_search_create(&allocator, &life.search) != INDEX_OK && --life.patience > 0) {
    }
    bool has_truncated = false;
    while (life.owner.length < LIFE_TOKENS && life.patience > 0) {
        life_append(&life, heap);
        life_build(&life);
        life_search(&life);
        if (life.owner.length > 450 && life.patience > 0 && !has_truncated) { // forgetting cannot fail
            has_truncated = true;
            owner_truncate(&life.owner, 390);
            for (uint32_t i = 0; i < 150; i++) {
                owner_erase(&life.owner, 7 + 2 * i);
            }
            owner_verify(&life.owner);
        }
    }
    const uint64_t version = life.patience == 0 ? 0 : index_version(life.owner.index);
    index_search_destroy(life.search);
    owner_end(&life.owner);
    return version;
}

static void every_allocation_may_fail(void **state)
{
    (void)state;
    struct rng rng = rng_begin(31);
    unsigned char *keys = keys_make(KEYS_CLUSTERED, INDEX_BF16, 16, LIFE_TOKENS, &rng);
    for (uint32_t policy = 0; policy < 2; policy++) {
        const struct index_params params = {.head_dim = 16,
                                            .dtype = INDEX_BF16,
                                            .page_tokens = 8,
                                            .policy = (enum index_policy)policy,
                                            .promotion_ratio = 0.125f,
                                            .seed = 5};
        struct heap heap = {0};
        const uint64_t version = short_life(&heap, &params, keys), allocations = heap.acquired;
        assert_true(version != 0 && allocations > 100 && heap.blocks == 0);
        for (uint64_t at = 1; at <= allocations; at += 16 / rounds_of(16) + (rounds_of(16) > 16 ? 1 : 0)) {
            for (uint32_t then = 0; then < 2; then++) { // only that one; that one and all that follow
                struct heap faulty = {.refuse_at = at, .refuse_after_too = then == 1};
                const uint64_t got = short_life(&faulty, &params, keys);
                assert_true(faulty.refused);
                assert_int_equal(faulty.bytes, 0);
                assert_int_equal(faulty.blocks, 0);
                assert_int_equal(got, then == 0 ? version : 0);
            }
        }
        printf("policy %u: %llu allocations\n", policy, (unsigned long long)allocations);
    }
    free(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stores_grow_all_or_nothing), cmocka_unit_test(slabs_give_the_last_released_first),
        cmocka_unit_test(dropped_plan_comes_again),   cmocka_unit_test(shape_is_of_the_tree),
        cmocka_unit_test(slices_are_bounded),         cmocka_unit_test(appends_while_a_plan_is_pending),
        cmocka_unit_test(rows_that_are_asked_for),    cmocka_unit_test(append_is_all_or_nothing),
        cmocka_unit_test(append_in_slices),           cmocka_unit_test(strided_rows),
        cmocka_unit_test(rows_that_are_no_numbers),   cmocka_unit_test(keys_that_are_refused),
        cmocka_unit_test(keys_at_the_bound),          cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
