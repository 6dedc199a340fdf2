// Page ids: a dense table with a free list, and the summary of the keys of a page.
//
// Invariant: an id below page_bound is free (on the free list), open, planned or a leaf. Ids depend on the order of
// appends and commits; nothing that a selection or the tree's digest is made of depends on ids.
// Thread ownership: the index's.
#include "index/tree.h"

#include <math.h>
#include <string.h>

bool dci_page_acquire(struct index *index, enum page_state state, uint32_t *out)
{
    uint32_t id = index->free_page;
    if (id == TREE_NONE) {
        if (!dci_store_reserve(&index->pages, &index->memory, (uint64_t)index->page_bound + 1)) {
            return false;
        }
        id = index->page_bound++;
    } else {
        index->free_page = dci_page(index, id)->next;
    }
    struct page *page = dci_page(index, id);
    memset(page, 0, sizeof *page);
    memset(page->tokens, 0xff, index->page_tokens * sizeof page->tokens[0]);
    page->owner = page->next = TREE_NONE;
    page->state = state;
    *out = id;
    return true;
}

void dci_page_release(struct index *index, uint32_t id)
{
    struct page *page = dci_page(index, id);
    assert(page->state != PAGE_FREE);
    page->state = PAGE_FREE;
    page->rows = 0;
    page->draft = 0;
    page->next = index->free_page;
    index->free_page = id;
}

uint32_t dci_keys_summary(const struct index *index, const uint32_t *positions, uint32_t n, float *mean, float *radius,
                          float *farthest)
{
    const uint32_t dim = index->head_dim;
    float key[INDEX_HEAD_DIM_MAX];
    uint32_t count = 0;
    memset(mean, 0, dim * sizeof mean[0]);
    for (uint32_t i = 0; i < n; i++) {
        if (positions[i] == TREE_NONE) {
            continue;
        }
        dci_key_widen(index, positions[i], key);
        for (uint32_t j = 0; j < dim; j++) {
            mean[j] += key[j];
        }
        count++;
    }
    *farthest = 0.0f;
    if (count == 0) {
        *radius = 0.0f;
        return 0;
    }
    for (uint32_t j = 0; j < dim; j++) {
        mean[j] /= (float)count;
    }
    double spread = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        if (positions[i] != TREE_NONE) {
            dci_key_widen(index, positions[i], key);
            const float distance2 = index->kernel->distance2(key, mean, dim);
            spread += (double)distance2;
            *farthest = distance2 > *farthest ? distance2 : *farthest;
        }
    }
    *farthest = sqrtf(*farthest);
    *radius = (float)sqrt(spread / count);
    return count;
}
