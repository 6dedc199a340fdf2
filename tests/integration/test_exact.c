// Sinks + window + budget of at least the length return everything: slot i holds position i, bit for bit, through
// retrieve like any other budget, while clustering runs and after it, after insertions and splits.
#include "worker.h"

#include <stdlib.h>
#include <string.h>

enum { SLOTS = 2048 };

// ---- all at every length ----

struct share {
    uint32_t budget, sinks, window;
    enum ice_granularity granularity;
};

// A retrieve that must return everything below `length`.
static void check_share(struct worker *worker, const struct history *history, uint64_t length, uint32_t layer,
                        const struct share *share, bool masses)
{
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    retrieve_init(&retrieve, worker, history, layer, length - 1, 1);
    retrieve_ends(&retrieve, share->budget, share->sinks, share->window);
    retrieve.options.granularity = share->granularity;
    assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
    assert_false(result.partial);
    assert_int_equal(result.head_count, worker->shape.kv_heads);
    for (uint32_t head = 0; head < result.head_count; head++) {
        assert_int_equal(result.counts[head], length);
        if (masses)
            assert_float_equal(result.masses[head], 1.0f, 1e-3f);
    }
    uint64_t changed = 0;
    for (uint32_t head = 0; head < result.head_count; head++)
        changed += result.changed[head];
    assert_in_range(result.bytes_moved, changed * 2 * shape_row_bytes(&worker->shape),
                    result.head_count * length * 2 * shape_row_bytes(&worker->shape));
    landing_check_all(worker->landing, 0, layer, history, length);
    retrieve_fini(&retrieve);
}

// Different shares of sinks, window and budget.
static void check_everything(struct worker *worker, const struct history *history, uint64_t length, uint32_t layer)
{
    const uint32_t n = (uint32_t)length;
    const struct share shares[] = {
        {n, 0, 0, ICE_TOKEN_WISE},
        {n, 0, 0, ICE_PAGE_WISE},
        {n > 80 ? n - 80 : 1, 16, 64, ICE_TOKEN_WISE},
        {n > 80 ? n - 80 : 1, 16, 64, ICE_PAGE_WISE},
        {worker->slots - 80, 16, 64, ICE_TOKEN_WISE},
    };
    const struct share ends[] = {{1, n, 0, ICE_TOKEN_WISE}, {1, 0, n, ICE_TOKEN_WISE}};
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++)
        check_share(worker, history, length, layer, &shares[i], true);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        check_share(worker, history, length, layer, &ends[i], false);
}

static void check_lengths(const struct daemon *daemon, const struct shape *shape, const uint64_t *lengths, size_t count)
{
    struct history history;
    struct worker worker;
    history_create(&history, shape, lengths[count - 1], 7);
    worker_open(&worker, daemon->sockets, shape, 1, SLOTS);
    for (size_t i = 0; i < count; i++) {
        uint64_t from = i ? lengths[i - 1] : 0;
        worker_append(&worker, &history, from, lengths[i] - from);
        check_everything(&worker, &history, lengths[i], (uint32_t)i % shape->layers); // clustering may be running
        worker_wait_idle(&worker);
        for (uint32_t layer = 0; layer < shape->layers; layer++)
            check_everything(&worker, &history, lengths[i], layer);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// Around pages of 16, the first batch at 16 + 256 + 64, the next ones 64 later each, sinks + window = 80.
static void every_length(void **state)
{
    static const uint64_t lengths[] = {1,   2,   15,  16,  17,  63,  64,  65,  79,  80,  81,   255,  256,
                                       257, 271, 272, 335, 336, 337, 399, 400, 401, 777, 1024, 1088, 1300};
    const struct shape shapes[] = {{2, 2, 4, 64, ICE_BF16}, {1, 3, 3, 16, ICE_FP32}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_lengths(*state, &shapes[i], lengths, sizeof lengths / sizeof *lengths);
}

static void every_dtype_and_head_dim(void **state)
{
    static const uint64_t lengths[] = {1, 17, 200, 256, 400, 1030};
    static const uint32_t head_dims[] = {16, 64, 80, 128, 256};
    static const struct {
        uint32_t layers, kv_heads, query_heads;
    } heads[] = {{1, 1, 1}, {2, 2, 8}, {1, 4, 4}, {3, 1, 7}};
    uint32_t n = 0;
    for (ice_dtype dtype = ICE_BF16; dtype <= ICE_FP32; dtype++) {
        for (size_t i = 0; i < sizeof head_dims / sizeof *head_dims; i++, n++) {
            const struct shape shape = {heads[n % 4].layers, heads[n % 4].kv_heads, heads[n % 4].query_heads,
                                        head_dims[i], dtype};
            print_message("%s\n", shape_text(&shape));
            check_lengths(*state, &shape, lengths, sizeof lengths / sizeof *lengths);
        }
    }
}

// ---- attention ----

static void attention_is_full_attention(void **state)
{
    const struct daemon *daemon = *state;
    for (ice_dtype dtype = ICE_BF16; dtype <= ICE_FP32; dtype++) {
        const struct shape shape = {1, 2, 6, 80, dtype};
        struct history history;
        struct worker worker;
        struct retrieve retrieve;
        history_create(&history, &shape, 700, 11);
        worker_open(&worker, daemon->sockets, &shape, 1, 700);
        worker_append(&worker, &history, 0, 700);
        worker_wait_idle(&worker);
        retrieve_init(&retrieve, &worker, &history, 0, 699, 1);
        retrieve_ends(&retrieve, 620, 16, 64);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        for (uint32_t head = 0; head < shape.query_heads; head++) {
            float query[80], full[80], found[80];
            uint32_t kv_head = head / shape_group(&shape);
            struct ice_landing_view view;
            vector_decode(retrieve.queries + head * shape_row_bytes(&shape), 80, dtype, query);
            assert_ok(ice_landing_view(worker.landing, 0, 0, kv_head, &view));
            attention(&shape, query, view.keys, view.values, view.count, found);
            attention(&shape, query, history_key(&history, 0, kv_head, 0), history_value(&history, 0, kv_head, 0), 700,
                      full);
            assert_memory_equal(found, full, sizeof full);
        }
        retrieve_fini(&retrieve);
        worker_close(&worker);
        history_destroy(&history);
    }
}

// Sinks or window alone cover everything: then the estimated mass is all of it.
static void ends_alone_have_all_the_mass(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {1, 2, 4, 64, ICE_BF16};
    static const struct share ends[] = {
        {1, 600, 0, ICE_TOKEN_WISE}, {1, 0, 600, ICE_TOKEN_WISE}, {1, 300, 300, ICE_TOKEN_WISE}};
    struct history history;
    struct worker worker;
    history_create(&history, &shape, 600, 12);
    worker_open(&worker, daemon->sockets, &shape, 1, 601);
    worker_append(&worker, &history, 0, 600);
    worker_wait_idle(&worker);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        check_share(&worker, &history, 600, 0, &ends[i], true);
    worker_close(&worker);
    history_destroy(&history);
}

// Values are never judged: NaN, infinities and subnormal numbers come back as they went in.
static void any_value_bits(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {1, 2, 2, 32, ICE_FP32};
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    uint64_t random = 3;
    history_create(&history, &shape, 500, 13);
    for (size_t i = 0; i + 8 <= history.side_bytes; i += 8) {
        uint64_t bits = random_next(&random);
        memcpy(history.values + i, &bits, sizeof bits);
    }
    worker_open(&worker, daemon->sockets, &shape, 1, 500);
    worker_append(&worker, &history, 0, 500);
    worker_wait_idle(&worker);
    retrieve_init(&retrieve, &worker, &history, 0, 499, 1);
    retrieve_ends(&retrieve, 500, 0, 0);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 0, &history, 500);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- decoding ----

// Tokens one at a time, riding along with the retrieve of their layer, over several insertions and page splits.
static void decode_insertions(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {2, 2, 4, 64, ICE_BF16};
    const uint64_t prefill = 1000, steps = scaled_count(330, 1500);
    struct history history;
    struct worker worker;
    struct ice_sequence_info before, after;
    history_create(&history, &shape, prefill + steps, 17);
    worker_open(&worker, daemon->sockets, &shape, 1, (uint32_t)(prefill + steps + 1));
    worker_append(&worker, &history, 0, prefill);
    sequence_wait_idle(worker.sequence, &before);
    for (uint64_t step = 0; step < steps; step++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, &worker, &history, layer, prefill + step, 1);
            retrieve_ride(&retrieve, &history);
            retrieve_ends(&retrieve, (uint32_t)(prefill + step + 1), 0, 0);
            assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
            if (step % 10 == 0 || step + 1 == steps)
                landing_check_all(worker.landing, 0, layer, &history, prefill + step + 1);
            retrieve_fini(&retrieve);
        }
    }
    sequence_wait_idle(worker.sequence, &after);
    assert_int_equal(after.length, prefill + steps);
    assert_int_equal(after.length_min, prefill + steps);
    assert_true(after.indexed_min > before.indexed_min + 64); // insertions have run
    check_everything(&worker, &history, prefill + steps, 0);
    worker_close(&worker);
    history_destroy(&history);
}

// A long append, and retrieves without a pause until the clustering behind it has ended.
static void while_clustering_runs(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {2, 2, 4, 64, ICE_FP16};
    const uint32_t length = scaled_count(6000, 20000);
    struct history history;
    struct worker worker;
    uint32_t running = 0;
    history_create(&history, &shape, length, 19);
    worker_open(&worker, daemon->sockets, &shape, 1, length);
    worker_append(&worker, &history, 0, length);
    for (bool idle = false; !idle;) {
        struct ice_sequence_info info;
        struct retrieve retrieve;
        assert_ok(ice_sequence_info(worker.sequence, 0, &info));
        idle = info.idle;
        running += !idle;
        retrieve_init(&retrieve, &worker, &history, running % 2, length - 1, 1);
        retrieve_ends(&retrieve, length - 80, 16, 64);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        landing_check_all(worker.landing, 0, running % 2, &history, length);
        retrieve_fini(&retrieve);
    }
    assert_true(running > 0);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- several query positions ----

static void several_query_positions(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {1, 2, 4, 32, ICE_BF16};
    static const struct {
        uint64_t first;
        uint32_t queries;
    } cases[] = {{599, 1}, {592, 8}, {400, 200}, {500, 3}, {0, 1}, {0, 7}, {255, 2}, {344, 256}};
    struct history history;
    struct worker worker;
    history_create(&history, &shape, 600, 23);
    worker_open(&worker, daemon->sockets, &shape, 1, 600);
    worker_append(&worker, &history, 0, 600);
    for (int idle = 0; idle < 2; idle++) {
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            struct retrieve retrieve;
            uint64_t visible = cases[i].first + cases[i].queries; // nothing behind the last query is seen
            retrieve_init(&retrieve, &worker, &history, 0, cases[i].first, cases[i].queries);
            retrieve_ends(&retrieve, 520, 16, 64);
            assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
            landing_check_all(worker.landing, 0, 0, &history, visible);
            retrieve_fini(&retrieve);
        }
        worker_wait_idle(&worker);
    }
    worker_close(&worker);
    history_destroy(&history);
}

// Chunks whose K and V ride along: each sees all before it and itself.
static void chunked_prefill(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape shape = {1, 2, 4, 32, ICE_BF16};
    struct history history;
    struct worker worker;
    history_create(&history, &shape, 700, 29);
    worker_open(&worker, daemon->sockets, &shape, 1, 700);
    for (uint64_t first = 0; first < 700; first += 100) {
        struct retrieve retrieve;
        retrieve_init(&retrieve, &worker, &history, 0, first, 100);
        retrieve_ride(&retrieve, &history);
        retrieve_ends(&retrieve, 700, 0, 0);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        landing_check_all(worker.landing, 0, 0, &history, first + 100);
        retrieve_fini(&retrieve);
    }
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(every_length),
        DAEMON_TEST(every_dtype_and_head_dim),
        DAEMON_TEST(attention_is_full_attention),
        DAEMON_TEST(ends_alone_have_all_the_mass),
        DAEMON_TEST(any_value_bits),
        DAEMON_TEST(decode_insertions),
        DAEMON_TEST(while_clustering_runs),
        DAEMON_TEST(several_query_positions),
        DAEMON_TEST(chunked_prefill),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
