// The daemon's end of a pair of rings, for the scripted daemon (client_fake.h). It belongs to the daemon's thread but
// for what fake_ring_is_full and fake_ring_client_sleeps look at.
#ifndef ICECACHE_TESTS_CLIENT_FAKE_RING_H
#define ICECACHE_TESTS_CLIENT_FAKE_RING_H

#include "proto/limits.h"
#include "proto/ring.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define FAKE_RING_FDS 3

struct fake_ring {
    void *mapping; // NULL: there is none
    uint64_t capacity;
    int event_fd, bell_fd; // the client wakes us; we wake the client
    struct ring requests, replies;
    struct ring_inbox inbox;
    uint8_t *message; // being put together: frame 1, frame 2
};

static inline void fake_ring_close(struct fake_ring *ring)
{
    if (ring->mapping != NULL) {
        munmap(ring->mapping, ring_mapping_bytes(ring->capacity));
        close(ring->event_fd);
        close(ring->bell_fd);
        free(ring->message);
        *ring = (struct fake_ring){.event_fd = -1, .bell_fd = -1};
    }
}

// false: something failed. fds are what the client gets: the last one is an epoll that watches our bell for edges.
static inline bool fake_ring_open(struct fake_ring *ring, uint64_t capacity, int fds[FAKE_RING_FDS])
{
    const size_t bytes = ring_mapping_bytes(capacity);
    struct epoll_event edges = {.events = EPOLLIN | EPOLLET};
    fake_ring_close(ring);
    *ring = (struct fake_ring){.capacity = capacity};
    fds[0] = memfd_create("fake-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fds[0] < 0 || ftruncate(fds[0], (off_t)bytes) != 0 || fcntl(fds[0], F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
        return false;
    }
    ring->mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    ring->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fds[1] = dup(ring->event_fd);
    fds[2] = epoll_create1(EPOLL_CLOEXEC);
    if (ring->mapping == MAP_FAILED || epoll_ctl(fds[2], EPOLL_CTL_ADD, ring->bell_fd, &edges) != 0) {
        return false;
    }
    ring_requests(&ring->requests, ring->mapping, capacity);
    ring_replies(&ring->replies, ring->mapping, capacity);
    return true;
}

static inline void fake_ring_wake(const struct fake_ring *ring)
{
    const uint64_t one = 1;
    ssize_t written = write(ring->bell_fd, &one, sizeof one);
    (void)written;
}

// true: a message is whole: frame 1 is at ring->message, frame 2 behind it, and ring->inbox.record has their sizes.
static inline bool fake_ring_receive(struct fake_ring *ring)
{
    uint64_t count;
    ssize_t consumed = read(ring->event_fd, &count, sizeof count);
    (void)consumed;
    for (;;) {
        enum ring_step step = RING_BEGUN;
        if (!ring->inbox.begun) {
            step = ring_begin(&ring->requests, &ring->inbox, WIRE_HEADER_BYTES_MAX, WIRE_VECTORS_BYTES_MAX);
            if (step == RING_BEGUN) {
                const struct ring_record *record = &ring->inbox.record;
                free(ring->message);
                ring->message = malloc((size_t)record->header_bytes + record->vectors_bytes);
            }
        }
        if (step == RING_BEGUN && ring->message != NULL) {
            step = ring_take(&ring->requests, &ring->inbox, ring->message,
                             ring->message + ring->inbox.record.header_bytes);
        }
        if (ring_consume(&ring->requests)) {
            fake_ring_wake(ring);
        }
        if (step == RING_WHOLE) {
            return true;
        }
        if (step == RING_CORRUPT || ring_wait_filled(&ring->requests)) {
            return false;
        }
    }
}

// Replies are small and the ring is never full of them. quiet: a client that sleeps is not woken.
static inline void fake_ring_send(struct fake_ring *ring, const void *bytes, size_t size, bool quiet)
{
    const struct ring_record record = {(uint32_t)size, 0};
    uint64_t sent = 0;
    const bool whole = ring_send(&ring->replies, &record, bytes, NULL, &sent);
    if (ring_publish(&ring->replies) && !quiet) {
        fake_ring_wake(ring);
    }
    if (!whole) {
        abort();
    }
}

static inline bool fake_ring_is_full(const struct fake_ring *ring)
{
    const struct ring_shared *shared = ring->requests.shared;
    return atomic_load(&shared->head) - atomic_load(&shared->tail) == ring->capacity;
}

// Does a thread of the client sleep for replies? (Or is it about to, having looked at the ring.)
static inline bool fake_ring_client_sleeps(const struct fake_ring *ring)
{
    return atomic_load(&ring->replies.shared->consumer_waits) != 0;
}

#endif
