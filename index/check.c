// The invariants of an index, walked in full.
//
// Slow and for tests; reads only. The first violation is written out and ends the walk. Thread ownership: the index's.
#include "index/tree.h"

#include <math.h>
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

static bool check_token(const struct index *index, uint32_t p, const struct report *report)
{
    const struct index_place place = dci_place_of(index, p);
    if (place.page == TREE_NONE) {
        return true;
    }
    if (place.page >= index->page_bound || place.row >= index->page_tokens) {
        return wrong(report, "token %u lies in page %u row %u: out of range", p, place.page, place.row);
    }
    const struct page *page = dci_page(index, place.page);
    if (p < index->head || p >= index->indexed) {
        if (page->state != PAGE_OPEN || page->owner > p || p % index->page_tokens != place.row ||
            page->owner / index->page_tokens != p / index->page_tokens) {
            return wrong(report, "token %u is not in row %u of open page %u (state %d)", p, place.row, place.page,
                         (int)page->state);
        }
        return true;
    }
    if (page->state != PAGE_LEAF) {
        return wrong(report, "token %u lies in page %u, which is no leaf (state %d)", p, place.page, (int)page->state);
    }
    const struct node *cell = dci_node(index, page->owner);
    if (page->part >= cell->part_count || cell->parts[page->part] != place.page) {
        return wrong(report, "page %u is not page %u of cell %u", place.page, page->part, page->owner);
    }
    const struct dci_rows *rows = dci_rows_of(index, cell, page->part, place.row);
    if (rows->positions[place.row % DCI_LANES] != p) {
        return wrong(report, "row %u of page %u does not hold token %u", place.row, place.page, p);
    }
    return true;
}

static bool check_cell(const struct index *index, uint32_t id, const struct entry *entry, uint32_t *pages,
                       const struct report *report)
{
    const struct node *cell = dci_node(index, id);
    uint32_t tokens = 0;
    float spread2 = 0.0f, far = 0.0f;
    if (cell->count == 0 || cell->count > index->cell_max || cell->part_count > cell->run_parts ||
        cell->run_parts > index->cell_parts) {
        return wrong(report, "cell %u holds %u tokens in %u pages", id, cell->count, cell->part_count);
    }
    for (uint32_t part = 0; part < cell->part_count; part++) {
        const struct page *page = dci_page(index, cell->parts[part]);
        uint32_t in_page = 0;
        if (page->state != PAGE_LEAF || page->owner != id || page->part != part) {
            return wrong(report, "page %u is not that of cell %u", cell->parts[part], id);
        }
        for (uint32_t row = 0; row < index->page_blocks * DCI_LANES; row++) {
            const struct dci_rows *rows = dci_rows_of(index, cell, part, row);
            const uint32_t position = rows->positions[row % DCI_LANES];
            if (position == TREE_NONE) {
                continue;
            }
            const struct index_place place =
                position < index->length ? dci_place_of(index, position) : (struct index_place){TREE_NONE, 0};
            if (place.page != cell->parts[part] || place.row != row) {
                return wrong(report, "token %u is in row %u of page %u and elsewhere", position, row,
                             cell->parts[part]);
            }
            const float own = dci_code_spread2(index, cell, part, row);
            spread2 += own;
            far = own > far ? own : far;
            in_page++;
        }
        if (in_page == 0 || in_page != page->rows) {
            return wrong(report, "page %u has %u rows of %u", cell->parts[part], in_page, page->rows);
        }
        tokens += in_page;
        (*pages)++;
    }
    far = sqrtf(far) * index->inverse_root_dim;
    if (tokens != cell->count || (float)tokens != entry->rows) {
        return wrong(report, "cell %u holds %u tokens and counts %u", id, tokens, cell->count);
    }
    const float unit = sqrtf(spread2 / (float)tokens) * index->inverse_root_dim;
    if (!dci_is_near(spread2, cell->spread2) || !dci_is_near(unit, entry->unit) || !dci_is_near(far, entry->far)) {
        return wrong(report, "cell %u has the wrong radius: %g for %g, farthest %g for %g", id, (double)entry->unit,
                     (double)unit, (double)entry->far, (double)far);
    }
    return true;
}

static bool check_entry(const struct index *index, const struct node *parent, uint32_t id, uint32_t lane,
                        struct entry *entry, const struct report *report)
{
    float anchor[INDEX_HEAD_DIM_MAX];
    dci_entry_read(index, parent, lane, entry);
    if (entry->child >= index->nodes.bound || dci_node(index, entry->child)->parent != id ||
        dci_node(index, entry->child)->lane != lane || dci_node(index, entry->child)->level + 1 != parent->level) {
        return wrong(report, "entry %u of node %u leads nowhere", lane, id);
    }
    for (uint32_t i = 0; i < index->head_dim; i++) {
        anchor[i] = entry->step * (float)entry->codes[i];
    }
    if (entry->norm2 != index->kernel->dot(anchor, anchor, index->head_dim) || !(entry->rows > 0.0f)) {
        return wrong(report, "entry %u of node %u has the wrong norm", lane, id);
    }
    return true;
}

static bool check_node(const struct index *index, uint32_t id, uint32_t *pages, uint32_t *nodes, uint32_t *tokens,
                       const struct report *report)
{
    const struct node *node = dci_node(index, id);
    struct entry entry;
    (*nodes)++;
    if (node->count == 0 || node->count > index->node_max ||
        node->part_count != (node->count + DCI_LANES - 1) / DCI_LANES) {
        return wrong(report, "node %u has %u entries in %u blocks", id, node->count, node->part_count);
    }
    for (uint32_t lane = 0; lane < node->part_count * DCI_LANES; lane++) {
        if (lane >= node->count) {
            if (dci_node_block(index, node, lane)->rows[lane % DCI_LANES] != 0.0f) {
                return wrong(report, "entry %u of node %u is behind the last one", lane, id);
            }
            continue;
        }
        if (!check_entry(index, node, id, lane, &entry, report)) {
            return false;
        }
        if (node->level > 2) {
            if (!check_node(index, entry.child, pages, nodes, tokens, report)) { // as deep as the tree is high
                return false;
            }
            continue;
        }
        (*nodes)++;
        *tokens += dci_node(index, entry.child)->count;
        if (!check_cell(index, entry.child, &entry, pages, report)) {
            return false;
        }
    }
    return true;
}

static bool check_tree(const struct index *index, const struct report *report)
{
    uint32_t pages = 0, nodes = 0, tokens = 0;
    if (index->root != TREE_NONE) {
        if (dci_node(index, index->root)->parent != TREE_NONE || dci_node(index, index->root)->level < 2) {
            return wrong(report, "the root is not at the top");
        }
        if (!check_node(index, index->root, &pages, &nodes, &tokens, report)) {
            return false;
        }
    }
    uint32_t live = 0;
    for (uint32_t p = index->head; p < index->indexed; p++) {
        live += *dci_place(index, p) != TREE_NONE ? 1 : 0;
    }
    if (tokens != index->tokens || live != tokens || pages != index->leaf_pages) {
        return wrong(report, "%u tokens in %u pages are in the tree, counted %u in %u, %u have a place", tokens, pages,
                     index->tokens, index->leaf_pages, live);
    }
    // What a running build has made is not in the tree yet.
    uint32_t cells = 0;
    for (uint32_t id = 0; id < index->nodes.bound; id++) {
        cells += dci_node(index, id)->level == 1 ? 1 : 0;
    }
    if (index->batch == NULL && (nodes != index->nodes.used || index->runs != cells)) {
        return wrong(report, "%u nodes in use, %u in the tree; %u runs for %u cells", index->nodes.used, nodes,
                     index->runs, cells);
    }
    return true;
}

static bool check_free_pages(const struct index *index, const struct report *report)
{
    uint32_t listed = 0, free = 0;
    for (uint32_t id = index->free_page; id != TREE_NONE; id = dci_page(index, id)->owner) {
        if (id >= index->page_bound || dci_page(index, id)->state != PAGE_FREE || ++listed > index->page_bound) {
            return wrong(report, "the list of free pages is broken at page %u", id);
        }
    }
    for (uint32_t id = 0; id < index->page_bound; id++) {
        free += dci_page(index, id)->state == PAGE_FREE ? 1 : 0;
    }
    return listed == free || wrong(report, "%u pages are free, %u are listed", free, listed);
}

bool index_check(const struct index *index, char *text, size_t capacity)
{
    const struct report report = {text, capacity};
    if (index->indexed > index->length) {
        return wrong(&report, "indexed %u of %u tokens", index->indexed, index->length);
    }
    for (uint32_t p = 0; p < index->length; p++) {
        if (!check_token(index, p, &report)) {
            return false;
        }
    }
    return check_tree(index, &report) && check_free_pages(index, &report);
}
