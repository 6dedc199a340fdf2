// What an index consists of. Private to index/.
//
// Tokens are stored by position: their key row, and where their K and V row lies. Pages are stored by page id; a page
// is free, open (a block of the unindexed tail), planned (named by a plan that is not committed) or a leaf (tokens of
// one cell). A node of level l >= 1 is a token promoted to that level; the b-th node of a level is the b-th promoted
// token, so that a node's number gives its token's position and back without a table. A level-1 node's children are the
// pages of its cell, a higher node's children are nodes of the level below.
#ifndef ICECACHE_INDEX_TREE_H
#define ICECACHE_INDEX_TREE_H

#include "index/kernel.h"
#include "index/sketch.h"
#include "index/store.h"

#include <assert.h>

#define TREE_NONE       UINT32_MAX
#define TREE_LEVELS_MAX 16u  // of index_shape
#define TREE_TOP_MIN    8u   // a level exists when it has at least this many nodes at the boundary
#define TREE_EXACT_MAX  256u // levels up to this size are compared with exhaustively
#define TREE_BEAM       8u   // nodes kept per level where they are not

// Squared norms above this are refused: sums and differences of a few of them must stay finite.
#define TREE_NORM2_MAX (0x1p125f)

struct token {
    float norm2;
    uint32_t page[2]; // two columns: a bulk build fills the one that is not in use
    uint8_t row[2];
};

enum page_state { PAGE_FREE = 0, PAGE_OPEN, PAGE_PLANNED, PAGE_LEAF };

struct page {
    uint32_t owner; // leaf: node of level 1; open: position of row 0
    uint32_t next;  // leaf: next page of the cell; free: next free page
    uint32_t rows;  // leaf: rows in use
    uint32_t slot;  // leaf: of its sketch
    uint32_t draft; // 1 + its draft in the running insertion; 0: none
    float radius;   // leaf: root mean square distance of the keys from their mean
    float farthest; // leaf: the largest of these distances
    enum page_state state;
    uint32_t tokens[]; // page_tokens positions, TREE_NONE where not in use; behind them the mean key
};

struct node {
    uint32_t token;  // position
    uint32_t parent; // node of the level above; TREE_NONE at the top
    uint32_t first;  // first child
    uint32_t next;   // next child of the parent
    uint32_t weight; // tokens below
    bool marked;     // its summary is to be recomputed
    float norm2;     // of the token's key
    float vectors[]; // the token's key, then the mean of the keys below
};

struct level {
    struct dci_store nodes;
    uint32_t count;
};

// The tree over positions 0 .. tokens-1.
struct tree {
    uint32_t top;                             // highest level
    uint32_t tokens, pages;                   // indexed tokens, leaf pages
    uint32_t bulk_tokens;                     // tokens at the last bulk build
    float norm2_max;                          // c^2 of T_K: the largest squared norm in the tree
    uint64_t digest;                          // of every decision taken since the last bulk build, and of that build
    struct level levels[TREE_LEVELS_MAX + 1]; // 0 is not used
    struct dci_store sketches;                // blocks of 16 leaf pages
    float base[INDEX_HEAD_DIM_MAX];           // what their codes are relative to
};

enum build_kind { BUILD_NONE = 0, BUILD_BULK, BUILD_INSERT };
enum build_stage { STAGE_RUNNING = 0, STAGE_PLANNED, STAGE_DROPPED };

struct bulk;
struct insert;

// The running build. A plan's arrays belong to it.
struct build {
    enum build_kind kind;
    enum build_stage stage;
    struct bulk *bulk;
    struct insert *insert;
    struct index_move *moves;
    uint32_t move_count, move_room;
    struct dci_list new_pages, released_pages;
};

struct index {
    struct dci_memory memory;
    const struct dci_kernel *kernel;
    uint32_t head_dim, page_tokens;
    enum index_dtype dtype;
    uint32_t fanout; // 1 / r, rounded
    uint64_t seed;
    size_t row_bytes, page_mean_offset;
    float inverse_root_dim;

    // Grows with appends.
    struct dci_store keys, tokens;
    uint32_t length;   // committed
    uint32_t prepared; // tokens behind length that an append has prepared
    bool preparing;
    float norm2_max, prepared_norm2_max;

    // Pages of every state.
    struct dci_store pages;
    uint32_t page_bound, free_page;

    // Changes with commits of plans.
    uint32_t column; // the column of tokens that holds the places
    struct tree *tree;
    struct build build;
};

#define DCI_UNIT_ELEMENTS 128u // multiply-adds of a work unit: one key against one query at head_dim 128

// Work left in a slice, in multiply-adds; may go below 0 by the cost of one item.
struct dci_work {
    int64_t left;
};

static inline void dci_work_spend(struct dci_work *work, const struct index *index, uint64_t vectors)
{
    work->left -= (int64_t)(vectors * index->head_dim);
}

// ---- keys.c ----
static inline struct token *dci_token(const struct index *index, uint32_t position)
{
    return dci_store_at(&index->tokens, position);
}
void dci_key_widen(const struct index *index, uint32_t position, float *out /* head_dim */);
// T_K and T_Q of the paper (section 3.1): out has head_dim + 1 elements. norm_max is c.
void dci_transform_key(const float *key, uint32_t head_dim, float norm_max, float *out);
void dci_transform_query(const float *query, uint32_t head_dim, float *out);
// c^2 times the inner product of T_K(a) and T_K(b): the larger, the nearer in the space of T_K.
float dci_affinity(float dot, float slack_a, float slack_b);
float dci_slack(float norm2, float norm2_max); // sqrt(c^2 - |k|^2)
uint64_t dci_mix(uint64_t x);                  // splitmix64's finaliser

// ---- pages.c ----
static inline struct page *dci_page(const struct index *index, uint32_t page)
{
    return dci_store_at(&index->pages, page);
}
static inline float *dci_page_mean(const struct index *index, struct page *page)
{
    return (float *)(void *)((unsigned char *)page + index->page_mean_offset);
}
INDEX_MUST_CHECK bool dci_page_acquire(struct index *index, enum page_state state, uint32_t *out);
void dci_page_release(struct index *index, uint32_t page);
// Mean key of n positions, root mean square and largest distance from it; TREE_NONE entries are skipped. Returns how
// many were counted.
uint32_t dci_keys_summary(const struct index *index, const uint32_t *positions, uint32_t n, float *mean, float *radius,
                          float *farthest);

// ---- tree.c ----
static inline struct node *dci_node(const struct tree *tree, uint32_t level, uint32_t node)
{
    return dci_store_at(&tree->levels[level].nodes, node);
}
static inline float *dci_node_mean(const struct index *index, struct node *node)
{
    return node->vectors + index->head_dim;
}
// Promotion: how many of the first n tokens are nodes of a level, and which token is its b-th node.
uint32_t dci_level_count(const struct index *index, uint32_t level, uint32_t n);
uint32_t dci_level_token(const struct index *index, uint32_t level, uint32_t node);
// If a node (level 0: a token) is promoted to the level above: its number there, else TREE_NONE.
uint32_t dci_level_promoted(const struct index *index, uint32_t level, uint32_t node);
uint32_t dci_level_top(const struct index *index, uint32_t n); // highest level of a tree built over n tokens

INDEX_MUST_CHECK struct tree *dci_tree_create(struct index *index, uint32_t n);
void dci_tree_destroy(struct index *index, struct tree *tree); // accepts NULL
// Writes a node that has no parent and no children yet; room for it must be reserved.
void dci_node_init(const struct index *index, struct tree *tree, uint32_t level, uint32_t node);
void dci_node_link(struct tree *tree, uint32_t level, uint32_t node, uint32_t parent);
void dci_node_unlink(struct tree *tree, uint32_t level, uint32_t node);
void dci_page_link(struct index *index, struct tree *tree, uint32_t page, uint32_t cell);
void dci_page_unlink(struct index *index, struct tree *tree, uint32_t page);
// Weight and mean of a node from its children.
void dci_node_summarise(const struct index *index, struct tree *tree, uint32_t level, uint32_t node);

// A key in search of its parent.
struct dci_probe {
    const float *key;
    float slack, norm2_max;
    uint32_t position;
};
struct dci_near {
    float affinity;
    uint32_t tie, node;
};
// Adds a candidate to a list of the best `room`, nearest first. Of equally near nodes the closest one before the token
// is preferred, so that equal keys spread over their pivots instead of crowding under one.
void dci_near_add(struct dci_near *list, uint32_t *count, uint32_t room, const struct index *index,
                  const struct tree *tree, uint32_t level, uint32_t node, const struct dci_probe *probe);
// The (about) nearest nodes of a level: exhaustive on small levels and at the top, else down from above with a beam.
uint32_t dci_tree_nearest(const struct index *index, const struct tree *tree, uint32_t level,
                          const struct dci_probe *probe, struct dci_near *list, uint32_t room, struct dci_work *work);

// ---- cut.c ----
// Cuts a list of tokens into pages by repeated 2-means bisection, as evenly as whole pages allow.
struct dci_segment {
    uint32_t begin, end, pages;
};
struct dci_cut {
    uint32_t *tokens;  // permuted in place; borrowed
    float *projection; // scratch of the same length; borrowed
    uint32_t depth, pass, cursor, far_token;
    float far_distance;
    uint32_t count_a, count_b;
    struct dci_segment stack[32];
    float a[INDEX_HEAD_DIM_MAX], b[INDEX_HEAD_DIM_MAX];
    float sum_a[INDEX_HEAD_DIM_MAX], sum_b[INDEX_HEAD_DIM_MAX];
};
enum dci_cut_state { CUT_MORE, CUT_PAGE, CUT_DONE };
void dci_cut_init(struct dci_cut *cut, const struct index *index, uint32_t *tokens, float *projection, uint32_t begin,
                  uint32_t end);
// CUT_PAGE: tokens[page->begin .. page->end) are a page, by position.
enum dci_cut_state dci_cut_step(struct dci_cut *cut, const struct index *index, struct dci_work *work,
                                struct dci_segment *page);
// Puts the `left` tokens with the largest projection first (of equal ones the lower positions).
void dci_cut_select(uint32_t *tokens, float *projection, uint32_t n, uint32_t left);

// ---- bulk.c, insert.c: one kind of build each ----
enum dci_progress { PROGRESS_MORE, PROGRESS_PLAN, PROGRESS_NO_MEMORY };
INDEX_MUST_CHECK bool dci_bulk_begin(struct index *index, uint32_t boundary);
enum dci_progress dci_bulk_step(struct index *index, struct dci_work *work);
void dci_bulk_commit(struct index *index);
void dci_bulk_discard(struct index *index); // gives back everything but the plan's arrays; also after a commit
INDEX_MUST_CHECK bool dci_insert_begin(struct index *index, uint32_t batch);
enum dci_progress dci_insert_step(struct index *index, struct dci_work *work);
void dci_insert_commit(struct index *index);
void dci_insert_discard(struct index *index);

// ---- build.c ----
uint32_t dci_build_batch(const struct index *index); // tokens of an insertion, whole pages
uint32_t dci_build_base(const struct index *index);  // first boundary
void dci_build_fini(struct index *index);

#endif
