// kill -9 of the daemon: every pending call ends with an error within its deadline, a new daemon starts at once on the
// same sockets, and the client goes on in the same process after ice_client_reconnect.
#include "worker.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 1200, SLOTS = 400 };
#define DEADLINE_US 4000000u

// ---- callers: one kind of call each, in threads of their own ----

enum call { CALL_RETRIEVE, CALL_WAIT, CALL_APPEND, CALL_READ, CALL_OPEN, CALL_LANDING, CALL_INFO, CALLS };

struct caller {
    enum call call;
    struct worker *worker;
    const struct history *history;
    bool repeat; // until an error comes
    ice_ticket *ticket;
    pthread_t thread;
    // What came of it; read after the thread has ended.
    ice_status status;
    uint64_t ended_us, calls;
};

static ice_status call_read(const struct caller *caller)
{
    const struct history *history = caller->history;
    uint8_t *memory = malloc(2 * history->side_bytes);
    const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, 0);
    const struct ice_kv_target target = {
        .keys = memory,
        .values = memory + history->side_bytes,
        .keys_bytes = source.keys_bytes,
        .values_bytes = source.values_bytes,
        .layer_stride = source.layer_stride,
        .token_stride = source.token_stride,
        .head_stride = source.head_stride,
    };
    ice_status status = ice_read(caller->worker->sequence, ICE_ALL_LAYERS, 0, LENGTH / 2, &target, DEADLINE_US);
    free(memory);
    return status;
}

static ice_status call_retrieve(const struct caller *caller)
{
    struct retrieve retrieve;
    retrieve_init(&retrieve, caller->worker, caller->history, 0, LENGTH / 2 - 1, 1);
    retrieve.options.deadline_us = DEADLINE_US;
    ice_status status = ice_retrieve(caller->worker->client, &retrieve.options, NULL);
    retrieve_fini(&retrieve);
    return status;
}

static ice_status call_append(const struct caller *caller)
{
    // Equal tokens again: may be repeated for ever.
    const struct ice_kv_source source = history_source(caller->history, ICE_ALL_LAYERS, 0);
    return ice_append(caller->worker->sequence, ICE_ALL_LAYERS, 0, LENGTH / 2, &source, DEADLINE_US, NULL);
}

static ice_status call_open(const struct caller *caller)
{
    const struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *sequence = NULL;
    ice_status status = ice_sequence_open(caller->worker->client, &options, DEADLINE_US, &sequence);
    ice_sequence_close(sequence);
    return status;
}

static ice_status call_landing(const struct caller *caller)
{
    const struct ice_landing_shape options = landing_shape(&shape, 1, 64);
    ice_landing *landing = NULL;
    ice_status status = ice_landing_open(caller->worker->client, &options, DEADLINE_US, &landing);
    ice_landing_close(landing);
    return status;
}

static ice_status call_once(const struct caller *caller)
{
    struct ice_sequence_info info;
    switch (caller->call) {
    case CALL_RETRIEVE:
        return call_retrieve(caller);
    case CALL_WAIT:
        return ice_retrieve_wait(caller->ticket, DEADLINE_US, NULL);
    case CALL_APPEND:
        return call_append(caller);
    case CALL_READ:
        return call_read(caller);
    case CALL_OPEN:
        return call_open(caller);
    case CALL_LANDING:
        return call_landing(caller);
    default:
        return ice_sequence_info(caller->worker->sequence, DEADLINE_US, &info);
    }
}

static void *caller_main(void *argument)
{
    struct caller *caller = argument;
    do {
        caller->status = call_once(caller);
        caller->calls++;
    } while (caller->repeat && caller->status == ICE_OK);
    caller->ended_us = now_us();
    return NULL;
}

static void callers_start(struct caller *callers, struct worker *worker, const struct history *history, bool repeat)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        ice_ticket *ticket = callers[i].ticket;
        callers[i] = (struct caller){
            .call = (enum call)i,
            .worker = worker,
            .history = history,
            .repeat = repeat && i != CALL_WAIT,
            .ticket = ticket,
        };
        if (i != CALL_WAIT || ticket)
            assert_int_equal(pthread_create(&callers[i].thread, NULL, caller_main, &callers[i]), 0);
    }
}

// All have ended, with an error, within a second of `since` (the control socket's closing tells at once).
static void callers_join(struct caller *callers, uint64_t since_us)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        if (i == CALL_WAIT && !callers[i].ticket)
            continue;
        assert_int_equal(pthread_join(callers[i].thread, NULL), 0);
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        if (i == CALL_WAIT && !callers[i].ticket)
            continue;
        if (callers[i].status != ICE_DISCONNECTED)
            fail_msg("call %u ended with %s", i, ice_status_name(callers[i].status));
        assert_true(callers[i].ended_us < since_us + 1000000u);
    }
}

// ---- after a new start ----

// Handles of the old session are refused by name and can be closed; new ones work.
static void go_on(struct worker *worker, const struct history *history)
{
    struct ice_sequence_info info;
    struct ice_landing_view view;
    struct retrieve retrieve;
    const struct ice_kv_source source = history_source(history, 0, 0);
    assert_ok(ice_client_reconnect(worker->client));
    assert_refused(ice_sequence_info(worker->sequence, 0, &info), ICE_UNKNOWN_SESSION, "reconnect");
    assert_refused(ice_append(worker->sequence, 0, 0, 10, &source, 0, NULL), ICE_UNKNOWN_SESSION, "reconnect");
    assert_refused(ice_landing_view(worker->landing, 0, 0, 0, &view), ICE_UNKNOWN_SESSION, "reconnect");
    retrieve_init(&retrieve, worker, history, 0, 99, 1);
    assert_refused(ice_retrieve(worker->client, &retrieve.options, NULL), ICE_UNKNOWN_SESSION, "reconnect");
    retrieve_fini(&retrieve);
    ice_sequence_close(worker->sequence);
    ice_landing_close(worker->landing);

    worker->sequence = sequence_open(worker->client, &shape);
    worker->landing = landing_open(worker->client, &shape, 1, SLOTS);
    worker_append(worker, history, 0, 300);
    retrieve_init(&retrieve, worker, history, 1, 299, 1);
    assert_ok(ice_retrieve(worker->client, &retrieve.options, NULL));
    landing_check_all(worker->landing, 0, 1, history, 300);
    retrieve_fini(&retrieve);
}

static void begin(struct worker *worker, struct history *history, const struct daemon *daemon)
{
    history_create(history, &shape, LENGTH, 59);
    worker_open(worker, daemon->sockets, &shape, 2, SLOTS);
    worker_append(worker, history, 0, LENGTH / 2);
}

// ---- the tests ----

// The daemon is stopped first, so that every call is pending when it dies.
static void pending_calls_end(void **state)
{
    struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct caller callers[CALLS] = {{0}};
    begin(&worker, &history, daemon);
    uint64_t boot_token = ice_client_boot_token(worker.client);
    daemon_signal(daemon, SIGSTOP);
    retrieve_init(&retrieve, &worker, &history, 0, 99, 1);
    retrieve.row = 1;
    assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &callers[CALL_WAIT].ticket));
    ice_ticket *ticket = callers[CALL_WAIT].ticket;
    callers_start(callers, &worker, &history, false);
    sleep_us(200000);
    uint64_t killed_us = now_us();
    daemon_kill(daemon);
    callers_join(callers, killed_us);
    assert_int_equal(ice_client_boot_token(worker.client), 0);
    assert_refused(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_DISCONNECTED, "connect again");
    assert_status(ice_client_reconnect(worker.client), ICE_NO_DAEMON);
    retrieve_fini(&retrieve);

    daemon_start(daemon);
    go_on(&worker, &history);
    assert_true(ice_client_boot_token(worker.client) != 0);
    assert_int_not_equal(ice_client_boot_token(worker.client), boot_token);
    assert_status(ice_retrieve_wait(ticket, 0, NULL), ICE_DISCONNECTED);
    ice_ticket_close(ticket);
    worker_close(&worker);
    history_destroy(&history);
}

// Many times, at random moments of a busy daemon.
static void killed_at_any_moment(void **state)
{
    struct daemon *daemon = *state;
    uint64_t seed = random_seed("killed_at_any_moment");
    const uint32_t rounds = scaled_count(6, 30);
    struct history history;
    struct worker worker;
    begin(&worker, &history, daemon);
    for (uint32_t round = 0; round < rounds; round++) {
        struct caller callers[CALLS] = {{0}};
        callers_start(callers, &worker, &history, true);
        sleep_us(random_below(&seed, 100000));
        uint64_t killed_us = now_us();
        daemon_kill(daemon);
        callers_join(callers, killed_us);
        daemon_start(daemon); // over the stale sockets, at once
        go_on(&worker, &history);
        worker_append(&worker, &history, 300, LENGTH / 2 - 300);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// A daemon that only stands still: calls end at their deadlines, the session outlives it.
static void a_daemon_that_stands_still(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct ice_sequence_info info;
    begin(&worker, &history, daemon);
    daemon_signal(daemon, SIGSTOP);
    const struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    const struct ice_sequence_options options = sequence_options(&shape);
    const struct ice_landing_shape landing_options = landing_shape(&shape, 1, 64);
    ice_sequence *sequence = NULL;
    ice_landing *landing = NULL;
    for (uint32_t i = 0; i < 4; i++) {
        uint64_t from = now_us();
        ice_status status = i == 0   ? ice_sequence_info(worker.sequence, 200000, &info)
                            : i == 1 ? ice_append(worker.sequence, ICE_ALL_LAYERS, 0, 100, &source, 200000, NULL)
                            : i == 2 ? ice_sequence_open(worker.client, &options, 200000, &sequence)
                                     : ice_landing_open(worker.client, &landing_options, 200000, &landing);
        assert_status(status, ICE_TIMEOUT);
        assert_true(now_us() - from >= 200000 && now_us() - from < 1000000);
    }
    daemon_signal(daemon, SIGCONT);
    assert_ok(ice_sequence_info(worker.sequence, 0, &info));
    assert_int_equal(info.length, LENGTH / 2);
    // What was opened for a caller that had given up is given back: only the worker's own is left.
    const uint64_t until = now_us() + 1000000;
    for (;;) {
        struct stats_held held;
        stats_held(daemon, &held);
        if (held.sequences == 1)
            break;
        assert_true(now_us() < until);
        assert_ok(ice_sequence_info(worker.sequence, 0, &info));
    }
    worker_append(&worker, &history, LENGTH / 2, 100);
    worker_close(&worker);
    history_destroy(&history);
}

static void no_daemon(void **state)
{
    const struct daemon *daemon = *state;
    const struct ice_client_options options = {.socket_directory = daemon->sockets, .deadline_us = 1000000};
    ice_client *client = NULL;
    assert_refused(ice_client_connect(&options, &client), ICE_NO_DAEMON, "start icecached");
    assert_int_equal(mkdir(daemon->sockets, 0700), 0);
    assert_refused(ice_client_connect(&options, &client), ICE_NO_DAEMON, "start icecached");
    assert_null(client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(pending_calls_end),
        DAEMON_TEST(killed_at_any_moment),
        DAEMON_TEST(a_daemon_that_stands_still),
        FOLDER_TEST(no_daemon),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
