// The rules of a selection: what may be in it, when it ends, what it says when it is cut short, and what it does not
// depend on.
#include "test_index_lane.h"

#include "index/search.h"

static struct index_params params_of(uint32_t head_dim, uint32_t page_tokens)
{
    return (struct index_params){.head_dim = head_dim, .dtype = INDEX_FP32, .page_tokens = page_tokens, .seed = 9};
}

// One formula for which tokens are where: checked by hand on a small lane.
static void sinks_window_and_causality(void **state)
{
    (void)state;
    struct rng rng = rng_begin(42);
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 500, 8, &rng);
    lane_fill(&lane, 500);
    lane_queries(&lane, 4, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 2,
                                .head_count = 2,
                                .first_position = 298,
                                .scale = 0.25f,
                                .budget = 1000,
                                .sinks = 10,
                                .window = 20};
    const struct answer answer = lane_search(&lane, &query, 1000);
    assert_int_equal(answer.selection.count, 300 - 10 - 20); // up to position 299
    assert_int_equal(answer.tokens[0].position, 10);
    assert_int_equal(answer.tokens[answer.selection.count - 1].position, 279);
    assert_near((double)(answer.selection.ends_mass + answer.selection.selected_mass), 1.0, 1e-4);
    // The window reaches back over the sinks: nothing is left to select.
    query.window = 295;
    const struct answer none = lane_search(&lane, &query, 1000);
    assert_int_equal(none.selection.count, 0);
    assert_near((double)none.selection.ends_mass, 1.0, 1e-4);
    lane_end(&lane);
}

// Masses follow who sees what: a token that the later query alone can see has no more than its share.
static void masses_are_causal(void **state)
{
    (void)state;
    struct rng rng = rng_begin(84);
    static const uint32_t pages[] = {1, 3, 16, 20, 256};
    for (uint32_t round = 0; round < rounds_of(40); round++) {
        const struct index_params params = params_of(48, pages[round % 5]);
        struct lane lane;
        lane_begin(&lane, &params, KEYS_GAUSSIAN, 1100, 24, &rng);
        lane_fill(&lane, 1100);
        lane_queries(&lane, 24, 1.0f, &rng);
        const struct index_query query = {.queries = lane.queries,
                                          .query_count = 8,
                                          .head_count = 3,
                                          .first_position = rng_below(&rng, 1110),
                                          .scale = 0.15f,
                                          .budget = 2000,
                                          .sinks = rng_below(&rng, 400),
                                          .window = rng_below(&rng, 400)};
        const struct answer answer = lane_search(&lane, &query, 1000);
        const struct bounds b = bounds_of(&lane.owner, &query);
        masses_exact(&lane.owner, &query, lane.masses);
        for (uint32_t i = 0; i < answer.selection.count; i++) {
            const double mass = lane.masses[answer.tokens[i].position];
            assert_near((double)answer.tokens[i].mass, mass, 0.35 * mass + 1e-7);
        }
        const double ends = mass_range(lane.masses, 0, b.low) + mass_range(lane.masses, b.high, b.visible);
        assert_near((double)answer.selection.ends_mass, ends, 0.05);
        lane_end(&lane);
    }
}

static void empty_and_tiny(void **state)
{
    (void)state;
    struct rng rng = rng_begin(43);
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 2, 1, &rng);
    lane_queries(&lane, 1, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries, .query_count = 1, .head_count = 1, .scale = 1.0f, .budget = 4};
    struct answer answer = lane_search(&lane, &query, 1);
    assert_int_equal(answer.selection.count, 0);
    assert_int_equal(owner_append(&lane.owner, 1), INDEX_OK);
    answer = lane_search(&lane, &query, 1);
    assert_int_equal(answer.selection.count, 1);
    assert_near((double)answer.tokens[0].mass, 1.0, 1e-6);
    query.page_wise = true;
    answer = lane_search(&lane, &query, 1);
    assert_int_equal(answer.selection.count, 1);
    query.budget = 0;
    answer = lane_search(&lane, &query, 1);
    assert_int_equal(answer.selection.count, 0);
    query.page_wise = false;
    answer = lane_search(&lane, &query, 1);
    assert_int_equal(answer.selection.count, 0);
    lane_end(&lane);
}

// Every budget is filled, however small the effort and whichever tokens are eligible, also those of few cells.
static void budgets_are_filled(void **state)
{
    (void)state;
    struct rng rng = rng_begin(85);
    static const uint32_t pages[] = {1, 3, 8, 16, 20, 64, 256};
    for (uint32_t round = 0; round < rounds_of(56); round++) {
        struct index_params params = params_of(16 * (1 + round % 3), pages[round % 7]);
        params.policy = (enum index_policy)(round / 7 % 2);
        const uint32_t n = 300 + rng_below(&rng, 2000);
        struct lane lane;
        lane_begin(&lane, &params, (enum keys_kind)(round % KEYS_KINDS), n, 6, &rng);
        for (uint32_t step = 1; lane.owner.length < n; step *= 2) {
            lane_fill(&lane, n - lane.owner.length < 100 * step ? n - lane.owner.length : 100 * step);
        }
        for (uint32_t p = rng_below(&rng, 4); round % 2 == 0 && p < n; p += 1 + rng_below(&rng, 4)) {
            owner_erase(&lane.owner, p);
        }
        for (uint32_t i = 0; i < 20; i++) {
            lane_queries(&lane, 6, i % 3 == 0 ? 10.0f : 1.0f, &rng);
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1 + i % 2,
                                              .head_count = 1 + i % 3,
                                              .first_position = rng_below(&rng, n + 10),
                                              .scale = 0.2f,
                                              .budget = rng_below(&rng, i % 4 == 0 ? n + 10 : 100),
                                              .sinks = rng_below(&rng, i % 5 == 0 ? n : 20),
                                              .window = rng_below(&rng, i % 7 == 0 ? n : 100),
                                              .page_wise = i % 6 == 5,
                                              .effort = i % 2 == 0 ? 0.0f : 0.02f};
            (void)lane_search(&lane, &query, 1 + rng_below(&rng, 2000)); // verifies it
        }
        lane_end(&lane);
    }
}

// Cut short anywhere, a search gives a valid partial answer; the further it went, the more it holds.
static void partial_answers(void **state)
{
    (void)state;
    struct rng rng = rng_begin(46);
    const struct index_params params = params_of(64, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 2000, 2, &rng);
    lane_fill(&lane, 2000);
    lane_queries(&lane, 2, 0.7f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 1,
                                .head_count = 2,
                                .first_position = 1999,
                                .scale = 0.125f,
                                .budget = 64,
                                .sinks = 24, // some in the tree
                                .window = 300};
    masses_exact(&lane.owner, &query, lane.masses);
    for (uint32_t variant = 0; variant < 3; variant++) {
        query.page_wise = variant == 1;
        query.coverage = variant == 2 ? 0.95f : 0.0f;
        double held_early = 0.0, held_late = 0.0;
        uint32_t partial = 0, complete = 0;
        for (uint32_t steps = 0; complete < 3; steps++) {
            const struct answer answer = search_run(lane.search, lane.owner.index, &query, 16, steps);
            selection_verify(&lane.owner, &query, &answer);
            assert_true(answer.selection.count <= 64);
            assert_true(isfinite(answer.selection.selected_mass));
            partial += answer.selection.partial ? 1 : 0;
            complete += answer.selection.partial ? 0 : 1;
            held_early = steps == 2 ? mass_of(lane.masses, &answer) : held_early;
            held_late = mass_of(lane.masses, &answer);
        }
        assert_true(partial > 20);
        assert_true(held_late > held_early);
        assert_true(held_late > 0.9 * best_mass(lane.masses, bounds_of(&lane.owner, &query), 64) || variant > 0);
    }
    lane_end(&lane);
}

// One call does one item at least and little more than it was asked to.
static void slices_are_bounded(void **state)
{
    (void)state;
    struct rng rng = rng_begin(86);
    const struct index_params params = params_of(64, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 4000, 8, &rng);
    lane_fill(&lane, 4000);
    lane_queries(&lane, 8, 1.0f, &rng);
    const struct index_query query = {.queries = lane.queries,
                                      .query_count = 1,
                                      .head_count = 8,
                                      .first_position = 3999,
                                      .scale = 0.125f,
                                      .budget = 64,
                                      .sinks = 16,
                                      .window = 64};
    const uint64_t units[] = {1, 1000, 100000000};
    uint32_t calls[3] = {0};
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(search_reserve(lane.search, lane.owner.index, &query), INDEX_OK);
        assert_int_equal(search_begin(lane.search, lane.owner.index, &query), INDEX_OK);
        do {
            calls[i]++;
        } while (!index_search_step(lane.search, units[i]));
        struct index_selection selection;
        const struct index_selected *tokens;
        index_search_finish(lane.search, &selection, &tokens);
        assert_int_equal(selection.count, 64);
    }
    printf("%u, %u and %u calls\n", calls[0], calls[1], calls[2]);
    assert_true(calls[0] > 80); // cells, and passes over blocks of anchors and of scores, a few at a time
    assert_true(calls[1] > 20 && calls[1] < calls[0]);
    assert_int_equal(calls[2], 1);
    lane_end(&lane);
}

static void coverage_stops_early(void **state)
{
    (void)state;
    struct rng rng = rng_begin(47);
    const struct index_params params = params_of(32, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 3000, 1, &rng);
    lane_fill(&lane, 3000);
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
            const struct answer answer = lane_search(&lane, &query, 500);
            const struct bounds b = bounds_of(&lane.owner, &query);
            const double held = mass_of(lane.masses, &answer) + mass_range(lane.masses, 0, b.low) +
                                mass_range(lane.masses, b.high, b.visible);
            assert_true(answer.selection.count < 1000);
            assert_true(answer.selection.count > count_before);
            // Not one token more than is needed.
            const double said = (double)answer.selection.selected_mass + (double)answer.selection.ends_mass;
            float least = 1.0f;
            for (uint32_t i = 0; i < answer.selection.count; i++) {
                least = answer.tokens[i].mass < least ? answer.tokens[i].mass : least;
            }
            assert_true(said >= (double)query.coverage - 1e-5 && said - (double)least < (double)query.coverage + 1e-5);
            missed += held - (double)query.coverage; // one estimate may be off, not all of them
            count_before = answer.selection.count;
        }
        query.coverage = 0.0f;
        const struct answer all = lane_search(&lane, &query, 500);
        assert_int_equal(all.selection.count, 1000);
        query.coverage = 1.0f;
        const struct answer full = lane_search(&lane, &query, 500);
        assert_true(full.selection.count == 1000 || full.selection.selected_mass > 0.99f - full.selection.ends_mass);
    }
    assert_near(missed / 30.0, 0.0, 0.05);
    lane_end(&lane);
}

// Equal keys have equal masses: the lowest positions win, wherever they lie.
static void ties_go_to_lower_positions(void **state)
{
    (void)state;
    struct rng rng = rng_begin(49);
    for (uint32_t policy = 0; policy < 2; policy++) {
        for (uint32_t kind = KEYS_EQUAL; kind <= KEYS_ZERO; kind++) {
            struct index_params params = params_of(16, 16);
            params.policy = (enum index_policy)policy;
            struct lane lane;
            lane_begin(&lane, &params, (enum keys_kind)kind, 900, 1, &rng);
            lane_fill(&lane, 900);
            lane_queries(&lane, 1, kind == KEYS_EQUAL ? 0.0f : 1.0f, &rng); // codes of equal keys are not equal
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1,
                                              .head_count = 1,
                                              .first_position = 899,
                                              .scale = 1.0f,
                                              .budget = 37,
                                              .sinks = 5,
                                              .window = 9,
                                              .effort = 1.0f};
            const struct answer answer = lane_search(&lane, &query, 5000);
            for (uint32_t i = 0; i < 37; i++) {
                assert_int_equal(answer.tokens[i].position, 5 + i);
                assert_near((double)answer.tokens[i].mass, 1.0 / 900, 1e-7);
            }
            lane_end(&lane);
        }
    }
}

static void assert_same_answer(const struct answer *a, const struct answer *b)
{
    assert_int_equal(a->selection.count, b->selection.count);
    assert_int_equal(a->selection.scanned, b->selection.scanned);
    assert_memory_equal(&a->selection.selected_mass, &b->selection.selected_mass, sizeof(float));
    assert_memory_equal(&a->selection.ends_mass, &b->selection.ends_mass, sizeof(float));
    assert_memory_equal(a->tokens, b->tokens, a->selection.count * sizeof a->tokens[0]);
}

static struct answer search_keeping(struct lane *lane, const struct index_query *query, bool sifts, uint32_t blocks,
                                    uint32_t center_blocks)
{
    struct answer answer = {.status = search_reserve(lane->search, lane->owner.index, query)};
    assert_int_equal(answer.status, INDEX_OK);
    assert_int_equal(search_begin(lane->search, lane->owner.index, query), INDEX_OK);
    lane->search->sieve_blocks = sifts ? lane->search->sieve_blocks : 0;
    lane->search->score_blocks = blocks < lane->search->score_blocks ? blocks : lane->search->score_blocks;
    lane->search->center_blocks =
        center_blocks < lane->search->center_blocks ? center_blocks : lane->search->center_blocks;
    while (!index_search_step(lane->search, 1000)) {
    }
    index_search_finish(lane->search, &answer.selection, &answer.tokens);
    return answer;
}

// Scores of tokens that are not kept are computed again: the same answer to the last bit, also where views do not see
// all of them.
static void scores_may_be_made_again(void **state)
{
    (void)state;
    struct rng rng = rng_begin(66);
    static const uint32_t pages[] = {3, 16, 40};
    struct index_selected *kept = malloc(2000 * sizeof *kept);
    for (uint32_t round = 0; round < rounds_of(48); round++) {
        const struct index_params params = params_of(32, pages[round % 3]);
        struct lane lane;
        lane_begin(&lane, &params, round % 2 == 0 ? KEYS_CLUSTERED : KEYS_GAUSSIAN, 2000, 24, &rng);
        lane_fill(&lane, 2000);
        lane_queries(&lane, 24, 1.5f, &rng);
        const struct index_query query = {.queries = lane.queries,
                                          .query_count = round % 4 == 0 ? 1 : 8,
                                          .head_count = 3,
                                          .first_position = round % 3 == 0 ? 1999 : 500 + rng_below(&rng, 1490),
                                          .scale = 0.2f,
                                          .budget = 64,
                                          .sinks = 40,
                                          .window = round % 5 == 0 ? 0 : 150,
                                          .page_wise = round % 7 == 6,
                                          .coverage = round % 6 == 5 ? 0.9f : 0.0f};
        struct answer all = search_keeping(&lane, &query, false, UINT32_MAX, UINT32_MAX);
        memcpy(kept, all.tokens, all.selection.count * sizeof *kept);
        all.tokens = kept;
        selection_verify(&lane.owner, &query, &all);
        for (uint32_t i = 0; i < 2; i++) {
            const struct answer few = search_keeping(&lane, &query, false, i == 0 ? 1 : 7, UINT32_MAX);
            assert_same_answer(&all, &few);
        }
        // What cells promise is not quite the same where it is worked out again, and the sieve knows only roughly what
        // it drops: nearly the same answer.
        for (uint32_t i = 0; i < 2; i++) {
            const struct answer near = i == 0 ? search_keeping(&lane, &query, false, 2, 1)
                                              : search_keeping(&lane, &query, true, UINT32_MAX, UINT32_MAX);
            selection_verify(&lane.owner, &query, &near);
            assert_near((double)near.selection.selected_mass, (double)all.selection.selected_mass, 0.01);
            assert_near((double)near.selection.ends_mass, (double)all.selection.ends_mass, 0.01);
        }
        lane_end(&lane);
    }
    free(kept);
}

// Rows that wait for their turn are kept, also where scores fill up what is kept in between: a window over most of the
// tree, and a budget that lets most rows through the sieve.
static void rows_wait_where_scores_fill_up(void **state)
{
    (void)state;
    struct rng rng = rng_begin(91);
    const uint32_t tokens = 22000;
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, tokens, 64, &rng);
    lane_fill(&lane, tokens);
    lane_queries(&lane, 64, 0.3f, &rng);
    for (uint32_t i = 0; i < 2; i++) {
        const struct index_query query = {.queries = lane.queries,
                                          .query_count = 1,
                                          .head_count = 64,
                                          .first_position = tokens - 1,
                                          .scale = 0.2f,
                                          .budget = i == 0 ? 64 : 1500,
                                          .sinks = 16,
                                          .window = i == 0 ? 18000 : 64,
                                          .effort = i == 0 ? 0.0f : 1.0f};
        const struct answer answer = lane_search(&lane, &query, 100000);
        selection_verify(&lane.owner, &query, &answer);
        assert_int_equal(answer.selection.count, query.budget);
    }
    lane_end(&lane);
}

// Views so many that scores do not fit what is kept.
static void more_views_than_kept_scores(void **state)
{
    (void)state;
    struct rng rng = rng_begin(50);
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 700, 64 * 64, &rng);
    lane_fill(&lane, 700);
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
    masses_exact(&lane.owner, &query, lane.masses);
    const struct answer answer = lane_search(&lane, &query, 100000);
    assert_true(lane.search->score_blocks < lane.search->block_count);
    assert_int_equal(answer.selection.scanned, 664);
    assert_true(mass_of(lane.masses, &answer) > 0.98 * best_mass(lane.masses, bounds_of(&lane.owner, &query), 60));
    for (uint32_t i = 0; i < answer.selection.count; i++) {
        const double mass = lane.masses[answer.tokens[i].position];
        assert_near((double)answer.tokens[i].mass, mass, 0.35 * mass);
    }
    query.page_wise = true;
    for (uint32_t steps = 0; steps < 60; steps += 7) {
        const struct answer cut = search_run(lane.search, lane.owner.index, &query, 300000, steps);
        selection_verify(&lane.owner, &query, &cut);
    }
    lane_end(&lane);
}

// A query position that sees no token: those of others count as if it were not there.
static void queries_that_see_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(87);
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 400, 4, &rng);
    lane_fill(&lane, 400);
    for (uint32_t p = 0; p < 20; p++) {
        owner_erase(&lane.owner, p);
    }
    lane_queries(&lane, 4, 1.0f, &rng);
    struct index_query query = {.queries = lane.queries,
                                .query_count = 4,
                                .head_count = 1,
                                .first_position = 17, // the last two see one and two tokens
                                .scale = 0.25f,
                                .budget = 10};
    const struct answer one = lane_search(&lane, &query, 100);
    assert_int_equal(one.selection.count, 1);
    assert_int_equal(one.tokens[0].position, 20);
    assert_near((double)one.tokens[0].mass, 0.25, 1e-3);
    query.query_count = 2;
    const struct answer none = lane_search(&lane, &query, 100);
    assert_int_equal(none.selection.count, 0);
    assert_near((double)none.selection.ends_mass, 0.0, 1e-6);
    lane_end(&lane);
}

// The same context for lanes and queries of all sizes: what one search left behind is not seen by the next.
static void contexts_are_used_again(void **state)
{
    (void)state;
    struct rng rng = rng_begin(88);
    struct lane lanes[3];
    const uint32_t pages[] = {3, 16, 100}, lengths[] = {1900, 900, 1300};
    struct index_selected *kept = malloc(2000 * sizeof *kept);
    for (uint32_t i = 0; i < 3; i++) {
        const struct index_params params = params_of(16 * (1 + i), pages[i]);
        lane_begin(&lanes[i], &params, KEYS_CLUSTERED, lengths[i], 12, &rng);
    }
    for (uint32_t round = 0; round < rounds_of(120); round++) {
        struct lane *lane = &lanes[rng_below(&rng, 3)];
        const uint32_t left = lengths[lane - lanes] - lane->owner.length, some = rng_below(&rng, 60);
        assert_int_equal(owner_append(&lane->owner, some < left ? some : left), INDEX_OK);
        if (round % 4 == 0) { // the tail may be long
            owner_build(&lane->owner, 100000);
        }
        lane_queries(lane, 12, 1.0f, &rng);
        const struct index_query query = {.queries = lane->queries,
                                          .query_count = 1 + rng_below(&rng, 4),
                                          .head_count = 1 + rng_below(&rng, 3),
                                          .first_position = lane->owner.length,
                                          .scale = 0.2f,
                                          .budget = rng_below(&rng, 200),
                                          .sinks = rng_below(&rng, 150),
                                          .window = rng_below(&rng, 150),
                                          .page_wise = rng_below(&rng, 4) == 0};
        struct index_search *fresh;
        const struct index_allocator allocator = heap_allocator(&lane->heap);
        assert_int_equal(index_search_create(&allocator, &fresh), INDEX_OK);
        struct answer alone = search_run(fresh, lane->owner.index, &query, 1000, UINT32_MAX);
        selection_verify(&lane->owner, &query, &alone);
        const struct answer again = search_run(lanes[0].search, lane->owner.index, &query, 70, UINT32_MAX);
        selection_verify(&lane->owner, &query, &again);
        assert_same_answer(&alone, &again);
        index_search_destroy(fresh);
    }
    free(kept);
    for (uint32_t i = 0; i < 3; i++) {
        lane_end(&lanes[i]);
    }
}

static void refuses_bad_queries(void **state)
{
    (void)state;
    struct rng rng = rng_begin(51);
    const struct index_params params = params_of(16, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_GAUSSIAN, 300, 4, &rng);
    assert_int_equal(owner_append(&lane.owner, 300), INDEX_OK);
    lane_queries(&lane, 4, 1.0f, &rng);
    const struct index_query good = {
        .queries = lane.queries, .query_count = 2, .head_count = 2, .first_position = 100, .scale = 1.0f, .budget = 10};
    struct index_query bad[13];
    for (uint32_t i = 0; i < 13; i++) {
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
    bad[9].head_count = 0;
    bad[10].scale = INFINITY;
    bad[11].coverage = NAN;
    bad[12].effort = NAN;
    for (uint32_t i = 0; i < 13; i++) {
        assert_int_equal(search_reserve(lane.search, lane.owner.index, &bad[i]), INDEX_INVALID);
        assert_int_equal(search_begin(lane.search, lane.owner.index, &bad[i]), INDEX_INVALID);
    }
    assert_int_equal(search_begin(lane.search, lane.owner.index, &good), INDEX_NO_MEMORY); // nothing reserved
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
    assert_int_equal(search_reserve(lane.search, lane.owner.index, &good), INDEX_OK);
    const uint64_t acquired = lane.heap.acquired;
    (void)lane_search(&lane, &good, 1);
    assert_int_equal(lane.heap.acquired, acquired);
    lane_end(&lane);
}

// The search's tree does not change under a running build.
static void builds_while_searching(void **state)
{
    (void)state;
    struct rng rng = rng_begin(52);
    const struct index_params params = params_of(32, 16);
    struct lane lane;
    lane_begin(&lane, &params, KEYS_CLUSTERED, 1100, 2, &rng);
    lane_fill(&lane, 700);
    assert_int_equal(owner_append(&lane.owner, 400), INDEX_OK);
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
    const struct answer quiet = lane_search(&lane, &query, 500);
    memcpy(before, quiet.tokens, sizeof before);
    for (enum index_build_state build = INDEX_BUILD_MORE; build != INDEX_BUILD_PLAN;) {
        assert_int_equal(search_begin(lane.search, lane.owner.index, &query), INDEX_OK);
        do {
            build = build == INDEX_BUILD_PLAN ? build : owner_step(&lane.owner, 300);
        } while (!index_search_step(lane.search, 50));
        struct index_selection selection;
        const struct index_selected *tokens;
        index_search_finish(lane.search, &selection, &tokens);
        assert_int_equal(selection.count, 64);
        assert_memory_equal(tokens, before, sizeof before);
    }
    lane_end(&lane);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sinks_window_and_causality),
        cmocka_unit_test(masses_are_causal),
        cmocka_unit_test(empty_and_tiny),
        cmocka_unit_test(budgets_are_filled),
        cmocka_unit_test(partial_answers),
        cmocka_unit_test(slices_are_bounded),
        cmocka_unit_test(coverage_stops_early),
        cmocka_unit_test(ties_go_to_lower_positions),
        cmocka_unit_test(scores_may_be_made_again),
        cmocka_unit_test(rows_wait_where_scores_fill_up),
        cmocka_unit_test(more_views_than_kept_scores),
        cmocka_unit_test(queries_that_see_nothing),
        cmocka_unit_test(contexts_are_used_again),
        cmocka_unit_test(refuses_bad_queries),
        cmocka_unit_test(builds_while_searching),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
