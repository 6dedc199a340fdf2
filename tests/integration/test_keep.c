// keep: so many of a cell's last selection stay selected, the best of them, and the rest comes from the new ranking;
// what is moved is bounded by that, what the row holds is bit for bit the selection, and where a row has no last
// selection keep does nothing.
#include "worker.h"

#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 2500, STEPS = 30, BUDGET = 100, SINKS = 16, WINDOW = 64, SLOTS = 256 };

struct held {
    uint32_t count;
    uint32_t positions[SLOTS];
};

// Tokens between sinks and window of the retrieve whose first query stands at `first`.
static void note(const struct worker *worker, uint32_t layer, uint32_t head, uint64_t first, struct held *held)
{
    struct ice_landing_view view;
    assert_ok(ice_landing_view(worker->landing, 0, layer, head, &view));
    held->count = 0;
    for (uint32_t i = 0; i < view.count; i++) {
        if (view.positions[i] >= SINKS && view.positions[i] + WINDOW <= first)
            held->positions[held->count++] = view.positions[i];
    }
}

static uint32_t shared_count(const struct held *a, const struct held *b)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < a->count; i++) {
        for (uint32_t j = 0; j < b->count; j++)
            count += a->positions[i] == b->positions[j];
    }
    return count;
}

static void point(struct retrieve *retrieve, struct worker *worker, const struct history *history, uint64_t position,
                  uint32_t keep)
{
    retrieve_init(retrieve, worker, history, 0, position, 1);
    retrieve_ends(retrieve, BUDGET, SINKS, WINDOW);
    retrieve->options.keep = keep;
    retrieve_point(retrieve);
}

// Decodes with this keep; returns the bytes moved after the first step.
static uint64_t decode(struct worker *worker, const struct history *history, uint32_t keep)
{
    struct held last[2] = {0}, now[2];
    uint64_t moved = 0;
    for (uint64_t position = LENGTH - STEPS; position < LENGTH; position++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        const bool is_first = position == LENGTH - STEPS;
        point(&retrieve, worker, history, position, is_first ? 0 : keep);
        assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
        landing_check(worker->landing, 0, 0, history, BUDGET + SINKS + WINDOW, position + 1);
        for (uint32_t head = 0; head < shape.kv_heads; head++) {
            note(worker, 0, head, position, &now[head]);
            assert_int_equal(now[head].count, BUDGET);
            if (!is_first) {
                assert_true(shared_count(&last[head], &now[head]) >= keep);
                assert_true(result.changed[head] <= BUDGET - keep + 1);
            }
            last[head] = now[head];
        }
        moved += is_first ? 0 : result.bytes_moved;
        if (keep == BUDGET && !is_first)
            assert_int_equal(result.search_us, 0);
        retrieve_fini(&retrieve);
    }
    assert_true(moved <= (STEPS - 1) * 2ull * (BUDGET - keep + 1) * 2 * shape_row_bytes(&shape));
    return moved;
}

static void kept_stay(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    uint64_t before = UINT64_MAX;
    history_create(&history, &shape, LENGTH, 907);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    for (uint32_t quarter = 0; quarter <= 4; quarter++) {
        const uint64_t moved = decode(&worker, &history, BUDGET * quarter / 4);
        print_message("keep %u of %u: %llu bytes a step\n", BUDGET * quarter / 4, BUDGET,
                      (unsigned long long)(moved / (STEPS - 1)));
        assert_true(moved < before);
        before = moved;
    }
    worker_close(&worker);
    history_destroy(&history);
}

// All there is, whatever is kept; keep in a row that held another sequence; and options that are refused.
static void limits(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    history_create(&history, &shape, LENGTH, 911);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    point(&retrieve, &worker, &history, 120, 0);
    for (uint64_t position = 120; position < 120 + 40; position++) {
        retrieve.first = position;
        retrieve.options.keep = BUDGET;
        retrieve_point(&retrieve);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        landing_check_all(worker.landing, 0, 0, &history, position + 1);
    }
    retrieve.options.keep = BUDGET + 1;
    assert_status(ice_retrieve(worker.client, &retrieve.options, &result), ICE_INVALID_ARGUMENT);
    retrieve.options.keep = 1;
    retrieve.options.granularity = ICE_PAGE_WISE;
    assert_status(ice_retrieve(worker.client, &retrieve.options, &result), ICE_NOT_SUPPORTED);
    retrieve_fini(&retrieve);
    // The row goes to another sequence of the same tokens and back: nothing is kept, so it is the plain selection.
    ice_sequence *const first = worker.sequence;
    worker.sequence = sequence_open(worker.client, &shape);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    struct held plain, kept;
    point(&retrieve, &worker, &history, LENGTH - 1, 0);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
    note(&worker, 0, 0, LENGTH - 1, &plain);
    retrieve_fini(&retrieve);
    ice_sequence *const second = worker.sequence;
    worker.sequence = first;
    point(&retrieve, &worker, &history, LENGTH / 2, 0);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
    retrieve_fini(&retrieve);
    worker.sequence = second;
    point(&retrieve, &worker, &history, LENGTH - 1, BUDGET);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
    assert_int_equal(result.changed[0], BUDGET + SINKS + WINDOW);
    note(&worker, 0, 0, LENGTH - 1, &kept);
    assert_int_equal(shared_count(&plain, &kept), BUDGET);
    retrieve_fini(&retrieve);
    ice_sequence_close(second);
    worker.sequence = first;
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(kept_stay),
        DAEMON_TEST(limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
