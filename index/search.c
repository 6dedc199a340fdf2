// A search: anchors, sinks, window, head and tail, then the cells that are worth it, then the mass of all that was
// scored.
//
// Each phase works in items (a few blocks of 16 lanes, a cell, the anchors of a few times 16 cells, against all
// queries), and an item is never cut, so a search gives the same result however it is sliced. Thread ownership: that of
// the search context. Only create and reserve allocate.
#include "index/search.h"

#include <math.h>
#include <string.h>

#define ROOM_BYTES_MIN  64u
#define PREFETCH_TOKENS 128u // of the tail

// Blocks that are worked on in one go.
#define ITEM_BLOCKS 8u

// How far from its origin the best score may be: no sum of exponentials overflows, and none is nothing.
#define ORIGIN_REACH 60.0f

enum index_status index_search_create(const struct index_allocator *allocator, struct index_search **out)
{
    struct index_search *search = allocator->acquire(allocator->owner, sizeof *search);
    if (search == NULL) {
        return INDEX_NO_MEMORY;
    }
    memset(search, 0, sizeof *search);
    search->memory = (struct dci_memory){*allocator, sizeof *search};
    *out = search;
    return INDEX_OK;
}

void index_search_destroy(struct index_search *search)
{
    if (search == NULL) {
        return;
    }
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        dci_memory_release(&search->memory, search->rooms[i].block, search->rooms[i].bytes);
    }
    assert(search->memory.bytes == sizeof *search);
    const struct index_allocator allocator = search->memory.allocator;
    allocator.release(allocator.owner, search, sizeof *search);
}

static bool query_is_valid(const struct index *index, const struct index_query *query)
{
    return query->queries != NULL && query->query_count >= 1 && query->query_count <= INDEX_QUERIES_MAX &&
           query->head_count >= 1 && query->head_count <= INDEX_GROUP_MAX &&
           query->first_position <= INDEX_TOKENS_MAX && isfinite(query->scale) && query->scale > 0.0f &&
           query->coverage >= 0.0f && query->coverage <= 1.0f && query->effort >= 0.0f && query->effort <= 1.0f &&
           index != NULL;
}

static size_t blocks_max(size_t elements_max, size_t views)
{
    const size_t blocks = elements_max / (views * DCI_LANES);
    return blocks < 1 ? 1 : blocks;
}

// Pages of a page-wise selection.
static uint32_t budget_pages(const struct index *index, uint32_t budget)
{
    const uint32_t pages = budget / index->page_tokens;
    return budget > 0 && pages == 0 ? 1 : pages;
}

static void room_sizes(const struct index *index, const struct index_query *query, size_t sizes[ROOM_COUNT])
{
    const size_t views = (size_t)query->query_count * query->head_count, n = index->length;
    const size_t tail = (n - index->indexed + index->head) / DCI_LANES + 4;
    const size_t ends = (size_t)(query->sinks < n ? query->sinks : n) + (query->window < n ? query->window : n);
    const size_t blocks = (size_t)index->leaf_pages * index->page_blocks + tail + ends + 2 * SEARCH_LOOSE_MOST;
    const size_t cell_blocks = index->cell_blocks.bound;
    const size_t scores_max = blocks_max(SEARCH_SCORES_MAX, views), centers_max = blocks_max(SEARCH_CENTERS_MAX, views);
    const size_t kept = blocks < scores_max ? blocks : scores_max;
    const size_t kept_centers = cell_blocks < centers_max ? cell_blocks : centers_max;
    size_t selected = query->budget > index->page_tokens ? query->budget : index->page_tokens;
    selected = selected < n ? selected : n;
    for (enum room_name i = ROOM_NORMS; i <= ROOM_INVERSE; i++) {
        sizes[i] = views * sizeof(float);
    }
    for (enum room_name i = ROOM_TOPS; i <= ROOM_TERMS; i++) {
        sizes[i] = views * DCI_LANES * sizeof(float);
    }
    sizes[ROOM_ANCHORS_OF_LANES] = 3 * views * DCI_LANES * sizeof(float);
    sizes[ROOM_SIGNS_OF_LANES] = 3 * views * DCI_LANES * sizeof(int16_t);
    sizes[ROOM_CODES] = views * index->head_dim;
    sizes[ROOM_FINE] = views * 2 * index->code_row_bytes;
    sizes[ROOM_TABLES] = views * index->head_dim * 4;
    sizes[ROOM_SCORED] = blocks * sizeof(struct scored);
    sizes[ROOM_LOOSE] = blocks * sizeof(struct loose);
    sizes[ROOM_SCORES] = kept * views * DCI_LANES * sizeof(float);
    sizes[ROOM_EXPS] = sizes[ROOM_SCORES];
    sizes[ROOM_MASSES] = blocks * DCI_LANES * sizeof(float);
    sizes[ROOM_CENTERS] = kept_centers * views * DCI_LANES * sizeof(float);
    sizes[ROOM_PROMISES] = sizes[ROOM_CENTERS];
    sizes[ROOM_MERITS] = cell_blocks * DCI_LANES * sizeof(float);
    sizes[ROOM_TO_OPEN] = cell_blocks * DCI_LANES * sizeof(uint32_t);
    sizes[ROOM_CANDIDATES] = blocks * DCI_LANES * sizeof(struct candidate);
    sizes[ROOM_SELECTED] = sizes[ROOM_SORTED] = selected * sizeof(struct index_selected);
}

enum index_status index_search_reserve(struct index_search *search, const struct index *index,
                                       const struct index_query *query)
{
    if (!query_is_valid(index, query)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(index, query, sizes);
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        struct room *room = &search->rooms[i];
        if (room->block != NULL && room->bytes >= sizes[i]) {
            continue;
        }
        // A quarter more than needed, so that a growing sequence does not come back at every step.
        const size_t bytes = sizes[i] + sizes[i] / 4 + ROOM_BYTES_MIN;
        void *block = dci_memory_acquire(&search->memory, bytes);
        if (block == NULL) {
            return INDEX_NO_MEMORY;
        }
        dci_memory_release(&search->memory, room->block, room->bytes);
        *room = (struct room){block, bytes};
    }
    return INDEX_OK;
}

// How many blocks a room of this size keeps.
static uint32_t blocks_kept(const struct index_search *search, size_t bytes)
{
    return (uint32_t)(bytes / (search->views * DCI_LANES * sizeof(float)));
}

static void bounds_init(struct index_search *search)
{
    const struct index *index = search->index;
    struct index_query *query = &search->query;
    const uint64_t end = query->first_position + query->query_count;
    search->visible = (uint32_t)(end < index->length ? end : index->length);
    const uint64_t window_begin = end > query->window ? end - query->window : 0;
    search->sinks_end = query->sinks < search->visible ? query->sinks : search->visible;
    search->low = search->sinks_end;
    search->high = window_begin < search->visible ? (uint32_t)window_begin : search->visible;
    if (search->high < search->low) {
        search->high = search->low;
    }
    const uint32_t eligible = search->high - search->low;
    search->everything = eligible <= query->budget;
    if (search->everything) {
        query->budget = eligible;
        search->select_max = eligible; // pages are not more
        query->coverage = query->coverage == 1.0f ? 0.0f : query->coverage;
    } else {
        search->select_max = query->page_wise ? budget_pages(index, query->budget) : query->budget;
    }
    search->cell_blocks = index->root == TREE_NONE ? 0 : index->cell_blocks.bound;
}

// Head and tail are scored first: asked for early, they are there when the queries are ready.
static void look_ahead(const struct index *index)
{
    const uint32_t newest = index->length > PREFETCH_TOKENS ? index->length - PREFETCH_TOKENS : 0;
    for (uint32_t p = index->indexed > newest ? index->indexed : newest; p < index->length; p += DCI_LANES) {
        dci_prefetch(dci_tail_block(index, p), dci_block_bytes(index));
    }
}

enum index_status index_search_begin(struct index_search *search, const struct index *index,
                                     const struct index_query *query)
{
    if (!query_is_valid(index, query)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(index, query, sizes);
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        if (search->rooms[i].block == NULL || search->rooms[i].bytes < sizes[i]) {
            return INDEX_NO_MEMORY;
        }
    }
    const struct dci_memory memory = search->memory;
    struct room rooms[ROOM_COUNT];
    memcpy(rooms, search->rooms, sizeof rooms);
    memset(search, 0, offsetof(struct index_search, weights));
    search->memory = memory;
    memcpy(search->rooms, rooms, sizeof rooms);
    search->index = index;
    search->query = *query;
    search->views = query->query_count * query->head_count;
    // Not what the rooms hold, which depends on earlier searches.
    search->score_blocks = search->sieve_blocks = blocks_kept(search, sizes[ROOM_SCORES]);
    search->center_blocks = blocks_kept(search, sizes[ROOM_CENTERS]);
    look_ahead(index);
    if (!dci_views_init(search)) {
        return INDEX_NOT_FINITE;
    }
    bounds_init(search);
    search->begun = true;
    return INDEX_OK;
}

static void spend(const struct index_search *search, struct dci_work *work, uint64_t blocks)
{
    dci_work_spend(work, search->index, blocks * DCI_LANES * (search->views + 1));
}

static void enter(struct index_search *search, enum search_phase phase)
{
    search->phase = phase;
    search->cursor = 0;
}

// Sinks and window, token by token where they lie in the tree.
static void ends_item(struct index_search *search)
{
    const uint32_t first = search->high;
    const uint32_t count = search->sinks_end + (search->visible - first);
    if (search->cursor == count) {
        dci_open_flush(search);
        search->ends_blocks = search->block_count;
        enter(search, SEARCH_TAIL);
        search->cursor = search->low;
        return;
    }
    const bool is_sink = search->cursor < search->sinks_end;
    const uint32_t position = is_sink ? search->cursor : first + (search->cursor - search->sinks_end);
    const struct index *index = search->index;
    if (position >= index->head && position < index->indexed) {
        dci_open_one(search, position);
        search->cursor++;
        return;
    }
    // Neighbours outside the tree.
    uint32_t end = is_sink ? search->sinks_end : search->visible;
    end = position < index->head && index->indexed > 0 && end > index->head ? index->head : end;
    const uint32_t block_end = position - position % DCI_LANES + DCI_LANES;
    end = end < block_end ? end : block_end;
    dci_open_neighbours(search, position, end);
    search->cursor += end - position;
}

// Exponentials are relative to the origins. These are fixed when tokens are weighed first; where none were, or where
// the best score is too far from its origin in the end, exponentials are taken anew.
void dci_search_begin_totals(struct index_search *search)
{
    const float *tops = SEARCH_ROOM(search, float, ROOM_TOPS);
    float *origins = SEARCH_ROOM(search, float, ROOM_ORIGINS), *highest = SEARCH_ROOM(search, float, ROOM_INVERSE);
    bool is_far = !search->placed;
    for (uint32_t v = 0; v < search->views; v++) {
        const float top = dci_max_lanes(tops + (size_t)v * DCI_LANES);
        highest[v] = top > DCI_HIDDEN ? top : 0.0f; // a view that sees nothing: what is hidden has no mass either
        is_far = is_far || fabsf(highest[v] - origins[v]) > ORIGIN_REACH;
    }
    if (is_far) {
        memcpy(origins, highest, search->views * sizeof highest[0]);
        memset(SEARCH_ROOM(search, float, ROOM_LANES), 0, search->views * DCI_LANES * sizeof(float));
        for (uint32_t block = 0; block < search->block_count; block++) {
            dci_scored(search, block)->counted = false;
        }
        search->placed = true;
    }
    memset(SEARCH_ROOM(search, float, ROOM_SPREADS), 0, search->views * DCI_LANES * sizeof(float));
}

static void enter_totals(struct index_search *search)
{
    dci_search_begin_totals(search);
    enter(search, SEARCH_TOTALS);
}

// Head and tail between low and high.
static void tail_item(struct index_search *search)
{
    const struct index *index = search->index;
    uint32_t at = search->cursor;
    if (at >= index->head && at < index->indexed) {
        at = index->indexed;
    }
    if (at >= search->high && search->cell_blocks == 0) {
        enter_totals(search);
        return;
    }
    if (at >= search->high) {
        dci_rank_begin_survey(search);
        enter(search, SEARCH_SURVEY);
        return;
    }
    uint32_t end = at - at % DCI_LANES + DCI_LANES;
    end = at < index->head && end > index->head && index->indexed > 0 ? index->head : end;
    end = end < search->high ? end : search->high;
    dci_open_neighbours(search, at, end);
    search->cursor = end;
}

static void opened(struct index_search *search)
{
    dci_open_flush(search);
    search->rounds++;
    const bool again =
        search->rounds == 1 || search->query.coverage > 0.0f || search->eligible_scored < search->query.budget;
    if (search->everything || !again || search->opened_tokens == search->index->tokens) {
        enter_totals(search);
    } else {
        dci_rank_begin_weighing(search);
        enter(search, SEARCH_WEIGH);
    }
}

static void picked(struct index_search *search, enum dci_pick pick)
{
    if (pick == PICK_SOME) {
        enter(search, SEARCH_OPEN);
    } else if (pick == PICK_AGAIN) {
        dci_rank_begin_weighing(search);
        enter(search, SEARCH_WEIGH);
    } else {
        enter_totals(search);
    }
}

typedef void visitor(struct index_search *search, uint32_t block);

// Visits some of the blocks cursor .. bound-1. Returns how many; 0: there are none left.
static uint32_t walk(struct index_search *search, uint32_t bound, visitor *visit)
{
    const uint32_t first = search->cursor, left = first < bound ? bound - first : 0;
    const uint32_t count = left < ITEM_BLOCKS ? left : ITEM_BLOCKS;
    for (uint32_t i = 0; i < count; i++) {
        visit(search, first + i);
    }
    search->cursor = first + count;
    return count;
}

static void count_exps(struct index_search *search, uint32_t block)
{
    (void)dci_search_exps(search, block);
}

// Visits some blocks of the phase that walks over anchors or over what has been scored, or goes on to the next phase.
// Returns how many.
static uint32_t walk_phase(struct index_search *search)
{
    const uint32_t cells = search->cell_blocks, scored = search->block_count;
    uint32_t count;
    switch (search->phase) {
    case SEARCH_CENTERS:
        if ((count = walk(search, cells, dci_rank_centers)) == 0) {
            enter(search, SEARCH_ENDS);
        }
        return count;
    case SEARCH_SURVEY:
        if ((count = walk(search, cells, dci_rank_survey)) == 0) {
            dci_rank_fix_reference(search);
            enter(search, SEARCH_HOPES);
        }
        return count;
    case SEARCH_HOPES:
        if ((count = walk(search, cells, dci_rank_hopes)) == 0) {
            dci_rank_open_best(search);
            enter(search, SEARCH_OPEN);
        }
        return count;
    case SEARCH_WEIGH:
        if ((count = walk(search, scored, dci_rank_weigh)) == 0) {
            dci_rank_fix_weights(search);
            enter(search, SEARCH_MERITS);
        }
        return count;
    case SEARCH_MERITS:
        if ((count = walk(search, cells, dci_rank_merits)) == 0) {
            picked(search, dci_rank_pick(search));
        }
        return count;
    case SEARCH_TOTALS:
        if ((count = walk(search, scored, count_exps)) == 0) {
            enter(search, SEARCH_REST);
        }
        return count;
    case SEARCH_REST:
        if ((count = walk(search, search->weighed ? cells : 0, dci_rank_rest)) == 0) {
            dci_search_fix_inverse(search);
            enter(search, SEARCH_MASSES);
        }
        return count;
    default:
        assert(search->phase == SEARCH_MASSES);
        if ((count = walk(search, scored, dci_search_masses)) == 0) {
            enter(search, SEARCH_DONE);
        }
        return count;
    }
}

// One item of work. Returns blocks of 16 lanes.
static uint32_t item(struct index_search *search)
{
    switch (search->phase) {
    case SEARCH_ENDS:
        ends_item(search);
        return 1;
    case SEARCH_TAIL:
        tail_item(search);
        return 1;
    case SEARCH_OPEN:
        if (search->cursor < search->to_open) {
            return dci_open_cell(search, search->cursor++);
        }
        opened(search);
        return 1;
    default:
        return walk_phase(search);
    }
}

bool index_search_step(struct index_search *search, uint64_t work_units)
{
    assert(search->begun);
    const uint64_t units = work_units < 1 ? 1 : work_units > UINT32_MAX ? UINT32_MAX : work_units;
    struct dci_work work = {(int64_t)(units * DCI_UNIT_ELEMENTS)};
    while (work.left > 0 && search->phase != SEARCH_DONE) {
        spend(search, &work, item(search) + 1);
    }
    return search->phase == SEARCH_DONE;
}
