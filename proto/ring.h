// The fast lane: two byte rings in one shared mapping, requests one way and replies the other. Each has one producer
// and one consumer, in different processes that do not trust each other.
//
// Mapping: the request ring, then the reply ring, each RING_CONTROL_BYTES of indices and flags and its data behind.
// What flows through a ring is a stream of messages: struct ring_record, frame 1, frame 2; a message may be larger than
// the ring, and then goes through it in parts.
//
// Trust. Capacity and each side's own index are kept in private memory and are never read back. The peer's index is
// read once for each look and checked: one that says what cannot be is RING_CORRUPT, for good. Bytes are copied out
// before anybody interprets them. So a peer can spoil its own messages and end its session, no more.
//
// Wake-ups. Whoever is about to sleep raises its flag, then looks once more at the other's index; whoever publishes
// stores its index, then looks at the other's flag. All four are sequentially consistent, so they have one order: if
// the sleeper's look does not find the news, it comes before the store of the index, the flag's raising before that,
// and so the publisher's look finds the flag. It takes the flag down by an exchange and wakes. Nobody sleeps on news.
//
// No allocation, no system call, no clock. A struct ring belongs to one thread at a time.
#ifndef ICECACHE_PROTO_RING_H
#define ICECACHE_PROTO_RING_H

#include "proto/limits.h"
#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RING_CONTROL_BYTES 4096u
#define RING_BYTES_MIN     4096u // of one ring's data; a power of two, as all sizes of rings
#define RING_BYTES_MAX     (16u << 20)

// At the start of each ring.
struct ring_shared {
    _Alignas(128) _Atomic uint64_t head; // bytes ever written; by the producer
    _Atomic uint32_t producer_waits;     // for room; raised by the producer, taken down by the consumer
    _Alignas(128) _Atomic uint64_t tail; // bytes ever read; by the consumer
    _Atomic uint32_t consumer_waits;     // for bytes; raised by the consumer, taken down by the producer
};
_Static_assert(sizeof(struct ring_shared) <= RING_CONTROL_BYTES, "the data lies behind");

// In front of each message.
struct ring_record {
    uint32_t header_bytes, vectors_bytes; // frame 1, at least 1 byte; frame 2, where there is one
};

// One side's view of one ring.
struct ring {
    struct ring_shared *shared;
    uint8_t *data;
    uint64_t capacity;
    uint64_t at;   // our index: of bytes written, or read
    uint64_t peer; // the other's, as it was last read
    bool corrupt;
};

// The size of both rings' mapping; the largest ring of at most so many bytes, 0 where there is none.
uint64_t ring_mapping_bytes(uint64_t capacity);
uint64_t ring_capacity(uint64_t bytes);

// Views of the rings in a mapping, fresh on both sides. The memory must be zeroed by whoever made it.
void ring_requests(struct ring *ring, void *mapping, uint64_t capacity);
void ring_replies(struct ring *ring, void *mapping, uint64_t capacity);

// ---- producer ----

// Bytes that can be written now; 0 also where the ring is corrupt.
uint64_t ring_room(struct ring *ring);
// Copies in, at most ring_room bytes in all; seen by nobody before ring_publish.
void ring_write(struct ring *ring, const void *bytes, uint64_t size);
// True: the consumer sleeps, wake it.
ICE_MUST_CHECK bool ring_publish(struct ring *ring);
// Before the producer sleeps for room. False: there is some now (or the ring is corrupt); the flag is down again.
ICE_MUST_CHECK bool ring_wait_room(struct ring *ring);

// ---- consumer ----

// Bytes that can be read now; 0 also where the ring is corrupt.
uint64_t ring_filled(struct ring *ring);
// Copies out, at most ring_filled bytes in all; they are the producer's again after ring_consume.
void ring_read(struct ring *ring, void *bytes, uint64_t size);
// True: the producer sleeps for room, wake it.
ICE_MUST_CHECK bool ring_consume(struct ring *ring);
// Before the consumer sleeps. False: something has come since the last look (or the ring is corrupt); the flag is down.
ICE_MUST_CHECK bool ring_wait_filled(struct ring *ring);
// Has anything come since the last look? For one who spins; writes nothing.
bool ring_has_news(const struct ring *ring);

// ---- messages, as the consumer puts them together ----

struct ring_inbox {
    struct ring_record record;
    bool begun;     // the record has been read and is within the limits
    uint64_t taken; // of the message's bytes behind it
};

enum ring_step { RING_EMPTY, RING_BEGUN, RING_PART, RING_WHOLE, RING_CORRUPT };

// Between messages: RING_EMPTY, RING_BEGUN (inbox->record says how much memory the message needs), or RING_CORRUPT: the
// record has no frame 1 or exceeds these limits.
enum ring_step ring_begin(struct ring *ring, struct ring_inbox *inbox, uint32_t header_bytes_max,
                          uint32_t vectors_bytes_max);
// Copies what there is of the message's frames to where they are wanted: RING_PART, RING_WHOLE, or RING_CORRUPT. NULL:
// drops the bytes. A frame's bytes are its own only when the message is whole.
enum ring_step ring_take(struct ring *ring, struct ring_inbox *inbox, uint8_t *header, uint8_t *vectors);

// ---- messages, as the producer sends them ----

// Writes as much as there is room for of a message's bytes from *sent on (record, frame 1, frame 2), and counts it
// there. The caller publishes. True: all of it is written.
ICE_MUST_CHECK bool ring_send(struct ring *ring, const struct ring_record *record, const void *header,
                              const void *vectors, uint64_t *sent);

#endif
