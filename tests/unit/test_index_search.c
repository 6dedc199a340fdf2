// Searches against brute force: exact at full effort, valid when cut short, and good by default on real attention.
#include "test_index_owner.h"

struct lane {
    struct heap heap;
    struct owner owner;
    struct index_search *search;
    unsigned char *keys;
    double *masses;
    float *queries;
};

static void lane_begin(struct lane *lane, const struct index_params *params, enum keys_kind kind, uint32_t n,
                       uint32_t views_max, struct rng *rng)
{
    memset(lane, 0, sizeof *lane);
    lane->keys = keys_make(kind, params->dtype, params->head_dim, n, rng);
    lane->owner = owner_begin(params, &lane->heap, lane->keys);
    lane->masses = calloc(n + 1, sizeof *lane->masses);
    lane->queries = calloc((size_t)views_max * params->head_dim, sizeof(float));
    const struct index_allocator allocator = heap_allocator(&lane->heap);
    assert_int_equal(index_search_create(&allocator, &lane->search), INDEX_OK);
}

static void lane_end(struct lane *lane)
{
    index_search_destroy(lane->search);
    owner_end(&lane->owner);
    assert_int_equal(lane->heap.blocks, 0);
    free(lane->keys);
    free(lane->masses);
    free(lane->queries);
}

static void lane_queries(struct lane *lane, uint32_t views, float strength, struct rng *rng)
{
    for (uint32_t i = 0; i < views * lane->owner.params.head_dim; i++) {
        lane->queries[i] = strength * rng_normal(rng);
    }
}

static int by_mass(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Mass of the exact best selection of `count` tokens.
static double best_mass(const double *masses, struct bounds b, uint32_t count)
{
    const uint32_t n = b.high - b.low;
    double *sorted = malloc((n + 1) * sizeof *sorted), sum = 0.0;
    memcpy(sorted, masses + b.low, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_mass);
    for (uint32_t i = 0; i < count && i < n; i++) {
        sum += sorted[i];
    }
    free(sorted);
    return sum;
}

static double mass_of(const double *masses, const struct answer *answer)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        sum += masses[answer->tokens[i].position];
    }
    return sum;
}

static double mass_range(const double *masses, uint32_t begin, uint32_t end)
{
    double sum = 0.0;
    for (uint32_t p = begin; p < end; p++) {
        sum += masses[p];
    }
    return sum;
}

static void assert_near(double x, double y, double tolerance)
{
    if (!(fabs(x - y) <= tolerance)) {
        fail_msg("%.9g is not %.9g", x, y);
    }
}

// How far fp32 scores may be off, as a share of a mass: some units in the last place of the largest possible score.
static double mass_tolerance(const struct lane *lane, const struct index_query *query)
{
    const uint32_t dim = lane->owner.params.head_dim;
    const size_t size = dtype_size(lane->owner.params.dtype);
    double key_max = 0.0, query_max = 0.0;
    for (uint32_t p = 0; p < lane->owner.length; p++) {
        double norm2 = 0.0;
        for (uint32_t j = 0; j < dim; j++) {
            norm2 += pow((double)element_load(lane->owner.params.dtype, lane->keys + (p * dim + j) * size), 2);
        }
        key_max = norm2 > key_max ? norm2 : key_max;
    }
    for (uint32_t v = 0; v < query->query_count * query->head_count; v++) {
        double norm2 = 0.0;
        for (uint32_t j = 0; j < dim; j++) {
            norm2 += pow((double)query->queries[v * dim + j], 2);
        }
        query_max = norm2 > query_max ? norm2 : query_max;
    }
    return expm1(1e-6 * (10.0 + (double)query->scale * sqrt(key_max * query_max)));
}

// At full effort a selection is the brute force's, with its masses.
static void assert_exact(struct lane *lane, const struct index_query *query, uint64_t work_units)
{
    const struct answer answer = search_run(lane->search, lane->owner.index, query, work_units, UINT32_MAX);
    assert_int_equal(answer.status, INDEX_OK);
    assert_false(answer.selection.partial);
    selection_verify(&lane->owner, query, &answer);
    masses_exact(&lane->owner, query, lane->masses);
    const struct bounds b = bounds_of(&lane->owner, query);
    const double tolerance = mass_tolerance(lane, query);
    const uint32_t eligible = b.high - b.low, count = query->budget < eligible ? query->budget : eligible;
    assert_int_equal(answer.selection.count, count);
    assert_int_equal(answer.selection.scanned, b.visible);
    for (uint32_t i = 0; i < count; i++) {
        const double mass = lane->masses[answer.tokens[i].position];
        assert_near((double)answer.tokens[i].mass, mass, 1e-6 + tolerance * mass);
    }
    const double best = best_mass(lane->masses, b, count);
    assert_near(mass_of(lane->masses, &answer), best, 1e-6 + tolerance * best);
    const double ends = mass_range(lane->masses, 0, b.low) + mass_range(lane->masses, b.high, b.visible);
    assert_near((double)answer.selection.ends_mass, ends, 1e-5 + tolerance * ends);
}

static void exact_at_full_effort(void **state)
{
    (void)state;
    struct rng rng = rng_begin(41);
    static const uint32_t pages[] = {1, 8, 16, 16, 40, 128};
    for (uint32_t round = 0; round < 60; round++) {
        const struct index_params params = {16 * (1 + rng_below(&rng, 6)), (enum index_dtype)(1 + rng_below(&rng, 3)),
                                            pages[rng_below(&rng, 6)], 0.0f, rng_next(&rng)};
        const uint32_t n = 1 + rng_below(&rng, round % 2 == 0 ? 1500 : 400);
        const uint32_t positions = 1 + rng_below(&rng, 4), heads = 1 + rng_below(&rng, 5);
        struct lane lane;
        // KEYS_HUGE scores differ by thousands; the rest are ordinary.
        lane_begin(&lane, &params, (enum keys_kind)(round % KEYS_KINDS), n, 20, &rng);
        const uint32_t built = rng_below(&rng, n + 1); // part of it may stay in the tail
        assert_int_equal(owner_append(&lane.owner, built), INDEX_OK);
        owner_build(&lane.owner, 10000);
        assert_int_equal(owner_append(&lane.owner, n - built), INDEX_OK);
        for (uint32_t again = 0; again < 3; again++) {
            lane_queries(&lane, positions * heads, 1.0f, &rng);
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = positions,
                                              .head_count = heads,
                                              .first_position = rng_below(&rng, n + 5),
                                              .scale = 0.3f,
                                              .budget = rng_below(&rng, 3) == 0 ? rng_below(&rng, n + 20)
                                                                                : rng_below(&rng, 100),
                                              .sinks = rng_below(&rng, 30),
                                              .window = rng_below(&rng, 90),
                                              .effort = 1.0f};
            assert_exact(&lane, &query, 1 + rng_below(&rng, 3000));
        }
        lane_end(&lane);
    }
}

// One formula for which tokens are where: checked by hand on a small lane.
static void sinks_window_and_causality(void **state)
{
    (void)state;
    struct rng rng = rng_begin(42);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 500, 8, &rng);
    assert_int_equal(owner_append(&lane.owner, 500), INDEX_OK);
    owner_build(&lane.owner, 10000);
    lane_queries(&lane, 4, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 2,
                                .head_count = 2,
                                .first_position = 298,
                                .scale = 0.25f,
                                .budget = 1000,
                                .sinks = 10,
                                .window = 20,
                                .effort = 0.0f};
    const struct answer answer = search_run(lane.search, lane.owner.index, &query, 1000, UINT32_MAX);
    assert_int_equal(answer.selection.count, 300 - 10 - 20); // up to position 299
    assert_int_equal(answer.tokens[0].position, 10);
    assert_int_equal(answer.tokens[answer.selection.count - 1].position, 279);
    assert_near((double)(answer.selection.ends_mass + answer.selection.selected_mass), 1.0, 1e-4);
    // The window reaches back over the sinks: nothing is left to select.
    query.window = 295;
    const struct answer none = search_run(lane.search, lane.owner.index, &query, 1000, UINT32_MAX);
    assert_int_equal(none.selection.count, 0);
    assert_near((double)none.selection.ends_mass, 1.0, 1e-4);
    // Several queries without a window: the last tokens are seen by the later queries only.
    query.window = 0;
    query.query_count = 4;
    query.head_count = 1;
    query.budget = 50;
    query.effort = 1.0f;
    assert_exact(&lane, &query, 1000);
    lane_end(&lane);
}

static void empty_and_tiny(void **state)
{
    (void)state;
    struct rng rng = rng_begin(43);
    const struct index_params params = {16, INDEX_BF16, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 2, 1, &rng);
    lane_queries(&lane, 1, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries, .query_count = 1, .head_count = 1, .scale = 1.0f, .budget = 4};
    struct answer answer = search_run(lane.search, lane.owner.index, &query, 1, UINT32_MAX);
    assert_int_equal(answer.status, INDEX_OK);
    assert_int_equal(answer.selection.count, 0);
    assert_false(answer.selection.partial);
    assert_int_equal(owner_append(&lane.owner, 1), INDEX_OK);
    answer = search_run(lane.search, lane.owner.index, &query, 1, UINT32_MAX);
    assert_int_equal(answer.selection.count, 1);
    assert_near((double)answer.tokens[0].mass, 1.0, 1e-6);
    query.page_wise = true;
    answer = search_run(lane.search, lane.owner.index, &query, 1, UINT32_MAX);
    assert_int_equal(answer.selection.count, 1);
    query.budget = 0;
    answer = search_run(lane.search, lane.owner.index, &query, 1, UINT32_MAX);
    assert_int_equal(answer.selection.count, 0);
    lane_end(&lane);
}

// A budget of everything selects everything, at any effort, token-wise and page-wise, and also while a plan is pending.
static void everything_is_selected(void **state)
{
    (void)state;
    struct rng rng = rng_begin(44);
    const struct index_params params = {32, INDEX_FP16, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 1400, 2, &rng);
    while (lane.owner.length < 1400) {
        assert_int_equal(owner_append(&lane.owner, 70), INDEX_OK);
        for (uint32_t i = 0; i < 4; i++) {
            if (index_build_step(lane.owner.index, 30000) == INDEX_BUILD_PLAN && i > 1) {
                owner_carry_out(&lane.owner, NULL, NULL);
            }
        }
        const uint32_t n = lane.owner.length;
        lane_queries(&lane, 2, 2.0f, &rng);
        for (uint32_t variant = 0; variant < 6; variant++) {
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1,
                                              .head_count = 2,
                                              .first_position = n - 1,
                                              .scale = 0.2f,
                                              .budget = n - 40,
                                              .sinks = 8,
                                              .window = 32,
                                              .page_wise = variant % 2 == 1,
                                              .effort = variant < 2   ? 0.0f
                                                        : variant < 4 ? 0.5f
                                                                      : 1.0f};
            const struct answer answer = search_run(lane.search, lane.owner.index, &query, 500, UINT32_MAX);
            selection_verify(&lane.owner, &query, &answer);
            assert_int_equal(answer.selection.count, n - 40);
            assert_near((double)(answer.selection.selected_mass + answer.selection.ends_mass), 1.0, 1e-4);
        }
    }
    lane_end(&lane);
}

// Page-wise at full effort: the pages with the largest masses, whole, as far as they are eligible.
static void pages_at_full_effort(void **state)
{
    (void)state;
    struct rng rng = rng_begin(45);
    static const uint32_t page_sizes[] = {1, 8, 16, 48};
    for (uint32_t round = 0; round < 24; round++) {
        const struct index_params params = {32, INDEX_FP32, page_sizes[round % 4], 0.0f, rng_next(&rng)};
        const uint32_t n = 300 + rng_below(&rng, 900);
        struct lane lane;
        lane_begin(&lane, &params, round % 3 == 0 ? KEYS_GAUSSIAN : KEYS_CLUSTERED, n, 2, &rng);
        assert_int_equal(owner_append(&lane.owner, n), INDEX_OK);
        owner_build(&lane.owner, 10000);
        lane_queries(&lane, 2, 1.0f, &rng);
        const struct index_query query = {.queries = lane.queries,
                                          .query_count = 1,
                                          .head_count = 2,
                                          .first_position = n - 1,
                                          .scale = 0.3f,
                                          .budget = 5 + rng_below(&rng, 120),
                                          .sinks = 16,
                                          .window = 64,
                                          .page_wise = true,
                                          .effort = 1.0f};
        const struct answer answer = search_run(lane.search, lane.owner.index, &query, 700, UINT32_MAX);
        selection_verify(&lane.owner, &query, &answer);
        masses_exact(&lane.owner, &query, lane.masses);
        const struct bounds b = bounds_of(&lane.owner, &query);
        const uint32_t bound = index_page_bound(lane.owner.index), step = params.page_tokens;
        double *of_page = calloc(bound, sizeof *of_page);
        uint32_t *eligible = calloc(bound, sizeof *eligible), *chosen = calloc(bound, sizeof *chosen), pages = 0;
        for (uint32_t p = b.low; p < b.high; p++) {
            struct index_place place;
            index_locate(lane.owner.index, p, 1, &place);
            of_page[place.page] += lane.masses[p];
            eligible[place.page]++;
        }
        for (uint32_t i = 0; i < answer.selection.count; i++) {
            pages += chosen[answer.tokens[i].place.page]++ == 0 ? 1 : 0;
        }
        for (uint32_t page = 0; page < bound; page++) {
            assert_true(chosen[page] == 0 || chosen[page] == eligible[page]);
        }
        const uint32_t wanted = query.budget / step == 0 ? 1 : query.budget / step;
        assert_int_equal(pages, wanted);
        assert_true(answer.selection.count <= (query.budget > step ? query.budget : step));
        qsort(of_page, bound, sizeof *of_page, by_mass);
        double best = 0.0;
        for (uint32_t i = 0; i < wanted; i++) {
            best += of_page[i];
        }
        assert_near(mass_of(lane.masses, &answer), best, 1e-5 + 1e-4 * best);
        free(of_page);
        free(eligible);
        free(chosen);
        lane_end(&lane);
    }
}

// Cut short anywhere, a search gives a valid partial answer; the further it went, the more it holds.
static void partial_answers(void **state)
{
    (void)state;
    struct rng rng = rng_begin(46);
    const struct index_params params = {64, INDEX_FP16, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 2000, 2, &rng);
    assert_int_equal(owner_append(&lane.owner, 2000), INDEX_OK);
    owner_build(&lane.owner, 100000);
    lane_queries(&lane, 2, 0.7f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 1,
                                .head_count = 2,
                                .first_position = 1999,
                                .scale = 0.125f,
                                .budget = 64,
                                .sinks = 16,
                                .window = 64};
    masses_exact(&lane.owner, &query, lane.masses);
    for (uint32_t page_wise = 0; page_wise < 2; page_wise++) {
        query.page_wise = page_wise == 1;
        double held_early = 0.0, held_late = 0.0;
        uint32_t partial = 0, complete = 0;
        for (uint32_t steps = 0; complete < 3; steps++) {
            const struct answer answer = search_run(lane.search, lane.owner.index, &query, 16, steps);
            selection_verify(&lane.owner, &query, &answer);
            assert_true(answer.selection.count <= 64);
            partial += answer.selection.partial ? 1 : 0;
            complete += answer.selection.partial ? 0 : 1;
            held_early = steps == 2 ? mass_of(lane.masses, &answer) : held_early;
            held_late = mass_of(lane.masses, &answer);
        }
        assert_true(partial > 20);
        assert_true(held_late > held_early);
        assert_true(held_late > 0.9 * best_mass(lane.masses, bounds_of(&lane.owner, &query), 64) || page_wise == 1);
    }
    lane_end(&lane);
}

static void coverage_stops_early(void **state)
{
    (void)state;
    struct rng rng = rng_begin(47);
    const struct index_params params = {32, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 3000, 1, &rng);
    assert_int_equal(owner_append(&lane.owner, 3000), INDEX_OK);
    owner_build(&lane.owner, 100000);
    double missed = 0.0;
    for (uint32_t round = 0; round < 10; round++) {
        memcpy(lane.queries, lane.keys + rng_below(&rng, 3000) * 128, 128); // strong attention to one cluster
        struct index_query query = {.queries = lane.queries,
                                    .query_count = 1,
                                    .head_count = 1,
                                    .first_position = 2999,
                                    .scale = 0.1f,
                                    .budget = 1000,
                                    .sinks = 4,
                                    .window = 16};
        masses_exact(&lane.owner, &query, lane.masses);
        uint32_t count_before = 0;
        for (uint32_t percent = 50; percent <= 90; percent += 20) {
            query.coverage = (float)percent / 100.0f;
            const struct answer answer = search_run(lane.search, lane.owner.index, &query, 500, UINT32_MAX);
            selection_verify(&lane.owner, &query, &answer);
            const struct bounds b = bounds_of(&lane.owner, &query);
            const double held = mass_of(lane.masses, &answer) + mass_range(lane.masses, 0, b.low) +
                                mass_range(lane.masses, b.high, b.visible);
            assert_true(answer.selection.count < 1000);
            assert_true(answer.selection.count > count_before);
            assert_true(answer.selection.scanned < 2000);
            missed += held - (double)query.coverage; // one estimate may be off, not all of them
            count_before = answer.selection.count;
        }
        query.coverage = 0.0f;
        const struct answer all = search_run(lane.search, lane.owner.index, &query, 500, UINT32_MAX);
        assert_int_equal(all.selection.count, 1000);
    }
    assert_near(missed / 30.0, 0.0, 0.05);
    lane_end(&lane);
}

// Effort is the share of pages that is opened; more of it finds more.
static void effort_bounds_what_is_scored(void **state)
{
    (void)state;
    struct rng rng = rng_begin(53);
    const struct index_params params = {32, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 2048, 2, &rng);
    assert_int_equal(owner_append(&lane.owner, 2048), INDEX_OK);
    owner_build(&lane.owner, 100000);
    struct index_shape shape;
    index_shape(lane.owner.index, &shape);
    double shares[3] = {0};
    for (uint32_t round = 0; round < 10; round++) {
        lane_queries(&lane, 2, 1.0f, &rng);
        for (uint32_t i = 0; i < 3; i++) {
            const float efforts[] = {0.1f, 0.3f, 1.0f};
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1,
                                              .head_count = 2,
                                              .first_position = 2047,
                                              .scale = 0.25f,
                                              .budget = 32,
                                              .effort = efforts[i]};
            const struct answer answer = search_run(lane.search, lane.owner.index, &query, 5000, UINT32_MAX);
            const double pages = ceil((double)efforts[i] * shape.leaf_pages);
            assert_true(answer.selection.scanned <= pages * 16);
            assert_true(answer.selection.scanned >= pages);
            masses_exact(&lane.owner, &query, lane.masses);
            shares[i] += mass_of(lane.masses, &answer);
        }
    }
    assert_true(shares[0] < shares[1] && shares[1] < shares[2]);
    assert_true(shares[1] > 0.5 * shares[2]);
    lane_end(&lane);
}

// No structure, nothing to prune: the default effort looks at (nearly) everything and finds the best.
static void no_structure_opens_all(void **state)
{
    (void)state;
    struct rng rng = rng_begin(48);
    const struct index_params params = {128, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 3000, 2, &rng);
    assert_int_equal(owner_append(&lane.owner, 3000), INDEX_OK);
    owner_build(&lane.owner, 100000);
    double got = 0.0, best = 0.0;
    for (uint32_t round = 0; round < 10; round++) {
        lane_queries(&lane, 2, 1.0f, &rng);
        const struct index_query query = {.queries = lane.queries,
                                          .query_count = 1,
                                          .head_count = 2,
                                          .first_position = 2999,
                                          .scale = 0.0884f,
                                          .budget = 64,
                                          .window = 64};
        const struct answer answer = search_run(lane.search, lane.owner.index, &query, 5000, UINT32_MAX);
        masses_exact(&lane.owner, &query, lane.masses);
        got += mass_of(lane.masses, &answer);
        best += best_mass(lane.masses, bounds_of(&lane.owner, &query), 64);
    }
    assert_true(got > 0.98 * best);
    lane_end(&lane);
}

// Equal keys have equal masses: the lowest positions win, wherever they lie.
static void ties_go_to_lower_positions(void **state)
{
    (void)state;
    struct rng rng = rng_begin(49);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_EQUAL, 900, 1, &rng);
    assert_int_equal(owner_append(&lane.owner, 900), INDEX_OK);
    owner_build(&lane.owner, 100000);
    lane_queries(&lane, 1, 1.0f, &rng);
    const struct index_query query = {.queries = lane.queries,
                                      .query_count = 1,
                                      .head_count = 1,
                                      .first_position = 899,
                                      .scale = 1.0f,
                                      .budget = 37,
                                      .sinks = 5,
                                      .window = 9,
                                      .effort = 1.0f};
    const struct answer answer = search_run(lane.search, lane.owner.index, &query, 5000, UINT32_MAX);
    assert_int_equal(answer.selection.count, 37);
    for (uint32_t i = 0; i < 37; i++) {
        assert_int_equal(answer.tokens[i].position, 5 + i);
        assert_near((double)answer.tokens[i].mass, 1.0 / 900, 1e-7);
    }
    struct index_shape shape;
    index_shape(lane.owner.index, &shape);
    assert_true(shape.fill > 10.0); // equal keys spread over the pivots and fill pages
    lane_end(&lane);
}

// Many views: scores do not fit what is kept and are computed again; the result is the same.
static void more_views_than_kept_scores(void **state)
{
    (void)state;
    struct rng rng = rng_begin(50);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 700, 64 * 64, &rng);
    assert_int_equal(owner_append(&lane.owner, 700), INDEX_OK);
    owner_build(&lane.owner, 100000);
    lane_queries(&lane, 64 * 64, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 64,
                                .head_count = 64,
                                .first_position = 600,
                                .scale = 0.25f,
                                .budget = 60,
                                .sinks = 4,
                                .window = 30,
                                .effort = 1.0f};
    assert_exact(&lane, &query, 100000);
    query.page_wise = true;
    const struct answer cut = search_run(lane.search, lane.owner.index, &query, 300000, 20);
    selection_verify(&lane.owner, &query, &cut);
    lane_end(&lane);
}

static void refuses_bad_queries(void **state)
{
    (void)state;
    struct rng rng = rng_begin(51);
    const struct index_params params = {16, INDEX_FP32, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 300, 4, &rng);
    assert_int_equal(owner_append(&lane.owner, 300), INDEX_OK);
    lane_queries(&lane, 4, 1.0f, &rng);
    const struct index_query good = {
        .queries = lane.queries, .query_count = 2, .head_count = 2, .first_position = 100, .scale = 1.0f, .budget = 10};
    struct index_query bad[9];
    for (uint32_t i = 0; i < 9; i++) {
        bad[i] = good;
    }
    bad[0].queries = NULL;
    bad[1].query_count = 0;
    bad[2].query_count = INDEX_QUERIES_MAX + 1;
    bad[3].head_count = INDEX_GROUP_MAX + 1;
    bad[4].scale = NAN;
    bad[5].scale = 0.0f;
    bad[6].coverage = 1.5f;
    bad[7].effort = -0.5f;
    bad[8].first_position = UINT64_MAX;
    for (uint32_t i = 0; i < 9; i++) {
        assert_int_equal(index_search_reserve(lane.search, lane.owner.index, &bad[i]), INDEX_INVALID);
        assert_int_equal(index_search_begin(lane.search, lane.owner.index, &bad[i]), INDEX_INVALID);
    }
    assert_int_equal(index_search_begin(lane.search, lane.owner.index, &good), INDEX_NO_MEMORY); // nothing reserved
    const float values[] = {NAN, INFINITY, 3e38f, 1e25f};
    for (uint32_t i = 0; i < 4; i++) {
        struct index_query query = good;
        const float kept = lane.queries[37];
        lane.queries[37] = i == 3 ? kept : values[i];
        query.scale = i == 3 ? 1e30f : 1.0f;
        assert_int_equal(search_run(lane.search, lane.owner.index, &query, 1, 1).status, INDEX_NOT_FINITE);
        lane.queries[37] = kept;
    }
    // No allocation outside reserve.
    assert_int_equal(index_search_reserve(lane.search, lane.owner.index, &good), INDEX_OK);
    const uint64_t acquired = lane.heap.acquired;
    const struct answer answer = search_run(lane.search, lane.owner.index, &good, 1, UINT32_MAX);
    assert_int_equal(answer.status, INDEX_OK);
    assert_int_equal(lane.heap.acquired, acquired);
    lane_end(&lane);
}

// The search's tree does not change under a running build.
static void builds_while_searching(void **state)
{
    (void)state;
    struct rng rng = rng_begin(52);
    const struct index_params params = {32, INDEX_FP16, 16, 0.0f, 9};
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 1100, 2, &rng);
    assert_int_equal(owner_append(&lane.owner, 700), INDEX_OK);
    owner_build(&lane.owner, 100000);
    assert_int_equal(owner_append(&lane.owner, 400), INDEX_OK); // past the next boundary
    lane_queries(&lane, 2, 1.0f, &rng);
    const struct index_query query = {.queries = lane.queries,
                                      .query_count = 1,
                                      .head_count = 2,
                                      .first_position = 1099,
                                      .scale = 0.2f,
                                      .budget = 64,
                                      .sinks = 4,
                                      .window = 16};
    struct index_selected before[64];
    const struct answer quiet = search_run(lane.search, lane.owner.index, &query, 500, UINT32_MAX);
    memcpy(before, quiet.tokens, sizeof before);
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_PLAN;) {
        assert_int_equal(index_search_begin(lane.search, lane.owner.index, &query), INDEX_OK);
        do {
            build = build == INDEX_BUILD_PLAN ? build : index_build_step(lane.owner.index, 300);
        } while (!index_search_step(lane.search, 50));
        struct index_selection selection;
        const struct index_selected *tokens;
        index_search_finish(lane.search, &selection, &tokens);
        assert_int_equal(selection.count, 64);
        assert_memory_equal(tokens, before, sizeof before);
    }
    lane_end(&lane);
}

// ---- real attention ----

// The 16-bit elements of a .npy file of the small trace.
static uint16_t *trace_load(const char *name, size_t elements)
{
    char path[1024] = __FILE__;
    char *slash = strrchr(path, '/');
    snprintf(slash == NULL ? path : slash + 1, 256, "%s../data/own8k/%s", slash == NULL ? "tests/unit/" : "", name);
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        fail_msg("cannot open %s", path);
    }
    unsigned char head[10];
    assert_int_equal(fread(head, 1, sizeof head, file), sizeof head);
    assert_memory_equal(head, "\x93NUMPY\x01\x00", 8);
    assert_int_equal(fseek(file, 10 + head[8] + 256 * head[9], SEEK_SET), 0);
    uint16_t *data = malloc(elements * sizeof *data);
    assert_int_equal(fread(data, sizeof *data, elements, file), elements);
    fclose(file);
    return data;
}

enum { TRACE_TOKENS = 8192, TRACE_DIM = 64, TRACE_FIRST = 7680, TRACE_STEP = 64 };

struct share {
    double got, best, said;
};

// Decodes one lane as an engine would and adds up the mass of the default selections and of the exact best.
static void replay_lane(unsigned char *keys, const uint16_t *queries, struct share shares[2])
{
    static const uint32_t budgets[2] = {64, 256};
    const struct index_params params = {TRACE_DIM, INDEX_FP16, 16, 0.0f, 1};
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search;
    float vectors[2 * TRACE_DIM];
    double *masses = calloc(TRACE_TOKENS, sizeof *masses);
    assert_int_equal(index_search_create(&allocator, &search), INDEX_OK);
    for (uint32_t t = TRACE_FIRST; t < TRACE_TOKENS; t += TRACE_STEP) {
        assert_int_equal(owner_append(&owner, t + 1 - owner.length), INDEX_OK);
        owner_build(&owner, 100000);
        for (uint32_t g = 0; g < 2; g++) {
            const uint16_t *from = queries + ((size_t)g * 512 + (t - TRACE_FIRST)) * TRACE_DIM;
            for (uint32_t j = 0; j < TRACE_DIM; j++) {
                vectors[g * TRACE_DIM + j] = half_to_float(from[j]);
            }
        }
        struct index_query query = {.queries = vectors,
                                    .query_count = 1,
                                    .head_count = 2,
                                    .first_position = t,
                                    .scale = 0.125f,
                                    .sinks = 16,
                                    .window = 64};
        masses_exact(&owner, &query, masses);
        for (uint32_t i = 0; i < 2; i++) {
            query.budget = budgets[i];
            const struct answer answer = search_run(search, owner.index, &query, UINT32_MAX, UINT32_MAX);
            selection_verify(&owner, &query, &answer);
            assert_int_equal(answer.selection.count, budgets[i]);
            shares[i].got += mass_of(masses, &answer);
            shares[i].said += (double)answer.selection.selected_mass;
            shares[i].best += best_mass(masses, bounds_of(&owner, &query), budgets[i]);
        }
    }
    struct index_shape shape;
    index_shape(owner.index, &shape);
    assert_true(shape.fill > 11.5);
    owner_verify(&owner);
    free(masses);
    index_search_destroy(search);
    owner_end(&owner);
}

static void real_attention(void **state)
{
    (void)state;
    struct share shares[2] = {{0}};
    for (uint32_t layer = 0; layer < 4; layer++) {
        char name[32];
        snprintf(name, sizeof name, "L%u_K.npy", layer);
        uint16_t *keys = trace_load(name, (size_t)2 * TRACE_TOKENS * TRACE_DIM);
        snprintf(name, sizeof name, "L%u_Q.npy", layer);
        uint16_t *queries = trace_load(name, (size_t)4 * 512 * TRACE_DIM);
        for (uint32_t head = 0; head < 2; head++) {
            replay_lane((unsigned char *)(keys + (size_t)head * TRACE_TOKENS * TRACE_DIM),
                        queries + (size_t)head * 2 * 512 * TRACE_DIM, shares);
        }
        free(keys);
        free(queries);
    }
    printf("share of the exact best selection's mass: %.4f with 64 tokens, %.4f with 256\n",
           shares[0].got / shares[0].best, shares[1].got / shares[1].best);
    assert_true(shares[0].got >= 0.98 * shares[0].best);
    assert_true(shares[1].got >= 0.98 * shares[1].best);
    for (uint32_t i = 0; i < 2; i++) { // the estimate is honest
        assert_near(shares[i].said / shares[i].got, 1.0, 0.05);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact_at_full_effort),
        cmocka_unit_test(sinks_window_and_causality),
        cmocka_unit_test(empty_and_tiny),
        cmocka_unit_test(everything_is_selected),
        cmocka_unit_test(pages_at_full_effort),
        cmocka_unit_test(partial_answers),
        cmocka_unit_test(coverage_stops_early),
        cmocka_unit_test(effort_bounds_what_is_scored),
        cmocka_unit_test(no_structure_opens_all),
        cmocka_unit_test(ties_go_to_lower_positions),
        cmocka_unit_test(more_views_than_kept_scores),
        cmocka_unit_test(refuses_bad_queries),
        cmocka_unit_test(builds_while_searching),
        cmocka_unit_test(real_attention),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
