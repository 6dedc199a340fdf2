// An index from bytes, in the layout of image.h (version IMAGE_VERSION): little-endian, of fixed width, without padding
// and without pointers.
//
// The bytes are not trusted. Each piece is copied to where it belongs and judged as soon as it is whole, before
// anything is made of it (accept.c). Sizes are those of the header, which must add up to the image's bytes before
// memory is taken.
// Invariant: until all pieces have been accepted nobody sees the index, and nothing looks at what has not come.
// Thread ownership: that of the index to be.
#include "index/load.h"

#define PLACES_AT_ONCE 256u // a chunk of their store holds a multiple

// ---- header ----

static bool header_is_right(const struct index_load *load)
{
    const struct image_header *header = &load->header;
    const struct index *index = load->index;
    const bool is_ours = header->magic == IMAGE_MAGIC && header->version == IMAGE_VERSION &&
                         header->head_dim == index->head_dim && header->page_tokens == index->page_tokens &&
                         header->dtype == (uint32_t)index->dtype && header->policy == (uint32_t)index->policy &&
                         header->node_max == index->node_max && header->seed == index->seed &&
                         header->is_continuation == (index->head == 0 ? 1 : 0);
    const bool has_tree = header->root != TREE_NONE;
    return is_ours && header->image_bytes == load->left && header->length <= INDEX_TOKENS_MAX &&
           header->indexed <= header->length && (header->indexed == 0 || header->indexed > index->head) &&
           header->ragged <= 1 && header->sealed <= 1 && dci_is_size(header->norm2_max, TREE_NORM2_MAX) &&
           dci_is_size(header->tree_norm2_max, dci_norm2_most(load, LOAD_BASE_MOST)) &&
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
    for (uint32_t id = 0; slab == &index->nodes && id < ids->bound; id++) {
        dci_node(index, id)->level = 0; // not met yet; whoever drops the load looks for cells' runs
    }
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
    index->sealed = header->sealed != 0;
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
    const float most = dci_norm2_most(load, LOAD_BASE_MOST);
    for (uint32_t i = 0; i < index->head_dim; i++) {
        if (!dci_is_size(index->base[i] * index->base[i], most) || (has_none && !dci_is_nothing(index->base[i]))) {
            return INDEX_INVALID;
        }
    }
    return dci_is_size(index->kernel->dot(index->base, index->base, index->head_dim), most) ? INDEX_OK : INDEX_INVALID;
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
    await(load, load->staged.ids, (left < LOAD_IDS_AT_ONCE ? left : LOAD_IDS_AT_ONCE) * sizeof(uint32_t));
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
    cell->run = dci_run_acquire(index, cell->run_parts);
    if (cell->run == NULL) {
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
        return dci_accept_places(load);
    case IMAGE_FREE_PAGES:
        return dci_accept_free_pages(load);
    case IMAGE_NODES:
        return dci_accept_node(load);
    case IMAGE_CELL_BLOCKS:
    case IMAGE_NODE_BLOCKS:
        return dci_accept_block(load);
    case IMAGE_RUNS:
        return dci_accept_run(load);
    case IMAGE_TAIL:
        return dci_accept_tail(load);
    default:
        return dci_accept_free_ids(load);
    }
}

// Is a section right as a whole?
static bool section_is_right(struct index_load *load)
{
    switch (load->section) {
    case IMAGE_NODES:
        return dci_nodes_are_right(load);
    case IMAGE_FREE_NODES:
    case IMAGE_FREE_CELL_BLOCKS:
        return dci_free_ids_are_right(load);
    case IMAGE_FREE_NODE_BLOCKS:
        return dci_free_ids_are_right(load) && dci_tree_is_right(load);
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
