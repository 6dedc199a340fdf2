// Lanes: joins a DCI-tree (which page and row a token has) with frames of the pool (where that page is in memory).
//
// A frame holds page_tokens token rows, each the token's K row and V row side by side: a selected token is one
// contiguous read. All functions run on the shard that owns the lane.
//
// Invariants: a page has a frame from the moment the index names it (prepare, plan) until its last row is gone; an
// append or plan that fails gives its frames back before it returns, so the lane is as it was.
#include "cached/lane.h"

#include "cached/server.h"

#include <assert.h>
#include <string.h>

static struct server *server_of(const struct lane *lane)
{
    return lane->sequence->server;
}

static size_t token_bytes(const struct lane *lane)
{
    return 2 * lane->sequence->row_bytes;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// ---- memory of the index, counted against its budget ----

// What lies idle in the arenas' chunks, because blocks of other sizes were there, is memory as well: where a block
// needs another chunk, the cap holds for all chunks together, with room for some that are partly filled in each shard.
// What was promised is given all the same.
static bool may_grow(struct server *server)
{
    uint64_t idle = 0, spare = 0;
    for (uint32_t i = 0; i < server->shard_count; i++) {
        const struct arena *arena = &server->shards[i].arena;
        const uint64_t used = atomic_load_explicit(&arena->used_bytes, memory_order_relaxed);
        const uint64_t held = atomic_load_explicit(&arena->chunk_bytes, memory_order_relaxed);
        idle += held > used ? held - used : 0; // both change meanwhile
        spare += SERVER_SPARE_CHUNK_BYTES;
    }
    return budget_committed(&server->index_budget) + idle <= server->index_budget.cap_bytes + spare;
}

// Counted is what the arena takes for it, so that the cap holds for the memory and not only for what was asked for.
static void *index_acquire(void *owner, size_t bytes)
{
    struct lane *lane = owner;
    struct server *server = server_of(lane);
    struct arena *arena = &server->shards[lane->shard].arena;
    struct reservation *promised = lane->building ? NULL : &lane->sequence->index_promised;
    const size_t taken = arena_block_bytes(arena, bytes);
    if (arena_grows(arena, bytes) && budget_rest(&server->index_budget, promised) < taken && !may_grow(server))
        return NULL;
    if (!budget_take(&server->index_budget, promised, taken))
        return NULL;
    void *memory = arena_acquire(arena, bytes);
    if (!memory) {
        budget_give(&server->index_budget, taken);
        return NULL;
    }
    atomic_fetch_add_explicit(&lane->sequence->index_bytes, taken, memory_order_relaxed);
    return memory;
}

static void index_release(void *owner, void *memory, size_t bytes)
{
    struct lane *lane = owner;
    struct server *server = server_of(lane);
    struct arena *arena = &server->shards[lane->shard].arena;
    if (!memory)
        return;
    const size_t taken = arena_block_bytes(arena, bytes);
    arena_release(arena, memory, bytes);
    budget_give(&server->index_budget, taken);
    atomic_fetch_sub_explicit(&lane->sequence->index_bytes, taken, memory_order_relaxed);
}

static ice_status status_of(enum index_status status)
{
    switch (status) {
    case INDEX_OK:
        return ICE_OK;
    case INDEX_NO_MEMORY:
        return ICE_INDEX_FULL;
    case INDEX_NOT_FINITE:
        return ICE_NOT_FINITE;
    case INDEX_FULL:
        return ICE_TOO_LARGE;
    default:
        return ICE_INTERNAL;
    }
}

static ice_status ensure_index(struct lane *lane)
{
    if (lane->index)
        return ICE_OK;
    const struct server *server = server_of(lane);
    const struct wire_shape *shape = &lane->sequence->shape;
    // The seed depends on the configured seed, the layer and the head, and on nothing that differs between two runs.
    const struct index_params params = {
        .head_dim = shape->head_dim,
        .dtype = (enum index_dtype)shape->dtype,
        .page_tokens = (uint32_t)server->config->page_tokens,
        .seed = server->config->seed * 0x9e3779b97f4a7c15u + ((uint64_t)lane->layer << 32 | lane->kv_head),
    };
    const struct index_allocator allocator = {index_acquire, index_release, lane};
    return status_of(index_create(&params, &allocator, &lane->index));
}

// ---- frames ----

static bool ensure_frame_table(struct lane *lane, uint32_t page)
{
    if (page < lane->frame_capacity)
        return true;
    uint32_t capacity = lane->frame_capacity ? lane->frame_capacity : 16;
    while (capacity <= page)
        capacity += capacity / 2;
    void **frames = index_acquire(lane, capacity * sizeof *frames);
    if (!frames)
        return false;
    if (lane->frames)
        memcpy(frames, lane->frames, lane->frame_capacity * sizeof *frames);
    memset(frames + lane->frame_capacity, 0, (capacity - lane->frame_capacity) * sizeof *frames);
    index_release(lane, lane->frames, lane->frame_capacity * sizeof *frames);
    lane->frames = frames;
    lane->frame_capacity = capacity;
    return true;
}

static ice_status frame_give(struct lane *lane, uint32_t page, struct pool_reservation *promised)
{
    if (!ensure_frame_table(lane, page))
        return ICE_INDEX_FULL;
    assert(!lane->frames[page]);
    void *frame = pool_acquire(server_of(lane)->pool, promised, lane->sequence->frame_bytes);
    if (!frame)
        return ICE_POOL_FULL;
    lane->frames[page] = frame;
    atomic_fetch_add_explicit(&lane->sequence->frames, 1, memory_order_relaxed);
    return ICE_OK;
}

static void frame_drop(struct lane *lane, uint32_t page)
{
    assert(page < lane->frame_capacity && lane->frames[page]);
    pool_release(server_of(lane)->pool, lane->frames[page]);
    lane->frames[page] = NULL;
    atomic_fetch_sub_explicit(&lane->sequence->frames, 1, memory_order_relaxed);
}

static uint8_t *row_of(const struct lane *lane, struct index_place place)
{
    assert(place.page < lane->frame_capacity && lane->frames[place.page]);
    return (uint8_t *)lane->frames[place.page] + place.row * token_bytes(lane);
}

const uint8_t *lane_token(const struct lane *lane, struct index_place place)
{
    return row_of(lane, place);
}

// ---- append ----

uint64_t lane_promise_frames(const struct sequence *sequence, uint64_t tokens)
{
    return tokens / sequence->server->config->page_tokens + 2;
}

// What one array takes that grows from nothing to `count` entries by at least `percent` each time: the new one is there
// before the old one goes, and what goes is not promised again. The last one is at most 1 + percent/100 times the
// count, all of them together are a geometric series.
static uint64_t growth_entries(uint64_t count, uint64_t percent)
{
    return count * (100 + percent) / 100 * (100 + percent) / percent;
}

// The index stores 8-bit codes of keys, places and pages in chunks of the sizes below and points to the chunks from
// tables. The build takes its memory elsewhere, but the ids of its pages make the tables larger that an append then
// pays for.
//
// Chunks of codes and places: the parts of an append fill them up one after the other, so that whole chunks of
// `tokens` and one more are new. Pages: an append takes one id for each whole page of tokens and two at the ends; it
// pays for a new chunk each time that it takes the first id of one. Ids are used again, so there are never more of them
// than pages at one time: those of a plan together with those that it replaces, at most PAGES_PER_PAGE for each page of
// tokens (a page of a division is a third full at least, and a plan makes three of a full one before that goes).
uint64_t lane_promise_bytes(const struct sequence *sequence, uint64_t length, uint64_t tokens)
{
    enum { CODES_CHUNK = 64, PLACES_CHUNK = 256, PAGES_CHUNK = 64 }; // elements
    enum { PLACE_BYTES = 4, PAGE_BYTES = 12, CODE_HEAD_BYTES = 28, INDEX_BYTES = 8 << 10 };
    enum { PAGES_PER_PAGE = 4, TABLE_MIN = 16 };
    enum { SMALL_BLOCKS = 8 << 10 }; // what tables below 512 bytes take more, as all blocks have that
    const uint64_t page_tokens = sequence->server->config->page_tokens, end = length + tokens;
    const uint64_t code_bytes = sequence->shape.head_dim + CODE_HEAD_BYTES; // of a token
    const uint64_t taken = tokens / page_tokens + 2, ids = (end / page_tokens + 2) * PAGES_PER_PAGE;
    const uint64_t page_chunks = taken < ids / PAGES_CHUNK + 1 ? taken : ids / PAGES_CHUNK + 1;
    const struct arena *arena = &sequence->server->shards[0].arena; // all are alike in this
    const uint64_t chunks = (tokens / CODES_CHUNK + 2) * arena_block_bytes(arena, CODES_CHUNK * code_bytes) +
                            (tokens / PLACES_CHUNK + 2) * arena_block_bytes(arena, PLACES_CHUNK * PLACE_BYTES) +
                            page_chunks * arena_block_bytes(arena, PAGES_CHUNK * PAGE_BYTES);
    const uint64_t tables = growth_entries(end / CODES_CHUNK + TABLE_MIN, 100) +
                            growth_entries(end / PLACES_CHUNK + TABLE_MIN, 100) +
                            growth_entries(ids / PAGES_CHUNK + TABLE_MIN, 100) + growth_entries(ids + TABLE_MIN, 50);
    const uint64_t table_bytes =
        tables * sizeof(void *) + growth_entries(taken + TABLE_MIN, 50) * sizeof(uint32_t) + INDEX_BYTES;
    return chunks + table_bytes * 11 / 8 + SMALL_BLOCKS; // of tables what arena_block_bytes adds at most
}

uint64_t lane_length(const struct lane *lane)
{
    return lane->index ? index_length(lane->index) : 0;
}

// Do the stored tokens first .. first+tokens-1 equal the input's first rows, byte for byte?
static bool equals_stored(const struct lane *lane, const struct lane_input *input, uint32_t tokens)
{
    struct index_place places[64];
    size_t bytes = lane->sequence->row_bytes;
    for (uint32_t done = 0; done < tokens;) {
        uint32_t n = tokens - done < 64 ? tokens - done : 64;
        index_locate(lane->index, input->first + done, n, places);
        for (uint32_t i = 0; i < n; i++, done++) {
            const uint8_t *row = row_of(lane, places[i]);
            size_t offset = done * input->stride_bytes;
            if (memcmp(row, input->keys + offset, bytes) != 0 ||
                memcmp(row + bytes, input->values + offset, bytes) != 0)
                return false;
        }
    }
    return true;
}

static void drop_fresh(struct lane *lane)
{
    for (uint32_t i = 0; i < lane->fresh_count; i++)
        frame_drop(lane, lane->fresh_pages[i]);
    lane->fresh_count = 0;
}

static bool ensure_fresh(struct lane *lane, uint32_t capacity)
{
    if (capacity <= lane->fresh_capacity)
        return true;
    const uint32_t least = lane->fresh_capacity + lane->fresh_capacity / 2;
    capacity = capacity < least ? least : capacity;
    uint32_t *pages = index_acquire(lane, capacity * sizeof *pages);
    if (!pages)
        return false;
    index_release(lane, lane->fresh_pages, lane->fresh_capacity * sizeof *pages);
    lane->fresh_pages = pages;
    lane->fresh_capacity = capacity;
    return true;
}

// Gives a frame to every page of the places that has none. On failure none is kept.
static ice_status give_frames(struct lane *lane, const struct index_place *places, uint32_t tokens)
{
    uint32_t page_tokens = (uint32_t)server_of(lane)->config->page_tokens;
    if (!ensure_fresh(lane, tokens / page_tokens + 2))
        return ICE_INDEX_FULL;
    for (uint32_t i = 0; i < tokens; i++) {
        uint32_t page = places[i].page;
        if (page < lane->frame_capacity && lane->frames[page])
            continue;
        assert(lane->fresh_count < lane->fresh_capacity);
        ice_status status = frame_give(lane, page, &lane->sequence->frames_promised);
        if (status != ICE_OK) {
            drop_fresh(lane);
            return status;
        }
        lane->fresh_pages[lane->fresh_count++] = page;
    }
    return ICE_OK;
}

static ice_status prepare_rest(struct lane *lane, struct shard *shard, const struct lane_input *input, uint32_t skip)
{
    uint32_t tokens = input->tokens - skip;
    const uint8_t *keys = input->keys + skip * input->stride_bytes;
    const uint8_t *values = input->values + skip * input->stride_bytes;
    struct index_place *places =
        shard_scratch(shard, (void **)&shard->places, &shard->places_bytes, tokens * sizeof *places);
    if (!places)
        return ICE_NO_MEMORY;
    ice_status status = ensure_index(lane);
    if (status != ICE_OK)
        return status;
    status = status_of(index_append_prepare(lane->index, keys, input->stride_bytes, tokens, places));
    if (status != ICE_OK)
        return status;
    status = give_frames(lane, places, tokens);
    if (status != ICE_OK) {
        index_append_drop(lane->index);
        return status;
    }
    size_t bytes = lane->sequence->row_bytes;
    for (uint32_t i = 0; i < tokens; i++) {
        uint8_t *row = row_of(lane, places[i]);
        memcpy(row, keys + i * input->stride_bytes, bytes);
        memcpy(row + bytes, values + i * input->stride_bytes, bytes);
    }
    lane->prepared_tokens = tokens;
    return ICE_OK;
}

ice_status lane_prepare(struct lane *lane, struct shard *shard, const struct lane_input *input)
{
    assert(lane->prepared_tokens == 0 && lane->fresh_count == 0);
    uint64_t length = lane_length(lane);
    if (input->first > length)
        return ICE_POSITION_GAP;
    uint64_t overlap = length - input->first;
    uint32_t skip = overlap < input->tokens ? (uint32_t)overlap : input->tokens;
    if (skip > 0 && !equals_stored(lane, input, skip))
        return ICE_CONFLICT;
    return skip == input->tokens ? ICE_OK : prepare_rest(lane, shard, input, skip);
}

void lane_commit(struct lane *lane, struct shard *shard)
{
    lane->fresh_count = 0;
    if (lane->prepared_tokens == 0)
        return;
    lane->prepared_tokens = 0;
    index_append_commit(lane->index);
    shard_lane_due(shard, lane);
}

void lane_drop(struct lane *lane)
{
    if (lane->prepared_tokens == 0)
        return;
    lane->prepared_tokens = 0;
    drop_fresh(lane);
    index_append_drop(lane->index);
}

void lane_read(const struct lane *lane, uint64_t first, uint32_t tokens, uint8_t *keys, uint8_t *values)
{
    struct index_place places[64];
    size_t bytes = lane->sequence->row_bytes;
    for (uint32_t done = 0; done < tokens;) {
        uint32_t n = tokens - done < 64 ? tokens - done : 64;
        index_locate(lane->index, first + done, n, places);
        for (uint32_t i = 0; i < n; i++, done++) {
            const uint8_t *row = row_of(lane, places[i]);
            memcpy(keys + done * bytes, row, bytes);
            memcpy(values + done * bytes, row + bytes, bytes);
        }
    }
}

void lane_destroy(struct lane *lane)
{
    index_destroy(lane->index);
    lane->index = NULL;
    for (uint32_t page = 0; page < lane->frame_capacity; page++) {
        if (lane->frames[page])
            frame_drop(lane, page);
    }
    index_release(lane, lane->frames, lane->frame_capacity * sizeof *lane->frames);
    index_release(lane, lane->fresh_pages, lane->fresh_capacity * sizeof *lane->fresh_pages);
    lane->frames = NULL;
    lane->fresh_pages = NULL;
    lane->frame_capacity = lane->fresh_capacity = 0;
}

// ---- clustering ----

// A slice of giving frames to the plan's new pages. False where the pool has none: then all that were given are back.
static bool plan_give_frames(struct lane *lane, const struct index_plan *plan)
{
    uint32_t until = min_u32(plan->new_page_count, lane->plan_frames + SERVER_PLAN_PAGES);
    for (; lane->plan_frames < until; lane->plan_frames++) {
        if (frame_give(lane, plan->new_pages[lane->plan_frames], NULL) == ICE_OK)
            continue;
        while (lane->plan_frames > 0)
            frame_drop(lane, plan->new_pages[--lane->plan_frames]);
        return false;
    }
    return true;
}

static void plan_copy_rows(struct lane *lane, const struct index_plan *plan)
{
    size_t bytes = token_bytes(lane);
    uint32_t rows = bytes < SERVER_MOVE_BYTES ? (uint32_t)(SERVER_MOVE_BYTES / bytes) : 1;
    uint32_t until = min_u32(plan->move_count, lane->plan_moves + rows);
    for (; lane->plan_moves < until; lane->plan_moves++) {
        const struct index_move *move = &plan->moves[lane->plan_moves];
        memcpy(row_of(lane, move->to), row_of(lane, move->from), bytes);
    }
}

// A slice of the pending plan: frames first, then rows, at last the commit. The released pages' frames go right before
// the commit, on the same thread: nothing reads them in between.
static enum lane_work plan_step(struct lane *lane)
{
    struct index_plan plan;
    index_plan_get(lane->index, &plan);
    if (lane->plan_frames < plan.new_page_count) {
        if (!plan_give_frames(lane, &plan)) {
            index_plan_drop(lane->index);
            lane->plan_runs = false;
            return LANE_STALLED;
        }
        return LANE_MORE;
    }
    if (lane->plan_moves < plan.move_count) {
        plan_copy_rows(lane, &plan);
        return LANE_MORE;
    }
    for (uint32_t i = 0; i < plan.released_page_count; i++)
        frame_drop(lane, plan.released_pages[i]);
    index_plan_commit(lane->index);
    lane->plan_runs = false;
    lane->plan_frames = lane->plan_moves = 0;
    atomic_store_explicit(&lane->indexed, index_indexed(lane->index), memory_order_relaxed);
    return LANE_MORE;
}

// The K rows of a page, stride token_bytes, in memory until the next plan is committed; all frames are. NULL, with no
// effect, where they cannot be had now.
static const void *provide_rows(const struct lane *lane, uint32_t page)
{
    return row_of(lane, (struct index_place){page, 0});
}

// Hands the index the rows that it has asked for: all of them, or none yet.
static enum lane_work rows_step(struct lane *lane)
{
    const uint32_t *pages;
    uint32_t count;
    index_rows_get(lane->index, &pages, &count);
    const void **rows = index_acquire(lane, count * sizeof *rows);
    bool all = rows != NULL;
    for (uint32_t i = 0; all && i < count; i++) {
        rows[i] = provide_rows(lane, pages[i]);
        all = rows[i] != NULL;
    }
    if (all)
        index_rows_give(lane->index, rows, token_bytes(lane));
    index_release(lane, rows, count * sizeof *rows);
    return all ? LANE_MORE : LANE_STALLED;
}

static enum lane_work build_step(struct lane *lane)
{
    if (lane->plan_runs)
        return plan_step(lane);
    switch (index_build_step(lane->index, SERVER_BUILD_UNITS)) {
    case INDEX_BUILD_IDLE:
        return LANE_IDLE;
    case INDEX_BUILD_MORE:
        return LANE_MORE;
    case INDEX_BUILD_ROWS:
        return rows_step(lane);
    case INDEX_BUILD_PLAN:
        lane->plan_runs = true;
        return LANE_MORE;
    default:
        return LANE_STALLED;
    }
}

enum lane_work lane_build(struct lane *lane)
{
    lane->building = true;
    enum lane_work work = build_step(lane);
    lane->building = false;
    return work;
}
