// Lanes: joins a DCI-tree (which page and row a token has) with its pages (where that page is).
//
// A frame holds page_tokens token rows, each the token's K row and V row side by side: a selected token is one
// contiguous read. All functions run on the shard that owns the lane.
//
// Invariants: a page is in the table from the moment the index names it (prepare, plan) until its last row is gone; it
// is in memory, or on the disk (tier.h). An append or plan that fails gives its pages back before it returns, so the
// lane is as it was.
#include "cached/lane_pages.h"

#include "cached/log.h"
#include "cached/quota.h"
#include "cached/server.h"

#include <assert.h>
#include <string.h>

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
    struct server *server = lane_server(lane);
    struct arena *arena = &server->shards[lane->shard].arena;
    struct reservation *promised = lane->appending ? &lane->stem->index_promised : NULL;
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
    quota_count_index(lane->stem, (int64_t)taken);
    return memory;
}

static void index_release(void *owner, void *memory, size_t bytes)
{
    struct lane *lane = owner;
    struct server *server = lane_server(lane);
    struct arena *arena = &server->shards[lane->shard].arena;
    if (!memory)
        return;
    const size_t taken = arena_block_bytes(arena, bytes);
    arena_release(arena, memory, bytes);
    budget_give(&server->index_budget, taken);
    quota_count_index(lane->stem, -(int64_t)taken);
}

void *lane_acquire_memory(struct lane *lane, size_t bytes)
{
    return index_acquire(lane, bytes);
}

void lane_release_memory(struct lane *lane, void *memory, size_t bytes)
{
    index_release(lane, memory, bytes);
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

static struct index_params params_of(const struct lane *lane)
{
    const struct stem *stem = lane->stem;
    // The seed depends on the stem's, the layer and the head, and on nothing that differs between two runs.
    return (struct index_params){
        .head_dim = stem->shape.head_dim,
        .dtype = (enum index_dtype)stem->shape.dtype,
        .page_tokens = (uint32_t)stem->server->config->page_tokens,
        .is_continuation = stem->first > 0,
        .seed = stem->seed * 0x9e3779b97f4a7c15u + ((uint64_t)lane->layer << 32 | lane->kv_head),
    };
}

static ice_status ensure_index(struct lane *lane)
{
    if (lane->index)
        return ICE_OK;
    const struct index_params params = params_of(lane);
    const struct index_allocator allocator = {index_acquire, index_release, lane};
    return status_of(index_create(&params, &allocator, &lane->index));
}

// ---- pages ----

static bool ensure_page_table(struct lane *lane, uint32_t page)
{
    if (page < lane->page_capacity)
        return true;
    uint32_t capacity = lane->page_capacity ? lane->page_capacity : 16;
    while (capacity <= page)
        capacity += capacity / 2;
    struct page *pages = index_acquire(lane, capacity * sizeof *pages);
    if (!pages)
        return false;
    if (lane->pages)
        memcpy(pages, lane->pages, lane->page_capacity * sizeof *pages);
    memset(pages + lane->page_capacity, 0, (capacity - lane->page_capacity) * sizeof *pages);
    index_release(lane, lane->pages, lane->page_capacity * sizeof *pages);
    lane->pages = pages;
    lane->page_capacity = capacity;
    return true;
}

bool lane_page_is_lost(const struct lane *lane, uint32_t page)
{
    const struct page *entry = &lane->pages[page];
    // A disk that is off stays off; what is on its way is answered all the same.
    return entry->flags & PAGE_LOST ||
           (!entry->memory && !(entry->flags & PAGE_READING) && !tier_serves(lane_server(lane)));
}

bool lane_is_whole(const struct lane *lane)
{
    for (uint32_t page = 0; page < lane->page_capacity; page++) {
        if (lane_page_is_used(lane, page) && lane_page_is_lost(lane, page))
            return false;
    }
    return lane->state != LANE_LOST;
}

ice_status lane_page_make(struct lane *lane, struct shard *shard, uint32_t page, bool promised)
{
    struct server *server = lane_server(lane);
    struct stem *stem = lane->stem;
    if (!ensure_page_table(lane, page))
        return ICE_INDEX_FULL;
    assert(!lane_page_is_used(lane, page));
    uint32_t extent = EXTENT_NONE;
    if (tier_serves(server)) {
        extent = extents_acquire(server->extents, promised ? &stem->extents_promised : NULL, stem->frame_bytes);
        if (extent == EXTENT_NONE)
            return ICE_SPILL_FULL;
    }
    lane->pages[page] = (struct page){.extent = extent, .flags = PAGE_USED};
    lane->absent++;
    if (!tier_take_frame(shard, lane, page, promised ? &stem->frames_promised : NULL)) {
        if (extent != EXTENT_NONE)
            extents_release(server->extents, &extent, 1);
        lane->pages[page] = (struct page){0};
        lane->absent--;
        lane->lacks_room = true;
        return tier_serves(server) ? LANE_WAITS : ICE_POOL_FULL;
    }
    lane->pages[page].visited = 1;
    quota_count_pages(stem, 1);
    return ICE_OK;
}

void lane_page_drop(struct lane *lane, struct shard *shard, uint32_t page)
{
    assert(lane_page_is_used(lane, page));
    tier_forget(shard, lane, page);
    quota_count_pages(lane->stem, -1);
}

ice_status lane_page_need(struct lane *lane, struct shard *shard, uint32_t page)
{
    assert(lane_page_is_used(lane, page));
    lane->pages[page].visited = 1;
    if (lane->pages[page].memory)
        return ICE_OK;
    if (lane_page_is_lost(lane, page))
        return ICE_PAGE_LOST;
    if (!tier_read(shard, lane, page))
        lane->lacks_room = true;
    return LANE_WAITS;
}

// ---- append ----

uint64_t lane_length(const struct lane *lane)
{
    return lane->index ? index_length(lane->index) : 0;
}

// What an append compares or stores until others have their turn.
static uint32_t slice_tokens(const struct lane *lane)
{
    return SERVER_APPEND_SLICE_BYTES / (uint32_t)lane_token_bytes(lane);
}

ice_status lane_compare(struct lane *lane, struct shard *shard, struct lane_input *input, uint32_t tokens)
{
    struct index_place places[64];
    size_t bytes = lane->stem->row_bytes;
    const uint32_t until = input->compared + slice_tokens(lane);
    while (input->compared < tokens) {
        if (input->compared >= until)
            return LANE_CUT;
        const uint32_t done = input->compared, n = tokens - done < 64 ? tokens - done : 64;
        ice_status status = ICE_OK;
        index_locate(lane->index, input->first + done, n, places);
        for (uint32_t i = 0; i < n; i++) {
            const ice_status page = lane_page_need(lane, shard, places[i].page);
            if (status == ICE_OK || page == ICE_PAGE_LOST)
                status = page; // all that are missing are read at once
            if (status != ICE_OK)
                continue;
            const uint8_t *row = lane_row(lane, places[i]);
            const size_t offset = (done + i) * input->stride_bytes;
            if (memcmp(row, input->keys + offset, bytes) != 0 ||
                memcmp(row + bytes, input->values + offset, bytes) != 0)
                return ICE_CONFLICT;
            input->compared++;
        }
        if (status != ICE_OK)
            return status;
    }
    return ICE_OK;
}

static void drop_fresh(struct lane *lane, struct shard *shard)
{
    for (uint32_t i = 0; i < lane->fresh_count; i++)
        lane_page_drop(lane, shard, lane->fresh_pages[i]);
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

// Rows of places that lie in one page, from the first on.
static uint32_t run_of(const struct index_place *places, uint32_t n)
{
    uint32_t run = 1;
    while (run < n && places[run].page == places[0].page)
        run++;
    return run;
}

// The page of a prepared token, made where it is not there.
static ice_status page_for(struct lane *lane, struct shard *shard, uint32_t page)
{
    if (lane_page_is_used(lane, page))
        return lane_page_need(lane, shard, page);
    assert(lane->fresh_count < lane->fresh_capacity);
    const ice_status status = lane_page_make(lane, shard, page, true);
    if (status == ICE_OK)
        lane->fresh_pages[lane->fresh_count++] = page;
    return status;
}

static void store_rows(struct lane *lane, const struct lane_input *input, uint64_t from,
                       const struct index_place *places, uint32_t n)
{
    const size_t bytes = lane->stem->row_bytes;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *row = lane_row(lane, places[i]);
        memcpy(row, input->keys + (from + i) * input->stride_bytes, bytes);
        memcpy(row + bytes, input->values + (from + i) * input->stride_bytes, bytes);
    }
}

// Stores what the index has taken in, page by page, each as soon as it is in memory: no two of them need be there at
// the same time. `skip`: tokens of the input before the prepared ones.
static ice_status store_prepared(struct lane *lane, struct shard *shard, const struct lane_input *input, uint32_t skip)
{
    struct index_place places[64];
    while (lane->stored_tokens < lane->prepared_tokens) {
        const uint32_t done = lane->stored_tokens, n = min_u32(lane->prepared_tokens - done, 64);
        index_append_places(lane->index, input->first + skip + done, n, places);
        for (uint32_t i = 0, run; i < n; i += run) {
            run = run_of(places + i, n - i);
            const ice_status status = page_for(lane, shard, places[i].page);
            if (status != ICE_OK)
                return status;
            tier_change(shard, lane, places[i].page);
            store_rows(lane, input, (uint64_t)skip + done + i, places + i, run);
            lane->stored_tokens += run;
        }
    }
    return ICE_OK;
}

static ice_status prepare_first(struct lane *lane, struct shard *shard, const struct lane_input *input, uint32_t skip,
                                uint32_t n)
{
    const uint32_t tokens = input->tokens - skip, page_tokens = (uint32_t)lane_server(lane)->config->page_tokens;
    struct index_place *places =
        shard_scratch(shard, (void **)&shard->places, &shard->places_bytes, n * sizeof *places);
    if (!places)
        return ICE_NO_MEMORY;
    ice_status status = ensure_index(lane);
    if (status == ICE_OK && !ensure_fresh(lane, tokens / page_tokens + 2))
        status = ICE_INDEX_FULL;
    if (status != ICE_OK)
        return status;
    const uint8_t *keys = input->keys + skip * input->stride_bytes;
    return status_of(index_append_prepare(lane->index, keys, input->stride_bytes, n, places));
}

// The index takes in the next slice of the tokens behind `skip`.
static ice_status prepare_slice(struct lane *lane, struct shard *shard, const struct lane_input *input, uint32_t skip)
{
    const uint32_t done = lane->prepared_tokens, n = min_u32(input->tokens - skip - done, slice_tokens(lane));
    const uint8_t *keys = input->keys + ((size_t)skip + done) * input->stride_bytes;
    const ice_status status = done == 0 ? prepare_first(lane, shard, input, skip, n)
                                        : status_of(index_append_more(lane->index, keys, input->stride_bytes, n));
    if (status == ICE_OK)
        lane->prepared_tokens += n;
    return status;
}

// Goes on with an append: what overlaps is compared, then slices are taken in and stored, one in each call.
static ice_status prepare_step(struct lane *lane, struct shard *shard, struct lane_input *input, uint32_t skip)
{
    ice_status status = lane_compare(lane, shard, input, skip);
    if (status == ICE_OK && lane->stored_tokens == lane->prepared_tokens &&
        lane->prepared_tokens < input->tokens - skip)
        status = prepare_slice(lane, shard, input, skip);
    if (status == ICE_OK)
        status = store_prepared(lane, shard, input, skip);
    if (status == ICE_OK && lane->prepared_tokens < input->tokens - skip)
        status = LANE_CUT;
    return status;
}

ice_status lane_prepare(struct lane *lane, struct shard *shard, struct lane_input *input)
{
    const uint64_t length = lane_length(lane);
    if (input->first > length)
        return ICE_POSITION_GAP;
    const uint64_t overlap = length - input->first;
    const uint32_t skip = overlap < input->tokens ? (uint32_t)overlap : input->tokens;
    lane->lacks_room = false;
    lane->appending = true;
    const ice_status status = prepare_step(lane, shard, input, skip);
    lane->appending = false;
    if (status != ICE_OK && status != LANE_WAITS && status != LANE_CUT)
        lane_drop(lane, shard);
    return status;
}

void lane_commit(struct lane *lane, struct shard *shard)
{
    assert(lane->stored_tokens == lane->prepared_tokens);
    lane->fresh_count = 0;
    if (lane->prepared_tokens == 0)
        return;
    lane->prepared_tokens = lane->stored_tokens = 0;
    index_append_commit(lane->index);
    shard_lane_due(shard, lane);
}

void lane_drop(struct lane *lane, struct shard *shard)
{
    if (lane->prepared_tokens == 0)
        return;
    lane->prepared_tokens = lane->stored_tokens = 0;
    drop_fresh(lane, shard);
    index_append_drop(lane->index);
}

void lane_read(const struct lane *lane, uint64_t first, uint32_t tokens, uint8_t *keys, uint8_t *values)
{
    struct index_place places[64];
    size_t bytes = lane->stem->row_bytes;
    for (uint32_t done = 0; done < tokens;) {
        uint32_t n = tokens - done < 64 ? tokens - done : 64;
        index_locate(lane->index, first + done, n, places);
        for (uint32_t i = 0; i < n; i++, done++) {
            const uint8_t *row = lane_row(lane, places[i]);
            memcpy(keys + done * bytes, row, bytes);
            memcpy(values + done * bytes, row + bytes, bytes);
        }
    }
}

// ---- the end of appends, and truncation ----

void lane_end_appends(struct lane *lane, struct shard *shard)
{
    if (!lane->index)
        return; // nothing has been appended, or it sleeps: then it is done when it wakes
    index_seal(lane->index);
    shard_lane_due(shard, lane);
}

ice_status lane_truncate_prepare(struct lane *lane, struct shard *shard)
{
    shard_lane_forget(shard, lane); // a plan that is committed until then could take more pages than there is room for
    const size_t bytes = lane->index ? index_page_bound(lane->index) * sizeof(uint32_t) : 0;
    return shard_scratch(shard, (void **)&shard->places, &shard->places_bytes, bytes) || bytes == 0 ? ICE_OK
                                                                                                    : ICE_NO_MEMORY;
}

void lane_truncate_drop(struct lane *lane, struct shard *shard)
{
    if (lane->index)
        shard_lane_due(shard, lane);
}

void lane_truncate(struct lane *lane, struct shard *shard, uint64_t length)
{
    uint32_t *released = (uint32_t *)shard->places, count = 0;
    if (!lane->index)
        return;
    if (index_length(lane->index) <= length) {
        lane_truncate_drop(lane, shard);
        return;
    }
    lane_drop_plan(lane, shard);
    lane_release_rows(lane);
    index_truncate(lane->index, length, released, &count);
    for (uint32_t i = 0; i < count; i++)
        lane_page_drop(lane, shard, released[i]);
    atomic_store_explicit(&lane->indexed, index_indexed(lane->index), memory_order_relaxed);
    shard_lane_forget(shard, lane);
    shard_lane_due(shard, lane);
}

// ---- sleeping and waking ----

static void free_tables(struct lane *lane)
{
    index_release(lane, lane->pages, lane->page_capacity * sizeof *lane->pages);
    index_release(lane, lane->fresh_pages, lane->fresh_capacity * sizeof *lane->fresh_pages);
    lane->pages = NULL;
    lane->fresh_pages = NULL;
    lane->page_capacity = lane->fresh_capacity = lane->absent = 0;
    lane->commit_since_ns = 0;
}

ice_status lane_need(struct lane *lane, struct shard *shard)
{
    const ice_status failure = lane->wake_failure;
    switch (lane->state) {
    case LANE_AWAKE:
        return ICE_OK;
    case LANE_LOST:
        return ICE_PAGE_LOST;
    case LANE_WAKING:
        return LANE_WAITS;
    default:
        break;
    }
    lane->wake_failure = ICE_OK;
    if (failure != ICE_OK)
        return failure;
    lane->state = LANE_WAKING;
    images_wake(shard, lane);
    return LANE_WAITS;
}

void lane_fall_asleep(struct lane *lane, struct shard *shard, struct image *image)
{
    shard_lane_forget(shard, lane);
    tier_forget_wishes(shard, lane);
    lane_release_rows(lane);
    index_destroy(lane->index);
    lane->index = NULL;
    for (uint32_t page = 0; page < lane->page_capacity; page++) {
        if (lane_page_is_used(lane, page))
            tier_forget(shard, lane, page); // the image holds the extents too
    }
    free_tables(lane);
    lane->image = image;
    quota_count_image(lane->stem, image, 1);
    lane->image_is_prefix = false;
    lane->state = LANE_ASLEEP;
    atomic_fetch_add_explicit(&lane_server(lane)->tier_stats.asleep, 1, memory_order_relaxed);
}

void lane_attach(struct lane *lane, struct image *image)
{
    lane->image = image;
    lane->image_is_prefix = true;
    lane->state = LANE_ASLEEP;
    atomic_store_explicit(&lane->indexed, image->indexed, memory_order_relaxed);
    atomic_fetch_add_explicit(&lane_server(lane)->tier_stats.asleep, 1, memory_order_relaxed);
}

void lane_detach(struct lane *lane)
{
    lane->image = NULL;
    lane->state = LANE_AWAKE;
    atomic_fetch_sub_explicit(&lane_server(lane)->tier_stats.asleep, 1, memory_order_relaxed);
}

ice_status lane_load_begin(struct lane *lane, uint64_t bytes, struct index_load **out)
{
    const struct index_params params = params_of(lane);
    const struct index_allocator allocator = {index_acquire, index_release, lane};
    const ice_status status = status_of(index_load_begin(&params, &allocator, bytes, out));
    return status == ICE_INTERNAL ? ICE_PAGE_LOST : status;
}

ice_status lane_load_feed(struct index_load *load, const void *bytes, size_t n)
{
    const ice_status status = status_of(index_load_feed(load, bytes, n));
    return status == ICE_INTERNAL ? ICE_PAGE_LOST : status;
}

ice_status lane_load_end(struct lane *lane, struct index_load *load)
{
    const ice_status status = status_of(index_load_finish(load, &lane->index));
    return status == ICE_INTERNAL ? ICE_PAGE_LOST : status;
}

ice_status lane_load_page(struct lane *lane, uint32_t page, uint32_t extent, uint64_t checksum)
{
    if (!lane->index || page >= index_page_bound(lane->index) || index_page_rows(lane->index, page) == 0 ||
        lane_page_is_used(lane, page))
        return ICE_PAGE_LOST;
    if (!ensure_page_table(lane, page))
        return ICE_INDEX_FULL;
    lane->pages[page] = (struct page){.checksum = checksum, .extent = extent, .flags = PAGE_USED | PAGE_CLEAN};
    lane->absent++;
    if (lane->image_is_prefix)
        extents_hold(lane_server(lane)->extents, &extent, 1);
    return ICE_OK;
}

// What a waking has made so far goes again; the image has it all.
static void undo_waking(struct lane *lane)
{
    index_destroy(lane->index);
    lane->index = NULL;
    for (uint32_t page = 0; page < lane->page_capacity; page++) {
        if (lane_page_is_used(lane, page) && lane->image_is_prefix)
            extents_release(lane_server(lane)->extents, &lane->pages[page].extent, 1);
    }
    free_tables(lane);
}

static uint32_t used_pages(const struct lane *lane)
{
    uint32_t count = 0;
    for (uint32_t page = 0; page < lane->page_capacity; page++)
        count += lane_page_is_used(lane, page);
    return count;
}

static bool is_waited_for(const struct lane *lane, const struct shard *shard)
{
    for (const struct op_lane *part = shard->parked; part; part = part->parked_next) {
        if (part->awaited == lane)
            return true;
    }
    return false;
}

void lane_woken(struct lane *lane, struct shard *shard, ice_status status)
{
    struct server *server = lane_server(lane);
    assert(lane->state == LANE_WAKING);
    if (status == ICE_OK && lane->image_is_prefix)
        quota_count_pages(lane->stem, (int64_t)used_pages(lane));
    if (status != ICE_OK) {
        undo_waking(lane);
        const bool lost = status != ICE_INDEX_FULL && status != ICE_NO_MEMORY;
        lane->state = lost ? LANE_LOST : LANE_ASLEEP;
        lane->wake_failure = is_waited_for(lane, shard) ? status : ICE_OK;
        if (lost)
            log_error("the image of layer %u, KV head %u of sequence %llu cannot be read back from the spill file; "
                      "requests that need it fail",
                      lane->layer, lane->kv_head, (unsigned long long)lane->stem->sequence_id);
        return;
    }
    if (!lane->image_is_prefix) {
        quota_count_image(lane->stem, lane->image, -1);
        lane->image->page_count = 0; // their holds are the table's now
        image_destroy(server, lane->image);
    }
    lane->image = NULL;
    lane->state = LANE_AWAKE;
    atomic_fetch_sub_explicit(&server->tier_stats.asleep, 1, memory_order_relaxed);
    if (!lane->index)
        return;
    atomic_store_explicit(&lane->indexed, index_indexed(lane->index), memory_order_relaxed);
    if (stem_is_flushed(lane->stem))
        index_seal(lane->index);
    shard_lane_due(shard, lane);
}

// ---- the end ----

static void destroy_awake(struct lane *lane, struct shard *shard)
{
    tier_forget_wishes(shard, lane);
    lane_release_rows(lane);
    index_destroy(lane->index);
    lane->index = NULL;
    for (uint32_t page = 0; page < lane->page_capacity; page++) {
        if (lane_page_is_used(lane, page))
            lane_page_drop(lane, shard, page);
    }
    free_tables(lane);
}

void lane_destroy(struct lane *lane, struct shard *shard)
{
    if (lane->state == LANE_AWAKE) {
        destroy_awake(lane, shard);
        return;
    }
    struct server *server = lane_server(lane);
    if (lane->state == LANE_WAKING)
        images_forget(shard, lane);
    undo_waking(lane);
    if (!lane->image_is_prefix) {
        quota_count_pages(lane->stem, -(int64_t)lane->image->page_count);
        quota_count_image(lane->stem, lane->image, -1);
        image_destroy(server, lane->image);
    }
    lane->image = NULL;
    lane->state = LANE_AWAKE;
    atomic_fetch_sub_explicit(&server->tier_stats.asleep, 1, memory_order_relaxed);
}
