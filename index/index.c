// An index: creation, destruction, and what can be asked of it at any time.
//
// Invariant: everything a caller sees (lengths, places, pages, tree) changes only in index_append_commit and
// index_plan_commit. Thread ownership: an index belongs to one thread.
#include "index/tree.h"

#include <math.h>
#include <string.h>

#define PAGE_TOKENS_DEFAULT 16u
#define FANOUT_DEFAULT      32u
#define FANOUT_MAX          64u
#define FANOUT_MIN          8u
// Entries of a node with the default policy, and tokens of a cell as far as whole pages allow. Nodes are divided when
// they are full, so they hold two thirds of it on average.
#define NODE_ENTRIES 128u
#define TAIL_SHIFT   2u
#define PLACES_SHIFT 8u
#define PAGES_SHIFT  6u
#define NODES_SHIFT  4u
#define BLOCKS_SHIFT 2u

static bool params_are_valid(const struct index_params *params)
{
    const float ratio = params->promotion_ratio;
    return params->head_dim > 0 && params->head_dim <= INDEX_HEAD_DIM_MAX &&
           params->head_dim % INDEX_HEAD_DIM_STEP == 0 && params->dtype >= INDEX_BF16 && params->dtype <= INDEX_FP32 &&
           params->page_tokens <= INDEX_PAGE_TOKENS_MAX &&
           (params->policy == INDEX_MEANS || params->policy == INDEX_PROMOTION) &&
           (ratio == 0.0f || (ratio >= 1.0f / (float)FANOUT_MAX && ratio <= 1.0f / (float)FANOUT_MIN));
}

// Sizes of nodes. A node that is divided when it has M entries has 2/3 M on average; so that a level holds r times the
// nodes of the one below, M is 3/2 of 1/r.
static void sizes_init(struct index *index, float ratio)
{
    uint32_t entries = NODE_ENTRIES;
    if (index->policy == INDEX_PROMOTION) {
        const uint32_t fanout = ratio == 0.0f ? FANOUT_DEFAULT : (uint32_t)(1.0f / ratio + 0.5f);
        entries = fanout + fanout / 2;
    }
    index->node_max = entries;
    index->cell_parts = entries / index->page_tokens;
    index->cell_parts = index->cell_parts < 1                ? 1
                        : index->cell_parts > TREE_PARTS_MAX ? TREE_PARTS_MAX
                                                             : index->cell_parts;
    index->cell_max = index->cell_parts * index->page_tokens;
}

static void stores_init(struct index *index)
{
    dci_store_init(&index->places, sizeof(uint32_t), PLACES_SHIFT);
    dci_store_init(&index->pages, sizeof(struct page), PAGES_SHIFT);
    dci_slab_init(&index->nodes, sizeof(struct node), NODES_SHIFT);
    const size_t block_bytes = dci_block_bytes(index);
    dci_slab_init(&index->cell_blocks, block_bytes, BLOCKS_SHIFT);
    dci_slab_init(&index->node_blocks, block_bytes, BLOCKS_SHIFT);
    dci_store_init(&index->tail, block_bytes, TAIL_SHIFT);
}

enum index_status index_create(const struct index_params *params, const struct index_allocator *allocator,
                               struct index **out)
{
    if (!params_are_valid(params)) {
        return INDEX_INVALID;
    }
    struct index *index = allocator->acquire(allocator->owner, sizeof *index);
    if (index == NULL) {
        return INDEX_NO_MEMORY;
    }
    memset(index, 0, sizeof *index);
    index->memory = (struct dci_memory){*allocator, sizeof *index};
    index->kernel = dci_kernel_best();
    index->head_dim = params->head_dim;
    index->page_tokens = params->page_tokens == 0 ? PAGE_TOKENS_DEFAULT : params->page_tokens;
    index->page_blocks = (index->page_tokens + DCI_LANES - 1) / DCI_LANES;
    while (1u << index->row_shift < index->page_tokens) {
        index->row_shift++;
    }
    index->head = params->is_continuation ? 0 : index->page_tokens;
    index->dtype = params->dtype;
    index->policy = params->policy;
    index->seed = params->seed;
    index->row_bytes = index->head_dim * (index->dtype == INDEX_FP32 ? sizeof(float) : sizeof(uint16_t));
    index->rows_stride = sizeof(struct dci_rows) + (size_t)index->head_dim / 8 * DCI_LANES;
    index->code_row_bytes = dci_row_bytes(index->head_dim);
    index->code_bytes = dci_code_bytes(index->head_dim);
    index->inverse_root_dim = 1.0f / sqrtf((float)index->head_dim);
    index->free_page = index->root = TREE_NONE;
    index->digest = dci_mix(index->seed);
    sizes_init(index, params->promotion_ratio);
    dci_rotation_init(index);
    stores_init(index);
    *out = index;
    return INDEX_OK;
}

void index_destroy(struct index *index)
{
    if (index == NULL) {
        return;
    }
    dci_build_fini(index);
    dci_store_fini(&index->places, &index->memory);
    dci_store_fini(&index->tail, &index->memory);
    dci_store_fini(&index->pages, &index->memory);
    for (uint32_t id = 0; id < index->nodes.bound; id++) {
        const struct node *node = dci_node(index, id);
        if (node->level == 1 && node->run != NULL) {
            dci_run_release(index, node->run, node->run_parts);
        }
    }
    dci_slab_fini(&index->nodes, &index->memory);
    dci_slab_fini(&index->cell_blocks, &index->memory);
    dci_slab_fini(&index->node_blocks, &index->memory);
    assert(index->memory.bytes == sizeof *index);
    const struct index_allocator allocator = index->memory.allocator;
    allocator.release(allocator.owner, index, sizeof *index);
}

uint64_t index_length(const struct index *index)
{
    return index->length;
}

uint64_t index_indexed(const struct index *index)
{
    return index->indexed;
}

void index_seal(struct index *index)
{
    assert(!index->preparing);
    index->sealed = true;
}

bool index_is_sealed(const struct index *index)
{
    return index->sealed;
}

uint64_t index_version(const struct index *index)
{
    return index->indexed == 0 ? 0 : index->digest;
}

uint64_t index_bytes(const struct index *index)
{
    return index->memory.bytes;
}

uint32_t index_page_bound(const struct index *index)
{
    return index->page_bound;
}

uint32_t index_page_rows(const struct index *index, uint32_t id)
{
    uint32_t positions[INDEX_PAGE_TOKENS_MAX];
    return id < index->page_bound ? index_page_positions(index, id, positions) : 0;
}

uint32_t index_page_positions(const struct index *index, uint32_t id, uint32_t *positions)
{
    memset(positions, 0xff, index->page_tokens * sizeof positions[0]);
    const struct page *page = dci_page(index, id);
    if (page->state == PAGE_LEAF) {
        for (uint32_t row = 0; row < index->page_tokens; row++) {
            positions[row] =
                dci_rows_of(index, dci_node(index, page->owner), page->part, row)->positions[row % DCI_LANES];
        }
        return page->rows;
    }
    uint32_t rows = 0;
    const uint32_t end = page->state == PAGE_OPEN ? (page->owner / index->page_tokens + 1) * index->page_tokens : 0;
    for (uint32_t p = page->owner; p < end && p < index->length; p++) {
        if (dci_place_of(index, p).page == id) {
            positions[p % index->page_tokens] = p;
            rows++;
        }
    }
    return rows;
}

void index_locate(const struct index *index, uint64_t first, uint32_t n, struct index_place *places)
{
    assert(first <= index->length && n <= index->length - first);
    for (uint32_t i = 0; i < n; i++) {
        places[i] = dci_place_of(index, (uint32_t)first + i);
    }
}

void index_shape(const struct index *index, struct index_shape *shape)
{
    *shape = (struct index_shape){.levels = 1};
    shape->level_counts[0] = index->tokens;
    for (uint32_t id = 0; id < index->nodes.bound; id++) {
        const uint32_t level = dci_node(index, id)->level;
        const bool is_draft = dci_node(index, id)->parent == TREE_NONE && id != index->root; // not in the tree yet
        if (level > 0 && level < TREE_LEVELS_MAX && !is_draft) {
            shape->level_counts[level]++;
            shape->levels = level + 1 > shape->levels ? level + 1 : shape->levels;
        }
    }
    shape->leaf_pages = index->leaf_pages;
    for (uint32_t id = 0; id < index->page_bound; id++) {
        const uint8_t state = dci_page(index, id)->state;
        shape->pages += state == PAGE_LEAF || (state == PAGE_OPEN && index_page_rows(index, id) > 0) ? 1 : 0;
    }
    shape->fill = index->leaf_pages == 0 ? 0.0 : (double)index->tokens / (double)index->leaf_pages;
}
