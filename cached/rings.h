// The fast lane: a session's pair of rings (proto/ring.h) instead of the bus. Reactor only, but for the making and
// unmaking of the mapping, which the keeper does.
//
// Rings that have something to do stand in one queue. In a round each has one turn of a few messages, then goes to the
// back or to sleep, so that no worker keeps the reactor from the others, and a ring without traffic costs nothing.
#ifndef ICECACHE_CACHED_RINGS_H
#define ICECACHE_CACHED_RINGS_H

#include "cached/env.h"
#include "proto/ring.h"

struct ring_job; // the keeper's (rings.c)
struct server;
struct session;

#define RINGS_MESSAGES_PER_TURN 4u
#define RINGS_REPLIES_PER_TURN  64u
#define RINGS_BYTES_PER_TURN    (256u << 10)
#define RINGS_QUEUE_MAX         1024u       // replies that a session has not made room for, beyond which it ends,
#define RINGS_QUEUE_BYTES_MAX   (32u << 20) // and their bytes

// A reply for which the ring had no room, or not enough.
struct ring_reply {
    struct ring_reply *next;
    struct ring_record record; // the reply's bytes lie behind this struct
    uint64_t sent;
};

// A session's. Zeroed: none.
struct ring_link {
    uint64_t capacity; // 0: never asked for
    bool open;         // all below is there
    struct ring_job *job;
    void *mapping;
    int event_fd; // the worker wakes the reactor
    struct env_bell bell;
    struct ring requests, replies;

    struct ring_inbox inbox;
    uint8_t *message; // being put together; NULL where there was no memory for it: it is dropped
    struct ring_reply *queue, *queue_tail;
    uint32_t queue_count;
    uint64_t queue_bytes;

    bool ready; // stands in the server's queue
    struct session *ready_next;
};

void ring_link_open(struct server *server, struct session *session, uint64_t request_id);
void ring_link_close(struct server *server, struct session *session); // at the session's end
// The worker has woken us: its ring has a turn in this round.
void rings_wake(struct server *server, struct session *session);
// One round. True: there is more to do.
bool rings_run(struct server *server);
// A reply (frame 1) to what came over the session's ring; bytes are copied. -EAGAIN: the worker does not read, -EPROTO:
// it has spoilt the ring, -ENOMEM: the reply is lost, -EHOSTUNREACH: there is no ring.
int ring_link_send(struct server *server, struct session *session, const void *bytes, size_t size);
// Frees a message, from wherever it came. Idempotent.
void rings_release(struct server *server, struct env_message *message);

#endif
