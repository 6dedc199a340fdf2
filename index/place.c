// Drafts of pages during an insertion, and the choice of a page within a cell.
//
// Invariant: nothing here changes what a search or the owner sees; page->draft is the only mark left on a live page.
// Thread ownership: the index's.
#include "index/insert.h"

#include <float.h>
#include <string.h>

// A full page's token goes to a page with room that is at most 1.4 times as far (squared: 2); measured, this keeps
// pages fuller than splitting at once and costs little order.
#define SPILL_DISTANCE2 2.0f

const uint32_t *dci_draft_tokens(const struct index *index, uint32_t id)
{
    const struct page *page = dci_page(index, id);
    return page->draft == 0 ? page->tokens : dci_draft(index->build.insert, page->draft - 1)->tokens;
}

static struct draft *draft_add(struct index *index, uint32_t id)
{
    struct insert *insert = index->build.insert;
    struct page *page = dci_page(index, id);
    struct draft *draft = dci_draft(insert, insert->draft_count);
    *draft = (struct draft){
        .page = id, .cell = page->owner, .rows = page->rows, .radius = page->radius, .farthest = page->farthest};
    memcpy(draft->tokens, page->tokens, index->page_tokens * sizeof draft->tokens[0]);
    memcpy(dci_draft_mean(insert, draft), dci_page_mean(index, page), index->head_dim * sizeof(float));
    page->draft = ++insert->draft_count;
    return draft;
}

struct draft *dci_draft_open(struct index *index, uint32_t id)
{
    struct insert *insert = index->build.insert;
    const struct page *page = dci_page(index, id);
    if (page->draft != 0) {
        return dci_draft(insert, page->draft - 1);
    }
    if (!dci_store_reserve(&insert->drafts, &index->memory, (uint64_t)insert->draft_count + 1)) {
        return NULL;
    }
    return draft_add(index, id);
}

struct draft *dci_draft_fresh(struct index *index, uint32_t cell)
{
    struct insert *insert = index->build.insert;
    uint32_t id;
    if (!dci_store_reserve(&insert->drafts, &index->memory, (uint64_t)insert->draft_count + 1) ||
        !dci_page_acquire(index, PAGE_PLANNED, &id)) {
        return NULL;
    }
    struct draft *draft = draft_add(index, id);
    draft->cell = cell;
    draft->fresh = draft->stale = true;
    return draft;
}

// The first row that the plan may fill: not in use in the live tree and not filled yet.
static uint32_t free_row(const struct index *index, uint32_t id)
{
    const uint32_t *live = dci_page(index, id)->tokens, *now = dci_draft_tokens(index, id);
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        if (live[r] == TREE_NONE && now[r] == TREE_NONE) {
            return r;
        }
    }
    return TREE_NONE;
}

void dci_draft_put(const struct index *index, struct draft *draft, uint32_t token)
{
    const uint32_t row = free_row(index, draft->page);
    assert(row != TREE_NONE);
    draft->tokens[row] = token;
    draft->rows++;
    draft->stale = true;
}

void dci_draft_remove(const struct index *index, struct draft *draft, uint32_t token)
{
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        if (draft->tokens[r] == token) {
            draft->tokens[r] = TREE_NONE;
            draft->rows--;
            draft->stale = true;
            return;
        }
    }
    assert(false); // the token is in the page
}

void dci_draft_refresh(const struct index *index, struct draft *draft)
{
    if (draft->stale) {
        dci_keys_summary(index, draft->tokens, index->page_tokens, dci_draft_mean(index->build.insert, draft),
                         &draft->radius, &draft->farthest);
        draft->stale = false;
    }
}

bool dci_draft_cell_pages(struct index *index, uint32_t cell)
{
    struct insert *insert = index->build.insert;
    struct dci_memory *memory = &index->memory;
    if (cell < index->tree->levels[1].count) {
        for (uint32_t id = dci_node(index->tree, 1, cell)->first; id != TREE_NONE; id = dci_page(index, id)->next) {
            if (!dci_list_push(&insert->pages, memory, id)) {
                return false;
            }
        }
    }
    for (uint32_t i = 0; i < insert->draft_count; i++) {
        const struct draft *draft = dci_draft(insert, i);
        if (draft->fresh && draft->cell == cell && !dci_list_push(&insert->pages, memory, draft->page)) {
            return false;
        }
    }
    return true;
}

// Distance of a key from the mean of a page; FLT_MAX when nothing is left in the page.
static float page_distance2(struct index *index, uint32_t id, const float *key)
{
    struct page *page = dci_page(index, id);
    const float *mean = dci_page_mean(index, page);
    if (page->draft != 0) {
        struct draft *draft = dci_draft(index->build.insert, page->draft - 1);
        if (draft->rows == 0) {
            return FLT_MAX;
        }
        dci_draft_refresh(index, draft);
        mean = dci_draft_mean(index->build.insert, draft);
    }
    return index->kernel->distance2(key, mean, index->head_dim);
}

// Halves a page that has no room: one round of 2-means from the new token and the one farthest from it; the new token's
// half goes to a fresh page, since the rows that become free here are still in use until the commit.
static bool split(struct index *index, uint32_t id, uint32_t token, const float *key)
{
    const uint32_t dim = index->head_dim;
    uint32_t tokens[INDEX_PAGE_TOKENS_MAX + 1], count = 0;
    float projection[INDEX_PAGE_TOKENS_MAX + 1], other[INDEX_HEAD_DIM_MAX], far_key[INDEX_HEAD_DIM_MAX];
    float near_mean[INDEX_HEAD_DIM_MAX], far_mean[INDEX_HEAD_DIM_MAX] = {0}, far_distance = -1.0f;
    struct draft *draft = dci_draft_open(index, id);
    struct draft *fresh = draft == NULL ? NULL : dci_draft_fresh(index, draft->cell);
    if (fresh == NULL) {
        return false;
    }
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        if (draft->tokens[r] == TREE_NONE) {
            continue;
        }
        tokens[count] = draft->tokens[r];
        dci_key_widen(index, tokens[count++], other);
        const float distance = index->kernel->distance2(key, other, dim);
        if (distance > far_distance) {
            far_distance = distance;
            memcpy(far_key, other, dim * sizeof other[0]);
        }
    }
    uint32_t near_count = 1;
    memcpy(near_mean, key, dim * sizeof key[0]);
    for (uint32_t i = 0; i < count; i++) {
        dci_key_widen(index, tokens[i], other);
        const bool is_near = index->kernel->distance2(other, key, dim) < index->kernel->distance2(other, far_key, dim);
        float *mean = is_near ? near_mean : far_mean;
        near_count += is_near ? 1 : 0;
        for (uint32_t j = 0; j < dim; j++) {
            mean[j] += other[j];
        }
    }
    const uint32_t far_count = count + 1 - near_count; // at least the farthest one
    for (uint32_t j = 0; j < dim; j++) {
        near_mean[j] /= (float)near_count;
        far_mean[j] /= (float)(far_count == 0 ? 1 : far_count);
    }
    for (uint32_t i = 0; i < count; i++) {
        dci_key_widen(index, tokens[i], other);
        projection[i] =
            index->kernel->distance2(other, far_mean, dim) - index->kernel->distance2(other, near_mean, dim);
    }
    const uint32_t moved = (count + 1) / 2 - 1; // beside the new token
    dci_cut_select(tokens, projection, count, moved);
    for (uint32_t i = 0; i < moved; i++) {
        dci_draft_remove(index, draft, tokens[i]);
        dci_draft_put(index, fresh, tokens[i]);
    }
    dci_draft_put(index, fresh, token);
    return true;
}

bool dci_draft_place(struct index *index, uint32_t cell, uint32_t token, const float *key, struct dci_work *work)
{
    struct insert *insert = index->build.insert;
    insert->pages.count = 0;
    if (!dci_draft_cell_pages(index, cell)) {
        return false;
    }
    uint32_t best = TREE_NONE, roomy = TREE_NONE;
    float best_distance = FLT_MAX, roomy_distance = FLT_MAX;
    for (uint32_t i = 0; i < insert->pages.count; i++) {
        const uint32_t id = insert->pages.items[i];
        const float distance = page_distance2(index, id, key);
        if (distance < best_distance) {
            best = id;
            best_distance = distance;
        }
        if (distance < roomy_distance && free_row(index, id) != TREE_NONE) {
            roomy = id;
            roomy_distance = distance;
        }
    }
    dci_work_spend(work, index, insert->pages.count);
    assert(best != TREE_NONE); // a cell holds its pivot
    if (roomy == TREE_NONE || roomy_distance > SPILL_DISTANCE2 * best_distance) {
        dci_work_spend(work, index, 6 * (uint64_t)index->page_tokens);
        return split(index, best, token, key);
    }
    struct draft *draft = dci_draft_open(index, roomy);
    if (draft == NULL) {
        return false;
    }
    dci_draft_put(index, draft, token);
    return true;
}
