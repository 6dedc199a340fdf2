// Replies. Reactor only. A reply that the worker does not take (its queue in ZeroMQ or behind its ring is full) ends
// the worker's session: it harms only itself.
#include "cached/log.h"
#include "cached/server.h"
#include "proto/limits.h"

#include <errno.h>
#include <string.h>

// Replies up to this size need no memory, so that every error can be said, and what a request has done is never lost
// with its reply. A sequence's opening and a decode step's retrieve are smaller.
#define SMALL_REPLY_BYTES 1024u
#define DROPPED_PER_LINE  1000u // of the log

static void set_status(Icecache__Wire__Reply *reply, uint64_t request_id, ice_status status, const char *text)
{
    icecache__wire__reply__init(reply);
    reply->request_id = request_id;
    reply->status = status;
    if (status != ICE_OK)
        reply->text = (char *)(text && text[0] ? text : status_text((int)status));
}

// Packs into the caller's small buffer or, where that is too small, into memory that the caller releases.
static uint8_t *pack(struct env *env, const Icecache__Wire__Reply *reply, size_t size, uint8_t *small,
                     size_t small_bytes)
{
    uint8_t *bytes = size <= small_bytes ? small : env->acquire(env, size);
    if (bytes)
        icecache__wire__reply__pack(reply, bytes);
    return bytes;
}

// Back on the way that the request came.
static int send_bytes(struct server *server, struct session *session, const uint8_t *route, size_t route_bytes,
                      const uint8_t *bytes, size_t size)
{
    struct env *env = server->env;
    if (route_bytes == ENV_ROUTE_RING)
        return session ? ring_link_send(server, session, bytes, size) : -EHOSTUNREACH;
    server->bus_due = true; // a send may swallow the signal of what has arrived
    return env->bus_send(env, server->bus, route, route_bytes, bytes, size);
}

void reply_send(struct server *server, struct session *session, const uint8_t *route, size_t route_bytes,
                Icecache__Wire__Reply *reply)
{
    struct env *env = server->env;
    uint8_t small[SMALL_REPLY_BYTES];
    reply->boot_token = server->boot_token;
    size_t size = icecache__wire__reply__get_packed_size(reply);
    uint8_t *bytes = pack(env, reply, size, small, sizeof small);
    if (!bytes) {
        Icecache__Wire__Reply refusal;
        set_status(&refusal, reply->request_id, ICE_NO_MEMORY, "no memory for the reply");
        refusal.boot_token = server->boot_token;
        size = icecache__wire__reply__get_packed_size(&refusal);
        bytes = pack(env, &refusal, size, small, sizeof small); // fits: the text is ours
    }
    int error = bytes ? send_bytes(server, session, route, route_bytes, bytes, size) : -ENOMEM;
    if (bytes && bytes != small)
        env->release(env, bytes, size);
    if (error == -EAGAIN && session)
        session_end(server, session, SESSION_DEAF);
    else if (error == -EPROTO && session)
        session_end(server, session, SESSION_SPOILT_RING);
    else if (error == -ENOMEM && session && route_bytes == ENV_ROUTE_RING)
        session_end(server, session, SESSION_NO_MEMORY);
    else if (error && error != -EHOSTUNREACH && server->counts.dropped_replies++ % DROPPED_PER_LINE == 0)
        log_warn("reply dropped: %s (one line for %u)", strerror(-error), DROPPED_PER_LINE);
}

void reply_error(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                 ice_status status, const char *text)
{
    Icecache__Wire__Reply reply;
    set_status(&reply, request_id, status, text);
    reply_send(server, session, to->route, to->route_bytes, &reply);
}

void reply_sequence_open(struct server *server, struct session *session, const struct env_message *to,
                         uint64_t request_id, uint64_t sequence_id)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__SequenceOpenReply body = ICECACHE__WIRE__SEQUENCE_OPEN_REPLY__INIT;
    set_status(&reply, request_id, ICE_OK, NULL);
    body.sequence_id = sequence_id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN;
    reply.sequence_open = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
}

void reply_lookup(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint64_t tokens)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__LookupReply body = ICECACHE__WIRE__LOOKUP_REPLY__INIT;
    set_status(&reply, request_id, ICE_OK, NULL);
    body.tokens = tokens;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_LOOKUP;
    reply.lookup = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
}

void reply_attach(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint64_t sequence_id, uint64_t tokens)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__AttachReply body = ICECACHE__WIRE__ATTACH_REPLY__INIT;
    set_status(&reply, request_id, ICE_OK, NULL);
    body.sequence_id = sequence_id;
    body.tokens = tokens;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_ATTACH;
    reply.attach = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
}

void reply_sequence_info(struct server *server, struct session *session, const struct env_message *to,
                         uint64_t request_id, struct sequence *sequence)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__SequenceInfoReply body = ICECACHE__WIRE__SEQUENCE_INFO_REPLY__INIT;
    uint64_t indexed[WIRE_LAYERS_MAX];
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++)
        indexed[layer] = sequence_indexed(sequence, layer);
    set_status(&reply, request_id, ICE_OK, NULL);
    body.n_lengths = body.n_indexed = sequence->shape.layers;
    body.lengths = sequence->lengths;
    body.indexed = indexed;
    struct sequence_usage usage;
    sequence_usage(sequence, &usage);
    body.pages = usage.pages;
    body.pool_bytes = usage.pool_bytes;
    body.index_bytes = usage.index_bytes;
    body.build_us = usage.build_ns / 1000;
    body.idle = usage.lanes_due == 0 && !sequence->writer;
    body.shared_tokens = usage.shared_tokens;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO;
    reply.sequence_info = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
}

// ---- retrieve ----

struct retrieve_arrays {
    uint32_t *counts, *changed;
    float *masses;
    uint64_t *indexed, *versions;
    uint32_t *positions;
    size_t position_count;
    size_t bytes;
};

// One block for all arrays of a reply.
static bool allocate_arrays(struct op *op, struct retrieve_arrays *arrays)
{
    size_t lanes = op->lane_count;
    arrays->position_count = 0;
    for (uint32_t i = 0; op->positions && i < lanes; i++)
        arrays->position_count += op->lanes[i].count;
    arrays->bytes = lanes * (2 * sizeof(uint64_t) + 2 * sizeof(uint32_t) + sizeof(float)) +
                    arrays->position_count * sizeof(uint32_t);
    uint8_t *memory = op->server->env->acquire(op->server->env, arrays->bytes);
    if (!memory)
        return false;
    arrays->indexed = (uint64_t *)memory;
    arrays->versions = arrays->indexed + lanes;
    arrays->counts = (uint32_t *)(arrays->versions + lanes);
    arrays->changed = arrays->counts + lanes;
    arrays->masses = (float *)(arrays->changed + lanes);
    arrays->positions = (uint32_t *)(arrays->masses + lanes);
    return true;
}

static void fill_positions(const struct op *op, struct retrieve_arrays *arrays)
{
    uint32_t *at = arrays->positions;
    for (uint32_t i = 0; op->positions && i < op->lane_count; i++) {
        const struct op_lane *part = &op->lanes[i];
        memcpy(at, part->positions, part->count * sizeof *at);
        at += part->count;
    }
}

static void fill_retrieve(const struct op *op, struct retrieve_arrays *arrays, Icecache__Wire__RetrieveReply *body)
{
    const struct op_totals totals = op_totals(op);
    for (uint32_t i = 0; i < op->lane_count; i++) {
        const struct op_lane *part = &op->lanes[i];
        arrays->counts[i] = part->count;
        arrays->changed[i] = part->changed;
        arrays->masses[i] = part->mass;
        arrays->indexed[i] = part->indexed;
        arrays->versions[i] = part->version;
    }
    fill_positions(op, arrays);
    body->n_counts = body->n_masses = body->n_indexed = body->n_versions = body->n_changed = op->lane_count;
    body->n_positions = arrays->position_count;
    body->counts = arrays->counts;
    body->changed = arrays->changed;
    body->masses = arrays->masses;
    body->indexed = arrays->indexed;
    body->versions = arrays->versions;
    body->positions = arrays->positions;
    body->partial = totals.partial;
    body->bytes_moved = totals.bytes_moved;
    body->queue_us = (uint32_t)(totals.queue_ns / 1000);
    body->search_us = (uint32_t)(totals.search_ns / 1000);
    body->fetch_us = (uint32_t)(totals.fetch_ns / 1000);
    body->copy_us = (uint32_t)(totals.copy_ns / 1000);
}

static void reply_retrieve(struct op *op)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__RetrieveReply body = ICECACHE__WIRE__RETRIEVE_REPLY__INIT;
    struct retrieve_arrays arrays;
    struct env *env = op->server->env;
    if (!allocate_arrays(op, &arrays)) {
        set_status(&reply, op->request_id, ICE_NO_MEMORY, "no memory for the reply");
        reply_send(op->server, op->session, op->route, op->route_bytes, &reply);
        return;
    }
    set_status(&reply, op->request_id, ICE_OK, NULL);
    fill_retrieve(op, &arrays, &body);
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_RETRIEVE;
    reply.retrieve = &body;
    reply_send(op->server, op->session, op->route, op->route_bytes, &reply);
    env->release(env, arrays.indexed, arrays.bytes);
}

static void fill_hint(const struct op *op, Icecache__Wire__HintReply *body)
{
    for (uint32_t i = 0; i < op->lane_count; i++) {
        body->pages += op->lanes[i].wished;
        body->lanes += op->lanes[i].searched;
    }
}

void reply_op(struct op *op, ice_status status, const char *text)
{
    Icecache__Wire__Reply reply;
    Icecache__Wire__AppendReply append = ICECACHE__WIRE__APPEND_REPLY__INIT;
    Icecache__Wire__ReadReply read = ICECACHE__WIRE__READ_REPLY__INIT;
    Icecache__Wire__SealReply seal = ICECACHE__WIRE__SEAL_REPLY__INIT;
    Icecache__Wire__SequenceForkReply fork = ICECACHE__WIRE__SEQUENCE_FORK_REPLY__INIT;
    Icecache__Wire__HintReply hint = ICECACHE__WIRE__HINT_REPLY__INIT;
    if (op->kind == OP_RETRIEVE && status == ICE_OK) {
        reply_retrieve(op);
        return;
    }
    set_status(&reply, op->request_id, status, text);
    if (op->kind == OP_APPEND) {
        append.length = sequence_length(op->admissions[0].sequence, op->layer, op->layers);
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_APPEND;
        reply.append = &append;
    } else if (op->kind == OP_READ && status == ICE_OK) {
        read.tokens = op->tokens;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_READ;
        reply.read = &read;
    } else if (op->kind == OP_SEAL && status == ICE_OK) {
        seal.prefix_id = op->prefix_id;
        seal.tokens = (uint64_t)op->blocks * op->admissions[0].sequence->identity.block_tokens;
        seal.known = op->prefix_known;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEAL;
        reply.seal = &seal;
    } else if (op->kind == OP_FORK && status == ICE_OK) {
        fork.sequence_id = op->forked_id;
        fork.tokens = op->first;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_FORK;
        reply.sequence_fork = &fork;
    } else if (op->kind == OP_HINT && status == ICE_OK) {
        fill_hint(op, &hint);
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_HINT;
        reply.hint = &hint;
    }
    reply_send(op->server, op->session, op->route, op->route_bytes, &reply);
}
