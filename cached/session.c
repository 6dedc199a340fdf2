// Sessions. Reactor only.
//
// Life of a session: accepted -> greeted (hello) -> dead (its socket closed, or it was dropped) -> freed when the last
// request, job and sequence has let go. What it holds goes in that order: requests in flight end, sequences are reaped
// by the shards, landings and staging are unmapped by the keeper.
#include "cached/session.h"

#include "cached/log.h"
#include "cached/server.h"
#include "proto/control.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const char session_limit_text[] = "as many workers are connected as --sessions-max allows";

#define ACCEPTS_PER_ROUND 64u // who connects without end must not keep the reactor from the others

// ---- replies on the control socket ----

void control_reply(struct server *server, struct session *session, Icecache__Wire__ControlReply *reply, int fd)
{
    control_reply_all(server, session, reply, &fd, fd >= 0 ? 1 : 0);
}

void control_reply_all(struct server *server, struct session *session, Icecache__Wire__ControlReply *reply,
                       const int *fds, uint32_t count)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size = icecache__wire__control_reply__get_packed_size(reply);
    if (session->dead || size > sizeof bytes)
        return;
    icecache__wire__control_reply__pack(reply, bytes);
    ice_status status = server->env->control_send(server->env, session->control_fd, bytes, size, fds, count);
    if (status != ICE_OK)
        session_end(server, session, SESSION_DEAF_CONTROL);
}

void control_error(struct server *server, struct session *session, uint64_t request_id, ice_status status,
                   const char *text)
{
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    reply.request_id = request_id;
    reply.status = status;
    reply.text = (char *)(text && text[0] ? text : status_text((int)status));
    server->stats.errors++;
    control_reply(server, session, &reply, -1);
}

// ---- making and freeing ----

void session_hold(struct session *session)
{
    session->holds++;
}

void session_release(struct server *server, struct session *session)
{
    if (--session->holds > 0)
        return;
    if (session->previous)
        session->previous->next = session->next;
    else
        server->sessions = session->next;
    if (session->next)
        session->next->previous = session->previous;
    server->session_count--;
    server->worker_count -= session->greeted && !session->admin;
    if (session->greeted && !session->admin)
        log_info("session gone id=%llu pid=%d", (unsigned long long)session->id, (int)session->pid);
    // Events that the reactor has fetched already may still name it: freed at the end of the round.
    session->next = server->graveyard;
    server->graveyard = session;
}

void session_bury(struct server *server)
{
    while (server->graveyard) {
        struct session *session = server->graveyard;
        server->graveyard = session->next;
        server->env->release(server->env, session, sizeof *session);
    }
}

// The lowest that no session has, so that few sessions never share a flow.
static uint32_t free_slot(const struct server *server)
{
    uint64_t taken = 0;
    for (const struct session *session = server->sessions; session; session = session->next)
        taken |= session->slot < FAIR_FLOWS ? (uint64_t)1 << session->slot : 0;
    if (taken != UINT64_MAX)
        return (uint32_t)__builtin_ctzll(~taken);
    return FAIR_FLOWS + server->session_count; // a flow is shared from here on
}

static struct session *session_create(struct server *server, int fd)
{
    struct env *env = server->env;
    const uint32_t slot = free_slot(server);
    struct session *session = env_acquire_zeroed(env, sizeof *session);
    gid_t gid;
    if (!session)
        return NULL;
    session->control_fd = fd;
    session->since_ns = session->used_ns = env_now_ns(env);
    session->holds = 1; // the socket's
    if (control_peer(fd, &session->pid, &session->uid, &gid) != ICE_OK ||
        env->random(env, session->token, sizeof session->token) != 0 ||
        env->random(env, &session->id, sizeof session->id) != 0 || reactor_watch(server, fd, session) != 0) {
        env->release(env, session, sizeof *session);
        return NULL;
    }
    session->next = server->sessions;
    if (session->next)
        session->next->previous = session;
    server->sessions = session;
    server->session_count++;
    session->slot = slot;
    return session;
}

static void refuse_connection(struct server *server, int fd, ice_status status)
{
    struct env *env = server->env;
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    reply.status = status;
    reply.text = (char *)(status == ICE_LIMIT ? session_limit_text : status_text((int)status));
    size_t size = icecache__wire__control_reply__pack(&reply, bytes);
    ice_status sent = env->control_send(env, fd, bytes, size, NULL, 0);
    log_warn("connection refused: %s%s", reply.text, sent == ICE_OK ? "" : " (and it did not listen)");
    // The hello is taken out first: closing over unread data would reset the connection before the reason is read.
    struct control_descriptors descriptors;
    ice_status ignored = env->control_receive(env, fd, bytes, sizeof bytes, &size, &descriptors);
    (void)ignored;
    control_descriptors_close(&descriptors);
    env->close_fd(env, fd);
}

static void accept_connection(struct server *server, int fd)
{
    bool room = server->session_count < server->config->sessions_max + SERVER_SPARE_CONNECTIONS && !server->stopping;
    struct session *session = room ? session_create(server, fd) : NULL;
    if (!session)
        refuse_connection(server, fd, server->stopping ? ICE_SHUTTING_DOWN : room ? ICE_NO_MEMORY : ICE_LIMIT);
}

void session_accept(struct server *server)
{
    struct env *env = server->env;
    for (unsigned i = 0; i < ACCEPTS_PER_ROUND; i++) {
        int fd;
        int error = env->accept(env, server->listener_fd, &fd);
        if (error == 0) {
            accept_connection(server, fd);
        } else if (error == -EAGAIN) {
            return;
        } else if (error != -ECONNABORTED && error != -EINTR) {
            // The connection stays in the queue and the listener readable: without a pause this would be a busy loop.
            log_warn("cannot accept connections: %s; trying again in a while", strerror(-error));
            reactor_pause_accepting(server);
            return;
        }
    }
}

struct session *session_find(struct server *server, uint64_t id, const uint8_t *token)
{
    for (struct session *session = server->sessions; session; session = session->next) {
        if (session->id != id || session->dead || !session->greeted)
            continue;
        uint8_t difference = 0; // every byte is looked at: the time taken tells nothing about the token
        for (unsigned i = 0; i < WIRE_SESSION_TOKEN_BYTES; i++)
            difference |= (uint8_t)(session->token[i] ^ token[i]);
        return difference == 0 ? session : NULL;
    }
    return NULL;
}

// ---- the control socket ----

static void hello(struct server *server, struct session *session, uint64_t request_id,
                  const Icecache__Wire__Hello *message)
{
    if (session->greeted) {
        control_error(server, session, request_id, ICE_INVALID_ARGUMENT, "the session has said hello already");
        return;
    }
    if (!message->admin && server->worker_count >= server->config->sessions_max) {
        control_error(server, session, request_id, ICE_LIMIT, session_limit_text);
        return;
    }
    char endpoint[160];
    snprintf(endpoint, sizeof endpoint, "ipc://%s", server->data_path);
    session->greeted = true;
    session->admin = message->admin;
    server->worker_count += !session->admin;
    strncpy(session->name, message->client_name, sizeof session->name - 1);
    strncpy(session->name_space, message->name_space, sizeof session->name_space - 1);
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    Icecache__Wire__HelloReply body = ICECACHE__WIRE__HELLO_REPLY__INIT;
    reply.request_id = request_id;
    reply.body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO;
    reply.hello = &body;
    body.boot_token = server->boot_token;
    body.session_id = session->id;
    body.session_token.data = session->token;
    body.session_token.len = sizeof session->token;
    body.endpoint = endpoint;
    body.daemon_version = (char *)ICECACHE_VERSION;
    body.inflight_max = (uint32_t)server->config->inflight_max;
    body.vectors_bytes_max = WIRE_VECTORS_BYTES_MAX;
    body.ring_bytes = session->admin ? 0 : ring_capacity(server->config->ring_bytes);
    if (session->admin)
        log_debug("admin session id=%llu pid=%d", (unsigned long long)session->id, (int)session->pid);
    else
        log_info("session opened id=%llu pid=%d name=%s", (unsigned long long)session->id, (int)session->pid,
                 session->name);
    control_reply(server, session, &reply, -1);
}

static void close_named_landing(struct server *server, struct session *session, uint64_t request_id, uint32_t id)
{
    struct landing *landing = landing_find(session, id);
    if (!landing) {
        control_error(server, session, request_id, ICE_UNKNOWN_LANDING, NULL);
        return;
    }
    landing->close_asked = true; // answered when its memory is free again
    landing->close_request_id = request_id;
    landing_close(server, landing);
}

static void control_request(struct server *server, struct session *session,
                            const Icecache__Wire__ControlRequest *request, struct control_descriptors *descriptors)
{
    uint64_t id = request->request_id;
    if (request->body_case == ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO) {
        hello(server, session, id, request->hello);
    } else if (!session->greeted) {
        control_error(server, session, id, ICE_UNKNOWN_SESSION, "say hello first");
    } else if (session->admin) {
        control_error(server, session, id, ICE_PERMISSION, "an admin session can only ask for statistics");
    } else if (server->stopping) {
        control_error(server, session, id, ICE_SHUTTING_DOWN, NULL);
    } else if (request->body_case == ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN) {
        staging_open(server, session, id, request->staging_open->bytes);
    } else if (request->body_case == ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN) {
        landing_open(server, session, id, request->landing_open, descriptors);
    } else if (request->body_case == ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN) {
        ring_link_open(server, session, id);
    } else {
        close_named_landing(server, session, id, request->landing_close->landing_id);
    }
}

void session_readable(struct server *server, struct session *session)
{
    struct env *env = server->env;
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    _Alignas(16) uint8_t memory[4 * WIRE_CONTROL_BYTES_MAX];
    size_t size;
    if (session->dead)
        return;
    struct control_descriptors descriptors;
    ice_status status = env->control_receive(env, session->control_fd, bytes, sizeof bytes, &size, &descriptors);
    if (status == ICE_TIMEOUT)
        return;
    if (status != ICE_OK) {
        session_end(server, session, status == ICE_DISCONNECTED ? SESSION_CLOSED : SESSION_BAD_CONTROL);
        return;
    }
    struct wire_arena arena;
    struct wire_error error = {0};
    Icecache__Wire__ControlRequest *request;
    uint64_t request_id = 0;
    wire_arena_init(&arena, memory, sizeof memory);
    status = wire_control_request_decode(bytes, size, &arena, &request, &request_id, &error);
    if (status != ICE_OK)
        control_error(server, session, request_id, status, error.text);
    else
        control_request(server, session, request, &descriptors);
    control_descriptors_close(&descriptors); // what the request has not taken
}

// ---- the end ----

// Counts the ending. `waiting`: requests in flight or queued.
static void note_ending(struct server *server, const struct session *session, enum session_ending ending,
                        uint32_t waiting)
{
    static const char *const texts[] = {
        [SESSION_CLOSED] = "closed by the worker",
        [SESSION_NO_HELLO] = "said no hello",
        [SESSION_DEAF] = "does not read its replies",
        [SESSION_DEAF_CONTROL] = "does not read its control socket",
        [SESSION_FLOODS] = "keeps sending requests beyond --inflight-max",
        [SESSION_BAD_CONTROL] = "sent a packet on its control socket that cannot be received",
        [SESSION_SPOILT_RING] = "has spoilt its ring",
        [SESSION_NO_MEMORY] = "there is no memory for a message of its ring",
        [SESSION_STOPPED] = "the daemon stops",
    };
    struct counts *counts = &server->counts;
    const bool is_worker = session->greeted && !session->admin;
    counts->requests_abandoned += waiting;
    counts->ended_closed += ending == SESSION_CLOSED && is_worker && waiting == 0;
    counts->ended_mid_request += ending == SESSION_CLOSED && is_worker && waiting > 0;
    counts->ended_no_hello += ending == SESSION_NO_HELLO;
    counts->ended_deaf += ending == SESSION_DEAF;
    counts->ended_deaf_control += ending == SESSION_DEAF_CONTROL;
    counts->ended_flood += ending == SESSION_FLOODS;
    counts->ended_bad_control += ending == SESSION_BAD_CONTROL;
    counts->ended_spoilt_ring += ending == SESSION_SPOILT_RING;
    counts->ended_no_memory += ending == SESSION_NO_MEMORY;
    if (is_worker) {
        log_info("session ended id=%llu pid=%d sequences=%u landings=%u requests=%u: %s",
                 (unsigned long long)session->id, (int)session->pid, session->sequence_count, session->landing_count,
                 waiting, texts[ending]);
        server->stats.sessions_reclaimed++;
    } else if (ending != SESSION_CLOSED && ending != SESSION_STOPPED) {
        log_info("connection ended pid=%d: %s", (int)session->pid, texts[ending]);
    }
}

void session_end(struct server *server, struct session *session, enum session_ending ending)
{
    if (session->dead)
        return;
    session->dead = true;
    note_ending(server, session, ending, session->inflight + intake_forget(server, session));
    reactor_unwatch(server, session->control_fd);
    server->env->close_fd(server->env, session->control_fd);
    session->control_fd = -1;
    op_cancel_all(session);
    for (struct sequence *sequence = session->sequences, *next; sequence; sequence = next) {
        next = sequence->session_next;
        if (!sequence->closing)
            op_close_sequence(server, sequence, NULL, NULL);
    }
    for (struct landing *landing = session->landings, *next; landing; landing = next) {
        next = landing->next;
        landing_close(server, landing);
    }
    staging_close(server, session);
    ring_link_close(server, session);
    session_release(server, session); // the socket's
}

uint64_t session_expire(struct server *server, uint64_t now_ns)
{
    uint64_t soonest = UINT64_MAX;
    for (struct session *session = server->sessions, *next; session; session = next) {
        next = session->next;
        if (session->greeted || session->dead)
            continue;
        uint64_t until = session->since_ns + SERVER_HELLO_DEADLINE_NS;
        if (until <= now_ns)
            session_end(server, session, SESSION_NO_HELLO);
        else if (until < soonest)
            soonest = until;
    }
    return soonest;
}
