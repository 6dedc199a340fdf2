// The rings' pure code; what orders what, and why, is here and nowhere else.
//
// Orders: an index is stored behind the bytes that it covers and loaded before they are touched (release and acquire),
// both ways: a producer must not overwrite what is still being read. Indices and flags together need more, because a
// flag is looked at behind the store of an index, and an index behind the raising of a flag: all four are sequentially
// consistent, so they have one order that both sides see (see the header). Plain loads and one locked store on x86; no
// fence, which a thread checker would not understand. Indices count up for ever: 2^64 bytes are never reached.
#include "proto/ring.h"

#include <string.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "a lock would be one process's own");

uint64_t ring_mapping_bytes(uint64_t capacity)
{
    return 2 * (RING_CONTROL_BYTES + capacity);
}

uint64_t ring_capacity(uint64_t bytes)
{
    uint64_t capacity = RING_BYTES_MAX;
    while (capacity > bytes && capacity >= RING_BYTES_MIN) {
        capacity /= 2;
    }
    return capacity >= RING_BYTES_MIN ? capacity : 0;
}

static void ring_init(struct ring *ring, uint8_t *base, uint64_t capacity)
{
    *ring = (struct ring){
        .shared = (struct ring_shared *)(void *)base, .data = base + RING_CONTROL_BYTES, .capacity = capacity};
}

void ring_requests(struct ring *ring, void *mapping, uint64_t capacity)
{
    ring_init(ring, mapping, capacity);
}

void ring_replies(struct ring *ring, void *mapping, uint64_t capacity)
{
    ring_init(ring, (uint8_t *)mapping + RING_CONTROL_BYTES + capacity, capacity);
}

// The two pieces of a copy: up to the end of the data, and from its start.
static uint64_t first_piece(const struct ring *ring, uint64_t size)
{
    const uint64_t left = ring->capacity - (ring->at & (ring->capacity - 1));
    return size < left ? size : left;
}

// After the store of our index. A flag is taken down by whoever wakes, so that a sleep is ended by one wake-up.
static bool take_flag(_Atomic uint32_t *flag)
{
    return atomic_load(flag) != 0 && atomic_exchange(flag, 0) != 0;
}

// ---- producer ----

uint64_t ring_room(struct ring *ring)
{
    const uint64_t tail = atomic_load(&ring->shared->tail);
    // The consumer reads on, and nothing that was not written.
    if (ring->corrupt || tail - ring->peer > ring->at - ring->peer) {
        ring->corrupt = true;
        return 0;
    }
    ring->peer = tail;
    return ring->capacity - (ring->at - tail);
}

void ring_write(struct ring *ring, const void *bytes, uint64_t size)
{
    if (size == 0) {
        return;
    }
    const uint64_t first = first_piece(ring, size);
    memcpy(ring->data + (ring->at & (ring->capacity - 1)), bytes, first);
    memcpy(ring->data, (const uint8_t *)bytes + first, size - first);
    ring->at += size;
}

bool ring_publish(struct ring *ring)
{
    atomic_store(&ring->shared->head, ring->at);
    return take_flag(&ring->shared->consumer_waits);
}

bool ring_wait_room(struct ring *ring)
{
    atomic_store(&ring->shared->producer_waits, 1);
    if (ring_room(ring) == 0 && !ring->corrupt) {
        return true;
    }
    atomic_store(&ring->shared->producer_waits, 0);
    return false;
}

// ---- consumer ----

uint64_t ring_filled(struct ring *ring)
{
    const uint64_t head = atomic_load(&ring->shared->head);
    // The producer writes on, and never more than there is room for.
    if (ring->corrupt || head - ring->peer > ring->capacity || head - ring->at > ring->capacity) {
        ring->corrupt = true;
        return 0;
    }
    ring->peer = head;
    return head - ring->at;
}

void ring_read(struct ring *ring, void *bytes, uint64_t size)
{
    if (size == 0) {
        return;
    }
    const uint64_t first = first_piece(ring, size);
    if (bytes) {
        memcpy(bytes, ring->data + (ring->at & (ring->capacity - 1)), first);
        memcpy((uint8_t *)bytes + first, ring->data, size - first);
    }
    ring->at += size;
}

bool ring_consume(struct ring *ring)
{
    atomic_store(&ring->shared->tail, ring->at);
    return take_flag(&ring->shared->producer_waits);
}

bool ring_has_news(const struct ring *ring)
{
    return atomic_load(&ring->shared->head) != ring->peer;
}

bool ring_wait_filled(struct ring *ring)
{
    atomic_store(&ring->shared->consumer_waits, 1);
    if (!ring_has_news(ring) && !ring->corrupt) {
        return true;
    }
    atomic_store(&ring->shared->consumer_waits, 0);
    return false;
}

// ---- messages ----

enum ring_step ring_begin(struct ring *ring, struct ring_inbox *inbox, uint32_t header_bytes_max,
                          uint32_t vectors_bytes_max)
{
    const uint64_t filled = ring_filled(ring);
    if (ring->corrupt) {
        return RING_CORRUPT;
    }
    if (filled < sizeof inbox->record) {
        return RING_EMPTY;
    }
    ring_read(ring, &inbox->record, sizeof inbox->record); // once: what is checked is what is used
    if (inbox->record.header_bytes == 0 || inbox->record.header_bytes > header_bytes_max ||
        inbox->record.vectors_bytes > vectors_bytes_max) {
        ring->corrupt = true;
        return RING_CORRUPT;
    }
    inbox->begun = true;
    inbox->taken = 0;
    return RING_BEGUN;
}

static void take_frame(struct ring *ring, uint8_t *frame, uint64_t done, uint64_t size)
{
    ring_read(ring, frame ? frame + done : NULL, size);
}

enum ring_step ring_take(struct ring *ring, struct ring_inbox *inbox, uint8_t *header, uint8_t *vectors)
{
    uint64_t filled = ring_filled(ring);
    if (ring->corrupt) {
        return RING_CORRUPT;
    }
    const uint64_t header_bytes = inbox->record.header_bytes, whole = header_bytes + inbox->record.vectors_bytes;
    if (inbox->taken < header_bytes) {
        const uint64_t left = header_bytes - inbox->taken, size = left < filled ? left : filled;
        take_frame(ring, header, inbox->taken, size);
        inbox->taken += size;
        filled -= size;
    }
    if (inbox->taken >= header_bytes) {
        const uint64_t left = whole - inbox->taken, size = left < filled ? left : filled;
        take_frame(ring, vectors, inbox->taken - header_bytes, size);
        inbox->taken += size;
    }
    if (inbox->taken < whole) {
        return RING_PART;
    }
    inbox->begun = false;
    return RING_WHOLE;
}

// Of a piece that lies at `offset` in the message: what is not sent yet, as far as there is room.
static void send_piece(struct ring *ring, const void *piece, uint64_t offset, uint64_t bytes, uint64_t *room,
                       uint64_t *sent)
{
    if (*sent < offset || *sent >= offset + bytes) {
        return;
    }
    const uint64_t done = *sent - offset, left = bytes - done, size = left < *room ? left : *room;
    ring_write(ring, (const uint8_t *)piece + done, size);
    *sent += size;
    *room -= size;
}

bool ring_send(struct ring *ring, const struct ring_record *record, const void *header, const void *vectors,
               uint64_t *sent)
{
    uint64_t room = ring_room(ring);
    const uint64_t vectors_at = sizeof *record + record->header_bytes, whole = vectors_at + record->vectors_bytes;
    send_piece(ring, record, 0, sizeof *record, &room, sent);
    send_piece(ring, header, sizeof *record, record->header_bytes, &room, sent);
    send_piece(ring, vectors, vectors_at, record->vectors_bytes, &room, sent);
    return *sent == whole;
}
