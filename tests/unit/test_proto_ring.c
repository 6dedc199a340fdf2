// The rings' pure code: every size and every wrap, messages larger than the ring, what a hostile peer writes, and the
// wake-ups under two threads that really sleep.
#include "proto/ring.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cmocka.h>

#define CAPACITY RING_BYTES_MIN

struct pair {
    uint8_t *mapping;
    struct ring producer, consumer;
};

static int setup(void **state)
{
    struct pair *pair = calloc(1, sizeof *pair);
    pair->mapping = aligned_alloc(4096, ring_mapping_bytes(CAPACITY));
    memset(pair->mapping, 0, ring_mapping_bytes(CAPACITY));
    ring_requests(&pair->producer, pair->mapping, CAPACITY);
    ring_requests(&pair->consumer, pair->mapping, CAPACITY);
    *state = pair;
    return 0;
}

static int teardown(void **state)
{
    struct pair *pair = *state;
    free(pair->mapping);
    free(pair);
    return 0;
}

static uint8_t byte_at(uint64_t at)
{
    return (uint8_t)(at * 167u + (at >> 8));
}

static void capacities(void **state)
{
    (void)state;
    assert_int_equal(ring_capacity(0), 0);
    assert_int_equal(ring_capacity(RING_BYTES_MIN - 1), 0);
    assert_int_equal(ring_capacity(RING_BYTES_MIN), RING_BYTES_MIN);
    assert_int_equal(ring_capacity(3 * RING_BYTES_MIN), 2 * RING_BYTES_MIN);
    assert_int_equal(ring_capacity(UINT64_MAX), RING_BYTES_MAX);
    // The two rings of a mapping do not overlap and end with it.
    uint8_t *mapping = aligned_alloc(4096, ring_mapping_bytes(CAPACITY));
    struct ring requests, replies;
    ring_requests(&requests, mapping, CAPACITY);
    ring_replies(&replies, mapping, CAPACITY);
    assert_ptr_equal(requests.data + CAPACITY, (uint8_t *)replies.shared);
    assert_ptr_equal(replies.data + CAPACITY, mapping + ring_mapping_bytes(CAPACITY));
    free(mapping);
}

static void every_size_at_every_place(void **state)
{
    struct pair *pair = *state;
    uint8_t in[CAPACITY], out[CAPACITY];
    uint64_t at = 0;
    for (uint32_t size = 1; size <= CAPACITY; size = size < 40 ? size + 1 : size + 389) {
        for (uint32_t turn = 0; turn < 5; turn++) {
            for (uint32_t i = 0; i < size; i++)
                in[i] = byte_at(at + i);
            assert_int_equal(ring_room(&pair->producer), CAPACITY);
            ring_write(&pair->producer, in, size);
            assert_int_equal(ring_filled(&pair->consumer), 0); // not before it is published
            assert_false(ring_publish(&pair->producer));
            assert_int_equal(ring_room(&pair->producer), CAPACITY - size);
            assert_int_equal(ring_filled(&pair->consumer), size);
            ring_read(&pair->consumer, out, size);
            assert_memory_equal(in, out, size);
            assert_int_equal(ring_room(&pair->producer), CAPACITY - size); // not before it is consumed
            assert_false(ring_consume(&pair->consumer));
            at += size;
        }
    }
}

static void messages_larger_than_the_ring(void **state)
{
    struct pair *pair = *state;
    const struct ring_record record = {.header_bytes = 77, .vectors_bytes = 5 * CAPACITY + 13};
    uint8_t header[77], *vectors = malloc(record.vectors_bytes), got_header[77], *got = malloc(record.vectors_bytes);
    for (uint32_t i = 0; i < record.vectors_bytes; i++)
        vectors[i] = byte_at(i);
    memset(header, 42, sizeof header);
    uint64_t sent = 0;
    struct ring_inbox inbox = {0};
    enum ring_step step = RING_EMPTY;
    uint32_t parts = 0;
    for (bool whole = false; step != RING_WHOLE; parts++) {
        if (!whole)
            whole = ring_send(&pair->producer, &record, header, vectors, &sent);
        assert_false(ring_publish(&pair->producer));
        if (!inbox.begun)
            assert_int_equal(ring_begin(&pair->consumer, &inbox, 100, 1u << 20), RING_BEGUN);
        step = ring_take(&pair->consumer, &inbox, got_header, got);
        assert_true(step == RING_PART || step == RING_WHOLE);
        assert_false(ring_consume(&pair->consumer));
        assert_true(parts < 100);
    }
    assert_true(parts >= 5);
    assert_int_equal(sent, sizeof record + record.header_bytes + record.vectors_bytes);
    assert_memory_equal(header, got_header, sizeof header);
    assert_memory_equal(vectors, got, record.vectors_bytes);
    assert_int_equal(ring_begin(&pair->consumer, &inbox, 100, 1u << 20), RING_EMPTY);
    free(vectors);
    free(got);
}

static void flags_go_up_and_down(void **state)
{
    struct pair *pair = *state;
    uint8_t bytes[CAPACITY] = {0};
    assert_true(ring_wait_filled(&pair->consumer));
    ring_write(&pair->producer, bytes, 1);
    assert_false(ring_wait_room(&pair->producer)); // there is room
    assert_true(ring_publish(&pair->producer));    // it sleeps: wake it, once
    ring_write(&pair->producer, bytes, 1);
    assert_false(ring_publish(&pair->producer));
    assert_false(ring_wait_filled(&pair->consumer)); // something has come since it last looked
    assert_int_equal(ring_filled(&pair->consumer), 2);
    assert_true(ring_wait_filled(&pair->consumer)); // it has looked, though it has not read

    ring_write(&pair->producer, bytes, CAPACITY - 2);
    assert_true(ring_publish(&pair->producer));
    assert_int_equal(ring_room(&pair->producer), 0);
    assert_true(ring_wait_room(&pair->producer));
    assert_int_equal(ring_filled(&pair->consumer), CAPACITY);
    ring_read(&pair->consumer, bytes, 1);
    assert_true(ring_consume(&pair->consumer));
    ring_read(&pair->consumer, bytes, 1);
    assert_false(ring_consume(&pair->consumer));
}

// ---- a hostile peer ----

static void indices_that_cannot_be(void **state)
{
    struct pair *pair = *state;
    const uint64_t heads[] = {CAPACITY + 1, UINT64_MAX, UINT64_MAX / 2, 1ull << 63};
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++) {
        struct ring consumer = pair->consumer;
        atomic_store(&consumer.shared->head, heads[i]);
        assert_int_equal(ring_filled(&consumer), 0);
        assert_true(consumer.corrupt);
        atomic_store(&consumer.shared->head, 1);
        assert_int_equal(ring_filled(&consumer), 0); // for good
        assert_false(ring_wait_filled(&consumer));
    }
    uint8_t byte = 0;
    struct ring consumer = pair->consumer;
    atomic_store(&consumer.shared->head, 8);
    assert_int_equal(ring_filled(&consumer), 8);
    ring_read(&consumer, &byte, 1);
    atomic_store(&consumer.shared->head, 7); // back
    assert_int_equal(ring_filled(&consumer), 0);
    assert_true(consumer.corrupt);

    atomic_store(&pair->producer.shared->tail, 1); // of what was never written
    assert_int_equal(ring_room(&pair->producer), 0);
    assert_true(pair->producer.corrupt);
    assert_false(ring_wait_room(&pair->producer));
}

static void records_out_of_range(void **state)
{
    struct pair *pair = *state;
    const struct ring_record records[] = {{0, 0}, {0, 5}, {101, 0}, {1, 1001}, {UINT32_MAX, UINT32_MAX}};
    for (size_t i = 0; i < sizeof records / sizeof records[0]; i++) {
        memset(pair->mapping, 0, ring_mapping_bytes(CAPACITY));
        ring_requests(&pair->producer, pair->mapping, CAPACITY);
        ring_requests(&pair->consumer, pair->mapping, CAPACITY);
        struct ring_inbox inbox = {0};
        ring_write(&pair->producer, &records[i], sizeof records[i]);
        assert_false(ring_publish(&pair->producer));
        assert_int_equal(ring_begin(&pair->consumer, &inbox, 100, 1000), RING_CORRUPT);
        assert_int_equal(ring_begin(&pair->consumer, &inbox, 100, 1000), RING_CORRUPT);
    }
}

// ---- two threads ----

#define MESSAGES 20000u

struct end {
    struct ring ring;
    int own_fd, other_fd; // eventfds
    uint64_t sleeps;
    bool lost;
};

static void wake(const struct end *end)
{
    const uint64_t one = 1;
    assert_int_equal(write(end->other_fd, &one, sizeof one), sizeof one);
}

// A wake-up that does not come within ten seconds is lost.
static bool sleep_end(struct end *end)
{
    struct pollfd ready = {.fd = end->own_fd, .events = POLLIN};
    uint64_t count;
    end->sleeps++;
    if (poll(&ready, 1, 10000) != 1) {
        end->lost = true;
        return false;
    }
    return read(end->own_fd, &count, sizeof count) == sizeof count;
}

static uint32_t size_of(uint32_t n)
{
    return n % 97 == 0 ? 3 * CAPACITY : n % 1009; // some through the ring in parts
}

static void *produce(void *argument)
{
    struct end *end = argument;
    static uint8_t vectors[3 * CAPACITY];
    for (uint32_t n = 0; n < MESSAGES; n++) {
        const struct ring_record record = {sizeof n, size_of(n)};
        memset(vectors, (int)n, record.vectors_bytes);
        uint64_t sent = 0;
        for (bool whole = false; !whole;) {
            whole = ring_send(&end->ring, &record, &n, vectors, &sent);
            if (ring_publish(&end->ring))
                wake(end);
            if (!whole && ring_wait_room(&end->ring) && !sleep_end(end))
                return NULL;
        }
        if (n % 8 == 0)
            (void)poll(NULL, 0, 0); // lets the other catch up and sleep
    }
    return NULL;
}

static void no_wake_up_is_lost(void **state)
{
    struct pair *pair = *state;
    static uint8_t vectors[3 * CAPACITY];
    const int fds[] = {eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK)};
    struct end producer = {pair->producer, fds[0], fds[1], 0, false};
    struct end consumer = {pair->consumer, fds[1], fds[0], 0, false};
    struct ring_inbox inbox = {0};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, produce, &producer), 0);
    for (uint32_t n = 0; n < MESSAGES && !consumer.lost;) {
        uint32_t number = UINT32_MAX;
        static uint8_t header[sizeof number];
        enum ring_step step = RING_BEGUN;
        if (!inbox.begun)
            step = ring_begin(&consumer.ring, &inbox, sizeof header, sizeof vectors);
        if (step == RING_BEGUN)
            step = ring_take(&consumer.ring, &inbox, header, vectors);
        assert_int_not_equal(step, RING_CORRUPT);
        if (ring_consume(&consumer.ring))
            wake(&consumer);
        if (step != RING_WHOLE) {
            if (ring_wait_filled(&consumer.ring))
                (void)sleep_end(&consumer);
            continue;
        }
        memcpy(&number, header, sizeof number);
        assert_int_equal(number, n);
        assert_int_equal(inbox.record.vectors_bytes, size_of(n));
        for (uint32_t i = 0; i < size_of(n); i++)
            assert_true(vectors[i] == (uint8_t)n);
        n++;
    }
    pthread_join(thread, NULL);
    assert_false(consumer.lost);
    assert_false(producer.lost);
    print_message("the consumer slept %llu times, the producer %llu times\n", (unsigned long long)consumer.sleeps,
                  (unsigned long long)producer.sleeps);
    close(fds[0]);
    close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(capacities),
        cmocka_unit_test_setup_teardown(every_size_at_every_place, setup, teardown),
        cmocka_unit_test_setup_teardown(messages_larger_than_the_ring, setup, teardown),
        cmocka_unit_test_setup_teardown(flags_go_up_and_down, setup, teardown),
        cmocka_unit_test_setup_teardown(indices_that_cannot_be, setup, teardown),
        cmocka_unit_test_setup_teardown(records_out_of_range, setup, teardown),
        cmocka_unit_test_setup_teardown(no_wake_up_is_lost, setup, teardown),
    };
    return cmocka_run_group_tests_name("proto_ring", tests, NULL, NULL);
}
