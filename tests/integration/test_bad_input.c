// Bad input through the client library: each with its own status and text, and without effect.
#include "worker.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 400, SLOTS = 300 };

struct bench {
    struct history history;
    struct worker worker;
    struct ice_sequence_info info; // before the bad input
};

static void bench_open(struct bench *bench, const struct daemon *daemon, const struct shape *of)
{
    history_create(&bench->history, of, LENGTH + 100, 71);
    worker_open(&bench->worker, daemon->sockets, of, 1, SLOTS);
    worker_append(&bench->worker, &bench->history, 0, LENGTH);
    sequence_wait_idle(bench->worker.sequence, &bench->info);
}

// Nothing has changed, and the service goes on.
static void bench_check(struct bench *bench)
{
    struct ice_sequence_info info;
    struct retrieve retrieve;
    sequence_wait_idle(bench->worker.sequence, &info);
    assert_int_equal(info.length, LENGTH);
    assert_int_equal(info.length_min, LENGTH);
    assert_int_equal(info.indexed_min, bench->info.indexed_min);
    assert_int_equal(info.pages, bench->info.pages);
    assert_int_equal(info.pool_bytes, bench->info.pool_bytes);
    assert_int_equal(info.index_bytes, bench->info.index_bytes);
    for (uint32_t layer = 0; layer < bench->worker.shape.layers; layer++) {
        retrieve_init(&retrieve, &bench->worker, &bench->history, layer, LENGTH - 1, 1);
        assert_ok(ice_retrieve(bench->worker.client, &retrieve.options, NULL));
        landing_check(bench->worker.landing, 0, layer, &bench->history, SLOTS, LENGTH);
        retrieve_fini(&retrieve);
    }
}

static void bench_close(struct bench *bench)
{
    worker_close(&bench->worker);
    history_destroy(&bench->history);
}

// ---- appends ----

static void positions(void **state)
{
    struct bench bench;
    bench_open(&bench, *state, &shape);
    ice_sequence *sequence = bench.worker.sequence;
    uint64_t length = 0;
    struct ice_kv_source source = history_source(&bench.history, ICE_ALL_LAYERS, LENGTH + 1);
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH + 1, 10, &source, 0, &length), ICE_POSITION_GAP,
                   "append the missing positions first");
    assert_int_equal(length, LENGTH);
    source = history_source(&bench.history, 1, LENGTH + 1);
    assert_refused(ice_append(sequence, 1, LENGTH + 1, 10, &source, 0, NULL), ICE_POSITION_GAP,
                   "starts at position 401");
    source = history_source(&bench.history, ICE_ALL_LAYERS, 0);
    assert_refused(ice_append(sequence, 2, 0, 10, &source, 0, NULL), ICE_UNKNOWN_LAYER, "layer 2");
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, 0, 0, &source, 0, NULL), ICE_INVALID_ARGUMENT, "n is 0");
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, UINT64_MAX, 1, &source, 0, NULL), ICE_TOO_LARGE, "tokens");
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, 0, UINT64_MAX, &source, 0, NULL), ICE_TOO_LARGE, "tokens");
    bench_check(&bench);
    bench_close(&bench);
}

// The same bytes over old positions: accepted, without effect, indexed or not, all or a part.
static void an_equal_append_again(void **state)
{
    struct bench bench;
    bench_open(&bench, *state, &shape);
    static const struct {
        uint64_t first, n;
    } ranges[] = {{0, LENGTH}, {0, 1}, {LENGTH - 1, 1}, {250, 20}, {100, 300}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        uint64_t length = 0;
        const struct ice_kv_source source = history_source(&bench.history, ICE_ALL_LAYERS, ranges[i].first);
        assert_ok(ice_append(bench.worker.sequence, ICE_ALL_LAYERS, ranges[i].first, ranges[i].n, &source, 0, &length));
        assert_int_equal(length, LENGTH);
    }
    bench_check(&bench);
    bench_close(&bench);
}

// Other bytes over old positions: refused, and what is new in the same append is not taken either.
static void a_different_append_over_old_positions(void **state)
{
    struct bench bench;
    bench_open(&bench, *state, &shape);
    static const uint64_t bad[] = {0, 100, 255, 256, LENGTH - 1};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        for (uint32_t lane = 0; lane < 4; lane++) {
            uint8_t *bytes = i % 2 ? history_key(&bench.history, lane / 2, lane % 2, bad[i])
                                   : history_value(&bench.history, lane / 2, lane % 2, bad[i]);
            const struct ice_kv_source source = history_source(&bench.history, ICE_ALL_LAYERS, 0);
            uint64_t length = 0;
            bytes[77] ^= 0x10;
            assert_refused(ice_append(bench.worker.sequence, ICE_ALL_LAYERS, 0, LENGTH + 50, &source, 0, &length),
                           ICE_CONFLICT, "cannot be rewritten");
            assert_non_null(strstr(ice_last_error(), "KV head "));
            assert_int_equal(length, LENGTH);
            bytes[77] ^= 0x10;
        }
    }
    bench_check(&bench);
    bench_close(&bench);
}

static void strides_that_leave_the_buffer(void **state)
{
    struct bench bench;
    bench_open(&bench, *state, &shape);
    ice_sequence *sequence = bench.worker.sequence;
    const struct ice_kv_source good = history_source(&bench.history, ICE_ALL_LAYERS, LENGTH);
    struct ice_kv_source source = good;
    source.keys_bytes = good.layer_stride + good.head_stride + 9 * good.token_stride + shape_row_bytes(&shape) - 1;
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH, 10, &source, 0, NULL), ICE_OUT_OF_BOUNDS, "of keys");
    source = good;
    source.values_bytes = 100;
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH, 10, &source, 0, NULL), ICE_OUT_OF_BOUNDS, "of values");
    source = good;
    source.layer_stride *= 2;
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH, 10, &source, 0, NULL), ICE_OUT_OF_BOUNDS, "layer 1");
    source = good;
    source.token_stride = SIZE_MAX / 4;
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH, 10, &source, 0, NULL), ICE_OUT_OF_BOUNDS, "strides");
    source = good;
    source.keys = NULL;
    assert_refused(ice_append(sequence, ICE_ALL_LAYERS, LENGTH, 10, &source, 0, NULL), ICE_INVALID_ARGUMENT, "keys");
    uint8_t room[1024];
    struct ice_kv_target target = {room, room, sizeof room, sizeof room, 512, 128, 128};
    assert_refused(ice_read(sequence, 0, 0, 9, &target, 0), ICE_OUT_OF_BOUNDS, "which has 1024");
    target.token_stride = 64;
    assert_refused(ice_read(sequence, 0, 0, 4, &target, 0), ICE_INVALID_ARGUMENT, "stride");
    target.token_stride = 128;
    target.head_stride = 512;
    assert_refused(ice_read(sequence, 0, LENGTH - 3, 4, &target, 0), ICE_OUT_OF_BOUNDS, "the length is 400");
    assert_refused(ice_read(sequence, 9, 0, 4, &target, 0), ICE_UNKNOWN_LAYER, "layer 9");
    bench_check(&bench);
    bench_close(&bench);
}

// ---- numbers that are none ----

// One bad element of one key of one lane: the whole append is refused, in every lane.
static void bad_keys(void **state)
{
    static const struct {
        ice_dtype dtype;
        float value;
    } cases[] = {{ICE_BF16, NAN},       {ICE_BF16, INFINITY}, {ICE_FP16, -INFINITY}, {ICE_FP32, NAN},
                 {ICE_FP32, -INFINITY}, {ICE_FP32, 1e30f},    {ICE_BF16, 1e30f}};
    static const uint16_t half_infinity = 0xfc00;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct shape of = {2, 2, 4, 64, cases[i].dtype};
        struct bench bench;
        uint64_t length = 0;
        bench_open(&bench, *state, &of);
        uint8_t *key = history_key(&bench.history, 1, 1, LENGTH + 40);
        if (cases[i].dtype == ICE_FP16)
            memcpy(key + 20, &half_infinity, sizeof half_infinity);
        else
            vector_encode(&cases[i].value, 1, cases[i].dtype, key + 20);
        const struct ice_kv_source source = history_source(&bench.history, ICE_ALL_LAYERS, LENGTH);
        assert_refused(ice_append(bench.worker.sequence, ICE_ALL_LAYERS, LENGTH, 50, &source, 0, &length),
                       ICE_NOT_FINITE, "too large to square");
        assert_int_equal(length, LENGTH);
        bench_check(&bench);
        bench_close(&bench);
    }
}

// Of the queries, or of the step's K that ride along: then the step is not appended.
static void bad_queries(void **state)
{
    struct bench bench;
    struct retrieve retrieve;
    bench_open(&bench, *state, &shape);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (uint32_t head = 0; head < 4; head++) {
        for (int ride = 0; ride < 2; ride++) {
            retrieve_init(&retrieve, &bench.worker, &bench.history, 0, ride ? LENGTH : LENGTH - 1, 1);
            if (ride)
                retrieve_ride(&retrieve, &bench.history);
            vector_encode(&bad[head % 3], 1, ICE_BF16, retrieve.queries + head * shape_row_bytes(&shape) + 4);
            assert_refused(ice_retrieve(bench.worker.client, &retrieve.options, NULL), ICE_NOT_FINITE, "query");
            retrieve_fini(&retrieve);
        }
    }
    for (uint32_t head = 0; head < 2; head++) {
        retrieve_init(&retrieve, &bench.worker, &bench.history, 1, LENGTH, 1);
        retrieve_ride(&retrieve, &bench.history);
        vector_encode(&bad[head], 1, ICE_BF16, retrieve.keys + head * shape_row_bytes(&shape));
        assert_refused(ice_retrieve(bench.worker.client, &retrieve.options, NULL), ICE_NOT_FINITE, "key");
        retrieve_fini(&retrieve);
    }
    bench_check(&bench);
    bench_close(&bench);
}

// Large but finite: scores overflow nothing.
static void large_numbers(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape single = {1, 1, 1, 16, ICE_FP32};
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct ice_retrieve_result result;
    history_create(&history, &single, 700, 73);
    for (uint64_t position = 0; position < 700; position += 3) {
        float large[16] = {0};
        large[position % 16] = position % 2 ? 1e15f : -1e15f;
        memcpy(history_key(&history, 0, 0, position), large, sizeof large);
    }
    worker_open(&worker, daemon->sockets, &single, 1, SLOTS);
    worker_append(&worker, &history, 0, 700);
    worker_wait_idle(&worker);
    retrieve_init(&retrieve, &worker, &history, 0, 699, 1);
    ice_status status = ice_retrieve(worker.client, &retrieve.options, &result);
    assert_ok(status);
    assert_true(result.masses[0] >= 0 && result.masses[0] <= 1.001f);
    landing_check(worker.landing, 0, 0, &history, SLOTS, 700);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- retrieves ----

static void retrieves(void **state)
{
    struct bench bench;
    struct retrieve retrieve;
    bench_open(&bench, *state, &shape);
    ice_client *client = bench.worker.client;
    retrieve_init(&retrieve, &bench.worker, &bench.history, 0, LENGTH - 1, 1);
    const struct ice_retrieve_options good = retrieve.options;
    struct ice_retrieve_options options = good;
    options.budget = 0;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_INVALID_ARGUMENT, "budget is 0");
    options.budget = UINT32_MAX;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_TOO_LARGE, "budget 4294967295");
    options.budget = SLOTS - 79;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_TOO_LARGE, "need 301 slots, the landing has 300");
    options = good;
    options.layer = 2;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_UNKNOWN_LAYER, "layer 2");
    options = good;
    options.query_dtype = (ice_dtype)8;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_INVALID_ARGUMENT, "query_dtype");
    options = good;
    options.coverage = 2.0f;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_INVALID_ARGUMENT, "coverage");
    options = good;
    options.sequence_count = 0;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_INVALID_ARGUMENT, "sequence_count");
    options = good;
    options.queries = 300;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_TOO_LARGE, "queries is 300");
    options = good;
    options.keys = &options;
    assert_refused(ice_retrieve(client, &options, NULL), ICE_INVALID_ARGUMENT, "both or none");
    retrieve.row = 1;
    assert_refused(ice_retrieve(client, &good, NULL), ICE_INVALID_ARGUMENT, "landing has 1 rows");
    retrieve.row = 0;
    retrieve.first = LENGTH;
    assert_refused(ice_retrieve(client, &good, NULL), ICE_POSITION_GAP, "position 400");
    retrieve.first = UINT64_MAX;
    assert_refused(ice_retrieve(client, &good, NULL), ICE_TOO_LARGE, "first_queries");
    retrieve_fini(&retrieve);
    // A step that rides along must come next, too.
    retrieve_init(&retrieve, &bench.worker, &bench.history, 0, LENGTH + 1, 1);
    retrieve_ride(&retrieve, &bench.history);
    assert_refused(ice_retrieve(client, &retrieve.options, NULL), ICE_POSITION_GAP, "append the missing");
    retrieve_fini(&retrieve);
    bench_check(&bench);
    bench_close(&bench);
}

// Landings and sequences whose shapes differ.
static void mismatches(void **state)
{
    struct bench bench;
    struct retrieve retrieve;
    bench_open(&bench, *state, &shape);
    const struct shape others[] = {{2, 1, 4, 64, ICE_BF16}, {2, 2, 4, 80, ICE_BF16}, {2, 2, 4, 64, ICE_FP16}};
    for (size_t i = 0; i < 3; i++) {
        ice_landing *landing = landing_open(bench.worker.client, &others[i], 1, SLOTS);
        retrieve_init(&retrieve, &bench.worker, &bench.history, 0, LENGTH - 1, 1);
        retrieve.options.landing = landing;
        assert_refused(ice_retrieve(bench.worker.client, &retrieve.options, NULL), ICE_SHAPE_MISMATCH, "the landing");
        retrieve_fini(&retrieve);
        ice_landing_close(landing);
    }
    bench_check(&bench);
    bench_close(&bench);
}

// ---- opening ----

static void sequence_options_refused(void **state)
{
    const struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    const struct ice_sequence_options good = sequence_options(&shape);
    const uint32_t later[] = {1, 1}, selves[] = {0, 1};
    ice_sequence *sequence = NULL;
    struct ice_sequence_options options = good;
    options.anchor_layers = later;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT,
                   "a layer follows an earlier one");
    options = good;
    options.head_dim = 72;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "head_dim 72");
    options.head_dim = 512;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_TOO_LARGE, "head_dim is 512");
    options = good;
    options.dtype = (ice_dtype)5;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "dtype 5");
    options = good;
    options.query_heads = 3;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "query_heads 3");
    options = good;
    options.model_digest = NULL;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "model_digest");
    options = good;
    options.name_space = "new\nline";
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "printable");
    options = good;
    options.softmax_scale = NAN;
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_INVALID_ARGUMENT, "softmax_scale");
    assert_null(sequence);
    options = good;
    options.anchor_layers = selves;
    assert_ok(ice_sequence_open(client, &options, 0, &sequence));
    ice_sequence_close(sequence);
    ice_client_close(client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(positions),
        DAEMON_TEST(an_equal_append_again),
        DAEMON_TEST(a_different_append_over_old_positions),
        DAEMON_TEST(strides_that_leave_the_buffer),
        DAEMON_TEST(bad_keys),
        DAEMON_TEST(bad_queries),
        DAEMON_TEST(large_numbers),
        DAEMON_TEST(retrieves),
        DAEMON_TEST(mismatches),
        DAEMON_TEST(sequence_options_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
