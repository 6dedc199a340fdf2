// Who owns a landing row: from submit until the daemon's answer the daemon, also when the caller has stopped waiting;
// otherwise the worker, and then nothing is written into it.
#include "worker.h"

#include "raw.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {1, 2, 4, 64, ICE_BF16};
enum { LENGTH = 3000, ROWS = 4, SLOTS = 300 };

struct bench {
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
};

static void bench_open(struct bench *bench, const struct daemon *daemon)
{
    history_create(&bench->history, &shape, LENGTH, 61);
    worker_open(&bench->worker, daemon->sockets, &shape, ROWS, SLOTS);
    worker_append(&bench->worker, &bench->history, 0, LENGTH);
    worker_wait_idle(&bench->worker);
    retrieve_init(&bench->retrieve, &bench->worker, &bench->history, 0, LENGTH - 1, 1);
    assert_ok(ice_retrieve(bench->worker.client, &bench->retrieve.options, NULL));
}

static void bench_close(struct bench *bench)
{
    retrieve_fini(&bench->retrieve);
    worker_close(&bench->worker);
    history_destroy(&bench->history);
}

// Another selection than the one before.
static void ask_elsewhere(struct bench *bench, uint64_t first)
{
    bench->retrieve.first = first;
    history_queries(&bench->history, 0, first, 1, bench->retrieve.queries);
}

static ice_status view_row(struct bench *bench, uint32_t row)
{
    struct ice_landing_view view;
    return ice_landing_view(bench->worker.landing, row, 0, 0, &view);
}

static void wait_until_free(struct bench *bench, uint32_t row)
{
    uint64_t until = now_us() + TEST_DEADLINE_US;
    ice_status status;
    while ((status = view_row(bench, row)) == ICE_BUSY && now_us() < until)
        sleep_us(1000);
    assert_int_equal(status, ICE_OK);
}

// The row's bytes stay what they are while nothing has been submitted to it.
static void check_row_rests(struct bench *bench, uint32_t row)
{
    uint64_t digest = landing_digest(bench->worker.landing, row, 0, &shape);
    for (uint32_t i = 0; i < 20; i++) {
        sleep_us(5000);
        assert_int_equal(landing_digest(bench->worker.landing, row, 0, &shape), digest);
    }
}

static void timed_out_row_is_busy(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    ice_ticket *ticket = NULL;
    bench_open(&bench, daemon);
    uint64_t before = landing_digest(bench.worker.landing, 0, 0, &shape);
    daemon_signal(daemon, SIGSTOP);
    ask_elsewhere(&bench, LENGTH - 500);
    bench.retrieve.options.deadline_us = 200000;
    assert_status(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_TIMEOUT);
    for (uint32_t i = 0; i < 3; i++) {
        assert_refused(view_row(&bench, 0), ICE_BUSY, "row 0");
        assert_refused(ice_retrieve_submit(bench.worker.client, &bench.retrieve.options, &ticket), ICE_BUSY, "row 0");
        assert_refused(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_BUSY, "row 0");
        sleep_us(50000);
    }
    assert_ok(view_row(&bench, 1)); // other rows are the worker's
    daemon_signal(daemon, SIGCONT);
    wait_until_free(&bench, 0);
    // The daemon's deadline had passed: what it left is a valid selection all the same.
    landing_check(bench.worker.landing, 0, 0, &bench.history, SLOTS, LENGTH - 499);
    assert_int_not_equal(landing_digest(bench.worker.landing, 0, 0, &shape), before);
    check_row_rests(&bench, 0);
    bench.retrieve.options.deadline_us = 0;
    ask_elsewhere(&bench, LENGTH - 1);
    assert_ok(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL));
    assert_int_equal(landing_digest(bench.worker.landing, 0, 0, &shape), before);
    bench_close(&bench);
}

// A ticket whose wait has timed out may be waited for again; one that is closed still keeps its row.
static void tickets_keep_their_rows(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    ice_ticket *waited = NULL, *closed = NULL;
    struct ice_retrieve_result result;
    bench_open(&bench, daemon);
    daemon_signal(daemon, SIGSTOP);
    bench.retrieve.options.deadline_us = TEST_DEADLINE_US;
    bench.retrieve.row = 1;
    assert_ok(ice_retrieve_submit(bench.worker.client, &bench.retrieve.options, &waited));
    bench.retrieve.row = 2;
    assert_ok(ice_retrieve_submit(bench.worker.client, &bench.retrieve.options, &closed));
    assert_status(ice_retrieve_wait(waited, 100000, &result), ICE_TIMEOUT);
    ice_ticket_close(closed);
    assert_refused(view_row(&bench, 1), ICE_BUSY, "row 1");
    assert_refused(view_row(&bench, 2), ICE_BUSY, "row 2");
    daemon_signal(daemon, SIGCONT);
    assert_ok(ice_retrieve_wait(waited, 0, &result));
    assert_false(result.partial);
    assert_ok(view_row(&bench, 1));
    wait_until_free(&bench, 2);
    uint64_t expected = landing_digest(bench.worker.landing, 0, 0, &shape);
    assert_int_equal(landing_digest(bench.worker.landing, 1, 0, &shape), expected);
    assert_int_equal(landing_digest(bench.worker.landing, 2, 0, &shape), expected);
    assert_ok(ice_retrieve_wait(waited, 0, &result)); // also a third time
    ice_ticket_close(waited);
    bench_close(&bench);
}

// A row that changes its sequence shows nothing of the one before, even where the new one has less to say.
static void a_row_changes_its_sequence(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape deep = {2, 2, 4, 64, ICE_BF16};
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct ice_landing_view view;
    history_create(&history, &deep, 200, 67);
    worker_open(&worker, daemon->sockets, &deep, 1, SLOTS);
    worker_append(&worker, &history, 0, 200);
    for (uint32_t layer = 0; layer < 2; layer++) {
        retrieve_init(&retrieve, &worker, &history, layer, 199, 1);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        retrieve_fini(&retrieve);
    }
    ice_sequence *other = sequence_open(worker.client, &deep);
    const struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    assert_ok(ice_append(other, ICE_ALL_LAYERS, 0, 5, &source, 0, NULL));
    retrieve_init(&retrieve, &worker, &history, 0, 4, 1);
    retrieve.sequence = other;
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 0, &history, 5);
    assert_ok(ice_landing_view(worker.landing, 0, 1, 0, &view));
    assert_int_equal(view.count, 0); // layer 1 held the first sequence's tokens
    retrieve_fini(&retrieve);
    ice_sequence_close(other);
    worker_close(&worker);
    history_destroy(&history);
}

// Refused retrieves leave the row as it was and free.
static void a_refused_retrieve_writes_nothing(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    bench_open(&bench, daemon);
    uint64_t before = landing_digest(bench.worker.landing, 0, 0, &shape);
    retrieve_ends(&bench.retrieve, SLOTS, 16, 64);
    assert_status(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_TOO_LARGE);
    retrieve_ends(&bench.retrieve, 100, 16, 64);
    bench.retrieve.first = LENGTH + 5;
    assert_status(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_POSITION_GAP);
    bench.retrieve.first = LENGTH - 1;
    memset(bench.retrieve.queries, 0xff, shape.query_heads * shape_row_bytes(&shape));
    assert_status(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_NOT_FINITE);
    assert_int_equal(landing_digest(bench.worker.landing, 0, 0, &shape), before);
    // One bad head: the others may have been served, but what the row holds is still true of every slot.
    history_queries(&bench.history, 0, LENGTH - 1, 1, bench.retrieve.queries);
    memset(bench.retrieve.queries, 0xff, shape_row_bytes(&shape));
    retrieve_ends(&bench.retrieve, SLOTS - 80, 16, 64);
    assert_status(ice_retrieve(bench.worker.client, &bench.retrieve.options, NULL), ICE_NOT_FINITE);
    landing_check(bench.worker.landing, 0, 0, &bench.history, SLOTS, LENGTH);
    bench_close(&bench);
}

// The daemon guards its rows itself: two retrieves into one row, sent past the client library.
static void the_daemon_refuses_a_busy_row(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    uint8_t *staging;
    raw_open(&raw, daemon);
    raw_staging_open(&raw, 1u << 20, &staging);
    uint64_t sequence = raw_sequence_open(&raw, 1, 1, 1, 64, DTYPE_BF16);
    uint32_t landing = raw_landing_open(&raw, 2, 128, 1, 64, DTYPE_BF16);
    raw_request requests[3];
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    Icecache__Wire__Retrieve retrieve = ICECACHE__WIRE__RETRIEVE__INIT;
    uint64_t first = 999;
    uint32_t row = 0;
    uint8_t query[128] = {0};
    for (uint32_t i = 0; i < 3; i++)
        raw_request_init(&raw, &requests[i]);
    append.sequence_id = sequence;
    append.layers = 1;
    append.tokens = 1000;
    requests[0].body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    requests[0].append = &append;
    retrieve.landing_id = landing;
    retrieve.sequence_ids = &sequence;
    retrieve.rows = &row;
    retrieve.first_queries = &first;
    retrieve.n_sequence_ids = retrieve.n_rows = retrieve.n_first_queries = 1;
    retrieve.queries = 1;
    retrieve.query_dtype = DTYPE_BF16;
    retrieve.budget = 64;
    for (uint32_t i = 1; i < 3; i++) {
        requests[i].body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
        requests[i].retrieve = &retrieve;
    }
    // All three are on their way before the daemon sees the first: the append holds the first retrieve up.
    daemon_signal(daemon, SIGSTOP);
    raw_send(&raw, &requests[0], NULL, 0);
    raw_send(&raw, &requests[1], query, sizeof query);
    raw_send(&raw, &requests[2], query, sizeof query);
    daemon_signal(daemon, SIGCONT);
    for (uint32_t i = 0; i < 3; i++) {
        raw_reply *reply = raw_receive(&raw);
        if (reply->request_id == requests[2].request_id)
            raw_expect(reply, ICE_BUSY, "row 0");
        else
            raw_expect(reply, ICE_OK, "");
    }
    raw_expect(raw_call(&raw, &requests[1], query, sizeof query), ICE_OK, ""); // free again
    raw_close(&raw);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(timed_out_row_is_busy),         DAEMON_TEST(tickets_keep_their_rows),
        DAEMON_TEST(a_row_changes_its_sequence),    DAEMON_TEST(a_refused_retrieve_writes_nothing),
        DAEMON_TEST(the_daemon_refuses_a_busy_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
