// A batch of tokens on its way into the tree. Private to batch.c, cells.c and commit.c.
//
// Tokens that go to the same cell are a hit. A hit either puts them in free rows of the cell, or, where the cell would
// grow too large, makes new cells of all its tokens. Until the commit everything new is out of sight: nodes and runs
// that nothing points to, and codes of tokens that wait to be written.
#ifndef ICECACHE_INDEX_BATCH_H
#define ICECACHE_INDEX_BATCH_H

#include "index/tree.h"

enum batch_phase {
    BATCH_SOURCE, // mending: look for a cell worth it
    BATCH_TAIL,   // pages of the tokens, whose rows are needed
    BATCH_LOAD,   // keys of the tokens, rotated
    BATCH_ROUTE,  // their nearest cells
    BATCH_HITS,   // tokens by cell
    BATCH_NEED,   // pages of cells to divide, whose rows are needed
    BATCH_CELLS,  // one hit after the other
    BATCH_SETTLE, // pages to release, and room for the commit
    BATCH_DONE,
};

// Where the code of a token that joins a cell goes.
struct spot {
    uint32_t page, row;
    uint32_t part; // of the cell
    float scale, spread2;
};

// Members of a division that are still to be divided, made a cell or cut into the pages of a draft.
struct segment {
    uint32_t begin, count, draft;
};

// Each division takes at least a third away, so the stack of what is left stays short.
#define BATCH_SEGMENTS_MAX 64u

struct draft {
    uint32_t node;
    struct entry entry;
};

struct hit {
    uint32_t cell;         // TREE_NONE: there is no tree yet
    uint32_t first, count; // of the batch's order
    uint32_t need;         // divides: number of its first page among those needed
    uint32_t draft, draft_count;
    bool divides, begun;
    unsigned char *run; // joins: the longer run that it needs, or NULL, and for how many pages
    uint32_t run_parts;
};

struct batch {
    enum batch_phase phase;
    uint32_t cursor;
    uint32_t end;         // the indexed count that it leads to
    uint32_t begin;       // first position of it
    uint32_t source;      // mending: the cell; TREE_NONE otherwise
    bool dissolves;       // mending: its tokens go to other cells; else it is packed anew
    float norm2_max;      // c^2 of T_K to go back to when the batch is discarded
    struct dci_list need; // page ids
    const void **rows;    // their first rows, as many as were given
    uint32_t rows_given, rows_room;
    size_t rows_stride;
    uint32_t tail_page; // loading: the number of the last token's page among those needed

    uint32_t item_count, item_room;
    uint32_t *positions, *cells, *order;
    float *keys;
    uint8_t *codes;
    struct spot *spots;
    struct hit *hits;
    uint32_t hit_count;

    // Of the largest hit that divides.
    uint32_t member_room;
    uint32_t *member_positions, *member_order;
    const float **vectors;
    float *members, *values;
    struct dci_members coded;
    struct segment segments[BATCH_SEGMENTS_MAX];
    uint32_t segment_count;
    struct dci_list new_pages, released_pages;
    struct dci_store drafts;
    struct index_move *moves;
    uint32_t move_count, draft_count, move_room;
    float *scratch; // dci_scratch_bytes
};

static inline struct draft *dci_draft(const struct batch *batch, uint32_t draft)
{
    return dci_store_at(&batch->drafts, draft);
}
static inline const float *dci_item_key(const struct index *index, uint32_t item)
{
    return index->batch->keys + (size_t)item * index->head_dim;
}

// ---- cells.c ----
// One step; false: no memory. *done: nothing is left to do for this hit.
INDEX_MUST_CHECK bool dci_hit_work(struct index *index, struct hit *hit, bool *done);
void dci_hit_discard(struct index *index, const struct hit *hit);

#endif
