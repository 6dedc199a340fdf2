// Appends from GPU memory, real processes: layouts, streams, refusals. Runs over the fake driver, and over the real one
// where ICECACHE_TEST_GPU=real.
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {3, 2, 4, 64, ICE_BF16};
enum { LENGTH = 900, SLOTS = 928, PAD = 96 };

static struct history history;

// K and V of the whole history on the GPU. token_major: [layer, token, KV head, head_dim] with padding behind each
// token where it is wanted, else as the history has it: [layer, KV head, token, head_dim].
struct copy {
    cuda_address keys, values;
    struct ice_kv_source source;
    uint64_t bytes;
};

static void copy_create(struct copy *copy, bool token_major, size_t padding)
{
    size_t row = shape_row_bytes(&shape), token = shape.kv_heads * row + padding;
    copy->bytes = token_major ? shape.layers * LENGTH * token : history.side_bytes;
    uint8_t *sides[2];
    for (int i = 0; i < 2; i++) {
        const uint8_t *from = i ? history.values : history.keys;
        sides[i] = calloc(1, copy->bytes);
        assert_non_null(sides[i]);
        if (!token_major)
            memcpy(sides[i], from, copy->bytes);
        for (uint32_t lane = 0; token_major && lane < shape.layers * shape.kv_heads; lane++) {
            for (uint32_t t = 0; t < LENGTH; t++)
                memcpy(sides[i] + (lane / shape.kv_heads * (size_t)LENGTH + t) * token + lane % shape.kv_heads * row,
                       from + ((size_t)lane * LENGTH + t) * row, row);
        }
    }
    copy->keys = memory_alloc(copy->bytes);
    copy->values = memory_alloc(copy->bytes);
    assert_int_equal(memory_driver()->copy_to_device_waiting(copy->keys, sides[0], copy->bytes), CUDA_OK);
    assert_int_equal(memory_driver()->copy_to_device_waiting(copy->values, sides[1], copy->bytes), CUDA_OK);
    free(sides[0]);
    free(sides[1]);
    copy->source = (struct ice_kv_source){
        .keys = (const void *)(uintptr_t)copy->keys,
        .values = (const void *)(uintptr_t)copy->values,
        .keys_bytes = copy->bytes,
        .values_bytes = copy->bytes,
        .layer_stride = token_major ? LENGTH * token : shape.kv_heads * LENGTH * row,
        .token_stride = token_major ? token : row,
        .head_stride = token_major ? row : LENGTH * row,
    };
}

static void copy_destroy(struct copy *copy)
{
    memory_free(copy->keys);
    memory_free(copy->values);
}

// From a layer and token on.
static struct ice_kv_source source_at(const struct copy *copy, uint32_t layer, uint64_t first)
{
    struct ice_kv_source source = copy->source;
    size_t offset = layer * source.layer_stride + (size_t)first * source.token_stride;
    source.keys = (const uint8_t *)source.keys + offset;
    source.values = (const uint8_t *)source.values + offset;
    source.keys_bytes -= offset;
    source.values_bytes -= offset;
    return source;
}

// What the daemon holds is the history, bit for bit.
static void expect_stored(const struct worker *worker)
{
    uint8_t *keys = malloc(history.side_bytes), *values = malloc(history.side_bytes);
    const struct ice_kv_source layout = history_source(&history, ICE_ALL_LAYERS, 0);
    const struct ice_kv_target target = {
        .keys = keys,
        .values = values,
        .keys_bytes = layout.keys_bytes,
        .values_bytes = layout.values_bytes,
        .layer_stride = layout.layer_stride,
        .token_stride = layout.token_stride,
        .head_stride = layout.head_stride,
    };
    assert_ok(ice_read(worker->sequence, ICE_ALL_LAYERS, 0, LENGTH, &target, 0));
    assert_memory_equal(keys, history.keys, history.side_bytes);
    assert_memory_equal(values, history.values, history.side_bytes);
    free(keys);
    free(values);
}

static void open_worker(struct worker *worker, const struct daemon *daemon, uint64_t staging_bytes)
{
    *worker = (struct worker){.shape = shape, .rows = 1, .slots = SLOTS};
    worker->client = client_connect(daemon->sockets, TEST_DEADLINE_US, staging_bytes);
    worker->landing = landing_open(worker->client, &shape, 1, SLOTS);
    worker->sequence = sequence_open(worker->client, &shape);
}

// Layouts, with a staging area for all of it and one for few tokens; all layers at once, and each for itself in pieces.
static void every_layout(void **state)
{
    struct daemon *daemon = *state;
    static const struct {
        bool token_major;
        size_t padding;
    } layouts[] = {{true, 0}, {true, PAD}, {false, 0}};
    for (size_t i = 0; i < 2 * sizeof layouts / sizeof *layouts; i++) {
        struct copy copy;
        struct worker worker;
        uint64_t length = 0;
        copy_create(&copy, layouts[i / 2].token_major, layouts[i / 2].padding);
        open_worker(&worker, daemon, i % 2 ? 128 << 10 : 4 << 20);
        const struct ice_kv_source head = source_at(&copy, 0, 0);
        assert_ok(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, 500, &head, NULL, 0, &length));
        assert_int_equal(length, 500);
        cuda_stream stream;
        assert_int_equal(memory_driver()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING, 0), CUDA_OK);
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            for (uint64_t first = 500; first < LENGTH; first += 133) {
                uint64_t n = first + 133 < LENGTH ? 133 : LENGTH - first;
                const struct ice_kv_source source = source_at(&copy, layer, first);
                assert_ok(ice_append_gpu(worker.sequence, layer, first, n, &source, stream, 0, &length));
                assert_int_equal(length, first + n);
            }
        }
        expect_stored(&worker);
        // Again: compared with what is stored, byte for byte.
        assert_ok(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, LENGTH, &copy.source, stream, 0, &length));
        memory_fill(copy.values + 3 * copy.source.layer_stride / 2, 0x11, 64);
        assert_status(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, LENGTH, &copy.source, stream, 0, &length),
                      ICE_CONFLICT);
        struct retrieve retrieve;
        retrieve_init(&retrieve, &worker, &history, 1, LENGTH - 1, 1);
        retrieve_ends(&retrieve, LENGTH, 0, 0);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        landing_check_all(worker.landing, 0, 1, &history, LENGTH);
        retrieve_fini(&retrieve);
        assert_int_equal(memory_driver()->stream_destroy(stream), CUDA_OK);
        worker_close(&worker);
        copy_destroy(&copy);
    }
}

// Strides of dimensions that have one element are not looked at; V on another GPU is.
static void strides_that_say_nothing(void **state)
{
    struct daemon *daemon = *state;
    struct copy copy;
    struct worker worker;
    uint64_t length = 0;
    copy_create(&copy, false, 0);
    open_worker(&worker, daemon, 4 << 20);
    for (uint64_t first = 0; first < 40; first++) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct ice_kv_source source = source_at(&copy, layer, first);
            source.token_stride = 7 + first;
            source.layer_stride = 3;
            assert_ok(ice_append_gpu(worker.sequence, layer, first, 1, &source, NULL, 0, &length));
            assert_int_equal(length, first + 1);
        }
    }
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 1, 39, 1);
    retrieve_ends(&retrieve, 40, 0, 0);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 1, &history, 40);
    retrieve_fini(&retrieve);
    struct ice_kv_source source = source_at(&copy, 0, 40);
    source.values = &length; // host memory
    assert_refused(ice_append_gpu(worker.sequence, 0, 40, 1, &source, NULL, 0, &length), ICE_INVALID_ARGUMENT,
                   "not in GPU memory");
    worker_close(&worker);
    copy_destroy(&copy);
}

// What is in the stream before the append is done first: here the fill that makes half of the keys.
static void behind_what_is_in_the_stream(void **state)
{
    struct daemon *daemon = *state;
    struct copy copy;
    struct worker worker;
    cuda_stream stream;
    copy_create(&copy, true, 0);
    open_worker(&worker, daemon, 4 << 20);
    assert_int_equal(memory_driver()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING, 0), CUDA_OK);
    for (uint32_t round = 0; round < 20; round++) {
        unsigned char value = (unsigned char)(round + 1);
        size_t row = shape.kv_heads * shape_row_bytes(&shape);
        assert_int_equal(memory_driver()->fill(copy.keys, value, copy.bytes, stream), CUDA_OK);
        const struct ice_kv_source source = source_at(&copy, 0, 0);
        assert_ok(ice_append_gpu(worker.sequence, 0, round, 1, &source, stream, 0, NULL));
        uint8_t key[2 * 64 * 2], stored[2][2 * 64 * 2];
        memset(key, value, sizeof key);
        assert_int_equal(row, sizeof key);
        const struct ice_kv_target target = {.keys = stored[0],
                                             .values = stored[1],
                                             .keys_bytes = row,
                                             .values_bytes = row,
                                             .layer_stride = row,
                                             .token_stride = row,
                                             .head_stride = shape_row_bytes(&shape)};
        assert_ok(ice_read(worker.sequence, 0, round, 1, &target, 0));
        assert_memory_equal(stored[0], key, sizeof key);
    }
    assert_int_equal(memory_driver()->stream_destroy(stream), CUDA_OK);
    worker_close(&worker);
    copy_destroy(&copy);
}

static void refusals(void **state)
{
    struct daemon *daemon = *state;
    struct copy copy;
    struct worker worker;
    copy_create(&copy, true, 0);
    open_worker(&worker, daemon, 4 << 20);
    size_t row = shape_row_bytes(&shape);
    struct ice_kv_source source = copy.source;
    source.head_stride = 2 * row;
    source.token_stride = 4 * row;
    assert_refused(ice_append_gpu(worker.sequence, 0, 0, 10, &source, NULL, 0, NULL), ICE_NOT_SUPPORTED, "contiguous");
    source = copy.source;
    source.token_stride = row;
    assert_refused(ice_append_gpu(worker.sequence, 0, 0, 10, &source, NULL, 0, NULL), ICE_INVALID_ARGUMENT,
                   "token_stride");
    source = copy.source;
    source.keys_bytes = 10;
    assert_refused(ice_append_gpu(worker.sequence, 0, 0, 10, &source, NULL, 0, NULL), ICE_OUT_OF_BOUNDS, "keys");
    source = history_source(&history, ICE_ALL_LAYERS, 0);
    assert_refused(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, 10, &source, NULL, 0, NULL), ICE_INVALID_ARGUMENT,
                   "not in GPU memory");
    assert_refused(ice_append_gpu(worker.sequence, 0, 0, 10, NULL, NULL, 0, NULL), ICE_INVALID_ARGUMENT, "source");
    assert_refused(ice_append_gpu(NULL, 0, 0, 10, &source, NULL, 0, NULL), ICE_INVALID_ARGUMENT, "sequence");
    assert_ok(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, LENGTH, &copy.source, NULL, 0, NULL));
    expect_stored(&worker);
    worker_close(&worker);
    copy_destroy(&copy);
}

// Every entry point that an append needs fails (fake driver): an error with a text, and the next append is right.
static void entries_fail(void **state)
{
    struct daemon *daemon = *state;
    static const char *const symbols[] = {
        "cuPointerGetAttribute",
        "cuDeviceGet",
        "cuDeviceGetUuid",
        "cuDeviceGetName",
        "cuStreamCreateWithPriority",
        "cuEventCreate",
        "cuCtxPushCurrent",
        "cuMemHostRegister",
        "cuMemcpy2DAsync",
    };
    if (!memory_is_fake())
        skip();
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        char line[128];
        struct copy copy;
        struct worker worker;
        copy_create(&copy, true, 0);
        open_worker(&worker, daemon, 4 << 20);
        snprintf(line, sizeof line, "test_gpu_append %s 999", symbols[i]);
        memory_fail(line);
        ice_status status = ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, 50, &copy.source, NULL, 0, NULL);
        memory_fail(NULL);
        assert_true(status == ICE_SYSTEM || status == ICE_INVALID_ARGUMENT);
        assert_string_not_equal(ice_last_error(), "");
        assert_ok(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, LENGTH, &copy.source, NULL, 0, NULL));
        expect_stored(&worker);
        worker_close(&worker);
        copy_destroy(&copy);
    }
}

// A stream that does not end: the call does, and the half of the staging that may still be written to is not used
// again.
static void a_stream_that_does_not_end(void **state)
{
    struct daemon *daemon = *state;
    struct copy copy;
    struct worker worker;
    if (!memory_is_fake())
        skip();
    copy_create(&copy, true, 0);
    open_worker(&worker, daemon, 4 << 20);
    memory_fail("test_gpu_append cuEventQuery 600");
    assert_refused(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, 50, &copy.source, NULL, 100000, NULL),
                   ICE_TIMEOUT, "has not ended");
    memory_fail(NULL);
    assert_ok(ice_append_gpu(worker.sequence, ICE_ALL_LAYERS, 0, LENGTH, &copy.source, NULL, 0, NULL));
    expect_stored(&worker);
    worker_close(&worker);
    copy_destroy(&copy);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 79);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(every_layout),
        DAEMON_TEST(strides_that_say_nothing),
        DAEMON_TEST(behind_what_is_in_the_stream),
        DAEMON_TEST(refusals),
        DAEMON_TEST(entries_fail),
        DAEMON_TEST(a_stream_that_does_not_end),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
