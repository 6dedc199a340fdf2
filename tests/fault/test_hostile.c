// Workers that vanish at every step, and workers that take no answers: each harms only itself.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon.h"
#include "worker.h"

static struct daemon *serve(const char *const *options)
{
    struct daemon *daemon = daemon_create(options);
    faulty_init(&daemon->faulty);
    assert_true(daemon_start(daemon));
    return daemon;
}

static void expect_good_session(const char *sockets)
{
    struct worker worker;
    worker_init(&worker);
    assert_int_equal(worker_session(&worker, sockets, NULL), ICE_OK);
    worker_close(&worker);
    worker_expect_nothing_held(sockets);
}

static void end(struct daemon *daemon)
{
    expect_good_session(daemon->sockets);
    daemon_stop(daemon);
    daemon_destroy(daemon);
}

// Hangs up right behind a request, while the daemon is at work on it.
static void test_vanish(void **state)
{
    (void)state;
    struct daemon *daemon = serve(NULL);
    for (uint32_t last = 0; last < worker_step_count; last++) {
        struct worker worker;
        worker_init(&worker);
        assert_int_equal(worker_hello(&worker, daemon->sockets), ICE_OK);
        for (uint32_t i = 0; i < last; i++)
            assert_int_equal(worker_steps[i].run(&worker), ICE_OK);
        worker_send_step(&worker, last);
        worker_close(&worker);
        worker_expect_nothing_held(daemon->sockets);
    }
    end(daemon);
}

// Opens landings and reads no reply until the daemon cannot send any more: the session ends in the middle of a reply.
static void test_deaf(void **state)
{
    (void)state;
    struct daemon *daemon = serve(NULL);
    struct worker worker;
    worker_init(&worker);
    assert_int_equal(worker_hello(&worker, daemon->sockets), ICE_OK);
    worker.patience_ms = 100;
    for (uint32_t i = 0; i < 3000; i++) {
        worker.send_only = true;
        assert_int_equal(worker_open_landing(&worker), ICE_OK);
    }
    worker_expect_nothing_held(daemon->sockets);
    worker_close(&worker);
    end(daemon);
}

// Too much for the pool and for the index: refused before anything is stored, and nothing stays promised.
static void test_full(void **state)
{
    (void)state;
    static const char *const no_pool[] = {"--pool-bytes", "2m", "--page-tokens", "256", NULL};
    static const char *const no_index[] = {"--index-bytes", "1m", NULL};
    for (int round = 0; round < 2; round++) {
        struct daemon *daemon = serve(round == 0 ? no_pool : no_index);
        struct worker worker;
        worker_init(&worker);
        assert_int_equal(worker_hello(&worker, daemon->sockets), ICE_OK);
        ice_status status = ICE_OK;
        assert_int_equal(worker_open_staging(&worker), ICE_OK);
        for (uint32_t i = 0; i < 100 && status == ICE_OK; i++) {
            status = worker_open_sequence(&worker);
            if (status == ICE_OK)
                status = worker_append_first(&worker);
        }
        assert_int_equal(status, round == 0 ? ICE_POOL_FULL : ICE_INDEX_FULL);
        worker_close(&worker);
        worker_expect_nothing_held(daemon->sockets);
        daemon_stop(daemon);
        daemon_destroy(daemon);
    }
}

int main(void)
{
    daemon_block_signals();
    const struct CMUnitTest tests[] = {DAEMON_TEST(test_vanish), DAEMON_TEST(test_deaf), DAEMON_TEST(test_full)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
