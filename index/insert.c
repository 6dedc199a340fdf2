// Insertion of one batch of tokens into the live tree, as a plan.
//
// Every decision is taken on drafts (of pages), on nodes behind the levels' counts and on a list of re-hung nodes; the
// commit writes them into the tree. Promotion follows the same rule as in the bulk build. A new node of level l looks
// for its parent among the nodes of level l + 1, then takes over the children of its nearest neighbours that are nearer
// to it; so the tree keeps its shape as it grows. Other tokens go to the cell of their nearest level-1 node.
// c is the largest norm up to and including the batch; parents chosen under a smaller c are not chosen again.
// Thread ownership: the index's.
#include "index/insert.h"

#include <string.h>

#define DRAFTS_SHIFT 3u

static bool reserve_nodes(struct index *index, struct insert *insert)
{
    struct tree *tree = index->tree;
    for (uint32_t level = 1; level <= tree->top; level++) {
        insert->node_ends[level] = dci_level_count(index, level, insert->end);
        if (!dci_store_reserve(&tree->levels[level].nodes, &index->memory, insert->node_ends[level])) {
            return false;
        }
    }
    return true;
}

// Goes on to the next level that gets new nodes, or to the tokens.
static void skip_levels(const struct index *index, struct insert *insert)
{
    while (insert->level >= 1 && insert->cursor == insert->node_ends[insert->level]) {
        insert->level--;
        insert->cursor = insert->level >= 1 ? index->tree->levels[insert->level].count : 0;
    }
    if (insert->level == 0) {
        insert->phase = INSERT_TOKENS;
        insert->cursor = insert->first;
    }
}

bool dci_insert_begin(struct index *index, uint32_t batch)
{
    struct insert *insert = dci_memory_acquire(&index->memory, sizeof *insert);
    if (insert == NULL) {
        return false;
    }
    const struct tree *tree = index->tree;
    memset(insert, 0, sizeof *insert);
    index->build.insert = insert;
    insert->first = tree->tokens;
    insert->end = tree->tokens + batch;
    insert->level = tree->top;
    insert->cursor = tree->levels[tree->top].count;
    insert->digest = tree->digest;
    insert->norm2_max = tree->norm2_max;
    for (uint32_t p = insert->first; p < insert->end; p++) {
        const float norm2 = dci_token(index, p)->norm2;
        insert->norm2_max = norm2 > insert->norm2_max ? norm2 : insert->norm2_max;
    }
    insert->mean_offset = sizeof(struct draft) + index->page_tokens * sizeof(uint32_t);
    dci_store_init(&insert->drafts, insert->mean_offset + index->head_dim * sizeof(float), DRAFTS_SHIFT);
    if (!reserve_nodes(index, insert)) {
        return false;
    }
    skip_levels(index, insert);
    return true;
}

static struct dci_probe probe_of(const struct insert *insert, const float *key, float norm2, uint32_t position)
{
    return (struct dci_probe){key, dci_slack(norm2, insert->norm2_max), insert->norm2_max, position};
}

// The nearest nodes of a level, live ones and the batch's own below `end`.
static uint32_t nearest(const struct index *index, uint32_t level, uint32_t end, const struct dci_probe *probe,
                        struct dci_near *list, uint32_t room, struct dci_work *work)
{
    uint32_t count = dci_tree_nearest(index, index->tree, level, probe, list, room, work);
    for (uint32_t i = index->tree->levels[level].count; i < end; i++) {
        dci_near_add(list, &count, room, index, index->tree, level, i, probe);
        dci_work_spend(work, index, 1);
    }
    return count;
}

static float affinity_to(const struct index *index, const struct insert *insert, uint32_t level, uint32_t number,
                         const float *key, float norm2)
{
    const struct node *node = dci_node(index->tree, level, number);
    return dci_affinity(index->kernel->dot(key, node->vectors, index->head_dim), dci_slack(norm2, insert->norm2_max),
                        dci_slack(node->norm2, insert->norm2_max));
}

static uint32_t parent_now(const struct tree *tree, const struct insert *insert, uint32_t level, uint32_t number)
{
    for (uint32_t i = insert->relinks.count; i > 0; i -= 3) {
        const uint32_t *relink = &insert->relinks.items[i - 3];
        if (relink[0] == level && relink[1] == number) {
            return relink[2];
        }
    }
    return dci_node(tree, level, number)->parent;
}

// A new node of level >= 2 takes over nodes of the level below.
static bool adopt_nodes(struct index *index, struct insert *insert, const struct dci_near *near, uint32_t near_count,
                        struct dci_work *work)
{
    struct dci_memory *memory = &index->memory;
    const uint32_t below = insert->level - 1;
    for (uint32_t i = 0; i < near_count; i++) {
        uint32_t c = dci_node(index->tree, insert->level, near[i].node)->first;
        for (const struct node *child; c != TREE_NONE; c = child->next) {
            child = dci_node(index->tree, below, c);
            if (dci_level_promoted(index, below, c) != TREE_NONE) {
                continue; // its own parent
            }
            const uint32_t parent = parent_now(index->tree, insert, below, c);
            dci_work_spend(work, index, 2);
            if (affinity_to(index, insert, insert->level, insert->cursor, child->vectors, child->norm2) <=
                affinity_to(index, insert, insert->level, parent, child->vectors, child->norm2)) {
                continue;
            }
            if (!dci_list_push(&insert->relinks, memory, below) || !dci_list_push(&insert->relinks, memory, c) ||
                !dci_list_push(&insert->relinks, memory, insert->cursor)) {
                return false;
            }
        }
    }
    return true;
}

static void next_node(struct index *index, struct insert *insert)
{
    insert->cursor++;
    insert->phase = INSERT_NODES;
    skip_levels(index, insert);
}

// One new node: its parent, and what it may take over.
static bool nodes_item(struct index *index, struct insert *insert, struct dci_work *work)
{
    const uint32_t level = insert->level, number = insert->cursor;
    struct tree *tree = index->tree;
    dci_node_init(index, tree, level, number);
    struct node *node = dci_node(tree, level, number);
    const struct dci_probe probe = probe_of(insert, node->vectors, node->norm2, node->token);
    struct dci_near near[INSERT_ADOPT_CELLS];
    if (level < tree->top) {
        node->parent = dci_level_promoted(index, level, number);
        if (node->parent == TREE_NONE) {
            nearest(index, level + 1, insert->node_ends[level + 1], &probe, near, 1, work);
            node->parent = near[0].node;
        }
    }
    const uint32_t near_count = nearest(index, level, number, &probe, near, INSERT_ADOPT_CELLS, work);
    if (level > 1) {
        const bool granted = adopt_nodes(index, insert, near, near_count, work);
        next_node(index, insert);
        return granted;
    }
    insert->phase = INSERT_ADOPT;
    insert->pages.count = insert->taken.count = insert->page_cursor = 0;
    for (uint32_t i = 0; i < near_count; i++) {
        if (!dci_draft_cell_pages(index, near[i].node)) {
            return false;
        }
    }
    return true;
}

// A new cell takes over the tokens of one page that are nearer to it than to their pivot.
static bool adopt_item(struct index *index, struct insert *insert, struct dci_work *work)
{
    if (insert->page_cursor == insert->pages.count) {
        const uint32_t pivot = dci_node(index->tree, 1, insert->cursor)->token;
        if (!dci_list_push(&insert->taken, &index->memory, pivot) ||
            !dci_list_reserve(&insert->projection, &index->memory, insert->taken.count)) {
            return false;
        }
        dci_cut_init(&insert->cut, index, insert->taken.items, (float *)(void *)insert->projection.items, 0,
                     insert->taken.count);
        insert->phase = INSERT_CUT;
        return true;
    }
    const uint32_t id = insert->pages.items[insert->page_cursor++];
    const struct page *page = dci_page(index, id);
    const uint32_t cell = page->draft == 0 ? page->owner : dci_draft(insert, page->draft - 1)->cell;
    const uint32_t pivot = dci_node(index->tree, 1, cell)->token;
    float key[INDEX_HEAD_DIM_MAX];
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        const uint32_t token = dci_draft_tokens(index, id)[r];
        if (token == TREE_NONE || token == pivot) {
            continue;
        }
        const float norm2 = dci_token(index, token)->norm2;
        dci_key_widen(index, token, key);
        dci_work_spend(work, index, 2);
        if (affinity_to(index, insert, 1, insert->cursor, key, norm2) <=
            affinity_to(index, insert, 1, cell, key, norm2)) {
            continue;
        }
        struct draft *draft = dci_draft_open(index, id);
        if (draft == NULL || !dci_list_push(&insert->taken, &index->memory, token)) {
            return false;
        }
        dci_draft_remove(index, draft, token);
    }
    return true;
}

static bool cut_item(struct index *index, struct insert *insert, struct dci_work *work)
{
    struct dci_segment segment;
    const enum dci_cut_state state = dci_cut_step(&insert->cut, index, work, &segment);
    if (state == CUT_DONE) {
        next_node(index, insert);
    }
    if (state != CUT_PAGE) {
        return true;
    }
    struct draft *draft = dci_draft_fresh(index, insert->cursor);
    for (uint32_t i = segment.begin; draft != NULL && i < segment.end; i++) {
        dci_draft_put(index, draft, insert->taken.items[i]);
    }
    return draft != NULL;
}

static bool tokens_item(struct index *index, struct insert *insert, struct dci_work *work)
{
    if (insert->cursor == insert->end) {
        insert->phase = INSERT_FINISH;
        insert->cursor = 0;
        return true;
    }
    const uint32_t position = insert->cursor++;
    if (dci_level_promoted(index, 0, position) != TREE_NONE) {
        return true; // came with its own cell
    }
    float key[INDEX_HEAD_DIM_MAX];
    dci_key_widen(index, position, key);
    const struct dci_probe probe = probe_of(insert, key, dci_token(index, position)->norm2, position);
    struct dci_near near;
    nearest(index, 1, insert->node_ends[1], &probe, &near, 1, work);
    return dci_draft_place(index, near.node, position, key, work);
}

static bool reserve_plan(struct index *index, struct insert *insert)
{
    struct build *build = &index->build;
    const uint32_t rows = insert->draft_count * index->page_tokens;
    const uint32_t blocks = (insert->end - insert->first) / index->page_tokens;
    uint32_t marks = insert->draft_count + insert->relinks.count / 3;
    for (uint32_t level = 1; level <= index->tree->top; level++) {
        marks += insert->node_ends[level] - index->tree->levels[level].count;
    }
    build->moves = dci_memory_acquire(&index->memory, rows * sizeof build->moves[0]);
    build->move_room = build->moves == NULL ? 0 : rows;
    return build->moves != NULL && dci_sketch_reserve(index, index->tree, index->tree->pages + insert->draft_count) &&
           dci_list_reserve(&build->new_pages, &index->memory, insert->draft_count) &&
           dci_list_reserve(&build->released_pages, &index->memory, insert->draft_count + blocks) &&
           dci_list_reserve(&insert->dirty, &index->memory, 2 * marks * index->tree->top);
}

// One draft's part of the plan; before the first of them, room for all.
static bool finish_item(struct index *index, struct insert *insert, struct dci_work *work)
{
    struct build *build = &index->build;
    if (insert->cursor == 0 && !reserve_plan(index, insert)) {
        return false;
    }
    if (insert->cursor == insert->draft_count) {
        for (uint32_t p = insert->first; p < insert->end; p += index->page_tokens) {
            build->released_pages.items[build->released_pages.count++] = dci_token(index, p)->page[index->column];
        }
        for (uint32_t i = 0; i < insert->relinks.count; i++) {
            insert->digest = dci_mix(insert->digest ^ insert->relinks.items[i]);
        }
        insert->phase = INSERT_DONE;
        return true;
    }
    struct draft *draft = dci_draft(insert, insert->cursor++);
    if (draft->rows == 0) {
        struct dci_list *list = draft->fresh ? &build->new_pages : &build->released_pages;
        if (draft->fresh) {
            dci_page_release(index, draft->page); // made and emptied by the same plan
            draft->page = TREE_NONE;
            return true;
        }
        list->items[list->count++] = draft->page;
        return true;
    }
    if (draft->fresh) {
        build->new_pages.items[build->new_pages.count++] = draft->page;
    }
    dci_draft_refresh(index, draft);
    dci_work_spend(work, index, 2 * (uint64_t)draft->rows);
    insert->digest = dci_mix(insert->digest ^ draft->cell);
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        insert->digest = dci_mix(insert->digest ^ draft->tokens[r]);
        if (draft->tokens[r] == TREE_NONE) {
            continue;
        }
        const struct token *token = dci_token(index, draft->tokens[r]);
        const struct index_place from = {token->page[index->column], token->row[index->column]};
        if (from.page != draft->page || from.row != r) {
            build->moves[build->move_count++] = (struct index_move){from, {draft->page, r}};
        }
    }
    return true;
}

enum dci_progress dci_insert_step(struct index *index, struct dci_work *work)
{
    struct insert *insert = index->build.insert;
    bool granted = true;
    while (work->left > 0 && granted && insert->phase != INSERT_DONE) {
        work->left -= 1;
        switch (insert->phase) {
        case INSERT_NODES:
            granted = nodes_item(index, insert, work);
            break;
        case INSERT_ADOPT:
            granted = adopt_item(index, insert, work);
            break;
        case INSERT_CUT:
            granted = cut_item(index, insert, work);
            break;
        case INSERT_TOKENS:
            granted = tokens_item(index, insert, work);
            break;
        case INSERT_FINISH:
            granted = finish_item(index, insert, work);
            break;
        case INSERT_DONE:
            break;
        }
    }
    if (!granted) {
        return PROGRESS_NO_MEMORY;
    }
    return insert->phase == INSERT_DONE ? PROGRESS_PLAN : PROGRESS_MORE;
}

static void mark(struct insert *insert, struct tree *tree, uint32_t level, uint32_t number)
{
    if (dci_node(tree, level, number)->marked) {
        return;
    }
    dci_node(tree, level, number)->marked = true;
    assert(insert->dirty.count + 2 <= insert->dirty.room);
    insert->dirty.items[insert->dirty.count++] = level;
    insert->dirty.items[insert->dirty.count++] = number;
}

static void commit_nodes(struct insert *insert, struct tree *tree)
{
    for (uint32_t level = tree->top; level >= 1; level--) {
        const uint32_t before = tree->levels[level].count;
        tree->levels[level].count = insert->node_ends[level];
        for (uint32_t number = before; number < insert->node_ends[level]; number++) {
            if (level < tree->top) {
                dci_node_link(tree, level, number, dci_node(tree, level, number)->parent);
            }
            mark(insert, tree, level, number);
        }
    }
    for (uint32_t i = 0; i < insert->relinks.count; i += 3) {
        const uint32_t level = insert->relinks.items[i], number = insert->relinks.items[i + 1];
        mark(insert, tree, level + 1, dci_node(tree, level, number)->parent);
        dci_node_unlink(tree, level, number);
        dci_node_link(tree, level, number, insert->relinks.items[i + 2]); // a new node, marked above
    }
}

static void commit_page(struct index *index, struct insert *insert, struct draft *draft)
{
    struct tree *tree = index->tree;
    struct page *page = dci_page(index, draft->page);
    page->draft = 0;
    mark(insert, tree, 1, draft->cell);
    if (draft->rows == 0) {
        dci_page_unlink(index, tree, draft->page);
        dci_sketch_remove(index, tree, draft->page, tree->pages);
        tree->pages--;
        return;
    }
    if (draft->fresh) {
        dci_page_link(index, tree, draft->page, draft->cell);
        page->slot = tree->pages++;
    }
    page->rows = draft->rows;
    page->radius = draft->radius;
    page->farthest = draft->farthest;
    memcpy(page->tokens, draft->tokens, index->page_tokens * sizeof page->tokens[0]);
    memcpy(dci_page_mean(index, page), dci_draft_mean(insert, draft), index->head_dim * sizeof(float));
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        if (page->tokens[r] != TREE_NONE) {
            struct token *token = dci_token(index, page->tokens[r]);
            token->page[index->column] = draft->page;
            token->row[index->column] = (uint8_t)r;
        }
    }
    dci_sketch_write(index, tree, page->slot, draft->page);
}

void dci_insert_commit(struct index *index)
{
    struct insert *insert = index->build.insert;
    struct tree *tree = index->tree;
    commit_nodes(insert, tree);
    for (uint32_t i = 0; i < insert->draft_count; i++) {
        struct draft *draft = dci_draft(insert, i);
        if (draft->page != TREE_NONE) {
            commit_page(index, insert, draft);
        }
    }
    dci_sketch_clear_from(index, tree, tree->pages);
    for (uint32_t level = 1; level <= tree->top; level++) {
        for (uint32_t i = 0; i < insert->dirty.count; i += 2) {
            if (insert->dirty.items[i] == level) {
                const uint32_t number = insert->dirty.items[i + 1];
                dci_node_summarise(index, tree, level, number);
                if (level < tree->top) {
                    mark(insert, tree, level + 1, dci_node(tree, level, number)->parent);
                }
            }
        }
    }
    tree->tokens = insert->end;
    tree->norm2_max = insert->norm2_max;
    tree->digest = insert->digest;
    insert->draft_count = 0;
    dci_insert_discard(index);
}

void dci_insert_discard(struct index *index)
{
    struct insert *insert = index->build.insert;
    if (insert == NULL) {
        return;
    }
    for (uint32_t i = insert->draft_count; i > 0; i--) {
        const struct draft *draft = dci_draft(insert, i - 1);
        if (draft->page == TREE_NONE) {
            continue;
        }
        if (draft->fresh) {
            dci_page_release(index, draft->page);
        } else {
            dci_page(index, draft->page)->draft = 0;
        }
    }
    dci_store_fini(&insert->drafts, &index->memory);
    dci_list_fini(&insert->relinks, &index->memory);
    dci_list_fini(&insert->pages, &index->memory);
    dci_list_fini(&insert->taken, &index->memory);
    dci_list_fini(&insert->projection, &index->memory);
    dci_list_fini(&insert->dirty, &index->memory);
    dci_memory_release(&index->memory, insert, sizeof *insert);
    index->build.insert = NULL;
}
