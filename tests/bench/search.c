// The `search` command: one lane at a time, the tree beside exact scans.
//
// First the answers are judged, once per build seed and effort, without a clock; that names the cheapest effort for
// each recall and share. Then those are timed in interleaved rounds, round r with the tree of seed r modulo the seeds:
// cold, with the lane out of all caches before each query, and warm, asked again and again.
#include "search.h"
#include "commands.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COLD_QUERIES 16u
#define EFFORT_LEAST 0.002
#define EFFORT_STEP  1.4
#define PLACES_MAX   4096u

const double search_recalls[RECALLS] = {0.5, 0.8, 0.9, 0.95}, search_shares[SHARES] = {0.95, 0.98, 0.99};
const char *const search_recall_names[RECALLS] = {"0.5", "0.8", "0.9", "0.95"};
const char *const search_share_names[SHARES] = {"0.95", "0.98", "0.99"};

const struct search_method search_methods[METHODS] = {
    {"tree", true, SCAN_I8},
    {"scan-f32", false, SCAN_F32},
    {"scan-bf16", false, SCAN_BF16},
    {"scan-i8", false, SCAN_I8},
};

static bool build_trees(struct search *search, struct search_lane *lane)
{
    const struct data *data = &search->data;
    const uint32_t first = data->tokens - (uint32_t)((double)data->tokens * search->options->insert_share);
    for (uint32_t s = 0; s < search->seeds; s++) {
        struct tree_costs costs = {0};
        const uint32_t samples_before = search->latencies.count;
        if (!tree_create(&lane->trees[s], &lane->tree_arenas[s], data, search->options->seed + s) ||
            !tree_build(&lane->trees[s], data, lane->data, first, &costs)) {
            return false;
        }
        for (uint32_t i = first; i < data->tokens; i++) {
            if (!tree_insert(&lane->trees[s], data, lane->data, i, &costs, &search->latencies)) {
                return false;
            }
        }
        if (!tree_drain(&lane->trees[s], &costs)) {
            return false;
        }
        struct index_shape shape;
        index_shape(lane->trees[s].index, &shape);
        search->fill += shape.fill;
        search->bytes_per_key += (double)index_bytes(lane->trees[s].index) / data->tokens;
        samples_add(&search->build_us, costs.build_ns / costs.build_tokens / 1000);
        if (search->latencies.count > samples_before) {
            samples_add(&search->insert_us, costs.insert_ns / costs.inserted / 1000);
            const double old_moves = costs.moved > costs.inserted ? (double)(costs.moved - costs.inserted) : 0;
            search->moved_per_1000 += old_moves / data->tokens * 1000 / costs.inserted;
        }
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
    return reference_create(&lane->reference, data, lane->data, &lane->keys[SCAN_F32], search->ops) &&
           build_trees(search, lane);
}

static uint32_t budget_max(const struct options *options)
{
    uint32_t most = REFERENCE_ALONE;
    for (uint32_t i = 0; i < options->budgets.count; i++) {
        most = options->budgets.values[i] > most ? options->budgets.values[i] : most;
    }
    return most;
}

static struct tree_question question_of(const struct search *search, uint32_t query, enum mode mode, double effort)
{
    const uint32_t heads = search->data.query_heads;
    return (struct tree_question){
        .query = query,
        .first_head = mode == ALONE ? query % heads : 0,
        .heads = mode == ALONE ? 1 : heads,
        .budget = mode == ALONE ? REFERENCE_ALONE : search->budget,
        .effort = (float)effort,
    };
}

// Makes room for every question that will be asked, so that none of the searches allocates.
static bool reserve(struct search *search)
{
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        for (uint32_t s = 0; s < search->seeds; s++) {
            for (uint32_t page_wise = 0; page_wise < 2; page_wise++) {
                struct tree_question question = question_of(search, 0, TOGETHER, 0);
                question.budget = budget_max(search->options);
                question.page_wise = page_wise != 0;
                struct index_query query;
                tree_query(&search->data, search->lanes[l].data, &question, &query);
                if (index_search_reserve(search->context, search->lanes[l].trees[s].index, &query) != INDEX_OK) {
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
    search->latencies.ns = malloc((size_t)((double)inserted * search->options->insert_share + 1) * sizeof(double));
    if (search->lanes == NULL || search->stream == NULL || search->prepared == NULL || search->latencies.ns == NULL ||
        index_search_create(&allocator, &search->context) != INDEX_OK) {
        return false;
    }
    for (uint32_t l = 0; l < data->lane_count; l++) {
        search->lanes[l].data = &data->lanes[l];
        if (!prepare_lane(search, &search->lanes[l])) {
            return false;
        }
    }
    const double trees = (double)data->lane_count * search->seeds;
    search->fill /= trees;
    search->bytes_per_key /= trees;
    search->moved_per_1000 /= trees;
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
        for (uint32_t s = 0; s < search->seeds; s++) {
            tree_destroy(&lane->trees[s]);
            arena_fini(&lane->tree_arenas[s]);
        }
    }
    free(search->lanes);
    index_search_destroy(search->context);
    arena_fini(&search->context_arena);
    scan_stream_destroy(search->stream);
    free(search->prepared);
    free(search->latencies.ns);
    bandwidth_fini(&search->bandwidth);
}

struct asked {
    uint32_t count;
    uint32_t positions[PLACES_MAX];
    double scanned; // keys scored
};

// One question to one method. Copies the positions out only where `asked` wants them.
static bool ask(struct search *search, const struct search_lane *lane, const struct search_method *method,
                uint32_t seed, const struct tree_question *question, struct asked *asked)
{
    const struct data *data = &search->data;
    if (method->is_tree) {
        struct index_query query;
        struct index_selection selection;
        const struct index_selected *tokens;
        tree_query(data, lane->data, question, &query);
        if (!tree_search(search->context, &lane->trees[seed], &query, &selection, &tokens)) {
            return false;
        }
        if (asked != NULL) {
            asked->count = selection.count;
            asked->scanned = selection.scanned;
            for (uint32_t i = 0; i < selection.count; i++) {
                asked->positions[i] = tokens[i].position;
            }
        }
        return true;
    }
    struct scan_selected selected[PLACES_MAX];
    uint32_t first, end;
    const size_t row = (size_t)question->query * data->query_heads + question->first_head;
    data_range(data, lane->data, question->query, &first, &end);
    scan_query_init(search->prepared, method->format, lane->data->queries + row * data->head_dim, question->heads,
                    data->head_dim, data->scale);
    const uint32_t count = scan_select(search->stream, &lane->keys[method->format], search->prepared,
                                       lane->data->stands[question->query] + 1, first, end, question->budget, selected);
    if (asked != NULL) {
        asked->count = count;
        asked->scanned = data->tokens;
        for (uint32_t i = 0; i < count; i++) {
            asked->positions[i] = selected[i].position;
        }
    }
    return true;
}

// Recall, share and scanned share of one setting, over all lanes, queries and seeds.
static bool judge(struct search *search, const struct search_method *method, struct setting *setting)
{
    static struct asked asked;
    const uint32_t seeds = method->is_tree ? search->seeds : 1;
    double recall = 0, mass = 0, best = 0, scanned = 0;
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        for (uint32_t q = 0; q < search->data.query_count; q++) {
            const struct tree_question alone = question_of(search, q, ALONE, setting->effort);
            const struct tree_question together = question_of(search, q, TOGETHER, setting->effort);
            best += reference_best(&lane->reference, q, search->budget) * seeds;
            for (uint32_t s = 0; s < seeds; s++) {
                if (!ask(search, lane, method, s, &alone, &asked)) {
                    return false;
                }
                recall += reference_recall(&lane->reference, q, asked.positions, asked.count);
                if (!ask(search, lane, method, s, &together, &asked)) {
                    return false;
                }
                mass += reference_mass(&lane->reference, q, asked.positions, asked.count);
                scanned += asked.scanned / (lane->data->stands[q] + 1);
            }
        }
    }
    const double questions = (double)search->data.lane_count * search->data.query_count * seeds;
    setting->recall = recall / questions;
    setting->scanned = scanned / questions;
    setting->share = mass / best;
    return true;
}

const struct setting *search_reaching_recall(const struct measured *measured, double recall)
{
    const struct setting *found = NULL;
    for (uint32_t i = 0; i < measured->setting_count; i++) {
        const struct setting *setting = &measured->settings[i];
        if (setting->recall >= recall && setting->effort > 0 && (found == NULL || setting->effort < found->effort)) {
            found = setting;
        }
    }
    return found;
}

const struct setting *search_reaching_share(const struct measured *measured, double share)
{
    const struct setting *found = NULL;
    for (uint32_t i = 0; i < measured->setting_count; i++) {
        const struct setting *setting = &measured->settings[i];
        if (setting->share >= share && setting->effort > 0 && (found == NULL || setting->effort < found->effort)) {
            found = setting;
        }
    }
    return found;
}

static void mark_timed(const struct setting *setting, enum mode mode)
{
    if (setting != NULL) {
        ((struct setting *)setting)->timed[mode] = true;
    }
}

// Judges all settings and marks those that are worth timing.
static bool judge_all(struct search *search)
{
    for (uint32_t m = 0; m < METHODS; m++) {
        struct measured *measured = &search->measured[m];
        double effort = EFFORT_LEAST;
        measured->setting_count = 0;
        bool more = true;
        while (more && measured->setting_count < EFFORTS_MAX) {
            struct setting *setting = &measured->settings[measured->setting_count++];
            const bool is_default = search_methods[m].is_tree && measured->setting_count == 1;
            setting->effort = is_default ? 0 : search_methods[m].is_tree ? effort : 1;
            if (!judge(search, &search_methods[m], setting)) {
                return false;
            }
            const bool enough =
                setting->recall >= search_recalls[RECALLS - 1] && setting->share >= search_shares[SHARES - 1];
            more = search_methods[m].is_tree && (is_default || (!enough && effort < 1));
            effort = is_default ? effort : fmin(effort * EFFORT_STEP, 1);
        }
        measured->settings[0].timed[ALONE] = measured->settings[0].timed[TOGETHER] = true;
        for (uint32_t i = 0; i < RECALLS; i++) {
            mark_timed(search_reaching_recall(measured, search_recalls[i]), ALONE);
        }
        for (uint32_t i = 0; i < SHARES; i++) {
            mark_timed(search_reaching_share(measured, search_shares[i]), TOGETHER);
        }
    }
    return true;
}

static const struct arena *arena_of(const struct search_lane *lane, const struct search_method *method, uint32_t seed)
{
    return method->is_tree ? &lane->tree_arenas[seed] : &lane->scan_arenas[method->format];
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
            const struct tree_question question = question_of(search, q, mode, effort);
            if (cold) {
                arena_flush(arena_of(lane, method, seed));
            }
            begin = cold || i == warm_up ? measure_ns() : begin;
            if (!ask(search, lane, method, seed, &question, NULL)) {
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

// The masses by budget of the default effort, token by token and in pages, beside what was possible.
static json_t *masses(struct search *search, uint32_t budget)
{
    static struct asked asked;
    double sums[5] = {0};
    uint32_t *page_of = malloc(search->data.tokens * sizeof *page_of);
    for (uint32_t l = 0; page_of != NULL && l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        const uint32_t pages = budget / TREE_PAGE_TOKENS;
        tree_pages(&lane->trees[0], search->data.tokens, page_of);
        for (uint32_t q = 0; q < search->data.query_count; q++) {
            struct tree_question question = question_of(search, q, TOGETHER, 0);
            question.budget = budget;
            sums[0] += reference_best(&lane->reference, q, budget);
            for (int page_wise = 0; page_wise < 2; page_wise++) {
                question.page_wise = page_wise != 0;
                asked.count = 0;
                (void)ask(search, lane, &search_methods[0], 0, &question, &asked);
                sums[1 + page_wise] += reference_mass(&lane->reference, q, asked.positions, asked.count);
            }
            sums[3] += reference_best_pages(&lane->reference, q, page_of, index_page_bound(lane->trees[0].index),
                                            TREE_PAGE_TOKENS, pages);
            sums[4] += reference_best_pages(&lane->reference, q, NULL, 0, TREE_PAGE_TOKENS, pages);
        }
    }
    free(page_of);
    const double questions = (double)search->data.lane_count * search->data.query_count;
    return json_pack("{s:f, s:f, s:f, s:f, s:f}", "exact", sums[0] / questions, "token_wise", sums[1] / questions,
                     "page_wise", sums[2] / questions, "partition_optimum", sums[3] / questions, "sequential_optimum",
                     sums[4] / questions);
}

static int run(struct search *search, json_t *rows, json_t *ratios)
{
    (void)fprintf(stderr, "%s, %u tokens, head_dim %u, %u query heads: building\n", search->data.name,
                  search->data.tokens, search->data.head_dim, search->data.query_heads);
    if (!prepare(search)) {
        (void)fputs("icecache-bench: no memory\n", stderr);
        return EXIT_MISSING;
    }
    if (!judge_all(search)) {
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
    const size_t first_row = json_array_size(rows);
    json_t *peer_rows = peers_close(peers);
    search_rows(search, rows, ratios, peer_rows);
    json_decref(peer_rows);
    for (uint32_t i = 0; i < search->options->budgets.count; i++) {
        char name[16];
        (void)snprintf(name, sizeof name, "%u", search->options->budgets.values[i]);
        json_t *mass = masses(search, search->options->budgets.values[i]);
        for (size_t row = first_row; row < first_row + 2; row++) { // the tree's rows come first
            (void)json_object_set(json_object_get(json_array_get(rows, row), "mass"), name, mass);
        }
        json_decref(mass);
    }
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
