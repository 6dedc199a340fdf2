// What can go wrong between a worker, the daemon and the CUDA driver: every entry point fails once in the daemon and
// once in the worker, calls hang, copies never end, and workers lie about their memory. Over the fake driver only.
#include "memory.h"
#include "raw.h"

#include "gpu/export.h"
#include "proto/shm.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct shape shape = {2, 2, 4, 32, ICE_FP16};
enum { LENGTH = 120, SLOTS = 128, ROWS = 2 };

static const char *const symbols[] = {
#define SYMBOL(field, symbol, version, parameters) symbol,
    CUDA_ENTRIES(SYMBOL)
#undef SYMBOL
};
enum { SYMBOLS = sizeof symbols / sizeof *symbols };

static struct history history;

static uint64_t landing_bytes(void)
{
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    uint64_t bytes = 0;
    assert_ok(ice_landing_bytes(&wanted, &bytes));
    return bytes;
}

static ice_status try_retrieve(const struct worker *worker, uint32_t row, uint32_t layer, bool check)
{
    return gpu_retrieve_all(worker, &history, row, layer, check);
}

static void expect_service(const struct daemon *daemon, enum ice_gpu_mode mode)
{
    gpu_expect_service(daemon, &history, mode);
}

// Memory of either kind, for a landing.
struct memory {
    struct mapped mapped;
    cuda_address address;
};

static struct ice_gpu_options memory_create(struct memory *memory, bool pieces)
{
    uint64_t bytes = landing_bytes();
    *memory = (struct memory){0};
    if (pieces)
        mapped_create(&memory->mapped, 2, true);
    else
        memory->address = memory_alloc(bytes);
    return (struct ice_gpu_options){.address = pieces ? memory->mapped.address + (2u << 20) - 4096 : memory->address,
                                    .bytes = bytes};
}

static void memory_destroy(struct memory *memory)
{
    if (memory->address)
        memory_free(memory->address);
    else
        mapped_destroy(&memory->mapped);
}

// ---- every entry point fails ----

static void expect_in_daemon(struct daemon *daemon, const char *symbol, bool pieces)
{
    char line[128];
    struct memory memory;
    struct worker worker;
    const struct ice_gpu_options options = memory_create(&memory, pieces);
    snprintf(line, sizeof line, "icecached %s 999", symbol);
    memory_fail(line);
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &options); // pull needs no driver in the daemon
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker.landing, &gpu));
    if (gpu.mode == ICE_GPU_PULL)
        assert_text(gpu.pull_reason, strcmp(symbol, "cuGetErrorName") == 0 ? "error" : symbol);
    worker_append(&worker, &history, 0, LENGTH);
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        ice_status status = try_retrieve(&worker, layer % ROWS, layer, true);
        if (status != ICE_OK) {
            assert_int_equal(status, ICE_SYSTEM);
            assert_text(ice_last_error(), "copying to the GPU: ");
            assert_text(ice_last_error(), symbol);
        }
    }
    memory_fail(NULL);
    worker_close(&worker);
    memory_destroy(&memory);
    expect_service(daemon, ICE_GPU_ANY);
}

static void every_entry_fails_in_the_daemon(void **state)
{
    struct daemon *daemon = *state;
    for (uint32_t i = 0; i < 2 * SYMBOLS; i++) {
        daemon_start(daemon); // anew: a driver that has failed is not asked again
        expect_in_daemon(daemon, symbols[i / 2], i % 2 == 1);
        daemon_stop(daemon);
        memory_forget_mappings(); // that the failing call has left
    }
}

// failing SOCKETS SYMBOL PIECES: a worker in whose process the entry fails.
static int run_failing(int argc, char **argv)
{
    assert_int_equal(argc, 4);
    char line[128];
    struct memory memory;
    struct worker worker = {.shape = shape, .rows = ROWS, .slots = SLOTS};
    struct ice_gpu_options options = memory_create(&memory, strcmp(argv[3], "1") == 0);
    worker.client = client_connect(argv[1], TEST_DEADLINE_US, 4u << 20);
    worker.sequence = sequence_open(worker.client, &shape);
    worker_append(&worker, &history, 0, LENGTH);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    for (enum ice_gpu_mode mode = ICE_GPU_ANY; mode <= ICE_GPU_PULL; mode++) {
        for (int own = 0; own < 2; own++) {
            options.mode = mode;
            const struct ice_gpu_options made = {.mode = mode};
            worker.landing = NULL;
            snprintf(line, sizeof line, "exe %s 999", argv[2]);
            memory_fail(line);
            ice_status status =
                ice_landing_open_gpu(worker.client, &wanted, own ? &made : &options, 0, &worker.landing);
            if (status != ICE_OK) {
                assert_null(worker.landing);
                assert_string_not_equal(ice_last_error(), "");
                assert_true(status == ICE_SYSTEM || status == ICE_NOT_SUPPORTED || status == ICE_INVALID_ARGUMENT ||
                            status == ICE_OUT_OF_BOUNDS);
                memory_fail(NULL);
                continue;
            }
            ice_status retrieved = try_retrieve(&worker, 0, 0, false);
            memory_fail(NULL);
            if (retrieved == ICE_OK)
                gpu_check(&worker, 0, 0, &history, LENGTH, LENGTH);
            else
                assert_int_equal(retrieved, ICE_SYSTEM);
            ice_landing_close(worker.landing);
        }
    }
    ice_client_close(worker.client);
    return 0;
}

static void every_entry_fails_in_the_worker(void **state)
{
    struct daemon *daemon = *state;
    for (uint32_t i = 0; i < 2 * SYMBOLS; i++) {
        struct child child;
        const char *role[] = {"failing", daemon->sockets, symbols[i / 2], i % 2 ? "1" : "0", NULL};
        child_start_role(&child, role);
        child_expect_exit(&child, 0);
        memory_fail(NULL);
    }
    expect_service(daemon, ICE_GPU_PUSH);
    assert_int_equal(memory_foreign_mappings(), 0);
}

// ---- what hangs ----

// The driver never returns from a closing: only that landing, and a stop in order, are lost.
static void a_closing_that_hangs(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    worker_append(&worker, &history, 0, LENGTH);
    struct worker victim = {.client = client_connect(daemon->sockets, 500000, 0)};
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    assert_ok(ice_landing_open_gpu(victim.client, &wanted, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH}, 0,
                                   &victim.landing));
    memory_fail("icecached cuIpcCloseMemHandle hang");
    uint64_t begun = now_us();
    ice_landing_close(victim.landing);
    assert_true(now_us() - begun < 5000000);
    ice_client_close(victim.client);
    assert_ok(try_retrieve(&worker, 0, 0, true)); // the copier is another thread
    expect_service(daemon, ICE_GPU_PULL);         // and so is the keeper
    daemon_signal(daemon, SIGTERM);
    int status = child_wait(&daemon->child, TEST_DEADLINE_US);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    static char log[1 << 20];
    daemon_read_log(daemon, log, sizeof log);
    assert_text(log, "leaving without freeing");
    memory_fail(NULL);
    memory_forget_mappings();
    worker_close(&worker);
}

static void a_copy_that_never_ends(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    worker_append(&worker, &history, 0, LENGTH);
    assert_ok(try_retrieve(&worker, 0, 0, true));
    memory_fail("icecached cuEventQuery 600"); // not ready
    assert_int_equal(try_retrieve(&worker, 0, 1, true), ICE_SYSTEM);
    assert_text(ice_last_error(), "has not ended within 10 s");
    memory_fail(NULL);
    uint64_t begun = now_us();
    assert_int_equal(try_retrieve(&worker, 1, 0, true), ICE_SYSTEM); // at once: the GPU is given up
    assert_true(now_us() - begun < 5000000);
    expect_service(daemon, ICE_GPU_PULL);
    worker_close(&worker);
}

// In the worker: the row stays taken, and the closing of the ticket and the landing have an end.
static void a_pull_that_never_ends(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker = {.shape = shape, .rows = ROWS, .slots = SLOTS};
    worker.client = client_connect(daemon->sockets, 500000, 4u << 20);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    assert_ok(ice_landing_open_gpu(worker.client, &wanted, &(struct ice_gpu_options){.mode = ICE_GPU_PULL}, 0,
                                   &worker.landing));
    worker.sequence = sequence_open(worker.client, &shape);
    worker_append(&worker, &history, 0, LENGTH);
    memory_fail("test_gpu_fake cuEventQuery 600");
    struct retrieve retrieve;
    ice_ticket *ticket = NULL;
    retrieve_init(&retrieve, &worker, &history, 0, LENGTH - 1, 1);
    retrieve_ends(&retrieve, LENGTH, 0, 0);
    assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &ticket));
    assert_refused(ice_retrieve_wait(ticket, 100000, NULL), ICE_TIMEOUT, "copy to the GPU");
    ice_ticket *again = NULL;
    assert_status(ice_retrieve_submit(worker.client, &retrieve.options, &again), ICE_BUSY);
    memory_fail(NULL);
    assert_ok(ice_retrieve_wait(ticket, 0, NULL)); // it went on
    gpu_check(&worker, 0, 0, &history, LENGTH, LENGTH);
    ice_ticket_close(ticket);
    memory_fail("test_gpu_fake cuEventQuery 600");
    uint64_t begun = now_us();
    assert_status(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_TIMEOUT);
    ice_landing_close(worker.landing);
    assert_true(now_us() - begun < 10000000);
    memory_fail(NULL);
    retrieve_fini(&retrieve);
    ice_client_close(worker.client);
}

// ---- the kernel ----

// Without it whole blocks are copied, and the landing says why; who insists on it is refused.
static void no_kernel(void **state)
{
    struct daemon *daemon = *state;
    static const char *const calls[] = {"cuMemHostGetDevicePointer", "cuModuleLoadData", "cuModuleGetFunction",
                                        "cuLaunchKernel"};
    struct worker worker;
    worker_open(&worker, daemon->sockets, &shape, ROWS, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    ice_landing *host = worker.landing;
    for (uint32_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        char line[128];
        struct ice_gpu_landing gpu;
        const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
        struct ice_gpu_options options = {.mode = ICE_GPU_PULL};
        snprintf(line, sizeof line, "test_gpu_fake %s 999", calls[i]);
        memory_fail(line);
        assert_ok(ice_landing_open_gpu(worker.client, &wanted, &options, 0, &worker.landing));
        memory_fail(NULL);
        assert_ok(ice_landing_gpu(worker.landing, &gpu));
        assert_false(gpu.copies_changed);
        assert_text(gpu.copy_reason, calls[i]);
        assert_ok(try_retrieve(&worker, 0, 0, true));
        assert_ok(try_retrieve(&worker, 0, 0, true));
        ice_landing_close(worker.landing);
        options.copy = ICE_COPY_CHANGED;
        memory_fail(line);
        assert_refused(ice_landing_open_gpu(worker.client, &wanted, &options, 0, &worker.landing), ICE_NOT_SUPPORTED,
                       calls[i]);
        memory_fail(NULL);
    }
    worker.landing = host;
    worker_close(&worker);
}

// A launch that fails: its row is lost, as with a copy, and nothing else is.
static void a_kernel_that_fails(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    const struct ice_gpu_options options = {.mode = ICE_GPU_PULL, .copy = ICE_COPY_CHANGED};
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &options);
    worker_append(&worker, &history, 0, LENGTH);
    for (uint32_t row = 0; row < ROWS; row++)
        assert_ok(try_retrieve(&worker, row, 0, true)); // a block
    assert_ok(try_retrieve(&worker, 0, 0, true));
    memory_fail("test_gpu_fake cuLaunchKernel 999");
    assert_int_equal(try_retrieve(&worker, 0, 0, true), ICE_SYSTEM);
    assert_text(ice_last_error(), "cuLaunchKernel");
    memory_fail(NULL);
    assert_int_equal(try_retrieve(&worker, 0, 0, true), ICE_BUSY);
    assert_ok(try_retrieve(&worker, 1, 0, true));
    worker_close(&worker);
    expect_service(daemon, ICE_GPU_PULL);
}

// ---- which GPU, which driver ----

static void expect_reason(struct daemon *daemon, const char *reason)
{
    struct worker worker;
    struct ice_gpu_landing gpu;
    daemon_start(daemon);
    unsetenv("FAKE_CUDA_DEVICES");
    unsetenv("FAKE_CUDA_MISSING");
    worker_open_gpu(&worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){0});
    assert_ok(ice_landing_gpu(worker.landing, &gpu));
    assert_int_equal(gpu.mode, ICE_GPU_PULL);
    assert_text(gpu.pull_reason, reason);
    worker_append(&worker, &history, 0, LENGTH);
    assert_ok(try_retrieve(&worker, 0, 0, true));
    worker_close(&worker);
    daemon_stop(daemon);
}

static void a_gpu_that_the_daemon_does_not_see(void **state)
{
    setenv("FAKE_CUDA_DEVICES", "1", 1);
    expect_reason(*state, "GPU-40404040-4040-4040-4040-404040404040 is none of the 1 GPUs");
}

static void a_driver_that_is_too_old(void **state)
{
    setenv("FAKE_CUDA_MISSING", "cuMemMap", 1);
    expect_reason(*state, "it has no cuMemMap");
}

static void a_driver_without_a_gpu(void **state)
{
    setenv("FAKE_CUDA_DEVICES", "", 1);
    expect_reason(*state, "it finds no GPU");
}

static void two_gpus(void **state)
{
    struct daemon *daemon = *state;
    struct worker workers[2];
    for (int i = 0; i < 2; i++) {
        const struct ice_gpu_options options = {.device = i, .mode = ICE_GPU_PUSH};
        worker_open_gpu(&workers[i], daemon->sockets, &shape, ROWS, SLOTS, &options);
        worker_append(&workers[i], &history, 0, LENGTH);
    }
    for (uint32_t i = 0; i < 20; i++)
        assert_ok(try_retrieve(&workers[i % 2], i % ROWS, i / 2 % shape.layers, true));
    for (int i = 0; i < 2; i++) {
        struct ice_gpu_landing gpu;
        assert_ok(ice_landing_gpu(workers[i].landing, &gpu));
        assert_string_equal(gpu.device_name, i ? "Fake GPU 1" : "Fake GPU 0");
        worker_close(&workers[i]);
    }
}

static void one_process_is_not_two(void **state)
{
    (void)state;
    char text[CUDA_TEXT_BYTES] = "";
    struct gpu_device device;
    struct gpu_export memory;
    struct gpu_import import;
    cuda_address address = memory_alloc(1u << 20);
    assert_int_equal(gpu_device_open(memory_driver(), 0, NULL, &device, text), ICE_OK);
    assert_int_equal(gpu_device_enter(&device, text), ICE_OK);
    assert_int_equal(gpu_export_open(&device, address + 4096, 8192, &memory, text), ICE_OK);
    assert_int_equal(memory.offset, 4096);
    assert_int_equal(gpu_import_open(&device, &memory, 8192, &import, text), ICE_NOT_SUPPORTED);
    assert_text(text, "different pids");
    assert_int_equal(gpu_export_open(&device, address + 4096, 1u << 20, &memory, text), ICE_OUT_OF_BOUNDS);
    assert_text(text, "ends 4096 bytes before");
    gpu_export_close(&memory);
    gpu_device_leave(&device);
    gpu_device_close(&device);
    memory_free(address);
}

// ---- workers that lie ----

struct lie {
    Icecache__Wire__LandingOpen open;
    Icecache__Wire__GpuMemory gpu;
    uint8_t uuid[CUDA_UUID_BYTES], handle[CUDA_HANDLE_BYTES], probe[WIRE_GPU_PROBE_BYTES];
    uint64_t pieces[2];
};

// A true description of a landing at the address, which may then be changed.
static void lie_init(struct lie *lie, cuda_address address)
{
    char text[CUDA_TEXT_BYTES] = "";
    struct gpu_device device;
    struct gpu_export memory;
    *lie = (struct lie){.open = ICECACHE__WIRE__LANDING_OPEN__INIT, .gpu = ICECACHE__WIRE__GPU_MEMORY__INIT};
    assert_int_equal(gpu_device_open(memory_driver(), 0, NULL, &device, text), ICE_OK);
    assert_int_equal(gpu_device_enter(&device, text), ICE_OK);
    assert_int_equal(gpu_export_open(&device, address, landing_bytes(), &memory, text), ICE_OK);
    memset(lie->probe, 0x77, sizeof lie->probe);
    assert_int_equal(gpu_probe_write(&device, address, landing_bytes(), lie->probe, text), ICE_OK);
    gpu_device_leave(&device);
    gpu_device_close(&device);
    memcpy(lie->uuid, memory.uuid, sizeof lie->uuid);
    memcpy(lie->handle, memory.handle, sizeof lie->handle);
    lie->gpu.uuid = (ProtobufCBinaryData){sizeof lie->uuid, lie->uuid};
    lie->gpu.handle = (ProtobufCBinaryData){sizeof lie->handle, lie->handle};
    lie->gpu.probe = (ProtobufCBinaryData){sizeof lie->probe, lie->probe};
    lie->gpu.offset = memory.offset;
    lie->gpu.piece_bytes = lie->pieces;
    lie->pieces[0] = lie->pieces[1] = 2u << 20;
    lie->open.rows = ROWS;
    lie->open.layers = shape.layers;
    lie->open.kv_heads = shape.kv_heads;
    lie->open.slots = SLOTS;
    lie->open.head_dim = shape.head_dim;
    lie->open.dtype = shape.dtype;
    lie->open.place = LANDING_PUSH;
    lie->open.gpu = &lie->gpu;
}

static void lie_send(struct raw *raw, struct lie *lie, const int *fds, uint32_t count)
{
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    request.request_id = ++raw->next_id;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
    request.landing_open = &lie->open;
    size_t size = icecache__wire__control_request__pack(&request, bytes);
    assert_int_equal(control_send_all(raw->control_fd, bytes, size, fds, count, 1000), ICE_OK);
}

static void lie_tell(struct raw *raw, struct lie *lie, const int *fds, uint32_t count, ice_status status,
                     const char *text)
{
    lie_send(raw, lie, fds, count);
    raw_control_expect(raw_control_receive(raw, NULL), status, text);
}

// While the opener hangs, descriptors do not heap up.
static void descriptors_wait_in_small_numbers(void **state)
{
    struct daemon *daemon = *state;
    struct raw raw;
    struct lie lie;
    int fds[100];
    cuda_address address = memory_alloc(landing_bytes());
    raw_open(&raw, daemon);
    lie_init(&lie, address);
    lie.gpu.handle.len = 0;
    uint64_t pieces[100];
    for (uint32_t i = 0; i < 100; i++) {
        fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
        pieces[i] = 2u << 20;
    }
    lie.gpu.piece_bytes = pieces;
    lie.gpu.n_piece_bytes = 100;
    memory_fail("icecached cuMemAddressReserve hang");
    lie_send(&raw, &lie, fds, 100); // no answer to it
    lie_tell(&raw, &lie, fds, 100, ICE_LIMIT, "200 descriptors");
    for (uint32_t i = 0; i < 100; i++)
        close(fds[i]);
    raw_close(&raw);
    expect_service(daemon, ICE_GPU_PULL);
    memory_fail(NULL);
    daemon_kill(daemon); // its opener hangs for good
    memory_free(address);
}

static void lies(void **state)
{
    struct daemon *daemon = *state;
    cuda_address address = memory_alloc(landing_bytes() + 4096);
    struct raw raw;
    struct lie lie;
    raw_open(&raw, daemon);
    int fds[WIRE_DESCRIPTORS_MAX];
    for (uint32_t i = 0; i < WIRE_DESCRIPTORS_MAX; i++)
        fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);

    lie_init(&lie, address);
    lie.open.place = 3;
    lie_tell(&raw, &lie, NULL, 0, ICE_NOT_SUPPORTED, "place 3");
    lie.open.place = LANDING_PULL;
    lie_tell(&raw, &lie, NULL, 0, ICE_INVALID_ARGUMENT, "has no GPU memory");
    lie.open.place = LANDING_PUSH;
    lie.open.gpu = NULL;
    lie_tell(&raw, &lie, NULL, 0, ICE_INVALID_ARGUMENT, "must name its GPU memory");

    lie_init(&lie, address);
    lie.gpu.uuid.len = 15;
    lie_tell(&raw, &lie, NULL, 0, ICE_INVALID_ARGUMENT, "uuid");
    lie_init(&lie, address);
    lie.gpu.probe.len = 0;
    lie_tell(&raw, &lie, NULL, 0, ICE_INVALID_ARGUMENT, "probe");
    lie_init(&lie, address);
    lie.gpu.handle.len = 63;
    lie_tell(&raw, &lie, NULL, 0, ICE_INVALID_ARGUMENT, "handle");
    lie_init(&lie, address);
    lie.gpu.n_piece_bytes = 1;
    lie_tell(&raw, &lie, fds, 1, ICE_INVALID_ARGUMENT, "give one of them");
    lie_init(&lie, address);
    lie.gpu.offset = UINT64_MAX;
    lie_tell(&raw, &lie, NULL, 0, ICE_OUT_OF_BOUNDS, "offset");

    lie_init(&lie, address);
    lie.gpu.offset = 4097;
    lie_tell(&raw, &lie, NULL, 0, ICE_OUT_OF_BOUNDS, "do not fit");
    lie_init(&lie, address);
    lie.gpu.offset = 4096; // inside, but not where the pattern is
    lie_tell(&raw, &lie, NULL, 0, ICE_CONFLICT, "do not see the same");
    lie_init(&lie, address);
    lie.probe[127] ^= 1;
    lie_tell(&raw, &lie, NULL, 0, ICE_CONFLICT, "do not see the same");
    lie_init(&lie, address);
    memset(lie.handle, 0xee, sizeof lie.handle);
    lie_tell(&raw, &lie, NULL, 0, ICE_SYSTEM, "cuIpcOpenMemHandle");
    lie_init(&lie, address);
    lie.uuid[3] ^= 1;
    lie_tell(&raw, &lie, NULL, 0, ICE_NOT_SUPPORTED, "none of the 2 GPUs");

    lie_init(&lie, address);
    lie.gpu.handle.len = 0;
    lie.gpu.n_piece_bytes = 2;
    lie_tell(&raw, &lie, fds, 1, ICE_SYSTEM, "not all descriptors");
    lie_tell(&raw, &lie, fds, WIRE_DESCRIPTORS_MAX, ICE_SYSTEM, "not all descriptors");
    lie_tell(&raw, &lie, fds, 2, ICE_SYSTEM, "cuMemImportFromShareableHandle");
    lie.pieces[1] = 0;
    lie_tell(&raw, &lie, fds, 2, ICE_OUT_OF_BOUNDS, "piece 1");
    lie.pieces[1] = 4096; // no multiple of the driver's granularity
    lie_tell(&raw, &lie, fds, 2, ICE_SYSTEM, "cuMemAddressReserve");
    lie.gpu.n_piece_bytes = 1;
    lie.pieces[0] = 4096;
    lie_tell(&raw, &lie, fds, 1, ICE_OUT_OF_BOUNDS, "do not fit");

    lie_init(&lie, address);
    lie_tell(&raw, &lie, fds, WIRE_DESCRIPTORS_MAX, ICE_SYSTEM, "not all descriptors"); // where none is wanted
    for (uint32_t i = 0; i < WIRE_DESCRIPTORS_MAX; i++)
        close(fds[i]);
    assert_int_equal(memory_foreign_mappings(), 0);
    raw_close(&raw);
    expect_service(daemon, ICE_GPU_PUSH);
    memory_free(address);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{"failing", run_failing}};
    int exit_status;
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 73);
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {
        FOLDER_TEST(every_entry_fails_in_the_daemon),
        DAEMON_TEST(every_entry_fails_in_the_worker),
        DAEMON_TEST(a_closing_that_hangs),
        DAEMON_TEST(a_copy_that_never_ends),
        DAEMON_TEST(a_pull_that_never_ends),
        DAEMON_TEST(no_kernel),
        DAEMON_TEST(a_kernel_that_fails),
        FOLDER_TEST(a_gpu_that_the_daemon_does_not_see),
        FOLDER_TEST(a_driver_that_is_too_old),
        FOLDER_TEST(a_driver_without_a_gpu),
        DAEMON_TEST(two_gpus),
        cmocka_unit_test(one_process_is_not_two),
        DAEMON_TEST(lies),
        DAEMON_TEST(descriptors_wait_in_small_numbers),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
