// Rings of sessions: making, the rounds, replies, the end.
//
// Whatever a worker writes into the mapping, at any moment, comes to one of these: messages, which are judged like
// those from the bus, once they have been copied; or an index or a record that cannot be, which ends its session.
#include "cached/rings.h"

#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <string.h>

#define MESSAGE_ALIGN 64u

struct ring_job {
    struct task task;
    struct completion completion;
    struct server *server;
    struct session *session; // held
    uint64_t request_id;
    void *mapping;
    int fd;
    int error;
};

static struct ring_job *job_of(struct completion *completion)
{
    return (struct ring_job *)((char *)completion - offsetof(struct ring_job, completion));
}

static void end_job(struct server *server, struct ring_job *job)
{
    struct session *session = job->session;
    server->env->close_fd(server->env, job->fd);
    server->env->release(server->env, job, sizeof *job);
    session_release(server, session);
}

// ---- the queue of rings with something to do ----

static void ready_push(struct server *server, struct session *session)
{
    if (session->ring.ready)
        return;
    session->ring.ready = true;
    session->ring.ready_next = NULL;
    if (server->rings_ready)
        server->rings_ready_tail->ring.ready_next = session;
    else
        server->rings_ready = session;
    server->rings_ready_tail = session;
}

static struct session *ready_pop(struct server *server)
{
    struct session *session = server->rings_ready;
    server->rings_ready = session->ring.ready_next;
    session->ring.ready = false;
    return session;
}

static void ready_remove(struct server *server, struct session *session)
{
    struct session *before = NULL;
    if (!session->ring.ready)
        return;
    for (struct session *at = server->rings_ready; at != session; at = at->ring.ready_next)
        before = at;
    if (before)
        before->ring.ready_next = session->ring.ready_next;
    else
        server->rings_ready = session->ring.ready_next;
    if (server->rings_ready_tail == session)
        server->rings_ready_tail = before;
    session->ring.ready = false;
}

void rings_wake(struct server *server, struct session *session)
{
    if (session->ring.open)
        ready_push(server, session);
}

// ---- the end ----

static void run_close(struct task *task, void *thread)
{
    (void)thread;
    struct ring_job *job = (struct ring_job *)task;
    const uint64_t bytes = ring_mapping_bytes(job->session->ring.capacity); // constant
    job->server->env->unmap_shared(job->server->env, job->mapping, bytes);
    completion_post(&job->server->completions, &job->completion);
}

static void closed(struct completion *completion, struct server *server)
{
    struct ring_job *job = job_of(completion);
    budget_give(&server->shared_budget, ring_mapping_bytes(job->session->ring.capacity));
    end_job(server, job);
}

// The job holds the session already.
static void push_close(struct server *server, struct ring_job *job)
{
    job->task.run = run_close;
    job->completion.done = closed;
    task_queue_push(&server->keeper_queue, TASK_ADMIN, &job->task);
}

static uint64_t message_room(const struct ring_record *record)
{
    const uint64_t header_room = (record->header_bytes + MESSAGE_ALIGN - 1) / MESSAGE_ALIGN * MESSAGE_ALIGN;
    return header_room + record->vectors_bytes;
}

static void drop_reply(struct server *server, struct ring_link *link)
{
    struct ring_reply *reply = link->queue;
    link->queue = reply->next;
    link->queue_count--;
    link->queue_bytes -= reply->record.header_bytes;
    server->env->release(server->env, reply, sizeof *reply + reply->record.header_bytes);
}

void ring_link_close(struct server *server, struct session *session)
{
    struct env *env = server->env;
    struct ring_link *link = &session->ring;
    if (!link->open) // or about to be: what comes of the job goes with its completion
        return;
    link->open = false;
    ready_remove(server, session);
    reactor_unwatch(server, link->event_fd); // the worker has it open as well: closing alone would leave it watched
    env->close_fd(env, link->event_fd);
    env->bell_close(env, &link->bell);
    while (link->queue)
        drop_reply(server, link);
    if (link->inbox.begun)
        env->release(env, link->message, message_room(&link->inbox.record));
    link->message = NULL;
    struct ring_job *job = link->job;
    *job = (struct ring_job){.server = server, .session = session, .mapping = link->mapping, .fd = -1};
    session_hold(session);
    push_close(server, job);
}

// ---- making ----

static void run_open(struct task *task, void *thread)
{
    (void)thread;
    struct ring_job *job = (struct ring_job *)task;
    struct env *env = job->server->env;
    const uint64_t bytes = ring_mapping_bytes(job->session->ring.capacity);
    job->error = env->memfd_create(env, "icecache-ring", bytes, &job->fd);
    if (job->error == 0)
        job->error = env->map_shared(env, job->fd, bytes, &job->mapping);
    completion_post(&job->server->completions, &job->completion);
}

static int open_wakeups(struct server *server, struct session *session)
{
    struct env *env = server->env;
    struct ring_link *link = &session->ring;
    int error = env->event_open(env, &link->event_fd);
    if (error)
        return error;
    error = env->bell_open(env, &link->bell);
    if (error) {
        env->close_fd(env, link->event_fd);
        return error;
    }
    error = reactor_watch_ring(server, link->event_fd, session);
    if (error) {
        env->bell_close(env, &link->bell);
        env->close_fd(env, link->event_fd);
    }
    return error;
}

static void answer_open(struct server *server, struct session *session, const struct ring_job *job)
{
    struct ring_link *link = &session->ring;
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    Icecache__Wire__RingReply body = ICECACHE__WIRE__RING_REPLY__INIT;
    reply.request_id = job->request_id;
    reply.body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_RING;
    reply.ring = &body;
    body.bytes = link->capacity;
    const int fds[] = {job->fd, link->event_fd, link->bell.heard_fd};
    control_reply_all(server, session, &reply, fds, 3);
}

static void opened(struct completion *completion, struct server *server)
{
    struct env *env = server->env;
    struct ring_job *job = job_of(completion);
    struct session *session = job->session;
    struct ring_link *link = &session->ring;
    const bool mapped = job->error == 0;
    if (mapped && !session->dead)
        job->error = open_wakeups(server, session);
    if (job->error || session->dead) {
        const ice_status status = job->error == -ENOMEM || job->error == -ENOSPC ? ICE_SHARED_FULL : ICE_SYSTEM;
        control_error(server, session, job->request_id, status, "no memory or descriptors for rings; use ZeroMQ");
        if (mapped) {
            push_close(server, job);
            return;
        }
        budget_give(&server->shared_budget, ring_mapping_bytes(link->capacity));
        end_job(server, job);
        return;
    }
    link->mapping = job->mapping;
    link->job = env_acquire_zeroed(env, sizeof *job); // for the closing
    if (!link->job) {
        reactor_unwatch(server, link->event_fd);
        env->bell_close(env, &link->bell);
        env->close_fd(env, link->event_fd);
        control_error(server, session, job->request_id, ICE_NO_MEMORY, NULL);
        push_close(server, job);
        return;
    }
    ring_requests(&link->requests, link->mapping, link->capacity);
    ring_replies(&link->replies, link->mapping, link->capacity);
    link->open = true;
    ready_push(server, session); // its first turn puts it to sleep
    answer_open(server, session, job);
    if (link->open)
        env->bell_passed(env, &link->bell);
    end_job(server, job);
}

void ring_link_open(struct server *server, struct session *session, uint64_t request_id)
{
    struct ring_link *link = &session->ring;
    const uint64_t capacity = ring_capacity(server->config->ring_bytes);
    if (capacity == 0) {
        control_error(server, session, request_id, ICE_NOT_SUPPORTED,
                      "this daemon has no rings (--ring-bytes 0); use ZeroMQ");
        return;
    }
    if (link->capacity != 0) {
        control_error(server, session, request_id, ICE_LIMIT, "the session has asked for its rings already");
        return;
    }
    if (!budget_take(&server->shared_budget, NULL, ring_mapping_bytes(capacity))) {
        control_error(server, session, request_id, ICE_SHARED_FULL, NULL);
        return;
    }
    struct ring_job *job = env_acquire_zeroed(server->env, sizeof *job);
    if (!job) {
        budget_give(&server->shared_budget, ring_mapping_bytes(capacity));
        control_error(server, session, request_id, ICE_NO_MEMORY, NULL);
        return;
    }
    link->capacity = capacity;
    *job = (struct ring_job){.task = {.run = run_open},
                             .completion = {.done = opened},
                             .server = server,
                             .session = session,
                             .request_id = request_id,
                             .fd = -1};
    session_hold(session);
    task_queue_push(&server->keeper_queue, TASK_BULK, &job->task);
}

// ---- requests ----

static void begin_message(struct server *server, struct ring_link *link)
{
    link->message = server->env->acquire(server->env, message_room(&link->inbox.record));
    if (!link->message)
        log_warn("receiving failed: no memory for a request of %u bytes",
                 link->inbox.record.header_bytes + link->inbox.record.vectors_bytes);
}

static void finish_message(struct session *session, struct env_message *out)
{
    struct ring_link *link = &session->ring;
    const struct ring_record *record = &link->inbox.record;
    out->header = link->message;
    out->header_bytes = record->header_bytes;
    out->vectors = link->message + (message_room(record) - record->vectors_bytes);
    out->vectors_bytes = record->vectors_bytes;
    out->route_bytes = ENV_ROUTE_RING;
    out->peer_pid = session->pid; // its control socket's: nobody else has the ring
    out->peer_uid = session->uid;
    out->surplus_frames = 0;
    out->handle = link->message;
    link->message = NULL;
}

// RING_WHOLE: out is a message; its handle is NULL where there was no memory for it.
static enum ring_step receive(struct server *server, struct session *session, struct env_message *out)
{
    struct ring_link *link = &session->ring;
    enum ring_step step = RING_BEGUN;
    if (!link->inbox.begun) {
        step = ring_begin(&link->requests, &link->inbox, WIRE_HEADER_BYTES_MAX, WIRE_VECTORS_BYTES_MAX);
        if (step != RING_BEGUN)
            return step;
        begin_message(server, link);
    }
    uint8_t *vectors =
        link->message ? link->message + (message_room(&link->inbox.record) - link->inbox.record.vectors_bytes) : NULL;
    step = ring_take(&link->requests, &link->inbox, link->message, vectors);
    if (step == RING_WHOLE) {
        if (link->message)
            finish_message(session, out);
        else
            out->handle = NULL;
    }
    return step;
}

static void ring_bell(struct server *server, struct ring_link *link)
{
    server->env->bell_ring(server->env, &link->bell);
}

// Replies that wait for room. A worker that makes room byte by byte has its turns like the others. False: the worker
// has spoilt the ring.
static bool flush(struct server *server, struct session *session)
{
    struct ring_link *link = &session->ring;
    for (uint32_t i = 0; link->queue; i++) {
        struct ring_reply *reply = link->queue;
        if (i == RINGS_REPLIES_PER_TURN) {
            ready_push(server, session);
            break;
        }
        const bool whole = ring_send(&link->replies, &reply->record, reply + 1, NULL, &reply->sent);
        if (ring_publish(&link->replies))
            ring_bell(server, link);
        if (whole)
            drop_reply(server, link);
        else if (link->replies.corrupt || ring_wait_room(&link->replies))
            break;
    }
    return !link->replies.corrupt;
}

// One session's turn. True: it wants another one.
static bool turn(struct server *server, struct session *session)
{
    struct ring_link *link = &session->ring;
    const uint64_t from = link->requests.at;
    if (!flush(server, session)) {
        session_end(server, session, SESSION_SPOILT_RING);
        return false;
    }
    for (uint32_t i = 0; i < RINGS_MESSAGES_PER_TURN && link->requests.at - from < RINGS_BYTES_PER_TURN; i++) {
        struct env_message message;
        const enum ring_step step = receive(server, session, &message);
        if (step == RING_CORRUPT) {
            session_end(server, session, SESSION_SPOILT_RING);
            return false;
        }
        if (ring_consume(&link->requests))
            ring_bell(server, link);
        if (step != RING_WHOLE)
            return !ring_wait_filled(&link->requests);
        if (!message.handle) {
            session_end(server, session, SESSION_NO_MEMORY); // its sender would wait for ever
            return false;
        }
        intake_take(server, session, &message);
        if (session->dead)
            return false;
    }
    return true;
}

bool rings_run(struct server *server)
{
    uint32_t turns = 0; // of those that stand in the queue now: who comes back waits for the next round
    for (const struct session *session = server->rings_ready; session; session = session->ring.ready_next)
        turns++;
    while (turns-- > 0 && server->rings_ready) {
        struct session *session = ready_pop(server);
        if (turn(server, session))
            ready_push(server, session);
    }
    return server->rings_ready != NULL;
}

void rings_release(struct server *server, struct env_message *message)
{
    if (message->route_bytes != ENV_ROUTE_RING) {
        server->env->bus_release(server->env, message);
        return;
    }
    const struct ring_record record = {(uint32_t)message->header_bytes, (uint32_t)message->vectors_bytes};
    server->env->release(server->env, message->handle, message_room(&record));
    message->handle = NULL;
}

// ---- replies ----

static int queue_reply(struct server *server, struct session *session, const struct ring_record *record,
                       const void *bytes)
{
    struct ring_link *link = &session->ring;
    if (link->queue_count == RINGS_QUEUE_MAX || link->queue_bytes + record->header_bytes > RINGS_QUEUE_BYTES_MAX)
        return -EAGAIN;
    struct ring_reply *reply = server->env->acquire(server->env, sizeof *reply + record->header_bytes);
    if (!reply)
        return -ENOMEM;
    *reply = (struct ring_reply){.record = *record};
    memcpy(reply + 1, bytes, record->header_bytes);
    if (link->queue)
        link->queue_tail->next = reply;
    else
        link->queue = reply;
    link->queue_tail = reply;
    link->queue_count++;
    link->queue_bytes += record->header_bytes;
    return flush(server, session) ? 0 : -EPROTO;
}

int ring_link_send(struct server *server, struct session *session, const void *bytes, size_t size)
{
    struct ring_link *link = &session->ring;
    const struct ring_record record = {.header_bytes = (uint32_t)size};
    uint64_t sent = 0;
    if (!link->open)
        return -EHOSTUNREACH;
    // Nothing is begun that cannot be ended: what there is no room for is kept whole first.
    if (link->queue || ring_room(&link->replies) < sizeof record + size)
        return link->replies.corrupt ? -EPROTO : queue_reply(server, session, &record, bytes);
    const bool whole = ring_send(&link->replies, &record, bytes, NULL, &sent);
    if (ring_publish(&link->replies))
        ring_bell(server, link);
    return whole ? 0 : -EPROTO; // room that was there is gone: an index has gone back
}
