// A start in which one call fails, or that is stopped: the daemon gives up or serves, and leaves nothing behind.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon.h"
#include "worker.h"

#include "cached/log.h"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#define CALLS_MAX 200u

static void silence(void)
{
    // What is wrong is logged, as it should be; here it is wrong on purpose.
    log_set_level(LOG_LEVEL_ERROR);
}

static uint32_t nodes; // see struct faulty

static void every_call(enum fault_kind kind, int error, bool fatal)
{
    struct daemon *daemon = daemon_create(NULL);
    uint32_t nth = 1;
    for (bool fired = true; fired; nth++) {
        faulty_init(&daemon->faulty);
        daemon->faulty.nodes = nodes;
        faulty_arm(&daemon->faulty, kind, nth, error);
        bool serves = daemon_start(daemon);
        fired = faulty_disarm(&daemon->faulty);
        if (serves != !(fired && fatal))
            fail_msg("%s %d, call %u: %s", fault_name(kind), error, nth, serves ? "serves all the same" : "gave up");
        if (serves) {
            worker_expect_nothing_held(daemon->sockets);
            daemon_stop(daemon);
        }
        assert_true(nth < CALLS_MAX);
    }
    assert_true(nth > 2); // a start makes at least one such call
    daemon_destroy(daemon);
}

static void test_start(void **state)
{
    (void)state;
    every_call(FAULT_ACQUIRE, 0, true);
    every_call(FAULT_RANDOM, -EIO, true);
    every_call(FAULT_MAP_REGION, -ENOMEM, true);
    every_call(FAULT_DIRECTORY, -EACCES, true);
    every_call(FAULT_LOCK, -EWOULDBLOCK, true);
    every_call(FAULT_LOCK, -EROFS, true);
    every_call(FAULT_UNLINK, -EACCES, true);
    every_call(FAULT_LISTEN, -EADDRINUSE, true);
    every_call(FAULT_BUS_OPEN, -EMFILE, true);
    every_call(FAULT_READ_SYSTEM, -EACCES, false); // then nothing is known of the machine, and nothing is refused
}

// A pool in two parts, of which the second cannot be had, or the first.
static void test_nodes(void **state)
{
    (void)state;
    nodes = 2;
    every_call(FAULT_MAP_REGION, -ENOMEM, true);
    nodes = 0;
}

// A stop while the pool is populated is heeded then, not when the pool is there.
static int (*map_region)(struct env *env, const struct env_region_request *request, struct env_region *out);

static _Atomic bool signalled;

static int map_region_under_a_signal(struct env *env, const struct env_region_request *request, struct env_region *out)
{
    if (!atomic_exchange(&signalled, true)) // of several regions the first that comes here
        kill(getpid(), SIGTERM);            // blocked in every thread
    return map_region(env, request, out);
}

static void test_stop(void **state)
{
    (void)state;
    struct daemon *daemon = daemon_create(NULL);
    for (int round = 0; round < 2; round++) {
        faulty_init(&daemon->faulty);
        atomic_store(&signalled, false);
        map_region = daemon->faulty.env.map_region;
        daemon->faulty.env.map_region = map_region_under_a_signal;
        daemon->faulty.nodes = 1 + (uint32_t)round;
        assert_false(daemon_start(daemon));
        assert_int_equal(atomic_load(&daemon->state), DAEMON_STOPPED);
    }
    faulty_init(&daemon->faulty);
    assert_true(daemon_start(daemon)); // that signal is gone
    worker_expect_nothing_held(daemon->sockets);
    daemon_stop(daemon);
    daemon_destroy(daemon);
}

int main(void)
{
    daemon_block_signals();
    silence();
    const struct CMUnitTest tests[] = {DAEMON_TEST(test_start), DAEMON_TEST(test_nodes), DAEMON_TEST(test_stop)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
