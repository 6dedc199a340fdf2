// An index: creation, destruction, and what can be asked of it at any time.
//
// Invariant: everything a caller sees (lengths, places, pages, tree) changes only in index_append_commit and
// index_plan_commit. Thread ownership: an index belongs to one thread.
#include "index/tree.h"

#include <math.h>
#include <string.h>

#define PAGE_TOKENS_DEFAULT 16u
#define FANOUT_DEFAULT      32u
#define FANOUT_MAX          1024u
#define KEYS_SHIFT          7u
#define TOKENS_SHIFT        8u
#define PAGES_SHIFT         4u

static bool params_are_valid(const struct index_params *params)
{
    const float ratio = params->promotion_ratio;
    return params->head_dim > 0 && params->head_dim <= INDEX_HEAD_DIM_MAX &&
           params->head_dim % INDEX_HEAD_DIM_STEP == 0 && params->dtype >= INDEX_BF16 && params->dtype <= INDEX_FP32 &&
           params->page_tokens <= INDEX_PAGE_TOKENS_MAX &&
           (ratio == 0.0f || (ratio >= 1.0f / (float)FANOUT_MAX && ratio <= 0.5f));
}

static size_t round_up(size_t bytes, size_t step)
{
    return (bytes + step - 1) / step * step;
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
    index->dtype = params->dtype;
    index->fanout =
        params->promotion_ratio == 0.0f ? FANOUT_DEFAULT : (uint32_t)(1.0f / params->promotion_ratio + 0.5f);
    index->seed = params->seed;
    index->row_bytes = index->head_dim * (index->dtype == INDEX_FP32 ? sizeof(float) : sizeof(uint16_t));
    index->inverse_root_dim = 1.0f / sqrtf((float)index->head_dim);
    index->free_page = TREE_NONE;
    dci_store_init(&index->keys, index->row_bytes, KEYS_SHIFT);
    dci_store_init(&index->tokens, sizeof(struct token), TOKENS_SHIFT);
    index->page_mean_offset =
        round_up(sizeof(struct page) + index->page_tokens * sizeof(uint32_t), _Alignof(struct page));
    dci_store_init(&index->pages,
                   round_up(index->page_mean_offset + index->head_dim * sizeof(float), _Alignof(struct page)),
                   PAGES_SHIFT);
    *out = index;
    return INDEX_OK;
}

void index_destroy(struct index *index)
{
    if (index == NULL) {
        return;
    }
    dci_build_fini(index);
    dci_tree_destroy(index, index->tree);
    dci_store_fini(&index->keys, &index->memory);
    dci_store_fini(&index->tokens, &index->memory);
    dci_store_fini(&index->pages, &index->memory);
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
    return index->tree == NULL ? 0 : index->tree->tokens;
}

uint64_t index_version(const struct index *index)
{
    return index->tree == NULL ? 0 : index->tree->digest;
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
    if (id >= index->page_bound) {
        return 0;
    }
    const struct page *page = dci_page(index, id);
    if (page->state == PAGE_LEAF) {
        return page->rows;
    }
    if (page->state == PAGE_OPEN && page->owner < index->length) {
        const uint32_t rows = index->length - page->owner;
        return rows < index->page_tokens ? rows : index->page_tokens;
    }
    return 0;
}

uint32_t index_page_positions(const struct index *index, uint32_t id, uint32_t *positions)
{
    const uint32_t rows = index_page_rows(index, id);
    memset(positions, 0xff, index->page_tokens * sizeof positions[0]);
    if (rows == 0) {
        return 0;
    }
    const struct page *page = dci_page(index, id);
    if (page->state == PAGE_LEAF) {
        memcpy(positions, page->tokens, index->page_tokens * sizeof positions[0]);
    }
    for (uint32_t r = 0; page->state == PAGE_OPEN && r < rows; r++) {
        positions[r] = page->owner + r;
    }
    return rows;
}

void index_locate(const struct index *index, uint64_t first, uint32_t n, struct index_place *places)
{
    assert(first <= index->length && n <= index->length - first);
    for (uint32_t i = 0; i < n; i++) {
        const struct token *token = dci_token(index, (uint32_t)first + i);
        places[i] = (struct index_place){token->page[index->column], token->row[index->column]};
    }
}

void index_shape(const struct index *index, struct index_shape *shape)
{
    *shape = (struct index_shape){.levels = 1};
    const struct tree *tree = index->tree;
    const uint32_t indexed = tree == NULL ? 0 : tree->tokens;
    shape->level_counts[0] = indexed;
    shape->pages = (index->length - indexed + index->page_tokens - 1) / index->page_tokens;
    if (tree == NULL) {
        return;
    }
    shape->levels = tree->top + 1;
    for (uint32_t level = 1; level <= tree->top; level++) {
        shape->level_counts[level] = tree->levels[level].count;
    }
    shape->leaf_pages = tree->pages;
    shape->pages += tree->pages;
    shape->fill = (double)indexed / (double)tree->pages;
}
