// A lane that lies in several indexes, one behind the other: one search over all of them finds what brute force over
// the lane finds, whatever the cuts, and nothing that an index has beyond its part.
#include "test_index_chain.h"

static struct index_params params_random(struct rng *rng, uint32_t round)
{
    static const uint32_t pages[] = {1, 3, 8, 16, 20, 64, 256}, dims[] = {16, 48, 64, 128};
    return (struct index_params){.head_dim = dims[rng_below(rng, round % 4 == 0 ? 4 : 3)],
                                 .dtype = (enum index_dtype)(1 + rng_below(rng, 3)),
                                 .page_tokens = pages[round % 7],
                                 .policy = (enum index_policy)(round / 7 % 2),
                                 .seed = rng_next(rng)};
}

static float scale_of(const struct index_params *params)
{
    return 1.0f / sqrtf((float)params->head_dim);
}

// How masses that a search says compare with true ones.
struct judged {
    double off, said, true_ends, said_ends;
};

static void judge(struct chain *chain, const struct index_query *query, const struct answer *answer,
                  struct judged *judged)
{
    const struct bounds b = bounds_of(&chain->lane, query);
    masses_exact(&chain->lane, query, chain->masses);
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        judged->off += fabs((double)answer->tokens[i].mass - chain->masses[answer->tokens[i].position]);
        judged->said += (double)answer->tokens[i].mass;
    }
    judged->true_ends += mass_range(chain->masses, 0, b.low) + mass_range(chain->masses, b.high, b.visible);
    judged->said_ends += (double)answer->selection.ends_mass;
}

static uint32_t live_tokens(const struct owner *lane, uint32_t end)
{
    uint32_t live = 0;
    for (uint32_t p = 0; p < end; p++) {
        live += lane->erased[p] ? 0 : 1;
    }
    return live;
}

// A budget of everything selects everything, once, wherever the cuts are; with masses as true as of one index.
static void everything_is_selected(void **state)
{
    (void)state;
    struct rng rng = rng_begin(201);
    static const uint32_t counts[] = {1, 2, 3, 5, 16, INDEX_PARTS_MAX};
    struct judged judged = {0};
    for (uint32_t round = 0; round < rounds_of(84); round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t n = round % 9 == 0 ? rng_below(&rng, 100) : rng_below(&rng, 2500), count = counts[round % 6];
        unsigned char *keys =
            keys_make(round % 2 == 0 ? KEYS_CLUSTERED : KEYS_GAUSSIAN, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        const struct chain_shape shape = {keys, n, ends, count, 12, round % 3 != 0, round % 5 == 0, round % 4 != 0, 90};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        for (uint32_t variant = 0; variant < 8; variant++) {
            const bool looks_back = variant >= 6 && n > 0;
            const struct index_query query = {.queries = chain.queries,
                                              .query_count = 1 + variant % 3,
                                              .head_count = 1 + rng_below(&rng, 4),
                                              .first_position = looks_back ? rng_below(&rng, n) : n,
                                              .scale = scale_of(&params),
                                              .budget = n,
                                              .sinks = rng_below(&rng, 40),
                                              .window = rng_below(&rng, 130),
                                              .page_wise = variant % 2 == 1,
                                              .effort = variant < 4 ? 0.0f : 1.0f};
            chain_queries(&chain, query.query_count * query.head_count, &rng);
            const struct answer answer = chain_search(&chain, &query, 1 + rng_below(&rng, 3000));
            const struct bounds b = bounds_of(&chain.lane, &query);
            const uint32_t live = live_tokens(&chain.lane, b.visible);
            assert_int_equal(answer.selection.count, b.eligible);
            assert_int_equal(answer.selection.scanned, live);
            // A view that sees no token has no mass.
            if (live_tokens(&chain.lane, (uint32_t)(query.first_position < n ? query.first_position + 1 : n)) > 0) {
                assert_near((double)(answer.selection.selected_mass + answer.selection.ends_mass), 1.0, 1e-4);
            }
            judge(&chain, &query, &answer, &judged);
        }
        chain_end(&chain);
        free(keys);
    }
    printf("masses off by %.4f, of sinks and window %.4f for %.4f\n", judged.off / judged.said, judged.said_ends,
           judged.true_ends);
    assert_true(judged.off < 0.1 * judged.said);
    assert_near(judged.said_ends, judged.true_ends, 0.03 * judged.true_ends);
}

// At a budget that is far from everything, several parts find what one index of the same tokens finds.
static void parts_find_what_one_finds(void **state)
{
    (void)state;
    struct rng rng = rng_begin(202);
    static const uint32_t counts[] = {1, 2, 4, 16};
    for (uint32_t kind = KEYS_CLUSTERED; kind <= KEYS_GAUSSIAN; kind++) {
        double got[4] = {0}, best = 0.0;
        struct judged judged[4] = {{0}};
        for (uint32_t round = 0; round < rounds_of(14); round++) {
            struct index_params params = params_random(&rng, round);
            params.policy = INDEX_MEANS;
            const uint32_t n = 3000 + rng_below(&rng, 2000);
            unsigned char *keys = keys_make((enum keys_kind)kind, params.dtype, params.head_dim, n, &rng);
            struct rng queries = {rng_next(&rng)};
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t ends[INDEX_PARTS_MAX];
                ends_random(ends, counts[i], n, &rng);
                const struct chain_shape shape = {keys, n, ends, counts[i], 4, false, false, true, 200};
                struct rng same = queries;
                struct chain chain;
                chain_begin(&chain, &params, &shape, &rng);
                for (uint32_t q = 0; q < 6; q++) {
                    const struct index_query query = {.queries = chain.queries,
                                                      .query_count = 1,
                                                      .head_count = 4,
                                                      .first_position = n - 1,
                                                      .scale = scale_of(&params),
                                                      .budget = 100,
                                                      .sinks = 16,
                                                      .window = 64};
                    chain_queries(&chain, 4, &same);
                    const struct answer answer = chain_search(&chain, &query, 1000);
                    judge(&chain, &query, &answer, &judged[i]);
                    got[i] += mass_of(chain.masses, &answer);
                    best += i == 0 ? best_mass(chain.masses, bounds_of(&chain.lane, &query), 100) : 0.0;
                }
                chain_end(&chain);
            }
            free(keys);
        }
        for (uint32_t i = 0; i < 4; i++) {
            printf("keys %u, %u parts: %.4f of the best, masses off by %.3f\n", kind, counts[i], got[i] / best,
                   judged[i].off / judged[i].said);
            // Few tokens of 20 tight clusters make cells of many clusters: harder than real attention, see below.
            assert_true(got[i] >= (counts[i] < 16 ? 0.97 : 0.95) * got[0]);
            assert_true(judged[i].off < 0.3 * judged[i].said);
        }
        assert_true(got[0] > 0.96 * best);
    }
}

// The same of real attention.
static void parts_of_real_attention(void **state)
{
    (void)state;
    struct rng rng = rng_begin(203);
    static const uint32_t counts[] = {1, 2, 4, 16, 64};
    const struct index_params params = {.head_dim = TRACE_DIM, .dtype = INDEX_FP16, .page_tokens = 16, .seed = 1};
    double got[5] = {0}, said[5] = {0}, best = 0.0;
    uint64_t scanned[5] = {0};
    for (uint32_t lane = 0; lane < 8; lane++) {
        char name[32];
        snprintf(name, sizeof name, "L%u_K.npy", lane / 2);
        uint16_t *keys = trace_load(name, (size_t)2 * TRACE_TOKENS * TRACE_DIM);
        snprintf(name, sizeof name, "L%u_Q.npy", lane / 2);
        uint16_t *queries = trace_load(name, (size_t)4 * 512 * TRACE_DIM);
        const uint16_t *own_keys = keys + (size_t)(lane % 2) * TRACE_TOKENS * TRACE_DIM;
        for (uint32_t i = 0; i < 5; i++) {
            uint32_t ends[INDEX_PARTS_MAX];
            ends_random(ends, counts[i], TRACE_TOKENS, &rng);
            const struct chain_shape shape = {
                (const unsigned char *)own_keys, TRACE_TOKENS, ends, counts[i], 2, false, false, true, 0};
            struct chain chain;
            chain_begin(&chain, &params, &shape, &rng);
            for (uint32_t t = TRACE_FIRST; t < TRACE_TOKENS; t += TRACE_STEP) {
                const struct index_query query = {.queries = chain.queries,
                                                  .query_count = 1,
                                                  .head_count = 2,
                                                  .first_position = t,
                                                  .scale = 0.125f,
                                                  .budget = 64,
                                                  .sinks = 16,
                                                  .window = 64};
                for (uint32_t j = 0; j < 2 * TRACE_DIM; j++) {
                    const size_t row = (size_t)(lane % 2 * 2 + j / TRACE_DIM) * 512 + (t - TRACE_FIRST);
                    chain.queries[j] = half_to_float(queries[row * TRACE_DIM + j % TRACE_DIM]);
                }
                const struct answer answer = chain_search(&chain, &query, 1000);
                masses_exact(&chain.lane, &query, chain.masses);
                got[i] += mass_of(chain.masses, &answer);
                said[i] += (double)answer.selection.selected_mass;
                best += i == 0 ? best_mass(chain.masses, bounds_of(&chain.lane, &query), 64) : 0.0;
                scanned[i] += answer.selection.scanned;
            }
            chain_end(&chain);
        }
        free(keys);
        free(queries);
    }
    for (uint32_t i = 0; i < 5; i++) {
        printf("%u parts: %.4f of the best 64, said %.4f, %.0f of %u scanned\n", counts[i], got[i] / best,
               said[i] / got[i], (double)scanned[i] / 64, (unsigned)TRACE_TOKENS);
        assert_true(got[i] >= 0.97 * got[0]);
        assert_near(said[i], got[i], 0.05 * got[i]);
    }
}

// An index that ends where the query does, and one that goes on behind what is seen of it: the same answer to the last
// bit.
static void a_view_is_as_a_query_that_looks_back(void **state)
{
    (void)state;
    struct rng rng = rng_begin(204);
    for (uint32_t round = 0; round < rounds_of(42); round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t n = 500 + rng_below(&rng, 2000);
        struct lane lane;
        lane_begin(&lane, &params, round % 2 == 0 ? KEYS_CLUSTERED : KEYS_GAUSSIAN, n, 4, &rng);
        lane_fill(&lane, n);
        struct index_selected *tokens = malloc(n * sizeof *tokens);
        for (uint32_t i = 0; i < 12; i++) {
            const uint32_t end = 1 + rng_below(&rng, n);
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1,
                                              .head_count = 1 + i % 4,
                                              .first_position = end - 1,
                                              .scale = scale_of(&params),
                                              .budget = i % 5 == 0 ? n : 1 + rng_below(&rng, 150),
                                              .sinks = rng_below(&rng, 30),
                                              .window = rng_below(&rng, 100),
                                              .page_wise = i % 3 == 0,
                                              .coverage = i % 4 == 0 ? 0.8f : 0.0f,
                                              .effort = i % 2 == 0 ? 0.0f : 0.4f};
            lane_queries(&lane, query.head_count, 1.5f, &rng);
            struct answer whole = lane_search(&lane, &query, 500);
            memcpy(tokens, whole.tokens, whole.selection.count * sizeof *tokens);
            whole.tokens = tokens;
            const struct index_part view = {lane.owner.index, 0, end};
            const struct answer cut = search_parts(lane.search, &view, 1, &query, 700, UINT32_MAX);
            assert_int_equal(cut.status, INDEX_OK);
            assert_alike(&whole, &cut);
            // Also where the query stands far behind the view; the window counts from the query.
            struct index_query later = query;
            later.first_position = end + 3;
            later.window = query.window + 4;
            const struct answer behind = search_parts(lane.search, &view, 1, &later, 300, UINT32_MAX);
            assert_int_equal(behind.status, INDEX_OK);
            assert_alike(&whole, &behind);
        }
        free(tokens);
        lane_end(&lane);
    }
}

// Tokens beyond a part are not counted in masses, nor do they take the place of others.
static void views_that_end_inside_parts(void **state)
{
    (void)state;
    struct rng rng = rng_begin(205);
    double got[2] = {0}, best = 0.0;
    struct judged judged[2] = {{0}};
    for (uint32_t round = 0; round < rounds_of(28); round++) {
        struct index_params params = params_random(&rng, round);
        params.policy = INDEX_MEANS;
        const uint32_t n = 1000 + rng_below(&rng, 2000), count = 2 + rng_below(&rng, 5);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        struct rng queries = {rng_next(&rng)};
        for (uint32_t extra = 0; extra < 2; extra++) {
            const struct chain_shape shape = {keys, n, ends, count, 3, extra == 1, false, true, 100};
            struct rng same = queries;
            struct chain chain;
            chain_begin(&chain, &params, &shape, &rng);
            for (uint32_t q = 0; q < 6; q++) {
                const struct index_query query = {.queries = chain.queries,
                                                  .query_count = 1,
                                                  .head_count = 3,
                                                  .first_position = n - 1,
                                                  .scale = scale_of(&params),
                                                  .budget = 80,
                                                  .sinks = 16,
                                                  .window = 64};
                chain_queries(&chain, 3, &same);
                const struct answer answer = chain_search(&chain, &query, 1000);
                judge(&chain, &query, &answer, &judged[extra]);
                got[extra] += mass_of(chain.masses, &answer);
                best += extra == 0 ? best_mass(chain.masses, bounds_of(&chain.lane, &query), 80) : 0.0;
            }
            chain_end(&chain);
        }
        free(keys);
    }
    for (uint32_t extra = 0; extra < 2; extra++) {
        printf("%s: %.4f of the best, masses off by %.3f, said %.4f\n", extra == 0 ? "whole indexes" : "views",
               got[extra] / best, judged[extra].off / judged[extra].said, judged[extra].said / got[extra]);
        assert_true(judged[extra].off < 0.3 * judged[extra].said);
    }
    assert_true(got[1] > 0.97 * got[0]);
}

// Masses follow who sees what, also where a part begins or ends among the queries.
static void masses_are_causal(void **state)
{
    (void)state;
    struct rng rng = rng_begin(213);
    for (uint32_t round = 0; round < rounds_of(70); round++) {
        const struct index_params params = {.head_dim = 48, .dtype = INDEX_FP32, .page_tokens = 16, .seed = round};
        const uint32_t n = 900, count = 2 + rng_below(&rng, 6), first = rng_below(&rng, n);
        unsigned char *keys = keys_make(KEYS_GAUSSIAN, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        if (round % 2 == 0 && first < n - 4) { // among the queries
            ends[0] = first + rng_below(&rng, 4);
            for (uint32_t p = 1; p + 1 < count; p++) {
                ends[p] = ends[p - 1] + (n - ends[p - 1]) / 2;
            }
        }
        const struct chain_shape shape = {keys, n, ends, count, 24, true, false, round % 3 != 0, 200};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        for (uint32_t i = 0; i < 24 * params.head_dim; i++) {
            chain.queries[i] = rng_normal(&rng);
        }
        const struct index_query query = {.queries = chain.queries,
                                          .query_count = 8,
                                          .head_count = 3,
                                          .first_position = first,
                                          .scale = 0.15f,
                                          .budget = n,
                                          .sinks = rng_below(&rng, 300),
                                          .window = round % 5 == 0 ? rng_below(&rng, 300) : 0};
        const struct answer answer = chain_search(&chain, &query, 1000);
        masses_exact(&chain.lane, &query, chain.masses);
        for (uint32_t i = 0; i < answer.selection.count; i++) {
            const double mass = chain.masses[answer.tokens[i].position];
            assert_near((double)answer.tokens[i].mass, mass, 0.35 * mass + 1e-7);
        }
        chain_end(&chain);
        free(keys);
    }
}

// Parts without tokens change nothing, whatever their indexes hold.
static void empty_parts_are_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(206);
    for (uint32_t round = 0; round < rounds_of(14); round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t n = rng_below(&rng, 2000);
        struct lane lane;
        struct owner other;
        lane_begin(&lane, &params, KEYS_CLUSTERED, n + 800, 2, &rng);
        lane_fill(&lane, n);
        other = owner_begin(&params, &lane.heap, lane.keys + n * lane.owner.row_bytes);
        assert_int_equal(owner_append(&other, 800), INDEX_OK);
        owner_build(&other, 100000);
        struct index_selected *tokens = malloc((n + 1) * sizeof *tokens);
        for (uint32_t i = 0; i < 6; i++) {
            const struct index_query query = {.queries = lane.queries,
                                              .query_count = 1,
                                              .head_count = 2,
                                              .first_position = n,
                                              .scale = scale_of(&params),
                                              .budget = i == 0 ? n : 50,
                                              .sinks = 4,
                                              .window = 30,
                                              .page_wise = i % 2 == 1};
            lane_queries(&lane, 2, 1.5f, &rng);
            struct answer whole = lane_search(&lane, &query, 500);
            memcpy(tokens, whole.tokens, whole.selection.count * sizeof *tokens);
            whole.tokens = tokens;
            const struct index_part parts[] = {{other.index, 0, 0}, {lane.owner.index, 0, n}, {other.index, n, n}};
            const struct answer among = search_parts(lane.search, parts, 3, &query, 300, UINT32_MAX);
            assert_alike(&whole, &among);
            const struct answer none = search_parts(lane.search, parts, 1, &query, 300, UINT32_MAX);
            assert_int_equal(none.status, INDEX_OK);
            assert_int_equal(none.selection.count, 0);
            assert_int_equal(none.selection.scanned, 0);
        }
        free(tokens);
        owner_end(&other);
        lane_end(&lane);
    }
}

// Pages of different parts with the same id are different pages: each is selected whole, as far as it is seen.
static void whole_pages_of_several_parts(void **state)
{
    (void)state;
    struct rng rng = rng_begin(207);
    double got = 0.0, all = 0.0;
    for (uint32_t round = 0; round < rounds_of(42); round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t n = 700 + rng_below(&rng, 1500), count = 2 + rng_below(&rng, 6), step = params.page_tokens;
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        const struct chain_shape shape = {keys, n, ends, count, 2, round % 2 == 0, false, true, 100};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        chain_queries(&chain, 2, &rng);
        const struct index_query query = {.queries = chain.queries,
                                          .query_count = 1,
                                          .head_count = 2,
                                          .first_position = n - 1,
                                          .scale = scale_of(&params),
                                          .budget = 5 + rng_below(&rng, 200),
                                          .sinks = rng_below(&rng, 40),
                                          .window = 64,
                                          .page_wise = true,
                                          .effort = round % 4 < 2 ? 0.0f : 1.0f};
        const struct answer answer = chain_search(&chain, &query, 700);
        masses_exact(&chain.lane, &query, chain.masses);
        const struct bounds b = bounds_of(&chain.lane, &query);
        uint32_t bases[INDEX_PARTS_MAX + 1] = {0};
        for (uint32_t p = 0; p < count; p++) {
            bases[p + 1] = bases[p] + index_page_bound(chain.parts[p].index);
        }
        const uint32_t bound = bases[count];
        double *of_page = calloc(bound, sizeof *of_page), best = 0.0;
        uint32_t *eligible = calloc(bound, sizeof *eligible), *chosen = calloc(bound, sizeof *chosen), pages = 0,
                 had = 0;
        for (uint32_t p = b.low; p < b.high; p++) {
            struct index_place place;
            const uint32_t part = part_of(&chain, p);
            index_locate(chain.parts[part].index, p - chain.list[part].first, 1, &place);
            of_page[bases[part] + place.page] += chain.masses[p];
            had += eligible[bases[part] + place.page]++ == 0 ? 1 : 0;
        }
        for (uint32_t i = 0; i < answer.selection.count; i++) {
            const uint32_t part = part_of(&chain, answer.tokens[i].position);
            pages += chosen[bases[part] + answer.tokens[i].place.page]++ == 0 ? 1 : 0;
        }
        for (uint32_t page = 0; page < bound; page++) {
            assert_true(chosen[page] == 0 || chosen[page] == eligible[page]);
        }
        const uint32_t wanted = query.budget / step == 0 ? 1 : query.budget / step;
        assert_int_equal(pages, wanted < had ? wanted : had);
        qsort(of_page, bound, sizeof *of_page, by_mass);
        for (uint32_t i = 0; i < wanted && i < bound; i++) {
            best += of_page[i];
        }
        got += mass_of(chain.masses, &answer);
        all += best;
        free(of_page);
        free(eligible);
        free(chosen);
        chain_end(&chain);
        free(keys);
    }
    printf("%.4f of the best pages' mass\n", got / all);
    assert_true(got > 0.95 * all);
}

// A coverage target is reached over all parts together, with not one token more than is needed.
static void coverage_of_several_parts(void **state)
{
    (void)state;
    struct rng rng = rng_begin(208);
    double missed = 0.0;
    uint32_t searches = 0;
    for (uint32_t round = 0; round < rounds_of(10); round++) {
        const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 5};
        const uint32_t n = 3000, count = 1 + rng_below(&rng, 8);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        const struct chain_shape shape = {keys, n, ends, count, 1, round % 2 == 0, false, true, 100};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        for (uint32_t percent = 50; percent <= 90; percent += 20, searches++) {
            memcpy(chain.queries, keys + (size_t)rng_below(&rng, n) * 128, 128); // strong attention to one cluster
            const struct index_query query = {.queries = chain.queries,
                                              .query_count = 1,
                                              .head_count = 1,
                                              .first_position = n - 1,
                                              .scale = 0.1f,
                                              .budget = 1000,
                                              .sinks = 4,
                                              .window = 16,
                                              .coverage = (float)percent / 100.0f};
            const struct answer answer = chain_search(&chain, &query, 500);
            const double said = (double)answer.selection.selected_mass + (double)answer.selection.ends_mass;
            float least = 1.0f;
            for (uint32_t i = 0; i < answer.selection.count; i++) {
                least = answer.tokens[i].mass < least ? answer.tokens[i].mass : least;
            }
            assert_true(answer.selection.count > 0 && answer.selection.count < 1000);
            assert_true(said >= (double)query.coverage - 1e-5 && said - (double)least < (double)query.coverage + 1e-5);
            masses_exact(&chain.lane, &query, chain.masses);
            const struct bounds b = bounds_of(&chain.lane, &query);
            missed += mass_of(chain.masses, &answer) + mass_range(chain.masses, 0, b.low) +
                      mass_range(chain.masses, b.high, b.visible) - (double)query.coverage;
        }
        chain_end(&chain);
        free(keys);
    }
    assert_near(missed / searches, 0.0, 0.05);
}

// Cut short anywhere, a search gives a valid selection; sliced anyhow, a whole one gives the same. It takes no memory.
static void partial_and_sliced(void **state)
{
    (void)state;
    struct rng rng = rng_begin(209);
    uint32_t partial = 0;
    for (uint32_t round = 0; round < rounds_of(28); round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t n = 200 + rng_below(&rng, 2000), count = 1 + rng_below(&rng, 10);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        const struct chain_shape shape = {keys, n, ends, count, 4, true, false, round % 2 == 0, 100};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        struct index_selected *tokens = malloc((n + 1) * sizeof *tokens);
        for (uint32_t i = 0; i < 20; i++) {
            const struct index_query query = {.queries = chain.queries,
                                              .query_count = 1 + i % 2,
                                              .head_count = 2,
                                              .first_position = n - 1,
                                              .scale = scale_of(&params),
                                              .budget = 1 + rng_below(&rng, 300),
                                              .sinks = rng_below(&rng, 30),
                                              .window = rng_below(&rng, 100),
                                              .page_wise = i % 3 == 0};
            chain_queries(&chain, 4, &rng);
            struct answer whole = chain_search(&chain, &query, UINT32_MAX);
            memcpy(tokens, whole.tokens, whole.selection.count * sizeof *tokens);
            whole.tokens = tokens;
            const uint64_t acquired = chain.heap.acquired;
            const struct answer sliced = chain_search(&chain, &query, 1 + rng_below(&rng, 200));
            assert_alike(&whole, &sliced);
            const struct answer cut = search_parts(chain.search, chain.list, count, &query, 1, rng_below(&rng, 80));
            chain_verify(&chain, &query, &cut);
            partial += cut.selection.partial ? 1 : 0;
            assert_int_equal(chain.heap.acquired, acquired);
        }
        free(tokens);
        chain_end(&chain);
        free(keys);
    }
    assert_true(partial > 100);
}

// The pages that come next are those that a larger budget selects from.
static void near_pages_name_their_part(void **state)
{
    (void)state;
    struct rng rng = rng_begin(210);
    uint32_t named = 0, wanted = 0, found_parts = 0;
    for (uint32_t round = 0; round < rounds_of(14); round++) {
        const struct index_params params = {.head_dim = 64, .dtype = INDEX_FP32, .page_tokens = 16, .seed = round};
        const uint32_t n = 3000, count = 1 + rng_below(&rng, 10);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, n, &rng);
        uint32_t ends[INDEX_PARTS_MAX];
        ends_random(ends, count, n, &rng);
        const struct chain_shape shape = {keys, n, ends, count, 4, true, false, true, 100};
        struct chain chain;
        chain_begin(&chain, &params, &shape, &rng);
        chain_queries(&chain, 4, &rng);
        struct index_query query = {.queries = chain.queries,
                                    .query_count = 1,
                                    .head_count = 4,
                                    .first_position = n - 1,
                                    .scale = scale_of(&params),
                                    .budget = 60,
                                    .sinks = 16,
                                    .window = 64};
        struct index_part_page near[32];
        (void)chain_search(&chain, &query, 1000);
        const uint32_t near_count = index_search_near(chain.search, 32, near);
        assert_true(near_count > 0 && near_count <= 32);
        query.budget = 60 + 32 + 20;
        const struct answer more = chain_search(&chain, &query, 1000);
        for (uint32_t i = 0; i < near_count; i++) {
            bool is_there = false;
            assert_true(near[i].part < count && index_page_rows(chain.parts[near[i].part].index, near[i].page) > 0);
            found_parts += near[i].part > 0 ? 1 : 0;
            for (uint32_t t = 0; t < more.selection.count; t++) {
                is_there = is_there || (part_of(&chain, more.tokens[t].position) == near[i].part &&
                                        more.tokens[t].place.page == near[i].page);
            }
            named += is_there ? 1 : 0;
        }
        wanted += near_count;
        chain_end(&chain);
        free(keys);
    }
    printf("%u of %u pages, %u not of the first part\n", named, wanted, found_parts);
    assert_true(found_parts > 0);
    assert_true(named >= wanted * 9 / 10);
}

// Sealing at any length clusters all whole pages, and gives the same tree whenever it was done.
static void sealed_indexes_are_clustered_to_the_end(void **state)
{
    (void)state;
    struct rng rng = rng_begin(211);
    for (uint32_t round = 0; round < rounds_of(84); round++) {
        struct index_params params = params_random(&rng, round);
        params.is_continuation = round % 3 != 0;
        const uint32_t n = rng_below(&rng, round % 4 == 0 ? 2500 : 500), page = params.page_tokens;
        unsigned char *keys = keys_make((enum keys_kind)(round % KEYS_KINDS), params.dtype, params.head_dim, n, &rng);
        struct heap heap = {0};
        struct owner late = owner_begin(&params, &heap, keys), early = owner_begin(&params, &heap, keys);
        fill(&late, n, &rng);
        assert_int_equal(owner_append(&early, n), INDEX_OK);
        for (uint32_t i = 0; i < rng_below(&rng, 20); i++) { // also in the middle of a build
            if (owner_step(&early, 1 + rng_below(&rng, 5000)) == INDEX_BUILD_PLAN) {
                owner_carry_out(&early, NULL, NULL);
            }
        }
        assert_false(index_is_sealed(early.index));
        index_seal(early.index);
        index_seal(early.index);
        assert_true(index_is_sealed(early.index));
        owner_build(&late, 100000);
        const uint32_t before = (uint32_t)index_indexed(late.index);
        index_seal(late.index);
        owner_build(&early, 700);
        owner_build(&late, 100000);
        owner_verify(&early);
        owner_verify(&late);
        assert_int_equal(index_version(early.index), index_version(late.index));
        const uint32_t whole = n / page * page, head = params.is_continuation ? 0 : page;
        const bool has_tree = before > 0 || whole >= head + INDEX_SEALED_FIRST;
        assert_int_equal(index_indexed(late.index), has_tree ? whole : 0);
        assert_int_equal(index_indexed(early.index), has_tree ? whole : 0);
        struct index_place place;
        unsigned char row[INDEX_HEAD_DIM_MAX * 4] = {0};
        assert_int_equal(index_append_prepare(late.index, row, sizeof row, 1, &place), INDEX_INVALID);
        assert_int_equal(index_append_prepare(late.index, row, sizeof row, 0, &place), INDEX_INVALID);
        assert_int_equal(index_length(late.index), n);
        // Forgetting goes on, and what is left is clustered as far as it may be.
        if (n > 0) {
            owner_erase(&late, rng_below(&rng, n));
            owner_truncate(&late, rng_below(&rng, n));
            assert_true(index_is_sealed(late.index));
            owner_build(&late, 100000);
            owner_verify(&late);
        }
        owner_end(&late);
        owner_end(&early);
        assert_int_equal(heap.blocks, 0);
        free(keys);
    }
}

static void wrong_arguments_are_refused(void **state)
{
    (void)state;
    struct rng rng = rng_begin(212);
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 16, .seed = 3};
    struct index_params others[4] = {params, params, params, params};
    others[0].head_dim = 48;
    others[1].dtype = INDEX_BF16;
    others[2].page_tokens = 8;
    others[3].seed = 4;
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, 48, 600, &rng);
    struct heap heap = {0};
    struct owner a = owner_begin(&params, &heap, keys), b = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&a, 600), INDEX_OK);
    assert_int_equal(owner_append(&b, 300), INDEX_OK);
    owner_build(&a, 100000);
    owner_build(&b, 100000);
    float vector[48] = {1.0f};
    const struct index_query query = {
        .queries = vector, .query_count = 1, .head_count = 1, .first_position = 899, .scale = 1.0f, .budget = 10};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search;
    assert_int_equal(index_search_create(&allocator, &search), INDEX_OK);
    const struct index_part good[] = {{a.index, 0, 600}, {b.index, 600, 900}};
    assert_int_equal(index_search_begin(search, good, 2, &query), INDEX_NO_MEMORY); // nothing reserved
    assert_int_equal(index_search_reserve(search, good, 2, &query), INDEX_OK);
    assert_int_equal(index_search_begin(search, good, 2, &query), INDEX_OK);
    const struct index_part bad[][2] = {
        {{a.index, 1, 600}, {b.index, 600, 900}},        {{a.index, 0, 600}, {b.index, 599, 800}},
        {{a.index, 0, 500}, {b.index, 501, 800}},        {{a.index, 0, 600}, {b.index, 600, 901}},
        {{a.index, 0, 601}, {b.index, 601, 900}},        {{a.index, 0, 600}, {b.index, 600, 599}},
        {{NULL, 0, 600}, {b.index, 600, 900}},           {{a.index, 0, 600}, {NULL, 600, 600}},
        {{a.index, 0, 600}, {b.index, 600, UINT64_MAX}},
    };
    for (uint32_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(index_search_reserve(search, bad[i], 2, &query), INDEX_INVALID);
        assert_int_equal(index_search_begin(search, bad[i], 2, &query), INDEX_INVALID);
    }
    static const unsigned char zeros[50 * 48 * sizeof(float)]; // keys of any kind
    for (uint32_t i = 0; i < 4; i++) {
        struct owner other = owner_begin(&others[i], &heap, zeros);
        assert_int_equal(owner_append(&other, 50), INDEX_OK);
        const struct index_part parts[] = {{a.index, 0, 600}, {other.index, 600, 650}};
        const struct index_part swapped[] = {{other.index, 0, 50}, {a.index, 50, 600}};
        assert_int_equal(index_search_reserve(search, parts, 2, &query), INDEX_INVALID);
        assert_int_equal(index_search_reserve(search, swapped, 2, &query), INDEX_INVALID);
        owner_end(&other);
    }
    struct index_part many[INDEX_PARTS_MAX + 1];
    for (uint32_t p = 0; p <= INDEX_PARTS_MAX; p++) {
        many[p] = (struct index_part){a.index, p, p + 1};
    }
    assert_int_equal(index_search_reserve(search, many, INDEX_PARTS_MAX, &query), INDEX_OK);
    assert_int_equal(index_search_begin(search, many, INDEX_PARTS_MAX, &query), INDEX_OK);
    assert_int_equal(index_search_reserve(search, many, INDEX_PARTS_MAX + 1, &query), INDEX_INVALID);
    assert_int_equal(index_search_begin(search, many, INDEX_PARTS_MAX + 1, &query), INDEX_INVALID);
    assert_int_equal(index_search_reserve(search, many, 0, &query), INDEX_INVALID);
    assert_int_equal(index_search_reserve(search, NULL, 1, &query), INDEX_INVALID);
    index_search_destroy(search);
    owner_end(&a);
    owner_end(&b);
    assert_int_equal(heap.blocks, 0);
    free(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everything_is_selected),      cmocka_unit_test(parts_find_what_one_finds),
        cmocka_unit_test(parts_of_real_attention),     cmocka_unit_test(a_view_is_as_a_query_that_looks_back),
        cmocka_unit_test(views_that_end_inside_parts), cmocka_unit_test(masses_are_causal),
        cmocka_unit_test(empty_parts_are_nothing),     cmocka_unit_test(whole_pages_of_several_parts),
        cmocka_unit_test(coverage_of_several_parts),   cmocka_unit_test(partial_and_sliced),
        cmocka_unit_test(near_pages_name_their_part),  cmocka_unit_test(sealed_indexes_are_clustered_to_the_end),
        cmocka_unit_test(wrong_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
