// Waiting for selections on the GPU's side, real processes: order, refusals, failures, deadlines, death. Runs over the
// fake driver, and over the real one where ICECACHE_TEST_GPU=real.
#include "memory.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct shape shape = {3, 2, 4, 64, ICE_BF16};
enum { LENGTH = 700, SLOTS = 800, ROWS = 3 };

#define SMALL "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--log-level", "debug"
static const char *const one_in_flight_options[] = {SMALL, "--inflight-max", "1", NULL};

static struct history history;

// A stream of the worker, and an event in it.
struct lane {
    cuda_stream stream;
    cuda_event event;
};

static void lane_open(struct lane *lane)
{
    assert_int_equal(memory_driver()->stream_create(&lane->stream, CUDA_STREAM_NON_BLOCKING, 0), CUDA_OK);
    assert_int_equal(memory_driver()->event_create(&lane->event, CUDA_EVENT_DISABLE_TIMING), CUDA_OK);
}

static void lane_close(struct lane *lane)
{
    assert_int_equal(memory_driver()->event_destroy(lane->event), CUDA_OK);
    assert_int_equal(memory_driver()->stream_destroy(lane->stream), CUDA_OK);
}

static void lane_mark(const struct lane *lane)
{
    assert_int_equal(memory_driver()->event_record(lane->event, lane->stream), CUDA_OK);
}

// Whether the stream passes its mark within the time.
static bool lane_passes(const struct lane *lane, uint64_t within_us)
{
    uint64_t begun = now_us();
    for (;;) {
        cuda_result result = memory_driver()->event_query(lane->event);
        if (result == CUDA_OK)
            return true;
        assert_int_equal(result, CUDA_NOT_READY);
        if (now_us() - begun > within_us)
            return false;
        sleep_us(100);
    }
}

// What a kernel behind the wait would see: a copy of a block, issued in the stream.
struct seen {
    uint8_t *block; // registered
    uint64_t bytes;
};

static void seen_open(struct seen *seen, const struct worker *worker)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    seen->bytes = (gpu.layer_bytes + 4095) / 4096 * 4096;
    seen->block = mmap(NULL, seen->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(seen->block != MAP_FAILED);
    assert_int_equal(memory_driver()->host_register(seen->block, seen->bytes, 0), CUDA_OK);
}

static void seen_close(struct seen *seen)
{
    assert_int_equal(memory_driver()->host_unregister(seen->block), CUDA_OK);
    munmap(seen->block, seen->bytes);
}

static void seen_issue(struct seen *seen, const struct worker *worker, uint32_t row, uint32_t layer,
                       const struct lane *lane)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    memset(seen->block, 0xee, seen->bytes);
    const struct cuda_rows rows = {
        .from_type = CUDA_MEMORY_DEVICE,
        .from_device = gpu.address + ((uint64_t)row * shape.layers + layer) * gpu.layer_bytes,
        .from_pitch = gpu.layer_bytes,
        .to_type = CUDA_MEMORY_HOST,
        .to_host = seen->block,
        .to_pitch = gpu.layer_bytes,
        .width_bytes = gpu.layer_bytes,
        .height = 1,
    };
    assert_int_equal(memory_driver()->copy_rows(&rows, lane->stream), CUDA_OK);
    lane_mark(lane);
}

// All positions below `count`, slot i position i, bit for bit.
static void seen_check(const struct seen *seen, const struct worker *worker, uint32_t layer, uint32_t count)
{
    size_t bytes = shape_row_bytes(&shape), side = SLOTS * bytes;
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        const uint8_t *keys = seen->block + head * 2 * side;
        const uint32_t *counts = (const void *)(seen->block + gpu.counts_offset);
        const uint32_t *positions = (const void *)(seen->block + gpu.positions_offset);
        assert_int_equal(counts[head], count);
        for (uint32_t slot = 0; slot < count; slot++) {
            assert_int_equal(positions[head * SLOTS + slot], slot);
            assert_memory_equal(keys + slot * bytes, history_key(&history, layer, head, slot), bytes);
            assert_memory_equal(keys + side + slot * bytes, history_value(&history, layer, head, slot), bytes);
        }
    }
}

static enum ice_gpu_copy pull_copy; // of pull landings

static void open_worker(struct worker *worker, const struct daemon *daemon, enum ice_gpu_mode mode)
{
    const struct ice_gpu_options options = {.mode = mode, .copy = mode == ICE_GPU_PULL ? pull_copy : ICE_COPY_ANY};
    worker_open_gpu(worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
    worker_append(worker, &history, 0, LENGTH);
}

// A retrieve of all positions up to `first`.
static void ask(struct retrieve *retrieve, const struct worker *worker, uint32_t row, uint32_t layer, uint64_t first)
{
    retrieve_init(retrieve, worker, &history, layer, first, 1);
    retrieve->row = row;
    retrieve_ends(retrieve, LENGTH, 0, 0);
    retrieve_point(retrieve);
}

static ice_ticket *submit(const struct worker *worker, uint32_t row, uint32_t layer, uint64_t first,
                          uint64_t deadline_us)
{
    struct retrieve retrieve;
    ice_ticket *ticket = NULL;
    ask(&retrieve, worker, row, layer, first);
    retrieve.options.deadline_us = deadline_us;
    assert_ok(ice_retrieve_submit(worker->client, &retrieve.options, &ticket));
    retrieve_fini(&retrieve);
    return ticket;
}

// A whole step as an engine does it, all layers on one row, nothing waited for by the CPU before the end.
static void order(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        struct seen seen;
        open_worker(&worker, daemon, mode);
        seen_open(&seen, &worker);
        for (uint32_t round = 0; round < 30; round++) {
            uint32_t row = round % ROWS, layer = round % shape.layers, count = LENGTH - round;
            ice_ticket *ticket = submit(&worker, row, layer, count - 1, 0);
            assert_ok(ice_ticket_stream_wait(ticket, round % 4 == 3 ? NULL : lane.stream));
            if (round % 4 == 3) // in the default stream: seen by whoever comes behind ice_retrieve_wait
                assert_ok(ice_retrieve_wait(ticket, 0, NULL));
            seen_issue(&seen, &worker, row, layer, &lane);
            assert_true(lane_passes(&lane, 5000000));
            seen_check(&seen, &worker, layer, count);
            struct ice_retrieve_result result;
            assert_ok(ice_retrieve_wait(ticket, 0, &result));
            assert_int_equal(result.counts[0], count);
            assert_ok(ice_retrieve_wait(ticket, 0, NULL)); // again
            ice_status once_more = ice_ticket_stream_wait(ticket, lane.stream);
            if (once_more != ICE_OK) // else the answer of a push was here at once, and nothing was to be waited for
                assert_int_equal(once_more, ICE_INVALID_ARGUMENT);
            assert_true(once_more != ICE_OK || mode == ICE_GPU_PUSH);
            ice_ticket_close(ticket);
        }
        seen_close(&seen);
        worker_close(&worker);
    }
    lane_close(&lane);
}

// The stream does wait, also where the daemon takes long; tickets that are closed at once leave nothing behind.
static void a_slow_daemon(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        struct seen seen;
        struct retrieve again;
        ice_ticket *refused = NULL;
        open_worker(&worker, daemon, mode);
        seen_open(&seen, &worker);
        for (uint32_t round = 0; round < 3; round++) {
            daemon_signal(daemon, SIGSTOP);
            ice_ticket *ticket = submit(&worker, 1, round, LENGTH - 1 - round, 0);
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
            seen_issue(&seen, &worker, 1, round, &lane);
            ice_ticket_close(ticket);
            assert_false(lane_passes(&lane, 50000));
            ask(&again, &worker, 1, 0, 5);
            assert_status(ice_retrieve_submit(worker.client, &again.options, &refused), ICE_BUSY);
            daemon_signal(daemon, SIGCONT);
            assert_true(lane_passes(&lane, 5000000));
            seen_check(&seen, &worker, round, LENGTH - round);
            // The row is free again by itself.
            uint64_t begun = now_us();
            ice_status status;
            while ((status = ice_retrieve(worker.client, &again.options, NULL)) == ICE_BUSY &&
                   now_us() - begun < 1000000)
                sleep_us(100);
            assert_ok(status);
            retrieve_fini(&again);
        }
        seen_close(&seen);
        worker_close(&worker);
    }
    lane_close(&lane);
}

// Several rows in flight, each in a stream of its own; and a row that is bound to another sequence.
static void several_streams(void **state)
{
    struct daemon *daemon = *state;
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        struct lane lanes[ROWS];
        struct seen seen[ROWS];
        open_worker(&worker, daemon, mode);
        for (uint32_t i = 0; i < ROWS; i++) {
            lane_open(&lanes[i]);
            seen_open(&seen[i], &worker);
        }
        for (uint32_t round = 0; round < 10; round++) {
            ice_ticket *tickets[ROWS];
            for (uint32_t i = 0; i < ROWS; i++) {
                tickets[i] = submit(&worker, i, (round + i) % 3, LENGTH - 1 - i, 0);
                assert_ok(ice_ticket_stream_wait(tickets[i], lanes[i].stream));
                seen_issue(&seen[i], &worker, i, (round + i) % 3, &lanes[i]);
            }
            for (uint32_t i = ROWS; i-- > 0;) {
                assert_ok(ice_retrieve_wait(tickets[i], 0, NULL));
                assert_true(lane_passes(&lanes[i], 5000000));
                seen_check(&seen[i], &worker, (round + i) % 3, LENGTH - i);
                ice_ticket_close(tickets[i]);
            }
        }
        ice_sequence *first = worker.sequence;
        worker.sequence = sequence_open(worker.client, &shape);
        worker_append(&worker, &history, 0, LENGTH);
        ice_ticket *ticket = submit(&worker, 2, 1, LENGTH - 1, 0);
        assert_ok(ice_ticket_stream_wait(ticket, lanes[0].stream));
        seen_issue(&seen[0], &worker, 2, 1, &lanes[0]);
        assert_ok(ice_retrieve_wait(ticket, 0, NULL));
        ice_ticket_close(ticket);
        assert_true(lane_passes(&lanes[0], 5000000));
        seen_check(&seen[0], &worker, 1, LENGTH);
        gpu_check_counts(&worker, 2, 0, 0);
        gpu_check_counts(&worker, 2, 2, 0);
        ice_sequence_close(first);
        for (uint32_t i = 0; i < ROWS; i++) {
            seen_close(&seen[i]);
            lane_close(&lanes[i]);
        }
        worker_close(&worker);
    }
}

// Where only what has changed is pulled, by the kernel, behind the wait.
static void by_the_kernel(void **state)
{
    pull_copy = ICE_COPY_CHANGED;
    order(state);
    a_slow_daemon(state);
    several_streams(state);
    pull_copy = ICE_COPY_ANY;
}

// A request that the daemon refuses, early (its session has too much in flight) and late (a position that is not
// there): the stream goes on at once, and the wait tells why.
static void failed_requests(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        open_worker(&worker, daemon, mode);
        for (uint32_t round = 0; round < 6; round++) {
            daemon_signal(daemon, SIGSTOP);
            ice_ticket *first = submit(&worker, 0, 0, LENGTH - 1, 60000000);
            ice_ticket *second = submit(&worker, 1, 0, round % 2 ? LENGTH - 1 : LENGTH + 10, 60000000);
            assert_ok(ice_ticket_stream_wait(second, lane.stream));
            lane_mark(&lane);
            daemon_signal(daemon, SIGCONT);
            assert_true(lane_passes(&lane, 1000000));
            assert_ok(ice_retrieve_wait(first, 0, NULL));
            ice_status status = ice_retrieve_wait(second, 0, NULL);
            assert_true(status == ICE_QUEUE_FULL || status == ICE_POSITION_GAP || (round % 2 == 1 && status == ICE_OK));
            ice_ticket_close(first);
            ice_ticket_close(second);
            // Alone it is always late.
            second = submit(&worker, 1, 0, LENGTH + 10, 60000000);
            status = ice_ticket_stream_wait(second, lane.stream);
            assert_true(status == ICE_OK || status == ICE_POSITION_GAP); // where the refusal is here already
            lane_mark(&lane);
            assert_true(lane_passes(&lane, 1000000));
            assert_status(ice_retrieve_wait(second, 0, NULL), ICE_POSITION_GAP);
            ice_ticket_close(second);
        }
        ice_ticket *ticket = submit(&worker, 1, 1, LENGTH - 1, 0); // the rows are free
        assert_ok(ice_retrieve_wait(ticket, 0, NULL));
        gpu_check(&worker, 1, 1, &history, LENGTH, LENGTH);
        ice_ticket_close(ticket);
        worker_close(&worker);
    }
    lane_close(&lane);
}

// The deadline passes while the daemon does nothing: the stream goes on, and the ticket has failed for good.
static void a_deadline(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        open_worker(&worker, daemon, mode);
        daemon_signal(daemon, SIGSTOP);
        ice_ticket *late = submit(&worker, 0, 0, LENGTH - 1, 20000);
        sleep_us(30000);
        assert_status(ice_ticket_stream_wait(late, lane.stream), ICE_TIMEOUT); // nothing was issued
        ice_ticket *ticket = submit(&worker, 1, 0, LENGTH - 1, 200000);
        uint64_t begun = now_us();
        assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
        lane_mark(&lane);
        assert_true(lane_passes(&lane, 1000000));
        assert_true(now_us() - begun > 100000);
        assert_status(ice_retrieve_wait(ticket, 1000, NULL), ICE_TIMEOUT);
        daemon_signal(daemon, SIGCONT);
        assert_refused(ice_retrieve_wait(ticket, 0, NULL), ICE_TIMEOUT, "without it");
        assert_refused(ice_retrieve_wait(ticket, 0, NULL), ICE_TIMEOUT, "without it");
        ice_ticket_close(ticket);
        assert_ok(ice_retrieve_wait(late, 0, NULL));
        ice_ticket_close(late);
        ticket = submit(&worker, 1, 0, LENGTH - 1, 0);
        assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
        assert_ok(ice_retrieve_wait(ticket, 0, NULL));
        gpu_check(&worker, 1, 0, &history, LENGTH, LENGTH);
        ice_ticket_close(ticket);
        worker_close(&worker);
    }
    lane_close(&lane);
}

// The daemon dies while streams wait: they go on within a second; and what comes after a reconnect waits again.
static void a_daemon_that_dies(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        struct worker worker;
        struct seen seen;
        open_worker(&worker, daemon, mode);
        seen_open(&seen, &worker);
        for (uint32_t round = 0; round < 2; round++) {
            ice_ticket *tickets[2];
            daemon_signal(daemon, SIGSTOP);
            for (uint32_t i = 0; i < 2; i++) {
                tickets[i] = submit(&worker, i, 0, LENGTH - 1, 60000000);
                assert_ok(ice_ticket_stream_wait(tickets[i], lane.stream));
            }
            seen_issue(&seen, &worker, 1, 0, &lane);
            assert_false(lane_passes(&lane, 20000));
            daemon_kill(daemon);
            assert_true(lane_passes(&lane, 1000000));
            for (uint32_t i = 0; i < 2; i++) {
                assert_status(ice_retrieve_wait(tickets[i], 0, NULL), ICE_DISCONNECTED);
                ice_ticket_close(tickets[i]);
            }
            daemon_start(daemon);
            memory_forget_mappings();
            assert_ok(ice_client_reconnect(worker.client));
            ice_landing_close(worker.landing);
            ice_sequence_close(worker.sequence);
            const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
            assert_ok(ice_landing_open_gpu(worker.client, &wanted, &(struct ice_gpu_options){.mode = mode}, 0,
                                           &worker.landing));
            worker.sequence = sequence_open(worker.client, &shape);
            worker_append(&worker, &history, 0, LENGTH);
            tickets[0] = submit(&worker, 2, 2, LENGTH - 1, 0);
            assert_ok(ice_ticket_stream_wait(tickets[0], lane.stream));
            seen_issue(&seen, &worker, 2, 2, &lane);
            assert_true(lane_passes(&lane, 5000000));
            assert_ok(ice_retrieve_wait(tickets[0], 0, NULL));
            seen_check(&seen, &worker, 2, LENGTH);
            ice_ticket_close(tickets[0]);
        }
        seen_close(&seen);
        worker_close(&worker);
    }
    lane_close(&lane);
}

// The session is given up while a stream waits, by reconnect and by the client's close.
static void a_session_that_ends(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        for (uint32_t round = 0; round < 2; round++) {
            struct worker worker;
            open_worker(&worker, daemon, mode);
            // The one request that is answered lets the watchdog run before.
            ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 60000000);
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
            assert_ok(ice_retrieve_wait(ticket, 0, NULL));
            ice_ticket_close(ticket);
            worker_wait_idle(&worker);
            daemon_signal(daemon, SIGSTOP);
            ticket = submit(&worker, 0, 0, LENGTH - 1, 60000000);
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
            lane_mark(&lane);
            if (round == 0) {
                daemon_signal(daemon, SIGCONT);
                assert_ok(ice_client_reconnect(worker.client));
                assert_true(lane_passes(&lane, 1000000));
                ice_status status = ice_retrieve_wait(ticket, 0, NULL);
                assert_true(status == ICE_DISCONNECTED || status == ICE_UNKNOWN_SESSION);
                ice_ticket_close(ticket);
                ice_client_close(worker.client);
            } else {
                // With pull nothing is asked of the daemon: it may sleep on.
                if (mode == ICE_GPU_PUSH)
                    daemon_signal(daemon, SIGCONT);
                uint64_t begun = now_us();
                ice_client_close(worker.client); // with everything open
                assert_true(now_us() - begun < 5000000);
                assert_true(lane_passes(&lane, 1000000));
                if (mode == ICE_GPU_PULL)
                    daemon_signal(daemon, SIGCONT);
            }
        }
    }
    lane_close(&lane);
}

// A landing is closed while a stream waits for it.
static void a_landing_that_is_closed(void **state)
{
    struct daemon *daemon = *state;
    struct lane lane;
    lane_open(&lane);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        for (uint32_t round = 0; round < 8; round++) {
            struct worker worker;
            open_worker(&worker, daemon, mode);
            ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
            lane_mark(&lane);
            sleep_us(round % 4 * 1000);
            ice_landing_close(worker.landing);
            worker.landing = NULL;
            assert_true(lane_passes(&lane, 1000000));
            assert_status(ice_retrieve_wait(ticket, 0, NULL), ICE_UNKNOWN_LANDING);
            assert_status(ice_ticket_stream_wait(ticket, lane.stream), ICE_INVALID_ARGUMENT);
            ice_ticket_close(ticket);
            worker_close(&worker);
        }
    }
    lane_close(&lane);
}

static void refusals(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct lane lane;
    lane_open(&lane);
    assert_refused(ice_ticket_stream_wait(NULL, NULL), ICE_INVALID_ARGUMENT, "ticket is NULL");
    worker_open(&worker, daemon->sockets, &shape, ROWS, SLOTS); // in host memory
    worker_append(&worker, &history, 0, LENGTH);
    ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
    assert_refused(ice_ticket_stream_wait(ticket, NULL), ICE_NOT_SUPPORTED, "host memory");
    assert_ok(ice_retrieve_wait(ticket, 0, NULL));
    ice_ticket_close(ticket);
    worker_close(&worker);
    for (enum ice_gpu_mode mode = ICE_GPU_PUSH; mode <= ICE_GPU_PULL; mode++) {
        open_worker(&worker, daemon, mode);
        ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
        assert_ok(ice_retrieve_wait(ticket, 0, NULL));
        assert_ok(ice_ticket_stream_wait(ticket, lane.stream)); // it is there
        gpu_check(&worker, 0, 0, &history, LENGTH, LENGTH);
        ice_ticket_close(ticket);
        worker_close(&worker);
        for (int old_gpu = 0; old_gpu < 2 && memory_is_fake(); old_gpu++) {
            setenv(old_gpu ? "FAKE_CUDA_OLD_GPU" : "FAKE_CUDA_MISSING", "cuStreamWaitValue64", 1);
            open_worker(&worker, daemon, mode);
            ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
            ice_status status = ice_ticket_stream_wait(ticket, lane.stream);
            if (status != ICE_OK || mode == ICE_GPU_PULL) // else the answer was here already
                assert_int_equal(status, ICE_NOT_SUPPORTED);
            if (status != ICE_OK)
                assert_text(ice_last_error(), old_gpu ? "64-bit values" : "no cuStreamWaitValue64");
            assert_ok(ice_retrieve_wait(ticket, 0, NULL)); // the ticket is as it was
            gpu_check(&worker, 0, 0, &history, LENGTH, LENGTH);
            ice_ticket_close(ticket);
            worker_close(&worker);
            unsetenv(old_gpu ? "FAKE_CUDA_OLD_GPU" : "FAKE_CUDA_MISSING");
        }
        if (memory_is_fake()) {
            open_worker(&worker, daemon, mode);
            daemon_signal(daemon, SIGSTOP);
            ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
            memory_capture(lane.stream, true);
            assert_refused(ice_ticket_stream_wait(ticket, lane.stream), ICE_NOT_SUPPORTED,
                           "captured into a CUDA graph");
            memory_capture(lane.stream, false);
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
            daemon_signal(daemon, SIGCONT);
            assert_ok(ice_retrieve_wait(ticket, 0, NULL));
            ice_ticket_close(ticket);
            worker_close(&worker);
        }
    }
    lane_close(&lane);
}

// Every entry point that a wait needs fails (fake driver): an error with a text; the ticket goes on without, or fails
// where something may be under way; and afterwards everything works, or the row is taken for good.
static void entries_fail(void **state)
{
    struct daemon *daemon = *state;
    static const struct {
        const char *symbol;
        bool before; // anything is issued
    } cases[] = {
        {"cuDeviceGetAttribute", true},      {"cuCtxPushCurrent", true},   {"cuMemHostRegister", true},
        {"cuMemHostGetDevicePointer", true}, {"cuEventCreate", true},      {"cuStreamIsCapturing", true},
        {"cuStreamWaitValue64", true},       {"cuMemcpyHtoDAsync", false}, {"cuEventRecord", false},
    };
    if (!memory_is_fake())
        skip();
    for (size_t i = 0; i < 2 * sizeof cases / sizeof *cases; i++) {
        const char *symbol = cases[i / 2].symbol;
        enum ice_gpu_mode mode = i % 2 ? ICE_GPU_PULL : ICE_GPU_PUSH;
        char line[128];
        struct worker worker;
        struct lane lane;
        if (mode == ICE_GPU_PUSH && strcmp(symbol, "cuMemcpyHtoDAsync") == 0)
            continue;
        lane_open(&lane);
        open_worker(&worker, daemon, mode);
        daemon_signal(daemon, SIGSTOP);
        ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
        snprintf(line, sizeof line, "test_gpu_stream_wait %s 999", symbol);
        memory_fail(line);
        assert_status(ice_ticket_stream_wait(ticket, lane.stream), ICE_SYSTEM);
        memory_fail(NULL);
        assert_text(ice_last_error(), symbol);
        if (cases[i / 2].before)
            assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
        lane_mark(&lane);
        assert_false(lane_passes(&lane, 10000));
        daemon_signal(daemon, SIGCONT);
        assert_true(lane_passes(&lane, 5000000));
        assert_status(ice_retrieve_wait(ticket, 0, NULL), cases[i / 2].before ? ICE_OK : ICE_SYSTEM);
        ice_ticket_close(ticket);
        ticket = submit(&worker, 1, 0, LENGTH - 1, 0); // another row
        assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
        assert_ok(ice_retrieve_wait(ticket, 0, NULL));
        gpu_check(&worker, 1, 0, &history, LENGTH, LENGTH);
        ice_ticket_close(ticket);
        uint64_t begun = now_us();
        worker_close(&worker); // what a lost stream may need stays
        assert_true(now_us() - begun < 5000000);
        lane_close(&lane);
    }
}

// The GPU answers with an error when it is asked how far the stream is: the ticket fails, the row stays taken.
static void a_mark_that_fails(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct lane lane;
    struct retrieve retrieve;
    ice_ticket *again = NULL;
    if (!memory_is_fake())
        skip();
    lane_open(&lane);
    open_worker(&worker, daemon, ICE_GPU_PULL);
    ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
    assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
    memory_fail("test_gpu_stream_wait cuEventQuery 700");
    assert_status(ice_retrieve_wait(ticket, 0, NULL), ICE_SYSTEM);
    memory_fail(NULL);
    assert_status(ice_retrieve_wait(ticket, 0, NULL), ICE_SYSTEM);
    ice_ticket_close(ticket);
    ask(&retrieve, &worker, 0, 0, LENGTH - 1);
    assert_status(ice_retrieve_submit(worker.client, &retrieve.options, &again), ICE_BUSY);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    lane_close(&lane);
}

// A forked child's calls say so and its closes touch nothing of the parent's, whose stream still waits.
static void a_forked_child(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct lane lane;
    lane_open(&lane);
    open_worker(&worker, daemon, ICE_GPU_PULL);
    daemon_signal(daemon, SIGSTOP);
    ice_ticket *ticket = submit(&worker, 0, 0, LENGTH - 1, 0);
    assert_ok(ice_ticket_stream_wait(ticket, lane.stream));
    lane_mark(&lane);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        bool told = ice_ticket_stream_wait(ticket, NULL) == ICE_FORKED;
        ice_ticket_close(ticket);
        ice_landing_close(worker.landing);
        ice_client_close(worker.client);
        _exit(told ? 0 : 1);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_false(lane_passes(&lane, 10000));
    daemon_signal(daemon, SIGCONT);
    assert_true(lane_passes(&lane, 5000000));
    assert_ok(ice_retrieve_wait(ticket, 0, NULL));
    gpu_check(&worker, 0, 0, &history, LENGTH, LENGTH);
    ice_ticket_close(ticket);
    worker_close(&worker);
    lane_close(&lane);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 89);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(order),
        DAEMON_TEST(a_slow_daemon),
        DAEMON_TEST(several_streams),
        DAEMON_TEST(by_the_kernel),
        DAEMON_TEST_WITH(failed_requests, one_in_flight_options),
        DAEMON_TEST(a_deadline),
        DAEMON_TEST(a_daemon_that_dies),
        DAEMON_TEST(a_session_that_ends),
        DAEMON_TEST(a_landing_that_is_closed),
        DAEMON_TEST(refusals),
        DAEMON_TEST(entries_fail),
        DAEMON_TEST(a_mark_that_fails),
        DAEMON_TEST(a_forked_child),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
