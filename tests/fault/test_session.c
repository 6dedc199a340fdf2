// One small session of a worker, in which one call of the daemon fails: the n-th, for every small n and a choice of
// larger ones, until the session goes through unharmed. Each time the worker gets a clean status, everything is given
// back, and the daemon serves the next worker.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon.h"
#include "worker.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CALLS_MAX  5000u
#define CALLS_EACH 40u // the first calls are failed one by one
// Of the later ones one in so many, chosen at random; all of them with ICECACHE_TEST_FULL=1.
#ifdef __SANITIZE_THREAD__ // where a session takes several times as long
#define STRIDE 16u
#else
#define STRIDE 8u
#endif

static uint64_t seed;

static uint64_t next_random(void)
{
    seed += 0x9e3779b97f4a7c15u;
    uint64_t x = seed;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void seed_init(void)
{
    const char *given = getenv("ICECACHE_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = given ? strtoull(given, NULL, 0) : (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec << 20;
    print_message("ICECACHE_TEST_SEED=%lu\n", seed);
}

static uint32_t next_call(uint32_t nth)
{
    const char *full = getenv("ICECACHE_TEST_FULL");
    if (nth < CALLS_EACH || (full && strcmp(full, "1") == 0))
        return nth + 1;
    return nth + 1 + (uint32_t)(next_random() % (2 * STRIDE - 1)); // STRIDE on average, neighbours too
}

struct fault {
    enum fault_kind kind;
    int error;
    int patience_ms;       // of the worker, where an answer may be lost
    ice_status allowed[6]; // what the worker may see; ICE_OK always
};

static bool is_allowed(const struct fault *fault, ice_status status)
{
    for (unsigned i = 0; i < sizeof fault->allowed / sizeof *fault->allowed; i++) {
        if (fault->allowed[i] == status)
            return true; // unused entries are ICE_OK
    }
    return false;
}

static void expect_good_session(const char *sockets)
{
    struct worker worker;
    const char *step;
    worker_init(&worker);
    ice_status status = worker_session(&worker, sockets, &step);
    if (status != ICE_OK)
        fail_msg("a healthy session: %s: %s %s", step, status_name((int)status), worker.text);
    worker_close(&worker);
    worker_expect_nothing_held(sockets);
}

// Returns false where the fault never came up.
static bool one_session(struct daemon *daemon, const struct fault *fault, uint32_t nth, uint32_t *harmed)
{
    struct worker worker;
    const char *step;
    worker_init(&worker);
    worker.patience_ms = fault->patience_ms;
    faulty_arm(&daemon->faulty, fault->kind, nth, fault->error);
    ice_status status = worker_session(&worker, daemon->sockets, &step);
    worker_close(&worker);
    bool fired = faulty_disarm(&daemon->faulty);
    if (!is_allowed(fault, status) || (!fired && status != ICE_OK))
        fail_msg("%s %d, call %u: %s: %s %s", fault_name(fault->kind), fault->error, nth, step,
                 status_name((int)status), worker.text);
    *harmed += status != ICE_OK;
    worker_expect_nothing_held(daemon->sockets);
    return fired;
}

static void every_call(const struct fault *fault)
{
    struct daemon *daemon = daemon_create(NULL);
    faulty_init(&daemon->faulty);
    assert_true(daemon_start(daemon));
    uint32_t nth = 1, tried = 0, harmed = 0;
    for (; one_session(daemon, fault, nth, &harmed); nth = next_call(nth)) {
        tried++;
        assert_true(nth < CALLS_MAX);
    }
    expect_good_session(daemon->sockets);
    print_message("%s %d: %u calls of less than %u, %u of them fatal to the session\n", fault_name(fault->kind),
                  fault->error, tried, nth, harmed);
    assert_true(tried > 0); // the session makes at least one such call
    daemon_stop(daemon);
    daemon_destroy(daemon);
}

static void test_acquire(void **state)
{
    (void)state;
    every_call(&(struct fault){FAULT_ACQUIRE, 0, 10000, {ICE_NO_MEMORY, ICE_INDEX_FULL}});
}

static void test_random(void **state)
{
    (void)state;
    every_call(&(struct fault){FAULT_RANDOM, -EIO, 10000, {ICE_NO_MEMORY}});
}

static void test_shared_memory(void **state)
{
    (void)state;
    every_call(&(struct fault){FAULT_MEMFD, -EMFILE, 10000, {ICE_SYSTEM}});
    every_call(&(struct fault){FAULT_MEMFD, -ENOMEM, 10000, {ICE_SHARED_FULL}});
    every_call(&(struct fault){FAULT_MAP_SHARED, -ENOMEM, 10000, {ICE_SHARED_FULL}});
    every_call(&(struct fault){FAULT_MAP_SHARED, -EFAULT, 10000, {ICE_SYSTEM}});
}

static void test_control_socket(void **state)
{
    (void)state;
    every_call(&(struct fault){FAULT_CONTROL_SEND, ICE_TIMEOUT, 10000, {ICE_DISCONNECTED}});
    every_call(&(struct fault){FAULT_CONTROL_SEND, ICE_DISCONNECTED, 10000, {ICE_DISCONNECTED}});
    every_call(&(struct fault){FAULT_CONTROL_RECEIVE, ICE_SYSTEM, 10000, {ICE_DISCONNECTED}});
    every_call(&(struct fault){FAULT_CONTROL_RECEIVE, ICE_TIMEOUT, 10000, {ICE_OK}}); // a wake-up for nothing
    every_call(&(struct fault){FAULT_ACCEPT, -ECONNABORTED, 10000, {ICE_OK}});
    every_call(&(struct fault){FAULT_ACCEPT, -EMFILE, 10000, {ICE_OK}}); // tried again after a pause
}

static void test_bus(void **state)
{
    (void)state;
    every_call(&(struct fault){FAULT_BUS_SEND, -EAGAIN, 10000, {ICE_DISCONNECTED}});
    // A message that is lost: the worker's own deadline tells it.
    every_call(&(struct fault){FAULT_BUS_SEND, -EHOSTUNREACH, 300, {ICE_TIMEOUT}});
    every_call(&(struct fault){FAULT_BUS_SEND, -ENOMEM, 300, {ICE_TIMEOUT}});
    every_call(&(struct fault){FAULT_BUS_RECEIVE, -ENOMEM, 300, {ICE_TIMEOUT}});
}

int main(void)
{
    daemon_block_signals();
    seed_init();
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(test_acquire),        DAEMON_TEST(test_random), DAEMON_TEST(test_shared_memory),
        DAEMON_TEST(test_control_socket), DAEMON_TEST(test_bus),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
