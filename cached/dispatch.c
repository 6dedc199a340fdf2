// Requests from the bus and the rings: decode, find the session, hand on. Reactor only. Nothing in a message is
// believed before wire_request_decode has accepted it and the session token and the kernel's word on the sender agree.
#include "cached/log.h"
#include "cached/server.h"

#include <stdio.h>

static void open_sequence(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                          const struct env_message *message)
{
    struct sequence *sequence;
    char text[128] = "";
    ice_status status = sequence_open(server, session, request->sequence_open, &sequence);
    if (status == ICE_OK) {
        log_debug("sequence opened id=%llu session=%llu layers=%u kv_heads=%u head_dim=%u",
                  (unsigned long long)sequence->id, (unsigned long long)session->id, sequence->shape.layers,
                  sequence->shape.kv_heads, sequence->shape.head_dim);
        reply_sequence_open(server, session, message, request->request_id, sequence->id);
        return;
    }
    if (status == ICE_LIMIT)
        snprintf(text, sizeof text, "%u sequences are open, as many as --sequences-max allows", server->sequence_count);
    server->stats.errors++;
    reply_error(server, session, message, request->request_id, status, text);
}

static void with_sequence(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                          const struct env_message *message, uint64_t id)
{
    struct sequence *sequence = sequence_find(server, session, id);
    if (!sequence) {
        server->stats.errors++;
        reply_error(server, session, message, request->request_id, ICE_UNKNOWN_SEQUENCE, NULL);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE) {
        op_close_sequence(server, sequence, request, message);
    } else {
        reply_sequence_info(server, session, message, request->request_id, sequence);
    }
}

// Requests that are answered by the reactor itself; true when it was one.
static bool dispatch_simple(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                            const struct env_message *message)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_STATS:
        report_stats(server, session, message, request->request_id, request->stats->sequences_from);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        open_sequence(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE:
        with_sequence(server, session, request, message, request->sequence_close->sequence_id);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO:
        with_sequence(server, session, request, message, request->sequence_info->sequence_id);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        lookup_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        attach_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        remove_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
        report_prefixes(server, session, message, request->request_id, request->prefix_list->from);
        return true;
    default:
        return false;
    }
}

// The reason why this session may not make this request now, or ICE_OK.
static ice_status admissible(const struct server *server, const struct session *session,
                             const Icecache__Wire__Request *request)
{
    bool stats = request->body_case == ICECACHE__WIRE__REQUEST__BODY_STATS;
    bool admin = stats || request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST ||
                 request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    if (session->admin && !admin)
        return ICE_PERMISSION;
    if (server->stopping && !stats && request->body_case != ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE)
        return ICE_SHUTTING_DOWN;
    if (session->inflight >= server->config->inflight_max || session->inflight_bytes >= SERVER_INFLIGHT_BYTES_MAX)
        return ICE_QUEUE_FULL;
    return ICE_OK;
}

static void dispatch_request(struct server *server, struct session *ring, const Icecache__Wire__Request *request,
                             struct env_message *message)
{
    struct session *session = session_find(server, request->session_id, request->session_token.data);
    bool foreign =
        session && message->peer_pid != 0 && (message->peer_pid != session->pid || message->peer_uid != session->uid);
    if (!session || foreign || (ring && ring != session)) { // a ring is its own session's
        reply_error(server, ring, message, request->request_id, ICE_UNKNOWN_SESSION, NULL);
        rings_release(server, message);
        return;
    }
    ice_status status = admissible(server, session, request);
    if (status != ICE_OK) {
        server->stats.errors++;
        op_signal_refused(session, request);
        reply_error(server, session, message, request->request_id, status,
                    status == ICE_PERMISSION
                        ? "an admin session can only ask for statistics and for sealed prefixes, and remove these"
                        : NULL);
        rings_release(server, message);
        return;
    }
    if (dispatch_simple(server, session, request, message)) {
        rings_release(server, message);
        return;
    }
    struct op *op = op_create(server, session, request, message);
    if (op)
        op_submit(op);
}

void dispatch_message(struct server *server, struct session *ring, struct env_message *message)
{
    // One request is decoded at a time, and an op copies what it needs: the arena is reset with every message.
    static _Alignas(16) uint8_t memory[WIRE_ARENA_BYTES_MAX];
    struct wire_arena arena;
    wire_arena_init(&arena, memory, sizeof memory);
    struct wire_error error = {0};
    Icecache__Wire__Request *request = NULL;
    uint64_t request_id = 0;
    ice_status status =
        wire_request_decode(message->header, message->header_bytes, &arena, &request, &request_id, &error);
    if (status == ICE_OK && message->surplus_frames > 0) {
        status = ICE_TOO_LARGE;
        wire_error_set(&error, status, "a message has at most %u frames", WIRE_FRAMES_MAX);
    }
    if (status != ICE_OK) {
        server->stats.errors++;
        reply_error(server, ring, message, request_id, status, error.text);
        rings_release(server, message);
        return;
    }
    dispatch_request(server, ring, request, message);
}
