// What the pieces of an image are made into, once they have been judged.
//
// Numbers are compared with their bounds; everything that is referred to exists and is referred to once. What can be
// worked out is worked out, not read. A node's level is one above its entries', and every node but the root gets
// exactly one parent, so that there is no circle. Keys are no larger than the header says, so that searches stay
// finite.
// Thread ownership: that of the index to be.
#include "index/load.h"

#include <float.h>

// ---- places and pages ----

// A token of head or tail makes its page an open one. Those of a block of tokens share one.
static bool accept_open_place(struct index_load *load, uint32_t position)
{
    struct index *index = load->index;
    const struct index_place place = dci_place_of(index, position);
    const uint32_t block = position / index->page_tokens;
    if (place.page >= index->page_bound || place.row != position % index->page_tokens) {
        return false;
    }
    struct page *page = dci_page(index, place.page);
    if (load->open_page != TREE_NONE && load->open_block == block) {
        return place.page == load->open_page;
    }
    if (page->state != PAGE_PLANNED) {
        return false;
    }
    *page = (struct page){.owner = position, .state = PAGE_OPEN};
    load->open_page = place.page;
    load->open_block = block;
    load->open_pages++;
    return true;
}

enum index_status dci_accept_places(struct index_load *load)
{
    struct index *index = load->index;
    const uint32_t first = load->item, end = first + (uint32_t)(load->bytes / sizeof(uint32_t));
    for (uint32_t p = first; p < end; p++) {
        if (*dci_place(index, p) == TREE_NONE) {
            continue;
        }
        if (p >= index->head && p < index->indexed) {
            load->live_places++; // the runs say whether it is right
        } else if (!accept_open_place(load, p)) {
            return INDEX_INVALID;
        }
    }
    load->item = end;
    return INDEX_OK;
}

enum index_status dci_accept_free_pages(struct index_load *load)
{
    struct index *index = load->index;
    const uint32_t count = (uint32_t)(load->bytes / sizeof(uint32_t));
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t id = load->staged.ids[i];
        if (id >= index->page_bound || dci_page(index, id)->state != PAGE_PLANNED) {
            return INDEX_INVALID;
        }
        *dci_page(index, id) = (struct page){.owner = TREE_NONE, .state = PAGE_FREE};
        *(load->last == TREE_NONE ? &index->free_page : &dci_page(index, load->last)->owner) = id;
        load->last = id;
    }
    load->item += count;
    return INDEX_OK;
}

// ---- nodes ----

static bool accept_cell(struct index_load *load, uint32_t id, const struct image_node *record)
{
    struct index *index = load->index;
    if (record->count < 1 || record->count > index->cell_max || record->part_count < 1 ||
        record->part_count > record->run_parts || record->run_parts > index->cell_parts ||
        !dci_is_size(record->spread2, FLT_MAX)) {
        return false;
    }
    for (uint32_t part = 0; part < record->part_count; part++) {
        const uint32_t page = record->parts[part];
        if (page >= index->page_bound || dci_page(index, page)->state != PAGE_PLANNED) {
            return false;
        }
        *dci_page(index, page) = (struct page){.owner = id, .part = (uint8_t)part, .state = PAGE_LEAF};
    }
    load->leaf_pages += record->part_count;
    return true;
}

static bool accept_upper(struct index_load *load, const struct image_node *record)
{
    const bool is_low = record->level == 2;
    const uint32_t bound = is_low ? load->header.cell_blocks.bound : load->header.node_blocks.bound;
    if (record->count < 1 || record->count > load->index->node_max ||
        record->part_count != (record->count + DCI_LANES - 1) / DCI_LANES || record->run_parts != 0 ||
        !dci_is_nothing(record->spread2)) {
        return false;
    }
    for (uint32_t part = 0; part < record->part_count; part++) {
        if (record->parts[part] >= bound) {
            return false;
        }
    }
    load->used_blocks[is_low ? 0 : 1] += record->part_count;
    return true;
}

static bool node_is_blank(const struct image_node *record)
{
    unsigned char bytes[sizeof *record];
    static const unsigned char blank[sizeof bytes];
    memcpy(bytes, record, sizeof bytes);
    return memcmp(bytes, blank, sizeof bytes) == 0;
}

enum index_status dci_accept_node(struct index_load *load)
{
    const struct image_node *record = &load->staged.node;
    const uint32_t id = load->item++;
    struct node *node = dci_node(load->index, id);
    *node = (struct node){.parent = TREE_NONE, .lane = TREE_NONE};
    if (record->level == 0) {
        return node_is_blank(record) ? INDEX_OK : INDEX_INVALID;
    }
    if (record->zero != 0 || record->level >= TREE_LEVELS_MAX || record->part_count > TREE_PARTS_MAX) {
        return INDEX_INVALID;
    }
    for (uint32_t part = record->part_count; part < TREE_PARTS_MAX; part++) {
        if (record->parts[part] != 0) {
            return INDEX_INVALID;
        }
    }
    if (!(record->level == 1 ? accept_cell(load, id, record) : accept_upper(load, record))) {
        return INDEX_INVALID;
    }
    load->used_nodes++;
    node->level = record->level;
    node->count = record->count;
    node->part_count = record->part_count;
    node->run_parts = record->run_parts;
    node->spread2 = record->spread2;
    memcpy(node->parts, record->parts, sizeof node->parts);
    return INDEX_OK;
}

// All nodes have come: every page is met, and so many blocks are as are used.
bool dci_nodes_are_right(const struct index_load *load)
{
    const struct image_header *header = &load->header;
    const struct index *index = load->index;
    return load->used_nodes == index->nodes.used && load->leaf_pages == header->leaf_pages &&
           (uint64_t)load->open_pages + header->pages.free + load->leaf_pages == header->pages.bound &&
           load->used_blocks[0] == index->cell_blocks.used && load->used_blocks[1] == index->node_blocks.used &&
           (index->root == TREE_NONE || dci_node(index, index->root)->level >= 2);
}

static struct dci_slab *listed_slab(struct index *index, enum image_section section)
{
    return section == IMAGE_FREE_NODES         ? &index->nodes
           : section == IMAGE_FREE_CELL_BLOCKS ? &index->cell_blocks
                                               : &index->node_blocks;
}

static bool is_free(const struct index *index, enum image_section section, uint32_t id)
{
    if (section == IMAGE_FREE_NODES) {
        return dci_node(index, id)->level == 0;
    }
    return dci_block(index, section == IMAGE_FREE_CELL_BLOCKS ? 2 : 3, id)->child[0] == TREE_NONE;
}

enum index_status dci_accept_free_ids(struct index_load *load)
{
    struct dci_slab *slab = listed_slab(load->index, load->section);
    const uint32_t count = (uint32_t)(load->bytes / sizeof(uint32_t));
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t id = load->staged.ids[i];
        if (id >= slab->bound || !is_free(load->index, load->section, id)) {
            return INDEX_INVALID;
        }
        if (load->last == TREE_NONE) {
            slab->free = id;
        } else {
            dci_slab_link_free(slab, load->last, id);
        }
        dci_slab_link_free(slab, id, TREE_NONE);
        load->last = id;
    }
    load->item += count;
    return INDEX_OK;
}

// Where an id was listed twice, what came between the two is not reached any more: the list is too short.
bool dci_free_ids_are_right(const struct index_load *load)
{
    const struct dci_slab *slab = listed_slab(load->index, load->section);
    uint32_t listed = 0;
    for (uint32_t id = slab->free; id != TREE_NONE && listed <= load->item; id = dci_slab_next_free(slab, id)) {
        listed++;
    }
    return listed == slab->bound - slab->used;
}

// ---- blocks ----

// The entry's child gets its parent, once.
static bool adopt(struct index_load *load, uint32_t owner, uint32_t lane, uint32_t id)
{
    const struct index *index = load->index;
    if (id >= index->nodes.bound || id == index->root) {
        return false;
    }
    struct node *child = dci_node(index, id);
    if (child->parent != TREE_NONE || child->level + 1 != dci_node(index, owner)->level || child->level == 0) {
        return false;
    }
    child->parent = owner;
    child->lane = lane;
    load->children++;
    return true;
}

// An anchor, and what its parent says of it.
static bool accept_entry(const struct index_load *load, const struct node *owner, uint32_t lane)
{
    const struct index *index = load->index;
    const float most = dci_norm2_most(load, LOAD_ANCHOR_MOST);
    float anchor[INDEX_HEAD_DIM_MAX];
    struct entry entry;
    dci_entry_read(index, owner, lane, &entry);
    if (!dci_is_size(entry.step, FLT_MAX) || !dci_is_size(entry.step * entry.step, most) ||
        !dci_is_size(entry.far, FLT_MAX)) {
        return false;
    }
    for (uint32_t i = 0; i < index->head_dim; i++) {
        anchor[i] = entry.step * (float)entry.codes[i];
    }
    entry.norm2 = index->kernel->dot(anchor, anchor, index->head_dim);
    entry.rows = 1.0f;
    entry.unit = entry.reach = 0.0f;
    if (owner->level == 2) {
        dci_cell_summarise(index, dci_node(index, entry.child), &entry);
    } else if (!dci_is_nothing(entry.far)) {
        return false;
    }
    dci_entry_write(index, owner, lane, &entry);
    return dci_is_size(entry.norm2, most);
}

static bool accept_used_block(struct index_load *load, uint32_t id, struct dci_block *block)
{
    const struct index *index = load->index;
    const struct image_block *record = &load->staged.block;
    const bool is_low = load->section == IMAGE_CELL_BLOCKS;
    if (record->owner >= index->nodes.bound) {
        return false;
    }
    const struct node *owner = dci_node(index, record->owner);
    uint32_t part = 0;
    while (part < owner->part_count && owner->parts[part] != id) {
        part++;
    }
    if (owner->level < 2 || (owner->level == 2) != is_low || part == owner->part_count) {
        return false;
    }
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        const uint32_t lane = part * DCI_LANES + i;
        if (lane >= owner->count) {
            if (block->child[i] != TREE_NONE || !dci_is_nothing(record->step[i]) || !dci_is_nothing(record->far[i])) {
                return false;
            }
        } else if (!adopt(load, record->owner, lane, block->child[i]) || !accept_entry(load, owner, lane)) {
            return false;
        }
    }
    return true;
}

enum index_status dci_accept_block(struct index_load *load)
{
    const struct image_block *record = &load->staged.block;
    if (load->piece == 0) {
        load->piece = 1;
        return INDEX_OK;
    }
    const uint32_t id = load->item++, level = load->section == IMAGE_CELL_BLOCKS ? 2 : 3;
    struct dci_block *block = dci_block(load->index, level, id);
    load->piece = 0;
    memset(block, 0, sizeof *block);
    memcpy(block->step, record->step, sizeof block->step);
    memcpy(block->far, record->far, sizeof block->far);
    memcpy(block->child, record->child, sizeof block->child);
    if (record->owner != TREE_NONE) {
        return accept_used_block(load, id, block) ? INDEX_OK : INDEX_INVALID;
    }
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        if (block->child[i] != TREE_NONE || !dci_is_nothing(block->step[i]) || !dci_is_nothing(block->far[i])) {
            return INDEX_INVALID;
        }
    }
    return INDEX_OK;
}

// All blocks have come: nobody but the root is without a parent.
bool dci_tree_is_right(const struct index_load *load)
{
    return load->children + (load->index->root == TREE_NONE ? 0 : 1) == load->used_nodes;
}

// ---- runs ----

// What a cell's rows add up to.
struct sums {
    float spread2, far2;
    uint32_t tokens;
};

static bool accept_row(const struct index_load *load, const struct node *cell, uint32_t part, uint32_t row,
                       struct sums *sums)
{
    const struct index *index = load->index;
    const struct dci_rows *rows = dci_rows_of(index, cell, part, row);
    const uint32_t position = rows->positions[row % DCI_LANES];
    if (!dci_is_size(dci_scale_widen(rows->scales[row % DCI_LANES]), FLT_MAX)) {
        return false;
    }
    if (position == TREE_NONE) {
        return true;
    }
    const float spread2 = dci_code_spread2(index, cell, part, row);
    sums->spread2 += spread2;
    sums->far2 = spread2 > sums->far2 ? spread2 : sums->far2;
    sums->tokens++;
    return row < index->page_tokens && position >= index->head && position < index->indexed &&
           *dci_place(index, position) == (cell->parts[part] << index->row_shift | row) &&
           dci_is_size(spread2, dci_norm2_most(load, LOAD_TOKEN_MOST));
}

// A cell's tokens are as many, and as far from its anchor, as was said.
static bool accept_rows(struct index_load *load, const struct node *cell)
{
    const struct index *index = load->index;
    struct sums sums = {0};
    for (uint32_t part = 0; part < cell->part_count; part++) {
        const uint32_t before = sums.tokens;
        for (uint32_t row = 0; row < index->page_blocks * DCI_LANES; row++) {
            if (!accept_row(load, cell, part, row, &sums)) {
                return false;
            }
        }
        if (sums.tokens == before) {
            return false;
        }
        dci_page(index, cell->parts[part])->rows = (uint16_t)(sums.tokens - before);
    }
    load->tokens += sums.tokens;
    struct entry entry;
    dci_entry_read(index, dci_node(index, cell->parent), cell->lane, &entry);
    const float unit = sqrtf(sums.spread2 / (float)sums.tokens) * index->inverse_root_dim;
    const float far = sqrtf(sums.far2) * index->inverse_root_dim;
    return sums.tokens == cell->count && dci_is_near(sums.spread2, cell->spread2) && dci_is_near(unit, entry.unit) &&
           dci_is_near(far, entry.far);
}

enum index_status dci_accept_run(struct index_load *load)
{
    if (load->piece == 0) {
        load->piece = 1;
        return INDEX_OK;
    }
    load->piece = 0;
    return accept_rows(load, dci_node(load->index, load->item++)) ? INDEX_OK : INDEX_INVALID;
}

// ---- tail ----

enum index_status dci_accept_tail(struct index_load *load)
{
    const struct index *index = load->index;
    if (load->piece == 0) {
        load->piece = 1;
        return INDEX_OK;
    }
    const uint32_t first = load->item++ * DCI_LANES;
    struct dci_block *block = dci_tail_block(index, first);
    memset(block, 0, sizeof *block);
    memset(block->child, 0xff, sizeof block->child);
    load->piece = 0;
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        const float step = load->staged.steps[lane];
        const bool is_live = dci_image_is_live(index, first + lane);
        uint32_t size2 = 0;
        for (uint32_t i = 0; i < index->head_dim; i++) {
            const int32_t code = block->codes[((size_t)i / 4 * DCI_LANES + lane) * 4 + i % 4] - DCI_CODE_ZERO;
            size2 += (uint32_t)(code * code);
        }
        const float most = is_live ? dci_norm2_most(load, LOAD_TAIL_MOST) : 0.0f;
        if (!dci_is_size(step, FLT_MAX) || !dci_is_size(step * step, most) ||
            !dci_is_size(step * step * (float)size2, most) || (!is_live && (size2 != 0 || !dci_is_nothing(step)))) {
            return INDEX_INVALID;
        }
        block->step[lane] = step;
        block->rows[lane] = is_live ? 1.0f : 0.0f;
    }
    return INDEX_OK;
}
