// The forms of a retrieve: several sequences, riding steps, many in flight, several threads, deadlines, coverage,
// page-wise, ends that the worker holds.
#include "worker.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 1500, SLOTS = 300 };

// ---- several sequences in one message ----

enum { MEMBERS = 5 };

struct group {
    struct history histories[MEMBERS];
    ice_sequence *sequences[MEMBERS];
    uint32_t rows[MEMBERS];
    uint64_t firsts[MEMBERS];
    uint8_t *queries, *keys, *values;
};

// Fills in queries and riding K and V of the members at `firsts`, sequences outermost.
static void group_fill(struct group *group, uint32_t layer, uint32_t n)
{
    size_t row = shape_row_bytes(&shape);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        size_t ride = (size_t)i * n * shape.kv_heads * row;
        history_queries(&group->histories[i], layer, group->firsts[i], n,
                        group->queries + (size_t)i * n * shape.query_heads * row);
        history_riding(&group->histories[i], layer, group->firsts[i], n, group->keys + ride, group->values + ride);
    }
}

static void several_sequences(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker;
    struct group group;
    size_t row = shape_row_bytes(&shape);
    worker_open(&worker, daemon->sockets, &shape, 8, LENGTH);
    group.queries = malloc(MEMBERS * 3 * shape.query_heads * row);
    group.keys = malloc(MEMBERS * 3 * shape.kv_heads * row);
    group.values = malloc(MEMBERS * 3 * shape.kv_heads * row);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        history_create(&group.histories[i], &shape, 400 + i * 150, 200 + i);
        group.sequences[i] = sequence_open(worker.client, &shape);
        group.rows[i] = 7 - i;
        group.firsts[i] = 300 + i * 150;
        const struct ice_kv_source source = history_source(&group.histories[i], ICE_ALL_LAYERS, 0);
        assert_ok(ice_append(group.sequences[i], ICE_ALL_LAYERS, 0, group.firsts[i], &source, 0, NULL));
    }
    struct ice_retrieve_options options = {
        .landing = worker.landing,
        .sequence_count = MEMBERS,
        .sequences = group.sequences,
        .rows = group.rows,
        .first_queries = group.firsts,
        .queries = 3,
        .query_vectors = group.queries,
        .query_dtype = shape.dtype,
        .keys = group.keys,
        .values = group.values,
        .budget = LENGTH,
    };
    for (uint32_t step = 0; step < 30; step++) {
        for (options.layer = 0; options.layer < shape.layers; options.layer++) {
            struct ice_retrieve_result result;
            group_fill(&group, options.layer, 3);
            assert_ok(ice_retrieve(worker.client, &options, &result));
            assert_int_equal(result.head_count, MEMBERS * shape.kv_heads);
            for (uint32_t i = 0; i < MEMBERS; i++) {
                assert_int_equal(result.counts[i * shape.kv_heads], group.firsts[i] + 3);
                landing_check_all(worker.landing, group.rows[i], options.layer, &group.histories[i],
                                  group.firsts[i] + 3);
            }
        }
        for (uint32_t i = 0; i < MEMBERS; i++)
            group.firsts[i] += 3;
    }
    // One of them is wrong: nothing is appended to any.
    group_fill(&group, 0, 3);
    options.layer = 0;
    memset(group.keys + 3 * 3 * shape.kv_heads * row, 0xff, row);
    assert_status(ice_retrieve(worker.client, &options, NULL), ICE_NOT_FINITE);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        struct ice_sequence_info info;
        assert_ok(ice_sequence_info(group.sequences[i], 0, &info));
        assert_int_equal(info.length, group.firsts[i]);
        history_destroy(&group.histories[i]);
    }
    free(group.queries);
    free(group.keys);
    free(group.values);
    worker_close(&worker);
}

// A step that was answered too late is sent again: accepted, without a second effect.
static void a_riding_step_again(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct ice_sequence_info info;
    history_create(&history, &shape, LENGTH, 131);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, 700);
    retrieve_init(&retrieve, &worker, &history, 0, 700, 1);
    retrieve_ride(&retrieve, &history);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(worker.landing, 0, 0, &history, SLOTS, 701);
    retrieve.values[0] ^= 1;
    assert_status(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_CONFLICT);
    assert_ok(ice_sequence_info(worker.sequence, 0, &info));
    assert_int_equal(info.length, 701);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- many in flight ----

static void submit_many(void **state)
{
    const struct daemon *daemon = *state;
    enum { FLIGHT = 64 };
    struct history history;
    struct worker worker;
    ice_ticket *tickets[FLIGHT];
    uint64_t random = random_seed("submit_many");
    history_create(&history, &shape, LENGTH, 137);
    worker_open(&worker, daemon->sockets, &shape, FLIGHT, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    for (uint32_t round = 0; round < 5; round++) {
        uint32_t order[FLIGHT];
        for (uint32_t i = 0; i < FLIGHT; i++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, &worker, &history, i % 2, LENGTH - 1 - i * 10, 1);
            retrieve.row = i;
            assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &tickets[i]));
            retrieve_fini(&retrieve); // all of it has been copied
            order[i] = i;
        }
        for (uint32_t i = FLIGHT; i > 1; i--) { // waited for in any order
            uint32_t j = (uint32_t)random_below(&random, i), t = order[i - 1];
            order[i - 1] = order[j];
            order[j] = t;
        }
        for (uint32_t i = 0; i < FLIGHT; i++) {
            struct ice_retrieve_result result;
            assert_ok(ice_retrieve_wait(tickets[order[i]], 0, &result));
            assert_int_equal(result.counts[0], SLOTS);
            landing_check(worker.landing, order[i], order[i] % 2, &history, SLOTS, LENGTH - order[i] * 10);
            ice_ticket_close(tickets[order[i]]);
        }
    }
    worker_close(&worker);
    history_destroy(&history);
}

struct thread {
    pthread_t id;
    struct worker *worker; // client and landing are shared
    const struct history *history;
    ice_sequence *sequence;
    uint32_t row, rounds;
    ice_status status;
};

// Own sequence and row on a shared client: appends and retrieves by turns. Asserts belong to the main thread.
static void *thread_main(void *argument)
{
    struct thread *thread = argument;
    for (uint32_t round = 0; round < thread->rounds && thread->status == ICE_OK; round++) {
        struct retrieve retrieve;
        const uint64_t first = round * 20;
        const struct ice_kv_source source = history_source(thread->history, ICE_ALL_LAYERS, first);
        thread->status = ice_append(thread->sequence, ICE_ALL_LAYERS, first, 20, &source, 0, NULL);
        retrieve_init(&retrieve, thread->worker, thread->history, round % 2, first + 19, 1);
        retrieve.sequence = thread->sequence;
        retrieve.row = thread->row;
        if (thread->status == ICE_OK)
            thread->status = ice_retrieve(thread->worker->client, &retrieve.options, NULL);
        struct ice_landing_view view;
        if (thread->status == ICE_OK)
            thread->status = ice_landing_view(thread->worker->landing, thread->row, round % 2, 1, &view);
        bool newest = false;
        for (uint32_t slot = 0; thread->status == ICE_OK && slot < view.count; slot++)
            newest |= view.positions[slot] == first + 19;
        if (thread->status == ICE_OK && !newest)
            thread->status = ICE_INTERNAL;
        retrieve_fini(&retrieve);
    }
    return NULL;
}

static void threads_on_one_client(void **state)
{
    const struct daemon *daemon = *state;
    enum { THREADS = 6 };
    struct history histories[THREADS];
    struct thread threads[THREADS];
    struct worker worker;
    const uint32_t rounds = scaled_count(60, 300);
    worker_open(&worker, daemon->sockets, &shape, THREADS, rounds * 20);
    for (uint32_t i = 0; i < THREADS; i++) {
        history_create(&histories[i], &shape, rounds * 20, 300 + i);
        threads[i] = (struct thread){
            .worker = &worker,
            .history = &histories[i],
            .sequence = sequence_open(worker.client, &shape),
            .row = i,
            .rounds = rounds,
        };
        assert_int_equal(pthread_create(&threads[i].id, NULL, thread_main, &threads[i]), 0);
    }
    for (uint32_t i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_join(threads[i].id, NULL), 0);
        assert_int_equal(threads[i].status, ICE_OK);
        landing_check_all(worker.landing, i, (rounds - 1) % 2, &histories[i], rounds * 20);
        history_destroy(&histories[i]);
    }
    worker_close(&worker);
}

// ---- deadlines ----

// Whatever the deadline cuts off: the row is true and in order, and the next retrieve is whole again.
static void tiny_deadlines(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape wide = {1, 2, 8, 128, ICE_BF16};
    const uint64_t length = scaled_count(12000, 30000);
    struct history history;
    struct worker worker;
    uint32_t outcomes[3] = {0};
    history_create(&history, &wide, length, 139);
    worker_open(&worker, daemon->sockets, &wide, 1, 1000);
    worker_append(&worker, &history, 0, length); // nothing is indexed yet: much to scan
    for (uint32_t i = 0; i < 60; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        struct ice_landing_view view;
        retrieve_init(&retrieve, &worker, &history, 0, length - 40, 40);
        retrieve.options.deadline_us = 300 + i * i * 20;
        ice_status status = ice_retrieve(worker.client, &retrieve.options, &result);
        retrieve_fini(&retrieve);
        if (status != ICE_OK)
            assert_status(status, ICE_TIMEOUT);
        outcomes[status == ICE_TIMEOUT ? 0 : result.partial ? 1 : 2]++;
        uint64_t until = now_us() + TEST_DEADLINE_US;
        while ((status = ice_landing_view(worker.landing, 0, 0, 0, &view)) == ICE_BUSY && now_us() < until)
            sleep_us(500);
        assert_ok(status);
        for (uint32_t head = 0; head < wide.kv_heads; head++) {
            assert_ok(ice_landing_view(worker.landing, 0, 0, head, &view));
            assert_true(view.count >= 80 && view.count <= 1000); // at least sinks and window
            for (uint32_t slot = 0; slot < view.count; slot++) {
                uint32_t position = view.positions[slot];
                assert_true(position < length);
                assert_memory_equal((const uint8_t *)view.keys + slot * shape_row_bytes(&wide),
                                    history_key(&history, 0, head, position), shape_row_bytes(&wide));
                assert_memory_equal((const uint8_t *)view.values + slot * shape_row_bytes(&wide),
                                    history_value(&history, 0, head, position), shape_row_bytes(&wide));
            }
        }
    }
    print_message("%u timed out, %u partial, %u whole\n", outcomes[0], outcomes[1], outcomes[2]);
    assert_true(outcomes[0] + outcomes[1] > 0); // else the deadlines were no test
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    retrieve_init(&retrieve, &worker, &history, 0, length - 1, 1);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
    assert_false(result.partial);
    landing_check(worker.landing, 0, 0, &history, 1000, length);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- coverage, pages, ends ----

// Stops once the share is reached: fewer tokens for less coverage, and the truth is near what was asked for.
static void coverage(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint32_t total[3] = {0};
    double reached = 0, asked_for = 0;
    static const float shares[] = {0.5f, 0.8f, 0.0f};
    double *masses = malloc(LENGTH * sizeof *masses);
    assert_non_null(masses);
    history_create(&history, &shape, LENGTH, 149);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 30; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1 - i, 1);
        retrieve.options.coverage = shares[i % 3];
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            struct ice_landing_view view;
            double mass = 0;
            assert_ok(ice_landing_view(worker.landing, 0, 0, head, &view));
            assert_int_equal(view.count, result.counts[head]);
            assert_true(view.count >= 80 && view.count <= SLOTS);
            attention_masses(&history, 0, head, retrieve.queries, LENGTH - 1 - i, 1, masses);
            for (uint32_t slot = 0; slot < view.count; slot++)
                mass += masses[view.positions[slot]];
            total[i % 3] += view.count;
            if (i % 3 < 2 && view.count < SLOTS) { // else the budget was the limit
                reached += mass;
                asked_for += (double)shares[i % 3];
            }
        }
        retrieve_fini(&retrieve);
    }
    print_message("tokens %u for half, %u for 0.8, %u for all of the budget; reached %.2f of %.2f\n", total[0],
                  total[1], total[2], reached, asked_for);
    assert_true(total[0] < total[1] && total[1] < total[2]);
    assert_true(reached > 0.9 * asked_for);
    free(masses);
    worker_close(&worker);
    history_destroy(&history);
}

// Whole pages: the budget is kept, tokens come in the company of their page, and the best one is among them.
static void page_wise(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 151);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    static const uint32_t budgets[] = {1, 15, 16, 64, 100, 220};
    for (uint32_t i = 0; i < 24; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        uint32_t budget = budgets[i % 6], most = budget < 16 ? 16 : budget / 16 * 16;
        retrieve_init(&retrieve, &worker, &history, i % 2, LENGTH - 1 - i, 1);
        retrieve_ends(&retrieve, budget, 16, 64);
        retrieve.options.granularity = ICE_PAGE_WISE;
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            assert_true(result.counts[head] > 80 && result.counts[head] <= 80 + most);
            struct ice_landing_view view;
            assert_ok(ice_landing_view(worker.landing, 0, i % 2, head, &view));
            assert_int_equal(view.count, result.counts[head]);
        }
        retrieve_fini(&retrieve);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// Sinks and window are neither sent nor selected; the rest is the same, and so is the mass.
static void worker_holds_ends(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 157);
    worker_open(&worker, daemon->sockets, &shape, 2, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 20; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result held, sent;
        const uint64_t visible = LENGTH - i * 30;
        retrieve_init(&retrieve, &worker, &history, 0, visible - 1, 1);
        retrieve_ends(&retrieve, 100, 16, 64);
        retrieve.options.resend = true; // all of it, in order
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &sent));
        float mass = sent.masses[1];
        uint64_t moved = sent.bytes_moved;
        retrieve.row = 1;
        retrieve.options.worker_holds_ends = true;
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &held));
        assert_true(held.masses[1] == mass);
        assert_int_equal(moved - held.bytes_moved, 80 * 2 * 2 * shape_row_bytes(&shape));
        landing_check(worker.landing, 1, 0, &history, 100, visible);
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            struct ice_landing_view all, middle;
            assert_ok(ice_landing_view(worker.landing, 0, 0, head, &all));
            assert_ok(ice_landing_view(worker.landing, 1, 0, head, &middle));
            assert_int_equal(all.count, 180);
            assert_true(middle.positions[0] >= 16 && middle.positions[99] < visible - 64);
            assert_memory_equal(all.positions + 16, middle.positions, 100 * sizeof *middle.positions);
        }
        retrieve_fini(&retrieve);
    }
    // A landing with room for the budget alone is enough then.
    ice_landing *small = landing_open(worker.client, &shape, 1, 50);
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
    retrieve_ends(&retrieve, 50, 16, 64);
    retrieve.options.landing = small;
    retrieve.options.worker_holds_ends = true;
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(small, 0, 0, &history, 50, LENGTH);
    retrieve_fini(&retrieve);
    ice_landing_close(small);
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(several_sequences), DAEMON_TEST(a_riding_step_again),
        DAEMON_TEST(submit_many),       DAEMON_TEST(threads_on_one_client),
        DAEMON_TEST(tiny_deadlines),    DAEMON_TEST(coverage),
        DAEMON_TEST(page_wise),         DAEMON_TEST(worker_holds_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
