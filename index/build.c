// Clustering of the tail: what is due, its slices, its plan.
//
// The cuts are at fixed token counts, whatever the appends looked like and whenever the work is done: a first batch,
// then batches of a size that depends on the indexed count alone. Batches end at whole pages, so that a plan empties
// open pages completely. A sealed index has the same batches as far as they go; what is left is one more, as its whole
// length was known when it was sealed. Cells that a truncation has left small or ragged are mended first, one at a
// time. Thread ownership: the index's.
#include "index/batch.h"

#define FIRST_TOKENS 256u
#define BATCH_TOKENS 64u
#define BATCH_MAX    512u
// A batch is this part of the indexed tokens: its fixed cost is spread over more tokens as the tree grows, while the
// tail that is scanned stays small beside what a search scores in the tree.
#define BATCH_PART 512u

static uint32_t whole_pages(const struct index *index, uint64_t tokens)
{
    return (uint32_t)(tokens / index->page_tokens * index->page_tokens);
}

// What is left when no append will come any more: all whole pages.
static uint32_t last_target(const struct index *index, uint64_t begin)
{
    const uint32_t target = whole_pages(index, index->length);
    const uint64_t least = index->root == TREE_NONE ? INDEX_SEALED_FIRST : 1;
    return target >= begin + least ? target : 0;
}

uint32_t dci_build_target(const struct index *index)
{
    uint64_t begin = index->indexed, batch = index->indexed / BATCH_PART;
    batch = batch < BATCH_TOKENS ? BATCH_TOKENS : batch > BATCH_MAX ? BATCH_MAX : batch;
    if (index->root == TREE_NONE) {
        begin = begin > index->head ? begin : index->head;
        batch = FIRST_TOKENS;
    }
    batch = batch < index->page_tokens ? index->page_tokens : batch;
    const uint32_t target = whole_pages(index, begin + batch);
    if ((uint64_t)target + INDEX_RECENT <= index->length) {
        return target;
    }
    return index->sealed ? last_target(index, begin) : 0;
}

// Ends a build that was not committed: its pages go back to the free list.
void dci_build_fini(struct index *index)
{
    dci_batch_discard(index);
    index->stage = STAGE_NONE;
}

bool index_build_is_due(const struct index *index)
{
    if (index->stage != STAGE_NONE) {
        return index->stage != STAGE_PLANNED && index->stage != STAGE_ROWS;
    }
    return index->ragged || dci_build_target(index) != 0;
}

static enum index_build_state no_memory(struct index *index)
{
    dci_build_fini(index);
    return INDEX_BUILD_NO_MEMORY;
}

enum index_build_state index_build_step(struct index *index, uint64_t work_units)
{
    if (index->stage == STAGE_NONE) {
        const uint32_t target = dci_build_target(index);
        if (!index->ragged && target == 0) {
            return INDEX_BUILD_IDLE;
        }
        if (!(index->ragged ? dci_mend_begin(index) : dci_batch_begin(index, target))) {
            return no_memory(index);
        }
        index->stage = STAGE_RUNNING;
    }
    if (index->stage == STAGE_ROWS) {
        return INDEX_BUILD_ROWS;
    }
    if (index->stage != STAGE_RUNNING) {
        index->stage = STAGE_PLANNED;
        return INDEX_BUILD_PLAN;
    }
    const uint64_t units = work_units < 1 ? 1 : work_units > UINT32_MAX ? UINT32_MAX : work_units;
    struct dci_work work = {(int64_t)(units * DCI_UNIT_ELEMENTS)};
    switch (dci_batch_step(index, &work)) {
    case PROGRESS_MORE:
        return INDEX_BUILD_MORE;
    case PROGRESS_ROWS:
        index->stage = STAGE_ROWS;
        return INDEX_BUILD_ROWS;
    case PROGRESS_PLAN:
        index->stage = STAGE_PLANNED;
        return INDEX_BUILD_PLAN;
    case PROGRESS_IDLE:
        dci_build_fini(index);
        return dci_build_target(index) != 0 ? INDEX_BUILD_MORE : INDEX_BUILD_IDLE;
    default:
        return no_memory(index);
    }
}

void index_rows_get(const struct index *index, const uint32_t **pages, uint32_t *page_count)
{
    const struct batch *batch = index->batch;
    assert(index->stage == STAGE_ROWS);
    *pages = batch->need.items + batch->rows_given;
    *page_count = batch->need.count - batch->rows_given;
}

void index_rows_give(struct index *index, const void *const *keys, size_t stride_bytes)
{
    struct batch *batch = index->batch;
    assert(index->stage == STAGE_ROWS);
    for (uint32_t i = batch->rows_given; i < batch->need.count; i++) {
        batch->rows[i] = keys[i - batch->rows_given];
    }
    batch->rows_given = batch->need.count;
    batch->rows_stride = stride_bytes;
    index->stage = STAGE_RUNNING;
}

void index_plan_get(const struct index *index, struct index_plan *plan)
{
    const struct batch *batch = index->batch;
    assert(index->stage == STAGE_PLANNED);
    *plan = (struct index_plan){
        .moves = batch->moves,
        .move_count = batch->move_count,
        .new_pages = batch->new_pages.items,
        .new_page_count = batch->new_pages.count,
        .released_pages = batch->released_pages.items,
        .released_page_count = batch->released_pages.count,
    };
}

void index_plan_commit(struct index *index)
{
    assert(index->stage == STAGE_PLANNED);
    dci_batch_commit(index);
    dci_build_fini(index);
}

void index_plan_drop(struct index *index)
{
    assert(index->stage == STAGE_PLANNED);
    // The decisions are a function of the tree and the keys and stay true: the plan is kept to be handed out again.
    index->stage = STAGE_DROPPED;
}
