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

// Cells of a part that is small beside others hold what is unlike: what lies far from their anchors is where a query
// looks, and the sieve, which expects it around them, would lose it. So it is as careful there as with an effort of 1
// (real attention, 8,192 tokens in 64 parts: .998 of one head's best 64 tokens, without it .972; in one part .989).
#define CAREFUL_TOKENS 1024u

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

static bool query_is_valid(const struct index_query *query)
{
    return query->queries != NULL && query->query_count >= 1 && query->query_count <= INDEX_QUERIES_MAX &&
           query->head_count >= 1 && query->head_count <= INDEX_GROUP_MAX &&
           query->first_position <= INDEX_TOKENS_MAX && isfinite(query->scale) && query->scale > 0.0f &&
           query->coverage >= 0.0f && query->coverage <= 1.0f && query->effort >= 0.0f && query->effort <= 1.0f;
}

// Do codes of the two mean the same to a query, and are their pages alike?
static bool is_alike(const struct index *a, const struct index *b)
{
    return a->head_dim == b->head_dim && a->page_tokens == b->page_tokens && a->dtype == b->dtype && a->seed == b->seed;
}

static bool parts_are_valid(const struct index_part *parts, uint32_t count)
{
    uint64_t position = 0;
    if (parts == NULL || count < 1 || count > INDEX_PARTS_MAX) {
        return false;
    }
    for (uint32_t p = 0; p < count; p++) {
        const struct index_part *part = &parts[p];
        if (part->index == NULL || part->first != position || part->end < position ||
            part->end - position > part->index->length || !is_alike(part->index, parts[0].index)) {
            return false;
        }
        position = part->end;
    }
    return position <= INDEX_TOKENS_MAX;
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

// Blocks that the parts' pages, heads and tails may be scored in, and their blocks of cells.
static void count_blocks(const struct index_part *parts, uint32_t part_count, size_t *blocks, size_t *cell_blocks)
{
    *blocks = *cell_blocks = 0;
    for (uint32_t p = 0; p < part_count; p++) {
        const struct index *index = parts[p].index;
        const uint64_t count = parts[p].end - parts[p].first;
        if (count > 0) {
            const uint64_t tail = (count > index->indexed ? count - index->indexed : 0) + index->head;
            *blocks += (size_t)index->leaf_pages * index->page_blocks + tail / DCI_LANES + 4;
            *cell_blocks += index->cell_blocks.bound;
        }
    }
}

static void room_sizes(const struct index_part *parts, uint32_t part_count, const struct index_query *query,
                       size_t sizes[ROOM_COUNT])
{
    const struct index *index = parts[0].index;
    const size_t views = (size_t)query->query_count * query->head_count, n = parts[part_count - 1].end;
    const size_t asked = (size_t)query->sinks + query->window, ends = asked < n ? asked : n;
    size_t blocks, cell_blocks;
    count_blocks(parts, part_count, &blocks, &cell_blocks);
    blocks += ends + 2 * SEARCH_LOOSE_MOST;
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
    sizes[ROOM_BASES] = part_count * views * sizeof(float);
    sizes[ROOM_CODES] = views * index->head_dim;
    sizes[ROOM_FINE] = views * 2 * index->code_row_bytes;
    sizes[ROOM_TABLES] = views * index->head_dim * 4;
    sizes[ROOM_CELL_BLOCKS] = cell_blocks * sizeof(struct cell_block);
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

enum index_status index_search_reserve(struct index_search *search, const struct index_part *parts, uint32_t part_count,
                                       const struct index_query *query)
{
    if (!query_is_valid(query) || !parts_are_valid(parts, part_count)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(parts, part_count, query, sizes);
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

static void bounds_init(struct index_search *search, uint64_t length)
{
    struct index_query *query = &search->query;
    const uint64_t end = query->first_position + query->query_count;
    search->visible = (uint32_t)(end < length ? end : length);
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
        search->select_max = query->page_wise ? budget_pages(search->index, query->budget) : query->budget;
    }
}

// A position of the lane as one of a part's own, where the part does not have it the nearest one.
static uint32_t own_position(const struct part *part, uint32_t position)
{
    const uint32_t own = position > part->first ? position - part->first : 0;
    return own < part->count ? own : part->count;
}

// Cells are looked at where they may hold a token up to the last query.
static void part_init(struct index_search *search, const struct index_part *from, struct part *part)
{
    const struct index *index = from->index;
    *part = (struct part){.index = index, .first = (uint32_t)from->first, .count = (uint32_t)(from->end - from->first)};
    part->low = own_position(part, search->low);
    part->high = own_position(part, search->high);
    part->visible = own_position(part, search->visible);
    part->cell_begin = part->cell_end = search->cell_blocks;
    if (index->root == TREE_NONE || part->visible == 0) {
        return;
    }
    part->tree_tokens = index->tokens;
    part->cell_end += index->cell_blocks.bound;
    search->tree_tokens += part->tree_tokens;
    search->cell_blocks = part->cell_end;
    struct cell_block *blocks = SEARCH_ROOM(search, struct cell_block, ROOM_CELL_BLOCKS) + part->cell_begin;
    for (uint32_t id = 0; id < index->cell_blocks.bound; id++) {
        blocks[id] = (struct cell_block){dci_slab_at(&index->cell_blocks, id), (uint32_t)(part - search->parts)};
    }
}

// Head and tail are scored first: asked for early, they are there when the queries are ready.
static void look_ahead(const struct index_part *last)
{
    const struct index *index = last->index;
    const uint32_t length = (uint32_t)(last->end - last->first);
    const uint32_t newest = length > PREFETCH_TOKENS ? length - PREFETCH_TOKENS : 0;
    for (uint32_t p = index->indexed > newest ? index->indexed : newest; p < length; p += DCI_LANES) {
        dci_prefetch(dci_tail_block(index, p), dci_block_bytes(index));
    }
}

enum index_status index_search_begin(struct index_search *search, const struct index_part *parts, uint32_t part_count,
                                     const struct index_query *query)
{
    if (!query_is_valid(query) || !parts_are_valid(parts, part_count)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(parts, part_count, query, sizes);
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
    search->index = parts[0].index;
    search->part_count = part_count;
    search->query = *query;
    search->views = query->query_count * query->head_count;
    // Not what the rooms hold, which depends on earlier searches.
    search->score_blocks = search->sieve_blocks = blocks_kept(search, sizes[ROOM_SCORES]);
    search->center_blocks = blocks_kept(search, sizes[ROOM_CENTERS]);
    look_ahead(&parts[part_count - 1]);
    bounds_init(search, parts[part_count - 1].end);
    for (uint32_t p = 0; p < part_count; p++) {
        part_init(search, &parts[p], &search->parts[p]);
    }
    for (uint32_t p = 0; p < part_count; p++) {
        struct part *part = &search->parts[p];
        const bool is_small = part->tree_tokens <= CAREFUL_TOKENS && part->tree_tokens < search->tree_tokens;
        part->care = is_small ? 1.0f : query->effort;
    }
    if (!dci_views_init(search)) {
        return INDEX_NOT_FINITE;
    }
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
        search->at_part = 0;
        search->cursor = search->parts[0].low;
        return;
    }
    const bool is_sink = search->cursor < search->sinks_end;
    uint32_t position = is_sink ? search->cursor : first + (search->cursor - search->sinks_end);
    const struct part *part = &search->parts[search->at_part];
    while (position >= part->first + part->count) {
        part = &search->parts[++search->at_part];
    }
    const struct index *index = part->index;
    position -= part->first;
    if (position >= index->head && position < index->indexed) {
        dci_open_one(search, search->at_part, position);
        search->cursor++;
        return;
    }
    // Neighbours outside the tree.
    uint32_t end = own_position(part, is_sink ? search->sinks_end : search->visible);
    end = position < index->head && index->indexed > 0 && end > index->head ? index->head : end;
    const uint32_t block_end = position - position % DCI_LANES + DCI_LANES;
    end = end < block_end ? end : block_end;
    dci_open_neighbours(search, search->at_part, position, end);
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
    memset(SEARCH_ROOM(search, float, ROOM_REST), 0, search->views * sizeof(float));
}

static void enter_totals(struct index_search *search)
{
    dci_search_begin_totals(search);
    enter(search, SEARCH_TOTALS);
}

// The part's own position that the cursor over head and tail stands at, behind what is clustered.
static uint32_t tail_position(const struct index_search *search)
{
    const struct index *index = search->parts[search->at_part].index;
    const bool is_clustered = search->cursor >= index->head && search->cursor < index->indexed;
    return is_clustered ? index->indexed : search->cursor;
}

// Heads and tails between low and high.
static void tail_item(struct index_search *search)
{
    uint32_t at = tail_position(search);
    while (at >= search->parts[search->at_part].high && search->at_part + 1 < search->part_count) {
        search->cursor = search->parts[++search->at_part].low;
        at = tail_position(search);
    }
    const struct part *part = &search->parts[search->at_part];
    const struct index *index = part->index;
    if (at >= part->high && search->cell_blocks == 0) {
        enter_totals(search);
        return;
    }
    if (at >= part->high) {
        dci_rank_begin_survey(search);
        enter(search, SEARCH_SURVEY);
        return;
    }
    uint32_t end = at - at % DCI_LANES + DCI_LANES;
    end = at < index->head && end > index->head && index->indexed > 0 ? index->head : end;
    end = end < part->high ? end : part->high;
    dci_open_neighbours(search, search->at_part, at, end);
    search->cursor = end;
}

static void opened(struct index_search *search)
{
    dci_open_flush(search);
    search->rounds++;
    const bool again =
        search->rounds == 1 || search->query.coverage > 0.0f || search->eligible_scored < search->query.budget;
    if (search->everything || !again || search->opened_tokens == search->tree_tokens) {
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
