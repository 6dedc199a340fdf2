// The fast lane from the daemon's side: each of its system calls failing, workers that write anything into the shared
// memory at any moment, and workers that do not read their replies. Each harms only itself, and everything is given
// back.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon.h"
#include "worker.h"

#include "proto/control.h"
#include "proto/ring.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct fast {
    void *mapping; // NULL: there is none
    uint64_t capacity;
    int event_fd, poll_fd;
    bool is_quiet; // wakes nobody
    struct ring requests, replies;
};

static uint64_t seed;

static uint64_t next_random(void)
{
    seed += 0x9e3779b97f4a7c15u;
    uint64_t x = seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static ice_status fast_open(struct fast *fast, struct worker *worker)
{
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__RingOpen open = ICECACHE__WIRE__RING_OPEN__INIT;
    Icecache__Wire__ControlReply *reply = NULL;
    struct control_descriptors descriptors = {.count = 0};
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size;
    *fast = (struct fast){.event_fd = -1, .poll_fd = -1};
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN;
    request.ring_open = &open;
    worker_send_control(worker, &request);
    ice_status status =
        control_receive_all(worker->control, bytes, sizeof bytes, &size, &descriptors, worker->patience_ms);
    if (status == ICE_OK)
        status = wire_control_reply_decode(bytes, size, &reply);
    if (status != ICE_OK)
        return status;
    status = (ice_status)reply->status;
    assert_int_equal(descriptors.count, status == ICE_OK ? 3 : 0);
    if (status == ICE_OK) {
        fast->capacity = reply->ring->bytes;
        fast->event_fd = descriptors.fds[1];
        fast->poll_fd = descriptors.fds[2];
        fast->mapping =
            mmap(NULL, ring_mapping_bytes(fast->capacity), PROT_READ | PROT_WRITE, MAP_SHARED, descriptors.fds[0], 0);
        assert_true(fast->mapping != MAP_FAILED);
        close(descriptors.fds[0]);
        ring_requests(&fast->requests, fast->mapping, fast->capacity);
        ring_replies(&fast->replies, fast->mapping, fast->capacity);
    } else {
        assert_true(reply->text[0] != '\0');
    }
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

static void fast_close(struct fast *fast)
{
    if (!fast->mapping)
        return;
    munmap(fast->mapping, ring_mapping_bytes(fast->capacity));
    close(fast->event_fd);
    close(fast->poll_fd);
    fast->mapping = NULL;
}

static void fast_wake(const struct fast *fast)
{
    const uint64_t one = 1;
    if (fast->is_quiet)
        return;
    assert_int_equal(write(fast->event_fd, &one, sizeof one), sizeof one);
}

static void fast_wait(const struct fast *fast, int ms)
{
    struct epoll_event event;
    (void)epoll_wait(fast->poll_fd, &event, 1, ms);
}

// False: the daemon has made no room in time.
static bool fast_send_bytes(struct fast *fast, const void *header, uint32_t header_bytes)
{
    const struct ring_record record = {header_bytes, 0};
    uint64_t sent = 0;
    for (int waits = 0; waits < 200; waits++) {
        const bool whole = ring_send(&fast->requests, &record, header, NULL, &sent);
        if (ring_publish(&fast->requests))
            fast_wake(fast);
        if (whole)
            return true;
        if (ring_wait_room(&fast->requests))
            fast_wait(fast, 10);
    }
    return false;
}

// A request about a sequence that is not there: the smallest that there is.
static bool fast_ask(struct fast *fast, struct worker *worker, uint64_t session_id)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    uint8_t bytes[256];
    request.protocol_version = WIRE_PROTOCOL_VERSION;
    request.request_id = ++worker->next_request;
    request.session_id = session_id;
    request.session_token.data = worker->token;
    request.session_token.len = sizeof worker->token;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    info.sequence_id = 77;
    return fast_send_bytes(fast, bytes, (uint32_t)icecache__wire__request__pack(&request, bytes));
}

// The next reply's status. ICE_TIMEOUT: none came.
static ice_status fast_answer(struct fast *fast, const struct worker *worker)
{
    static uint8_t bytes[1u << 16];
    struct ring_inbox inbox = {0};
    for (int ms = 0; ms < worker->patience_ms; ms += 10) {
        enum ring_step step = RING_BEGUN;
        if (!inbox.begun)
            step = ring_begin(&fast->replies, &inbox, sizeof bytes, 0);
        if (step == RING_BEGUN)
            step = ring_take(&fast->replies, &inbox, bytes, NULL);
        assert_int_not_equal(step, RING_CORRUPT);
        if (ring_consume(&fast->replies))
            fast_wake(fast);
        if (step == RING_WHOLE) {
            Icecache__Wire__Reply *reply = NULL;
            assert_int_equal(wire_reply_decode(bytes, inbox.record.header_bytes, &reply), ICE_OK);
            const ice_status status = (ice_status)reply->status;
            icecache__wire__reply__free_unpacked(reply, NULL);
            return status;
        }
        if (ring_wait_filled(&fast->replies))
            fast_wait(fast, 10);
    }
    return ICE_TIMEOUT;
}

static void expect_end_of_session(struct worker *worker)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size;
    int fd;
    assert_int_equal(control_receive(worker->control, bytes, sizeof bytes, &size, &fd, 10000), ICE_DISCONNECTED);
}

static struct daemon *serve(const char *const *options)
{
    struct daemon *daemon = daemon_create(options);
    faulty_init(&daemon->faulty);
    assert_true(daemon_start(daemon));
    return daemon;
}

static void begin(struct worker *worker, struct fast *fast, const struct daemon *daemon)
{
    worker_init(worker);
    assert_int_equal(worker_hello(worker, daemon->sockets), ICE_OK);
    assert_int_equal(fast_open(fast, worker), ICE_OK);
}

static void end(struct worker *worker, struct fast *fast, const struct daemon *daemon)
{
    worker_close(worker);
    fast_close(fast);
    worker_expect_nothing_held(daemon->sockets);
}

static void finish(struct daemon *daemon)
{
    struct worker worker;
    worker_init(&worker);
    assert_int_equal(worker_session(&worker, daemon->sockets, NULL), ICE_OK);
    worker_close(&worker);
    worker_expect_nothing_held(daemon->sockets);
    daemon_stop(daemon);
    daemon_destroy(daemon);
}

// ---- tests ----

static void test_faults(void **state)
{
    (void)state;
    static const struct {
        enum fault_kind kind;
        int error;
    } faults[] = {{FAULT_MEMFD, -ENOSPC}, {FAULT_MAP_SHARED, -ENOMEM}, {FAULT_EVENT, -EMFILE},
                  {FAULT_BELL, -EMFILE},  {FAULT_ACQUIRE, 0},          {FAULT_CONTROL_SEND, ICE_TIMEOUT}};
    struct daemon *daemon = serve(NULL);
    for (uint32_t i = 0; i < sizeof faults / sizeof faults[0]; i++) {
        uint32_t fired = 0;
        for (uint32_t nth = 1; nth <= 6; nth++) {
            struct worker worker;
            struct fast fast;
            worker_init(&worker);
            worker.patience_ms = 2000;
            assert_int_equal(worker_hello(&worker, daemon->sockets), ICE_OK);
            faulty_arm(&daemon->faulty, faults[i].kind, nth, faults[i].error);
            const ice_status status = fast_open(&fast, &worker);
            if (status == ICE_OK) {
                assert_true(fast_ask(&fast, &worker, worker.session_id));
                const ice_status answer = fast_answer(&fast, &worker);
                assert_true(answer == ICE_UNKNOWN_SEQUENCE || faults[i].kind == FAULT_ACQUIRE);
            } else { // refused, or hung up on where the answer could not be sent
                assert_true(status == ICE_SHARED_FULL || status == ICE_SYSTEM || status == ICE_NO_MEMORY ||
                            status == ICE_DISCONNECTED);
            }
            fired += faulty_disarm(&daemon->faulty);
            end(&worker, &fast, daemon);
        }
        assert_true(fired > 0);
    }
    finish(daemon);
}

static void test_session(void **state)
{
    (void)state;
    struct daemon *daemon = serve(NULL);
    struct worker worker, other;
    struct fast fast, again;
    begin(&worker, &fast, daemon);
    worker_init(&other);
    assert_int_equal(worker_hello(&other, daemon->sockets), ICE_OK);
    assert_int_equal(fast_open(&again, &worker), ICE_LIMIT);
    for (uint32_t i = 0; i < 100; i++) {
        assert_true(fast_ask(&fast, &worker, worker.session_id));
        assert_int_equal(fast_answer(&fast, &worker), ICE_UNKNOWN_SEQUENCE);
    }
    // Another session's id and token are that session's, whatever way they come.
    uint8_t token[sizeof worker.token];
    memcpy(token, worker.token, sizeof token);
    memcpy(worker.token, other.token, sizeof token);
    assert_true(fast_ask(&fast, &worker, other.session_id));
    assert_int_equal(fast_answer(&fast, &worker), ICE_UNKNOWN_SESSION);
    memcpy(worker.token, token, sizeof token);
    assert_true(fast_send_bytes(&fast, "no message at all", 17));
    assert_int_equal(fast_answer(&fast, &worker), ICE_BAD_MESSAGE);
    assert_true(fast_ask(&fast, &worker, worker.session_id));
    assert_int_equal(fast_answer(&fast, &worker), ICE_UNKNOWN_SEQUENCE);
    // The other way goes on as well.
    assert_int_equal(worker_open_sequence(&worker), ICE_OK);
    worker_close(&other);
    end(&worker, &fast, daemon);
    finish(daemon);
}

static void test_off(void **state)
{
    (void)state;
    static const char *const options[] = {"--ring-bytes", "0", NULL};
    static const char *const small[] = {"--shared-bytes", "1m", "--ring-bytes", "1m", NULL};
    for (int round = 0; round < 2; round++) {
        struct daemon *daemon = serve(round == 0 ? options : small);
        struct worker worker;
        struct fast fast;
        worker_init(&worker);
        assert_int_equal(worker_hello(&worker, daemon->sockets), ICE_OK);
        assert_int_equal(fast_open(&fast, &worker), round == 0 ? ICE_NOT_SUPPORTED : ICE_SHARED_FULL);
        assert_int_equal(worker_open_sequence(&worker), ICE_OK);
        worker_close(&worker);
        worker_expect_nothing_held(daemon->sockets);
        daemon_stop(daemon);
        daemon_destroy(daemon);
    }
}

static void spoil(struct fast *fast, uint32_t how)
{
    struct ring_record record = {0, 0};
    struct ring_shared *requests = fast->requests.shared, *replies = fast->replies.shared;
    switch (how) {
    case 0:
        atomic_store(&requests->head, fast->capacity + 1);
        break;
    case 1:
        atomic_store(&requests->head, UINT64_MAX);
        break;
    case 2: // no frame 1
        memcpy(fast->requests.data, &record, sizeof record);
        atomic_store(&requests->head, sizeof record);
        break;
    case 3:
        record = (struct ring_record){UINT32_MAX, UINT32_MAX};
        memcpy(fast->requests.data, &record, sizeof record);
        atomic_store(&requests->head, sizeof record);
        break;
    default: // noticed at the next reply
        atomic_store(&replies->tail, 1ull << 40);
        break;
    }
}

static void test_spoilt(void **state)
{
    (void)state;
    struct daemon *daemon = serve(NULL);
    for (uint32_t how = 0; how < 5; how++) {
        struct worker worker;
        struct fast fast;
        begin(&worker, &fast, daemon);
        spoil(&fast, how);
        if (how == 4)
            assert_true(fast_ask(&fast, &worker, worker.session_id));
        fast_wake(&fast);
        expect_end_of_session(&worker);
        end(&worker, &fast, daemon);
    }
    finish(daemon);
}

// Anything, anywhere, while the daemon looks, again and again.
static void test_anything(void **state)
{
    (void)state;
    const char *given = getenv("ICECACHE_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = given ? strtoull(given, NULL, 0) : (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 20;
    print_message("ICECACHE_TEST_SEED=%lu\n", seed);
    struct daemon *daemon = serve(NULL);
    for (uint32_t round = 0; round < 60; round++) {
        struct worker worker;
        struct fast fast;
        begin(&worker, &fast, daemon);
        uint64_t *words = fast.mapping;
        const uint64_t count = ring_mapping_bytes(fast.capacity) / sizeof *words;
        for (uint32_t i = 0; i < 400; i++) {
            const uint64_t value = next_random();
            // Mostly the first words of the data, where records are, and small steps of the indices.
            if (value % 4 == 0) {
                ((volatile uint64_t *)words)[RING_CONTROL_BYTES / 8 + next_random() % 8] = next_random() % 5000;
            } else if (value % 4 == 1) {
                atomic_store(&fast.requests.shared->head, atomic_load(&fast.requests.shared->head) + value % 700);
            } else if (value % 4 == 2) {
                atomic_store(&fast.replies.shared->tail, atomic_load(&fast.replies.shared->head));
            } else if (round % 4 == 0) {
                ((volatile uint64_t *)words)[next_random() % count] = next_random();
            }
            fast_wake(&fast);
        }
        end(&worker, &fast, daemon);
    }
    finish(daemon);
}

// Asks and asks and reads no answer: bounded, and its own end.
static void test_deaf(void **state)
{
    (void)state;
    struct daemon *daemon = serve(NULL);
    struct worker worker;
    struct fast fast;
    begin(&worker, &fast, daemon);
    uint32_t asked = 0;
    while (asked < 200000 && fast_ask(&fast, &worker, worker.session_id))
        asked++;
    assert_true(asked < 200000);
    expect_end_of_session(&worker);
    end(&worker, &fast, daemon);
    finish(daemon);
}

// Hundreds of requests of one session are in its ring when another's single one comes: it is answered behind a few of
// them. Whether that can be seen from here depends on when this thread runs, so once of many times is enough; without
// turns it would be never.
static void test_flood(void **state)
{
    (void)state;
    enum { FLOOD = 500, ROUNDS = 50 };
    struct daemon *daemon = serve(NULL);
    struct worker flooder, worker;
    struct fast flood, fast;
    begin(&flooder, &flood, daemon);
    begin(&worker, &fast, daemon);
    uint32_t seen = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        flood.is_quiet = true;
        for (uint32_t i = 0; i < FLOOD; i++)
            assert_true(fast_ask(&flood, &flooder, flooder.session_id));
        flood.is_quiet = false;
        fast_wake(&flood);
        assert_true(fast_ask(&fast, &worker, worker.session_id));
        assert_int_equal(fast_answer(&fast, &worker), ICE_UNKNOWN_SEQUENCE);
        seen += atomic_load(&flood.requests.shared->tail) != atomic_load(&flood.requests.shared->head);
        for (uint32_t i = 0; i < FLOOD; i++)
            assert_int_equal(fast_answer(&flood, &flooder), ICE_UNKNOWN_SEQUENCE);
    }
    print_message("answered in the middle of the flood in %u of %u rounds\n", seen, (uint32_t)ROUNDS);
    assert_true(seen > 0);
    worker_close(&flooder);
    fast_close(&flood);
    end(&worker, &fast, daemon);
    finish(daemon);
}

int main(void)
{
    daemon_block_signals();
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(test_faults),   DAEMON_TEST(test_session), DAEMON_TEST(test_off),   DAEMON_TEST(test_spoilt),
        DAEMON_TEST(test_anything), DAEMON_TEST(test_deaf),    DAEMON_TEST(test_flood),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
