// Carrying a batch's decisions into the tree. Nothing here can fail: all room was made before the plan went out.
//
// Thread ownership: the index's.
#include "index/batch.h"

#include <math.h>
#include <string.h>

static void note(struct index *index, uint32_t number)
{
    index->digest = dci_mix(index->digest ^ number);
}

// The run of a cell that gets more pages than there is room for.
static void lengthen(struct index *index, struct node *cell, const struct hit *hit)
{
    if (hit->run == NULL) {
        return;
    }
    const struct node old = *cell;
    const size_t blocks = (size_t)cell->part_count * index->page_blocks;
    cell->run = hit->run;
    cell->run_parts = (uint8_t)hit->run_parts;
    memcpy(dci_rows(index, cell, 0), dci_rows(index, &old, 0), blocks * index->rows_stride);
    memcpy(dci_lows(index, cell, 0), dci_lows(index, &old, 0), blocks * DCI_LANES * index->code_row_bytes);
    dci_run_release(index, old.run, old.run_parts);
}

static void commit_join(struct index *index, const struct hit *hit)
{
    const struct batch *batch = index->batch;
    struct node *cell = dci_node(index, hit->cell);
    struct dci_block *block = dci_node_block(index, dci_node(index, cell->parent), cell->lane);
    const uint32_t at = cell->lane % DCI_LANES;
    struct entry entry = {.far = block->far[at]};
    note(index, hit->cell);
    lengthen(index, cell, hit);
    for (uint32_t i = 0; i < hit->count; i++) {
        const uint32_t item = batch->order[hit->first + i], position = batch->positions[item];
        const struct spot *spot = &batch->spots[item];
        const struct dci_row token = {position, batch->codes + (size_t)item * index->code_bytes, spot->scale};
        struct page *page = dci_page(index, spot->page);
        if (page->state == PAGE_PLANNED && page->rows == 0) {
            page->owner = hit->cell;
            page->part = (uint8_t)spot->part;
            cell->parts[cell->part_count++] = spot->page;
            dci_rows_clear(index, cell, spot->part);
        }
        dci_row_write(index, cell, spot->part, spot->row, &token);
        page->rows++;
        cell->count++;
        cell->spread2 += spot->spread2;
        const float far = sqrtf(spot->spread2) * index->inverse_root_dim;
        entry.far = far > entry.far ? far : entry.far;
        dci_place_set(index, position, spot->page, spot->row);
        note(index, position);
    }
    dci_cell_summarise(index, cell, &entry);
    block->unit[at] = entry.unit; // the anchor stays
    block->far[at] = entry.far;
    block->rows[at] = entry.rows;
    block->reach[at] = entry.reach;
}

// A draft's tokens are where it says.
static void settle_draft(struct index *index, const struct draft *draft)
{
    const struct node *cell = dci_node(index, draft->node);
    for (uint32_t part = 0; part < cell->part_count; part++) {
        for (uint32_t row = 0; row < index->page_tokens; row++) {
            const uint32_t position = dci_rows_of(index, cell, part, row)->positions[row % DCI_LANES];
            if (position != TREE_NONE) {
                dci_place_set(index, position, cell->parts[part], row);
                note(index, position);
            }
        }
    }
    note(index, draft->node);
}

static void forget_cell(struct index *index, uint32_t cell)
{
    struct node *node = dci_node(index, cell);
    node->part_count = 0;
    dci_run_release(index, node->run, node->run_parts);
}

static void commit_divide(struct index *index, const struct hit *hit)
{
    const struct batch *batch = index->batch;
    const struct draft *first = dci_draft(batch, hit->draft);
    struct node *node = dci_node(index, first->node);
    if (hit->cell == TREE_NONE) {
        dci_root_create(index, &first->entry);
    } else {
        const struct node *old = dci_node(index, hit->cell);
        node->parent = old->parent;
        node->lane = old->lane;
        dci_entry_write(index, dci_node(index, node->parent), node->lane, &first->entry);
        forget_cell(index, hit->cell);
        dci_node_release(index, hit->cell);
    }
    settle_draft(index, first);
    for (uint32_t i = 1; i < hit->draft_count; i++) {
        const struct draft *draft = dci_draft(batch, hit->draft + i);
        settle_draft(index, draft);
        dci_node_add(index, dci_node(index, first->node)->parent, &draft->entry, batch->scratch);
    }
}

// Asks for the rows that a hit's first token goes to.
static void ask_for_rows(const struct index *index, const struct hit *hit)
{
    if (!hit->divides && hit->run == NULL) {
        const struct spot *spot = &index->batch->spots[index->batch->order[hit->first]];
        dci_ask_for(dci_rows_of(index, dci_node(index, hit->cell), spot->part, spot->row), index->rows_stride);
    }
}

void dci_batch_commit(struct index *index)
{
    struct batch *batch = index->batch;
    for (uint32_t i = 0; i < batch->hit_count; i++) {
        if (i + 1 < batch->hit_count) {
            ask_for_rows(index, &batch->hits[i + 1]);
        }
        if (batch->hits[i].divides) {
            commit_divide(index, &batch->hits[i]);
        } else {
            commit_join(index, &batch->hits[i]);
        }
    }
    if (batch->dissolves) {
        forget_cell(index, batch->source);
        dci_node_remove(index, batch->source);
    }
    for (uint32_t i = 0; i < batch->new_pages.count; i++) {
        dci_page(index, batch->new_pages.items[i])->state = PAGE_LEAF;
        index->leaf_pages++;
    }
    for (uint32_t i = 0; i < batch->released_pages.count; i++) {
        index->leaf_pages -= dci_page(index, batch->released_pages.items[i])->state == PAGE_LEAF ? 1 : 0;
        dci_page_release(index, batch->released_pages.items[i]);
    }
    index->tokens += batch->source == TREE_NONE ? batch->item_count : 0;
    index->indexed = batch->end;
    note(index, index->indexed);
    dci_tail_forget(index);
    batch->new_pages.count = batch->hit_count = 0; // what they name belongs to the tree now
    batch->norm2_max = index->tree_norm2_max;
}
