// Appending keys: the tail of tokens that no tree holds yet.
//
// A tail token at position p lies in the open page of its block p / page_tokens, in row p % page_tokens; builds take
// whole blocks, so an open page is released whole. Prepared tokens lie behind `length`, where nothing looks for them.
// The key rows are copied first and the copy is what gets checked, so that a source changing meanwhile does no harm.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

// Gives back the open pages of the blocks that begin in first .. end-1.
static void release_blocks(struct index *index, uint32_t first, uint32_t end)
{
    const uint32_t step = index->page_tokens;
    for (uint32_t p = (first + step - 1) / step * step; p < end; p += step) {
        dci_page_release(index, dci_token(index, p)->page[index->column]);
    }
}

static void trim(struct index *index)
{
    dci_store_trim(&index->keys, &index->memory, index->length);
    dci_store_trim(&index->tokens, &index->memory, index->length);
}

// Copies the rows and checks the copies. False when a key is refused.
static bool copy_keys(struct index *index, const unsigned char *keys, size_t stride_bytes, uint32_t n, float *norm2_max)
{
    float key[INDEX_HEAD_DIM_MAX];
    *norm2_max = 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t position = index->length + i;
        memcpy(dci_store_at(&index->keys, position), keys + i * stride_bytes, index->row_bytes);
        dci_key_widen(index, position, key);
        const float norm2 = index->kernel->dot(key, key, index->head_dim);
        if (!(norm2 <= TREE_NORM2_MAX)) { // also when it is NaN
            return false;
        }
        dci_token(index, position)->norm2 = norm2;
        *norm2_max = norm2 > *norm2_max ? norm2 : *norm2_max;
    }
    return true;
}

// Names the places of the new tokens. False, with no page held, when memory is refused.
static bool place_tokens(struct index *index, uint32_t n)
{
    const uint32_t first = index->length, step = index->page_tokens;
    uint32_t page = first % step == 0 ? TREE_NONE : dci_token(index, first - 1)->page[index->column];
    for (uint32_t p = first; p < first + n; p++) {
        if (p % step == 0) {
            if (!dci_page_acquire(index, PAGE_OPEN, &page)) {
                release_blocks(index, first, p);
                return false;
            }
            dci_page(index, page)->owner = p;
        }
        // Both columns, so that a bulk build in progress has the tail's places in either.
        struct token *token = dci_token(index, p);
        token->page[0] = token->page[1] = page;
        token->row[0] = token->row[1] = (uint8_t)(p % step);
    }
    return true;
}

enum index_status index_append_prepare(struct index *index, const void *keys, size_t stride_bytes, uint32_t n,
                                       struct index_place *places)
{
    if (index->preparing || (n > 0 && (keys == NULL || places == NULL)) || (n > 1 && stride_bytes < index->row_bytes)) {
        return INDEX_INVALID;
    }
    if (n > INDEX_TOKENS_MAX - index->length) {
        return INDEX_FULL;
    }
    enum index_status status = INDEX_NO_MEMORY;
    const uint64_t end = (uint64_t)index->length + n;
    if (!dci_store_reserve(&index->keys, &index->memory, end) ||
        !dci_store_reserve(&index->tokens, &index->memory, end)) {
        goto refused;
    }
    if (!copy_keys(index, keys, stride_bytes, n, &index->prepared_norm2_max)) {
        status = INDEX_NOT_FINITE;
        goto refused;
    }
    if (!place_tokens(index, n)) {
        goto refused;
    }
    index->preparing = true;
    index->prepared = n;
    for (uint32_t i = 0; i < n; i++) {
        const struct token *token = dci_token(index, index->length + i);
        places[i] = (struct index_place){token->page[index->column], token->row[index->column]};
    }
    return INDEX_OK;

refused:
    trim(index);
    return status;
}

void index_append_commit(struct index *index)
{
    assert(index->preparing);
    index->length += index->prepared;
    if (index->prepared_norm2_max > index->norm2_max) {
        index->norm2_max = index->prepared_norm2_max;
    }
    index->prepared = 0;
    index->preparing = false;
}

void index_append_drop(struct index *index)
{
    assert(index->preparing);
    release_blocks(index, index->length, index->length + index->prepared);
    index->prepared = 0;
    index->preparing = false;
    trim(index);
}
