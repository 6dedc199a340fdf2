// Stems: making, sharing and unmaking. Runs on the reactor; only the walks run on shards.
//
// A stem and its lanes are one allocation; the trees come with the first append.
#include "cached/stem.h"

#include "cached/quota.h"
#include "cached/sequence.h"
#include "cached/server.h"
#include "cached/session.h"
#include "proto/dtype.h"

#include <assert.h>
#include <string.h>

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

// The heads of a layer go to consecutive shards, so that a retrieve uses as many of them as it has heads.
static uint32_t shard_of(const struct server *server, uint64_t root, uint32_t layer, uint32_t kv_head)
{
    return (uint32_t)((mix(root + ((uint64_t)layer << 40)) + kv_head) % server->shard_count);
}

// ---- making ----

size_t stem_bytes(const struct server *server, uint32_t lane_count)
{
    return env_align(sizeof(struct stem)) + env_align(lane_count * sizeof(struct lane)) +
           2 * env_align(server->shard_count * sizeof(struct stem_walk));
}

// Counted as the index's memory: a stem of many lanes has megabytes of them before its first token.
static ice_status allocate(struct server *server, const struct stem_mould *mould, struct stem **out)
{
    const size_t lane_count = (size_t)mould->shape.layers * mould->shape.kv_heads;
    const size_t head = env_align(sizeof(struct stem)), lanes = env_align(lane_count * sizeof(struct lane));
    const size_t images = mould->images ? lane_count * sizeof(struct image *) : 0;
    const size_t walks = env_align(server->shard_count * sizeof(struct stem_walk));
    const size_t bytes = stem_bytes(server, (uint32_t)lane_count) + images;
    if (!budget_take(&server->index_budget, NULL, bytes))
        return ICE_INDEX_FULL;
    uint8_t *memory = env_acquire_zeroed(server->env, bytes);
    if (!memory) {
        budget_give(&server->index_budget, bytes);
        return ICE_NO_MEMORY;
    }
    struct stem *stem = (struct stem *)memory;
    stem->bytes = bytes;
    stem->tenant = mould->tenant;
    quota_count_index(stem, (int64_t)bytes);
    stem->lane_count = (uint32_t)lane_count;
    stem->lanes = (struct lane *)(memory + head);
    stem->images = mould->images ? (struct image **)(memory + head + lanes) : NULL;
    stem->walks = (struct stem_walk *)(memory + head + lanes + images);
    stem->reapers = (struct stem_walk *)(memory + head + lanes + images + walks);
    *out = stem;
    return ICE_OK;
}

static uint32_t anchor_of(const struct stem_mould *mould, uint32_t layer)
{
    return mould->anchors ? mould->anchors[layer] : mould->like ? stem_lane(mould->like, layer, 0)->anchor : layer;
}

static void init_lanes(struct stem *stem, const struct stem_mould *mould)
{
    for (uint32_t i = 0; i < stem->lane_count; i++) {
        struct lane *lane = &stem->lanes[i];
        lane->stem = stem;
        lane->layer = i / stem->shape.kv_heads;
        lane->kv_head = i % stem->shape.kv_heads;
        lane->anchor = anchor_of(mould, lane->layer);
        lane->shard = shard_of(stem->server, stem->root, lane->layer, lane->kv_head);
        if (!stem->images)
            continue;
        stem->images[i] = mould->images[i];
        image_hold(stem->images[i]);
        lane_attach(lane, stem->images[i]);
    }
    stem->asleep = stem->images != NULL;
    atomic_store_explicit(&stem->shared, stem->images != NULL, memory_order_relaxed);
}

ice_status stem_create(struct server *server, const struct stem_mould *mould, struct stem **out)
{
    struct stem *stem = NULL;
    const ice_status status = allocate(server, mould, &stem);
    if (status != ICE_OK)
        return status;
    stem->server = server;
    stem->sequence_id = mould->sequence_id;
    stem->root = mould->root;
    stem->seed = mould->seed;
    stem->first = mould->first;
    stem->depth = mould->depth;
    stem->shape = mould->shape;
    stem->row_bytes = stem->shape.head_dim * dtype_bytes((enum dtype)stem->shape.dtype);
    stem->frame_bytes = server_frame_bytes(server, stem->row_bytes);
    stem->holds = 1;
    stem->used_ns = env_now_ns(server->env);
    init_lanes(stem, mould);
    *out = stem;
    return ICE_OK;
}

// ---- unmaking ----

static void free_stem(struct stem *stem)
{
    struct server *server = stem->server;
    stem_unreserve(stem);
    for (uint32_t i = 0; stem->images && i < stem->lane_count; i++)
        image_destroy(server, stem->images[i]);
    const size_t bytes = stem->bytes;
    quota_count_index(stem, -(int64_t)bytes);
    server->env->release(server->env, stem, bytes);
    budget_give(&server->index_budget, bytes);
}

void stem_discard(struct stem *stem)
{
    for (uint32_t i = 0; stem->images && i < stem->lane_count; i++)
        lane_detach(&stem->lanes[i]);
    free_stem(stem);
}

void stem_hold(struct stem *stem)
{
    stem->holds++;
}

// Reactor, after the last reaper: the lanes are gone, now the rest.
static void stem_gone(struct completion *completion, struct server *server)
{
    (void)server;
    struct stem *stem = (struct stem *)((char *)completion - offsetof(struct stem, gone));
    struct sequence *told = stem->told;
    free_stem(stem);
    sequence_stem_gone(told);
}

static struct lane *next_lane(struct stem_walk *walk, const struct shard *shard)
{
    struct stem *stem = walk->stem;
    while (walk->next_lane < stem->lane_count && stem->lanes[walk->next_lane].shard != shard->index)
        walk->next_lane++;
    return walk->next_lane < stem->lane_count ? &stem->lanes[walk->next_lane++] : NULL;
}

// One lane at a time, so that a decode request waits for one at most.
static void reap(struct task *task, void *thread)
{
    struct stem_walk *walk = (struct stem_walk *)task;
    struct stem *stem = walk->stem;
    struct server *server = stem->server;
    struct shard *shard = thread;
    struct lane *lane = next_lane(walk, shard);
    if (lane) {
        shard_lane_forget(shard, lane);
        lane_destroy(lane, shard);
        task_queue_push(&shard->queue, TASK_BULK, task);
        return;
    }
    if (atomic_fetch_sub_explicit(&stem->reapers_left, 1, memory_order_acq_rel) == 1)
        completion_post(&server->completions, &stem->gone);
}

// flow: whose work it is (task_queue.h).
static void start_walks(struct stem *stem, struct stem_walk *walks, void (*run)(struct task *, void *), uint32_t flow)
{
    struct server *server = stem->server;
    const uint32_t count = server->shard_count; // the stem may be gone when the last one has been pushed
    for (uint32_t i = 0; i < count; i++)
        walks[i] = (struct stem_walk){.task = {.run = run, .flow = flow}, .stem = stem};
    for (uint32_t i = 0; i < count; i++)
        task_queue_push(&server->shards[i].queue, TASK_BULK, &walks[i].task);
}

bool stem_release(struct stem *stem, struct sequence *told)
{
    if (--stem->holds > 0)
        return false;
    prefix_forget_stem(stem);
    stem->told = told;
    stem->gone.done = stem_gone;
    atomic_store_explicit(&stem->reapers_left, stem->server->shard_count, memory_order_relaxed);
    start_walks(stem, stem->reapers, reap, stem->walked ? stem->walk_flow : told->session->slot);
    return true;
}

// ---- sharing ----

// A few numbers for each lane: all in one go.
static void end_appends(struct task *task, void *thread)
{
    struct shard *shard = thread;
    for (struct lane *lane; (lane = next_lane((struct stem_walk *)task, shard)) != NULL;)
        lane_end_appends(lane, shard);
}

void stem_share(struct stem *stem, const struct sequence *by)
{
    stem_unreserve(stem);
    atomic_store_explicit(&stem->shared, true, memory_order_relaxed);
    if (!stem_is_flushed(stem))
        return;
    stem->walked = true;
    stem->walk_flow = by->session->slot;
    start_walks(stem, stem->walks, end_appends, stem->walk_flow);
}

// ---- what appends are promised ----

ice_status stem_reserve_pages(struct stem *stem, uint64_t pages)
{
    struct server *server = stem->server;
    if (!tier_serves(server))
        return pool_reserve(server->pool, &stem->frames_promised, stem->frame_bytes, pages) ? ICE_OK : ICE_POOL_FULL;
    if (extents_reserve(server->extents, &stem->extents_promised, stem->frame_bytes, pages) == pages)
        return ICE_OK;
    extents_unreserve(server->extents, &stem->extents_promised, stem->frame_bytes);
    return ICE_SPILL_FULL;
}

void stem_unreserve(struct stem *stem)
{
    struct server *server = stem->server;
    pool_unreserve(server->pool, &stem->frames_promised, stem->frame_bytes);
    if (server->extents)
        extents_unreserve(server->extents, &stem->extents_promised, stem->frame_bytes);
    budget_unreserve(&server->index_budget, &stem->index_promised);
    tenant_unpromise(stem->tenant, &stem->quota_promised);
}

uint64_t stem_indexed(const struct stem *stem, uint32_t layer)
{
    uint64_t indexed = UINT64_MAX;
    for (uint32_t head = 0; head < stem->shape.kv_heads; head++) {
        const uint64_t lane = atomic_load_explicit(&stem_lane(stem, layer, head)->indexed, memory_order_relaxed);
        indexed = lane < indexed ? lane : indexed;
    }
    return indexed;
}
