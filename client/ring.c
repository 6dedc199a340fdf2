// Making the rings, and the messages through them.
//
// The daemon is believed no more than it must be: sizes are checked, the mapping's seals too (memory that somebody can
// shrink would be a SIGBUS), and a reply is copied out before it is decoded.
#include "client/ring.h"

#include "client/error.h"
#include "client/exchange.h"
#include "client/session.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define RING_DESCRIPTORS 3u
#define RING_REPLY_ROOM  4096u // at first
#define RING_WAIT_MS_MAX 1000  // so that a wake-up that was lost, which none should be, costs no more
// Requests that wait for room, in all; the first of them always. What the daemon takes of a session's has this limit,
// too.
#define RING_KEPT_BYTES_MAX (128ull << 20)

// ---- making ----

void ring_destroy(struct client_ring *ring)
{
    if (ring == NULL) {
        return;
    }
    if (ring->mapping != NULL) {
        (void)munmap(ring->mapping, ring_mapping_bytes(ring->capacity));
    }
    if (ring->event_fd >= 0) {
        (void)close(ring->event_fd);
    }
    if (ring->poll_fd >= 0) {
        (void)close(ring->poll_fd);
    }
    free(ring->rest);
    free(ring->reply);
    free(ring);
}

static bool watch(int poll_fd, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

static ice_status ring_map(struct client_ring *ring, int memfd)
{
    const uint64_t bytes = ring_mapping_bytes(ring->capacity);
    struct stat file;
    const int seals = fcntl(memfd, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(memfd, &file) != 0 || (uint64_t)file.st_size < bytes) {
        return error_set(ICE_BAD_MESSAGE, "the memory of the rings is too small or not sealed");
    }
    void *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (mapping == MAP_FAILED) {
        return error_set(ICE_NO_MEMORY, "mapping the rings: %s", strerror(errno));
    }
    (void)madvise(mapping, bytes, MADV_DONTFORK);
    (void)madvise(mapping, bytes, MADV_DONTDUMP);
    ring->mapping = mapping;
    ring_requests(&ring->requests, mapping, ring->capacity);
    ring_replies(&ring->replies, mapping, ring->capacity);
    return ICE_OK;
}

// Takes what the daemon has passed; the two descriptors that stay are taken out of the list.
static ice_status ring_adopt(struct client_ring *ring, const struct session *session, int wake_fd, uint64_t capacity,
                             struct control_descriptors *descriptors)
{
    if (descriptors->count != RING_DESCRIPTORS || capacity == 0 || ring_capacity(capacity) != capacity) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer brings no rings; install the same release of both");
    }
    ring->capacity = capacity;
    const ice_status status = ring_map(ring, descriptors->fds[0]);
    if (status != ICE_OK) {
        return status;
    }
    ring->event_fd = descriptors->fds[1];
    ring->poll_fd = descriptors->fds[2];
    descriptors->count = 1;
    if (!watch(ring->poll_fd, session->control_fd) || !watch(ring->poll_fd, wake_fd)) {
        return error_set(ICE_SYSTEM, "watching the control socket: %s", strerror(errno));
    }
    ring->reply = malloc(RING_REPLY_ROOM);
    ring->reply_room = RING_REPLY_ROOM;
    return ring->reply != NULL ? ICE_OK : error_set(ICE_NO_MEMORY, "no memory for replies");
}

static ice_status ring_ask(const struct session *session, uint64_t until_us, uint64_t *capacity,
                           struct control_descriptors *descriptors)
{
    Icecache__Wire__RingOpen open = ICECACHE__WIRE__RING_OPEN__INIT;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    request.request_id = 2; // the hello was the first; the table of requests counts from beyond its size
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN;
    request.ring_open = &open;
    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    size_t size = icecache__wire__control_request__pack(&request, packet);
    ice_status status = control_send(session->control_fd, packet, size, -1, clock_left_ms(until_us));
    if (status == ICE_OK) {
        status = control_receive_all(session->control_fd, packet, sizeof packet, &size, descriptors,
                                     clock_left_ms(until_us));
    }
    if (status != ICE_OK) {
        return error_set(status, "the daemon did not answer the request for rings: %s", status_text((int)status));
    }
    Icecache__Wire__ControlReply *reply = NULL;
    status = wire_control_reply_decode(packet, size, &reply);
    if (status != ICE_OK) {
        return error_set(status, "the daemon's answer about rings cannot be decoded");
    }
    if (reply->status != ICE_OK) {
        status = status_is_known((int)reply->status) ? (ice_status)reply->status : ICE_INTERNAL;
        status = error_set(status, "no rings: %s", reply->text != NULL ? reply->text : status_text((int)status));
    } else if (reply->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_RING) {
        *capacity = reply->ring->bytes;
    }
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

ice_status ring_connect(const struct session *session, int wake_fd, uint64_t until_us, struct client_ring **out)
{
    *out = NULL;
    struct client_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for rings");
    }
    ring->event_fd = ring->poll_fd = -1;
    struct control_descriptors descriptors = {.count = 0};
    uint64_t capacity = 0;
    ice_status status = ring_ask(session, until_us, &capacity, &descriptors);
    if (status == ICE_OK) {
        status = ring_adopt(ring, session, wake_fd, capacity, &descriptors);
    }
    control_descriptors_close(&descriptors);
    if (status != ICE_OK) {
        ring_destroy(ring);
        return status;
    }
    *out = ring;
    return ICE_OK;
}

void ring_close_forked(const struct client_ring *ring)
{
    if (ring != NULL) {
        (void)close(ring->event_fd);
        (void)close(ring->poll_fd); // the mapping is not in a child (MADV_DONTFORK)
    }
}

// ---- requests ----

static void wake_daemon(const struct client_ring *ring)
{
    const uint64_t one = 1;
    ssize_t written = write(ring->event_fd, &one, sizeof one); // fails only where it is readable anyway
    (void)written;
}

bool ring_flush(struct client_ring *ring)
{
    while (ring->rest != NULL) {
        const uint64_t room = ring_room(&ring->requests), left = ring->rest_bytes - ring->rest_sent;
        const uint64_t size = left < room ? left : room;
        if (size == 0) {
            if (ring->requests.corrupt || ring_wait_room(&ring->requests)) {
                return false;
            }
            continue; // there was some at the second look
        }
        ring_write(&ring->requests, ring->rest + ring->rest_sent, size);
        ring->rest_sent += size;
        ring->kept_sent += size;
        if (ring_publish(&ring->requests)) {
            wake_daemon(ring);
        }
        if (ring->rest_sent == ring->rest_bytes) {
            free(ring->rest);
            ring->rest = NULL;
        }
    }
    return true;
}

uint64_t ring_kept_end(const struct client_ring *ring)
{
    return ring->kept_sent + (ring->rest != NULL ? ring->rest_bytes - ring->rest_sent : 0);
}

// The whole message as bytes behind those that wait, of which ring_flush sends what there is room for.
static int keep(struct client_ring *ring, const struct ring_record *record, const void *header, const void *vectors)
{
    const uint64_t bytes = sizeof *record + record->header_bytes + record->vectors_bytes;
    const uint64_t left = ring->rest != NULL ? ring->rest_bytes - ring->rest_sent : 0;
    if (left > 0 && left + bytes > RING_KEPT_BYTES_MAX) {
        return EAGAIN;
    }
    if (ring->rest != NULL) {
        memmove(ring->rest, ring->rest + ring->rest_sent, left);
        ring->rest_bytes = left;
        ring->rest_sent = 0;
    }
    uint8_t *rest = realloc(ring->rest, left + bytes);
    if (rest == NULL) {
        return ENOMEM;
    }
    uint8_t *at = rest + left;
    memcpy(at, record, sizeof *record);
    memcpy(at + sizeof *record, header, record->header_bytes);
    if (record->vectors_bytes > 0) {
        memcpy(at + sizeof *record + record->header_bytes, vectors, record->vectors_bytes);
    }
    ring->rest = rest;
    ring->rest_bytes = left + bytes;
    ring->rest_sent = 0;
    (void)ring_flush(ring);
    return 0;
}

int ring_submit(struct client_ring *ring, const void *header, size_t header_bytes, const void *vectors,
                size_t vectors_bytes)
{
    const struct ring_record record = {(uint32_t)header_bytes, (uint32_t)vectors_bytes};
    uint64_t sent = 0;
    if (!ring_flush(ring) || ring_room(&ring->requests) < sizeof record + header_bytes + vectors_bytes) {
        return keep(ring, &record, header, vectors);
    }
    if (!ring_send(&ring->requests, &record, header, vectors, &sent)) {
        return EAGAIN; // room that was there is gone: the daemon has spoilt the ring
    }
    if (ring_publish(&ring->requests)) {
        wake_daemon(ring);
    }
    return 0;
}

// ---- replies ----

bool ring_is_corrupt(const struct client_ring *ring)
{
    return ring->requests.corrupt || ring->replies.corrupt;
}

// Room for the reply that has begun; without it the reply is dropped, and its caller runs into its deadline.
static void make_room(struct client_ring *ring)
{
    const size_t bytes = ring->inbox.record.header_bytes;
    if (bytes > ring->reply_room) {
        free(ring->reply);
        ring->reply = malloc(bytes);
        ring->reply_room = ring->reply != NULL ? bytes : 0;
    }
}

bool ring_receive(struct client_ring *ring, const void **bytes, size_t *size)
{
    for (;;) {
        if (!ring->inbox.begun) {
            if (ring_begin(&ring->replies, &ring->inbox, WIRE_REPLY_BYTES_MAX, 0) != RING_BEGUN) {
                return false;
            }
            make_room(ring);
        }
        uint8_t *reply = ring->inbox.record.header_bytes <= ring->reply_room ? ring->reply : NULL;
        const enum ring_step step = ring_take(&ring->replies, &ring->inbox, reply, NULL);
        if (ring_consume(&ring->replies)) {
            wake_daemon(ring);
        }
        if (step != RING_WHOLE) {
            return false;
        }
        if (reply != NULL) {
            *bytes = reply;
            *size = ring->inbox.record.header_bytes;
            return true;
        }
    }
}

// ---- waiting ----

bool ring_may_wait(struct client_ring *ring)
{
    if (ring->rest != NULL && !ring_wait_room(&ring->requests)) {
        return false;
    }
    return ring_wait_filled(&ring->replies);
}

void ring_spin(const struct client_ring *ring, uint64_t seen, uint64_t spin_us)
{
    const uint64_t until_us = clock_us() + spin_us;
    while (atomic_load(&ring->replies.shared->head) == seen && clock_us() < until_us) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
}

void ring_wait(const struct client_ring *ring, int timeout_ms)
{
    struct epoll_event events[RING_DESCRIPTORS]; // taken out: the daemon's wake-up is there for one look
    (void)epoll_wait(ring->poll_fd, events, RING_DESCRIPTORS,
                     timeout_ms < RING_WAIT_MS_MAX ? timeout_ms : RING_WAIT_MS_MAX);
}
