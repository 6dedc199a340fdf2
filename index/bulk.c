// The bulk build: a whole new tree over the first `boundary` tokens, beside the one that is searched meanwhile.
//
// Top-down construction of the method: nodes of every level from the promotion rule, highest level first; each node and
// then each token is hung under its nearest node of the level above in T_K space; the tokens of a level-1 node (its
// cell) are cut into pages. The new pages' places go to the column of the token table that is not in use, so that the
// commit is a swap of tree and column. One phase after the other, each resumable at any item.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

#define STEP_ELEMENTS 4 // cost of an item that only touches numbers

enum phase {
    PHASE_NORMS,    // c
    PHASE_NODES,    // nodes of a level and their parents, from the top down
    PHASE_CELLS,    // each token's level-1 node
    PHASE_STARTS,   // where each cell begins in `order`
    PHASE_ORDER,    // tokens by cell
    PHASE_CUT,      // cells into pages
    PHASE_SUMMARY,  // means and radii, from level 1 up
    PHASE_SKETCHES, // sketches of the pages
    PHASE_OLD_TREE, // pages to release: the old tree's
    PHASE_OLD_TAIL, // and the open ones
    PHASE_DONE,
};

struct bulk {
    uint32_t boundary;
    enum phase phase;
    uint32_t level, cursor;
    struct tree *tree;
    void *cell_block;  // boundary numbers: the cell of each token, later the scratch of the cuts
    uint32_t *order;   // boundary tokens, by cell
    uint32_t *ends;    // per level-1 node: where its cell ends in `order` (while filling: how far it is filled)
    uint32_t end_room; // of ends
    uint32_t page_need;
    bool cutting;
    struct dci_cut cut;
};

static bool acquire_all(struct index *index, struct bulk *bulk)
{
    struct dci_memory *memory = &index->memory;
    bulk->tree = dci_tree_create(index, bulk->boundary);
    if (bulk->tree == NULL) {
        return false;
    }
    for (uint32_t level = 1; level <= bulk->tree->top; level++) {
        const uint32_t count = dci_level_count(index, level, bulk->boundary);
        if (!dci_store_reserve(&bulk->tree->levels[level].nodes, memory, count)) {
            return false;
        }
    }
    bulk->end_room = dci_level_count(index, 1, bulk->boundary);
    bulk->cell_block = dci_memory_acquire(memory, bulk->boundary * sizeof(uint32_t));
    bulk->order = dci_memory_acquire(memory, bulk->boundary * sizeof bulk->order[0]);
    bulk->ends = dci_memory_acquire(memory, bulk->end_room * sizeof bulk->ends[0]);
    struct build *build = &index->build;
    build->moves = dci_memory_acquire(memory, bulk->boundary * sizeof build->moves[0]);
    build->move_room = build->moves == NULL ? 0 : bulk->boundary;
    const uint32_t old_tokens = index->tree == NULL ? 0 : index->tree->tokens;
    const uint32_t released =
        (index->tree == NULL ? 0 : index->tree->pages) + (bulk->boundary - old_tokens) / index->page_tokens;
    return bulk->cell_block != NULL && bulk->order != NULL && bulk->ends != NULL && build->moves != NULL &&
           dci_list_reserve(&build->released_pages, memory, released);
}

bool dci_bulk_begin(struct index *index, uint32_t boundary)
{
    struct bulk *bulk = dci_memory_acquire(&index->memory, sizeof *bulk);
    if (bulk == NULL) {
        return false;
    }
    memset(bulk, 0, sizeof *bulk);
    bulk->boundary = boundary;
    index->build.bulk = bulk;
    if (!acquire_all(index, bulk)) {
        return false;
    }
    bulk->tree->tokens = bulk->tree->bulk_tokens = boundary;
    bulk->level = bulk->tree->top;
    return true;
}

static void enter(struct bulk *bulk, enum phase phase)
{
    bulk->phase = phase;
    bulk->cursor = 0;
}

static struct dci_probe probe_of(const struct bulk *bulk, const float *key, float norm2, uint32_t position)
{
    const float norm2_max = bulk->tree->norm2_max;
    return (struct dci_probe){key, dci_slack(norm2, norm2_max), norm2_max, position};
}

static void norms_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    const float norm2 = dci_token(index, bulk->cursor)->norm2;
    if (norm2 > bulk->tree->norm2_max) {
        bulk->tree->norm2_max = norm2;
    }
    work->left -= STEP_ELEMENTS;
    if (++bulk->cursor == bulk->boundary) {
        enter(bulk, PHASE_NODES);
    }
}

static void nodes_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    struct tree *tree = bulk->tree;
    const uint32_t level = bulk->level, number = bulk->cursor;
    dci_node_init(index, tree, level, number);
    if (level < tree->top) {
        uint32_t parent = dci_level_promoted(index, level, number);
        if (parent == TREE_NONE) {
            const struct node *node = dci_node(tree, level, number);
            const struct dci_probe probe = probe_of(bulk, node->vectors, node->norm2, node->token);
            struct dci_near nearest;
            dci_tree_nearest(index, tree, level + 1, &probe, &nearest, 1, work);
            parent = nearest.node;
        }
        dci_node_link(tree, level, number, parent);
    }
    dci_work_spend(work, index, 1);
    tree->levels[level].count++;
    if (++bulk->cursor == dci_level_count(index, level, bulk->boundary)) {
        bulk->cursor = 0;
        if (--bulk->level == 0) {
            enter(bulk, PHASE_CELLS);
        }
    }
}

static void cells_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    const uint32_t position = bulk->cursor;
    uint32_t cell = dci_level_promoted(index, 0, position);
    if (cell == TREE_NONE) {
        float key[INDEX_HEAD_DIM_MAX];
        dci_key_widen(index, position, key);
        const struct dci_probe probe = probe_of(bulk, key, dci_token(index, position)->norm2, position);
        struct dci_near nearest;
        dci_tree_nearest(index, bulk->tree, 1, &probe, &nearest, 1, work);
        cell = nearest.node;
    }
    ((uint32_t *)bulk->cell_block)[position] = cell;
    dci_node(bulk->tree, 1, cell)->weight++;
    work->left -= STEP_ELEMENTS;
    if (++bulk->cursor == bulk->boundary) {
        enter(bulk, PHASE_STARTS);
    }
}

static bool starts_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    const uint32_t cell = bulk->cursor;
    if (cell == 0) {
        bulk->ends[0] = 0;
    }
    const uint32_t weight = dci_node(bulk->tree, 1, cell)->weight;
    if (cell + 1 < bulk->end_room) {
        bulk->ends[cell + 1] = bulk->ends[cell] + weight;
    }
    bulk->page_need += (weight + index->page_tokens - 1) / index->page_tokens;
    work->left -= STEP_ELEMENTS;
    if (++bulk->cursor < bulk->end_room) {
        return true;
    }
    enter(bulk, PHASE_ORDER);
    return dci_sketch_reserve(index, bulk->tree, bulk->page_need) &&
           dci_list_reserve(&index->build.new_pages, &index->memory, bulk->page_need);
}

static void order_item(struct bulk *bulk, struct dci_work *work)
{
    const uint32_t cell = ((const uint32_t *)bulk->cell_block)[bulk->cursor];
    bulk->order[bulk->ends[cell]++] = bulk->cursor;
    work->left -= STEP_ELEMENTS;
    if (++bulk->cursor == bulk->boundary) {
        enter(bulk, PHASE_CUT);
    }
}

static bool make_page(struct index *index, struct bulk *bulk, const struct dci_segment *segment)
{
    struct build *build = &index->build;
    uint32_t id;
    if (!dci_page_acquire(index, PAGE_PLANNED, &id)) {
        return false;
    }
    assert(build->new_pages.count < build->new_pages.room);
    build->new_pages.items[build->new_pages.count++] = id;
    struct page *page = dci_page(index, id);
    struct tree *tree = bulk->tree;
    page->rows = segment->end - segment->begin;
    tree->digest = dci_mix(tree->digest ^ bulk->cursor);
    for (uint32_t r = 0; r < page->rows; r++) {
        const uint32_t position = bulk->order[segment->begin + r];
        struct token *token = dci_token(index, position);
        const uint32_t now = index->column, then = 1 - index->column;
        page->tokens[r] = position;
        token->page[then] = id;
        token->row[then] = (uint8_t)r;
        build->moves[build->move_count++] =
            (struct index_move){.from = {token->page[now], token->row[now]}, .to = {id, r}};
        tree->digest = dci_mix(tree->digest ^ position);
    }
    dci_keys_summary(index, page->tokens, page->rows, dci_page_mean(index, page), &page->radius, &page->farthest);
    dci_page_link(index, tree, id, bulk->cursor);
    tree->pages++;
    return true;
}

static bool cut_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    const uint32_t cell = bulk->cursor;
    if (!bulk->cutting) {
        const uint32_t begin = cell == 0 ? 0 : bulk->ends[cell - 1];
        dci_cut_init(&bulk->cut, index, bulk->order, bulk->cell_block, begin, bulk->ends[cell]);
        bulk->cutting = true;
    }
    struct dci_segment segment;
    switch (dci_cut_step(&bulk->cut, index, work, &segment)) {
    case CUT_PAGE:
        dci_work_spend(work, index, 2 * (uint64_t)(segment.end - segment.begin));
        return make_page(index, bulk, &segment);
    case CUT_DONE:
        bulk->cutting = false;
        if (++bulk->cursor == bulk->end_room) {
            enter(bulk, PHASE_SUMMARY);
            bulk->level = 1;
        }
        return true;
    default:
        return true;
    }
}

static void summary_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    dci_node_summarise(index, bulk->tree, bulk->level, bulk->cursor);
    dci_work_spend(work, index, 2 * (uint64_t)index->fanout);
    if (++bulk->cursor < bulk->tree->levels[bulk->level].count) {
        return;
    }
    bulk->cursor = 0;
    if (++bulk->level > bulk->tree->top) {
        enter(bulk, PHASE_SKETCHES);
    }
}

static void sketches_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    struct tree *tree = bulk->tree;
    if (bulk->cursor == 0) {
        dci_sketch_base(index, tree);
        dci_work_spend(work, index, tree->levels[tree->top].count);
    }
    dci_sketch_write(index, tree, bulk->cursor, index->build.new_pages.items[bulk->cursor]);
    dci_work_spend(work, index, 4);
    if (++bulk->cursor == tree->pages) {
        dci_sketch_clear_from(index, tree, tree->pages);
        enter(bulk, PHASE_OLD_TREE);
    }
}

static void old_tree_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    struct dci_list *released = &index->build.released_pages;
    if (index->tree == NULL || bulk->cursor == index->tree->levels[1].count) {
        enter(bulk, PHASE_OLD_TAIL);
        bulk->cursor = index->tree == NULL ? 0 : index->tree->tokens;
        return;
    }
    uint32_t id = dci_node(index->tree, 1, bulk->cursor)->first;
    for (; id != TREE_NONE; id = dci_page(index, id)->next) {
        released->items[released->count++] = id;
        work->left -= STEP_ELEMENTS;
    }
    bulk->cursor++;
}

static void old_tail_item(struct index *index, struct bulk *bulk, struct dci_work *work)
{
    struct dci_list *released = &index->build.released_pages;
    released->items[released->count++] = dci_token(index, bulk->cursor)->page[index->column];
    work->left -= STEP_ELEMENTS;
    bulk->cursor += index->page_tokens;
    if (bulk->cursor >= bulk->boundary) {
        assert(released->count <= released->room);
        enter(bulk, PHASE_DONE);
    }
}

enum dci_progress dci_bulk_step(struct index *index, struct dci_work *work)
{
    struct bulk *bulk = index->build.bulk;
    bool granted = true;
    while (work->left > 0 && granted && bulk->phase != PHASE_DONE) {
        switch (bulk->phase) {
        case PHASE_NORMS:
            norms_item(index, bulk, work);
            break;
        case PHASE_NODES:
            nodes_item(index, bulk, work);
            break;
        case PHASE_CELLS:
            cells_item(index, bulk, work);
            break;
        case PHASE_STARTS:
            granted = starts_item(index, bulk, work);
            break;
        case PHASE_ORDER:
            order_item(bulk, work);
            break;
        case PHASE_CUT:
            granted = cut_item(index, bulk, work);
            break;
        case PHASE_SUMMARY:
            summary_item(index, bulk, work);
            break;
        case PHASE_SKETCHES:
            sketches_item(index, bulk, work);
            break;
        case PHASE_OLD_TREE:
            old_tree_item(index, bulk, work);
            break;
        case PHASE_OLD_TAIL:
            old_tail_item(index, bulk, work);
            break;
        case PHASE_DONE:
            break;
        }
    }
    if (!granted) {
        return PROGRESS_NO_MEMORY;
    }
    return bulk->phase == PHASE_DONE ? PROGRESS_PLAN : PROGRESS_MORE;
}

void dci_bulk_commit(struct index *index)
{
    struct bulk *bulk = index->build.bulk;
    struct tree *old = index->tree;
    index->tree = bulk->tree;
    index->column = 1 - index->column;
    bulk->tree = NULL;
    dci_tree_destroy(index, old);
    dci_bulk_discard(index);
}

void dci_bulk_discard(struct index *index)
{
    struct build *build = &index->build;
    struct bulk *bulk = build->bulk;
    if (bulk == NULL) {
        return;
    }
    if (bulk->tree != NULL) { // not committed
        for (uint32_t i = build->new_pages.count; i > 0; i--) {
            dci_page_release(index, build->new_pages.items[i - 1]);
        }
        dci_tree_destroy(index, bulk->tree);
    }
    dci_memory_release(&index->memory, bulk->cell_block, bulk->boundary * sizeof(uint32_t));
    dci_memory_release(&index->memory, bulk->order, bulk->boundary * sizeof bulk->order[0]);
    dci_memory_release(&index->memory, bulk->ends, bulk->end_room * sizeof bulk->ends[0]);
    dci_memory_release(&index->memory, bulk, sizeof *bulk);
    build->bulk = NULL;
}
