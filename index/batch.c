// The slices of a batch: which tokens, which cells, which rows are needed, and the plan.
//
// Routes are taken in the tree as it was at the beginning, so the order of the batch's tokens does not matter to them.
// What the batch decides is a function of the tree and the keys. Thread ownership: the index's.
#include "index/batch.h"

#include <string.h>

#define STEP_ELEMENTS 4 // cost of an item that only touches numbers

// A cell of fewer tokens than this share of its room is dissolved when it is mended.
#define DISSOLVE_SHARE 8u

#define DRAFTS_SHIFT   3u

#define MEMBER_VECTORS 8u // looks at a member in a step of a division

static bool acquire(struct index *index, void *out, size_t bytes)
{
    void *block = dci_memory_acquire(&index->memory, bytes);
    memcpy(out, &block, sizeof block);
    return block != NULL;
}

static void release(struct index *index, void *block, size_t bytes)
{
    dci_memory_release(&index->memory, block, bytes);
}

static bool begin(struct index *index, uint32_t item_room)
{
    struct batch *batch = dci_memory_acquire(&index->memory, sizeof *batch);
    if (batch == NULL) {
        return false;
    }
    memset(batch, 0, sizeof *batch);
    index->batch = batch;
    batch->source = TREE_NONE;
    batch->end = index->indexed;
    batch->item_room = item_room;
    batch->norm2_max = index->tree_norm2_max;
    dci_store_init(&batch->drafts, sizeof(struct draft), DRAFTS_SHIFT);
    return acquire(index, &batch->positions, item_room * sizeof batch->positions[0]) &&
           acquire(index, &batch->cells, item_room * sizeof batch->cells[0]) &&
           acquire(index, &batch->order, item_room * sizeof batch->order[0]) &&
           acquire(index, &batch->keys, (size_t)item_room * index->head_dim * sizeof batch->keys[0]) &&
           acquire(index, &batch->codes, (size_t)item_room * index->code_bytes) &&
           acquire(index, &batch->spots, item_room * sizeof batch->spots[0]) &&
           acquire(index, &batch->hits, (item_room + 1) * sizeof batch->hits[0]) &&
           acquire(index, &batch->scratch, dci_scratch_bytes(index));
}

bool dci_batch_begin(struct index *index, uint32_t end)
{
    const uint32_t first = index->indexed > index->head ? index->indexed : index->head;
    if (!begin(index, end - first)) {
        return false;
    }
    struct batch *batch = index->batch;
    batch->phase = BATCH_TAIL;
    batch->begin = first;
    batch->end = end;
    return true;
}

bool dci_mend_begin(struct index *index)
{
    if (!begin(index, index->cell_max)) {
        return false;
    }
    index->batch->phase = BATCH_SOURCE;
    index->batch->cursor = index->mended;
    return true;
}

static void enter(struct batch *batch, enum batch_phase phase)
{
    batch->phase = phase;
    batch->cursor = 0;
}

// Makes room for the rows that are about to be asked for.
static bool rows_reserve(struct index *index)
{
    struct batch *batch = index->batch;
    const void **rows = dci_memory_acquire(&index->memory, batch->need.count * sizeof rows[0]);
    if (rows == NULL) {
        return false;
    }
    if (batch->rows_given > 0) {
        memcpy(rows, batch->rows, batch->rows_given * sizeof rows[0]);
    }
    release(index, batch->rows, batch->rows_room * sizeof rows[0]);
    batch->rows = rows;
    batch->rows_room = batch->need.count;
    return true;
}

static bool need_pages(struct index *index, const struct node *cell)
{
    for (uint32_t part = 0; part < cell->part_count; part++) {
        if (!dci_list_push(&index->batch->need, &index->memory, cell->parts[part])) {
            return false;
        }
    }
    return true;
}

// ---- mending: a cell that has lost too many tokens ----

static bool is_small(const struct index *index, const struct node *cell)
{
    return cell->count <= index->cell_max / DISSOLVE_SHARE && index->leaf_pages > cell->part_count;
}

static bool is_ragged(const struct index *index, const struct node *cell)
{
    return cell->run_parts > (cell->count + index->page_tokens - 1) / index->page_tokens;
}

// Looks at one node. *found: it is a cell worth mending.
static bool source_item(struct index *index, bool *found)
{
    struct batch *batch = index->batch;
    const uint32_t id = batch->cursor++;
    const struct node *cell = dci_node(index, id);
    // A node that is not in use is linked in the list of free ones, and no entry points to it.
    if (cell->level != 1 || cell->parent == TREE_NONE) {
        return true;
    }
    *found = is_small(index, cell) || is_ragged(index, cell);
    if (!*found) {
        return true;
    }
    index->mended = id; // again, should this batch come to nothing
    batch->source = id;
    batch->dissolves = is_small(index, cell);
    return need_pages(index, cell);
}

// ---- loading ----

// Names the pages of the batch's tokens.
static bool need_tail(struct index *index)
{
    struct batch *batch = index->batch;
    for (uint32_t position = batch->begin; position < batch->end; position++) {
        const uint32_t page = dci_place_of(index, position).page, count = batch->need.count;
        if (page != TREE_NONE && (count == 0 || batch->need.items[count - 1] != page) &&
            !dci_list_push(&batch->need, &index->memory, page)) {
            return false;
        }
    }
    return batch->need.count == 0 || rows_reserve(index);
}

static void item_add(struct index *index, uint32_t position, const void *row)
{
    struct batch *batch = index->batch;
    assert(batch->item_count < batch->item_room);
    dci_key_load(index, row, batch->keys + (size_t)batch->item_count * index->head_dim);
    batch->positions[batch->item_count++] = position;
}

// The base is the mean of the first batch's keys; with promotion it stays 0, so that norms are those of the keys.
static void base_fix(struct index *index)
{
    const struct batch *batch = index->batch;
    const uint32_t dim = index->head_dim;
    memset(index->base, 0, sizeof index->base);
    if (index->policy == INDEX_PROMOTION || batch->item_count == 0) {
        return;
    }
    for (uint32_t i = 0; i < batch->item_count; i++) {
        index->kernel->add(index->base, dci_item_key(index, i), dim);
    }
    for (uint32_t i = 0; i < dim; i++) {
        index->base[i] /= (float)batch->item_count;
    }
}

static void load_item(struct index *index, struct dci_work *work)
{
    struct batch *batch = index->batch;
    const uint32_t position = batch->begin + batch->cursor++;
    const struct index_place place = dci_place_of(index, position);
    if (place.page != TREE_NONE) {
        while (batch->need.items[batch->tail_page] != place.page) {
            batch->tail_page++;
        }
        const unsigned char *first = batch->rows[batch->tail_page];
        item_add(index, position, first + place.row * batch->rows_stride);
        const float *key = dci_item_key(index, batch->item_count - 1);
        const float norm2 = index->kernel->dot(key, key, index->head_dim);
        if (norm2 > index->tree_norm2_max) {
            index->tree_norm2_max = norm2;
        }
    }
    dci_work_spend(work, index, 4);
    if (batch->begin + batch->cursor == batch->end) {
        if (index->root == TREE_NONE) {
            base_fix(index);
        }
        enter(batch, BATCH_ROUTE);
    }
}

static void load_source(struct index *index, struct dci_work *work)
{
    struct batch *batch = index->batch;
    const struct node *cell = dci_node(index, batch->source);
    for (uint32_t part = 0; batch->dissolves && part < cell->part_count; part++) {
        for (uint32_t row = 0; row < index->page_tokens; row++) {
            const struct dci_rows *rows = dci_rows_of(index, cell, part, row);
            if (rows->positions[row % DCI_LANES] != TREE_NONE) {
                item_add(index, rows->positions[row % DCI_LANES],
                         (const unsigned char *)batch->rows[part] + row * batch->rows_stride);
                dci_work_spend(work, index, 4);
            }
        }
    }
    enter(batch, BATCH_ROUTE);
}

// ---- routing and grouping ----

static void route_item(struct index *index, struct dci_work *work)
{
    struct batch *batch = index->batch;
    const uint32_t item = batch->cursor++, avoid = batch->dissolves ? batch->source : TREE_NONE;
    batch->cells[item] = dci_route(index, dci_item_key(index, item), avoid, work);
    batch->order[item] = item;
}

static void hit_add(struct index *index, uint32_t cell, uint32_t first, uint32_t count)
{
    struct batch *batch = index->batch;
    batch->hits[batch->hit_count++] = (struct hit){
        .cell = cell,
        .first = first,
        .count = count,
        .divides = cell == TREE_NONE || dci_node(index, cell)->count + count > index->cell_max,
    };
}

// Items by cell, in each cell by position: a merge sort of `order`.
static bool group(struct index *index, struct dci_work *work)
{
    struct batch *batch = index->batch;
    const uint32_t n = batch->item_count;
    uint32_t *from = batch->order, *to = dci_memory_acquire(&index->memory, (n + 1) * sizeof *to);
    if (to == NULL) {
        return false;
    }
    uint32_t *const spare = to;
    for (uint32_t width = 1; width < n; width *= 2) {
        for (uint32_t low = 0; low < n; low += 2 * width) {
            const uint32_t middle = low + width < n ? low + width : n, high = low + 2 * width < n ? low + 2 * width : n;
            for (uint32_t i = low, a = low, b = middle; i < high; i++) {
                const bool left = b == high || (a < middle && batch->cells[from[a]] <= batch->cells[from[b]]);
                to[i] = left ? from[a++] : from[b++];
            }
        }
        uint32_t *swapped = from;
        from = to;
        to = swapped;
    }
    if (from != batch->order) {
        memcpy(batch->order, from, n * sizeof *from);
    }
    release(index, spare, (n + 1) * sizeof *spare);
    for (uint32_t i = 0, first = 0; i < n; i++) {
        if (i + 1 == n || batch->cells[batch->order[i + 1]] != batch->cells[batch->order[i]]) {
            hit_add(index, batch->cells[batch->order[i]], first, i + 1 - first);
            first = i + 1;
        }
    }
    if (batch->source != TREE_NONE && !batch->dissolves) {
        hit_add(index, batch->source, 0, 0);
        batch->hits[batch->hit_count - 1].divides = true;
    }
    work->left -= (int64_t)n * STEP_ELEMENTS;
    return true;
}

static bool members_reserve(struct index *index, uint32_t room)
{
    struct batch *batch = index->batch;
    batch->member_room = room;
    return acquire(index, &batch->member_positions, room * sizeof batch->member_positions[0]) &&
           acquire(index, &batch->member_order, room * sizeof batch->member_order[0]) &&
           acquire(index, &batch->vectors, room * sizeof batch->vectors[0]) &&
           acquire(index, &batch->values, room * sizeof batch->values[0]) &&
           acquire(index, &batch->coded.codes, (size_t)room * index->head_dim) &&
           acquire(index, &batch->coded.norms2, room * sizeof batch->coded.norms2[0]) &&
           acquire(index, &batch->members, (size_t)room * index->head_dim * sizeof batch->members[0]);
}

// Names the pages of the cells that will be divided, and makes room for the moves.
static bool need(struct index *index)
{
    struct batch *batch = index->batch;
    uint32_t largest = 0, moves = 0;
    for (uint32_t i = 0; i < batch->hit_count; i++) {
        struct hit *hit = &batch->hits[i];
        const uint32_t count = hit->cell == TREE_NONE ? 0 : dci_node(index, hit->cell)->count;
        moves += hit->count + (hit->divides ? count : 0);
        if (!hit->divides) {
            continue;
        }
        largest = count + hit->count > largest ? count + hit->count : largest;
        hit->need = batch->need.count;
        if (hit->cell == batch->source) { // packed anew: its rows are here
            hit->need = 0;
        } else if (hit->cell != TREE_NONE && !need_pages(index, dci_node(index, hit->cell))) {
            return false;
        }
    }
    if (!acquire(index, &batch->moves, (moves + 1) * sizeof batch->moves[0])) {
        return false;
    }
    batch->move_room = moves + 1;
    return largest == 0 || members_reserve(index, largest);
}

// ---- the plan ----

static bool release_cell(struct index *index, uint32_t cell)
{
    const struct node *node = dci_node(index, cell);
    for (uint32_t part = 0; part < node->part_count; part++) {
        if (!dci_list_push(&index->batch->released_pages, &index->memory, node->parts[part])) {
            return false;
        }
    }
    return true;
}

// How many entries may find the node that they go to full: those of nodes that are nearly so.
static uint32_t divisions_max(const struct index *index)
{
    const struct batch *batch = index->batch;
    uint32_t count = 0;
    for (uint32_t i = 0; i < batch->hit_count; i++) {
        const struct hit *hit = &batch->hits[i];
        const uint32_t entries =
            hit->cell == TREE_NONE ? 0 : dci_node(index, dci_node(index, hit->cell)->parent)->count;
        count += hit->divides && entries + batch->draft_count > index->node_max ? hit->draft_count : 0;
    }
    return count;
}

static bool settle(struct index *index)
{
    struct batch *batch = index->batch;
    for (uint32_t i = 0; i < batch->hit_count; i++) {
        if (batch->hits[i].divides && batch->hits[i].cell != TREE_NONE && !release_cell(index, batch->hits[i].cell)) {
            return false;
        }
    }
    if (batch->dissolves && !release_cell(index, batch->source)) {
        return false;
    }
    uint32_t last = TREE_NONE;
    for (uint32_t position = batch->begin; batch->source == TREE_NONE && position < batch->end; position++) {
        const uint32_t page = dci_place_of(index, position).page;
        if (page != TREE_NONE && page != last) {
            last = page;
            if (!dci_list_push(&batch->released_pages, &index->memory, page)) {
                return false;
            }
        }
    }
    return dci_nodes_reserve(index, batch->draft_count, divisions_max(index));
}

// One step of a hit. A division costs about eight looks at each of the members that the step is about.
static bool cells_step(struct index *index, struct dci_work *work)
{
    struct batch *batch = index->batch;
    struct hit *hit = &batch->hits[batch->cursor];
    const uint32_t members = batch->segment_count > 0 ? batch->segments[batch->segment_count - 1].count
                             : hit->divides           ? index->cell_max
                                                      : hit->count;
    bool done;
    dci_work_spend(work, index, MEMBER_VECTORS * (uint64_t)members);
    if (!dci_hit_work(index, hit, &done)) {
        return false;
    }
    batch->cursor += done ? 1 : 0;
    return true;
}

static bool step(struct index *index, struct dci_work *work, enum dci_progress *progress)
{
    struct batch *batch = index->batch;
    bool found = false;
    switch (batch->phase) {
    case BATCH_SOURCE:
        if (batch->cursor >= index->nodes.bound) {
            index->ragged = false;
            *progress = PROGRESS_IDLE;
            return true;
        }
        work->left -= STEP_ELEMENTS;
        if (!source_item(index, &found)) {
            return false;
        }
        if (found) {
            enter(batch, BATCH_LOAD);
            *progress = PROGRESS_ROWS;
        }
        return !found || rows_reserve(index);
    case BATCH_TAIL:
        enter(batch, BATCH_LOAD);
        if (!need_tail(index)) {
            return false;
        }
        *progress = batch->need.count > 0 ? PROGRESS_ROWS : PROGRESS_MORE;
        return true;
    case BATCH_LOAD:
        if (batch->source != TREE_NONE) {
            load_source(index, work);
        } else {
            load_item(index, work);
        }
        return true;
    case BATCH_ROUTE:
        if (batch->cursor < batch->item_count) {
            route_item(index, work);
        } else {
            enter(batch, BATCH_HITS);
        }
        return true;
    case BATCH_HITS:
        enter(batch, BATCH_NEED);
        return group(index, work);
    case BATCH_NEED:
        enter(batch, BATCH_CELLS);
        if (!need(index)) {
            return false;
        }
        if (batch->need.count == batch->rows_given) {
            return true;
        }
        *progress = PROGRESS_ROWS;
        return rows_reserve(index);
    case BATCH_CELLS:
        if (batch->cursor == batch->hit_count) {
            enter(batch, BATCH_SETTLE);
            return true;
        }
        return cells_step(index, work);
    case BATCH_SETTLE:
        enter(batch, BATCH_DONE);
        return settle(index);
    default:
        *progress = PROGRESS_PLAN;
        return true;
    }
}

enum dci_progress dci_batch_step(struct index *index, struct dci_work *work)
{
    enum dci_progress progress = PROGRESS_MORE;
    while (work->left > 0 && progress == PROGRESS_MORE) {
        if (!step(index, work, &progress)) {
            return PROGRESS_NO_MEMORY;
        }
    }
    return progress;
}

static void free_arrays(struct index *index)
{
    struct batch *batch = index->batch;
    const size_t items = batch->item_room, members = batch->member_room;
    release(index, batch->positions, items * sizeof batch->positions[0]);
    release(index, batch->cells, items * sizeof batch->cells[0]);
    release(index, batch->order, items * sizeof batch->order[0]);
    release(index, batch->keys, items * index->head_dim * sizeof batch->keys[0]);
    release(index, batch->codes, items * index->code_bytes);
    release(index, batch->spots, items * sizeof batch->spots[0]);
    release(index, batch->hits, (items + 1) * sizeof batch->hits[0]);
    release(index, batch->scratch, dci_scratch_bytes(index));
    release(index, batch->member_positions, members * sizeof batch->member_positions[0]);
    release(index, batch->member_order, members * sizeof batch->member_order[0]);
    release(index, batch->vectors, members * sizeof batch->vectors[0]);
    release(index, batch->values, members * sizeof batch->values[0]);
    release(index, batch->coded.codes, members * index->head_dim);
    release(index, batch->coded.norms2, members * sizeof batch->coded.norms2[0]);
    release(index, batch->members, members * index->head_dim * sizeof batch->members[0]);
    release(index, batch->moves, batch->move_room * sizeof batch->moves[0]);
    release(index, batch->rows, batch->rows_room * sizeof batch->rows[0]);
    dci_list_fini(&batch->need, &index->memory);
    dci_list_fini(&batch->new_pages, &index->memory);
    dci_list_fini(&batch->released_pages, &index->memory);
    dci_store_fini(&batch->drafts, &index->memory);
}

void dci_batch_discard(struct index *index)
{
    struct batch *batch = index->batch;
    if (batch == NULL) {
        return;
    }
    // In reverse order, so that the lists of free ids are as if the batch had never been.
    for (uint32_t i = batch->new_pages.count; i > 0; i--) {
        dci_page_release(index, batch->new_pages.items[i - 1]);
    }
    for (uint32_t i = batch->hit_count; i > 0; i--) {
        dci_hit_discard(index, &batch->hits[i - 1]);
    }
    index->tree_norm2_max = batch->norm2_max;
    dci_slab_trim(&index->nodes, &index->memory);
    dci_slab_trim(&index->cell_blocks, &index->memory);
    dci_slab_trim(&index->node_blocks, &index->memory);
    free_arrays(index);
    release(index, batch, sizeof *batch);
    index->batch = NULL;
}
