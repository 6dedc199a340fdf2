// What an index consists of. Private to index/.
//
// Nodes of all levels are alike: at most `node_max` entries, each with an anchor. A node of level 1, a cell, has tokens
// as entries, in pages; a node above has nodes of the level below as entries, in blocks of 16. The anchor of a cell is
// fixed when the cell is made, because its tokens are coded against it; that of a higher node is free to change. All
// keys and anchors inside the tree are rotated (dci_rotate), which keeps inner products and distances.
//
// Ids of nodes and blocks are a function of the keys, as the tree is; ids of pages are not.
#ifndef ICECACHE_INDEX_TREE_H
#define ICECACHE_INDEX_TREE_H

#include "index/kernel.h"
#include "index/store.h"

#include <assert.h>
#include <math.h>

#define TREE_NONE       UINT32_MAX
#define TREE_LEVELS_MAX 16u  // of index_shape
#define TREE_NODE_MAX   128u // entries of a node at most
#define TREE_PARTS_MAX  8u   // pages or blocks of a node
#define TREE_BEAM       4u   // nodes kept per level on the way down to a token's cell

// Squared norms above this are refused: the sum of 256 squared residuals, each of up to twice a norm and coded in 5
// bits, must stay finite.
#define TREE_NORM2_MAX (0x1p116f)

enum page_state { PAGE_FREE = 0, PAGE_OPEN, PAGE_PLANNED, PAGE_LEAF };

struct page {
    uint32_t owner; // leaf: its cell; open: position of row 0; free: next free page
    uint16_t rows;  // leaf: in use
    uint8_t part;   // leaf: which page of its cell
    uint8_t state;
};

struct node {
    uint32_t parent, lane;          // which entry of which node this is; the root has no parent
    uint32_t count;                 // entries
    float spread2;                  // cells: sum of the squared norms of the tokens' codes
    unsigned char *run;             // cells: where the codes of all its pages lie in one piece
    uint32_t parts[TREE_PARTS_MAX]; // cells: pages; else blocks
    uint8_t level;                  // 1: a cell
    uint8_t part_count, run_parts;  // pages that there is room for in the run
};
static_assert(sizeof(struct node) <= 64, "a line of the cache");

// A node's anchor and what its parent says of it.
struct entry {
    float step, norm2, unit, far, rows, reach;
    uint32_t child;
    int8_t codes[INDEX_HEAD_DIM_MAX];
};

struct batch;

enum build_stage { STAGE_NONE = 0, STAGE_RUNNING, STAGE_ROWS, STAGE_PLANNED, STAGE_DROPPED };

struct index {
    struct dci_memory memory;
    const struct dci_kernel *kernel;
    uint32_t head_dim, page_tokens;
    uint32_t page_blocks;                    // blocks of 16 rows of a page
    uint32_t row_shift;                      // bits of a row in a place
    uint32_t code_row_bytes, code_bytes;     // of a token's low bits; of its whole code on its way
    uint32_t cell_max, cell_parts, node_max; // tokens and pages of a cell, entries of a node above
    uint32_t head;                           // tokens at the beginning that are never clustered; 0: a continuation
    enum index_dtype dtype;
    enum index_policy policy;
    uint64_t seed;
    size_t row_bytes, rows_stride; // of a key; of the top bits of 16 rows
    float inverse_root_dim;
    float signs[2][INDEX_HEAD_DIM_MAX]; // of the rotation

    // Changes with appends.
    struct dci_store tail;   // keys of head and tail in 8 bits: blocks of 16 neighbours, without base
    struct dci_store places; // of all tokens: page << row_shift | row, TREE_NONE when erased
    uint32_t length;         // committed
    uint32_t prepared;       // tokens behind length that an append has prepared
    bool preparing;
    bool sealed; // no append will come any more
    float norm2_max, prepared_norm2_max;

    // Pages of every state.
    struct dci_store pages;
    uint32_t page_bound, free_page;

    // Changes with commits of plans, and with truncation.
    uint32_t indexed;            // tokens clustered
    uint32_t tokens, leaf_pages; // in the tree
    uint32_t root;
    uint64_t digest;                // of every decision taken
    float tree_norm2_max;           // c^2 of T_K
    bool ragged;                    // forgetting may have left cells worth mending
    uint32_t mended;                // nodes below it are not, or no more
    float base[INDEX_HEAD_DIM_MAX]; // what anchors are coded relative to; rotated
    struct dci_slab nodes, cell_blocks, node_blocks;
    uint32_t runs; // of cells in the tree, and of those on their way

    // The running build. A plan's arrays belong to it.
    enum build_stage stage;
    struct batch *batch;
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

// Asks for memory that is about to be used.
static inline void dci_ask_for(const void *memory, size_t bytes)
{
    for (size_t offset = 0; offset < bytes; offset += 64) {
        __builtin_prefetch((const unsigned char *)memory + offset);
    }
}

// ---- keys.c ----
void dci_rotation_init(struct index *index);
void dci_rotate(const struct index *index, float *x); // in place
// The squared norm of a row's key, which goes to `out` as it is; also a NaN or what is too large.
float dci_key_widen(const struct index *index, const void *row, float *out);
// The key of a row that the owner lends, rotated. A row that appending would have refused counts as 0.
void dci_key_load(const struct index *index, const void *row, float *out);
uint64_t dci_mix(uint64_t x); // splitmix64's finaliser

// ---- pages.c ----
static inline struct page *dci_page(const struct index *index, uint32_t page)
{
    return dci_store_at(&index->pages, page);
}
static inline uint32_t *dci_place(const struct index *index, uint32_t position)
{
    return dci_store_at(&index->places, position);
}
struct index_place dci_place_of(const struct index *index, uint32_t position);
void dci_place_set(struct index *index, uint32_t position, uint32_t page, uint32_t row);
INDEX_MUST_CHECK bool dci_page_acquire(struct index *index, enum page_state state, uint32_t *out);
void dci_page_release(struct index *index, uint32_t page);
static inline struct dci_block *dci_tail_block(const struct index *index, uint32_t position)
{
    return dci_store_at(&index->tail, position / DCI_LANES);
}
void dci_tail_forget(struct index *index);                // what is clustered; the first chunk stays
void dci_tail_trim(struct index *index, uint32_t length); // what lies behind
// The first position whose open page is that of `position`.
uint32_t dci_open_begin(const struct index *index, uint32_t position);

// ---- node.c ----
static inline size_t dci_block_bytes(const struct index *index)
{
    return sizeof(struct dci_block) + (size_t)index->head_dim * DCI_LANES;
}
static inline struct node *dci_node(const struct index *index, uint32_t node)
{
    return dci_slab_at(&index->nodes, node);
}
static inline struct dci_block *dci_block(const struct index *index, uint32_t level, uint32_t block)
{
    return dci_slab_at(level == 2 ? &index->cell_blocks : &index->node_blocks, block);
}
// A cell's codes are a run of memory: the top bits of all its pages, in blocks of 16 rows, then the low bits of all
// their rows. Where the latter begin, and the run's bytes, for so many pages.
static inline size_t dci_run_lows(const struct index *index, uint32_t parts)
{
    return ((size_t)parts * index->page_blocks * index->rows_stride + 63) / 64 * 64;
}
static inline size_t dci_run_bytes(const struct index *index, uint32_t parts)
{
    return dci_run_lows(index, parts) + (size_t)parts * index->page_blocks * DCI_LANES * index->code_row_bytes;
}
// NULL: no memory.
unsigned char *dci_run_acquire(struct index *index, uint32_t parts);
void dci_run_release(struct index *index, unsigned char *run, uint32_t parts);
// Block `number` of 16 rows of a cell; each page has page_blocks of them.
static inline struct dci_rows *dci_rows(const struct index *index, const struct node *cell, uint32_t number)
{
    return (struct dci_rows *)(void *)(cell->run + number * index->rows_stride);
}
// The low bits of its first row; those of the others follow.
static inline uint8_t *dci_lows(const struct index *index, const struct node *cell, uint32_t number)
{
    return cell->run + dci_run_lows(index, cell->run_parts) + (size_t)number * DCI_LANES * index->code_row_bytes;
}
// The block that holds a row of one of a cell's pages.
static inline struct dci_rows *dci_rows_of(const struct index *index, const struct node *cell, uint32_t part,
                                           uint32_t row)
{
    return dci_rows(index, cell, part * index->page_blocks + row / DCI_LANES);
}
static inline struct dci_block *dci_node_block(const struct index *index, const struct node *node, uint32_t lane)
{
    return dci_block(index, node->level, node->parts[lane / DCI_LANES]);
}
// Squared norm of what the code of a row of one of a cell's pages stands for.
float dci_code_spread2(const struct index *index, const struct node *cell, uint32_t part, uint32_t row);
// Are these the same sum, but for the order that was summed in?
static inline bool dci_is_near(float a, float b)
{
    return fabsf(a - b) <= 1.0e-3f * (fabsf(a) + fabsf(b)) + 1.0e-30f;
}
// A token on its way to a row.
struct dci_row {
    uint32_t position;
    const uint8_t *code;
    float scale;
};
void dci_row_write(const struct index *index, const struct node *cell, uint32_t part, uint32_t row,
                   const struct dci_row *token);
void dci_rows_clear(const struct index *index, const struct node *cell, uint32_t part); // no row in use
void dci_block_clear(const struct index *index, struct dci_block *block);               // no lane in use
void dci_block_write(const struct index *index, struct dci_block *block, uint32_t lane, const struct entry *entry);
// Codes an anchor: fills codes, step and norm2.
void dci_entry_code(const struct index *index, const float *anchor, struct entry *entry);
// What a coded anchor stands for, base included.
void dci_entry_anchor(const struct index *index, const struct entry *entry, float *anchor);
void dci_entry_read(const struct index *index, const struct node *parent, uint32_t lane, struct entry *entry);
void dci_entry_write(const struct index *index, const struct node *parent, uint32_t lane, const struct entry *entry);
// A cell's unit and rows from its count and spread.
void dci_cell_summarise(const struct index *index, const struct node *cell, struct entry *entry);
// Room for hanging so many entries into the tree, so that it cannot fail; at most so many nodes above cells get full.
INDEX_MUST_CHECK bool dci_nodes_reserve(struct index *index, uint32_t entries, uint32_t divisions);
// Hangs an entry under a node of the level above its child's, dividing it when full. scratch: dci_scratch_bytes.
void dci_node_add(struct index *index, uint32_t parent, const struct entry *entry, float *scratch);
static inline size_t dci_scratch_bytes(const struct index *index) // anchors of a full node and one more, and codes
{
    return ((size_t)index->node_max + 1) * index->head_dim * (sizeof(float) + 1);
}
void dci_node_release(struct index *index, uint32_t node);
void dci_node_remove(struct index *index, uint32_t node); // takes a node without entries out of the tree
void dci_root_create(struct index *index, const struct entry *entry);

// ---- route.c ----
// The cell for a key (rotated): the nearest one, or one that is nearly as near and has a free row. avoid: a cell that
// does not count, or TREE_NONE. TREE_NONE where there is no cell.
uint32_t dci_route(const struct index *index, const float *key, uint32_t avoid, struct dci_work *work);

// ---- divide.c ----
// Vectors to be divided, in 7 bits less a center; with promotion, whose space has an origin, that is 0.
struct dci_members {
    uint8_t *codes;  // [vector][head_dim]
    int32_t *norms2; // squared norms of the codes
    float step;
};
// Codes n vectors. codes and norms2: room for them.
void dci_members_code(const struct index *index, const float *const *vectors, uint32_t n, const float *center,
                      struct dci_members *members);
// Divides n members in two, none with less than n / 3 of them; permutes `order`. Returns the first part's count. With
// promotion the promoted members lead their parts. values: room for n.
struct dci_division {
    const struct index *index;
    const struct dci_members *members;
    uint32_t *order;
    float *values;
    uint64_t seed;
};
uint32_t dci_divide(const struct dci_division *division, uint32_t begin, uint32_t n);
// The same at exactly `left`: the nearest ones to one side.
void dci_divide_at(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t left);

// ---- batch.c, commit.c ----
enum dci_progress { PROGRESS_MORE, PROGRESS_ROWS, PROGRESS_PLAN, PROGRESS_IDLE, PROGRESS_NO_MEMORY };
INDEX_MUST_CHECK bool dci_batch_begin(struct index *index, uint32_t end); // tokens indexed .. end-1
INDEX_MUST_CHECK bool dci_mend_begin(struct index *index);
enum dci_progress dci_batch_step(struct index *index, struct dci_work *work);
void dci_batch_commit(struct index *index);
void dci_batch_discard(struct index *index); // also after a commit

// ---- build.c ----
uint32_t dci_build_target(const struct index *index); // the indexed count that the next batch leads to; 0: none is due
void dci_build_fini(struct index *index);

#endif
