// The layout of an index as bytes. Private to save.c, load.c and accept.c.
//
// An image is a sequence of sections without gaps; a section is a sequence of items, whose number the header says. All
// numbers are little-endian, floats IEEE binary32; nothing is padded or aligned. Numbers that say "none" are
// UINT32_MAX. Ids of pages, nodes and blocks are those of the index; runs have none.
//
//   header      struct image_header
//   base        head_dim floats
//   places      per token: page << row_shift | row, or none where it was erased
//   free pages  their ids, the next one to be used first
//   nodes       struct image_node per id
//   free nodes  their ids, the next one to be used first
//   cell blocks, and the free ones as with nodes: struct image_block per id, then the codes, as in struct dci_block
//   node blocks likewise
//   runs        per cell, by node id: the top bits of its pages (struct dci_rows), then the low bits of all their rows
//   tail        per block of 16 neighbours that has a token of head or tail: 16 steps, then the codes
//
// What follows from these is left out: what pages are used for, parents, norms and the summaries of cells.
#ifndef ICECACHE_INDEX_IMAGE_H
#define ICECACHE_INDEX_IMAGE_H

#include "index/tree.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "images are little-endian, and copied as they are");

#define IMAGE_MAGIC 0x7865646e69656369u // "iceindex"
// Changes with the layout, and with whatever makes the same keys another tree: a loaded index must go on as it would
// have.
#define IMAGE_VERSION 2u

enum image_section {
    IMAGE_HEADER,
    IMAGE_BASE,
    IMAGE_PLACES,
    IMAGE_FREE_PAGES,
    IMAGE_NODES,
    IMAGE_FREE_NODES,
    IMAGE_CELL_BLOCKS,
    IMAGE_FREE_CELL_BLOCKS,
    IMAGE_NODE_BLOCKS,
    IMAGE_FREE_NODE_BLOCKS,
    IMAGE_RUNS,
    IMAGE_TAIL,
    IMAGE_END,
};

struct image_ids {
    uint32_t bound, free;
};

struct image_header {
    uint64_t magic, image_bytes, seed, digest;
    uint32_t version, head_dim, page_tokens, dtype, policy, node_max;
    uint32_t length, indexed;
    uint32_t root, mended, ragged;
    uint32_t leaf_pages;
    uint32_t is_continuation, sealed;
    struct image_ids pages, nodes, cell_blocks, node_blocks;
    float norm2_max, tree_norm2_max;
};
static_assert(sizeof(struct image_header) == 4 * 8 + 24 * 4, "no padding");

// A free one is all 0.
struct image_node {
    uint8_t level, part_count, run_parts, zero;
    uint32_t count;
    float spread2;
    uint32_t parts[TREE_PARTS_MAX]; // 0 from part_count on
};
static_assert(sizeof(struct image_node) == 4 + 2 * 4 + TREE_PARTS_MAX * 4, "no padding");

// A free one has no owner and no child.
struct image_block {
    uint32_t owner; // the node whose entries these are
    float step[DCI_LANES], far[DCI_LANES];
    uint32_t child[DCI_LANES];
};
static_assert(sizeof(struct image_block) == 4 + 3 * DCI_LANES * 4, "no padding");

// Blocks of the head; the first block of the tail behind it; the end of all.
static inline uint32_t dci_image_head_end(const struct index *index)
{
    const uint32_t head = index->length < index->head ? index->length : index->head;
    return (head + DCI_LANES - 1) / DCI_LANES;
}
static inline uint32_t dci_image_tail_begin(const struct index *index)
{
    const uint32_t head_end = dci_image_head_end(index), begin = index->indexed / DCI_LANES;
    return begin > head_end ? begin : head_end;
}
static inline uint32_t dci_image_tail_end(const struct index *index)
{
    const uint32_t begin = dci_image_tail_begin(index), end = (index->length + DCI_LANES - 1) / DCI_LANES;
    return index->length > index->indexed && end > begin ? end : begin;
}
// Does a lane of these hold a token?
static inline bool dci_image_is_live(const struct index *index, uint32_t position)
{
    return position < index->length && (position < index->head || position >= index->indexed) &&
           *dci_place(index, position) != TREE_NONE;
}
static inline size_t dci_image_codes_bytes(const struct index *index)
{
    return (size_t)index->head_dim * DCI_LANES;
}
static inline size_t dci_image_tops_bytes(const struct index *index, uint32_t pages)
{
    return (size_t)pages * index->page_blocks * index->rows_stride;
}
static inline size_t dci_image_lows_bytes(const struct index *index, uint32_t pages)
{
    return (size_t)pages * index->page_blocks * DCI_LANES * index->code_row_bytes;
}
// Of an index of these sizes, whose length and indexed count are the header's.
static inline uint64_t dci_image_bytes(const struct index *index, const struct image_header *header)
{
    const uint64_t codes = dci_image_codes_bytes(index), number = sizeof(uint32_t);
    const uint64_t blocks = (uint64_t)header->cell_blocks.bound + header->node_blocks.bound;
    const uint64_t listed =
        (uint64_t)header->pages.free + header->nodes.free + header->cell_blocks.free + header->node_blocks.free;
    const uint64_t tail = (uint64_t)dci_image_head_end(index) + dci_image_tail_end(index) - dci_image_tail_begin(index);
    return sizeof *header + index->head_dim * sizeof(float) + number * (header->length + listed) +
           header->nodes.bound * (uint64_t)sizeof(struct image_node) + blocks * (sizeof(struct image_block) + codes) +
           header->leaf_pages * (uint64_t)(dci_image_tops_bytes(index, 1) + dci_image_lows_bytes(index, 1)) +
           tail * (DCI_LANES * sizeof(float) + codes);
}

#endif
