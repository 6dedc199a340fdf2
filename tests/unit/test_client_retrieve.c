// Retrieves through a scripted daemon: what a result says, who owns a row when, late replies, replies out of order to
// several threads, and the limit of requests in flight.
#include "client_setup.h"

static void result_and_view(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    uint16_t keys[KV_HEADS * HEAD_DIM] = {11}, values[KV_HEADS * HEAD_DIM] = {22};
    uint16_t queries[QUERY_HEADS * HEAD_DIM] = {33};
    options.query_vectors = queries;
    options.keys = keys;
    options.values = values;
    options.deadline_us = 800000;
    struct ice_retrieve_result result;
    assert_int_equal(ice_retrieve(setup.client, &options, &result), ICE_OK);
    assert_int_equal(result.head_count, KV_HEADS);
    assert_int_equal(result.counts[1], 1);
    assert_true(result.masses[0] > 0.4f && result.masses[0] < 0.6f);
    assert_int_equal(result.versions[1], 2);
    assert_int_equal(result.bytes_moved, 77);

    // The daemon is asked to end first, and sees queries, keys and values one behind the other.
    uint64_t deadline_us = FAKE_GET(setup.fake, deadline_us);
    assert_true(deadline_us > 400000 && deadline_us <= 700000);
    assert_int_equal(FAKE_GET(setup.fake, vectors_bytes), sizeof queries + sizeof keys + sizeof values);
    assert_memory_equal(setup.fake->vectors, queries, sizeof queries);
    assert_memory_equal(setup.fake->vectors + sizeof queries, keys, sizeof keys);
    assert_memory_equal(setup.fake->vectors + sizeof queries + sizeof keys, values, sizeof values);

    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, &view), ICE_OK);
    assert_int_equal(view.count, 3);
    assert_int_equal(view.positions[2], 20);
    assert_int_equal(*(const uint8_t *)view.keys, 42);
    assert_int_equal(*(const uint8_t *)view.values, 43);
    assert_int_equal(ice_landing_view(setup.landing, 1, 1, 1, &view), ICE_OK);
    assert_int_equal(view.count, 0);

    // The daemon's memory is not believed.
    memcpy(setup.fake->landing + setup.fake->layout.counts_offset, &(uint32_t){SLOTS + 1}, 4);
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, &view), ICE_INTERNAL);
    tear_down(&setup);
}

static void time_out_keeps_the_row_until_the_late_reply(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    uint32_t row = 3, other = 4;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    options.deadline_us = 30000;
    uint64_t begun_us = now_us();
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_TIMEOUT);
    assert_true(now_us() - begun_us >= 30000);
    assert_string_not_equal(ice_last_error(), "");

    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, row, 0, 0, &view), ICE_BUSY);
    assert_non_null(strstr(ice_last_error(), "row 3"));
    assert_int_equal(ice_landing_view(setup.landing, other, 0, 0, &view), ICE_OK);
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_BUSY);
    assert_null(ticket);
    // A row of several: nothing of it is taken.
    ice_sequence *both[] = {setup.sequence, setup.sequence};
    uint32_t rows[] = {other, row};
    uint64_t firsts[] = {100, 100};
    uint16_t queries[2 * QUERY_HEADS * HEAD_DIM] = {0};
    struct ice_retrieve_options two = options;
    two.sequence_count = 2;
    two.sequences = both;
    two.rows = rows;
    two.first_queries = firsts;
    two.query_vectors = queries;
    assert_int_equal(ice_retrieve_submit(setup.client, &two, &ticket), ICE_BUSY);
    assert_int_equal(ice_landing_view(setup.landing, other, 0, 0, &view), ICE_OK);
    rows[1] = other;
    assert_int_equal(ice_retrieve_submit(setup.client, &two, &ticket), ICE_INVALID_ARGUMENT);

    // The late reply frees the row, though nobody waits for it.
    fake_do(setup.fake, FAKE_ANSWER, 0);
    FAKE_SET(setup.fake, hold, 0);
    ice_status status = ICE_BUSY;
    for (begun_us = now_us(); status == ICE_BUSY && now_us() - begun_us < 5000000;) {
        status = ice_landing_view(setup.landing, row, 0, 0, &view);
    }
    assert_int_equal(status, ICE_OK);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK);
    tear_down(&setup);
}

static void ticket_can_be_waited_for_again(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    struct ice_retrieve_result result = {0};
    assert_int_equal(ice_retrieve_wait(ticket, 10000, &result), ICE_TIMEOUT);
    assert_int_equal(result.head_count, 0);
    fake_wait_held(setup.fake, 1);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    assert_int_equal(ice_retrieve_wait(ticket, 0, &result), ICE_OK);
    assert_int_equal(result.head_count, KV_HEADS);
    assert_int_equal(ice_retrieve_wait(ticket, 0, &result), ICE_OK);
    assert_int_equal(result.indexed[0], setup.fake->held[0].request_id);
    ice_ticket_close(ticket);

    // A closed ticket and a closed landing with a reply still to come.
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    ice_ticket_close(ticket);
    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, &view), ICE_BUSY);
    fake_wait_held(setup.fake, 2);
    fake_do(setup.fake, FAKE_ANSWER, 1);
    ice_landing_close(setup.landing);
    setup.landing = NULL;
    assert_int_equal(FAKE_GET(setup.fake, landings_closed), 1);
    tear_down(&setup);
}

static void landing_close_gives_up_after_one_deadline(void **state)
{
    (void)state;
    struct setup setup = set_up(50000, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    ice_ticket *ticket = NULL;
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &ticket), ICE_OK);
    uint64_t begun_us = now_us();
    ice_landing_close(setup.landing);
    setup.landing = NULL;
    assert_true(now_us() - begun_us >= 50000 && now_us() - begun_us < 2000000);
    fake_wait_held(setup.fake, 1);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    assert_int_equal(ice_retrieve_wait(ticket, 1000000, NULL), ICE_OK);
    ice_ticket_close(ticket);
    tear_down(&setup);
}

enum { THREADS = 8 };
struct caller {
    struct setup *setup;
    uint32_t row;
    ice_status status;
    uint64_t indexed;
    pthread_t thread;
};

static void *call(void *argument)
{
    struct caller *caller = argument;
    struct ice_retrieve_options options = one_retrieve(caller->setup, &caller->row);
    struct ice_retrieve_result result;
    caller->status = ice_retrieve(caller->setup->client, &options, &result);
    if (caller->status == ICE_OK) {
        caller->indexed = result.indexed[0];
    }
    return NULL;
}

static void replies_out_of_order_reach_their_threads(void **state)
{
    (void)state;
    struct setup setup = set_up(20000000, 0);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    struct caller callers[THREADS];
    for (uint32_t i = 0; i < THREADS; i++) {
        callers[i] = (struct caller){.setup = &setup, .row = i};
        assert_int_equal(pthread_create(&callers[i].thread, NULL, call, &callers[i]), 0);
        fake_wait_held(setup.fake, i + 1); // so that held[i] is caller i's
    }
    // Two others stay for last, so that the receiver's role has to move on again and again.
    const size_t order[THREADS] = {5, 0, 7, 2, 6, 1, 4, 3};
    for (size_t i = 0; i < THREADS; i++) {
        fake_do(setup.fake, FAKE_ANSWER, order[i]);
        assert_int_equal(pthread_join(callers[order[i]].thread, NULL), 0);
        assert_int_equal(callers[order[i]].status, ICE_OK);
        assert_true(callers[order[i]].indexed == setup.fake->held[order[i]].request_id);
    }
    tear_down(&setup);
}

static void *call_often(void *argument)
{
    struct caller *caller = argument;
    for (int i = 0; i < 300 && caller->status == ICE_OK; i++) {
        call(caller);
        struct ice_landing_view view;
        if (caller->status == ICE_OK) {
            caller->status = ice_landing_view(caller->setup->landing, caller->row, 0, 0, &view);
        }
    }
    return NULL;
}

// Sends and receives of many threads cross on the edge-triggered descriptor: no reply may be overlooked.
static void many_threads_lose_no_reply(void **state)
{
    (void)state;
    struct setup setup = set_up(60000000, 0);
    struct caller callers[THREADS];
    uint64_t begun_us = now_us();
    for (uint32_t i = 0; i < THREADS; i++) {
        callers[i] = (struct caller){.setup = &setup, .row = i};
        assert_int_equal(pthread_create(&callers[i].thread, NULL, call_often, &callers[i]), 0);
    }
    for (uint32_t i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_join(callers[i].thread, NULL), 0);
        assert_int_equal(callers[i].status, ICE_OK);
    }
    assert_true(now_us() - begun_us < 30000000); // nobody slept until the deadline
    print_message("%d retrieves of %d threads in %llu us\n", 300 * THREADS, THREADS,
                  (unsigned long long)(now_us() - begun_us));
    tear_down(&setup);
}

static void table_is_bounded(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    ice_landing_close(setup.landing);
    struct ice_landing_shape shape = landing_shape();
    shape.rows = 300;
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, &setup.landing), ICE_OK);
    FAKE_SET(setup.fake, hold, HOLD_RETRIEVES);
    ice_ticket *tickets[257] = {NULL};
    for (uint32_t i = 0; i < 256; i++) {
        struct ice_retrieve_options options = one_retrieve(&setup, &i);
        assert_int_equal(ice_retrieve_submit(setup.client, &options, &tickets[i]), ICE_OK);
    }
    uint32_t row = 256;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &tickets[256]), ICE_QUEUE_FULL);
    assert_non_null(strstr(ice_last_error(), "256"));
    fake_wait_held(setup.fake, 256);
    fake_do(setup.fake, FAKE_ANSWER, 17);
    assert_int_equal(ice_retrieve_wait(tickets[17], 0, NULL), ICE_OK);
    assert_int_equal(ice_retrieve_submit(setup.client, &options, &tickets[256]), ICE_OK);
    // Open tickets, landing and sequence are the client's to free.
    ice_client_close(setup.client);
    fake_stop(setup.fake);
}

static void daemon_refusals_and_nonsense(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    FAKE_SET(setup.fake, retrieve_status, ICE_POSITION_GAP);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_POSITION_GAP);
    assert_string_equal(ice_last_error(), "the daemon's own words");
    FAKE_SET(setup.fake, retrieve_status, (ice_status)999);
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_INTERNAL);
    FAKE_SET(setup.fake, retrieve_status, ICE_OK);
    FAKE_SET(setup.fake, kv_heads, 1); // half of the heads are missing
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_BAD_MESSAGE);
    FAKE_SET(setup.fake, kv_heads, 2);
    FAKE_SET(setup.fake, garbled, true);
    options.deadline_us = 30000;
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_TIMEOUT);
    FAKE_SET(setup.fake, garbled, false);
    row = 1;
    options.deadline_us = 0;
    assert_int_equal(ice_retrieve(setup.client, &options, NULL), ICE_OK);
    assert_string_equal(ice_last_error(), "");
    ice_client_close(setup.client); // row 0 stays busy: its reply was garbled
    fake_stop(setup.fake);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(result_and_view),
        cmocka_unit_test(time_out_keeps_the_row_until_the_late_reply),
        cmocka_unit_test(ticket_can_be_waited_for_again),
        cmocka_unit_test(landing_close_gives_up_after_one_deadline),
        cmocka_unit_test(replies_out_of_order_reach_their_threads),
        cmocka_unit_test(many_threads_lose_no_reply),
        cmocka_unit_test(table_is_bounded),
        cmocka_unit_test(daemon_refusals_and_nonsense),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
