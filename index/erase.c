// Forgetting tokens: the end of a sequence, or single positions.
//
// A token leaves its page at once, its row is free for tokens to come. Pages and cells without tokens go; cells that
// keep few are mended by the next builds. A running build is voided, because what it worked out may name what is gone.
// Thread ownership: the index's.
#include "index/batch.h"

#include <math.h>
#include <string.h>

#define ROUNDING 1.001f // of sums of squares

struct released {
    uint32_t *pages, *count;
    float norm2; // of the open tokens that went, the largest at most
};

static void release_page(struct index *index, uint32_t page, struct released *released)
{
    dci_page_release(index, page);
    released->pages[(*released->count)++] = page;
}

// Sum of the squared norms of what a cell's codes stand for, and the largest; from the codes themselves.
static void measure(const struct index *index, struct node *cell, struct entry *entry)
{
    float far2 = 0.0f;
    cell->spread2 = 0.0f;
    for (uint32_t part = 0; part < cell->part_count; part++) {
        for (uint32_t row = 0; row < index->page_tokens; row++) {
            const struct dci_rows *rows = dci_rows_of(index, cell, part, row);
            const uint32_t lane = row % DCI_LANES;
            if (rows->positions[lane] != TREE_NONE) {
                const float spread2 = dci_code_spread2(index, cell, part, row);
                cell->spread2 += spread2;
                far2 = spread2 > far2 ? spread2 : far2;
            }
        }
    }
    entry->far = sqrtf(far2) * index->inverse_root_dim;
    dci_cell_summarise(index, cell, entry);
}

static void refresh(struct index *index, uint32_t id)
{
    struct node *cell = dci_node(index, id);
    struct entry entry;
    if (cell->count == 0) {
        dci_run_release(index, cell->run, cell->run_parts);
        dci_node_remove(index, id);
        return;
    }
    dci_entry_read(index, dci_node(index, cell->parent), cell->lane, &entry);
    measure(index, cell, &entry);
    dci_entry_write(index, dci_node(index, cell->parent), cell->lane, &entry);
}

// Takes an empty page out of its cell; the run keeps its room.
static void drop_part(struct index *index, struct node *cell, uint32_t part, struct released *released)
{
    const uint32_t page = cell->parts[part];
    cell->part_count--;
    for (uint32_t i = part; i < cell->part_count; i++) {
        const uint32_t number = i * index->page_blocks, next = number + index->page_blocks;
        memcpy(dci_rows(index, cell, number), dci_rows(index, cell, next), index->page_blocks * index->rows_stride);
        memcpy(dci_lows(index, cell, number), dci_lows(index, cell, next),
               (size_t)index->page_blocks * DCI_LANES * index->code_row_bytes);
        cell->parts[i] = cell->parts[i + 1];
        dci_page(index, cell->parts[i])->part = (uint8_t)i;
    }
    release_page(index, page, released);
    index->leaf_pages--;
}

// A clustered token. The cell's summary is left to the caller.
static uint32_t forget_leaf(struct index *index, uint32_t position, struct released *released)
{
    const struct index_place place = dci_place_of(index, position);
    struct page *page = dci_page(index, place.page);
    const uint32_t id = page->owner;
    struct node *cell = dci_node(index, id);
    dci_rows_of(index, cell, page->part, place.row)->positions[place.row % DCI_LANES] = TREE_NONE;
    *dci_place(index, position) = TREE_NONE;
    cell->count--;
    index->tokens--;
    if (--page->rows == 0) {
        drop_part(index, cell, page->part, released);
    }
    index->ragged = true;
    index->mended = 0;
    return id;
}

static bool is_clustered(const struct index *index, uint32_t position)
{
    return position >= index->head && position < index->indexed;
}

// The most that the squared norm of an open token's key can be: each coordinate is half a step from its code at most.
static float open_norm2(const struct index *index, uint32_t position)
{
    const struct dci_block *block = dci_tail_block(index, position);
    const uint32_t lane = position % DCI_LANES;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < index->head_dim; i++) {
        const int32_t code = block->codes[((size_t)i / 4 * DCI_LANES + lane) * 4 + i % 4] - DCI_CODE_ZERO;
        sum += (uint32_t)(code * code);
    }
    const float norm = block->step[lane] * (sqrtf((float)sum) + 0.5f * sqrtf((float)index->head_dim));
    return ROUNDING * norm * norm;
}

// The largest norm of all keys falls with the token that had it, as far as can be told: tokens of the tree may have
// had the largest norm there as long as there is a tree.
static void lower_norm(struct index *index, float gone)
{
    const bool tree_went = index->root == TREE_NONE && index->tree_norm2_max > 0.0f;
    index->tree_norm2_max = tree_went ? 0.0f : index->tree_norm2_max;
    if (gone < index->norm2_max && !tree_went) {
        return;
    }
    float norm2 = ROUNDING * index->tree_norm2_max;
    for (uint32_t p = 0; norm2 < index->norm2_max && p < index->length; p++) {
        p = p >= index->head && p < index->indexed ? index->indexed : p;
        if (p < index->length && *dci_place(index, p) != TREE_NONE) {
            const float own = open_norm2(index, p);
            norm2 = own > norm2 ? own : norm2;
        }
    }
    index->norm2_max = norm2 < index->norm2_max ? norm2 : index->norm2_max;
}

// A token of head or tail.
static void forget_open(struct index *index, uint32_t position, struct released *released)
{
    const uint32_t page = dci_place_of(index, position).page;
    const float norm2 = open_norm2(index, position);
    released->norm2 = norm2 > released->norm2 ? norm2 : released->norm2;
    *dci_place(index, position) = TREE_NONE;
    dci_tail_block(index, position)->rows[position % DCI_LANES] = 0.0f;
    if (index_page_rows(index, page) == 0) {
        release_page(index, page, released);
    }
}

static void void_build(struct index *index)
{
    assert(!index->preparing);
    dci_build_fini(index);
}

static void note(struct index *index, uint64_t event)
{
    index->digest = dci_mix(index->digest ^ dci_mix(event));
}

void index_erase(struct index *index, uint64_t position, uint32_t *pages, uint32_t *count)
{
    struct released released = {.pages = pages, .count = count};
    *count = 0;
    assert(position < index->length);
    void_build(index);
    if (*dci_place(index, (uint32_t)position) == TREE_NONE) {
        return;
    }
    if (is_clustered(index, (uint32_t)position)) {
        refresh(index, forget_leaf(index, (uint32_t)position, &released));
    } else {
        forget_open(index, (uint32_t)position, &released);
    }
    lower_norm(index, released.norm2);
    note(index, position);
}

// Summaries of all cells that a truncation has touched: those whose count does not agree with their entry.
static void refresh_all(struct index *index)
{
    for (uint32_t id = 0; id < index->nodes.bound; id++) {
        const struct node *cell = dci_node(index, id);
        if (cell->level != 1) {
            continue;
        }
        const struct dci_block *block = dci_node_block(index, dci_node(index, cell->parent), cell->lane);
        if (block->rows[cell->lane % DCI_LANES] != (float)cell->count) {
            refresh(index, id);
        }
    }
}

void index_truncate(struct index *index, uint64_t length, uint32_t *pages, uint32_t *count)
{
    struct released released = {.pages = pages, .count = count};
    *count = 0;
    if (length >= index->length) {
        return;
    }
    const uint32_t end = (uint32_t)length;
    void_build(index);
    for (uint32_t p = index->length; p > end; p--) {
        if (*dci_place(index, p - 1) == TREE_NONE) {
            continue;
        }
        if (is_clustered(index, p - 1)) {
            (void)forget_leaf(index, p - 1, &released);
        } else {
            forget_open(index, p - 1, &released);
        }
    }
    index->length = end;
    refresh_all(index);
    if (index->indexed > end) {
        index->indexed = end <= index->head ? 0 : end;
        // The chunk that the next token goes to may have been given back, or holds nothing that is looked at any more;
        // but for the head's, which are kept.
        const uint32_t chunk = DCI_LANES << index->tail.shift, whole = end / chunk * chunk;
        const uint32_t head = end < index->head ? end : index->head;
        dci_tail_trim(index, whole > head ? whole : head);
    } else {
        dci_tail_trim(index, end);
    }
    dci_store_trim(&index->places, &index->memory, end);
    lower_norm(index, released.norm2);
    note(index, UINT64_MAX - end);
    if (index->root == TREE_NONE) {
        index->ragged = false;
    }
}
