// Queries, and the step's K and V, from GPU memory, real processes: the same answer as from host memory, streams,
// refusals. Runs over the fake driver, and over the real one where ICECACHE_TEST_GPU=real.
#include "memory.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {3, 2, 4, 64, ICE_BF16};
enum { LENGTH = 900, SLOTS = 960, ROWS = 2 };

static struct history history;

// What a retrieve's options point to, on the GPU.
struct on_gpu {
    cuda_address queries, keys, values;
    size_t query_bytes, side_bytes;
};

static cuda_address upload(const void *from, size_t bytes)
{
    cuda_address to = memory_alloc(bytes);
    assert_int_equal(memory_driver()->copy_to_device_waiting(to, from, bytes), CUDA_OK);
    return to;
}

static const void *pointer(cuda_address address)
{
    return (const void *)(uintptr_t)address;
}

// Moves the vectors of the options to the GPU.
static void move(struct on_gpu *moved, struct retrieve *retrieve)
{
    size_t row = shape_row_bytes(&shape), n = retrieve->options.queries;
    *moved = (struct on_gpu){.query_bytes = n * shape.query_heads * row, .side_bytes = n * shape.kv_heads * row};
    moved->queries = upload(retrieve->queries, moved->query_bytes);
    retrieve->options.query_vectors = pointer(moved->queries);
    if (retrieve->keys) {
        moved->keys = upload(retrieve->keys, moved->side_bytes);
        moved->values = upload(retrieve->values, moved->side_bytes);
        retrieve->options.keys = pointer(moved->keys);
        retrieve->options.values = pointer(moved->values);
    }
}

static void drop(struct on_gpu *moved)
{
    memory_free(moved->queries);
    if (moved->keys) {
        memory_free(moved->keys);
        memory_free(moved->values);
    }
}

static cuda_stream stream_create(void)
{
    cuda_stream stream = NULL;
    assert_int_equal(memory_driver()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING, 0), CUDA_OK);
    return stream;
}

// The landing's rows hold the same, byte for byte: counts, positions, K and V.
static void expect_equal_rows(const struct worker *worker, uint32_t layer, const uint32_t *counts)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    uint8_t *blocks[2];
    size_t row_bytes = shape_row_bytes(&shape), side = SLOTS * row_bytes;
    for (uint32_t row = 0; row < 2; row++) {
        blocks[row] = malloc(gpu.layer_bytes);
        assert_non_null(blocks[row]);
        memory_read(blocks[row], gpu.address + (row * shape.layers + layer) * gpu.layer_bytes, gpu.layer_bytes);
        assert_memory_equal(blocks[row] + gpu.counts_offset, counts, shape.kv_heads * sizeof *counts);
    }
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        size_t keys = head * 2 * side, positions = gpu.positions_offset + head * SLOTS * sizeof(uint32_t);
        assert_memory_equal(blocks[0] + keys, blocks[1] + keys, counts[head] * row_bytes);
        assert_memory_equal(blocks[0] + keys + side, blocks[1] + keys + side, counts[head] * row_bytes);
        assert_memory_equal(blocks[0] + positions, blocks[1] + positions, counts[head] * sizeof(uint32_t));
    }
    free(blocks[0]);
    free(blocks[1]);
}

// Selections by queries in host memory and on the GPU are the same: of one query and of several, in all layers, on the
// default stream and another, by push and by pull.
static void the_same_as_from_host_memory(void **state)
{
    struct daemon *daemon = *state;
    cuda_stream stream = stream_create();
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = mode});
        worker_append(&worker, &history, 0, LENGTH);
        worker_wait_idle(&worker);
        for (uint32_t round = 0; round < 12; round++) {
            struct retrieve retrieve;
            struct ice_retrieve_result results[2];
            uint32_t layer = round % shape.layers, counts[2];
            float masses[2];
            retrieve_init(&retrieve, &worker, &history, layer, LENGTH - 40 - round, 1 + round % 3);
            retrieve_ends(&retrieve, 40, 4, 8);
            retrieve.options.resend = true; // in order, in both rows
            assert_ok(ice_retrieve(worker.client, &retrieve.options, &results[0]));
            memcpy(counts, results[0].counts, sizeof counts);
            memcpy(masses, results[0].masses, sizeof masses);
            struct on_gpu moved;
            move(&moved, &retrieve);
            retrieve.row = 1;
            assert_ok(ice_retrieve_gpu(worker.client, &retrieve.options, round % 2 ? stream : NULL, &results[1]));
            assert_int_equal(results[1].head_count, shape.kv_heads);
            assert_memory_equal(results[1].counts, counts, sizeof counts);
            assert_memory_equal(results[1].masses, masses, sizeof masses);
            expect_equal_rows(&worker, layer, counts);
            drop(&moved);
            retrieve_fini(&retrieve);
        }
        worker_close(&worker);
    }
    assert_int_equal(memory_driver()->stream_destroy(stream), CUDA_OK);
}

// The step's K and V ride along; into a landing in host memory too, whose every slot can be compared. A layer that
// follows another has no queries.
static void keys_and_values_ride_along(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    static const uint32_t anchors[] = {0, 1, 0};
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    struct ice_sequence_options follows = sequence_options(&shape);
    follows.anchor_layers = anchors;
    ice_sequence_close(worker.sequence);
    assert_ok(ice_sequence_open(worker.client, &follows, 0, &worker.sequence));
    worker_append(&worker, &history, 0, LENGTH - 6);
    for (uint64_t first = LENGTH - 6; first < LENGTH; first += 3) {
        for (uint32_t layer = 0; layer < shape.layers; layer++) {
            struct retrieve retrieve;
            struct on_gpu moved;
            retrieve_init(&retrieve, &worker, &history, layer, first, 3);
            retrieve_ride(&retrieve, &history);
            retrieve_ends(&retrieve, LENGTH, 0, 0);
            move(&moved, &retrieve);
            if (anchors[layer] != layer)
                retrieve.options.query_vectors = NULL;
            ice_ticket *ticket = NULL;
            assert_ok(ice_retrieve_submit_gpu(worker.client, &retrieve.options, NULL, &ticket));
            drop(&moved); // all of it has been copied
            assert_ok(ice_retrieve_wait(ticket, 0, NULL));
            landing_check_all(worker.landing, 0, layer, &history, first + 3);
            ice_ticket_close(ticket);
            retrieve_fini(&retrieve);
        }
    }
    worker_check_content(&worker, &history, 0, LENGTH);
    worker_close(&worker);
}

// What makes the queries is in the stream when the call comes: here a fill. Its masses are those of the filled queries.
static void behind_what_is_in_the_stream(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    cuda_stream stream = stream_create();
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker); // or masses change meanwhile
    for (uint32_t round = 0; round < 20; round++) {
        struct retrieve retrieve;
        struct on_gpu moved;
        struct ice_retrieve_result result;
        float mass;
        int pattern = 0x3c + (int)(round % 3); // bf16 of about .01 to 3
        retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
        retrieve_ends(&retrieve, 20, 0, 0);
        move(&moved, &retrieve);
        memset(retrieve.queries, pattern, moved.query_bytes);
        assert_int_equal(memory_driver()->fill(moved.queries, (unsigned char)pattern, moved.query_bytes, stream),
                         CUDA_OK);
        assert_ok(ice_retrieve_gpu(worker.client, &retrieve.options, stream, &result));
        mass = result.masses[0];
        uint64_t digest = landing_digest(worker.landing, 0, 0, &shape);
        retrieve_point(&retrieve);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        assert_memory_equal(&mass, &result.masses[0], sizeof mass);
        assert_true(landing_digest(worker.landing, 0, 0, &shape) == digest);
        drop(&moved);
        retrieve_fini(&retrieve);
    }
    assert_int_equal(memory_driver()->stream_destroy(stream), CUDA_OK);
    worker_close(&worker);
}

static void refusals(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct retrieve retrieve;
    struct on_gpu moved;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PULL});
    worker_append(&worker, &history, 0, LENGTH - 1);
    retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
    retrieve_ride(&retrieve, &history);
    ice_ticket *ticket = NULL;
    assert_refused(ice_retrieve_submit_gpu(worker.client, &retrieve.options, NULL, &ticket), ICE_INVALID_ARGUMENT,
                   "options.query_vectors: address 0x");
    move(&moved, &retrieve);
    retrieve.options.values = retrieve.values;
    assert_refused(ice_retrieve_submit_gpu(worker.client, &retrieve.options, NULL, &ticket), ICE_INVALID_ARGUMENT,
                   "options.values: address 0x");
    retrieve.options.values = NULL;
    assert_refused(ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL), ICE_INVALID_ARGUMENT, "both");
    assert_refused(ice_retrieve_gpu(worker.client, NULL, NULL, NULL), ICE_INVALID_ARGUMENT, "options");
    assert_null(ticket);
    retrieve.options.values = pointer(moved.values);
    if (memory_is_fake()) {
        // Another GPU's memory, and a stream that is being captured.
        cuda_device other;
        cuda_context context, popped;
        cuda_stream stream = stream_create();
        assert_int_equal(memory_driver()->device_get(&other, 1), CUDA_OK);
        assert_int_equal(memory_driver()->primary_retain(&context, other), CUDA_OK);
        assert_int_equal(memory_driver()->context_push(context), CUDA_OK);
        cuda_address there = memory_alloc(moved.query_bytes);
        assert_int_equal(memory_driver()->context_pop(&popped), CUDA_OK);
        retrieve.options.query_vectors = pointer(there);
        assert_refused(ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL), ICE_INVALID_ARGUMENT,
                       "options.query_vectors is on GPU 1, the landing is on GPU 0");
        retrieve.options.query_vectors = pointer(moved.queries);
        memory_capture(stream, true);
        assert_refused(ice_retrieve_gpu(worker.client, &retrieve.options, stream, NULL), ICE_NOT_SUPPORTED,
                       "captured into a CUDA graph");
        memory_capture(stream, false);
        assert_ok(ice_retrieve_gpu(worker.client, &retrieve.options, stream, NULL));
        assert_int_equal(memory_driver()->context_push(context), CUDA_OK);
        memory_free(there);
        assert_int_equal(memory_driver()->context_pop(&popped), CUDA_OK);
        assert_int_equal(memory_driver()->stream_destroy(stream), CUDA_OK);
    }
    drop(&moved);
    retrieve_fini(&retrieve);
    worker_close(&worker);
}

// Every entry point that the copies need fails (fake driver): an error with a text and no row taken; then it works.
static void entries_fail(void **state)
{
    struct daemon *daemon = *state;
    static const char *const symbols[] = {
        "cuPointerGetAttribute",      "cuDeviceGet",     "cuDeviceGetUuid",  "cuDeviceGetName",
        "cuStreamCreateWithPriority", "cuEventCreate",   "cuCtxPushCurrent", "cuMemHostRegister",
        "cuStreamIsCapturing",        "cuMemcpy2DAsync", "cuEventRecord",    "cuEventQuery",
    };
    if (!memory_is_fake())
        skip();
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        char line[128];
        struct worker worker;
        struct retrieve retrieve;
        struct on_gpu moved;
        worker_open(&worker, daemon->sockets, &shape, ROWS, SLOTS);
        worker_append(&worker, &history, 0, LENGTH);
        retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
        retrieve_ends(&retrieve, LENGTH, 0, 0);
        move(&moved, &retrieve);
        snprintf(line, sizeof line, "test_gpu_queries %s 999", symbols[i]);
        memory_fail(line);
        ice_status status = ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL);
        memory_fail(NULL);
        assert_true(status == ICE_SYSTEM || status == ICE_INVALID_ARGUMENT);
        assert_string_not_equal(ice_last_error(), "");
        assert_ok(ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL));
        landing_check_all(worker.landing, 0, 0, &history, LENGTH);
        drop(&moved);
        retrieve_fini(&retrieve);
        worker_close(&worker);
    }
}

// Streams that do not end: each call does, the buffers that may still be written to are not used, and are used again
// when the streams have ended.
static void a_stream_that_does_not_end(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct retrieve retrieve;
    struct on_gpu moved;
    if (!memory_is_fake())
        skip();
    worker_open(&worker, daemon->sockets, &shape, ROWS, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
    retrieve_ends(&retrieve, LENGTH, 0, 0);
    move(&moved, &retrieve);
    retrieve.options.deadline_us = 30000;
    memory_fail("test_gpu_queries cuEventQuery 600");
    for (uint32_t i = 0; i < 10; i++) // more than there are buffers
        assert_status(ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL), ICE_TIMEOUT);
    memory_fail(NULL);
    retrieve.options.deadline_us = 0;
    for (uint32_t i = 0; i < 10; i++)
        assert_ok(ice_retrieve_gpu(worker.client, &retrieve.options, NULL, NULL));
    landing_check_all(worker.landing, 0, 0, &history, LENGTH);
    drop(&moved);
    retrieve_fini(&retrieve);
    worker_close(&worker);
}

// Several threads at once, more than there are buffers, each with its own row.
struct asker {
    pthread_t thread;
    const struct worker *worker;
    uint32_t row;
};

static void *ask(void *argument)
{
    struct asker *asker = argument;
    cuda_context context, popped;
    cuda_device device;
    assert_int_equal(memory_driver()->device_get(&device, 0), CUDA_OK);
    assert_int_equal(memory_driver()->primary_retain(&context, device), CUDA_OK);
    assert_int_equal(memory_driver()->context_push(context), CUDA_OK);
    for (uint32_t i = 0; i < 20; i++) {
        struct retrieve retrieve;
        struct on_gpu moved;
        retrieve_init(&retrieve, asker->worker, &history, i % 3, LENGTH - 1 - asker->row, 1);
        retrieve.row = asker->row;
        retrieve_ends(&retrieve, LENGTH, 0, 0);
        move(&moved, &retrieve);
        assert_ok(ice_retrieve_gpu(asker->worker->client, &retrieve.options, NULL, NULL));
        landing_check_all(asker->worker->landing, asker->row, i % 3, &history, LENGTH - asker->row);
        drop(&moved);
        retrieve_fini(&retrieve);
    }
    assert_int_equal(memory_driver()->context_pop(&popped), CUDA_OK);
    assert_int_equal(memory_driver()->primary_release(device), CUDA_OK);
    return NULL;
}

static void threads_at_once(void **state)
{
    struct daemon *daemon = *state;
    enum { THREADS = 12 };
    struct worker worker;
    struct asker askers[THREADS];
    worker_open(&worker, daemon->sockets, &shape, THREADS, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    (void)memory_driver(); // by this thread first
    for (uint32_t i = 0; i < THREADS; i++) {
        askers[i] = (struct asker){.worker = &worker, .row = i};
        assert_int_equal(pthread_create(&askers[i].thread, NULL, ask, &askers[i]), 0);
    }
    for (uint32_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_join(askers[i].thread, NULL), 0);
    worker_close(&worker);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 83);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(the_same_as_from_host_memory),
        DAEMON_TEST(keys_and_values_ride_along),
        DAEMON_TEST(behind_what_is_in_the_stream),
        DAEMON_TEST(refusals),
        DAEMON_TEST(entries_fail),
        DAEMON_TEST(a_stream_that_does_not_end),
        DAEMON_TEST(threads_at_once),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
