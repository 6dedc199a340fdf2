// Step reuse: tokens that a row's last retrieve has left in it stay where they are, and only the others are moved;
// what the row holds is bit for bit the selection all the same, through decode steps, other sequences, other budgets,
// deadlines, and pages that have gone to the disk.
#include "worker.h"

#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 2500, STEPS = 40, SLOTS = 256 };

// What a row held: positions by slot, of each head.
struct held {
    uint32_t counts[2], positions[2][SLOTS];
};

static void note(const struct worker *worker, uint32_t row, uint32_t layer, struct held *held)
{
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(worker->landing, row, layer, head, &view));
        assert_in_range(view.count, 0, SLOTS);
        held->counts[head] = view.count;
        memcpy(held->positions[head], view.positions, view.count * sizeof *view.positions);
    }
}

static bool holds(const struct held *held, uint32_t head, uint32_t position, uint32_t slots)
{
    for (uint32_t slot = 0; slot < held->counts[head] && slot < slots; slot++) {
        if (held->positions[head][slot] == position)
            return true;
    }
    return false;
}

// Retrieves, and holds what was said to have changed and moved against the slots before and after.
static void step(struct worker *worker, struct retrieve *retrieve, const struct history *history, struct held *held,
                 uint64_t *changed, uint64_t *moved)
{
    const uint32_t layer = retrieve->options.layer;
    struct ice_retrieve_result result;
    struct held now;
    uint64_t at_least = 0, exactly = 0;
    retrieve_point(retrieve);
    assert_ok(ice_retrieve(worker->client, &retrieve->options, &result));
    assert_false(result.partial);
    note(worker, retrieve->row, layer, &now);
    landing_check(worker->landing, retrieve->row, layer, history, now.counts[0], retrieve->first + 1);
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        uint32_t fresh = 0;
        assert_int_equal(result.counts[head], now.counts[head]);
        for (uint32_t slot = 0; slot < now.counts[head]; slot++) {
            const uint32_t position = now.positions[head][slot];
            fresh += !holds(held, head, position, SLOTS);
            const bool was_here = slot < held->counts[head] && held->positions[head][slot] == position;
            // Where all are asked for each has its own slot; otherwise one that was in any slot stays there, if that is
            // still one of them.
            const bool is_all = now.counts[head] == retrieve->first + 1;
            const bool stays = is_all ? was_here : holds(held, head, position, now.counts[head]);
            exactly += !stays;
            if (stays && !retrieve->options.resend)
                assert_true(was_here);
        }
        assert_int_equal(result.changed[head], fresh);
        at_least += fresh;
    }
    if (retrieve->options.resend)
        exactly = now.counts[0] + now.counts[1];
    assert_int_equal(result.bytes_moved, exactly * 2 * shape_row_bytes(&shape));
    *changed += at_least;
    *moved += exactly;
    *held = now;
}

// A decode: each step appends its token, and asks with its own query.
static void decode_moves_what_changed(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct held held[2] = {0};
    uint64_t changed = 0, moved = 0;
    history_create(&history, &shape, LENGTH, 907);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH - STEPS);
    worker_wait_idle(&worker);
    for (uint64_t position = LENGTH - STEPS; position < LENGTH; position++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, &worker, &history, layer, position, 1);
            retrieve_ends(&retrieve, 100, 16, 64);
            retrieve_ride(&retrieve, &history);
            step(&worker, &retrieve, &history, &held[layer], &changed, &moved);
            retrieve_fini(&retrieve);
        }
    }
    print_message("turnover %.3f of the slots\n", (double)changed / (STEPS * 2 * 2 * 180));
    assert_int_equal(moved, changed);                     // all selections are of one size
    assert_true(changed < STEPS * 2u * 2 * 180 / 10 * 7); // sinks and window alone are 80 of 180
    worker_close(&worker);
    history_destroy(&history);
}

// Selections that grow and shrink, up to all there is and back; some asked for anew.
static void any_budget(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct held held = {0};
    uint64_t changed = 0, moved = 0, random = random_seed("any_budget");
    history_create(&history, &shape, LENGTH, 911);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 150; i++) {
        struct retrieve retrieve;
        const bool everything = i % 6 == 5;
        const uint64_t first = everything ? random_below(&random, SLOTS - 80) : LENGTH - 1 - random_below(&random, 9);
        retrieve_init(&retrieve, &worker, &history, 1, first, 1);
        retrieve_ends(&retrieve, 1 + (uint32_t)random_below(&random, SLOTS - 80), 16, 64);
        if (everything)
            retrieve_ends(&retrieve, SLOTS - 80, 16, 64);
        retrieve.options.resend = random_below(&random, 8) == 0;
        step(&worker, &retrieve, &history, &held, &changed, &moved);
        if (everything)
            landing_check_all(worker.landing, 0, 1, &history, first + 1);
        retrieve_fini(&retrieve);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// A row that goes to another sequence and back holds nothing of it any more.
static void rebound_rows(void **state)
{
    const struct daemon *daemon = *state;
    struct history histories[2];
    struct worker worker;
    ice_sequence *sequences[2];
    history_create(&histories[0], &shape, LENGTH, 919);
    history_create(&histories[1], &shape, LENGTH, 929);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    sequences[0] = worker.sequence;
    sequences[1] = sequence_open(worker.client, &shape);
    for (uint32_t i = 0; i < 2; i++) {
        worker.sequence = sequences[i];
        worker_append(&worker, &histories[i], 0, LENGTH);
    }
    for (uint32_t i = 0; i < 8; i++) {
        struct held nothing = {0};
        uint64_t changed = 0, moved = 0;
        struct retrieve retrieve;
        worker.sequence = sequences[i % 2];
        retrieve_init(&retrieve, &worker, &histories[i % 2], 0, LENGTH - 1, 1);
        step(&worker, &retrieve, &histories[i % 2], &nothing, &changed, &moved);
        assert_int_equal(changed, 2 * SLOTS);
        retrieve_fini(&retrieve);
    }
    ice_sequence_close(sequences[1]);
    worker.sequence = sequences[0];
    worker_close(&worker);
    history_destroy(&histories[0]);
    history_destroy(&histories[1]);
}

// Whatever a deadline has left: each slot holds the bytes of its position, and none is there twice.
static void check_slots(const struct worker *worker, uint32_t layer, const struct history *history)
{
    const size_t bytes = shape_row_bytes(&shape);
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        struct ice_landing_view view;
        assert_ok(ice_landing_view(worker->landing, 0, layer, head, &view));
        for (uint32_t slot = 0; slot < view.count; slot++) {
            const uint32_t position = view.positions[slot];
            for (uint32_t other = 0; other < slot; other++)
                assert_int_not_equal(view.positions[other], position);
            assert_memory_equal((const uint8_t *)view.keys + slot * bytes, history_key(history, layer, head, position),
                                bytes);
            assert_memory_equal((const uint8_t *)view.values + slot * bytes,
                                history_value(history, layer, head, position), bytes);
        }
    }
}

// Short deadlines leave whatever they leave; what comes after them is whole and right.
static void after_deadlines(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint32_t cut = 0;
    uint64_t random = random_seed("after_deadlines");
    history_create(&history, &shape, LENGTH, 937);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 120; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        struct ice_landing_view view;
        const bool hurried = i % 2 == 0;
        retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1 - random_below(&random, 600), 1);
        retrieve.options.deadline_us = hurried ? (8 + random_below(&random, 8)) << random_below(&random, 6) : 0;
        if (i % 4 > 1)
            retrieve.options.keep = (uint32_t)random_below(&random, retrieve.options.budget + 1);
        ice_status status = ice_retrieve(worker.client, &retrieve.options, &result);
        if (!hurried)
            assert_ok(status);
        else if (status != ICE_OK)
            assert_status(status, ICE_TIMEOUT);
        cut += status != ICE_OK || result.partial;
        for (uint64_t until = now_us() + TEST_DEADLINE_US; now_us() < until; sleep_us(200)) {
            status = ice_landing_view(worker.landing, 0, 0, 0, &view);
            if (status != ICE_BUSY)
                break;
        }
        assert_ok(status);
        check_slots(&worker, 0, &history);
        if (!hurried)
            landing_check(worker.landing, 0, 0, &history, SLOTS, LENGTH);
        retrieve_fini(&retrieve);
    }
    assert_true(cut > 0);
    worker_close(&worker);
    history_destroy(&history);
}

// Nearly all pages are on the disk: what is kept is not read, and deadlines cut gathers short.
static void spilled(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint32_t partial = 0, late = 0;
    uint64_t random = random_seed("spilled");
    history_create(&history, &shape, 6 * LENGTH, 941);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, 6 * LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 300; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        struct ice_landing_view view;
        const bool hurried = i % 3 != 0;
        retrieve_init(&retrieve, &worker, &history, i % 2, 6 * LENGTH - 1 - random_below(&random, 3000), 1);
        retrieve.options.deadline_us = hurried ? 200 + random_below(&random, 1500) : TEST_DEADLINE_US;
        if (i % 4 > 1)
            retrieve.options.keep = (uint32_t)random_below(&random, retrieve.options.budget + 1);
        ice_status status = ice_retrieve(worker.client, &retrieve.options, &result);
        if (hurried && status != ICE_OK)
            assert_status(status, ICE_TIMEOUT);
        else
            assert_ok(status);
        partial += status == ICE_OK && result.partial;
        late += status != ICE_OK;
        for (uint64_t until = now_us() + TEST_DEADLINE_US; now_us() < until; sleep_us(200)) {
            status = ice_landing_view(worker.landing, 0, i % 2, 0, &view);
            if (status != ICE_BUSY)
                break;
        }
        assert_ok(status);
        check_slots(&worker, i % 2, &history);
        if (!hurried)
            landing_check(worker.landing, 0, i % 2, &history, SLOTS, 6 * LENGTH);
        retrieve_fini(&retrieve);
    }
    print_message("%u partial, %u late\n", partial, late);
    assert_true(partial + late > 0);
    worker_close(&worker);
    history_destroy(&history);
}

static const char *const spill_options[] = {DAEMON_WITH_DISK("4m", "64m"), NULL};

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(decode_moves_what_changed),
        DAEMON_TEST(any_budget),
        DAEMON_TEST(rebound_rows),
        DAEMON_TEST(after_deadlines),
        cmocka_unit_test_prestate_setup_teardown(spilled, daemon_setup, daemon_teardown,
                                                 (void *)(uintptr_t)spill_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
