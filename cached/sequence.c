// Sequences: making, finding and unmaking. Runs on the reactor; only the reapers run on shards.
//
// A sequence and its lanes are one allocation, so that an open sequence costs one allocation; the trees come
// with the first append.
#include "cached/sequence.h"

#include "cached/quota.h"
#include "cached/server.h"
#include "proto/dtype.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static size_t align8(size_t bytes)
{
    return (bytes + 7) & ~(size_t)7;
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

// The heads of a layer go to consecutive shards, so that a retrieve uses as many of them as it has heads.
static uint32_t shard_of(const struct server *server, uint64_t id, uint32_t layer, uint32_t kv_head)
{
    return (uint32_t)((mix(id + ((uint64_t)layer << 40)) + kv_head) % server->shard_count);
}

static void init_identity(struct sequence *sequence, const Icecache__Wire__SequenceOpen *message, uint64_t tokens_max)
{
    prefix_identity_of(sequence->server, message, &sequence->identity);
    sequence->shape = (struct wire_shape){
        .layers = message->layers,
        .kv_heads = message->kv_heads,
        .query_heads = message->query_heads,
        .head_dim = message->head_dim,
        .dtype = message->dtype,
    };
    sequence->scale =
        message->softmax_scale > 0 ? message->softmax_scale : (float)(1.0 / sqrt((double)message->head_dim));
    sequence->tokens_max = message->max_tokens && message->max_tokens < tokens_max ? message->max_tokens : tokens_max;
}

static void init_lanes(struct server *server, struct sequence *sequence, const Icecache__Wire__SequenceOpen *message)
{
    for (uint32_t i = 0; i < sequence->lane_count; i++) {
        struct lane *lane = &sequence->lanes[i];
        lane->sequence = sequence;
        lane->layer = i / sequence->shape.kv_heads;
        lane->kv_head = i % sequence->shape.kv_heads;
        lane->anchor = message->n_anchor_layers > 0 ? message->anchor_layers[lane->layer] : lane->layer;
        lane->shard = shard_of(server, sequence->id, lane->layer, lane->kv_head);
    }
}

// Counted as the index's memory: a sequence of many lanes has megabytes of them before its first token.
static ice_status allocate(struct server *server, struct tenant *tenant, const Icecache__Wire__SequenceOpen *message,
                           char *text, struct sequence **out)
{
    size_t lane_count = (size_t)message->layers * message->kv_heads;
    size_t head = align8(sizeof(struct sequence));
    size_t lanes = align8(lane_count * sizeof(struct lane));
    size_t lengths = align8(message->layers * sizeof(uint64_t));
    size_t reapers = align8(server->shard_count * sizeof(struct sequence_reaper));
    size_t bytes = head + lanes + lengths + reapers + align8(sizeof(struct op)) + align8(sizeof(struct admission));
    const struct tenant_need need = {.index_bytes = bytes};
    ice_status status = tenant_may_open(tenant, text);
    if (status == ICE_OK)
        status = tenant_may_take(tenant, NULL, &need, tier_serves(server), text);
    if (status != ICE_OK)
        return status;
    if (!budget_take(&server->index_budget, NULL, bytes))
        return ICE_INDEX_FULL;
    uint8_t *memory = env_acquire_zeroed(server->env, bytes);
    if (!memory) {
        budget_give(&server->index_budget, bytes);
        return ICE_NO_MEMORY;
    }
    struct sequence *sequence = (struct sequence *)memory;
    sequence->bytes = bytes;
    sequence->tenant = tenant;
    quota_count_index(sequence, (int64_t)bytes);
    sequence->lane_count = (uint32_t)lane_count;
    sequence->lanes = (struct lane *)(memory + head);
    sequence->lengths = (uint64_t *)(memory + head + lanes);
    sequence->reapers = (struct sequence_reaper *)(memory + head + lanes + lengths);
    sequence->close_op = (struct op *)(memory + head + lanes + lengths + reapers);
    sequence->close_op->admissions = (struct admission *)((uint8_t *)sequence->close_op + align8(sizeof(struct op)));
    *out = sequence;
    return ICE_OK;
}

// Memory for it, counted in its namespace; NULL, with the status that says why.
static struct sequence *take_memory(struct server *server, const Icecache__Wire__SequenceOpen *message, char *text,
                                    ice_status *status)
{
    struct sequence *sequence = NULL;
    *status = ICE_LIMIT;
    if (server->sequence_count >= server->config->sequences_max) {
        snprintf(text, TENANT_TEXT_BYTES, "%u sequences are open, as many as --sequences-max allows",
                 server->sequence_count);
        return NULL;
    }
    struct tenant *tenant =
        tenant_take(&server->tenants, server->env, server->config, message->name_space, false, status);
    if (!tenant) {
        if (*status == ICE_LIMIT)
            snprintf(text, TENANT_TEXT_BYTES, "%u namespaces are in use, as many as --namespaces-max allows",
                     server->tenants.count);
        return NULL;
    }
    *status = allocate(server, tenant, message, text, &sequence);
    tenant->sequences += sequence != NULL;
    tenant->refused += *status == ICE_QUOTA;
    tenant_drop_empty(&server->tenants, server->env, tenant);
    return sequence;
}

ice_status sequence_open(struct server *server, struct session *session, const Icecache__Wire__SequenceOpen *message,
                         char *text, struct sequence **out)
{
    ice_status status;
    struct sequence *sequence = take_memory(server, message, text, &status);
    if (!sequence)
        return status;
    sequence->id = ++server->next_id;
    sequence->opened_ns = sequence->used_ns = env_now_ns(server->env);
    sequence->server = server;
    sequence->session = session;
    init_identity(sequence, message, server->config->tokens_max);
    sequence->row_bytes = sequence->shape.head_dim * dtype_bytes((enum dtype)sequence->shape.dtype);
    sequence->seed = server->config->seed;
    sequence->frame_bytes = server_frame_bytes(server, sequence->row_bytes);
    init_lanes(server, sequence, message);
    session_hold(session);
    sequence->session_next = session->sequences;
    session->sequences = sequence;
    session->sequence_count++;
    struct sequence **bucket = &server->sequences[sequence->id % SERVER_HASH_BUCKETS];
    sequence->hash_next = *bucket;
    *bucket = sequence;
    server->sequence_count++;
    *out = sequence;
    return ICE_OK;
}

struct sequence *sequence_find(struct server *server, const struct session *session, uint64_t id)
{
    struct sequence *sequence = server->sequences[id % SERVER_HASH_BUCKETS];
    while (sequence && sequence->id != id)
        sequence = sequence->hash_next;
    return sequence && sequence->session == session && !sequence->closing ? sequence : NULL;
}

static void unlink_sequence(struct server *server, struct sequence *sequence)
{
    struct sequence **link = &server->sequences[sequence->id % SERVER_HASH_BUCKETS];
    while (*link != sequence)
        link = &(*link)->hash_next;
    *link = sequence->hash_next;
    link = &sequence->session->sequences;
    while (*link != sequence)
        link = &(*link)->session_next;
    *link = sequence->session_next;
    sequence->session->sequence_count--;
    server->sequence_count--;
}

ice_status sequence_reserve_pages(struct sequence *sequence, uint64_t pages)
{
    struct server *server = sequence->server;
    if (!tier_serves(server))
        return pool_reserve(server->pool, &sequence->frames_promised, sequence->frame_bytes, pages) ? ICE_OK
                                                                                                    : ICE_POOL_FULL;
    if (extents_reserve(server->extents, &sequence->extents_promised, sequence->frame_bytes, pages) == pages)
        return ICE_OK;
    extents_unreserve(server->extents, &sequence->extents_promised, sequence->frame_bytes);
    return ICE_SPILL_FULL;
}

void sequence_unreserve(struct sequence *sequence)
{
    struct server *server = sequence->server;
    pool_unreserve(server->pool, &sequence->frames_promised, sequence->frame_bytes);
    if (server->extents)
        extents_unreserve(server->extents, &sequence->extents_promised, sequence->frame_bytes);
    budget_unreserve(&server->index_budget, &sequence->index_promised);
    tenant_unpromise(sequence->tenant, &sequence->quota_promised);
}

// Reactor, after the last reaper: the lanes are gone, now the rest.
static void sequence_closed(struct completion *completion, struct server *server)
{
    struct sequence *sequence = (struct sequence *)((char *)completion - offsetof(struct sequence, closed));
    struct session *session = sequence->session;
    sequence_unreserve(sequence);
    if (sequence->prefix)
        prefix_detach(sequence->prefix);
    unlink_sequence(server, sequence);
    struct op *op = sequence->close_op;
    op_finish(op, ICE_OK, NULL); // the op lies in the sequence's memory, which goes next
    budget_give(&server->index_budget, sequence->bytes);
    struct tenant *tenant = sequence->tenant;
    quota_count_index(sequence, -(int64_t)sequence->bytes);
    tenant->sequences--;
    server->env->release(server->env, sequence, sequence->bytes);
    tenant_drop_empty(&server->tenants, server->env, tenant);
    session_release(server, session);
}

// One lane at a time, so that a decode request waits for one at most.
static void reap(struct task *task, void *thread)
{
    struct sequence_reaper *reaper = (struct sequence_reaper *)task;
    struct sequence *sequence = reaper->sequence;
    struct server *server = sequence->server;
    struct shard *shard = thread;
    while (reaper->next_lane < sequence->lane_count && sequence->lanes[reaper->next_lane].shard != shard->index)
        reaper->next_lane++;
    if (reaper->next_lane < sequence->lane_count) {
        struct lane *lane = &sequence->lanes[reaper->next_lane++];
        shard_lane_forget(shard, lane);
        lane_destroy(lane, shard);
        task_queue_push(&shard->queue, TASK_BULK, task);
        return;
    }
    if (atomic_fetch_sub_explicit(&sequence->reapers_left, 1, memory_order_acq_rel) == 1)
        completion_post(&server->completions, &sequence->closed);
}

void sequence_destroy_lanes(struct sequence *sequence)
{
    struct server *server = sequence->server;
    sequence->closed.done = sequence_closed;
    atomic_store_explicit(&sequence->reapers_left, server->shard_count, memory_order_relaxed);
    for (uint32_t i = 0; i < server->shard_count; i++) {
        struct sequence_reaper *reaper = &sequence->reapers[i];
        *reaper = (struct sequence_reaper){.task = {.run = reap}, .sequence = sequence};
        task_queue_push(&server->shards[i].queue, TASK_BULK, &reaper->task);
    }
}

uint64_t sequence_length(const struct sequence *sequence, uint32_t layer, uint32_t layers)
{
    uint64_t length = UINT64_MAX;
    for (uint32_t i = layer; i < layer + layers; i++)
        length = sequence->lengths[i] < length ? sequence->lengths[i] : length;
    return length;
}

uint64_t sequence_indexed(const struct sequence *sequence, uint32_t layer)
{
    uint64_t indexed = UINT64_MAX;
    if (sequence_follows(sequence, layer))
        return sequence->lengths[layer]; // there is nothing to cluster
    for (uint32_t head = 0; head < sequence->shape.kv_heads; head++) {
        const struct lane *lane = &sequence->lanes[(uint64_t)layer * sequence->shape.kv_heads + head];
        uint64_t lane_indexed = atomic_load_explicit(&lane->indexed, memory_order_relaxed);
        indexed = lane_indexed < indexed ? lane_indexed : indexed;
    }
    return indexed;
}
