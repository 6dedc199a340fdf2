// An index into bytes, in the layout of image.h (version IMAGE_VERSION): little-endian, of fixed width, without padding
// and without pointers.
//
// The save is a cursor over pieces: a piece lies in the index's own memory, or is put together in the cursor. Nothing
// of a running build is told: its nodes and pages are written as the free ids that they become when it is discarded.
// What no one looks at (lanes without a token, free blocks) is written as nothing, so that equal indexes give equal
// bytes. Thread ownership: the index's.
#include "index/batch.h"
#include "index/image.h"

#include <string.h>

#define PLACES_AT_ONCE 256u // a chunk of their store holds a multiple
#define IDS_AT_ONCE    32u
#define GROUP_BYTES    64u // codes of four coordinates of a block

static_assert(sizeof(((struct index_save *)0)->scratch) >= sizeof(struct image_header) &&
                  sizeof(((struct index_save *)0)->scratch) >= sizeof(struct image_block) &&
                  sizeof(((struct index_save *)0)->scratch) >= IDS_AT_ONCE * sizeof(uint32_t),
              "a piece fits");

static uint32_t drafts_of(const struct index *index)
{
    return index->batch == NULL ? 0 : index->batch->draft_count;
}

static uint32_t planned_pages_of(const struct index *index)
{
    return index->batch == NULL ? 0 : index->batch->new_pages.count;
}

// Is a node part of the tree? Not so a free one, and what a running build has made.
static bool is_in_tree(const struct index *index, uint32_t id)
{
    const struct node *node = dci_node(index, id);
    return node->level > 0 && (node->parent != TREE_NONE || id == index->root);
}

static uint32_t free_pages(const struct index *index)
{
    uint32_t count = planned_pages_of(index);
    for (uint32_t id = index->free_page; id != TREE_NONE; id = dci_page(index, id)->owner) {
        count++;
    }
    return count;
}

static struct image_ids ids_of(const struct dci_slab *slab, uint32_t drafts)
{
    return (struct image_ids){slab->bound, slab->bound - slab->used + drafts};
}

static void header_init(const struct index *index, struct image_header *header)
{
    assert(!index->preparing);
    *header = (struct image_header){
        .magic = IMAGE_MAGIC,
        .seed = index->seed,
        .digest = index->digest,
        .version = IMAGE_VERSION,
        .head_dim = index->head_dim,
        .page_tokens = index->page_tokens,
        .dtype = (uint32_t)index->dtype,
        .policy = (uint32_t)index->policy,
        .node_max = index->node_max,
        .length = index->length,
        .indexed = index->indexed,
        .root = index->root,
        .mended = index->mended,
        .ragged = index->ragged ? 1 : 0,
        .leaf_pages = index->leaf_pages,
        .is_continuation = index->head == 0 ? 1 : 0,
        .sealed = index->sealed ? 1 : 0,
        .pages = {index->page_bound, free_pages(index)},
        .nodes = ids_of(&index->nodes, drafts_of(index)),
        .cell_blocks = ids_of(&index->cell_blocks, 0),
        .node_blocks = ids_of(&index->node_blocks, 0),
        .norm2_max = index->norm2_max,
        .tree_norm2_max = index->batch == NULL ? index->tree_norm2_max : index->batch->norm2_max,
    };
    header->image_bytes = dci_image_bytes(index, header);
}

uint64_t index_image_bytes(const struct index *index)
{
    struct image_header header;
    header_init(index, &header);
    return header.image_bytes;
}

// ---- pieces: each function names the next one of its section, or says that there is none left ----

static bool give(struct index_save *save, const void *from, size_t bytes)
{
    save->from = from;
    save->from_bytes = bytes;
    return true;
}

static bool give_header(struct index_save *save)
{
    struct image_header header;
    if (save->item++ > 0) {
        return false;
    }
    header_init(save->index, &header);
    memcpy(save->scratch, &header, sizeof header);
    return give(save, save->scratch, sizeof header);
}

static bool give_base(struct index_save *save)
{
    static const float nothing[INDEX_HEAD_DIM_MAX];
    const struct index *index = save->index;
    // Without a tree there is none, though a voided build may have left one.
    return save->item++ == 0 &&
           give(save, index->root == TREE_NONE ? nothing : index->base, index->head_dim * sizeof(float));
}

static bool give_places(struct index_save *save)
{
    const uint32_t first = save->item, left = save->index->length - first;
    const uint32_t count = left < PLACES_AT_ONCE ? left : PLACES_AT_ONCE;
    save->item += count;
    return count > 0 && give(save, dci_place(save->index, first), count * sizeof(uint32_t));
}

// Free ids of a slab, or of pages: those that a running build has taken come first, as they do when it is discarded.
static bool give_ids(struct index_save *save, const struct dci_slab *slab, uint32_t taken)
{
    const struct index *index = save->index;
    const bool are_pages = save->section == IMAGE_FREE_PAGES;
    uint32_t count = 0;
    if (save->item == 0) {
        save->link = are_pages ? index->free_page : slab->free;
    }
    for (; count < IDS_AT_ONCE && (save->item < taken || save->link != TREE_NONE); count++, save->item++) {
        uint32_t *out = &save->scratch[count];
        if (save->item < taken) {
            *out = are_pages ? index->batch->new_pages.items[save->item] : dci_draft(index->batch, save->item)->node;
        } else {
            *out = save->link;
            save->link = are_pages ? dci_page(index, *out)->owner : dci_slab_next_free(slab, *out);
        }
    }
    return count > 0 && give(save, save->scratch, count * sizeof(uint32_t));
}

static bool give_free_pages(struct index_save *save)
{
    return give_ids(save, NULL, planned_pages_of(save->index));
}

static bool give_free_nodes(struct index_save *save)
{
    return give_ids(save, &save->index->nodes, drafts_of(save->index));
}

static bool give_free_cell_blocks(struct index_save *save)
{
    return give_ids(save, &save->index->cell_blocks, 0);
}

static bool give_free_node_blocks(struct index_save *save)
{
    return give_ids(save, &save->index->node_blocks, 0);
}

static bool give_nodes(struct index_save *save)
{
    const uint32_t id = save->item++;
    struct image_node record = {0};
    if (id == save->index->nodes.bound) {
        return false;
    }
    if (is_in_tree(save->index, id)) {
        const struct node *node = dci_node(save->index, id);
        record = (struct image_node){
            .level = (uint8_t)node->level,
            .part_count = (uint8_t)node->part_count,
            .run_parts = node->level == 1 ? (uint8_t)node->run_parts : 0,
            .count = node->count,
            .spread2 = node->level == 1 ? node->spread2 : 0.0f,
        };
        memcpy(record.parts, node->parts, node->part_count * sizeof node->parts[0]);
    }
    memcpy(save->scratch, &record, sizeof record);
    return give(save, save->scratch, sizeof record);
}

static bool give_blocks(struct index_save *save)
{
    const struct index *index = save->index;
    const uint32_t level = save->section == IMAGE_CELL_BLOCKS ? 2 : 3; // or above
    const struct dci_slab *slab = level == 2 ? &index->cell_blocks : &index->node_blocks;
    if (save->item == slab->bound) {
        return false;
    }
    const struct dci_block *block = dci_block(index, level, save->item);
    if (save->piece == 1) {
        save->piece = 0;
        save->item++;
        return give(save, block->codes, dci_image_codes_bytes(index));
    }
    const bool is_free = block->child[0] == TREE_NONE;
    struct image_block record = {.owner = is_free ? TREE_NONE : dci_node(index, block->child[0])->parent};
    if (!is_free) { // the first bytes of a free one are a link
        memcpy(record.step, block->step, sizeof record.step);
        memcpy(record.far, block->far, sizeof record.far);
    }
    memcpy(record.child, block->child, sizeof record.child);
    memcpy(save->scratch, &record, sizeof record);
    save->piece = 1;
    return give(save, save->scratch, sizeof record);
}

static bool give_runs(struct index_save *save)
{
    const struct index *index = save->index;
    while (save->item < index->nodes.bound &&
           (!is_in_tree(index, save->item) || dci_node(index, save->item)->level != 1)) {
        save->item++;
    }
    if (save->item == index->nodes.bound) {
        return false;
    }
    const struct node *cell = dci_node(index, save->item);
    if (save->piece == 0) {
        save->piece = 1;
        return give(save, dci_rows(index, cell, 0), dci_image_tops_bytes(index, cell->part_count));
    }
    save->piece = 0;
    save->item++;
    return give(save, dci_lows(index, cell, 0), dci_image_lows_bytes(index, cell->part_count));
}

// Lanes of a block of neighbours that hold a token.
static uint32_t live_lanes(const struct index *index, uint32_t block)
{
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        lanes |= dci_image_is_live(index, block * DCI_LANES + lane) ? 1u << lane : 0;
    }
    return lanes;
}

// Codes of a block that does not hold a token in every lane, four coordinates at a time.
static bool give_live_codes(struct index_save *save, const struct dci_block *block, uint32_t live)
{
    const uint8_t *codes = block->codes + (size_t)(save->piece - 1) * GROUP_BYTES;
    uint8_t *out = (uint8_t *)save->scratch;
    memset(out, DCI_CODE_ZERO, GROUP_BYTES);
    for (; live != 0; live &= live - 1) {
        const uint32_t lane = (uint32_t)__builtin_ctz(live);
        memcpy(out + (size_t)4 * lane, codes + (size_t)4 * lane, 4);
    }
    return give(save, out, GROUP_BYTES);
}

static bool give_tail(struct index_save *save)
{
    const struct index *index = save->index;
    if (save->item == dci_image_head_end(index)) {
        save->item = dci_image_tail_begin(index);
    }
    if (save->item == dci_image_tail_end(index)) {
        return false;
    }
    const struct dci_block *block = dci_tail_block(index, save->item * DCI_LANES);
    const uint32_t live = live_lanes(index, save->item), all = (1u << DCI_LANES) - 1, groups = index->head_dim / 4;
    if (save->piece == 0) {
        float steps[DCI_LANES];
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            steps[lane] = (live >> lane & 1) != 0 ? block->step[lane] : 0.0f;
        }
        memcpy(save->scratch, steps, sizeof steps);
        save->piece = 1;
        return give(save, save->scratch, sizeof steps);
    }
    const bool is_whole = live == all;
    const bool given =
        is_whole ? give(save, block->codes, dci_image_codes_bytes(index)) : give_live_codes(save, block, live);
    if (is_whole || save->piece++ == groups) {
        save->piece = 0;
        save->item++;
    }
    return given;
}

typedef bool giver(struct index_save *save);
static giver *const givers[IMAGE_END] = {
    [IMAGE_HEADER] = give_header,      [IMAGE_BASE] = give_base,
    [IMAGE_PLACES] = give_places,      [IMAGE_FREE_PAGES] = give_free_pages,
    [IMAGE_NODES] = give_nodes,        [IMAGE_FREE_NODES] = give_free_nodes,
    [IMAGE_CELL_BLOCKS] = give_blocks, [IMAGE_FREE_CELL_BLOCKS] = give_free_cell_blocks,
    [IMAGE_NODE_BLOCKS] = give_blocks, [IMAGE_FREE_NODE_BLOCKS] = give_free_node_blocks,
    [IMAGE_RUNS] = give_runs,          [IMAGE_TAIL] = give_tail,
};

void index_save_begin(const struct index *index, struct index_save *save)
{
    *save = (struct index_save){.index = index, .left = index_image_bytes(index), .digest = index->digest};
}

size_t index_save_step(struct index_save *save, void *out, size_t room)
{
    size_t done = 0;
    assert(!save->index->preparing && save->index->digest == save->digest);
    while (done < room && save->section < IMAGE_END) {
        if (save->from_bytes == 0) {
            if (!givers[save->section](save)) {
                save->section++;
                save->item = save->piece = 0;
                save->from_bytes = 0;
            }
            continue;
        }
        const size_t bytes = save->from_bytes < room - done ? save->from_bytes : room - done;
        memcpy((unsigned char *)out + done, save->from, bytes);
        save->from += bytes;
        save->from_bytes -= bytes;
        done += bytes;
    }
    assert(done <= save->left);
    save->left -= done;
    assert(save->section < IMAGE_END || save->left == 0);
    return done;
}
