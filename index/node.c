// Nodes and their entries: coding of anchors, hanging entries in, dividing full nodes above the cells.
//
// Invariants: entries are lanes 0 .. count-1; a node but the root has at least one; the blocks of a node are no more
// than its entries need. Room is reserved before a plan is handed out, so nothing here can fail.
// Thread ownership: the index's.
#include "index/tree.h"

#include <math.h>
#include <string.h>

unsigned char *dci_run_acquire(struct index *index, uint32_t parts)
{
    unsigned char *run = dci_memory_acquire(&index->memory, dci_run_bytes(index, parts));
    index->runs += run == NULL ? 0 : 1;
    return run;
}

void dci_run_release(struct index *index, unsigned char *run, uint32_t parts)
{
    dci_memory_release(&index->memory, run, dci_run_bytes(index, parts));
    index->runs--;
}

void dci_rows_clear(const struct index *index, const struct node *cell, uint32_t part)
{
    const uint32_t first = part * index->page_blocks;
    for (uint32_t sub = 0; sub < index->page_blocks; sub++) {
        struct dci_rows *rows = dci_rows(index, cell, first + sub);
        memset(rows, 0, index->rows_stride);
        memset(rows->positions, 0xff, sizeof rows->positions);
    }
    memset(dci_lows(index, cell, first), 0, (size_t)index->page_blocks * DCI_LANES * index->code_row_bytes);
}

// 15 in each byte whose number is that of a bit that is not set.
static uint64_t nibbles_unset(uint8_t bits)
{
    const uint64_t ones = 0x0101010101010101u;
    const uint64_t apart = (bits * ones & 0x8040201008040201u) + 0x7f * ones;
    return ~((apart >> 7 & ones) * 15) & 15 * ones;
}

float dci_code_spread2(const struct index *index, const struct node *cell, uint32_t part, uint32_t row)
{
    const struct dci_rows *rows = dci_rows_of(index, cell, part, row);
    const uint32_t lane = row % DCI_LANES, half = index->code_row_bytes;
    const uint8_t *low = dci_lows(index, cell, part * index->page_blocks + row / DCI_LANES) + (size_t)lane * half;
    // A code stands for 2 code - 31 in half steps: with low bits b that is 2 b + 1 where the top bit is set, else the
    // same of 15 - b with the other sign.
    uint8_t sizes[INDEX_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < half; i += 8) {
        uint64_t word;
        memcpy(&word, low + i, sizeof word);
        word ^= nibbles_unset(rows->signs[i / 8 * DCI_LANES + lane]);
        word = half + i < index->head_dim ? word ^ nibbles_unset(rows->signs[(half + i) / 8 * DCI_LANES + lane]) << 4
                                          : word & 0x0f0f0f0f0f0f0f0fu;
        memcpy(sizes + i, &word, sizeof word);
    }
    uint32_t sum = 0;
    for (uint32_t i = 0; i < half; i++) {
        const uint32_t a = sizes[i] & 15, b = sizes[i] >> 4;
        sum += a * (a + 1) + b * (b + 1);
    }
    const float scale = dci_scale_widen(rows->scales[lane]);
    return scale * scale * (0.25f * (float)(4 * sum + index->head_dim));
}

void dci_row_write(const struct index *index, const struct node *cell, uint32_t part, uint32_t row,
                   const struct dci_row *token)
{
    struct dci_rows *rows = dci_rows_of(index, cell, part, row);
    const uint32_t lane = row % DCI_LANES, half = index->code_row_bytes;
    uint8_t *low = dci_lows(index, cell, part * index->page_blocks + row / DCI_LANES) + (size_t)lane * half;
    memcpy(low, token->code, half);
    for (uint32_t i = 0; i < index->head_dim / 8; i++) {
        rows->signs[i * DCI_LANES + lane] = token->code[half + i];
    }
    rows->scales[lane] = dci_scale_narrow(token->scale);
    rows->positions[lane] = token->position;
}

void dci_entry_code(const struct index *index, const float *anchor, struct entry *entry)
{
    float off[INDEX_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < index->head_dim; i++) {
        off[i] = anchor[i] - index->base[i];
    }
    int32_t ignored;
    entry->step = index->kernel->encode8(off, index->head_dim, entry->codes, &ignored);
    for (uint32_t i = 0; i < index->head_dim; i++) {
        off[i] = entry->step * (float)entry->codes[i];
    }
    entry->norm2 = index->kernel->dot(off, off, index->head_dim);
}

void dci_entry_anchor(const struct index *index, const struct entry *entry, float *anchor)
{
    index->kernel->decode8(entry->codes, entry->step, index->base, index->head_dim, anchor);
}

static uint8_t *codes_at(struct dci_block *block, uint32_t lane, uint32_t group)
{
    return block->codes + ((size_t)group * DCI_LANES + lane) * 4;
}

void dci_entry_read(const struct index *index, const struct node *parent, uint32_t lane, struct entry *entry)
{
    struct dci_block *block = dci_node_block(index, parent, lane);
    const uint32_t i = lane % DCI_LANES;
    entry->step = block->step[i];
    entry->norm2 = block->norm2[i];
    entry->unit = block->unit[i];
    entry->far = block->far[i];
    entry->rows = block->rows[i];
    entry->reach = block->reach[i];
    entry->child = block->child[i];
    for (uint32_t group = 0; group < index->head_dim / 4; group++) {
        uint32_t word;
        memcpy(&word, codes_at(block, i, group), sizeof word);
        word ^= 0x80808080u;
        memcpy(entry->codes + (size_t)4 * group, &word, sizeof word);
    }
}

void dci_block_clear(const struct index *index, struct dci_block *block)
{
    memset(block, 0, sizeof *block);
    memset(block->child, 0xff, sizeof block->child);
    memset(block->codes, DCI_CODE_ZERO, (size_t)index->head_dim * DCI_LANES);
}

void dci_block_write(const struct index *index, struct dci_block *block, uint32_t lane, const struct entry *entry)
{
    block->step[lane] = entry->step;
    block->norm2[lane] = entry->norm2;
    block->unit[lane] = entry->unit;
    block->far[lane] = entry->far;
    block->rows[lane] = entry->rows;
    block->reach[lane] = entry->reach;
    block->child[lane] = entry->child;
    for (uint32_t group = 0; group < index->head_dim / 4; group++) {
        uint32_t word;
        memcpy(&word, entry->codes + (size_t)4 * group, sizeof word);
        word ^= 0x80808080u;
        memcpy(codes_at(block, lane, group), &word, sizeof word);
    }
}

void dci_entry_write(const struct index *index, const struct node *parent, uint32_t lane, const struct entry *entry)
{
    dci_block_write(index, dci_node_block(index, parent, lane), lane % DCI_LANES, entry);
}

void dci_cell_summarise(const struct index *index, const struct node *cell, struct entry *entry)
{
    entry->rows = (float)cell->count;
    entry->reach = cell->count == 0 ? 0.0f : sqrtf(2.0f * dci_log((float)cell->count));
    entry->unit = cell->count == 0 ? 0.0f : sqrtf(cell->spread2 / (float)cell->count) * index->inverse_root_dim;
}

static struct dci_slab *blocks_of(struct index *index, uint32_t level)
{
    return level == 2 ? &index->cell_blocks : &index->node_blocks;
}

bool dci_nodes_reserve(struct index *index, uint32_t entries, uint32_t divisions)
{
    // A division makes a node and moves up to two thirds of the entries before the old blocks go; its entry may divide
    // the node above, and so on up to a new root.
    const uint32_t height = index->root == TREE_NONE ? 2 : dci_node(index, index->root)->level + 1;
    const uint32_t blocks = (index->node_max + DCI_LANES - 1) / DCI_LANES + 1;
    const uint32_t nodes = divisions * height + 2;
    return dci_slab_reserve(&index->nodes, &index->memory, nodes) &&
           dci_slab_reserve(&index->cell_blocks, &index->memory, divisions * blocks + entries + 1) &&
           dci_slab_reserve(&index->node_blocks, &index->memory, divisions == 0 ? 0 : nodes * blocks);
}

static uint32_t acquire(struct index *index, struct dci_slab *slab)
{
    uint32_t id = TREE_NONE;
    const bool granted = dci_slab_acquire(slab, &index->memory, &id);
    assert(granted); // reserved
    return granted ? id : TREE_NONE;
}

static uint32_t node_create(struct index *index, uint32_t level)
{
    const uint32_t id = acquire(index, &index->nodes);
    *dci_node(index, id) = (struct node){.parent = TREE_NONE, .lane = TREE_NONE, .level = (uint8_t)level};
    return id;
}

// Adds an entry to a node that has room.
static void append(struct index *index, uint32_t id, const struct entry *entry)
{
    struct node *node = dci_node(index, id);
    const uint32_t lane = node->count;
    assert(lane < index->node_max);
    if (lane / DCI_LANES == node->part_count) {
        const uint32_t block = acquire(index, blocks_of(index, node->level));
        node->parts[node->part_count++] = block;
        dci_block_clear(index, dci_block(index, node->level, block));
    }
    node->count++;
    dci_entry_write(index, node, lane, entry);
    struct node *child = dci_node(index, entry->child);
    child->parent = id;
    child->lane = lane;
}

static void forget_lane(struct index *index, struct node *node, uint32_t lane)
{
    struct entry nothing = {.child = TREE_NONE};
    dci_entry_write(index, node, lane, &nothing);
}

// Gives back blocks that count entries do not need.
static void trim(struct index *index, struct node *node)
{
    while (node->part_count > (node->count + DCI_LANES - 1) / DCI_LANES) {
        dci_slab_release(blocks_of(index, node->level), node->parts[--node->part_count]);
    }
}

// What a node's parent says of it, from the mean of some anchors (or the first of them, where anchors are promoted).
static void summarise(const struct index *index, uint32_t id, const float *const *anchors, const uint32_t *order,
                      uint32_t n, struct entry *entry)
{
    float mean[INDEX_HEAD_DIM_MAX] = {0};
    const uint32_t counted = index->policy == INDEX_PROMOTION ? 1 : n;
    for (uint32_t i = 0; i < counted; i++) {
        index->kernel->add(mean, anchors[order[i]], index->head_dim);
    }
    for (uint32_t i = 0; i < index->head_dim; i++) {
        mean[i] /= (float)counted;
    }
    *entry = (struct entry){.rows = 1.0f, .child = id};
    dci_entry_code(index, mean, entry);
}

// Moves the entries named by order[0 .. n-1] to a new node and closes the gaps.
static uint32_t move_out(struct index *index, uint32_t id, const uint32_t *lanes, uint32_t n)
{
    struct entry entry;
    bool moves[TREE_NODE_MAX + 1] = {false};
    const uint32_t fresh = node_create(index, dci_node(index, id)->level);
    struct node *node = dci_node(index, id);
    for (uint32_t i = 0; i < n; i++) {
        moves[lanes[i]] = true;
    }
    uint32_t kept = 0;
    for (uint32_t lane = 0; lane < node->count; lane++) {
        dci_entry_read(index, node, lane, &entry);
        if (moves[lane]) {
            append(index, fresh, &entry);
        } else if (kept++ != lane) {
            dci_entry_write(index, node, kept - 1, &entry);
            dci_node(index, entry.child)->lane = kept - 1;
        }
    }
    for (uint32_t lane = kept; lane < node->count; lane++) {
        forget_lane(index, node, lane);
    }
    node->count = kept;
    trim(index, node);
    return fresh;
}

void dci_node_release(struct index *index, uint32_t id)
{
    dci_node(index, id)->level = 0; // to be told from a node in use
    dci_slab_release(&index->nodes, id);
}

void dci_root_create(struct index *index, const struct entry *entry)
{
    assert(index->root == TREE_NONE);
    index->root = node_create(index, dci_node(index, entry->child)->level + 1);
    append(index, index->root, entry);
}

static void replace_root(struct index *index, const struct entry *a, const struct entry *b)
{
    index->root = TREE_NONE;
    dci_root_create(index, a);
    append(index, index->root, b);
}

// Divides a full node and the entry that has no room in it; the new entry is number `count` of the vectors.
static void divide(struct index *index, uint32_t id, const struct entry *added, float *scratch)
{
    const uint32_t dim = index->head_dim, full = dci_node(index, id)->count;
    const float *anchors[TREE_NODE_MAX + 1];
    uint32_t order[TREE_NODE_MAX + 1];
    float values[TREE_NODE_MAX + 1];
    struct entry entry, kept_entry, fresh_entry;
    for (uint32_t lane = 0; lane <= full; lane++) {
        if (lane < full) {
            dci_entry_read(index, dci_node(index, id), lane, &entry);
        }
        dci_entry_anchor(index, lane < full ? &entry : added, scratch + (size_t)lane * dim);
        anchors[lane] = scratch + (size_t)lane * dim;
        order[lane] = lane;
    }
    int32_t norms2[TREE_NODE_MAX + 1];
    struct dci_members members = {.codes = (uint8_t *)(scratch + ((size_t)full + 1) * dim), .norms2 = norms2};
    dci_members_code(index, anchors, full + 1, index->base, &members);
    const struct dci_division division = {index, &members, order, values, index->digest ^ id};
    const uint32_t left = dci_divide(&division, 0, full + 1);
    bool added_moves = false;
    uint32_t moved[TREE_NODE_MAX + 1], count = 0;
    for (uint32_t i = left; i <= full; i++) {
        added_moves = added_moves || order[i] == full;
        if (order[i] != full) {
            moved[count++] = order[i];
        }
    }
    const uint32_t fresh = move_out(index, id, moved, count);
    append(index, added_moves ? fresh : id, added);
    summarise(index, id, anchors, order, left, &kept_entry);
    summarise(index, fresh, anchors, order + left, full + 1 - left, &fresh_entry);
    const struct node *node = dci_node(index, id);
    if (node->parent == TREE_NONE) {
        replace_root(index, &kept_entry, &fresh_entry);
        return;
    }
    dci_entry_write(index, dci_node(index, node->parent), node->lane, &kept_entry);
    dci_node_add(index, node->parent, &fresh_entry, scratch);
}

void dci_node_add(struct index *index, uint32_t parent, const struct entry *entry, float *scratch)
{
    if (dci_node(index, parent)->count < index->node_max) {
        append(index, parent, entry);
    } else {
        divide(index, parent, entry, scratch); // and so on upwards: as deep as the tree is high
    }
}

void dci_node_remove(struct index *index, uint32_t id)
{
    struct entry entry;
    const uint32_t parent = dci_node(index, id)->parent, lane = dci_node(index, id)->lane;
    assert(dci_node(index, id)->part_count == 0);
    dci_node_release(index, id);
    if (parent == TREE_NONE) {
        index->root = TREE_NONE;
        return;
    }
    struct node *node = dci_node(index, parent);
    const uint32_t last = node->count - 1;
    if (lane != last) {
        dci_entry_read(index, node, last, &entry);
        dci_entry_write(index, node, lane, &entry);
        dci_node(index, entry.child)->lane = lane;
    }
    forget_lane(index, node, last);
    node->count--;
    trim(index, node);
    if (node->count == 0) {
        dci_node_remove(index, parent); // as deep as the tree is high
    }
}
