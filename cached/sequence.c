// Sequences: making, forking, cutting, finding and unmaking. Runs on the reactor.
#include "cached/sequence.h"

#include "cached/server.h"
#include "proto/dtype.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

// ---- making ----

// The namespace of a new sequence; NULL, with the status that says why.
static struct tenant *tenant_of(struct server *server, const char *name, char *text, ice_status *status)
{
    struct tenant *tenant = tenant_take(&server->tenants, server->env, server->config, name, false, status);
    if (!tenant && *status == ICE_LIMIT)
        snprintf(text, TENANT_TEXT_BYTES, "%u namespaces are in use, as many as --namespaces-max allows",
                 server->tenants.count);
    return tenant;
}

// May there be one more, with its own stem?
static ice_status may_open(struct server *server, struct tenant *tenant, uint64_t bytes, char *text)
{
    const struct tenant_need need = {.index_bytes = bytes};
    if (server->sequence_count >= server->config->sequences_max) {
        snprintf(text, TENANT_TEXT_BYTES, "%u sequences are open, as many as --sequences-max allows",
                 server->sequence_count);
        return ICE_LIMIT;
    }
    ice_status status = tenant_may_open(tenant, text);
    if (status == ICE_OK)
        status = tenant_may_take(tenant, NULL, &need, tier_serves(server), text);
    tenant->refused += status == ICE_QUOTA;
    return status;
}

// Counted as the index's memory.
static ice_status allocate(struct server *server, struct tenant *tenant, uint32_t layers, uint32_t kv_heads, char *text,
                           struct sequence **out)
{
    const size_t head = env_align(sizeof(struct sequence)), lengths = env_align(layers * sizeof(uint64_t));
    const size_t bytes = head + lengths + env_align(sizeof(struct op)) + env_align(sizeof(struct admission));
    const ice_status status = may_open(server, tenant, bytes + stem_bytes(server, layers * kv_heads), text);
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
    sequence->server = server;
    sequence->tenant = tenant;
    tenant->sequences++;
    tenant_add_index(tenant, (int64_t)bytes);
    sequence->opened_ns = env_now_ns(server->env);
    sequence->lengths = (uint64_t *)(memory + head);
    sequence->close_op = (struct op *)(memory + head + lengths);
    sequence->close_op->admissions = (struct admission *)((uint8_t *)sequence->close_op + env_align(sizeof(struct op)));
    *out = sequence;
    return ICE_OK;
}

// Its stems are gone.
static void free_sequence(struct sequence *sequence)
{
    struct server *server = sequence->server;
    struct tenant *tenant = sequence->tenant;
    const size_t bytes = sequence->bytes;
    tenant->sequences--;
    tenant_add_index(tenant, -(int64_t)bytes);
    server->env->release(server->env, sequence, bytes);
    budget_give(&server->index_budget, bytes);
    tenant_drop_empty(&server->tenants, server->env, tenant);
}

// Memory for a sequence of a message, counted in its namespace.
static ice_status allocate_for(struct server *server, const Icecache__Wire__SequenceOpen *message, char *text,
                               struct sequence **out)
{
    ice_status status;
    struct tenant *tenant = tenant_of(server, message->name_space, text, &status);
    if (!tenant)
        return status;
    status = allocate(server, tenant, message->layers, message->kv_heads, text, out);
    if (status != ICE_OK)
        tenant_drop_empty(&server->tenants, server->env, tenant);
    return status;
}

static void init_from_message(struct sequence *sequence, const Icecache__Wire__SequenceOpen *message)
{
    const uint64_t tokens_max = sequence->server->config->tokens_max;
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

// From now on requests find it.
static void link_sequence(struct sequence *sequence, struct session *session)
{
    struct server *server = sequence->server;
    sequence->row_bytes = sequence->shape.head_dim * dtype_bytes((enum dtype)sequence->shape.dtype);
    sequence->binding = sequence->id;
    sequence->session = session;
    session_hold(session);
    sequence->session_next = session->sequences;
    session->sequences = sequence;
    session->sequence_count++;
    struct sequence **bucket = &server->sequences[sequence->id % SERVER_HASH_BUCKETS];
    sequence->hash_next = *bucket;
    *bucket = sequence;
    server->sequence_count++;
}

static void set_lengths(struct sequence *sequence, uint64_t length)
{
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++)
        sequence->lengths[layer] = length;
}

static const uint32_t *anchors_of(const Icecache__Wire__SequenceOpen *message)
{
    return message->n_anchor_layers > 0 ? message->anchor_layers : NULL;
}

// Cuts the chain at token `end`: stems that begin there or later are released, and none is used beyond it.
static void let_go_from(struct sequence *sequence, uint64_t end)
{
    uint32_t count = sequence->chain_count;
    while (count > 0 && sequence->chain[count - 1].stem->first >= end)
        sequence->leaving += stem_release(sequence->chain[--count].stem, sequence);
    sequence->chain_count = count;
    if (count > 0 && sequence->chain[count - 1].end > end)
        sequence->chain[count - 1].end = end;
}

ice_status sequence_open(struct server *server, struct session *session, const Icecache__Wire__SequenceOpen *message,
                         char *text, struct sequence **out)
{
    struct sequence *sequence;
    ice_status status = allocate_for(server, message, text, &sequence);
    if (status != ICE_OK)
        return status;
    init_from_message(sequence, message);
    sequence->id = ++server->next_id;
    const struct stem_mould mould = {.sequence_id = sequence->id,
                                     .tenant = sequence->tenant,
                                     .root = sequence->id,
                                     .seed = server->config->seed,
                                     .shape = sequence->shape,
                                     .anchors = anchors_of(message)};
    status = stem_create(server, &mould, &sequence->own);
    if (status != ICE_OK) {
        free_sequence(sequence);
        return status;
    }
    link_sequence(sequence, session);
    *out = sequence;
    return ICE_OK;
}

// ---- sealed prefixes ----

// A stem whose layers have no tree cannot be shared with a sequence that searches them.
static bool serves(const struct stem *stem, const struct sequence *sequence)
{
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++) {
        if (stem_lane(stem, layer, 0)->anchor != layer && !sequence_follows(sequence, layer))
            return false;
    }
    return true;
}

// The stem of a part of a prefix: one that is there, or one that is made of its images and wakes.
static ice_status stem_of_part(struct sequence *sequence, struct prefix *prefix, struct prefix_part *part,
                               struct stem **out)
{
    if (part->stem && serves(part->stem, sequence)) {
        stem_hold(*out = part->stem);
        return ICE_OK;
    }
    const struct stem_mould mould = {.sequence_id = sequence->id,
                                     .tenant = sequence->tenant,
                                     .root = prefix->root,
                                     .seed = prefix->seed,
                                     .first = part->first,
                                     .depth = (uint32_t)(part - prefix->parts),
                                     .shape = sequence->shape,
                                     .like = sequence->own,
                                     .images = part->images};
    const ice_status status = stem_create(sequence->server, &mould, out);
    if (status == ICE_OK && !part->stem)
        prefix_know_stem(part, *out);
    return status;
}

// Parts that the first `tokens` lie in.
static uint32_t parts_until(const struct prefix *prefix, uint64_t tokens)
{
    uint32_t count = 0;
    while (count < prefix->part_count && prefix->parts[count].first < tokens)
        count++;
    return count;
}

// Of a sequence that has never been seen by anybody.
static void undo(struct sequence *sequence)
{
    for (uint32_t i = 0; i < sequence->chain_count; i++) {
        struct stem *stem = sequence->chain[i].stem;
        if (--stem->holds > 0)
            continue;
        prefix_forget_stem(stem);
        stem_discard(stem); // made for this sequence: those that were there are held by others
    }
    if (sequence->own)
        stem_discard(sequence->own);
    free_sequence(sequence);
}

ice_status sequence_attach(struct server *server, struct session *session, const Icecache__Wire__SequenceOpen *message,
                           struct prefix *prefix, uint64_t tokens, char *text, struct sequence **out)
{
    struct sequence *sequence;
    ice_status status = allocate_for(server, message, text, &sequence);
    if (status != ICE_OK)
        return status;
    init_from_message(sequence, message);
    sequence->id = ++server->next_id;
    const struct stem_mould mould = {.sequence_id = sequence->id,
                                     .tenant = sequence->tenant,
                                     .root = prefix->root,
                                     .seed = prefix->seed,
                                     .first = tokens,
                                     .depth = parts_until(prefix, tokens),
                                     .shape = sequence->shape,
                                     .anchors = anchors_of(message)};
    status = stem_create(server, &mould, &sequence->own);
    for (uint32_t i = 0; status == ICE_OK && i < mould.depth; i++) {
        struct prefix_part *part = &prefix->parts[i];
        struct sequence_part *seen = &sequence->chain[sequence->chain_count];
        status = stem_of_part(sequence, prefix, part, &seen->stem);
        seen->end = part->end < tokens ? part->end : tokens;
        sequence->chain_count += status == ICE_OK;
    }
    if (status != ICE_OK) {
        undo(sequence);
        return status;
    }
    link_sequence(sequence, session);
    set_lengths(sequence, tokens);
    prefix_attach(prefix, sequence);
    *out = sequence;
    return ICE_OK;
}

// ---- forks ----

// Stems that the first `tokens` lie in.
static uint32_t chain_until(const struct sequence *sequence, uint64_t tokens)
{
    uint32_t count = 0;
    while (count <= sequence->chain_count && sequence_stem(sequence, count)->first < tokens)
        count++;
    return count;
}

// A new own stem from `first` on.
static ice_status create_own(struct sequence *sequence, uint64_t first, uint32_t depth, struct stem **out)
{
    const struct stem *own = sequence->own;
    const struct stem_mould mould = {.sequence_id = sequence->id,
                                     .tenant = sequence->tenant,
                                     .root = own->root,
                                     .seed = own->seed,
                                     .first = first,
                                     .depth = depth,
                                     .shape = sequence->shape,
                                     .like = own};
    return stem_create(sequence->server, &mould, out);
}

ice_status sequence_share_own(struct sequence *sequence)
{
    struct stem *fresh, *own = sequence->own;
    const uint64_t end = sequence->lengths[0];
    assert(sequence_is_even(sequence) && end > own->first);
    if (sequence->chain_count == SEQUENCE_STEMS_MAX - 1)
        return ICE_LIMIT;
    const ice_status status = create_own(sequence, end, sequence->chain_count + 1, &fresh);
    if (status != ICE_OK)
        return status;
    sequence->chain[sequence->chain_count++] = (struct sequence_part){own, end};
    sequence->own = fresh;
    stem_share(own, sequence);
    return ICE_OK;
}

// The first `tokens` of the parent's chain, which has them all.
static void share_chain(const struct sequence *parent, uint64_t tokens, struct sequence *child)
{
    for (uint32_t i = 0; i < parent->chain_count && parent->chain[i].stem->first < tokens; i++) {
        const struct sequence_part *part = &parent->chain[i];
        stem_hold(part->stem);
        child->chain[child->chain_count++] =
            (struct sequence_part){part->stem, part->end < tokens ? part->end : tokens};
    }
}

ice_status sequence_fork(struct sequence *parent, uint64_t tokens, char *text, struct sequence **out)
{
    struct server *server = parent->server;
    struct sequence *child;
    ice_status status = allocate(server, parent->tenant, parent->shape.layers, parent->shape.kv_heads, text, &child);
    if (status != ICE_OK)
        return status;
    child->identity = parent->identity;
    child->shape = parent->shape;
    child->scale = parent->scale;
    child->tokens_max = parent->tokens_max;
    child->id = ++server->next_id;
    child->own = parent->own; // what the new one is like
    status = create_own(child, tokens, chain_until(parent, tokens), &child->own);
    if (status != ICE_OK) {
        free_sequence(child);
        return status;
    }
    if (tokens > parent->own->first)
        status = sequence_share_own(parent);
    if (status == ICE_LIMIT)
        snprintf(text, TENANT_TEXT_BYTES,
                 "the sequence is a chain of %u forks, as many as there can be; open a sequence and append its tokens",
                 SEQUENCE_STEMS_MAX);
    if (status != ICE_OK) {
        undo(child);
        return status;
    }
    share_chain(parent, tokens, child);
    link_sequence(child, parent->session);
    set_lengths(child, tokens);
    if (parent->prefix)
        prefix_attach(parent->prefix, child);
    *out = child;
    return ICE_OK;
}

ice_status sequence_cut(struct sequence *sequence, uint64_t tokens)
{
    struct stem *own = sequence->own, *fresh;
    assert(tokens < own->first);
    const ice_status status = create_own(sequence, tokens, chain_until(sequence, tokens), &fresh);
    if (status != ICE_OK)
        return status;
    sequence->own = fresh;
    sequence->leaving += stem_release(own, sequence);
    let_go_from(sequence, tokens);
    set_lengths(sequence, tokens);
    return ICE_OK;
}

// ---- finding ----

struct sequence *sequence_find(struct server *server, const struct session *session, uint64_t id)
{
    struct sequence *sequence = server->sequences[id % SERVER_HASH_BUCKETS];
    while (sequence && sequence->id != id)
        sequence = sequence->hash_next;
    return sequence && sequence->session == session && !sequence->closing ? sequence : NULL;
}

// ---- the end ----

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

// The lanes are gone, now the rest.
static void sequence_closed(struct sequence *sequence)
{
    struct server *server = sequence->server;
    struct session *session = sequence->session;
    if (sequence->prefix)
        prefix_detach(sequence->prefix);
    unlink_sequence(server, sequence);
    op_finish(sequence->close_op, ICE_OK, NULL); // the op lies in the sequence's memory, which goes next
    free_sequence(sequence);
    session_release(server, session);
}

void sequence_stem_gone(struct sequence *sequence)
{
    if (--sequence->leaving == 0 && !sequence->own)
        sequence_closed(sequence);
}

void sequence_leave_stems(struct sequence *sequence)
{
    sequence->leaving++; // for this call
    let_go_from(sequence, 0);
    sequence->leaving += stem_release(sequence->own, sequence);
    sequence->own = NULL;
    sequence_stem_gone(sequence);
}

// ---- what it has ----

uint64_t sequence_length(const struct sequence *sequence, uint32_t layer, uint32_t layers)
{
    uint64_t length = UINT64_MAX;
    for (uint32_t i = layer; i < layer + layers; i++)
        length = sequence->lengths[i] < length ? sequence->lengths[i] : length;
    return length;
}

bool sequence_is_even(const struct sequence *sequence)
{
    for (uint32_t layer = 1; layer < sequence->shape.layers; layer++) {
        if (sequence->lengths[layer] != sequence->lengths[0])
            return false;
    }
    return true;
}

uint64_t sequence_indexed(const struct sequence *sequence, uint32_t layer)
{
    if (!sequence->own)
        return 0; // its stems are going
    if (sequence_follows(sequence, layer))
        return sequence->lengths[layer]; // there is nothing to cluster
    for (uint32_t i = sequence->chain_count + 1; i > 0; i--) {
        const struct stem *stem = sequence_stem(sequence, i - 1);
        const uint64_t indexed = stem_indexed(stem, layer), end = sequence_stem_end(sequence, i - 1);
        if (indexed > 0)
            return stem->first + indexed < end ? stem->first + indexed : end;
    }
    return 0;
}

void sequence_usage(const struct sequence *sequence, struct sequence_usage *out)
{
    *out = (struct sequence_usage){.shared_tokens = sequence->own ? sequence->own->first : 0};
    for (uint32_t i = 0; sequence->own && i <= sequence->chain_count; i++) {
        const struct stem *stem = sequence_stem(sequence, i);
        out->pages += atomic_load_explicit(&stem->page_count, memory_order_relaxed);
        out->pool_bytes += atomic_load_explicit(&stem->resident, memory_order_relaxed) * stem->frame_bytes;
        out->index_bytes += atomic_load_explicit(&stem->index_bytes, memory_order_relaxed);
        out->build_ns += atomic_load_explicit(&stem->build_ns, memory_order_relaxed);
        out->lanes_due += atomic_load_explicit(&stem->lanes_due, memory_order_acquire);
    }
}
