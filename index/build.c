// Clustering of the tail: which build is due, its slices, its plan.
//
// The cuts are at fixed token counts, whatever the appends looked like and whenever the work is done: a bulk build over
// everything at the boundaries base * 4^j, and between them insertions of one batch each. A bulk build depends only on
// the keys below its boundary, so a tail that already reaches further goes to the largest boundary at once and the tree
// is the same. Both counts are whole pages, so that a plan empties open pages completely.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

#define BASE_TOKENS  256u
#define BATCH_TOKENS 64u
#define GROWTH       4u

static uint32_t whole_pages(const struct index *index, uint32_t tokens)
{
    return (tokens + index->page_tokens - 1) / index->page_tokens * index->page_tokens;
}

uint32_t dci_build_batch(const struct index *index)
{
    return whole_pages(index, BATCH_TOKENS);
}

uint32_t dci_build_base(const struct index *index)
{
    const uint32_t enough = index->fanout * TREE_TOP_MIN; // for a first level
    return whole_pages(index, enough > BASE_TOKENS ? enough : BASE_TOKENS);
}

// The build that is due: its kind and the indexed count it leads to.
static enum build_kind next_build(const struct index *index, uint32_t *target)
{
    const uint32_t indexed = index->tree == NULL ? 0 : index->tree->tokens;
    uint64_t boundary = dci_build_base(index), largest = 0;
    for (; boundary <= index->length; boundary *= GROWTH) {
        largest = boundary;
    }
    if (largest > indexed) {
        *target = (uint32_t)largest;
        return BUILD_BULK;
    }
    // What does not fill a batch before the next boundary waits for the bulk build there.
    const uint64_t batch_end = (uint64_t)indexed + dci_build_batch(index);
    *target = (uint32_t)batch_end;
    return index->tree != NULL && batch_end < boundary && batch_end <= index->length ? BUILD_INSERT : BUILD_NONE;
}

static void build_end(struct index *index)
{
    struct build *build = &index->build;
    dci_memory_release(&index->memory, build->moves, build->move_room * sizeof build->moves[0]);
    dci_list_fini(&build->new_pages, &index->memory);
    dci_list_fini(&build->released_pages, &index->memory);
    *build = (struct build){0};
}

// Ends a build that was not committed: its pages go back to the free list.
void dci_build_fini(struct index *index)
{
    if (index->build.kind == BUILD_BULK) {
        dci_bulk_discard(index);
    } else if (index->build.kind == BUILD_INSERT) {
        dci_insert_discard(index);
    }
    build_end(index);
}

bool index_build_is_due(const struct index *index)
{
    uint32_t target;
    if (index->build.kind != BUILD_NONE) {
        return index->build.stage != STAGE_PLANNED;
    }
    return next_build(index, &target) != BUILD_NONE;
}

static bool build_begin(struct index *index, enum build_kind kind, uint32_t target)
{
    index->build.kind = kind;
    if (kind == BUILD_BULK) {
        return dci_bulk_begin(index, target);
    }
    return dci_insert_begin(index, target - index->tree->tokens);
}

enum index_build_state index_build_step(struct index *index, uint64_t work_units)
{
    struct build *build = &index->build;
    if (build->kind == BUILD_NONE) {
        uint32_t target;
        const enum build_kind kind = next_build(index, &target);
        if (kind == BUILD_NONE) {
            return INDEX_BUILD_IDLE;
        }
        if (!build_begin(index, kind, target)) {
            dci_build_fini(index);
            return INDEX_BUILD_NO_MEMORY;
        }
    }
    if (build->stage != STAGE_RUNNING) {
        build->stage = STAGE_PLANNED;
        return INDEX_BUILD_PLAN;
    }
    const uint64_t units = work_units < 1 ? 1 : work_units > UINT32_MAX ? UINT32_MAX : work_units;
    struct dci_work work = {(int64_t)(units * DCI_UNIT_ELEMENTS)};
    const enum dci_progress progress =
        build->kind == BUILD_BULK ? dci_bulk_step(index, &work) : dci_insert_step(index, &work);
    if (progress == PROGRESS_NO_MEMORY) {
        dci_build_fini(index);
        return INDEX_BUILD_NO_MEMORY;
    }
    if (progress == PROGRESS_MORE) {
        return INDEX_BUILD_MORE;
    }
    build->stage = STAGE_PLANNED;
    return INDEX_BUILD_PLAN;
}

void index_plan_get(const struct index *index, struct index_plan *plan)
{
    const struct build *build = &index->build;
    assert(build->kind != BUILD_NONE && build->stage == STAGE_PLANNED);
    *plan = (struct index_plan){
        .moves = build->moves,
        .move_count = build->move_count,
        .new_pages = build->new_pages.items,
        .new_page_count = build->new_pages.count,
        .released_pages = build->released_pages.items,
        .released_page_count = build->released_pages.count,
    };
}

void index_plan_commit(struct index *index)
{
    struct build *build = &index->build;
    assert(build->kind != BUILD_NONE && build->stage == STAGE_PLANNED);
    for (uint32_t i = 0; i < build->new_pages.count; i++) {
        dci_page(index, build->new_pages.items[i])->state = PAGE_LEAF;
    }
    if (build->kind == BUILD_BULK) {
        dci_bulk_commit(index);
    } else {
        dci_insert_commit(index);
    }
    for (uint32_t i = 0; i < build->released_pages.count; i++) {
        dci_page_release(index, build->released_pages.items[i]);
    }
    build_end(index);
}

void index_plan_drop(struct index *index)
{
    assert(index->build.kind != BUILD_NONE && index->build.stage == STAGE_PLANNED);
    // The decisions are a function of the tree and the keys and stay true: the plan is kept to be handed out again.
    index->build.stage = STAGE_DROPPED;
}
