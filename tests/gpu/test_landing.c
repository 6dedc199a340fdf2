// Landings in GPU memory, real processes: every kind of memory, push and pull, bit for bit. Runs over the fake driver,
// and over the real one where ICECACHE_TEST_GPU=real.
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct shape shape = {3, 2, 4, 64, ICE_BF16};
enum { LENGTH = 700, SLOTS = 800, ROWS = 3 };

// Small pools: on a busy machine a gigabyte is not populated within the deadline of a test.
#define SMALL "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--log-level", "debug"
static const char *const no_push_options[] = {SMALL, "--gpu-push", "0", NULL};
static const char *const no_driver_options[] = {SMALL, "--cuda-library", "/nowhere/libcuda.so", NULL};

static struct history history;

static uint64_t landing_bytes(void)
{
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    uint64_t bytes = 0;
    assert_ok(ice_landing_bytes(&wanted, &bytes));
    return bytes;
}

static void retrieve_row(const struct worker *worker, uint32_t row, uint32_t layer, uint64_t first, uint32_t budget)
{
    struct retrieve retrieve;
    retrieve_init(&retrieve, worker, &history, layer, first, 1);
    retrieve.row = row;
    retrieve_ends(&retrieve, budget, ICE_DEFAULT_SINKS, ICE_DEFAULT_WINDOW);
    struct ice_retrieve_result result;
    assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
    uint32_t most = budget + ICE_DEFAULT_SINKS + ICE_DEFAULT_WINDOW;
    uint32_t count = most < first + 1 ? most : (uint32_t)first + 1;
    assert_int_equal(result.counts[0], count);
    gpu_check(worker, row, layer, &history, count, first + 1);
    retrieve_fini(&retrieve);
}

// What a landing must do whatever its memory is: all of a sequence, parts of it, several rows and layers, and a step's
// K and V.
static void exercise(const struct worker *worker)
{
    worker_append(worker, &history, 0, LENGTH - 1);
    for (uint32_t layer = 0; layer < shape.layers; layer++)
        retrieve_row(worker, layer % ROWS, layer, LENGTH - 2, LENGTH);
    retrieve_row(worker, 0, 0, LENGTH - 2, 100);
    retrieve_row(worker, 2, 1, LENGTH - 40, 16);
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        struct retrieve retrieve;
        retrieve_init(&retrieve, worker, &history, layer, LENGTH - 1, 1);
        retrieve_ride(&retrieve, &history);
        retrieve_ends(&retrieve, LENGTH, 0, 0);
        assert_ok(ice_retrieve(worker->client, &retrieve.options, NULL));
        gpu_check(worker, 0, layer, &history, LENGTH, LENGTH);
        retrieve_fini(&retrieve);
    }
}

// Every way to a landing.
static const struct ice_gpu_options ways[] = {
    {.mode = ICE_GPU_ANY},
    {.mode = ICE_GPU_PUSH},
    {.mode = ICE_GPU_PULL},
    {.mode = ICE_GPU_PULL, .copy = ICE_COPY_BLOCKS},
    {.mode = ICE_GPU_ANY, .copy = ICE_COPY_CHANGED}, // by pull
};
enum { WAYS = sizeof ways / sizeof ways[0] };

static bool is_pull(const struct ice_gpu_options *way)
{
    return way->mode == ICE_GPU_PULL || way->copy == ICE_COPY_CHANGED;
}

static enum ice_gpu_mode mode_of(const struct worker *worker)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    assert_string_not_equal(gpu.device_name, "");
    return gpu.mode;
}

static void expect_pull(const struct worker *worker, const char *reason)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    assert_int_equal(gpu.mode, ICE_GPU_PULL);
    assert_text(gpu.pull_reason, reason);
    assert_string_equal(ice_last_error(), "");
}

// ---- kinds of memory ----

static void library_allocates(void **state)
{
    struct daemon *daemon = *state;
    for (uint32_t way = 0; way < WAYS; way++) {
        struct worker worker;
        struct ice_gpu_landing gpu;
        worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &ways[way]);
        assert_int_equal(mode_of(&worker), is_pull(&ways[way]) ? ICE_GPU_PULL : ICE_GPU_PUSH);
        assert_ok(ice_landing_gpu(worker.landing, &gpu));
        assert_int_equal(gpu.copies_changed, is_pull(&ways[way]) && ways[way].copy != ICE_COPY_BLOCKS);
        assert_int_equal(gpu.copy_reason[0] == 0, gpu.copies_changed);
        assert_int_equal(gpu.block_us > 0, is_pull(&ways[way]));
        assert_int_equal(gpu.changed_all_us > 0 && gpu.changed_none_us > 0, gpu.copies_changed);
        exercise(&worker);
        worker_close(&worker);
    }
}

// Inside a larger allocation, two at once: the handle is that of the whole. What is around them is not touched.
static void memory_of_the_worker(void **state)
{
    struct daemon *daemon = *state;
    uint64_t bytes = landing_bytes(), gap = 4096 + 256;
    cuda_address block = memory_alloc(2 * bytes + 3 * gap);
    memory_fill(block, 0x5a, 2 * bytes + 3 * gap);
    for (uint32_t way = 0; way < WAYS; way++) {
        struct worker workers[2];
        for (uint32_t i = 0; i < 2; i++) {
            struct ice_gpu_options options = ways[way];
            options.address = block + gap + i * (bytes + gap);
            options.bytes = bytes;
            worker_open_gpu(&workers[i], daemon->sockets, &shape, ROWS, SLOTS, &options);
        }
        exercise(&workers[0]);
        exercise(&workers[1]);
        worker_close(&workers[0]);
        exercise(&(struct worker){workers[1].client, workers[1].landing, sequence_open(workers[1].client, &shape),
                                  shape, ROWS, SLOTS});
        worker_close(&workers[1]);
        for (uint32_t i = 0; i < 3; i++) {
            uint8_t around[4096 + 256];
            memory_read(around, block + i * (bytes + gap), gap);
            for (uint32_t j = 0; j < gap; j++)
                assert_int_equal(around[j], 0x5a);
        }
    }
    memory_free(block);
}

static void mapped_memory(void **state)
{
    struct daemon *daemon = *state;
    uint64_t bytes = landing_bytes();
    struct mapped mapped;
    mapped_create(&mapped, (uint32_t)((bytes + 3000000) / (2u << 20) + 2), true);
    for (uint32_t way = 0; way < WAYS; way++) {
        struct ice_gpu_options options = ways[way];
        options.address = mapped.address + 2999808;
        options.bytes = bytes;
        struct worker worker;
        worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
        exercise(&worker);
        worker_close(&worker);
    }
    if (memory_is_fake())
        assert_int_equal(memory_foreign_mappings(), 0);
    mapped_destroy(&mapped);
}

// ---- rows ----

// A row that is bound to another sequence is empty in all layers, on the GPU too.
static void a_rebound_row_is_empty(void **state)
{
    struct daemon *daemon = *state;
    for (uint32_t way = 0; way < WAYS; way++) {
        struct worker worker;
        worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &ways[way]);
        worker_append(&worker, &history, 0, LENGTH);
        gpu_check_counts(&worker, 1, 0, 0);
        for (uint32_t layer = 0; layer < shape.layers; layer++)
            retrieve_row(&worker, 1, layer, LENGTH - 1, 20);
        ice_sequence *first = worker.sequence;
        worker.sequence = sequence_open(worker.client, &shape);
        worker_append(&worker, &history, 0, LENGTH);
        retrieve_row(&worker, 1, 1, LENGTH - 1, 20);
        gpu_check_counts(&worker, 1, 0, 0);
        gpu_check_counts(&worker, 1, 2, 0);
        ice_sequence_close(first);
        worker_close(&worker);
    }
}

// The probe is written to the memory's last bytes, where the last counts are when nothing pads the last block.
static void a_new_landing_is_empty(void **state)
{
    struct daemon *daemon = *state;
    const struct shape narrow = {.layers = 8, .kv_heads = 1, .query_heads = 1, .head_dim = 64, .dtype = ICE_BF16};
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        worker_open_gpu(&worker, daemon->sockets, &narrow, 1, 127, &(struct ice_gpu_options){.mode = mode});
        for (uint32_t layer = 0; layer < narrow.layers; layer++)
            gpu_check_counts(&worker, 0, layer, 0);
        worker_close(&worker);
    }
}

// Decode steps by the kernel: bit for bit, and no more is moved than has changed; also behind a ticket whose selection
// was never fetched, another sequence in the row, and one that was asked for anew.
static void only_what_has_changed(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    uint64_t moved = 0, all = 0;
    const struct ice_gpu_options options = {.mode = ICE_GPU_PULL, .copy = ICE_COPY_CHANGED};
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
    ice_sequence *sequences[2] = {worker.sequence, sequence_open(worker.client, &shape)};
    for (uint32_t i = 0; i < 2; i++) {
        worker.sequence = sequences[i];
        worker_append(&worker, &history, 0, LENGTH - 100);
    }
    for (uint32_t step = 0; step < 90; step++) {
        const uint64_t position = LENGTH - 100 + step;
        const uint32_t layer = step % shape.layers;
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        ice_ticket *ticket = NULL;
        for (uint32_t i = 0; i < 2; i++) {
            worker.sequence = sequences[i];
            worker_append(&worker, &history, position, 1);
        }
        worker.sequence = sequences[step >= 40 && step < 60];
        retrieve_init(&retrieve, &worker, &history, layer, position, 1);
        retrieve_ends(&retrieve, 100, ICE_DEFAULT_SINKS, ICE_DEFAULT_WINDOW);
        retrieve.options.resend = step == 70;
        retrieve_point(&retrieve);
        if (step % 10 == 7) { // never waited for
            assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &ticket));
            ice_ticket_close(ticket);
            for (uint64_t until = now_us() + TEST_DEADLINE_US; now_us() < until; sleep_us(500)) {
                if (ice_retrieve(worker.client, &retrieve.options, &result) == ICE_OK)
                    break;
            }
        } else {
            assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        }
        gpu_check(&worker, 0, layer, &history, 180, position + 1);
        const uint64_t whole = shape.kv_heads * 180 * 2 * shape_row_bytes(&shape);
        if (step % 10 == 7 || step == 70)
            assert_int_equal(result.bytes_moved, whole);
        moved += result.bytes_moved;
        all += whole;
        retrieve_fini(&retrieve);
    }
    print_message("%.2f of all moved\n", (double)moved / (double)all);
    assert_true(moved < all / 10 * 9);
    ice_sequence_close(sequences[1]);
    worker.sequence = sequences[0];
    worker_close(&worker);
}

// Many in flight, waited for in another order, some never: their rows are free again, and nothing is overwritten early.
static void tickets_in_flight(void **state)
{
    struct daemon *daemon = *state;
    for (uint32_t way = 0; way < WAYS; way++) {
        struct worker worker;
        worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &ways[way]);
        worker_append(&worker, &history, 0, LENGTH);
        for (uint32_t round = 0; round < 20; round++) {
            ice_ticket *tickets[ROWS];
            struct retrieve retrieves[ROWS];
            for (uint32_t i = 0; i < ROWS; i++) {
                retrieve_init(&retrieves[i], &worker, &history, (round + i) % 3, LENGTH - 1 - round * i, 1);
                retrieves[i].row = i;
                retrieve_ends(&retrieves[i], LENGTH, 0, 0);
                retrieve_point(&retrieves[i]);
                assert_ok(ice_retrieve_submit(worker.client, &retrieves[i].options, &tickets[i]));
            }
            ice_ticket *again = NULL;
            if (is_pull(&ways[way])) // also once its reply is there: its staging has not been read
                assert_status(ice_retrieve_submit(worker.client, &retrieves[0].options, &again), ICE_BUSY);
            for (uint32_t i = ROWS; i-- > 0;) {
                if (i != 1 || round % 4 != 0) {
                    assert_ok(ice_retrieve_wait(tickets[i], 0, NULL));
                    uint32_t count = LENGTH - round * i;
                    gpu_check(&worker, i, (round + i) % 3, &history, count, count);
                    assert_ok(ice_retrieve_wait(tickets[i], 0, NULL)); // again: nothing more happens
                }
                ice_ticket_close(tickets[i]);
                retrieve_fini(&retrieves[i]);
            }
            sleep_us(2000); // for the ticket that was not waited for, where the daemon still owns its row
        }
        ice_ticket *open = NULL;
        struct retrieve retrieve;
        retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
        assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &open));
        uint64_t begun = now_us();
        ice_landing_close(worker.landing); // with a ticket still open
        assert_true(now_us() - begun < 5000000);
        worker.landing = NULL;
        ice_ticket_close(open);
        retrieve_fini(&retrieve);
        worker_close(&worker);
    }
}

// ---- refusals, each by name ----

static void mapped_without_handles(void **state)
{
    struct daemon *daemon = *state;
    uint64_t bytes = landing_bytes();
    struct mapped mapped;
    mapped_create(&mapped, (uint32_t)(bytes / (2u << 20) + 1), false);
    struct ice_gpu_options options = {.address = mapped.address, .bytes = bytes};
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
    expect_pull(&worker, "mapped without handles");
    exercise(&worker);
    ice_landing *landing = NULL;
    options.mode = ICE_GPU_PUSH;
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    assert_refused(ice_landing_open_gpu(worker.client, &wanted, &options, 0, &landing), ICE_NOT_SUPPORTED,
                   "mapped without handles");
    assert_null(landing);
    worker_close(&worker);
    mapped_destroy(&mapped);
}

static void daemon_that_must_not_push(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){0});
    expect_pull(&worker, "--gpu-push 0");
    exercise(&worker);
    worker_close(&worker);
}

static void daemon_without_driver(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){0});
    expect_pull(&worker, "no CUDA driver: /nowhere/libcuda.so");
    exercise(&worker);
    worker_close(&worker);
}

static void bad_arguments(void **state)
{
    struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 0);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    uint64_t bytes = landing_bytes();
    cuda_address block = memory_alloc(4u << 20);
    ice_landing *landing = NULL;
    const struct {
        struct ice_gpu_options options;
        ice_status status;
        const char *text;
    } cases[] = {
        {{.address = block, .bytes = bytes - 1}, ICE_OUT_OF_BOUNDS, "options.bytes"},
        {{.address = block + 8, .bytes = bytes}, ICE_INVALID_ARGUMENT, "options.address"},
        {{.address = 4096, .bytes = bytes}, ICE_INVALID_ARGUMENT, "not in GPU memory"},
        {{.device = 77}, ICE_INVALID_ARGUMENT, "GPU 77"},
        {{.device = -1}, ICE_INVALID_ARGUMENT, "GPU -1"},
        {{.mode = (enum ice_gpu_mode)9}, ICE_INVALID_ARGUMENT, "options.mode"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_refused(ice_landing_open_gpu(client, &wanted, &cases[i].options, 0, &landing), cases[i].status,
                       cases[i].text);
    assert_refused(ice_landing_open_gpu(client, &wanted, NULL, 0, &landing), ICE_INVALID_ARGUMENT, "options");
    assert_null(landing);
    ice_landing *host = landing_open(client, &shape, 1, 8);
    struct ice_gpu_landing gpu;
    assert_refused(ice_landing_gpu(host, &gpu), ICE_INVALID_ARGUMENT, "host memory");
    assert_ok(ice_landing_open_gpu(client, &wanted, &(struct ice_gpu_options){0}, 0, &landing));
    struct ice_landing_view view;
    assert_refused(ice_landing_view(landing, 0, 0, 0, &view), ICE_NOT_SUPPORTED, "GPU memory");
    ice_client_close(client); // the landings with it
    memory_free(block);
}

// ---- death ----

// holder SOCKETS: opens a push landing, says so, and retrieves until it is killed.
static int run_holder(int argc, char **argv)
{
    assert_int_equal(argc, 2);
    struct worker worker;
    worker_open_gpu(&worker, argv[1], &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    worker_append(&worker, &history, 0, LENGTH);
    printf("holds\n");
    fflush(stdout);
    while (getppid() != 1)
        retrieve_row(&worker, 0, 0, LENGTH - 1, LENGTH);
    return 1;
}

static void worker_that_dies(void **state)
{
    struct daemon *daemon = *state;
    struct worker survivor;
    worker_open_gpu(&survivor, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    exercise(&survivor);
    worker_wait_idle(&survivor);
    struct stats_held before;
    stats_held(daemon, &before);
    uint32_t mappings = memory_is_fake() ? memory_foreign_mappings() : 0;
    for (uint32_t i = 0; i < scaled_count(3, 20); i++) {
        struct child child;
        char line[64];
        const char *role[] = {"holder", daemon->sockets, NULL};
        child_start_role(&child, role);
        assert_true(child_read_line(&child, line, sizeof line));
        sleep_us(1000 * i);
        child_kill(&child);
        uint64_t us = stats_wait(daemon, &before, 1000000);
        assert_true(us < 1000000);
        if (memory_is_fake())
            assert_int_equal(memory_foreign_mappings(), mappings);
        retrieve_row(&survivor, 1, 2, LENGTH - 1, 200);
    }
    worker_close(&survivor);
}

static void daemon_that_dies(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    worker_append(&worker, &history, 0, LENGTH);
    daemon_kill(daemon);
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
    assert_status(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_DISCONNECTED);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    daemon_start(daemon);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{"holder", run_holder}};
    int exit_status;
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 71);
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(library_allocates),
        DAEMON_TEST(memory_of_the_worker),
        DAEMON_TEST(mapped_memory),
        DAEMON_TEST(a_rebound_row_is_empty),
        DAEMON_TEST(a_new_landing_is_empty),
        DAEMON_TEST(only_what_has_changed),
        DAEMON_TEST(tickets_in_flight),
        DAEMON_TEST(mapped_without_handles),
        DAEMON_TEST_WITH(daemon_that_must_not_push, no_push_options),
        DAEMON_TEST_WITH(daemon_without_driver, no_driver_options),
        DAEMON_TEST(bad_arguments),
        DAEMON_TEST(worker_that_dies),
        DAEMON_TEST(daemon_that_dies),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
