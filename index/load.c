// An index from bytes, in the layout of image.h (version IMAGE_VERSION): little-endian, of fixed width, without padding
// and without pointers.
//
// The bytes are not trusted. Each piece is copied to where it belongs and judged as soon as it is whole, before
// anything is made of it: numbers are compared with their bounds, and everything that is referred to exists and is
// referred to once. What can be worked out is worked out, not read. A node's level is one above its entries', and every
// node but the root gets exactly one parent, so that there is no circle. Sizes are those of the header, which must add
// up to the image's bytes before memory is taken. Keys are no larger than the header says, so that searches stay
// finite.
// Invariant: until all pieces have been accepted nobody sees the index, and nothing looks at what has not come.
// Thread ownership: that of the index to be.
#include "index/image.h"

#include <float.h>

#define PLACES_AT_ONCE 256u
#define IDS_AT_ONCE    32u

// What codes stand for may be longer than the keys, whose norms squared are M at most. An anchor lies within 2 |M| of
// the base and 6% beside what was coded; a token's code is at most half as long again as what it codes. Twice that.
#define BASE_MOST   1.1f
#define TAIL_MOST   1.5f
#define ANCHOR_MOST 8.0f
#define TOKEN_MOST  32.0f
#define NORM2_LEAST 1.0e-30f // rounding near 0

struct index_load {
    struct index *index;
    enum index_status status;
    uint64_t left;
    enum image_section section;
    uint32_t item, piece;
    unsigned char *into; // the piece under way
    size_t bytes, got;
    struct image_header header;

    uint32_t open_page, open_block;   // the open page met last, and whose it is
    uint32_t open_pages, live_places; // met so far: open pages; places of clustered tokens
    uint32_t leaf_pages, used_nodes, children, used_blocks[2];
    uint32_t tokens; // clustered, met in runs
    uint32_t last;   // of a list of ids
    union {
        uint32_t ids[IDS_AT_ONCE];
        struct image_node node;
        struct image_block block;
        float steps[DCI_LANES];
    } staged;
};

static bool is_size(float x, float most)
{
    return x >= 0.0f && x <= most; // not when it is NaN
}

static bool is_nothing(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == 0; // neither next to it nor -0
}

static float norm2_most(const struct index_load *load, float factor)
{
    return factor * load->header.norm2_max + NORM2_LEAST;
}

// ---- header ----

static bool header_is_right(const struct index_load *load)
{
    const struct image_header *header = &load->header;
    const struct index *index = load->index;
    const bool is_ours = header->magic == IMAGE_MAGIC && header->version == IMAGE_VERSION &&
                         header->head_dim == index->head_dim && header->page_tokens == index->page_tokens &&
                         header->dtype == (uint32_t)index->dtype && header->policy == (uint32_t)index->policy &&
                         header->node_max == index->node_max && header->seed == index->seed;
    const bool has_tree = header->root != TREE_NONE;
    return is_ours && header->image_bytes == load->left && header->length <= INDEX_TOKENS_MAX &&
           header->indexed <= header->length && (header->indexed == 0 || header->indexed > index->head) &&
           header->ragged <= 1 && is_size(header->norm2_max, TREE_NORM2_MAX) &&
           is_size(header->tree_norm2_max, norm2_most(load, BASE_MOST)) &&
           header->pages.bound <= TREE_NONE >> index->row_shift && header->pages.free <= header->pages.bound &&
           header->nodes.free <= header->nodes.bound && header->cell_blocks.free <= header->cell_blocks.bound &&
           header->node_blocks.free <= header->node_blocks.bound &&
           has_tree == (header->nodes.free < header->nodes.bound) && (!has_tree || header->root < header->nodes.bound);
}

static bool slab_begin(struct index *index, struct dci_slab *slab, const struct image_ids *ids)
{
    if (!dci_store_reserve(&slab->store, &index->memory, ids->bound)) {
        return false;
    }
    slab->bound = ids->bound;
    slab->used = ids->bound - ids->free;
    return true;
}

static bool tail_begin(struct index *index)
{
    const uint32_t begin = index->indexed / DCI_LANES;
    const uint32_t end = index->length > index->indexed ? dci_image_tail_end(index) : begin;
    return dci_store_reserve_around(&index->tail, &index->memory, dci_image_head_end(index), begin,
                                    end > begin ? end : 0);
}

static enum index_status accept_header(struct index_load *load)
{
    struct index *index = load->index;
    const struct image_header *header = &load->header;
    if (!header_is_right(load)) {
        return INDEX_INVALID;
    }
    index->length = header->length;
    index->indexed = header->indexed;
    // Each page is free, or has a token whose place says so; so is known how much memory they can take.
    if (dci_image_bytes(index, header) != header->image_bytes ||
        header->pages.bound - header->pages.free > header->length) {
        return INDEX_INVALID;
    }
    index->root = header->root;
    index->mended = header->mended;
    index->ragged = header->ragged != 0;
    index->digest = header->digest;
    index->norm2_max = header->norm2_max;
    index->tree_norm2_max = header->tree_norm2_max;
    index->leaf_pages = header->leaf_pages;
    if (!dci_store_reserve(&index->places, &index->memory, header->length) ||
        !dci_store_reserve(&index->pages, &index->memory, header->pages.bound) ||
        !slab_begin(index, &index->nodes, &header->nodes) ||
        !slab_begin(index, &index->cell_blocks, &header->cell_blocks) ||
        !slab_begin(index, &index->node_blocks, &header->node_blocks) || !tail_begin(index)) {
        return INDEX_NO_MEMORY;
    }
    index->page_bound = header->pages.bound;
    for (uint32_t id = 0; id < index->page_bound; id++) {
        *dci_page(index, id) = (struct page){.owner = TREE_NONE, .state = PAGE_PLANNED}; // not met yet
    }
    return INDEX_OK;
}

static enum index_status accept_base(struct index_load *load)
{
    const struct index *index = load->index;
    const bool has_none = index->root == TREE_NONE || index->policy == INDEX_PROMOTION;
    const float most = norm2_most(load, BASE_MOST);
    for (uint32_t i = 0; i < index->head_dim; i++) {
        if (!is_size(index->base[i] * index->base[i], most) || (has_none && !is_nothing(index->base[i]))) {
            return INDEX_INVALID;
        }
    }
    return is_size(index->kernel->dot(index->base, index->base, index->head_dim), most) ? INDEX_OK : INDEX_INVALID;
}

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

static enum index_status accept_places(struct index_load *load)
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

static enum index_status accept_free_pages(struct index_load *load)
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
        !is_size(record->spread2, FLT_MAX)) {
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
        !is_nothing(record->spread2)) {
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

static enum index_status accept_node(struct index_load *load)
{
    const struct image_node *record = &load->staged.node, nothing = {0};
    const uint32_t id = load->item++;
    struct node *node = dci_node(load->index, id);
    *node = (struct node){.parent = TREE_NONE, .lane = TREE_NONE};
    if (record->level == 0) {
        return memcmp(record, &nothing, sizeof nothing) == 0 ? INDEX_OK : INDEX_INVALID;
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
static bool nodes_are_right(const struct index_load *load)
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

static enum index_status accept_free_ids(struct index_load *load)
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
static bool free_ids_are_right(const struct index_load *load)
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
    const float most = norm2_most(load, ANCHOR_MOST);
    float anchor[INDEX_HEAD_DIM_MAX];
    struct entry entry;
    dci_entry_read(index, owner, lane, &entry);
    if (!is_size(entry.step, FLT_MAX) || !is_size(entry.step * entry.step, most) || !is_size(entry.far, FLT_MAX)) {
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
    } else if (!is_nothing(entry.far)) {
        return false;
    }
    dci_entry_write(index, owner, lane, &entry);
    return is_size(entry.norm2, most);
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
            if (block->child[i] != TREE_NONE || !is_nothing(record->step[i]) || !is_nothing(record->far[i])) {
                return false;
            }
        } else if (!adopt(load, record->owner, lane, block->child[i]) || !accept_entry(load, owner, lane)) {
            return false;
        }
    }
    return true;
}

static enum index_status accept_block(struct index_load *load)
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
        if (block->child[i] != TREE_NONE || !is_nothing(block->step[i]) || !is_nothing(block->far[i])) {
            return INDEX_INVALID;
        }
    }
    return INDEX_OK;
}

// All blocks have come: nobody but the root is without a parent.
static bool tree_is_right(const struct index_load *load)
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
    if (!is_size(dci_scale_widen(rows->scales[row % DCI_LANES]), FLT_MAX)) {
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
           is_size(spread2, norm2_most(load, TOKEN_MOST));
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

static enum index_status accept_run(struct index_load *load)
{
    if (load->piece == 0) {
        load->piece = 1;
        return INDEX_OK;
    }
    load->piece = 0;
    return accept_rows(load, dci_node(load->index, load->item++)) ? INDEX_OK : INDEX_INVALID;
}

// ---- tail ----

static enum index_status accept_tail(struct index_load *load)
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
        const float most = is_live ? norm2_most(load, TAIL_MOST) : 0.0f;
        if (!is_size(step, FLT_MAX) || !is_size(step * step, most) || !is_size(step * step * (float)size2, most) ||
            (!is_live && (size2 != 0 || !is_nothing(step)))) {
            return INDEX_INVALID;
        }
        block->step[lane] = step;
        block->rows[lane] = is_live ? 1.0f : 0.0f;
    }
    return INDEX_OK;
}

// ---- pieces ----

static void await(struct index_load *load, void *into, size_t bytes)
{
    load->into = into;
    load->bytes = bytes;
    load->got = 0;
}

static void await_ids(struct index_load *load, uint32_t count)
{
    const uint32_t left = count - load->item;
    await(load, load->staged.ids, (left < IDS_AT_ONCE ? left : IDS_AT_ONCE) * sizeof(uint32_t));
}

static void await_block(struct index_load *load, uint32_t bound)
{
    if (load->item == bound) {
        return;
    }
    if (load->piece == 0) {
        await(load, &load->staged.block, sizeof load->staged.block);
    } else {
        const uint32_t level = load->section == IMAGE_CELL_BLOCKS ? 2 : 3;
        await(load, dci_block(load->index, level, load->item)->codes, dci_image_codes_bytes(load->index));
    }
}

static enum index_status await_run(struct index_load *load)
{
    struct index *index = load->index;
    while (load->item < index->nodes.bound && dci_node(index, load->item)->level != 1) {
        load->item++;
    }
    if (load->item == index->nodes.bound) {
        return INDEX_OK;
    }
    struct node *cell = dci_node(index, load->item);
    if (load->piece == 1) {
        await(load, dci_lows(index, cell, 0), dci_image_lows_bytes(index, cell->part_count));
        return INDEX_OK;
    }
    if (!dci_slab_acquire(&index->runs[cell->run_parts - 1], &index->memory, &cell->run)) {
        return INDEX_NO_MEMORY;
    }
    await(load, dci_rows(index, cell, 0), dci_image_tops_bytes(index, cell->part_count));
    return INDEX_OK;
}

static void await_tail(struct index_load *load)
{
    const struct index *index = load->index;
    if (load->item == dci_image_head_end(index)) {
        load->item = dci_image_tail_begin(index);
    }
    if (load->item == dci_image_tail_end(index)) {
        return;
    }
    if (load->piece == 0) {
        await(load, load->staged.steps, sizeof load->staged.steps);
    } else {
        await(load, dci_tail_block(index, load->item * DCI_LANES)->codes, dci_image_codes_bytes(index));
    }
}

static void await_places(struct index_load *load)
{
    const uint32_t left = load->header.length - load->item;
    if (left > 0) {
        await(load, dci_place(load->index, load->item),
              (left < PLACES_AT_ONCE ? left : PLACES_AT_ONCE) * sizeof(uint32_t));
    }
}

// Names the next piece of the section; none: there is none left.
static enum index_status await_piece(struct index_load *load)
{
    const struct image_header *header = &load->header;
    await(load, NULL, 0);
    switch (load->section) {
    case IMAGE_HEADER:
        await(load, &load->header, load->item == 0 ? sizeof load->header : 0);
        break;
    case IMAGE_BASE:
        await(load, load->index->base, load->item == 0 ? load->index->head_dim * sizeof(float) : 0);
        break;
    case IMAGE_PLACES:
        await_places(load);
        break;
    case IMAGE_FREE_PAGES:
        await_ids(load, header->pages.free);
        break;
    case IMAGE_NODES:
        await(load, &load->staged.node, load->item < header->nodes.bound ? sizeof load->staged.node : 0);
        break;
    case IMAGE_FREE_NODES:
        await_ids(load, header->nodes.free);
        break;
    case IMAGE_CELL_BLOCKS:
        await_block(load, header->cell_blocks.bound);
        break;
    case IMAGE_FREE_CELL_BLOCKS:
        await_ids(load, header->cell_blocks.free);
        break;
    case IMAGE_NODE_BLOCKS:
        await_block(load, header->node_blocks.bound);
        break;
    case IMAGE_FREE_NODE_BLOCKS:
        await_ids(load, header->node_blocks.free);
        break;
    case IMAGE_RUNS:
        return await_run(load);
    case IMAGE_TAIL:
        await_tail(load);
        break;
    default:
        break;
    }
    return INDEX_OK;
}

static enum index_status accept_piece(struct index_load *load)
{
    switch (load->section) {
    case IMAGE_HEADER:
        load->item++;
        return accept_header(load);
    case IMAGE_BASE:
        load->item++;
        return accept_base(load);
    case IMAGE_PLACES:
        return accept_places(load);
    case IMAGE_FREE_PAGES:
        return accept_free_pages(load);
    case IMAGE_NODES:
        return accept_node(load);
    case IMAGE_CELL_BLOCKS:
    case IMAGE_NODE_BLOCKS:
        return accept_block(load);
    case IMAGE_RUNS:
        return accept_run(load);
    case IMAGE_TAIL:
        return accept_tail(load);
    default:
        return accept_free_ids(load);
    }
}

// Is a section right as a whole?
static bool section_is_right(struct index_load *load)
{
    switch (load->section) {
    case IMAGE_NODES:
        return nodes_are_right(load);
    case IMAGE_FREE_NODES:
    case IMAGE_FREE_CELL_BLOCKS:
        return free_ids_are_right(load);
    case IMAGE_FREE_NODE_BLOCKS:
        return free_ids_are_right(load) && tree_is_right(load);
    case IMAGE_RUNS:
        load->index->tokens = load->tokens;
        return load->tokens == load->live_places;
    default:
        return true;
    }
}

// Goes on to the next piece that has bytes, through sections that have none.
static enum index_status advance(struct index_load *load)
{
    while (load->section < IMAGE_END) {
        const enum index_status status = await_piece(load);
        if (status != INDEX_OK || load->bytes > 0) {
            return status;
        }
        if (!section_is_right(load)) {
            return INDEX_INVALID;
        }
        load->section++;
        load->item = load->piece = 0;
        load->last = TREE_NONE;
    }
    return INDEX_OK;
}

enum index_status index_load_begin(const struct index_params *params, const struct index_allocator *allocator,
                                   uint64_t image_bytes, struct index_load **out)
{
    struct index *index;
    const enum index_status status = index_create(params, allocator, &index);
    if (status != INDEX_OK) {
        return status;
    }
    struct index_load *load = allocator->acquire(allocator->owner, sizeof *load);
    if (load == NULL || image_bytes < sizeof(struct image_header)) {
        allocator->release(allocator->owner, load, sizeof *load);
        index_destroy(index);
        return load == NULL ? INDEX_NO_MEMORY : INDEX_INVALID;
    }
    *load = (struct index_load){.index = index, .left = image_bytes, .open_page = TREE_NONE, .last = TREE_NONE};
    await(load, &load->header, sizeof load->header);
    *out = load;
    return INDEX_OK;
}

enum index_status index_load_feed(struct index_load *load, const void *bytes, size_t n)
{
    const unsigned char *from = bytes;
    while (load->status == INDEX_OK && n > 0) {
        if (load->section == IMAGE_END) {
            load->status = INDEX_INVALID; // more than was announced
            break;
        }
        const size_t wanted = load->bytes - load->got, taken = n < wanted ? n : wanted;
        memcpy(load->into + load->got, from, taken);
        load->got += taken;
        from += taken;
        n -= taken;
        if (load->got == load->bytes) {
            load->status = accept_piece(load);
            load->status = load->status == INDEX_OK ? advance(load) : load->status;
        }
    }
    return load->status;
}

void index_load_drop(struct index_load *load)
{
    if (load != NULL) {
        const struct index_allocator allocator = load->index->memory.allocator;
        index_destroy(load->index);
        allocator.release(allocator.owner, load, sizeof *load);
    }
}

enum index_status index_load_finish(struct index_load *load, struct index **out)
{
    const enum index_status status =
        load->status == INDEX_OK && load->section != IMAGE_END ? INDEX_INVALID : load->status;
    if (status != INDEX_OK) {
        index_load_drop(load);
        return status;
    }
    const struct index_allocator allocator = load->index->memory.allocator;
    *out = load->index;
    allocator.release(allocator.owner, load, sizeof *load);
    return INDEX_OK;
}
