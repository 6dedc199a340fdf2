// Between a message's receipt and its dispatch: whose it is, whether it may wait, and whose turn it is. Messages of
// every transport go through it. Reactor only.
//
// A session's messages keep their order. Sessions are served by the class of the message that each would send next, and
// in turn within a class (fair_queue.h); so whoever floods has his own queue full, and nobody else waits for it. What a
// session may have queued and in flight together is bounded by --inflight-max and SERVER_INFLIGHT_BYTES_MAX: beyond it
// a message is refused when it is received.
#ifndef ICECACHE_CACHED_INTAKE_H
#define ICECACHE_CACHED_INTAKE_H

#include "cached/env.h"
#include "cached/fair_queue.h"
#include "proto/wire.h"

#include <stdbool.h>
#include <stdint.h>

#define INTAKE_SERVED_PER_ROUND  64u   // messages, until the reactor looks at its other sockets
#define INTAKE_RECEIVED_PER_TURN 64u   // messages, between two that are served
#define INTAKE_REFUSALS_PER_S    1024u // requests of one session beyond its bound: more end it
#define INTAKE_STRANGERS_PER_S   1000u // answers to messages of no session; the others are dropped

struct server;
struct session;
struct intake_message;

struct intake_rate {
    uint64_t second; // of the clock
    uint32_t count;  // within it
};

// A session's part.
struct intake_line {
    struct fair_node node; // first: stands for the line in the fair queue while it holds something
    struct session *session;
    struct intake_message *head, *tail;
    uint32_t count;
    uint64_t bytes;
    enum fair_class class; // of the head
    struct intake_rate refused;
};

struct intake {
    struct fair_queue lines;
    // A message that came alone is decoded once and never queued. Its request lies in the arena until the next message
    // is received, which queues it.
    bool has_alone;
    struct env_message alone;
    struct session *alone_session;
    Icecache__Wire__Request *alone_request;
    struct intake_rate strangers, dropped;
};

// Takes a message, from the bus or, where `ring` is not NULL, from that session's ring, which is the intake's from now
// on: refuses it or has it wait for intake_serve.
void intake_take(struct server *server, struct session *ring, struct env_message *message);
// Dispatches the message whose turn it is. False: none waits.
bool intake_serve(struct server *server);
bool intake_is_empty(const struct server *server);
// Drops what a session that ends has waiting. Returns how many messages those were.
uint32_t intake_forget(struct server *server, struct session *session);
// One more in this second; how many those are.
uint32_t intake_rate_add(struct intake_rate *rate, uint64_t now_ns);

#endif
