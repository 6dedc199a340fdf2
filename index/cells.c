// What a batch does to one cell: its tokens join it, or new cells take its place.
//
// Everything is written where nothing looks yet. Thread ownership: the index's.
#include "index/batch.h"

#include <math.h>
#include <string.h>

static void add_move(struct index *index, uint32_t position, uint32_t page, uint32_t row)
{
    struct batch *batch = index->batch;
    assert(batch->move_count < batch->move_room);
    batch->moves[batch->move_count++] = (struct index_move){.from = dci_place_of(index, position), .to = {page, row}};
}

static bool page_create(struct index *index, uint32_t *page)
{
    struct batch *batch = index->batch;
    if (!dci_list_reserve(&batch->new_pages, &index->memory, batch->new_pages.count + 1) ||
        !dci_page_acquire(index, PAGE_PLANNED, page)) {
        return false;
    }
    batch->new_pages.items[batch->new_pages.count++] = *page;
    return true;
}

// What a cell's tokens are coded against; the base where there is no cell yet.
static void read_anchor(const struct index *index, uint32_t id, float *anchor)
{
    struct entry entry = {0};
    if (id != TREE_NONE) {
        const struct node *cell = dci_node(index, id);
        dci_entry_read(index, dci_node(index, cell->parent), cell->lane, &entry);
    }
    dci_entry_anchor(index, &entry, anchor);
}

// ---- joining ----

// The next free row of a cell from (part, row) on. False when all of its pages are full.
static bool next_free(const struct index *index, const struct node *cell, uint32_t *part, uint32_t *row)
{
    for (; *part < cell->part_count; (*part)++, *row = 0) {
        const bool is_full = dci_page(index, cell->parts[*part])->rows == index->page_tokens;
        for (*row = is_full ? index->page_tokens : *row; *row < index->page_tokens; (*row)++) {
            if (dci_rows_of(index, cell, *part, *row)->positions[*row % DCI_LANES] == TREE_NONE) {
                return true;
            }
        }
    }
    return false;
}

// Places for a hit's tokens: free rows first, then those of new pages.
static bool find_spots(struct index *index, const struct hit *hit, uint32_t *parts)
{
    struct batch *batch = index->batch;
    const struct node *cell = dci_node(index, hit->cell);
    uint32_t part = 0, row = 0, page = TREE_NONE;
    for (uint32_t i = 0; i < hit->count; i++, row++) {
        struct spot *spot = &batch->spots[batch->order[hit->first + i]];
        if (part < cell->part_count && next_free(index, cell, &part, &row)) {
            page = cell->parts[part];
        } else if (row == index->page_tokens || *parts == cell->part_count) {
            part = (*parts)++;
            row = 0;
            if (!page_create(index, &page)) {
                return false;
            }
        }
        *spot = (struct spot){.page = page, .part = part, .row = row};
    }
    return true;
}

static bool join(struct index *index, struct hit *hit)
{
    struct batch *batch = index->batch;
    const struct node *cell = dci_node(index, hit->cell);
    float anchor[INDEX_HEAD_DIM_MAX];
    uint32_t parts = cell->part_count;
    if (!find_spots(index, hit, &parts)) {
        return false;
    }
    if (parts > cell->run_parts) {
        hit->run = dci_run_acquire(index, parts);
        if (hit->run == NULL) {
            return false;
        }
        hit->run_parts = parts;
    }
    read_anchor(index, hit->cell, anchor);
    for (uint32_t i = 0; i < hit->count; i++) {
        const uint32_t item = batch->order[hit->first + i];
        struct spot *spot = &batch->spots[item];
        uint8_t *code = batch->codes + (size_t)item * index->code_bytes;
        spot->scale = index->kernel->encode5(dci_item_key(index, item), anchor, index->head_dim, code, &spot->spread2);
        add_move(index, batch->positions[item], spot->page, spot->row);
    }
    return true;
}

// ---- dividing ----

// The keys of a cell's tokens, and of those that come to it. Returns how many.
static uint32_t gather(struct index *index, const struct hit *hit)
{
    struct batch *batch = index->batch;
    const uint32_t dim = index->head_dim;
    uint32_t n = 0;
    if (hit->cell != TREE_NONE) {
        const struct node *cell = dci_node(index, hit->cell);
        for (uint32_t part = 0; part < cell->part_count; part++) {
            const unsigned char *first = batch->rows[hit->need + part];
            for (uint32_t row = 0; row < index->page_tokens; row++) {
                const uint32_t position = dci_rows_of(index, cell, part, row)->positions[row % DCI_LANES];
                if (position == TREE_NONE) {
                    continue;
                }
                float *key = batch->members + (size_t)n * dim;
                dci_key_load(index, first + row * batch->rows_stride, key);
                batch->vectors[n] = key;
                batch->member_positions[n++] = position;
            }
        }
    }
    for (uint32_t i = 0; i < hit->count; i++) {
        const uint32_t item = batch->order[hit->first + i];
        batch->vectors[n] = dci_item_key(index, item);
        batch->member_positions[n++] = batch->positions[item];
    }
    for (uint32_t i = 0; i < n; i++) {
        batch->member_order[i] = i;
    }
    float center[INDEX_HEAD_DIM_MAX];
    read_anchor(index, hit->cell, center);
    dci_members_code(index, batch->vectors, n, center, &batch->coded);
    return n;
}

// Puts members order[begin .. begin+n-1] into one new page of a cell.
static bool page_fill(struct index *index, struct draft *draft, const float *anchor, uint32_t begin, uint32_t n)
{
    struct batch *batch = index->batch;
    struct node *node = dci_node(index, draft->node);
    uint32_t page;
    if (!page_create(index, &page)) {
        return false;
    }
    const uint32_t part = node->part_count++;
    node->parts[part] = page;
    dci_page(index, page)->owner = draft->node;
    dci_page(index, page)->part = (uint8_t)part;
    dci_page(index, page)->rows = (uint16_t)n;
    dci_rows_clear(index, node, part);
    for (uint32_t row = 0; row < n; row++) {
        const uint32_t member = batch->member_order[begin + row];
        uint8_t code[INDEX_HEAD_DIM_MAX];
        float spread2;
        const float scale = index->kernel->encode5(batch->vectors[member], anchor, index->head_dim, code, &spread2);
        const struct dci_row token = {batch->member_positions[member], code, scale};
        dci_row_write(index, node, part, row, &token);
        node->spread2 += spread2;
        const float far = sqrtf(spread2) * index->inverse_root_dim;
        draft->entry.far = far > draft->entry.far ? far : draft->entry.far;
        add_move(index, batch->member_positions[member], page, row);
    }
    node->count += n;
    return true;
}

static void push(struct batch *batch, uint32_t begin, uint32_t count, uint32_t draft)
{
    assert(batch->segment_count < BATCH_SEGMENTS_MAX);
    batch->segments[batch->segment_count++] = (struct segment){begin, count, draft};
}

// A new cell of members order[begin .. begin+n-1], without pages yet.
static bool cell_create(struct index *index, uint32_t begin, uint32_t n)
{
    struct batch *batch = index->batch;
    float anchor[INDEX_HEAD_DIM_MAX] = {0};
    if (!dci_store_reserve(&batch->drafts, &index->memory, (uint64_t)batch->draft_count + 1)) {
        return false;
    }
    struct draft *draft = dci_draft(batch, batch->draft_count);
    *draft = (struct draft){0};
    if (!dci_slab_acquire(&index->nodes, &index->memory, &draft->node)) {
        return false;
    }
    struct node *node = dci_node(index, draft->node);
    *node = (struct node){.parent = TREE_NONE, .lane = TREE_NONE, .level = 1};
    node->run_parts = (uint8_t)((n + index->page_tokens - 1) / index->page_tokens);
    node->run = dci_run_acquire(index, node->run_parts);
    if (node->run == NULL) {
        dci_node_release(index, draft->node);
        return false;
    }
    draft->entry.child = draft->node;
    // The mean, or the promoted key, which a division has put first.
    const uint32_t counted = index->policy == INDEX_PROMOTION ? 1 : n;
    for (uint32_t i = begin; i < begin + counted; i++) {
        index->kernel->add(anchor, batch->vectors[batch->member_order[i]], index->head_dim);
    }
    for (uint32_t i = 0; i < index->head_dim; i++) {
        anchor[i] /= (float)counted;
    }
    dci_entry_code(index, anchor, &draft->entry);
    push(batch, begin, n, batch->draft_count++);
    return true;
}

// One step of a division: members that are too many for a cell are divided, others become a cell; a cell's members are
// cut into pages of neighbours, all full but the last.
static bool segment_work(struct index *index, const struct hit *hit)
{
    struct batch *batch = index->batch;
    const struct segment segment = batch->segments[--batch->segment_count];
    const struct dci_division division = {index, &batch->coded, batch->member_order, batch->values,
                                          index->digest ^ hit->cell};
    uint32_t left = 0;
    if (segment.draft == TREE_NONE && segment.count <= index->cell_max) {
        return cell_create(index, segment.begin, segment.count);
    }
    if (segment.draft == TREE_NONE) {
        left = dci_divide(&division, segment.begin, segment.count);
    } else {
        const uint32_t pages = (segment.count + index->page_tokens - 1) / index->page_tokens;
        struct draft *draft = dci_draft(batch, segment.draft);
        if (pages == 1) {
            float anchor[INDEX_HEAD_DIM_MAX];
            dci_entry_anchor(index, &draft->entry, anchor);
            const bool granted = page_fill(index, draft, anchor, segment.begin, segment.count);
            dci_cell_summarise(index, dci_node(index, draft->node), &draft->entry);
            return granted;
        }
        left = pages / 2 * index->page_tokens;
        dci_divide_at(&division, segment.begin, segment.count, left);
    }
    push(batch, segment.begin + left, segment.count - left, segment.draft);
    push(batch, segment.begin, left, segment.draft);
    return true;
}

bool dci_hit_work(struct index *index, struct hit *hit, bool *done)
{
    struct batch *batch = index->batch;
    *done = !hit->divides;
    if (!hit->divides) {
        return join(index, hit);
    }
    if (!hit->begun) {
        hit->begun = true;
        hit->draft = batch->draft_count;
        push(batch, 0, gather(index, hit), TREE_NONE);
        return true;
    }
    const bool granted = segment_work(index, hit);
    hit->draft_count = batch->draft_count - hit->draft;
    *done = batch->segment_count == 0;
    return granted;
}

void dci_hit_discard(struct index *index, const struct hit *hit)
{
    for (uint32_t i = hit->draft_count; i > 0; i--) {
        const uint32_t id = dci_draft(index->batch, hit->draft + i - 1)->node;
        const struct node *node = dci_node(index, id);
        dci_run_release(index, node->run, node->run_parts);
        dci_node_release(index, id);
    }
    if (hit->run != NULL) {
        dci_run_release(index, hit->run, hit->run_parts);
    }
}
