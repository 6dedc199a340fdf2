// Forgetting: the ends of sequences and single tokens, at any moment of a lane's life, and what grows again.
#include "test_index_owner.h"

#include "index/tree.h"

static struct index_params params_of(uint32_t page_tokens, enum index_policy policy)
{
    return (struct index_params){.head_dim = 32,
                                 .dtype = INDEX_FP32,
                                 .page_tokens = page_tokens,
                                 .policy = policy,
                                 .promotion_ratio = policy == INDEX_PROMOTION ? 0.125f : 0.0f,
                                 .seed = 5};
}

// Other keys for the positions from `first` on.
static void keys_renew(unsigned char *keys, const struct index_params *params, uint32_t first, uint32_t n,
                       struct rng *rng)
{
    const size_t row_bytes = params->head_dim * dtype_size(params->dtype);
    unsigned char *fresh = keys_make(KEYS_CLUSTERED, params->dtype, params->head_dim, n - first, rng);
    memcpy(keys + first * row_bytes, fresh, (n - first) * row_bytes);
    free(fresh);
}

// A search that looks at everything, for its reads as much as for its answer.
static void search_all(const struct owner *owner, bool is_plain)
{
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search;
    float query_vector[INDEX_HEAD_DIM_MAX];
    double *masses = calloc(owner->length + 1, sizeof *masses);
    assert_int_equal(index_search_create(&allocator, &search), INDEX_OK);
    for (uint32_t i = 0; i < INDEX_HEAD_DIM_MAX; i++) {
        query_vector[i] = i % 3 == 0 ? 0.5f : -0.25f;
    }
    for (uint32_t variant = 0; variant < 4; variant++) {
        const struct index_query query = {.queries = query_vector,
                                          .query_count = 1,
                                          .head_count = 1,
                                          .first_position = owner->length,
                                          .scale = 0.5f / sqrtf((float)owner->params.head_dim),
                                          .budget = variant < 2 ? owner->length : 30,
                                          .sinks = 3,
                                          .window = 20,
                                          .page_wise = variant % 2 == 1};
        const struct answer answer = search_run(search, owner->index, &query, 5000, UINT32_MAX);
        selection_verify(owner, &query, &answer);
        assert_false(answer.selection.partial);
        if (variant == 0 && is_plain) { // what was forgotten has no share in any mass
            masses_exact(owner, &query, masses);
            for (uint32_t i = 0; i < answer.selection.count; i++) {
                const double mass = masses[answer.tokens[i].position];
                assert_true(fabs((double)answer.tokens[i].mass - mass) < 0.3 * mass);
            }
        }
    }
    free(masses);
    index_search_destroy(search);
    assert_int_equal(heap.blocks, 0);
}

static void fill(struct owner *owner, uint32_t n, uint32_t step)
{
    while (owner->length < n) {
        const uint32_t left = n - owner->length;
        assert_int_equal(owner_append(owner, step < left ? step : left), INDEX_OK);
        owner_build(owner, 100000);
    }
    owner_build(owner, 100000);
}

// To every kind of length, and on from there with other keys.
static void truncates_to_any_length(void **state)
{
    (void)state;
    struct rng rng = rng_begin(71);
    static const uint32_t pages[] = {1, 3, 8, 16, 20, 64, 256};
    enum { TOKENS = 1300 };
    for (uint32_t i = 0; i < 2 * sizeof pages / sizeof pages[0]; i++) {
        const uint32_t page = pages[i / 2];
        const struct index_params params = params_of(page, (enum index_policy)(i % 2));
        // Nothing, inside and around the head, inside the tree, at its end, inside the tail, and no change.
        const uint32_t indexed = (page + 256) / page * page;
        const uint32_t lengths[] = {0,
                                    1,
                                    page / 2 + 1,
                                    page - (page > 1 ? 1 : 0),
                                    page,
                                    page + 1,
                                    page + 2,
                                    63 + page,
                                    64 + page,
                                    65 + page,
                                    indexed - 1,
                                    indexed,
                                    indexed + 1,
                                    700,
                                    1000 / page * page,
                                    1001,
                                    TOKENS - INDEX_RECENT,
                                    TOKENS - 1,
                                    TOKENS,
                                    TOKENS + 1};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, TOKENS, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        for (uint32_t j = 0; j < sizeof lengths / sizeof lengths[0]; j++) {
            fill(&owner, TOKENS, 300);
            const uint64_t before = index_indexed(owner.index);
            assert_true(before + 2 * INDEX_RECENT + 2 * page >= TOKENS);
            owner_truncate(&owner, lengths[j]);
            owner_verify(&owner);
            const uint64_t after = index_indexed(owner.index);
            assert_int_equal(after, lengths[j] >= before ? before : lengths[j] <= page ? 0 : lengths[j]);
            search_all(&owner, true);
            keys_renew(keys, &params, owner.length, TOKENS, &rng);
            const uint32_t some = owner.length < TOKENS ? 1 + rng_below(&rng, TOKENS - owner.length) : 0;
            assert_int_equal(owner_append(&owner, some), INDEX_OK);
            owner_verify(&owner);
            search_all(&owner, true);
        }
        owner_truncate(&owner, 0);
        assert_int_equal(index_version(owner.index), 0);
        owner_end(&owner);
        assert_int_equal(heap.blocks, 0);
        free(keys);
    }
}

// From nothing on it is as at the beginning, but for the numbers that tell trees apart.
static void begins_anew_after_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(72);
    const struct index_params params = params_of(16, INDEX_MEANS);
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1500, &rng);
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    fill(&owner, 1500, 1500);
    struct index_shape full, again;
    index_shape(owner.index, &full);
    const uint64_t bytes = index_bytes(owner.index);
    for (uint32_t round = 0; round < 5; round++) {
        owner_truncate(&owner, 0);
        owner_verify(&owner);
        index_shape(owner.index, &again);
        assert_int_equal(again.pages, 0);
        assert_int_equal(again.levels, 1);
        assert_false(index_build_is_due(owner.index));
        fill(&owner, 1500, 1500);
        owner_verify(&owner);
        index_shape(owner.index, &again);
        assert_true(again.leaf_pages < full.leaf_pages + full.leaf_pages / 10);
        assert_true(index_bytes(owner.index) < bytes + bytes / 4); // room is used again
    }
    owner_end(&owner);
    free(keys);
}

static enum index_status status_of_large_query(const struct owner *owner)
{
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search;
    float query_vector[INDEX_HEAD_DIM_MAX] = {0x1p57f};
    assert_int_equal(index_search_create(&allocator, &search), INDEX_OK);
    const struct index_query query = {.queries = query_vector,
                                      .query_count = 1,
                                      .head_count = 1,
                                      .first_position = owner->length,
                                      .scale = 0x1p20f,
                                      .budget = 10};
    const struct answer answer = search_run(search, owner->index, &query, 5000, UINT32_MAX);
    index_search_destroy(search);
    return answer.status;
}

// A key so large that scores are refused for it is forgotten with its token: of the tail at once, of the tree with it.
static void large_norms_are_forgotten(void **state)
{
    (void)state;
    struct rng rng = rng_begin(70);
    const struct index_params params = params_of(16, INDEX_PROMOTION);
    unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 800, &rng);
    static const uint32_t large[] = {2, 300, 500};
    for (uint32_t i = 0; i < 3; i++) {
        element_store(params.dtype, keys + ((size_t)large[i] * params.head_dim + 1) * sizeof(float), 0x1p30f);
    }
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 2), INDEX_OK);
    assert_int_equal(status_of_large_query(&owner), INDEX_OK);
    assert_int_equal(owner_append(&owner, 100), INDEX_OK);
    assert_int_equal(status_of_large_query(&owner), INDEX_NOT_FINITE);
    owner_erase(&owner, 50); // not that one
    assert_int_equal(status_of_large_query(&owner), INDEX_NOT_FINITE);
    owner_erase(&owner, 2);
    assert_int_equal(status_of_large_query(&owner), INDEX_OK);
    assert_int_equal(owner_append(&owner, 299), INDEX_OK);
    assert_int_equal(status_of_large_query(&owner), INDEX_NOT_FINITE);
    owner_truncate(&owner, 290);
    assert_int_equal(status_of_large_query(&owner), INDEX_OK);
    assert_int_equal(owner_append(&owner, 310), INDEX_OK);
    owner_build(&owner, 10000); // into the tree
    assert_true(index_indexed(owner.index) > 500);
    assert_int_equal(status_of_large_query(&owner), INDEX_NOT_FINITE);
    owner_truncate(&owner, 10);
    assert_int_equal(status_of_large_query(&owner), INDEX_OK);
    owner_verify(&owner);
    owner_end(&owner);
    assert_int_equal(heap.blocks, 0);
    free(keys);
}

// What a lane no longer needs goes back at once: codes with their cells, whichever these were.
static void memory_comes_back(void **state)
{
    (void)state;
    struct rng rng = rng_begin(79);
    struct index_params params = params_of(16, INDEX_MEANS);
    params.head_dim = 128;
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 8000, &rng);
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    fill(&owner, 1000, 1000);
    const uint64_t small = index_bytes(owner.index);
    fill(&owner, 8000, 1000);
    const uint64_t full = index_bytes(owner.index);
    owner_truncate(&owner, 1000);
    owner_build(&owner, 100000);
    owner_verify(&owner);
    const uint64_t cut = index_bytes(owner.index);
    owner_truncate(&owner, 0);
    const uint64_t empty = index_bytes(owner.index);
    printf("1000 tokens %llu bytes, 8000 tokens %llu, cut to 1000 %llu, to none %llu\n", (unsigned long long)small,
           (unsigned long long)full, (unsigned long long)cut, (unsigned long long)empty);
    assert_true(cut < full / 4);
    assert_true(empty < full / 10);
    owner_end(&owner);
    assert_int_equal(heap.blocks, 0);
    free(keys);
}

// Cells that a truncation has left ragged are mended by the next builds.
static void cells_are_mended(void **state)
{
    (void)state;
    struct rng rng = rng_begin(73);
    for (uint32_t policy = 0; policy < 2; policy++) {
        struct index_params params = params_of(16, (enum index_policy)policy);
        params.promotion_ratio = 0.0f; // cells of several pages
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 6000, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        fill(&owner, 6000, 500);
        struct index_shape full, cut, mended;
        index_shape(owner.index, &full);
        owner_truncate(&owner, 2500);
        index_shape(owner.index, &cut);
        assert_true(index_build_is_due(owner.index));
        owner_build(&owner, 10000);
        owner_verify(&owner);
        index_shape(owner.index, &mended);
        printf("policy %u: %.1f tokens a page, cut %.1f, mended %.1f\n", policy, full.fill, cut.fill, mended.fill);
        assert_true(cut.fill < 0.8 * full.fill);
        assert_true(mended.fill > 0.75 * full.fill);
        assert_int_equal(mended.level_counts[0], cut.level_counts[0]);
        // The same where single tokens go.
        for (uint32_t p = 100; p < 2400; p++) {
            if (p % 5 != 0) {
                owner_erase(&owner, p);
            }
        }
        owner_verify(&owner);
        index_shape(owner.index, &cut);
        owner_build(&owner, 10000);
        owner_verify(&owner);
        index_shape(owner.index, &mended);
        printf("policy %u: erased %.1f, mended %.1f\n", policy, cut.fill, mended.fill);
        assert_true(mended.fill > 0.7 * full.fill);
        search_all(&owner, true);
        owner_end(&owner);
        free(keys);
    }
}

// Erased tokens are in no answer; erasing again changes nothing; all of them can go.
static void erases_single_tokens(void **state)
{
    (void)state;
    struct rng rng = rng_begin(74);
    static const uint32_t pages[] = {1, 3, 16, 64};
    for (uint32_t i = 0; i < 8; i++) {
        const struct index_params params = params_of(pages[i / 2], (enum index_policy)(i % 2));
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1000, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        fill(&owner, 900, 300);
        for (uint32_t round = 0; round < 300; round++) {
            const uint32_t position = rng_below(&rng, owner.length);
            const bool was = owner.erased[position];
            const uint64_t version = index_version(owner.index);
            owner_erase(&owner, position);
            assert_int_equal(index_version(owner.index) == version, was);
            owner_check(&owner);
            if (round % 50 == 0) {
                owner_verify(&owner);
                search_all(&owner, true);
            }
            if (round == 150) {
                owner_build(&owner, 1000);
                fill(&owner, 1000, 30);
            }
        }
        uint32_t order[1000];
        for (uint32_t p = 0; p < 1000; p++) { // a random order
            const uint32_t other = rng_below(&rng, p + 1);
            order[p] = order[other];
            order[other] = p;
        }
        for (uint32_t p = 0; p < 1000; p++) {
            owner_erase(&owner, order[p]);
            if (p % 100 == 0) {
                owner_build(&owner, 1000);
                owner_verify(&owner);
            }
        }
        owner_verify(&owner);
        struct index_shape shape;
        index_shape(owner.index, &shape);
        assert_int_equal(shape.pages, 0);
        search_all(&owner, true);
        owner_build(&owner, 1000);
        keys_renew(keys, &params, 0, 1000, &rng);
        owner_truncate(&owner, 0);
        fill(&owner, 1000, 100);
        owner_verify(&owner);
        owner_end(&owner);
        free(keys);
    }
}

// A batch of which no token is left, and open pages with holes.
static void erases_the_tail(void **state)
{
    (void)state;
    struct rng rng = rng_begin(75);
    const struct index_params params = params_of(16, INDEX_MEANS);
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1000, &rng);
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 330), INDEX_OK);
    for (uint32_t p = 0; p < 330; p++) {
        owner_erase(&owner, p);
    }
    owner_verify(&owner);
    assert_int_equal(owner_append(&owner, 10), INDEX_OK);
    owner_build(&owner, 1000); // a first batch of nothing
    assert_int_equal(index_indexed(owner.index), 272);
    owner_verify(&owner);
    fill(&owner, 700, 33);
    owner_verify(&owner);
    search_all(&owner, true);
    for (uint32_t p = (uint32_t)index_indexed(owner.index); p < 690; p++) {
        if (p % 7 != 0) {
            owner_erase(&owner, p);
        }
        if (p % 40 == 0) {
            assert_int_equal(owner_append(&owner, 3), INDEX_OK);
        }
        owner_check(&owner);
    }
    search_all(&owner, true);
    fill(&owner, 1000, 100);
    owner_verify(&owner);
    search_all(&owner, true);
    owner_end(&owner);
    free(keys);
}

struct between {
    struct owner *owner;
    bool truncates;
    uint32_t position;
};
static void forget_between(void *argument)
{
    const struct between *between = argument;
    if (between->truncates) {
        owner_truncate(between->owner, between->position);
    } else {
        owner_erase(between->owner, between->position);
    }
}

// Forgetting voids a build at any moment: while rows are asked for, worked on, planned, dropped, copied.
static void voids_a_running_build(void **state)
{
    (void)state;
    struct rng rng = rng_begin(76);
    for (uint32_t policy = 0; policy < 2; policy++) {
        const struct index_params params = params_of(8, (enum index_policy)policy);
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, 2000, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        fill(&owner, 700, 700);
        for (uint32_t round = 0; round < rounds_of(240); round++) {
            const uint32_t some = 150 + rng_below(&rng, 100);
            assert_int_equal(owner_append(&owner, some), INDEX_OK);
            const uint32_t moment = round % 6;
            struct between between = {&owner, rng_below(&rng, 2) == 0, 0};
            between.position =
                between.truncates ? owner.length - 1 - rng_below(&rng, 2 * some) : rng_below(&rng, owner.length);
            const uint64_t indexed = index_indexed(owner.index);
            enum index_build_state build = INDEX_BUILD_MORE;
            const uint32_t steps = rng_below(&rng, 60);
            for (uint32_t i = 0; i < steps && build == INDEX_BUILD_MORE; i++) {
                build = owner_step(&owner, 1 + rng_below(&rng, 300));
            }
            if (moment == 1) { // rows are asked for
                while (build == INDEX_BUILD_MORE) {
                    build = index_build_step(owner.index, 300);
                }
            } else if (moment >= 2 && build != INDEX_BUILD_PLAN) {
                owner_build_plan(&owner, 1000);
            }
            if (moment == 3) {
                owner_drop_plan(&owner);
            }
            if (moment >= 4) {
                owner_carry_out(&owner, forget_between, &between);
                assert_true(owner.is_void);
            } else {
                forget_between(&between);
            }
            assert_true(index_indexed(owner.index) <= indexed);
            assert_int_equal(index_bytes(owner.index), heap.bytes);
            owner_verify(&owner);
            if (round % 4 == 0) {
                owner_build(&owner, 3000);
                owner_verify(&owner);
                search_all(&owner, true);
            }
            if (owner.length > 1500) {
                owner_truncate(&owner, 500 + rng_below(&rng, 500));
            }
        }
        owner_end(&owner);
        assert_int_equal(heap.blocks, 0);
        free(keys);
    }
}

// What a voided build has done leaves no trace: the tree goes on as if it had not been begun.
static void voided_builds_leave_no_trace(void **state)
{
    (void)state;
    struct rng rng = rng_begin(77);
    for (uint32_t round = 0; round < rounds_of(40); round++) {
        struct index_params params = params_of(round % 3 == 0 ? 16 : 4, (enum index_policy)(round % 2));
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 3000, &rng);
        for (uint32_t i = 0; i < 100 * 32; i++) { // keys with large norms where the build will be voided
            float *element = (float *)(void *)keys + 930 * 32 + i;
            *element *= 50.0f;
        }
        struct heap heap = {0};
        struct owner quiet = owner_begin(&params, &heap, keys), busy = owner_begin(&params, &heap, keys);
        fill(&quiet, 1000, 1000);
        fill(&busy, 1000, 1000);
        assert_int_equal(owner_append(&quiet, 200), INDEX_OK);
        assert_int_equal(owner_append(&busy, 200), INDEX_OK);
        enum index_build_state build = INDEX_BUILD_MORE;
        const uint32_t steps = 1 + rng_below(&rng, 200);
        for (uint32_t i = 0; i < steps && build != INDEX_BUILD_PLAN; i++) {
            build = owner_step(&busy, 200);
        }
        assert_true(index_indexed(quiet.index) < 930);
        owner_truncate(&quiet, 930);
        owner_truncate(&busy, 930);
        keys_renew(keys, &params, 930, 3000, &rng);
        fill(&quiet, 3000, 500);
        fill(&busy, 3000, 700);
        assert_int_equal(index_version(quiet.index), index_version(busy.index));
        owner_verify(&quiet);
        owner_verify(&busy);
        owner_end(&quiet);
        owner_end(&busy);
        free(keys);
    }
}

// Anything in any order.
static void a_life_of_changes(void **state)
{
    (void)state;
    struct rng rng = rng_begin(78);
    static const uint32_t pages[] = {1, 3, 8, 16, 20, 64, 256}, dims[] = {16, 48, 64, 80, 128, 256};
    for (uint32_t life = 0; life < rounds_of(56); life++) {
        const struct index_params params = {.head_dim = dims[rng_below(&rng, life % 4 == 0 ? 6 : 3)],
                                            .dtype = (enum index_dtype)(1 + rng_below(&rng, 3)),
                                            .page_tokens = pages[life % 7],
                                            .policy = (enum index_policy)(life / 7 % 2),
                                            .promotion_ratio = life % 3 == 0 ? 0.125f : 0.0f,
                                            .seed = rng_next(&rng),
                                            .is_continuation = life % 5 < 2};
        const uint32_t n = 3000;
        const enum keys_kind kind = (enum keys_kind)rng_below(&rng, KEYS_KINDS);
        unsigned char *keys = keys_make(kind, params.dtype, params.head_dim, n, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        bool has_plan = false;
        for (uint32_t event = 0; event < 300; event++) {
            const uint32_t what = rng_below(&rng, 100);
            if (what < 30) {
                const uint32_t some = rng_below(&rng, what < 5 ? 500 : 40), left = n - owner.length;
                const enum index_status expected = index_is_sealed(owner.index) ? INDEX_INVALID : INDEX_OK;
                assert_int_equal(owner_append(&owner, some < left ? some : left), expected);
            } else if (what < 75) {
                has_plan = has_plan || owner_step(&owner, 1 + rng_below(&rng, 20000)) == INDEX_BUILD_PLAN;
                if (has_plan && rng_below(&rng, 3) != 0) {
                    owner_carry_out(&owner, NULL, NULL);
                    has_plan = false;
                } else if (has_plan && rng_below(&rng, 3) == 0) {
                    owner_drop_plan(&owner);
                    has_plan = false;
                }
            } else if (what < 78) {
                const uint32_t back = 1 + rng_below(&rng, rng_below(&rng, 8) == 0 ? 3000 : 400);
                has_plan = has_plan && owner.length == 0; // nothing is voided where nothing goes
                owner_truncate(&owner, owner.length - (back < owner.length ? back : owner.length));
            } else if (what < 90 && owner.length > 0) {
                const uint32_t position = rng_below(&rng, owner.length);
                for (uint32_t i = 0; i < 20 && position + i < owner.length; i++) {
                    owner_erase(&owner, position + i);
                }
                has_plan = false;
            } else if (what < 92) {
                search_all(&owner, kind <= KEYS_FEW_DISTINCT);
            } else if (what == 92 && event > 200) {
                index_seal(owner.index);
            }
            owner_check(&owner);
            assert_int_equal(index_bytes(owner.index), heap.bytes);
        }
        if (has_plan) {
            owner_drop_plan(&owner);
        }
        owner_build(&owner, 10000);
        owner_verify(&owner);
        owner_end(&owner);
        assert_int_equal(heap.blocks, 0);
        free(keys);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(truncates_to_any_length),
        cmocka_unit_test(begins_anew_after_nothing),
        cmocka_unit_test(large_norms_are_forgotten),
        cmocka_unit_test(memory_comes_back),
        cmocka_unit_test(cells_are_mended),
        cmocka_unit_test(erases_single_tokens),
        cmocka_unit_test(erases_the_tail),
        cmocka_unit_test(voids_a_running_build),
        cmocka_unit_test(voided_builds_leave_no_trace),
        cmocka_unit_test(a_life_of_changes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
