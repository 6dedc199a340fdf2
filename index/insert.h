// The running insertion: drafts of the pages it changes. Private to insert.c and place.c.
#ifndef ICECACHE_INDEX_INSERT_H
#define ICECACHE_INDEX_INSERT_H

#include "index/tree.h"

#define INSERT_ADOPT_CELLS 8u // nearest nodes whose children a new node may take over

// What a page will hold after commit. Its rows are those of the page in the live tree until then, so a row that is in
// use there cannot be given to another token by the same plan, even when its token leaves.
struct draft {
    uint32_t page, cell, rows;
    bool fresh; // the page is new
    bool stale; // mean and distances are to be recomputed
    float radius, farthest;
    uint32_t tokens[]; // page_tokens positions; behind them the mean
};

enum insert_phase { INSERT_NODES, INSERT_ADOPT, INSERT_CUT, INSERT_TOKENS, INSERT_FINISH, INSERT_DONE };

struct insert {
    uint32_t first, end; // tokens of the batch
    enum insert_phase phase;
    uint32_t level, cursor;
    float norm2_max;
    uint64_t digest;
    uint32_t node_ends[TREE_LEVELS_MAX + 1]; // node counts after commit
    struct dci_store drafts;
    uint32_t draft_count;
    size_t mean_offset;
    struct dci_list relinks; // level, node, new parent
    struct dci_list pages;   // being looked at
    uint32_t page_cursor;
    struct dci_list taken, projection; // tokens of a new cell, and the scratch to cut them
    struct dci_list dirty;             // level, node: room for the commit
    struct dci_cut cut;
};

static inline struct draft *dci_draft(const struct insert *insert, uint32_t number)
{
    return dci_store_at(&insert->drafts, number);
}
static inline float *dci_draft_mean(const struct insert *insert, struct draft *draft)
{
    return (float *)(void *)((unsigned char *)draft + insert->mean_offset);
}
// The tokens of a page as the insertion sees it.
const uint32_t *dci_draft_tokens(const struct index *index, uint32_t page);
// The draft of a page, made at the first change; NULL when memory is refused.
struct draft *dci_draft_open(struct index *index, uint32_t page);
struct draft *dci_draft_fresh(struct index *index, uint32_t cell);
void dci_draft_put(const struct index *index, struct draft *draft, uint32_t token);
void dci_draft_remove(const struct index *index, struct draft *draft, uint32_t token);
void dci_draft_refresh(const struct index *index, struct draft *draft);
// Fills insert->pages with the pages of a cell, live and drafted.
INDEX_MUST_CHECK bool dci_draft_cell_pages(struct index *index, uint32_t cell);
// Puts a token into the best page of a cell: the nearest with room, unless that is much farther than the nearest, which
// is then split.
INDEX_MUST_CHECK bool dci_draft_place(struct index *index, uint32_t cell, uint32_t token, const float *key,
                                      struct dci_work *work);

#endif
