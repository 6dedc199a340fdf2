// Scoring: blocks of head and tail with their keys, rows of cells with their codes.
//
// Thread ownership: that of the search context. No allocation.
#include "index/search.h"

#include <string.h>

// Cells ahead whose node, and whose codes, are asked for while one is scored.
#define NODES_AHEAD 12u
#define CODES_AHEAD 3u

uint32_t dci_scored_position(const struct index_search *search, const struct scored *scored, uint32_t lane)
{
    if (scored->cell != TREE_NONE) {
        return dci_rows(search->index, dci_node(search->index, scored->cell), scored->number)->positions[lane];
    }
    return lane >= scored->begin && lane < scored->end ? scored->place + lane : TREE_NONE;
}

struct index_place dci_scored_place(const struct index_search *search, const struct scored *scored, uint32_t lane)
{
    if (scored->cell == TREE_NONE) {
        return dci_place_of(search->index, scored->place + lane);
    }
    return (struct index_place){scored->page, scored->number % search->index->page_blocks * DCI_LANES + lane};
}

const float *dci_block_centers(struct index_search *search, uint32_t block)
{
    if (block < search->center_blocks && search->phase > SEARCH_CENTERS) { // sinks and window come before
        return SEARCH_ROOM(search, float, ROOM_CENTERS) + (size_t)block * search->views * DCI_LANES;
    }
    float *centers = SEARCH_ROOM(search, float, ROOM_ANCHORS);
    search->index->kernel->centers16(&search->seen, dci_slab_at(&search->index->cell_blocks, block), centers);
    return centers;
}

// Hides lanes that do not count, and what a view does not see.
static void hide(const struct index_search *search, const struct scored *scored, float *scores)
{
    const struct index_query *query = &search->query;
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        const uint32_t position = dci_scored_position(search, scored, lane);
        for (uint32_t v = 0; v < search->views; v++) {
            if (position > query->first_position + v / query->head_count) { // also where there is none
                scores[(size_t)v * DCI_LANES + lane] = DCI_HIDDEN;
            }
        }
    }
}

static void raise_tops(struct index_search *search, const float *scores)
{
    float *tops = SEARCH_ROOM(search, float, ROOM_TOPS);
    for (size_t i = 0; i < (size_t)search->views * DCI_LANES; i++) {
        tops[i] = scores[i] > tops[i] ? scores[i] : tops[i];
    }
}

static void score_neighbours(struct index_search *search, const struct scored *scored, float *scores)
{
    search->index->kernel->centers16(&search->plain, dci_tail_block(search->index, scored->place), scores);
    if (scored->begin > 0 || scored->end < DCI_LANES || scored->place + DCI_LANES - 1 > search->query.first_position) {
        hide(search, scored, scores);
    }
    raise_tops(search, scores);
}

static void score_block(struct index_search *search, const struct scored *scored, float *scores)
{
    const struct index *index = search->index;
    if (scored->cell == TREE_NONE) {
        score_neighbours(search, scored, scores);
        return;
    }
    const struct dci_rows *rows = dci_rows(index, dci_node(index, scored->cell), scored->number);
    const float *anchors = dci_block_centers(search, scored->place / DCI_LANES) + scored->place % DCI_LANES;
    const bool is_one = scored->only != TREE_NONE;
    const uint32_t low = is_one ? scored->only : search->low, span = is_one ? 1 : search->high - search->low;
    if ((uint64_t)low + span <= search->query.first_position + 1) { // every view sees all of it
        index->kernel->tokens16(&search->seen, rows, anchors, low, span, scores, SEARCH_ROOM(search, float, ROOM_TOPS));
        return;
    }
    float *unseen = SEARCH_ROOM(search, float, ROOM_UNSEEN);
    index->kernel->tokens16(&search->seen, rows, anchors, low, span, scores, unseen);
    hide(search, scored, scores);
    raise_tops(search, scores);
}

static float *room_for(struct index_search *search, uint32_t block)
{
    if (!dci_search_is_kept(search, block)) {
        return SEARCH_ROOM(search, float, ROOM_BLOCK);
    }
    return SEARCH_ROOM(search, float, ROOM_SCORES) + (size_t)block * search->views * DCI_LANES;
}

float *dci_block_scores(struct index_search *search, uint32_t block)
{
    float *scores = room_for(search, block);
    if (!dci_search_is_kept(search, block)) {
        score_block(search, dci_scored(search, block), scores);
    }
    return scores;
}

// Adds a block and scores it. Once the bar is known, a block of the tree with no lane that can be selected is dropped:
// a rough sum of its exponentials is all that is needed of it.
static void add(struct index_search *search, const struct scored *scored)
{
    const struct dci_kernel *kernel = search->index->kernel;
    const uint32_t block = search->block_count;
    float *scores = room_for(search, block);
    score_block(search, scored, scores);
    if (search->barred && scored->cell != TREE_NONE &&
        kernel->drop16(scores, search->views, SEARCH_ROOM(search, float, ROOM_REFERENCE), search->bar,
                       SEARCH_ROOM(search, float, ROOM_ROUGH))) {
        return;
    }
    *dci_scored(search, block) = *scored;
    search->block_count++;
}

void dci_open_neighbours(struct index_search *search, uint32_t first, uint32_t end)
{
    for (uint32_t p = first - first % DCI_LANES; p < end; p += DCI_LANES) {
        const uint32_t lane = p < first ? first - p : 0, lane_end = end - p < DCI_LANES ? end - p : DCI_LANES;
        add(search, &(struct scored){TREE_NONE, TREE_NONE, p, (uint16_t)lane, (uint16_t)lane_end, 0, TREE_NONE});
        uint32_t live = 0;
        for (uint32_t i = lane; i < lane_end; i++) {
            live += dci_tail_block(search->index, p)->rows[i] > 0.0f ? 1 : 0;
        }
        search->tokens_scored += live;
        search->eligible_scored += search->phase == SEARCH_TAIL ? live : 0;
    }
}

static uint32_t slot_of(const struct index *index, const struct node *cell)
{
    return dci_node(index, cell->parent)->parts[cell->lane / DCI_LANES] * DCI_LANES + cell->lane % DCI_LANES;
}

void dci_open_one(struct index_search *search, uint32_t position)
{
    const struct index *index = search->index;
    const struct index_place place = dci_place_of(index, position);
    if (place.page == TREE_NONE) {
        return;
    }
    const struct page *page = dci_page(index, place.page);
    search->tokens_scored++;
    add(search, &(struct scored){place.page, page->owner, slot_of(index, dci_node(index, page->owner)), 0, DCI_LANES,
                                 page->part * index->page_blocks + place.row / DCI_LANES, position});
}

static uint32_t cell_at(const struct index *index, uint32_t slot)
{
    const struct dci_block *block = dci_slab_at(&index->cell_blocks, slot / DCI_LANES);
    return block->child[slot % DCI_LANES];
}

static const struct node *lined_up(const struct index_search *search, uint32_t at)
{
    return dci_node(search->index, cell_at(search->index, SEARCH_ROOM(search, uint32_t, ROOM_TO_OPEN)[at]));
}

static void prefetch_codes(const struct index_search *search, uint32_t at)
{
    const struct index *index = search->index;
    const struct node *cell = lined_up(search, at);
    dci_prefetch(dci_rows(index, cell, 0), cell->part_count * index->page_blocks * index->rows_stride);
}

static void look_ahead(const struct index_search *search, uint32_t at)
{
    for (uint32_t i = 0; at == 0 && i < NODES_AHEAD && i < search->to_open; i++) {
        dci_prefetch(lined_up(search, i), sizeof(struct node));
    }
    for (uint32_t i = 0; at == 0 && i < CODES_AHEAD && i < search->to_open; i++) {
        prefetch_codes(search, i);
    }
    if (at + NODES_AHEAD < search->to_open) {
        dci_prefetch(lined_up(search, at + NODES_AHEAD), sizeof(struct node));
    }
}

static uint32_t eligible_tokens(const struct index_search *search, const struct node *cell)
{
    const struct index *index = search->index;
    if (search->low <= index->head && search->high >= index->indexed) {
        return cell->count;
    }
    uint32_t count = 0;
    for (uint32_t part = 0; part < cell->part_count; part++) {
        for (uint32_t row = 0; row < index->page_tokens; row++) {
            const uint32_t position = dci_rows_of(index, cell, part, row)->positions[row % DCI_LANES];
            count += position >= search->low && position < search->high ? 1 : 0;
        }
    }
    return count;
}

uint32_t dci_open_cell(struct index_search *search, uint32_t at)
{
    const struct index *index = search->index;
    const uint32_t slot = SEARCH_ROOM(search, uint32_t, ROOM_TO_OPEN)[at];
    const struct node *cell = lined_up(search, at);
    const uint32_t id = cell_at(index, slot), blocks = cell->part_count * index->page_blocks;
    look_ahead(search, at);
    // A later cell's codes are asked for piece by piece between the blocks of this one: all at once they would keep the
    // processor's queue of misses full, and this cell's own reads would wait behind them.
    const struct node *later = at + CODES_AHEAD < search->to_open ? lined_up(search, at + CODES_AHEAD) : NULL;
    const uint32_t later_blocks = later == NULL ? 0 : later->part_count * index->page_blocks;
    uint32_t asked = 0;
    for (uint32_t block = 0; block < blocks; block++) {
        for (; asked < (block + 1) * later_blocks / blocks; asked++) {
            dci_prefetch(dci_rows(index, later, asked), index->rows_stride);
        }
        add(search,
            &(struct scored){cell->parts[block / index->page_blocks], id, slot, 0, DCI_LANES, block, TREE_NONE});
    }
    const uint32_t eligible = eligible_tokens(search, cell);
    search->eligible_scored += eligible;
    search->tokens_scored += eligible;
    search->opened_tokens += cell->count;
    return blocks;
}
