// The invariants of an index, walked in full.
//
// Slow and for tests; reads only. The first violation is written out and ends the walk. Thread ownership: the index's.
#include "index/tree.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct report {
    char *text;
    size_t capacity;
};

__attribute__((format(printf, 2, 3))) static bool wrong(const struct report *report, const char *format, ...)
{
    if (report->text != NULL && report->capacity > 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(report->text, report->capacity, format, arguments);
        va_end(arguments);
    }
    return false;
}

static bool check_tokens(const struct index *index, const struct report *report)
{
    const uint32_t indexed = (uint32_t)index_indexed(index);
    float key[INDEX_HEAD_DIM_MAX];
    if (indexed > index->length || indexed % index->page_tokens != 0) {
        return wrong(report, "indexed %u of %u tokens", indexed, index->length);
    }
    for (uint32_t p = 0; p < index->length; p++) {
        const struct token *token = dci_token(index, p);
        const uint32_t id = token->page[index->column], row = token->row[index->column];
        if (id >= index->page_bound || row >= index->page_tokens) {
            return wrong(report, "token %u lies in page %u row %u: out of range", p, id, row);
        }
        const struct page *page = dci_page(index, id);
        if (p < indexed ? page->state != PAGE_LEAF || page->tokens[row] != p
                        : page->state != PAGE_OPEN || page->owner + row != p) {
            return wrong(report, "token %u is not in row %u of page %u (state %d)", p, row, id, (int)page->state);
        }
        dci_key_widen(index, p, key);
        if (index->kernel->dot(key, key, index->head_dim) != token->norm2 || token->norm2 > index->norm2_max) {
            return wrong(report, "token %u has the wrong norm", p);
        }
        if (p < indexed && token->norm2 > index->tree->norm2_max) {
            return wrong(report, "token %u is longer than c", p);
        }
    }
    return true;
}

static bool check_leaf(const struct index *index, uint32_t id, const struct report *report)
{
    struct page *page = dci_page(index, id);
    float mean[INDEX_HEAD_DIM_MAX], radius, farthest;
    const uint32_t rows = dci_keys_summary(index, page->tokens, index->page_tokens, mean, &radius, &farthest);
    if (rows == 0 || rows != page->rows) {
        return wrong(report, "page %u holds %u tokens, says %u", id, rows, page->rows);
    }
    if (radius != page->radius || farthest != page->farthest ||
        memcmp(mean, dci_page_mean(index, page), index->head_dim * sizeof mean[0]) != 0) {
        return wrong(report, "page %u has a stale mean", id);
    }
    if (!dci_sketch_agrees(index, index->tree, id)) {
        return wrong(report, "page %u has a stale sketch in slot %u", id, page->slot);
    }
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        const uint32_t token = page->tokens[r];
        if (token != TREE_NONE && (token >= index->tree->tokens || dci_token(index, token)->page[index->column] != id ||
                                   dci_token(index, token)->row[index->column] != r)) {
            return wrong(report, "page %u row %u holds token %u, which lies elsewhere", id, r, token);
        }
    }
    return true;
}

// Every leaf has a slot of its own (its sketch names it); what is behind the last one counts for nothing.
static bool check_sketches(const struct index *index, const struct report *report)
{
    const uint32_t pages = index->tree->pages, blocks = dci_sketch_blocks(pages);
    for (uint32_t s = 0; s < blocks * SKETCH_LANES; s++) {
        const struct sketch *sketch = dci_sketch_at(index->tree, s / SKETCH_LANES);
        const uint32_t id = sketch->page[s % SKETCH_LANES];
        if (s >= pages) {
            if (id != TREE_NONE || sketch->rows[s % SKETCH_LANES] != 0 ||
                sketch->log_rows[s % SKETCH_LANES] != DCI_HIDDEN) {
                return wrong(report, "slot %u of %u pages is not cleared", s, pages);
            }
        } else if (id >= index->page_bound || dci_page(index, id)->state != PAGE_LEAF ||
                   dci_page(index, id)->slot != s) {
            return wrong(report, "slot %u holds page %u, which is not its", s, id);
        }
    }
    return true;
}

static bool check_pages(const struct index *index, const struct report *report)
{
    uint32_t states[PAGE_LEAF + 1] = {0}, free_pages = 0;
    for (uint32_t id = 0; id < index->page_bound; id++) {
        const struct page *page = dci_page(index, id);
        states[page->state]++;
        if (page->draft != 0 && index->build.kind != BUILD_INSERT) {
            return wrong(report, "page %u has a draft of no insertion", id);
        }
        if (page->state == PAGE_LEAF && !check_leaf(index, id, report)) {
            return false;
        }
    }
    for (uint32_t id = index->free_page; id != TREE_NONE; id = dci_page(index, id)->next) {
        if (dci_page(index, id)->state != PAGE_FREE || ++free_pages > states[PAGE_FREE]) {
            return wrong(report, "page %u is on the free list but not free", id);
        }
    }
    const uint32_t tail = index->length + index->prepared - (uint32_t)index_indexed(index);
    const uint32_t open = (tail + index->page_tokens - 1) / index->page_tokens;
    const uint32_t leaves = index->tree == NULL ? 0 : index->tree->pages;
    if (free_pages != states[PAGE_FREE] || states[PAGE_OPEN] != open || states[PAGE_LEAF] != leaves ||
        (index->build.kind == BUILD_NONE && states[PAGE_PLANNED] != 0)) {
        return wrong(report, "pages: %u free (%u listed), %u open (expected %u), %u leaves (expected %u), %u planned",
                     states[PAGE_FREE], free_pages, states[PAGE_OPEN], open, states[PAGE_LEAF], leaves,
                     states[PAGE_PLANNED]);
    }
    return true;
}

// Children of one node: they name it as their parent, and their weights add up.
static bool check_children(const struct index *index, uint32_t level, uint32_t number, uint64_t *children,
                           const struct report *report)
{
    const struct tree *tree = index->tree;
    const struct node *node = dci_node(tree, level, number);
    uint64_t weight = 0;
    for (uint32_t c = node->first; c != TREE_NONE; (*children)++) {
        const uint32_t bound = level == 1 ? index->page_bound : tree->levels[level - 1].count;
        if (c >= bound || *children > bound) {
            return wrong(report, "level %u node %u has child %u: out of range, or a loop", level, number, c);
        }
        const struct page *page = level == 1 ? dci_page(index, c) : NULL;
        const struct node *child = level == 1 ? NULL : dci_node(tree, level - 1, c);
        if (page != NULL ? page->state != PAGE_LEAF || page->owner != number : child->parent != number) {
            return wrong(report, "level %u node %u is not the parent its child %u names", level, number, c);
        }
        weight += page != NULL ? page->rows : child->weight;
        c = page != NULL ? page->next : child->next;
    }
    if (weight != node->weight || node->marked) {
        return wrong(report, "level %u node %u weighs %u, its children %llu", level, number, node->weight,
                     (unsigned long long)weight);
    }
    return true;
}

static bool check_level(const struct index *index, uint32_t level, const struct report *report)
{
    const struct tree *tree = index->tree;
    const uint32_t count = tree->levels[level].count;
    uint64_t children = 0, weight = 0;
    if (count != dci_level_count(index, level, tree->tokens)) {
        return wrong(report, "level %u has %u nodes", level, count);
    }
    for (uint32_t number = 0; number < count; number++) {
        const struct node *node = dci_node(tree, level, number);
        const uint32_t promoted = level < tree->top ? dci_level_promoted(index, level, number) : TREE_NONE;
        if (node->token != dci_level_token(index, level, number) || node->token >= tree->tokens) {
            return wrong(report, "level %u node %u is token %u", level, number, node->token);
        }
        if ((level == tree->top) != (node->parent == TREE_NONE) ||
            (promoted != TREE_NONE && node->parent != promoted)) {
            return wrong(report, "level %u node %u has parent %u", level, number, node->parent);
        }
        if (level == 1 && dci_page(index, dci_token(index, node->token)->page[index->column])->owner != number) {
            return wrong(report, "level 1 node %u is not in its own cell", number);
        }
        if (!check_children(index, level, number, &children, report)) {
            return false;
        }
        weight += node->weight;
    }
    const uint32_t below = level == 1 ? tree->pages : tree->levels[level - 1].count;
    if (children != below || weight != tree->tokens) {
        return wrong(report, "below level %u hang %llu of %u children with %llu of %u tokens", level,
                     (unsigned long long)children, below, (unsigned long long)weight, tree->tokens);
    }
    return true;
}

static bool check_nearest(const struct index *index, uint32_t level, uint32_t token, uint32_t parent,
                          const struct report *report)
{
    const struct tree *tree = index->tree;
    float key[INDEX_HEAD_DIM_MAX];
    dci_key_widen(index, token, key);
    const float slack = dci_slack(dci_token(index, token)->norm2, tree->norm2_max);
    const struct dci_probe probe = {key, slack, tree->norm2_max, token};
    struct dci_near best;
    uint32_t count = 0;
    for (uint32_t i = 0; i < tree->levels[level].count; i++) {
        dci_near_add(&best, &count, 1, index, tree, level, i, &probe);
    }
    if (best.node != parent) {
        return wrong(report, "token %u hangs under level %u node %u, nearest is %u", token, level, parent, best.node);
    }
    return true;
}

// Where the construction compares exhaustively and nothing was inserted since, every parent is the nearest node.
static bool check_parents(const struct index *index, uint32_t level, const struct report *report)
{
    const struct tree *tree = index->tree;
    if (tree->tokens != tree->bulk_tokens || (level < tree->top && tree->levels[level].count > TREE_EXACT_MAX)) {
        return true;
    }
    const uint32_t below = level == 1 ? tree->tokens : tree->levels[level - 1].count;
    for (uint32_t i = 0; i < below; i++) {
        if (dci_level_promoted(index, level - 1, i) != TREE_NONE) {
            continue;
        }
        const uint32_t token = level == 1 ? i : dci_node(tree, level - 1, i)->token;
        const uint32_t parent = level == 1 ? dci_page(index, dci_token(index, i)->page[index->column])->owner
                                           : dci_node(tree, level - 1, i)->parent;
        if (!check_nearest(index, level, token, parent, report)) {
            return false;
        }
    }
    return true;
}

bool index_check(const struct index *index, char *text, size_t capacity)
{
    const struct report report = {text, capacity};
    if (!check_tokens(index, &report) || !check_pages(index, &report)) {
        return false;
    }
    if (index->tree != NULL && !check_sketches(index, &report)) {
        return false;
    }
    for (uint32_t level = 1; index->tree != NULL && level <= index->tree->top; level++) {
        if (!check_level(index, level, &report) || !check_parents(index, level, &report)) {
            return false;
        }
    }
    return true;
}
