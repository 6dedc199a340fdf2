// One call of the driver for the rows of a retrieve, beside one for each: the bytes, drivers that have it in either
// form, not at all, or refuse it, and the choice by measuring. Over the fake driver only.
#include "memory.h"

#include "gpu/buffer.h"
#include "proto/shm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const struct shape shape = {2, 2, 4, 32, ICE_FP16};
enum { LENGTH = 90, SLOTS = 96, SEQUENCES = 5, ROWS = 8, TRIES = 20 };
#define SMALL "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--log-level", "debug"
static const char *const batch_options[] = {SMALL, "--gpu-copy", "batch", NULL};
static const char *const loop_options[] = {SMALL, "--gpu-copy", "loop", NULL};

static struct history histories[SEQUENCES];

// A landing with rows for all sequences, which have tokens of their own.
struct party {
    struct worker worker;
    ice_sequence *sequences[SEQUENCES];
};

static void party_open(struct party *party, const struct daemon *daemon, enum ice_gpu_mode mode, enum ice_gpu_copy copy)
{
    const struct ice_gpu_options options = {.mode = mode, .copy = copy};
    worker_open_gpu(&party->worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
    for (uint32_t row = 0; row < ROWS; row++) // measuring leaves it empty
        for (uint32_t layer = 0; layer < shape.layers; layer++)
            gpu_check_counts(&party->worker, row, layer, 0);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        struct worker each = party->worker;
        each.sequence = party->sequences[i] = sequence_open(party->worker.client, &shape);
        worker_append(&each, &histories[i], 0, LENGTH);
    }
}

static void party_close(struct party *party)
{
    for (uint32_t i = 0; i < SEQUENCES; i++)
        ice_sequence_close(party->sequences[i]);
    worker_close(&party->worker);
}

static const char *party_way(const struct party *party)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(party->worker.landing, &gpu));
    return gpu.copy_way;
}

// All sequences in one retrieve, sequence i in row (i + shift) % ROWS: rows change hands from shift to shift.
static void party_retrieve(struct party *party, uint32_t layer, uint32_t shift)
{
    const size_t one = shape.query_heads * shape_row_bytes(&shape);
    uint32_t rows[SEQUENCES];
    uint64_t firsts[SEQUENCES];
    uint8_t *queries = malloc(SEQUENCES * one);
    assert_non_null(queries);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        rows[i] = (i + shift) % ROWS;
        firsts[i] = LENGTH - 1;
        history_queries(&histories[i], layer, LENGTH - 1, 1, queries + i * one);
    }
    const struct ice_retrieve_options options = {
        .landing = party->worker.landing,
        .layer = layer,
        .sequence_count = SEQUENCES,
        .sequences = party->sequences,
        .rows = rows,
        .first_queries = firsts,
        .queries = 1,
        .query_vectors = queries,
        .query_dtype = shape.dtype,
        .budget = LENGTH,
    };
    assert_ok(ice_retrieve(party->worker.client, &options, NULL));
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        gpu_check(&party->worker, rows[i], layer, &histories[i], LENGTH, LENGTH);
        if (shift > 0) // the row was another sequence's: its other layer is emptied
            gpu_check_counts(&party->worker, rows[i], 1 - layer, 0);
    }
    free(queries);
}

static void exercise(struct party *party)
{
    for (uint32_t layer = 0; layer < shape.layers; layer++)
        party_retrieve(party, layer, 0);
    for (uint32_t shift = 1; shift < 4; shift++)
        party_retrieve(party, shift % shape.layers, shift);
}

// Opens, exercises, and expects this way before and after.
static void expect_way(const struct daemon *daemon, enum ice_gpu_mode mode, enum ice_gpu_copy copy, const char *way)
{
    struct party party;
    party_open(&party, daemon, mode, copy);
    assert_string_equal(party_way(&party), way);
    exercise(&party);
    assert_string_equal(party_way(&party), way);
    if (mode == ICE_GPU_PUSH) {
        json_t *stats = stats_read(daemon);
        const json_t *gpu = json_array_get(json_object_get(stats, "gpu"), 0);
        assert_string_equal(json_string_value(json_object_get(gpu, "copy_way")), way);
        json_decref(stats);
    }
    party_close(&party);
}

static void the_daemon_batches(void **state)
{
    expect_way(*state, ICE_GPU_PUSH, ICE_COPY_LOOP, "batch"); // push is the daemon's
}

static void the_daemon_loops(void **state)
{
    expect_way(*state, ICE_GPU_PUSH, ICE_COPY_BATCH, "loop");
}

static void the_library_does_as_it_is_told(void **state)
{
    expect_way(*state, ICE_GPU_PULL, ICE_COPY_BATCH, "batch");
    expect_way(*state, ICE_GPU_PULL, ICE_COPY_LOOP, "loop");
    const struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 0);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    ice_landing *landing = NULL;
    assert_refused(
        ice_landing_open_gpu(client, &wanted, &(struct ice_gpu_options){.copy = (enum ice_gpu_copy)5}, 0, &landing),
        ICE_INVALID_ARGUMENT, "options.copy 5");
    ice_client_close(client);
}

// Whatever the measurement says.
static void measured(void **state)
{
    const enum ice_gpu_mode modes[] = {ICE_GPU_PUSH, ICE_GPU_PULL};
    for (uint32_t i = 0; i < 2; i++) {
        struct party party;
        party_open(&party, *state, modes[i], ICE_COPY_BLOCKS);
        const char *way = party_way(&party);
        assert_true(strcmp(way, "loop") == 0 || strcmp(way, "batch from 2 rows on") == 0 ||
                    strcmp(way, "batch from 8 rows on") == 0);
        exercise(&party);
        party_close(&party);
    }
}

// Slow calls: the fewer, the better. Then slow batches. On a machine that has no processor left for the 20 ms of a
// measurement nothing is changed; another landing measures anew.
static void the_faster_way_is_chosen(void **state)
{
    static const struct {
        const char *slow, *way;
    } cases[] = {{"cuMemcpyHtoDAsync", "batch from 2 rows on"}, {"cuMemcpyBatchAsync_v2", "loop"}};
    const char *programs[] = {"icecached", "test_gpu_batch"};
    const enum ice_gpu_mode modes[] = {ICE_GPU_PUSH, ICE_GPU_PULL};
    for (uint32_t i = 0; i < 4; i++) {
        char line[128];
        struct party party;
        snprintf(line, sizeof line, "%s %s lag", programs[i / 2], cases[i % 2].slow);
        memory_fail(line);
        party_open(&party, *state, modes[i / 2], ICE_COPY_BLOCKS);
        for (uint32_t again = 0; again < TRIES && strcmp(party_way(&party), cases[i % 2].way) != 0; again++) {
            party_close(&party);
            party_open(&party, *state, modes[i / 2], ICE_COPY_BLOCKS);
        }
        memory_fail(NULL);
        assert_string_equal(party_way(&party), cases[i % 2].way);
        exercise(&party);
        party_close(&party);
    }
}

// Where nothing can be measured in the time there is, nothing is changed.
static void no_time_to_measure(void **state)
{
    struct party party;
    memory_fail("* cuMemcpyHtoDAsync slow");
    party_open(&party, *state, ICE_GPU_PUSH, ICE_COPY_BLOCKS);
    memory_fail(NULL);
    assert_string_equal(party_way(&party), "loop");
    exercise(&party);
    party_close(&party);
}

// ---- drivers ----

static void either_form(void **state)
{
    struct daemon *daemon = *state;
    static const char *const versions[] = {"12080", "12090", "13000", "13010"};
    for (uint32_t i = 0; i < 4; i++) {
        setenv("FAKE_CUDA_VERSION", versions[i], 1);
        daemon_start(daemon);
        expect_way(daemon, ICE_GPU_PUSH, ICE_COPY_BLOCKS, "batch");
        expect_way(daemon, ICE_GPU_PULL, ICE_COPY_BATCH, "batch");
        daemon_stop(daemon);
    }
    unsetenv("FAKE_CUDA_VERSION");
}

static void expect_loops_only(struct daemon *daemon, const char *variable, const char *value)
{
    setenv(variable, value, 1);
    daemon_start(daemon);
    expect_way(daemon, ICE_GPU_PUSH, ICE_COPY_BLOCKS, "loop");
    expect_way(daemon, ICE_GPU_PULL, ICE_COPY_BATCH, "loop");
    expect_way(daemon, ICE_GPU_PULL, ICE_COPY_BLOCKS, "loop");
    daemon_stop(daemon);
    unsetenv(variable);
}

static void no_form(void **state)
{
    expect_loops_only(*state, "FAKE_CUDA_VERSION", "12000");
    expect_loops_only(*state, "FAKE_CUDA_VERSION", "12070");
    expect_loops_only(*state, "FAKE_CUDA_MISSING", "cuMemcpyBatchAsync");
    memory_fail("* cuDriverGetVersion 999");
    expect_loops_only(*state, "FAKE_UNUSED", "");
    memory_fail(NULL);
}

// ---- refusals ----

static uint32_t remarks(const struct daemon *daemon)
{
    static char text[1 << 20];
    uint32_t count = 0;
    daemon_read_log(daemon, text, sizeof text);
    for (const char *at = text; (at = strstr(at, "copied one by one from now on")) != NULL; at++)
        count++;
    return count;
}

// By the daemon, in the middle of its work: nobody notices but the log, once for each landing.
static void refused_later(void **state)
{
    struct daemon *daemon = *state;
    static const char *const versions[] = {"12080", "13000"};
    static const char *const lines[] = {"* cuMemcpyBatchAsync 999", "* cuMemcpyBatchAsync_v2 999"};
    for (uint32_t i = 0; i < 2; i++) {
        struct party pushed, pulled;
        setenv("FAKE_CUDA_VERSION", versions[i], 1);
        daemon_start(daemon);
        party_open(&pushed, daemon, ICE_GPU_PUSH, ICE_COPY_BLOCKS);
        party_open(&pulled, daemon, ICE_GPU_PULL, ICE_COPY_BATCH);
        exercise(&pushed);
        exercise(&pulled);
        memory_fail(lines[i]);
        exercise(&pushed);
        exercise(&pulled);
        memory_fail(NULL);
        exercise(&pushed);
        exercise(&pulled);
        assert_string_equal(party_way(&pulled), "loop");
        json_t *stats = stats_read(daemon);
        const json_t *gpu = json_array_get(json_object_get(stats, "gpu"), 0);
        assert_string_equal(json_string_value(json_object_get(gpu, "copy_way")), "loop");
        json_decref(stats);
        assert_int_equal(remarks(daemon), 1 + i); // the log goes on
        party_close(&pushed);
        party_close(&pulled);
        daemon_stop(daemon);
    }
    unsetenv("FAKE_CUDA_VERSION");
}

static void refused_while_measuring(void **state)
{
    struct daemon *daemon = *state;
    struct party party;
    memory_fail("* cuMemcpyBatchAsync_v2 999");
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        party_open(&party, daemon, mode, ICE_COPY_BLOCKS);
        assert_string_equal(party_way(&party), "loop");
        exercise(&party);
        party_close(&party);
    }
    memory_fail(NULL);
    assert_int_equal(remarks(daemon), 1);
}

// The landing must not be handed out while something copies to it.
static void a_measurement_that_does_not_end(void **state)
{
    struct daemon *daemon = *state;
    struct party party;
    struct ice_gpu_landing gpu;
    memory_fail("icecached cuEventQuery 600");
    party_open(&party, daemon, ICE_GPU_ANY, ICE_COPY_BLOCKS);
    memory_fail(NULL);
    assert_ok(ice_landing_gpu(party.worker.landing, &gpu));
    assert_int_equal(gpu.mode, ICE_GPU_PULL);
    assert_text(gpu.pull_reason, "have not ended");
    exercise(&party);
    party_close(&party);
    assert_int_equal(memory_foreign_mappings(), 0);
}

// ---- blocks across the end of a registered piece ----

static void a_block_that_is_cut(void **state)
{
    (void)state;
    // 3 blocks of some 100 MiB: the third one begins in the first piece and ends in the second.
    const struct landing_shape large = {3, 1, 1, 200000, 128, ICE_FP16};
    struct landing_layout layout, held;
    assert_true(landing_layout_init(&layout, &large) && landing_held_init(&held, &large, LANDING_PULL));
    assert_true(2 * held.block_bytes < GPU_REGISTER_BYTES && 3 * held.block_bytes > GPU_REGISTER_BYTES);
    uint8_t *staging = mmap(NULL, held.total_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(staging, MAP_FAILED);
    char text[CUDA_TEXT_BYTES];
    struct gpu_buffer buffer;
    const uint32_t rows[] = {0, 1, 2};
    const bool cleared[] = {false, false, false};
    assert_int_equal(gpu_buffer_open(memory_library(), 0, layout.total_bytes, 0, &buffer, text), ICE_OK);
    assert_int_equal(gpu_buffer_pull_open(&buffer, &large, staging, GPU_COPY_BATCH, false, text), ICE_OK);
    for (uint64_t at = 0; at < held.total_bytes; at += 4096)
        staging[at] = (uint8_t)(1 + at / 4096 % 251);
    assert_int_equal(gpu_buffer_pull(&buffer, rows, cleared, 3, 0, true, 0, text), ICE_OK);
    assert_string_equal(gpu_path_way(&buffer.pull.path), "batch"); // not refused
    for (bool done = false; !done;)
        assert_int_equal(gpu_buffer_poll(&buffer, 0, &done, text), ICE_OK);
    uint8_t *landed = malloc(layout.total_bytes);
    assert_non_null(landed);
    memory_read(landed, buffer.address, layout.total_bytes);
    for (uint32_t row = 0; row < 3; row++)
        assert_int_equal(
            memcmp(landed + row * layout.block_bytes, staging + row * held.block_bytes, layout.block_bytes), 0);
    free(landed);
    gpu_buffer_close(&buffer);
    munmap(staging, held.total_bytes);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    for (uint32_t i = 0; i < SEQUENCES; i++)
        history_create(&histories[i], &shape, LENGTH, 80 + i);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(the_daemon_batches, batch_options),
        DAEMON_TEST_WITH(the_daemon_loops, loop_options),
        DAEMON_TEST(the_library_does_as_it_is_told),
        DAEMON_TEST(measured),
        DAEMON_TEST(the_faster_way_is_chosen),
        DAEMON_TEST(no_time_to_measure),
        FOLDER_TEST_WITH(either_form, batch_options),
        FOLDER_TEST_WITH(no_form, batch_options),
        FOLDER_TEST_WITH(refused_later, batch_options),
        DAEMON_TEST(refused_while_measuring),
        DAEMON_TEST(a_measurement_that_does_not_end),
        cmocka_unit_test(a_block_that_is_cut),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    for (uint32_t i = 0; i < SEQUENCES; i++)
        history_destroy(&histories[i]);
    return failed;
}
