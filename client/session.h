// One session with the daemon: the control socket, the data socket, and the identity that every request carries.
#ifndef ICECACHE_CLIENT_SESSION_H
#define ICECACHE_CLIENT_SESSION_H

#include "client/icecache.h"
#include "proto/limits.h"
#include "proto/status.h"

#include <stdint.h>
#include <time.h>

struct client_ring;

struct session {
    uint64_t id, boot_token, vectors_bytes_max;
    uint8_t token[WIRE_SESSION_TOKEN_BYTES];
    char endpoint[128];
    uint64_t ring_bytes;      // of the rings that the daemon offers; 0: none
    struct client_ring *ring; // owned; requests and replies go through it where there is one, else
    void *socket;             // ZeroMQ DEALER; NULL: none
    int socket_fd;            // its ZMQ_FD, edge-triggered
    int control_fd;           // -1: none
};

// Now, on the monotonic clock.
static inline uint64_t clock_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

// Milliseconds until an absolute time, rounded up, for poll().
static inline int clock_left_ms(uint64_t until_us)
{
    uint64_t now_us = clock_us();
    uint64_t left_ms = until_us > now_us ? (until_us - now_us + 999u) / 1000u : 0u;
    return left_ms > 60000u ? 60000 : (int)left_ms;
}

// An empty session, which session_close accepts.
void session_init(struct session *session);
struct session_options {
    void *context; // ZeroMQ's
    const char *directory, *name;
    const char *name_space; // the only one that the session may use, empty: any
    enum ice_transport transport;
    int wake_fd; // that ends the receiver's wait
};

// Says hello on the control socket in the directory, then has rings made or connects the data socket; returns when
// requests can be sent.
// Written on success only.
ICE_MUST_CHECK ice_status session_connect(struct session *session, const struct session_options *options,
                                          uint64_t until_us);
// Closes both sockets; the daemon frees what the session held.
void session_close(struct session *session);

#endif
