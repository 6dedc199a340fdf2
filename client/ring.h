// The client's side of the fast lane: a pair of rings (proto/ring.h) for requests and replies instead of ZeroMQ.
// Guarded by the client's lock, as the socket is; the receiver alone waits, with the lock released.
#ifndef ICECACHE_CLIENT_RING_H
#define ICECACHE_CLIENT_RING_H

#include "client/icecache.h"

#include "proto/ring.h"
#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

struct session;

struct client_ring {
    void *mapping;
    uint64_t capacity;
    int event_fd; // wakes the daemon
    int poll_fd;  // an epoll: the daemon's wake-up, the control socket and what the client wakes its receiver by
    struct ring requests, replies;
    uint8_t *rest; // of requests for which there was no room; NULL: none
    uint64_t rest_bytes, rest_sent;
    uint64_t kept_sent, kept_told; // of such requests, ever: bytes in the ring; what the waiters were told of
    struct ring_inbox inbox;
    uint8_t *reply; // being put together, or taken out last; grows to the largest
    size_t reply_room;
};

// Asks the daemon for rings, on the control socket right after the hello, and waits. *out is NULL where there is no
// session's ring to be had (the status says why, with a text). wake_fd: readable when the receiver is to look up.
ICE_MUST_CHECK ice_status ring_connect(const struct session *session, int wake_fd, uint64_t until_us,
                                       struct client_ring **out);
void ring_destroy(struct client_ring *ring);            // accepts NULL
void ring_close_forked(const struct client_ring *ring); // in a child of fork: its descriptors only; accepts NULL

// Takes a message, whole: what there is no room for yet is kept and goes when the ring is looked at again. 0, EAGAIN
// (too much waits for room), ENOMEM.
int ring_submit(struct client_ring *ring, const void *header, size_t header_bytes, const void *vectors,
                size_t vectors_bytes);
// Goes on with a request that waits for room. True: none does any more. False: the daemon knows, and makes poll_fd
// readable when there is room, also for a receiver that sleeps already.
bool ring_flush(struct client_ring *ring);
// What kept_sent will be when all that was submitted is in the ring.
uint64_t ring_kept_end(const struct client_ring *ring);
// The next reply, which is valid until the next call. False: there is none, or the ring is corrupt (ring_is_corrupt).
bool ring_receive(struct client_ring *ring, const void **bytes, size_t *size);
bool ring_is_corrupt(const struct client_ring *ring);
// Before the receiver waits on poll_fd. False: look again first.
bool ring_may_wait(struct client_ring *ring);
// With no lock: waits for any of poll_fd's, at most a second, after spinning for at most spin_us where `seen`, the
// value of ring.replies.peer, does not change.
void ring_wait(const struct client_ring *ring, int timeout_ms);
void ring_spin(const struct client_ring *ring, uint64_t seen, uint64_t spin_us);

#endif
