// Building, insertion and search of one lane's tree.
#include "tree.h"

#include "measure.h"

#define APPEND_TOKENS 4096u
// One slice after each insertion: more than an insertion costs on average, so that clustering keeps up.
#define SLICE_UNITS 256u
#define ALL_UNITS   (1u << 20)

bool tree_create(struct tree *tree, struct arena *arena, const struct data *data, uint64_t seed)
{
    const struct index_params params = {
        .head_dim = data->head_dim,
        .dtype = data->dtype,
        .page_tokens = TREE_PAGE_TOKENS,
        .seed = seed,
    };
    const struct index_allocator allocator = arena_allocator(arena);
    *tree = (struct tree){.arena = arena};
    return index_create(&params, &allocator, &tree->index) == INDEX_OK;
}

void tree_destroy(struct tree *tree)
{
    index_destroy(tree->index);
    *tree = (struct tree){0};
}

static bool append(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t first, uint32_t n)
{
    static _Thread_local struct index_place places[APPEND_TOKENS];
    const size_t row_bytes = data_row_bytes(data);
    if (index_append_prepare(tree->index, (const char *)lane->rows + first * row_bytes, row_bytes, n, places) !=
        INDEX_OK) {
        return false;
    }
    index_append_commit(tree->index);
    return true;
}

// One slice of `units`. False when the index has no memory; *more: something is left to do.
static bool slice(struct tree *tree, uint64_t units, uint64_t *moved, bool *more)
{
    const enum index_build_state state = index_build_step(tree->index, units);
    if (state == INDEX_BUILD_PLAN) {
        struct index_plan plan;
        index_plan_get(tree->index, &plan);
        *moved += plan.move_count;
        index_plan_commit(tree->index);
    }
    *more = state != INDEX_BUILD_IDLE;
    return state != INDEX_BUILD_NO_MEMORY;
}

bool tree_build(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t end,
                struct tree_costs *costs)
{
    const uint64_t begin = measure_ns();
    for (uint32_t i = 0; i < end; i += APPEND_TOKENS) {
        if (!append(tree, data, lane, i, end - i < APPEND_TOKENS ? end - i : APPEND_TOKENS)) {
            return false;
        }
    }
    uint64_t moved = 0;
    for (bool more = true; more;) {
        if (!slice(tree, ALL_UNITS, &moved, &more)) {
            return false;
        }
    }
    costs->build_ns += (double)(measure_ns() - begin);
    costs->build_tokens += end;
    return true;
}

bool tree_insert(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t position,
                 struct tree_costs *costs, struct tree_latencies *latencies)
{
    const uint64_t begin = measure_ns();
    bool more;
    if (!append(tree, data, lane, position, 1) || !slice(tree, SLICE_UNITS, &costs->moved, &more)) {
        return false;
    }
    const double ns = (double)(measure_ns() - begin);
    costs->insert_ns += ns;
    costs->inserted++;
    if (latencies != NULL && latencies->ns != NULL) {
        latencies->ns[latencies->count++] = ns;
    }
    return true;
}

bool tree_drain(struct tree *tree, struct tree_costs *costs)
{
    const uint64_t begin = measure_ns();
    for (bool more = true; more;) {
        if (!slice(tree, ALL_UNITS, &costs->moved, &more)) {
            return false;
        }
    }
    costs->insert_ns += (double)(measure_ns() - begin);
    return true;
}

void tree_query(const struct data *data, const struct data_lane *lane, const struct tree_question *question,
                struct index_query *out)
{
    const size_t row = (size_t)question->query * data->query_heads + question->first_head;
    *out = (struct index_query){
        .queries = lane->queries + row * data->head_dim,
        .query_count = 1,
        .head_count = question->heads,
        .first_position = lane->stands[question->query],
        .scale = data->scale,
        .budget = question->budget,
        .sinks = data->sinks,
        .window = data->window,
        .page_wise = question->page_wise,
        .effort = question->effort,
    };
}

bool tree_search(struct index_search *search, const struct tree *tree, const struct index_query *query,
                 struct index_selection *selection, const struct index_selected **tokens)
{
    if (index_search_begin(search, tree->index, query) != INDEX_OK) {
        return false;
    }
    while (!index_search_step(search, ALL_UNITS)) {
    }
    index_search_finish(search, selection, tokens);
    return true;
}

void tree_pages(const struct tree *tree, uint32_t tokens, uint32_t *page_of)
{
    struct index_place places[APPEND_TOKENS];
    for (uint32_t i = 0; i < tokens; i += APPEND_TOKENS) {
        const uint32_t n = tokens - i < APPEND_TOKENS ? tokens - i : APPEND_TOKENS;
        index_locate(tree->index, i, n, places);
        for (uint32_t j = 0; j < n; j++) {
            page_of[i + j] = places[j].page;
        }
    }
}
