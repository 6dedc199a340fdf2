// Clustering of a lane: the index says what it needs and where rows go, here are the pages (lane.h). All functions run
// on the shard that owns the lane.
//
// The index looks at the rows that it is given through many slices. Without a disk they stay where they are. With one
// it gets copies, each made when its page comes: nothing is pinned, so that lanes never wait for each other's pages,
// and clustering gets through a pool of a few pages. A plan's new pages may leave for the disk while it is carried out.
#include "cached/lane_pages.h"

#include "cached/server.h"

#include <string.h>

// Copies of pages that the index was given in one go, in index memory.
struct lane_rows {
    struct lane_rows *next;
    size_t bytes;
    uint32_t count, missing;
    bool is_spare;      // not the index's: see keep_page
    uint32_t *pages;    // [count]
    uint8_t *frames;    // [count]
    const void *rows[]; // [count]; NULL: not there yet
};

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// ---- the rows that the index works with ----

void lane_release_rows(struct lane *lane)
{
    lane->copying = false;
    for (struct lane_rows *rows; (rows = lane->rows) != NULL;) {
        lane->rows = rows->next;
        lane_release_memory(lane, rows, rows->bytes);
    }
}

// Where pages never leave.
static ice_status give_places(struct lane *lane, const uint32_t *pages, uint32_t count)
{
    const void **rows = lane_acquire_memory(lane, count * sizeof *rows);
    if (!rows)
        return ICE_INDEX_FULL;
    for (uint32_t i = 0; i < count; i++)
        rows[i] = lane->pages[pages[i]].memory;
    index_rows_give(lane->index, rows, lane_token_bytes(lane));
    lane_release_memory(lane, rows, count * sizeof *rows);
    return ICE_OK;
}

static bool begin_copies(struct lane *lane, const uint32_t *pages, uint32_t count)
{
    const size_t page_bytes = lane_server(lane)->config->page_tokens * lane_token_bytes(lane);
    const size_t head = sizeof(struct lane_rows) + count * sizeof(void *),
                 bytes = head + count * (page_bytes + sizeof *pages);
    struct lane_rows *rows = lane_acquire_memory(lane, bytes);
    if (!rows)
        return false;
    *rows = (struct lane_rows){.next = lane->rows, .bytes = bytes, .count = count, .missing = count};
    rows->frames = (uint8_t *)rows + head;
    rows->pages = (uint32_t *)(rows->frames + count * page_bytes);
    memcpy(rows->pages, pages, count * sizeof *pages);
    memset(rows->rows, 0, count * sizeof(void *));
    lane->rows = rows;
    lane->copying = true;
    return true;
}

// Copies what is in memory, asks for the rest. LANE_WAITS: some are missing.
static ice_status copy_pages(struct lane *lane, struct shard *shard)
{
    struct lane_rows *rows = lane->rows;
    const uint32_t *pages = rows->pages;
    const size_t page_bytes = lane_server(lane)->config->page_tokens * lane_token_bytes(lane);
    for (uint32_t pass = 0; pass < 2; pass++) { // what is there first: reading may push it out
        for (uint32_t i = 0; i < rows->count; i++) {
            if (rows->rows[i] || (pass == 0 && !lane->pages[pages[i]].memory))
                continue;
            const ice_status status = lane_page_need(lane, shard, pages[i]);
            if (status == ICE_PAGE_LOST)
                return status;
            if (status != ICE_OK)
                continue;
            rows->rows[i] = memcpy(rows->frames + i * page_bytes, lane->pages[pages[i]].memory, page_bytes);
            rows->missing--;
        }
    }
    return rows->missing > 0 ? LANE_WAITS : ICE_OK;
}

// A page that clustering needs is lost: the lane stays as it is, its tail is scanned.
static enum lane_work give_up(struct lane *lane, struct shard *shard)
{
    lane->damaged = true;
    lane_drop_plan(lane, shard);
    lane_release_rows(lane);
    return LANE_IDLE;
}

// Hands the index the rows that it has asked for: all of them, or none yet.
static enum lane_work rows_step(struct lane *lane, struct shard *shard)
{
    const uint32_t *pages;
    uint32_t count;
    index_rows_get(lane->index, &pages, &count);
    ice_status status = ICE_OK;
    if (!lane_server(lane)->disk) {
        status = give_places(lane, pages, count);
    } else if (!lane->copying && !begin_copies(lane, pages, count)) {
        status = ICE_INDEX_FULL;
    } else {
        status = copy_pages(lane, shard);
        lane->copying = status != ICE_OK;
        if (status == ICE_OK)
            index_rows_give(lane->index, lane->rows->rows, lane_token_bytes(lane));
    }
    if (status == ICE_PAGE_LOST)
        return give_up(lane, shard);
    return status == ICE_OK ? LANE_MORE : status == LANE_WAITS ? LANE_FETCHES : LANE_STALLED;
}

// ---- plans ----

static void plan_unmake_pages(struct lane *lane, struct shard *shard, const struct index_plan *plan)
{
    while (lane->plan_frames > 0)
        lane_page_drop(lane, shard, plan->new_pages[--lane->plan_frames]);
}

// A slice of making the plan's new pages. False where there is no room: then all that were made are gone again.
static bool plan_make_pages(struct lane *lane, struct shard *shard, const struct index_plan *plan)
{
    uint32_t until = min_u32(plan->new_page_count, lane->plan_frames + SERVER_PLAN_PAGES);
    bool room = true;
    while (room && lane->plan_frames < until) {
        room = lane_page_make(lane, shard, plan->new_pages[lane->plan_frames], false) == ICE_OK;
        lane->plan_frames += room;
    }
    if (!room)
        plan_unmake_pages(lane, shard, plan);
    return room;
}

// A row that is moved: of its page, or of the copy that was made of it. NULL: the page must be read.
static const uint8_t *row_to_move(const struct lane *lane, struct index_place from)
{
    const size_t bytes = lane_token_bytes(lane);
    if (lane->pages[from.page].memory)
        return lane_row(lane, from);
    for (const struct lane_rows *rows = lane->rows; rows; rows = rows->next) {
        for (uint32_t i = 0; i < rows->count; i++) {
            if (rows->pages[i] == from.page)
                return (const uint8_t *)rows->rows[i] + from.row * bytes;
        }
    }
    return NULL;
}

// Keeps a copy of a page that is moved from while the page that is moved to is read, in place of the one kept last:
// where room is short the two need not be there at one time. A plan that was dropped has no other copies any more.
static void keep_page(struct lane *lane, uint32_t page)
{
    const bool is_spare = lane->rows && lane->rows->is_spare;
    if (!is_spare && !begin_copies(lane, &page, 1))
        return;
    struct lane_rows *rows = lane->rows;
    lane->copying = false;
    rows->is_spare = true;
    rows->pages[0] = page;
    rows->missing = 0;
    rows->rows[0] =
        memcpy(rows->frames, lane->pages[page].memory, lane_server(lane)->config->page_tokens * lane_token_bytes(lane));
}

// Brings what a move needs into memory.
static ice_status need_move(struct lane *lane, struct shard *shard, const struct index_move *move)
{
    if (!lane->pages[move->to.page].memory && lane->pages[move->from.page].memory && tier_is_short(shard->server))
        keep_page(lane, move->from.page);
    const ice_status to = lane_page_need(lane, shard, move->to.page);
    const ice_status from = row_to_move(lane, move->from) ? ICE_OK : lane_page_need(lane, shard, move->from.page);
    return from == ICE_PAGE_LOST || to == ICE_PAGE_LOST ? ICE_PAGE_LOST : from != ICE_OK ? from : to;
}

// A slice of the plan's copies. LANE_WAITS: pages are missing. Where room is short they are read for one move at a
// time, so that one does not push out what another has read.
static ice_status plan_copy_rows(struct lane *lane, struct shard *shard, const struct index_plan *plan)
{
    const size_t bytes = lane_token_bytes(lane);
    const uint32_t rows = bytes < SERVER_MOVE_BYTES ? (uint32_t)(SERVER_MOVE_BYTES / bytes) : 1;
    const uint32_t until = min_u32(plan->move_count, lane->plan_moves + rows);
    ice_status status = ICE_OK;
    for (uint32_t i = lane->plan_moves; i < until; i++) {
        const struct index_move *move = &plan->moves[i];
        const ice_status pages = need_move(lane, shard, move);
        if (pages == ICE_PAGE_LOST)
            return pages;
        status = pages != ICE_OK ? pages : status;
        if (status != ICE_OK && tier_is_short(shard->server))
            break;
        if (status != ICE_OK)
            continue; // all that are missing are read at once
        tier_change(shard, lane, move->to.page);
        memcpy(lane_row(lane, move->to), row_to_move(lane, move->from), bytes);
        lane->plan_moves++;
    }
    return status;
}

static void plan_commit(struct lane *lane, struct shard *shard, const struct index_plan *plan)
{
    lane_release_rows(lane);
    // Released pages go right before the commit, on the same thread: nothing reads them in between.
    for (uint32_t i = 0; i < plan->released_page_count; i++)
        lane_page_drop(lane, shard, plan->released_pages[i]);
    index_plan_commit(lane->index);
    lane->plan_runs = false;
    lane->commit_since_ns = 0;
    lane->plan_frames = lane->plan_moves = 0;
    if (lane->gathers > 0)
        shard_wake(shard); // what they wait for may lie in other pages now
    atomic_store_explicit(&lane->indexed, index_indexed(lane->index), memory_order_relaxed);
}

// A slice of the pending plan: pages first, then rows, at last the commit. A plan that finds no room is dropped, with
// the rows that the index was given for it: they are not looked at again.
static enum lane_work plan_step(struct lane *lane, struct shard *shard)
{
    struct index_plan plan;
    index_plan_get(lane->index, &plan);
    if (lane->plan_frames < plan.new_page_count) {
        if (plan_make_pages(lane, shard, &plan))
            return LANE_MORE;
        lane_drop_plan(lane, shard);
        return LANE_STALLED;
    }
    if (lane->plan_moves < plan.move_count) {
        const ice_status status = plan_copy_rows(lane, shard, &plan);
        return status == ICE_PAGE_LOST ? give_up(lane, shard) : status == LANE_WAITS ? LANE_FETCHES : LANE_MORE;
    }
    if (lane->cuts > 0) {
        if (lane->commit_since_ns == 0)
            lane->commit_since_ns = env_now_ns(shard->server->env);
        return LANE_FETCHES; // passed over until the last of them has ended
    }
    plan_commit(lane, shard, &plan);
    return LANE_MORE;
}

void lane_drop_plan(struct lane *lane, struct shard *shard)
{
    if (!lane->plan_runs)
        return;
    struct index_plan plan;
    index_plan_get(lane->index, &plan);
    plan_unmake_pages(lane, shard, &plan);
    lane_release_rows(lane);
    index_plan_drop(lane->index);
    lane->plan_runs = false;
    lane->commit_since_ns = 0;
    lane->plan_moves = 0;
}

enum lane_work lane_build(struct lane *lane, struct shard *shard)
{
    if (lane->saving)
        return LANE_STALLED;
    if (lane->plan_runs)
        return plan_step(lane, shard);
    switch (index_build_step(lane->index, SERVER_BUILD_UNITS)) {
    case INDEX_BUILD_IDLE:
        return LANE_IDLE;
    case INDEX_BUILD_MORE:
        return LANE_MORE;
    case INDEX_BUILD_ROWS:
        return rows_step(lane, shard);
    case INDEX_BUILD_PLAN:
        lane->plan_runs = true;
        return LANE_MORE;
    default:
        lane_release_rows(lane);
        return LANE_STALLED;
    }
}
