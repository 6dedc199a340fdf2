// The `search` command: one lane at a time, the tree beside exact scans.
//
// First the answers are judged, once per build seed and effort, without a clock; that names the cheapest effort for
// each recall and share. Then those are timed in interleaved rounds, round r with the tree of seed r modulo the seeds:
// cold, with the lane out of all caches before each query, and warm, asked again and again.
#include "search.h"
#include "commands.h"

#include <stdio.h>
#include <stdlib.h>

#define COLD_QUERIES 16u

const struct search_method search_methods[METHODS] = {
    {.name = "tree", .is_tree = true, .policy = INDEX_MEANS},
    {.name = "tree-promotion", .is_tree = true, .policy = INDEX_PROMOTION},
    {.name = "scan-f32", .format = SCAN_F32},
    {.name = "scan-bf16", .format = SCAN_BF16},
    {.name = "scan-i8", .format = SCAN_I8},
};

bool search_is_asked_for(const struct search *search, uint32_t method)
{
    return !search_methods[method].is_tree || search->options->policies[search_methods[method].policy];
}

static bool build_tree(struct search *search, const struct search_lane *lane, struct tree *tree,
                       struct tree_costs *costs, struct tree_latencies *latencies)
{
    const uint32_t tokens = search->data.tokens;
    const uint32_t first = tokens - (uint32_t)((double)tokens * search->options->insert_share);
    if (!tree_build(tree, &search->data, lane->data, first, costs)) {
        return false;
    }
    for (uint32_t i = first; i < tokens; i++) {
        if (!tree_insert(tree, &search->data, lane->data, i, costs, latencies)) {
            return false;
        }
    }
    return tree_drain(tree, costs);
}

static void add_costs(struct measured *measured, const struct tree_costs *costs)
{
    samples_add(&measured->build_us, costs->build_ns / costs->build_tokens / 1000);
    if (costs->inserted > 0) {
        samples_add(&measured->insert_us, costs->insert_ns / costs->inserted / 1000);
        // Every token moves once, from the tail into the tree.
        const double old_moves = costs->moved > costs->inserted ? (double)(costs->moved - costs->inserted) : 0;
        measured->moved_per_1000 += old_moves * 1000 / costs->inserted;
        measured->behind += costs->behind;
    }
}

// The trees of one policy, one for each seed.
static bool build_trees(struct search *search, struct search_lane *lane, uint32_t m)
{
    const enum index_policy policy = search_methods[m].policy;
    struct measured *measured = &search->measured[m];
    for (uint32_t s = 0; s < search->seeds; s++) {
        struct tree *tree = &lane->trees[policy][s];
        const struct tree_memory memory = {.index = &lane->tree_arenas[policy][s], .rows = &search->row_arena};
        struct tree_costs costs = {0};
        if (!tree_create(tree, &memory, &search->data, policy, search->options->seed + s) ||
            !build_tree(search, lane, tree, &costs, &measured->latencies)) {
            return false;
        }
        tree_release_rows(tree);
        const double share = 1 / ((double)search->data.lane_count * search->seeds);
        struct index_shape shape;
        index_shape(tree->index, &shape);
        measured->fill += shape.fill * share;
        measured->bytes_per_key += (double)index_bytes(tree->index) / search->data.tokens * share;
        add_costs(measured, &costs);
    }
    return true;
}

static bool prepare_lane(struct search *search, struct search_lane *lane)
{
    const struct data *data = &search->data;
    for (uint32_t m = 0; m < METHODS; m++) {
        if (search_methods[m].is_tree) {
            continue;
        }
        const enum scan_format format = search_methods[m].format;
        const size_t bytes = scan_keys_bytes(format, data->tokens, data->head_dim);
        void *memory = arena_acquire(&lane->scan_arenas[format], bytes);
        if (memory == NULL) {
            return false;
        }
        const uint64_t begin = measure_ns();
        scan_keys_pack(&lane->keys[format], format, lane->data->keys, data->tokens, data->head_dim, memory);
        search->measured[m].pack_us += (double)(measure_ns() - begin) / 1000 / data->tokens / data->lane_count;
        search->measured[m].bytes_per_key = (double)bytes / data->tokens;
    }
    if (!reference_create(&lane->reference, data, lane->data, &lane->keys[SCAN_F32], search->ops)) {
        return false;
    }
    for (uint32_t m = 0; m < METHODS; m++) {
        if (search_methods[m].is_tree && search_is_asked_for(search, m) && !build_trees(search, lane, m)) {
            return false;
        }
    }
    return true;
}

static uint32_t budget_max(const struct options *options)
{
    uint32_t most = REFERENCE_ALONE;
    for (uint32_t i = 0; i < options->budgets.count; i++) {
        most = options->budgets.values[i] > most ? options->budgets.values[i] : most;
    }
    return most;
}

// Makes room for every question that will be asked, so that none of the searches allocates.
static bool reserve_tree(struct search *search, const struct search_lane *lane, const struct tree *tree)
{
    for (uint32_t page_wise = 0; page_wise < 2; page_wise++) {
        struct tree_question question = search_question(search, 0, TOGETHER, 0);
        question.budget = budget_max(search->options);
        question.budget = question.budget < COVERAGE_BUDGET ? COVERAGE_BUDGET : question.budget;
        question.page_wise = page_wise != 0;
        struct index_query query;
        tree_query(&search->data, lane->data, &question, &query);
        const struct index_part whole = index_part_whole(tree->index);
        if (index_search_reserve(search->context, &whole, 1, &query) != INDEX_OK) {
            return false;
        }
    }
    return true;
}

static bool reserve(struct search *search)
{
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        for (uint32_t p = 0; p < TREE_POLICIES; p++) {
            for (uint32_t s = 0; s < search->seeds; s++) {
                if (lane->trees[p][s].index != NULL && !reserve_tree(search, lane, &lane->trees[p][s])) {
                    return false;
                }
            }
        }
    }
    return true;
}

static bool prepare(struct search *search)
{
    const struct data *data = &search->data;
    const struct index_allocator allocator = arena_allocator(&search->context_arena);
    const size_t inserted = (size_t)data->lane_count * search->seeds * data->tokens;
    search->lanes = calloc(data->lane_count, sizeof *search->lanes);
    search->ops = scan_ops_best();
    search->stream = scan_stream_create(search->ops, budget_max(search->options), data->query_heads);
    search->prepared = malloc(sizeof *search->prepared);
    if (search->lanes == NULL || search->stream == NULL || search->prepared == NULL ||
        index_search_create(&allocator, &search->context) != INDEX_OK) {
        return false;
    }
    for (uint32_t m = 0; m < METHODS; m++) {
        const size_t bytes = (size_t)((double)inserted * search->options->insert_share + 1) * sizeof(double);
        search->measured[m].latencies.ns = search_methods[m].is_tree ? malloc(bytes) : NULL;
    }
    for (uint32_t l = 0; l < data->lane_count; l++) {
        search->lanes[l].data = &data->lanes[l];
        if (!prepare_lane(search, &search->lanes[l])) {
            return false;
        }
    }
    return bandwidth_init(&search->bandwidth) && reserve(search);
}

static void release(struct search *search)
{
    for (uint32_t l = 0; search->lanes != NULL && l < search->data.lane_count; l++) {
        struct search_lane *lane = &search->lanes[l];
        reference_fini(&lane->reference);
        for (uint32_t f = 0; f < SCAN_FORMATS; f++) {
            arena_fini(&lane->scan_arenas[f]);
        }
        for (uint32_t p = 0; p < TREE_POLICIES; p++) {
            for (uint32_t s = 0; s < search->seeds; s++) {
                tree_destroy(&lane->trees[p][s]);
                arena_fini(&lane->tree_arenas[p][s]);
            }
        }
    }
    free(search->lanes);
    index_search_destroy(search->context);
    arena_fini(&search->context_arena);
    scan_stream_destroy(search->stream);
    free(search->prepared);
    arena_fini(&search->row_arena);
    for (uint32_t m = 0; m < METHODS; m++) {
        free(search->measured[m].latencies.ns);
    }
    bandwidth_fini(&search->bandwidth);
}

static const struct arena *arena_of(const struct search_lane *lane, const struct search_method *method, uint32_t seed)
{
    return method->is_tree ? &lane->tree_arenas[method->policy][seed] : &lane->scan_arenas[method->format];
}

// Microseconds per query: of cold ones each by itself, of warm ones all in a row after a first few.
static bool time_setting(struct search *search, const struct search_method *method, uint32_t seed, enum mode mode,
                         bool cold, double effort, double *us)
{
    uint64_t sum = 0, count = 0;
    const uint32_t all = search->data.query_count;
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        const uint32_t queries = cold && all > COLD_QUERIES ? COLD_QUERIES : all;
        const uint32_t warm_up = cold ? 0 : all < 4 ? all : 4;
        uint64_t begin = 0;
        for (uint32_t i = 0; i < warm_up + queries; i++) {
            const uint32_t q = (i < warm_up ? all - warm_up + i : i - warm_up) * (cold ? all / queries : 1);
            const struct tree_question question = search_question(search, q, mode, effort);
            if (cold) {
                arena_flush(arena_of(lane, method, seed));
            }
            begin = cold || i == warm_up ? measure_ns() : begin;
            if (!search_ask(search, lane, method, seed, &question, NULL)) {
                return false;
            }
            sum += cold ? measure_ns() - begin : 0;
        }
        sum += cold ? 0 : measure_ns() - begin;
        count += queries;
    }
    *us = (double)sum / (double)count / 1000;
    return true;
}

static bool time_round(struct search *search, uint32_t round)
{
    bandwidth_measure(&search->bandwidth);
    for (uint32_t m = 0; m < METHODS; m++) {
        for (uint32_t i = 0; i < search->measured[m].setting_count; i++) {
            struct setting *setting = &search->measured[m].settings[i];
            for (enum mode mode = ALONE; mode < MODES; mode++) {
                for (int cold = 0; setting->timed[mode] && cold < 2; cold++) {
                    double us;
                    if (!time_setting(search, &search_methods[m], round % search->seeds, mode, cold != 0,
                                      setting->effort, &us)) {
                        return false;
                    }
                    samples_add(&setting->us[mode][cold], us);
                }
            }
        }
    }
    return true;
}

static int run(struct search *search, json_t *rows, json_t *ratios)
{
    (void)fprintf(stderr, "%s, %u tokens, head_dim %u, %u query heads: building\n", search->data.name,
                  search->data.tokens, search->data.head_dim, search->data.query_heads);
    if (!prepare(search)) {
        (void)fputs("icecache-bench: no memory\n", stderr);
        return EXIT_MISSING;
    }
    if (!search_judge(search)) {
        (void)fputs("icecache-bench: the index refused a query\n", stderr);
        return EXIT_CHECK;
    }
    struct peers *peers = search->options->peers ? peers_open(search) : NULL;
    for (uint32_t r = 0; r < search->options->rounds; r++) {
        (void)fprintf(stderr, "round %u of %u\n", r + 1, search->options->rounds);
        if (!time_round(search, r)) {
            return EXIT_CHECK;
        }
        for (int cold = 0; peers != NULL && cold < 2; cold++) {
            peers_round(peers, cold != 0);
        }
    }
    json_t *peer_rows = peers_close(peers);
    search_rows(search, rows, ratios, peer_rows);
    json_decref(peer_rows);
    return 0;
}

static int run_data(const struct options *options, struct data *data, json_t *rows, json_t *ratios)
{
    struct search *search = calloc(1, sizeof *search);
    if (search == NULL) {
        return EXIT_MISSING;
    }
    search->options = options;
    search->data = *data;
    search->seeds = options->seeds;
    search->budget = options->budgets.values[0];
    const int code = run(search, rows, ratios);
    release(search);
    data_fini(&search->data);
    free(search);
    return code;
}

static int run_generated(const struct options *options, enum data_kind kind, json_t *rows, json_t *ratios)
{
    int code = 0;
    for (uint32_t t = 0; t < options->tokens.count; t++) {
        for (uint32_t d = 0; d < options->head_dims.count; d++) {
            for (uint32_t h = 0; h < options->query_heads.count && code == 0; h++) {
                struct data data;
                if (!data_generate(&data, kind, options->tokens.values[t], options->head_dims.values[d],
                                   options->query_heads.values[h], options->queries, 1, options->seed)) {
                    (void)fputs("icecache-bench: no memory for the data\n", stderr);
                    return EXIT_MISSING;
                }
                code = run_data(options, &data, rows, ratios);
            }
        }
    }
    return code;
}

int command_search(const struct options *options, json_t *rows, json_t *ratios)
{
    int code = 0;
    for (uint32_t i = 0; i < options->trace_count && code == 0; i++) {
        struct data data;
        char error[512];
        if (!data_open_trace(&data, options->traces[i], options->queries, options->sinks, options->window, error,
                             sizeof error)) {
            (void)fprintf(stderr, "icecache-bench: %s\n", error);
            return EXIT_MISSING;
        }
        code = run_data(options, &data, rows, ratios);
    }
    for (enum data_kind kind = DATA_ATTENTION; kind <= DATA_GAUSS && code == 0; kind++) {
        code = options->kinds[kind] ? run_generated(options, kind, rows, ratios) : 0;
    }
    return code;
}
