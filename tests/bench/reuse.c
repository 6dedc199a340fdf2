// The `reuse` command: what keeping a part of the last selection costs in attention mass and saves in bytes, over the
// last decode steps of a trace. The selections are the index's, the merge and the record of slots the daemon's own; the
// masses are exact. Nothing is timed.
#include "cached/keep.h"
#include "commands.h"
#include "gpu/record.h"
#include "measure.h"
#include "reference.h"
#include "tree.h"

#include "proto/dtype.h"

#include <stdio.h>
#include <stdlib.h>

#define QUARTERS 4u

struct reuse {
    const struct options *options;
    struct data data;
    struct index_search *context;
    struct arena context_arena, tree_arena, row_arena;
    uint32_t slots;
    uint32_t *positions; // [slots], and the record's scratch behind them
    struct index_selected *scratch;
};

// Sums over steps and lanes, of each share that is kept.
struct kept {
    double mass, best, turnover, moved;
    uint64_t steps, searched;
};

// Puts sinks, selection and window into the record, as a retrieve does. Returns tokens that are sent.
static uint32_t put(struct reuse *reuse, struct record_cell *cell, const struct data_lane *lane, uint32_t query,
                    const struct index_selected *tokens, uint32_t count, struct kept *kept)
{
    uint32_t first, end, n = 0, sent = 0;
    data_range(&reuse->data, lane, query, &first, &end);
    for (uint32_t i = 0; i < first; i++) {
        reuse->positions[n++] = i;
    }
    for (uint32_t i = 0; i < count; i++) {
        reuse->positions[n++] = tokens[i].position;
    }
    for (uint32_t i = end; i <= lane->stands[query]; i++) {
        reuse->positions[n++] = i;
    }
    const struct record_wish wish = {reuse->positions, n, n == lane->stands[query] + 1, false};
    const uint32_t changed = record_plan(cell, &wish, reuse->positions + reuse->slots);
    for (uint32_t i = 0; i < count; i++) {
        cell->entries[first + i].mass = tokens[i].mass;
    }
    for (uint32_t i = 0; i < n; i++) {
        sent += !cell->entries[i].is_kept;
    }
    record_settle(cell);
    kept->turnover += (double)changed / n;
    return sent;
}

static bool step(struct reuse *reuse, const struct tree *tree, const struct reference *reference,
                 struct record_cell *cell, uint32_t query, const struct keep_wish *asked, struct kept *kept)
{
    const struct data_lane *lane = reference->lane;
    struct keep_wish wish = *asked;
    struct keep keep = {0};
    uint32_t first, end;
    data_range(&reuse->data, lane, query, &first, &end);
    wish.from = first;
    wish.until = end;
    if (keep_applies(cell, &wish)) {
        keep_choose(&keep, cell, &wish, reuse->scratch);
    }
    const struct index_selected *tokens = keep.tokens;
    uint32_t count = keep.count;
    if (!keep.is_whole) {
        const struct tree_question question = {.query = query, .heads = reuse->data.query_heads, .budget = wish.budget};
        struct index_selection selection;
        struct index_query asks;
        tree_query(&reuse->data, lane, &question, &asks);
        const struct index_part whole = index_part_whole(tree->index);
        if (index_search_reserve(reuse->context, &whole, 1, &asks) != INDEX_OK ||
            !tree_search(reuse->context, tree, &asks, &selection, &tokens)) {
            return false;
        }
        if (keep.count > 0) {
            tokens = keep_merge(&keep, &selection, tokens, wish.budget);
        }
        count = selection.count;
    }
    for (uint32_t i = 0; i < count; i++) {
        reuse->positions[i] = tokens[i].position;
    }
    const double mass = reference_mass(reference, query, reuse->positions, count);
    struct kept ignored = {0};
    struct kept *sums = query > 0 ? kept : &ignored; // the first step has nothing before it
    const uint32_t sent = put(reuse, cell, lane, query, tokens, count, sums);
    sums->mass += mass;
    sums->best += reference_best(reference, query, wish.budget);
    sums->moved += sent;
    sums->searched += !keep.is_whole;
    sums->steps++;
    return true;
}

static bool run_lane(struct reuse *reuse, const struct data_lane *lane, uint32_t budget, struct kept *kept)
{
    const struct data *data = &reuse->data;
    const struct tree_memory memory = {.index = &reuse->tree_arena, .rows = &reuse->row_arena};
    const struct landing_shape shape = {1, 1, 1, reuse->slots, data->head_dim, DTYPE_FP16};
    struct tree tree = {0};
    struct tree_costs costs = {0};
    struct reference reference = {0};
    struct scan_keys keys;
    struct arena keys_arena = {0};
    struct records records = {0};
    void *packed = arena_acquire(&keys_arena, scan_keys_bytes(SCAN_F32, data->tokens, data->head_dim));
    bool done = packed != NULL && tree_create(&tree, &memory, data, INDEX_MEANS, reuse->options->seed) &&
                tree_build(&tree, data, lane, data->tokens, &costs);
    if (done) {
        scan_keys_pack(&keys, SCAN_F32, lane->keys, data->tokens, data->head_dim, packed);
        done = reference_create(&reference, data, lane, &keys, scan_ops_best());
    }
    for (uint32_t quarter = 0; done && quarter <= QUARTERS; quarter++) {
        const struct keep_wish wish = {
            .keep = (uint32_t)((uint64_t)budget * quarter / QUARTERS), .budget = budget, .slots = reuse->slots};
        done = records_init(&records, &shape) == ICE_OK;
        for (uint32_t query = 0; done && query < data->query_count; query++) {
            done = step(reuse, &tree, &reference, records_cell(&records, 0, 0, 0), query, &wish, &kept[quarter]);
        }
        records_fini(&records);
    }
    reference_fini(&reference);
    tree_destroy(&tree);
    arena_fini(&reuse->tree_arena);
    arena_fini(&keys_arena);
    return done;
}

static void add_rows(const struct reuse *reuse, uint32_t budget, const struct kept *kept, json_t *rows)
{
    const double row_bytes = 2.0 * (double)data_row_bytes(&reuse->data);
    for (uint32_t quarter = 0; quarter <= QUARTERS; quarter++) {
        const struct kept *of = &kept[quarter];
        const double steps = (double)of->steps;
        (void)json_array_append_new(
            rows, json_pack("{s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f}", "data", reuse->data.name, "tokens",
                            (int)reuse->data.tokens, "budget", (int)budget, "keep",
                            (int)((uint64_t)budget * quarter / QUARTERS), "mass", of->mass / steps, "share",
                            of->mass / of->best, "turnover", of->turnover / steps, "bytes_per_step",
                            of->moved * row_bytes / steps, "searched", (double)of->searched / steps));
    }
}

static bool run_budget(struct reuse *reuse, uint32_t budget, json_t *rows, json_t *ratios)
{
    struct kept kept[QUARTERS + 1] = {0};
    reuse->slots = reuse->data.sinks + reuse->data.window + budget;
    reuse->positions = malloc((reuse->slots + record_scratch_count(reuse->slots)) * sizeof *reuse->positions);
    reuse->scratch = malloc(keep_scratch_count(reuse->slots) * sizeof *reuse->scratch);
    bool done = reuse->positions != NULL && reuse->scratch != NULL;
    for (uint32_t l = 0; done && l < reuse->data.lane_count; l++) {
        done = run_lane(reuse, &reuse->data.lanes[l], budget, kept);
    }
    if (done) {
        char name[192];
        add_rows(reuse, budget, kept, rows);
        (void)snprintf(name, sizeof name, "%s budget=%u", reuse->data.name, budget);
        (void)json_object_set_new(ratios, name,
                                  json_pack("{s:f, s:f}", "half_kept_bytes", kept[2].moved / kept[0].moved,
                                            "half_kept_mass", kept[2].mass / kept[0].mass));
    }
    free(reuse->positions);
    free(reuse->scratch);
    return done;
}

int command_reuse(const struct options *options, json_t *rows, json_t *ratios)
{
    if (options->trace_count == 0) {
        (void)fputs("icecache-bench: reuse replays steps of a model: name a trace folder with --trace\n", stderr);
        return EXIT_USAGE;
    }
    for (uint32_t t = 0; t < options->trace_count; t++) {
        struct reuse reuse = {.options = options};
        char error[512];
        if (!data_open_trace(&reuse.data, options->traces[t], options->queries, options->sinks, options->window, error,
                             sizeof error)) {
            (void)fprintf(stderr, "icecache-bench: %s\n", error);
            return EXIT_MISSING;
        }
        const struct index_allocator allocator = arena_allocator(&reuse.context_arena);
        bool done = index_search_create(&allocator, &reuse.context) == INDEX_OK;
        for (uint32_t b = 0; done && b < options->budgets.count; b++) {
            done = run_budget(&reuse, options->budgets.values[b], rows, ratios);
        }
        index_search_destroy(reuse.context);
        arena_fini(&reuse.context_arena);
        arena_fini(&reuse.row_arena);
        data_fini(&reuse.data);
        if (!done) {
            (void)fputs("icecache-bench: no memory, or the index refused a query\n", stderr);
            return EXIT_MISSING;
        }
    }
    return 0;
}
