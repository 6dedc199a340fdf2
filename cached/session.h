// A session: one connected worker, from its hello to the closing of its control socket. Reactor only.
//
// Landings and staging are made and unmade on the keeper thread, because populating and unmapping take long; what is in
// use by a request stays until that request has ended.
#ifndef ICECACHE_CACHED_SESSION_H
#define ICECACHE_CACHED_SESSION_H

#include "cached/admission.h"
#include "cached/completion.h"
#include "cached/env.h"
#include "cached/intake.h"
#include "cached/rings.h"
#include "cached/task_queue.h"
#include "gpu/landing.h"
#include "proto/control.h"
#include "proto/limits.h"
#include "proto/wire.h"

struct gpu; // of the daemon (gpus.h)
struct job; // work of the keeper (shared.c)
struct op;
struct sequence;
struct server;
struct session;

struct landing_row {
    uint64_t binding; // of the sequence that it is bound to; 0: none
    bool busy;        // from submit until the reply
};

struct landing {
    uint32_t id;
    struct session *session;
    const struct gpu_landing_ops *ops;
    struct gpu_landing *memory;
    struct gpu *gpu; // that selections are pushed to, open; NULL: none
    struct landing_shape shape;
    uint64_t passed_bytes; // of the memfd that the worker maps
    uint64_t held_bytes;   // with what the daemon keeps beside it, as the budget counts it
    struct landing_row *rows;
    uint64_t opened_ns, used_ns;
    uint32_t users; // requests in flight
    bool closing;
    bool close_asked; // the worker waits for the reply to its close
    uint64_t close_request_id;
    struct job *close_job; // made with the landing, so that closing never needs memory
    struct landing *next;
};

struct staging {
    uint8_t *base;
    uint64_t bytes;
    uint64_t opened_ns, used_ns;
    uint32_t users; // requests in flight
    struct job *close_job;
};

// Why a session ends. CLOSED: its socket was closed, by the worker or with it.
enum session_ending {
    SESSION_CLOSED,
    SESSION_NO_HELLO,
    SESSION_DEAF,
    SESSION_DEAF_CONTROL,
    SESSION_FLOODS,
    SESSION_BAD_CONTROL,
    SESSION_SPOILT_RING,
    SESSION_NO_MEMORY,
    SESSION_STOPPED,
};

struct session {
    uint64_t id;
    uint8_t token[WIRE_SESSION_TOKEN_BYTES];
    int control_fd; // -1: closed
    pid_t pid;
    uid_t uid;
    bool greeted, admin, dead;
    char name[WIRE_NAME_BYTES_MAX + 1];
    char name_space[WIRE_NAME_BYTES_MAX + 1]; // the only one that it may use; empty: any
    uint64_t since_ns;
    uint32_t slot;    // no other session has it: the flow of its work in fair queues
    uint64_t used_ns; // of the last request
    uint32_t holds;   // requests, jobs and sequences that still point here
    uint32_t inflight;
    uint64_t inflight_bytes; // memory of requests in flight
    uint32_t landing_count, sequence_count;
    uint32_t next_landing_id;
    uint32_t descriptors; // of GPU memory, on their way to the opener
    struct landing *landings;
    struct sequence *sequences;
    struct op *ops;          // in flight
    struct intake_line line; // received and not yet dispatched
    struct admission_load load;
    struct staging staging;
    bool staging_pending;
    struct ring_link ring;
    struct session *previous, *next;
};

void session_accept(struct server *server);                            // the listener is readable
void session_readable(struct server *server, struct session *session); // its control socket is readable
// Ends the session: everything it holds is freed as soon as requests in flight are done. Idempotent.
void session_end(struct server *server, struct session *session, enum session_ending ending);
void session_hold(struct session *session);
void session_release(struct server *server, struct session *session); // may free it
void session_bury(struct server *server); // frees those that are gone; at the end of a reactor round
struct session *session_find(struct server *server, uint64_t id, const uint8_t *token);
// Closes connections that have not said hello in time. Returns the next time to look, or UINT64_MAX.
uint64_t session_expire(struct server *server, uint64_t now_ns);

// Replies on the control socket; descriptors are borrowed, fd -1: none.
void control_reply(struct server *server, struct session *session, Icecache__Wire__ControlReply *reply, int fd);
void control_reply_all(struct server *server, struct session *session, Icecache__Wire__ControlReply *reply,
                       const int *fds, uint32_t count);
void control_error(struct server *server, struct session *session, uint64_t request_id, ice_status status,
                   const char *text);

// Landings and staging (shared.c).
// Takes the descriptors that it needs.
void landing_open(struct server *server, struct session *session, uint64_t request_id,
                  const Icecache__Wire__LandingOpen *message, struct control_descriptors *descriptors);
void landing_close(struct server *server, struct landing *landing); // idempotent; gone when its last user is
void staging_open(struct server *server, struct session *session, uint64_t request_id, uint64_t bytes);
void staging_close(struct server *server, struct session *session); // where nobody uses it
struct landing *landing_find(struct session *session, uint32_t id);
void landing_release(struct server *server, struct landing *landing); // one user less; may start the unmapping
void staging_release(struct server *server, struct session *session); // one user less

#endif
