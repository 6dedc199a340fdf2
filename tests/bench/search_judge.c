// What the answers of the `search` command are worth: recall, share, masses and estimates, without a clock.
#include "search.h"

#include <math.h>
#include <stdlib.h>

#define EFFORT_LEAST 0.003
#define EFFORT_STEP  1.25
#define PLACES_MAX   4096u

const double search_recalls[RECALLS] = {0.5, 0.8, 0.9, 0.95}, search_shares[SHARES] = {0.95, 0.98, 0.99};
const double search_coverages[COVERAGES] = {0.5, 0.8, 0.9};
const char *const search_recall_names[RECALLS] = {"0.5", "0.8", "0.9", "0.95"};
const char *const search_share_names[SHARES] = {"0.95", "0.98", "0.99"};
const char *const search_coverage_names[COVERAGES] = {"0.5", "0.8", "0.9"};

struct asked {
    uint32_t count;
    uint32_t positions[PLACES_MAX];
    double scanned;   // keys looked at
    double estimated; // mass of sinks, window and selection, as the tree estimates it
};

struct tree_question search_question(const struct search *search, uint32_t query, enum mode mode, double effort)
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

static bool ask_tree(struct search *search, const struct search_lane *lane, const struct tree *tree,
                     const struct tree_question *question, struct asked *asked)
{
    struct index_query query;
    struct index_selection selection;
    const struct index_selected *tokens;
    tree_query(&search->data, lane->data, question, &query);
    if (!tree_search(search->context, tree, &query, &selection, &tokens)) {
        return false;
    }
    if (asked != NULL) {
        asked->count = selection.count < PLACES_MAX ? selection.count : PLACES_MAX;
        asked->scanned = selection.scanned;
        asked->estimated = (double)selection.selected_mass + (double)selection.ends_mass;
        for (uint32_t i = 0; i < asked->count; i++) {
            asked->positions[i] = tokens[i].position;
        }
    }
    return true;
}

bool search_ask(struct search *search, const struct search_lane *lane, const struct search_method *method,
                uint32_t seed, const struct tree_question *question, struct asked *asked)
{
    if (method->is_tree) {
        return ask_tree(search, lane, &lane->trees[method->policy][seed], question, asked);
    }
    const struct data *data = &search->data;
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
        asked->scanned = lane->data->stands[question->query] + 1;
        asked->estimated = NAN;
        for (uint32_t i = 0; i < count; i++) {
            asked->positions[i] = selected[i].position;
        }
    }
    return true;
}

// One setting over all lanes, queries and seeds.
static bool judge(struct search *search, const struct search_method *method, struct setting *setting)
{
    static struct asked asked;
    const uint32_t seeds = method->is_tree ? search->seeds : 1;
    double recall = 0, mass = 0, best = 0, scanned = 0, error = 0, error_size = 0;
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        for (uint32_t q = 0; q < search->data.query_count; q++) {
            const struct tree_question alone = search_question(search, q, ALONE, setting->effort);
            const struct tree_question together = search_question(search, q, TOGETHER, setting->effort);
            best += reference_best(&lane->reference, q, search->budget) * seeds;
            for (uint32_t s = 0; s < seeds; s++) {
                if (!search_ask(search, lane, method, s, &alone, &asked)) {
                    return false;
                }
                recall += reference_recall(&lane->reference, q, asked.positions, asked.count);
                if (!search_ask(search, lane, method, s, &together, &asked)) {
                    return false;
                }
                const double exact = reference_mass(&lane->reference, q, asked.positions, asked.count);
                mass += exact;
                error += asked.estimated - exact;
                error_size += fabs(asked.estimated - exact);
                scanned += asked.scanned / (lane->data->stands[q] + 1);
            }
        }
    }
    const double questions = (double)search->data.lane_count * search->data.query_count * seeds;
    setting->recall = recall / questions;
    setting->scanned = scanned / questions;
    setting->share = mass / best;
    setting->error = error / questions;
    setting->error_size = error_size / questions;
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

static bool judge_method(struct search *search, const struct search_method *method, struct measured *measured)
{
    measured->setting_count = 0;
    double effort = method->is_tree ? 0 : 1; // the default
    for (bool more = true; more && measured->setting_count < EFFORTS_MAX;) {
        struct setting *setting = &measured->settings[measured->setting_count++];
        setting->effort = effort;
        if (!judge(search, method, setting)) {
            return false;
        }
        const bool enough =
            setting->recall >= search_recalls[RECALLS - 1] && setting->share >= search_shares[SHARES - 1];
        more = effort == 0 || (!enough && effort < 1);
        effort = effort == 0 ? EFFORT_LEAST : fmin(effort * EFFORT_STEP, 1);
    }
    measured->settings[0].timed[ALONE] = measured->settings[0].timed[TOGETHER] = true;
    for (uint32_t i = 0; i < RECALLS; i++) {
        mark_timed(search_reaching_recall(measured, search_recalls[i]), ALONE);
    }
    for (uint32_t i = 0; i < SHARES; i++) {
        mark_timed(search_reaching_share(measured, search_shares[i]), TOGETHER);
    }
    return true;
}

bool search_judge(struct search *search)
{
    for (uint32_t m = 0; m < METHODS; m++) {
        if (search_is_asked_for(search, m) && !judge_method(search, &search_methods[m], &search->measured[m])) {
            return false;
        }
    }
    return true;
}

json_t *search_masses(struct search *search, const struct search_method *method, uint32_t budget)
{
    static struct asked asked;
    double sums[5] = {0};
    uint32_t *page_of = malloc(search->data.tokens * sizeof *page_of);
    for (uint32_t l = 0; page_of != NULL && l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        const struct tree *tree = &lane->trees[method->policy][0];
        const uint32_t pages = budget / TREE_PAGE_TOKENS;
        tree_pages(tree, search->data.tokens, page_of);
        for (uint32_t q = 0; q < search->data.query_count; q++) {
            struct tree_question question = search_question(search, q, TOGETHER, 0);
            question.budget = budget;
            sums[0] += reference_best(&lane->reference, q, budget);
            for (int page_wise = 0; page_wise < 2; page_wise++) {
                question.page_wise = page_wise != 0;
                asked.count = 0;
                (void)search_ask(search, lane, method, 0, &question, &asked);
                sums[1 + page_wise] += reference_mass(&lane->reference, q, asked.positions, asked.count);
            }
            sums[3] += reference_best_pages(&lane->reference, q, page_of, index_page_bound(tree->index),
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

json_t *search_coverage(struct search *search, const struct search_method *method, double target)
{
    static struct asked asked;
    double questions = 0, mass = 0, reached = 0, tokens = 0, needed = 0, scanned = 0;
    for (uint32_t l = 0; l < search->data.lane_count; l++) {
        const struct search_lane *lane = &search->lanes[l];
        for (uint32_t q = 0; q < search->data.query_count; q++) {
            const uint32_t exact_tokens = reference_needed(&lane->reference, q, target, COVERAGE_BUDGET);
            for (uint32_t s = 0; exact_tokens != UINT32_MAX && s < search->seeds; s++) {
                struct tree_question question = search_question(search, q, TOGETHER, 0);
                question.budget = COVERAGE_BUDGET;
                question.coverage = (float)target;
                asked.count = 0;
                (void)search_ask(search, lane, method, s, &question, &asked);
                const double exact = reference_mass(&lane->reference, q, asked.positions, asked.count);
                questions++;
                mass += exact;
                reached += exact >= target;
                tokens += asked.count;
                needed += exact_tokens;
                scanned += asked.scanned / (lane->data->stands[q] + 1);
            }
        }
    }
    const double all = (double)search->data.lane_count * search->data.query_count * search->seeds;
    json_t *object = json_pack("{s:f}", "reachable_share", questions / all);
    const double values[] = {mass, reached, tokens, needed, scanned};
    static const char *const names[] = {"mass", "reached_share", "tokens", "tokens_exact", "scanned_share"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        (void)json_object_set_new(object, names[i], questions > 0 ? json_real(values[i] / questions) : json_null());
    }
    return object;
}
