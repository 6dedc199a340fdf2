// Page ids and places: a dense table of pages with a free list, the place of every token, and what is kept of the tail.
//
// Invariant: an id below page_bound is free (on the free list), open, planned or a leaf. Ids depend on the order of
// appends and commits; nothing that a selection or the digest is made of depends on ids.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

struct index_place dci_place_of(const struct index *index, uint32_t position)
{
    const uint32_t place = *dci_place(index, position);
    if (place == TREE_NONE) {
        return (struct index_place){TREE_NONE, 0};
    }
    return (struct index_place){place >> index->row_shift, place & ((1u << index->row_shift) - 1)};
}

void dci_place_set(struct index *index, uint32_t position, uint32_t page, uint32_t row)
{
    *dci_place(index, position) = page << index->row_shift | row;
}

bool dci_page_acquire(struct index *index, enum page_state state, uint32_t *out)
{
    uint32_t id = index->free_page;
    if (id == TREE_NONE) {
        // An id must fit in a place, and the place of all ones stands for none.
        if (index->page_bound >= (TREE_NONE >> index->row_shift) ||
            !dci_store_reserve(&index->pages, &index->memory, (uint64_t)index->page_bound + 1)) {
            return false;
        }
        id = index->page_bound++;
    } else {
        index->free_page = dci_page(index, id)->owner;
    }
    *dci_page(index, id) = (struct page){.owner = TREE_NONE, .state = (uint8_t)state};
    *out = id;
    return true;
}

void dci_page_release(struct index *index, uint32_t id)
{
    struct page *page = dci_page(index, id);
    assert(page->state != PAGE_FREE);
    *page = (struct page){.owner = index->free_page, .state = PAGE_FREE};
    index->free_page = id;
}

void dci_tail_forget(struct index *index)
{
    const uint32_t head_blocks = (index->head + DCI_LANES - 1) / DCI_LANES;
    dci_store_forget(&index->tail, &index->memory, head_blocks, index->indexed / DCI_LANES);
}

void dci_tail_trim(struct index *index, uint32_t length)
{
    dci_store_trim(&index->tail, &index->memory, (length + DCI_LANES - 1) / DCI_LANES);
}

uint32_t dci_open_begin(const struct index *index, uint32_t position)
{
    const uint32_t block = position - position % index->page_tokens;
    return block < index->indexed ? index->indexed : block;
}
