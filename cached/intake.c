// See intake.h. Nothing in a message is believed before wire_request_decode has accepted it and the session token and
// the kernel's word on the sender agree.
//
// A message that has to wait is decoded a second time when its turn comes: there is one arena, and decoding takes about
// a microsecond.
#include "cached/intake.h"

#include "cached/log.h"
#include "cached/server.h"

#include <assert.h>
#include <string.h>

struct intake_message {
    struct intake_message *next;
    enum fair_class class;
    struct env_message message;
};

uint32_t intake_rate_add(struct intake_rate *rate, uint64_t now_ns)
{
    const uint64_t second = now_ns / 1000000000u;
    if (rate->second != second)
        *rate = (struct intake_rate){.second = second};
    return ++rate->count;
}

bool intake_is_empty(const struct server *server)
{
    return !server->intake.has_alone && fair_queue_is_empty(&server->intake.lines);
}

static enum fair_class class_of(const Icecache__Wire__Request *request)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_RETRIEVE:
        return FAIR_DECODE;
    case ICECACHE__WIRE__REQUEST__BODY_STATS:
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
    case ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST:
    case ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST:
        return FAIR_ADMIN;
    default:
        return FAIR_BULK;
    }
}

// ---- what is refused at once ----

// An answer to what belongs to no session. Nobody can be made to pay for these, so there is a rate.
static void answer_stranger(struct server *server, struct session *ring, struct env_message *message,
                            uint64_t request_id, ice_status status, const char *text)
{
    struct intake *intake = &server->intake;
    const uint64_t now_ns = message->received_ns;
    if (ring) { // its sender is known, and is answered as long as he reads
        reply_error(server, ring, message, request_id, status, text);
    } else if (intake_rate_add(&intake->strangers, now_ns) <= INTAKE_STRANGERS_PER_S) {
        reply_error(server, NULL, message, request_id, status, text);
    } else {
        server->counts.dropped_messages++;
        if (intake_rate_add(&intake->dropped, now_ns) == 1)
            log_warn("more than %u messages a second of no session, pid=%d sends some: they are dropped",
                     INTAKE_STRANGERS_PER_S, (int)message->peer_pid);
    }
    rings_release(server, message);
}

static void refuse(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   struct env_message *message, ice_status status)
{
    struct intake_rate *refused = &session->line.refused;
    server->stats.errors++;
    server->counts.refused_inflight += status == ICE_QUEUE_FULL;
    op_signal_refused(session, request);
    reply_error(server, session, message, request->request_id, status, NULL);
    if (intake_rate_add(refused, message->received_ns) == INTAKE_REFUSALS_PER_S)
        session_end(server, session, SESSION_FLOODS);
    rings_release(server, message);
}

// What it returns lives until the next call.
static Icecache__Wire__Request *decode(const struct env_message *message, uint64_t *request_id, ice_status *status,
                                       struct wire_error *error)
{
    static _Alignas(16) uint8_t memory[WIRE_ARENA_BYTES_MAX];
    struct wire_arena arena;
    Icecache__Wire__Request *request = NULL;
    wire_arena_init(&arena, memory, sizeof memory);
    *status = wire_request_decode(message->header, message->header_bytes, &arena, &request, request_id, error);
    if (*status == ICE_OK && message->surplus_frames > 0) {
        *status = ICE_TOO_LARGE;
        wire_error_set(error, *status, "a message has at most %u frames", WIRE_FRAMES_MAX);
    }
    return *status == ICE_OK ? request : NULL;
}

static struct session *sender_of(struct server *server, const struct session *ring,
                                 const Icecache__Wire__Request *request, const struct env_message *message)
{
    struct session *session = session_find(server, request->session_id, request->session_token.data);
    bool foreign =
        session && message->peer_pid != 0 && (message->peer_pid != session->pid || message->peer_uid != session->uid);
    return foreign || (ring && ring != session) ? NULL : session; // a ring is its own session's
}

// ---- lines ----

static uint64_t bytes_of(const struct env_message *message)
{
    return sizeof(struct intake_message) + message->header_bytes + message->vectors_bytes;
}

static bool line_has_room(const struct server *server, const struct session *session)
{
    return session->inflight + session->line.count < server->config->inflight_max &&
           session->inflight_bytes + session->line.bytes < SERVER_INFLIGHT_BYTES_MAX;
}

static bool line_push(struct server *server, struct session *session, enum fair_class class,
                      const struct env_message *message)
{
    struct intake_line *line = &session->line;
    struct intake_message *queued = server->env->acquire(server->env, sizeof *queued);
    if (!queued)
        return false;
    *queued = (struct intake_message){.class = class, .message = *message};
    line->count++;
    line->bytes += bytes_of(message);
    if (line->head) {
        line->tail->next = queued;
    } else {
        line->head = queued;
        line->class = class;
        line->session = session;
        fair_queue_push(&server->intake.lines, class, session->slot, &line->node);
    }
    line->tail = queued;
    return true;
}

// The line is not in the fair queue; it enters again where something is left.
static void line_pop(struct server *server, struct intake_line *line, struct env_message *message)
{
    struct intake_message *queued = line->head;
    *message = queued->message;
    line->head = queued->next;
    line->count--;
    line->bytes -= bytes_of(message);
    server->env->release(server->env, queued, sizeof *queued);
    if (line->head) {
        line->class = line->head->class;
        fair_queue_push(&server->intake.lines, line->class, line->session->slot, &line->node);
    }
}

uint32_t intake_forget(struct server *server, struct session *session)
{
    struct intake *intake = &server->intake;
    struct intake_line *line = &session->line;
    uint32_t count = 0;
    if (intake->has_alone && intake->alone_session == session) {
        intake->has_alone = false;
        rings_release(server, &intake->alone);
        count++;
    }
    if (line->head)
        fair_queue_remove(&intake->lines, line->class, session->slot, &line->node);
    for (struct intake_message *queued = line->head, *next; queued; queued = next, count++) {
        next = queued->next;
        rings_release(server, &queued->message);
        server->env->release(server->env, queued, sizeof *queued);
    }
    *line = (struct intake_line){.refused = line->refused};
    return count;
}

// ---- in and out ----

// The one that came alone is alone no more.
static void queue_alone(struct server *server)
{
    struct intake *intake = &server->intake;
    if (!intake->has_alone)
        return;
    intake->has_alone = false;
    if (!line_push(server, intake->alone_session, class_of(intake->alone_request), &intake->alone))
        refuse(server, intake->alone_session, intake->alone_request, &intake->alone, ICE_NO_MEMORY);
}

void intake_take(struct server *server, struct session *ring, struct env_message *message)
{
    struct intake *intake = &server->intake;
    struct wire_error error = {0};
    uint64_t request_id = 0;
    ice_status status;
    queue_alone(server);
    message->received_ns = env_now_ns(server->env);
    Icecache__Wire__Request *request = decode(message, &request_id, &status, &error);
    if (!request) {
        server->stats.errors++;
        server->counts.refused_messages++;
        answer_stranger(server, ring, message, request_id, status, error.text);
        return;
    }
    struct session *session = sender_of(server, ring, request, message);
    if (!session) {
        server->counts.refused_strangers++;
        answer_stranger(server, ring, message, request_id, ICE_UNKNOWN_SESSION, NULL);
        return;
    }
    if (!line_has_room(server, session)) {
        refuse(server, session, request, message, ICE_QUEUE_FULL);
    } else if (intake_is_empty(server)) {
        intake->has_alone = true;
        intake->alone = *message;
        intake->alone_session = session;
        intake->alone_request = request;
    } else if (!line_push(server, session, class_of(request), message)) {
        refuse(server, session, request, message, ICE_NO_MEMORY);
    }
}

bool intake_serve(struct server *server)
{
    struct intake *intake = &server->intake;
    struct env_message message;
    enum fair_class class;
    if (intake->has_alone) {
        intake->has_alone = false;
        message = intake->alone;
        dispatch_request(server, intake->alone_session, intake->alone_request, &message);
        return true;
    }
    struct intake_line *line = (struct intake_line *)fair_queue_pop(&intake->lines, &class); // its first member
    if (!line)
        return false;
    struct wire_error error = {0};
    uint64_t request_id = 0;
    ice_status status;
    line_pop(server, line, &message);
    Icecache__Wire__Request *request = decode(&message, &request_id, &status, &error);
    if (request) {
        dispatch_request(server, line->session, request, &message);
    } else { // it was decoded when it came
        reply_error(server, line->session, &message, request_id, status, error.text);
        rings_release(server, &message);
    }
    return true;
}
