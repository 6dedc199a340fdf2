// A consumer of a ring into whose shared memory anybody writes anything between any two looks: no access outside the
// mapping or the message, no message beyond the limits, and once spoilt for good. The producer likewise. The input is a
// script of what is written, byte by byte, by the hostile peer.
#include "fuzz.h"

#include "proto/ring.h"

#include <string.h>

enum { CAPACITY = RING_BYTES_MIN, HEADER_MAX = 512, VECTORS_MAX = 3 * CAPACITY };

struct script {
    const uint8_t *bytes;
    size_t left;
};

static uint64_t next(struct script *script, size_t bytes)
{
    uint64_t value = 0;
    const size_t taken = bytes < script->left ? bytes : script->left;
    memcpy(&value, script->bytes, taken);
    script->bytes += taken;
    script->left -= taken;
    return value;
}

// What the peer does to an index: a little on, or anything.
static void disturb(struct script *script, _Atomic uint64_t *index)
{
    const uint64_t how = next(script, 1);
    if (how == 255) {
        atomic_store(index, next(script, 8));
    } else {
        atomic_store(index, atomic_load(index) + how * how % (CAPACITY + 1));
    }
}

static void consume(struct script *script, struct ring *ring, struct ring_inbox *inbox, uint8_t *header,
                    uint8_t *vectors)
{
    enum ring_step step = RING_BEGUN;
    if (!inbox->begun) {
        step = ring_begin(ring, inbox, HEADER_MAX, VECTORS_MAX);
        FUZZ_CHECK(step == RING_BEGUN || step == RING_EMPTY || step == RING_CORRUPT);
    }
    if (step == RING_BEGUN) {
        FUZZ_CHECK(inbox->record.header_bytes >= 1 && inbox->record.header_bytes <= HEADER_MAX);
        FUZZ_CHECK(inbox->record.vectors_bytes <= VECTORS_MAX);
        step = ring_take(ring, inbox, next(script, 1) % 8 == 0 ? NULL : header, vectors);
        FUZZ_CHECK(step == RING_PART || step == RING_WHOLE || step == RING_CORRUPT);
    }
    FUZZ_CHECK((step == RING_CORRUPT) == ring->corrupt);
    FUZZ_CHECK(ring->at <= ring->peer || ring->corrupt);
    (void)!ring_consume(ring);
    if (step != RING_WHOLE) {
        (void)!ring_wait_filled(ring);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    // Of their exact sizes, so that a sanitizer sees what goes beyond.
    uint8_t *mapping = aligned_alloc(4096, ring_mapping_bytes(CAPACITY));
    uint8_t *header = malloc(HEADER_MAX), *vectors = malloc(VECTORS_MAX);
    struct script script = {bytes, size};
    FUZZ_CHECK(mapping && header && vectors);
    memset(mapping, 0, ring_mapping_bytes(CAPACITY));
    memset(vectors, 7, VECTORS_MAX);
    struct ring requests, replies;
    struct ring_inbox inbox = {0};
    ring_requests(&requests, mapping, CAPACITY);
    ring_replies(&replies, mapping, CAPACITY);
    while (script.left > 0) {
        const uint64_t action = next(&script, 1);
        if (action < 64) { // bytes where the next record may be
            const uint64_t value = next(&script, 8);
            memcpy(requests.data + (requests.at & (CAPACITY - 8)), &value, sizeof value);
        } else if (action < 128) {
            disturb(&script, &requests.shared->head);
        } else if (action < 160) {
            disturb(&script, &replies.shared->tail);
        } else if (action < 192) {
            const struct ring_record record = {.header_bytes = 1 + (uint32_t)next(&script, 2) % VECTORS_MAX};
            uint64_t sent = 0;
            const uint64_t room = ring_room(&replies);
            FUZZ_CHECK(room <= CAPACITY);
            (void)!ring_send(&replies, &record, vectors, NULL, &sent);
            FUZZ_CHECK(sent <= CAPACITY);
            (void)!ring_publish(&replies);
            (void)!ring_wait_room(&replies);
        } else {
            consume(&script, &requests, &inbox, header, vectors);
        }
    }
    free(mapping);
    free(header);
    free(vectors);
    return 0;
}
