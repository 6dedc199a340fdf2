// Building, insertion and search of one lane's tree.
#include "tree.h"

#include "measure.h"

#include <stdlib.h>
#include <string.h>

#define APPEND_TOKENS 4096u
// One slice after each insertion: a little more than an insertion costs on average (300 to 400 units at 131072 tokens),
// so that clustering keeps up and its work is spread over all insertions.
#define SLICE_UNITS 512u
#define ALL_UNITS   (1u << 20)

const char *const tree_methods[TREE_POLICIES] = {[INDEX_MEANS] = "tree", [INDEX_PROMOTION] = "tree-promotion"};

bool tree_create(struct tree *tree, const struct tree_memory *memory, const struct data *data, enum index_policy policy,
                 uint64_t seed)
{
    const struct index_params params = {
        .head_dim = data->head_dim,
        .dtype = data->dtype,
        .page_tokens = TREE_PAGE_TOKENS,
        .policy = policy,
        .seed = seed,
    };
    const struct index_allocator allocator = arena_allocator(memory->index);
    *tree = (struct tree){0};
    rows_init(&tree->rows, memory->rows, TREE_PAGE_TOKENS, data_row_bytes(data), memory->with_values);
    return index_create(&params, &allocator, &tree->index) == INDEX_OK;
}

void tree_destroy(struct tree *tree)
{
    index_destroy(tree->index);
    tree->index = NULL;
    tree_release_rows(tree);
}

void tree_release_rows(struct tree *tree)
{
    rows_fini(&tree->rows);
    free(tree->keys);
    tree->keys = NULL;
    tree->keys_room = 0;
}

static bool append(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t first, uint32_t n)
{
    static _Thread_local struct index_place places[APPEND_TOKENS];
    const size_t row_bytes = data_row_bytes(data);
    const char *keys = (const char *)lane->rows + first * row_bytes;
    if (index_append_prepare(tree->index, keys, row_bytes, n, places) != INDEX_OK) {
        return false;
    }
    bool written = true;
    const uint64_t begin = measure_ns();
    for (uint32_t i = 0; i < n && written; i++) {
        written = rows_write(&tree->rows, places[i], keys + i * row_bytes);
    }
    tree->owner_ns += measure_ns() - begin;
    index_append_commit(tree->index);
    return written;
}

static bool give_rows(struct tree *tree)
{
    const uint32_t *pages;
    uint32_t count;
    index_rows_get(tree->index, &pages, &count);
    const uint64_t begin = measure_ns();
    if (count > tree->keys_room) {
        free(tree->keys);
        tree->keys_room = 2 * count;
        tree->keys = malloc(tree->keys_room * sizeof *tree->keys);
        if (tree->keys == NULL) {
            return false;
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        tree->keys[i] = rows_at(&tree->rows, (struct index_place){pages[i], 0});
    }
    tree->owner_ns += measure_ns() - begin;
    index_rows_give(tree->index, tree->keys, tree->rows.row_bytes);
    return true;
}

static bool carry_out(struct tree *tree, uint64_t *moved)
{
    struct index_plan plan;
    index_plan_get(tree->index, &plan);
    *moved += plan.move_count;
    // The plan is the index's until the commit, the pages that it releases are not in use only afterwards.
    uint64_t begin = measure_ns();
    bool done = rows_move(&tree->rows, &plan);
    uint32_t *released = malloc((plan.released_page_count + 1) * sizeof *released);
    done = done && released != NULL;
    const uint32_t count = done ? plan.released_page_count : 0;
    if (count > 0) {
        memcpy(released, plan.released_pages, count * sizeof *released);
    }
    tree->owner_ns += measure_ns() - begin;
    if (done) {
        index_plan_commit(tree->index);
    }
    begin = measure_ns();
    rows_release(&tree->rows, released, count);
    free(released);
    tree->owner_ns += measure_ns() - begin;
    return done;
}

// One slice of `units`. False when there is no memory; *more: something is left to do.
static bool slice(struct tree *tree, uint64_t units, uint64_t *moved, bool *more)
{
    const enum index_build_state state = index_build_step(tree->index, units);
    *more = state != INDEX_BUILD_IDLE;
    switch (state) {
    case INDEX_BUILD_ROWS:
        return give_rows(tree);
    case INDEX_BUILD_PLAN:
        return carry_out(tree, moved);
    default:
        return state != INDEX_BUILD_NO_MEMORY;
    }
}

// Time that the index itself took since a beginning.
struct stopwatch {
    uint64_t begin, owner_ns;
};

static struct stopwatch start(const struct tree *tree)
{
    return (struct stopwatch){measure_ns(), tree->owner_ns};
}

static double stop(const struct tree *tree, const struct stopwatch *watch)
{
    return (double)(measure_ns() - watch->begin) - (double)(tree->owner_ns - watch->owner_ns);
}

bool tree_build(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t end,
                struct tree_costs *costs)
{
    const struct stopwatch watch = start(tree);
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
    costs->build_ns += stop(tree, &watch);
    costs->build_tokens += end;
    return true;
}

bool tree_insert(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t position,
                 struct tree_costs *costs, struct tree_latencies *latencies)
{
    const struct stopwatch watch = start(tree);
    bool more;
    if (!append(tree, data, lane, position, 1) || !slice(tree, SLICE_UNITS, &costs->moved, &more)) {
        return false;
    }
    const double ns = stop(tree, &watch);
    costs->insert_ns += ns;
    costs->inserted++;
    if (latencies != NULL && latencies->ns != NULL) {
        latencies->ns[latencies->count++] = ns;
    }
    return true;
}

bool tree_drain(struct tree *tree, struct tree_costs *costs)
{
    const struct stopwatch watch = start(tree);
    const uint64_t indexed = index_indexed(tree->index);
    for (bool more = true; more;) {
        if (!slice(tree, ALL_UNITS, &costs->moved, &more)) {
            return false;
        }
    }
    costs->insert_ns += stop(tree, &watch);
    costs->behind += (uint32_t)(index_indexed(tree->index) - indexed);
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
        .coverage = question->coverage,
        .effort = question->effort,
    };
}

bool tree_search(struct index_search *search, const struct tree *tree, const struct index_query *query,
                 struct index_selection *selection, const struct index_selected **tokens)
{
    const struct index_part whole = index_part_whole(tree->index);
    if (index_search_begin(search, &whole, 1, query) != INDEX_OK) {
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
