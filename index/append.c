// Appending keys: the tail of tokens that the tree does not hold yet.
//
// A tail token at position p lies in the open page of its block p / page_tokens, in row p % page_tokens; batches end at
// whole blocks, so an open page is released whole. Prepared tokens lie behind `length`, where nothing looks for them.
// A key row is copied first and the copy is what gets checked and coded, so that a source changing meanwhile does no
// harm.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

static void trim(struct index *index)
{
    dci_tail_trim(index, index->length);
    dci_store_trim(&index->places, &index->memory, index->length);
}

// The token's key in 8 bits. Its lane counts from now on, but nobody looks behind `length`.
static void code_key(struct index *index, uint32_t position, float *key)
{
    struct entry entry = {.rows = 1.0f, .child = TREE_NONE};
    struct dci_block *block = dci_tail_block(index, position);
    const uint32_t begin = position - position % DCI_LANES;
    // What was there is clustered, or nothing was; but for the last tokens of the head.
    if (position == begin || (position == index->indexed && begin >= index->head)) {
        dci_block_clear(index, block);
    }
    dci_rotate(index, key);
    int32_t ignored;
    entry.step = index->kernel->encode8(key, index->head_dim, entry.codes, &ignored);
    dci_block_write(index, block, position % DCI_LANES, &entry);
}

// Checks and codes the keys of positions from `first` on. False when one is refused.
static bool code_keys(struct index *index, uint32_t first, const unsigned char *keys, size_t stride_bytes, uint32_t n,
                      float *norm2_max)
{
    float key[INDEX_HEAD_DIM_MAX], row[INDEX_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < n; i++) {
        memcpy(row, keys + i * stride_bytes, index->row_bytes);
        const float norm2 = dci_key_widen(index, row, key);
        if (!(norm2 <= TREE_NORM2_MAX)) { // also when it is NaN
            return false;
        }
        *norm2_max = norm2 > *norm2_max ? norm2 : *norm2_max;
        code_key(index, first + i, key);
    }
    return true;
}

// The open page of the tokens before a position in its block; TREE_NONE where there is none.
static uint32_t open_page(const struct index *index, uint32_t position)
{
    for (uint32_t p = dci_open_begin(index, position); p < position; p++) {
        const uint32_t page = dci_place_of(index, p).page;
        if (page != TREE_NONE) {
            return page;
        }
    }
    return TREE_NONE;
}

// Gives back the open pages that only prepared tokens from `first` to `end` lie in.
static void release_prepared(struct index *index, uint32_t first, uint32_t end)
{
    uint32_t last = open_page(index, first);
    for (uint32_t p = first; p < end; p++) {
        const uint32_t page = dci_place_of(index, p).page;
        if (page != last) {
            dci_page_release(index, page);
            last = page;
        }
    }
}

// Names the places of n tokens from `first` on. False, with no page of theirs held, when memory is refused.
static bool place_tokens(struct index *index, uint32_t first, uint32_t n)
{
    const uint32_t step = index->page_tokens;
    uint32_t page = open_page(index, first);
    for (uint32_t p = first; p < first + n; p++) {
        if (p % step == 0 || page == TREE_NONE) {
            if (!dci_page_acquire(index, PAGE_OPEN, &page)) {
                release_prepared(index, first, p);
                return false;
            }
            dci_page(index, page)->owner = p;
        }
        dci_place_set(index, p, page, p % step);
    }
    return true;
}

// Codes and places n tokens behind those that are prepared.
static enum index_status prepare_tokens(struct index *index, const void *keys, size_t stride_bytes, uint32_t n)
{
    const uint32_t first = index->length + index->prepared;
    float norm2_max = index->prepared_norm2_max;
    if (n > INDEX_TOKENS_MAX - first) {
        return INDEX_FULL;
    }
    const uint64_t end = (uint64_t)first + n;
    if (!dci_store_reserve(&index->places, &index->memory, end) ||
        !dci_store_reserve(&index->tail, &index->memory, (end + DCI_LANES - 1) / DCI_LANES)) {
        return INDEX_NO_MEMORY;
    }
    if (!code_keys(index, first, keys, stride_bytes, n, &norm2_max)) {
        return INDEX_NOT_FINITE;
    }
    if (!place_tokens(index, first, n)) {
        return INDEX_NO_MEMORY;
    }
    index->prepared_norm2_max = norm2_max;
    index->prepared += n;
    return INDEX_OK;
}

static bool is_source(const struct index *index, const void *keys, size_t stride_bytes, uint32_t n)
{
    return (n == 0 || keys != NULL) && (n <= 1 || stride_bytes >= index->row_bytes);
}

enum index_status index_append_prepare(struct index *index, const void *keys, size_t stride_bytes, uint32_t n,
                                       struct index_place *places)
{
    if (index->preparing || index->sealed || !is_source(index, keys, stride_bytes, n) || (n > 0 && places == NULL)) {
        return INDEX_INVALID;
    }
    index->prepared_norm2_max = 0.0f;
    const enum index_status status = prepare_tokens(index, keys, stride_bytes, n);
    if (status != INDEX_OK) {
        trim(index);
        return status;
    }
    index->preparing = true;
    for (uint32_t i = 0; i < n; i++) {
        places[i] = dci_place_of(index, index->length + i);
    }
    return INDEX_OK;
}

enum index_status index_append_more(struct index *index, const void *keys, size_t stride_bytes, uint32_t n)
{
    if (!index->preparing || index->sealed || !is_source(index, keys, stride_bytes, n)) {
        return INDEX_INVALID;
    }
    return prepare_tokens(index, keys, stride_bytes, n);
}

void index_append_places(const struct index *index, uint64_t first, uint32_t n, struct index_place *places)
{
    assert(index->preparing && first >= index->length && first + n <= (uint64_t)index->length + index->prepared);
    for (uint32_t i = 0; i < n; i++) {
        places[i] = dci_place_of(index, (uint32_t)first + i);
    }
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
    release_prepared(index, index->length, index->length + index->prepared);
    index->prepared = 0;
    index->preparing = false;
    trim(index);
}
