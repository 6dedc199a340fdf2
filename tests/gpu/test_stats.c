// What `icecachectl stats` says of GPUs: what was copied, and how much of a GPU's memory the daemon takes, by an NVML
// that knows it, does not, or fails. Over the fake driver only.
#include "memory.h"

#include "gpu/nvml.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 32, ICE_FP16};
enum { LENGTH = 120, SLOTS = 128, ROWS = 2 };
#define CONTEXT_BYTES (300u << 20) // as the fake NVML has it

static struct history history;

static void open_worker(struct worker *worker, const struct daemon *daemon, enum ice_gpu_mode mode)
{
    worker_open_gpu(worker, daemon->sockets, &shape, ROWS, SLOTS, &(struct ice_gpu_options){.mode = mode});
    worker_append(worker, &history, 0, LENGTH);
    assert_ok(gpu_retrieve_all(worker, &history, 0, 0, true));
}

// The only GPU of the statistics; free *stats.
static const json_t *only_gpu(const struct daemon *daemon, json_t **stats)
{
    *stats = stats_read(daemon);
    const json_t *list = json_object_get(*stats, "gpu");
    assert_int_equal(json_array_size(list), 1);
    return json_array_get(list, 0);
}

static const char *text_of(const json_t *gpu, const char *key)
{
    const char *text = json_string_value(json_object_get(gpu, key));
    assert_non_null(text);
    return text;
}

static void pull_takes_no_gpu_memory(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    open_worker(&worker, daemon, ICE_GPU_PULL);
    json_t *stats = stats_read(daemon);
    assert_int_equal(json_array_size(json_object_get(stats, "gpu")), 0);
    json_decref(stats);
    worker_close(&worker);
}

static void copies_are_counted(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    struct ice_gpu_landing landing;
    open_worker(&worker, daemon, ICE_GPU_PUSH);
    assert_ok(ice_landing_gpu(worker.landing, &landing));
    json_t *stats;
    const json_t *gpu = only_gpu(daemon, &stats);
    assert_string_equal(text_of(gpu, "name"), "Fake GPU 0");
    assert_string_equal(text_of(gpu, "uuid"), "GPU-40404040-4040-4040-4040-404040404040");
    assert_string_equal(text_of(gpu, "broken"), "");
    assert_string_equal(text_of(gpu, "vram_source"), "NVML");
    assert_int_equal(stats_number(gpu, "vram_bytes"), CONTEXT_BYTES);
    assert_int_equal(stats_number(gpu, "landings"), 1);
    assert_int_equal(stats_number(gpu, "copies"), 1);
    assert_int_equal(stats_number(gpu, "bytes_copied"), landing.layer_bytes);
    json_decref(stats);
    assert_ok(gpu_retrieve_all(&worker, &history, 0, 0, true));
    worker_close(&worker);
    gpu = only_gpu(daemon, &stats);
    assert_int_equal(stats_number(gpu, "landings"), 0);
    assert_int_equal(stats_number(gpu, "copies"), 2);
    assert_int_equal(stats_number(gpu, "vram_bytes"), CONTEXT_BYTES); // the context stays
    json_decref(stats);
}

static void a_gpu_that_was_given_up_says_why(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    open_worker(&worker, daemon, ICE_GPU_PUSH);
    memory_fail("icecached cuEventQuery 999");
    assert_int_equal(gpu_retrieve_all(&worker, &history, 0, 0, false), ICE_SYSTEM);
    memory_fail(NULL);
    json_t *stats;
    assert_text(text_of(only_gpu(daemon, &stats), "broken"), "cuEventQuery");
    json_decref(stats);
    worker_close(&worker);
}

// ---- where the figure comes from ----

// By a daemon with this variable. bytes: 0: unknown.
static void expect_source(struct daemon *daemon, const char *variable, const char *value, uint64_t bytes,
                          const char *source)
{
    char before[256];
    const char *set = getenv(variable);
    snprintf(before, sizeof before, "%s", set ? set : "");
    setenv(variable, value, 1);
    daemon_start(daemon);
    if (set)
        setenv(variable, before, 1);
    else
        unsetenv(variable);
    struct worker worker;
    open_worker(&worker, daemon, ICE_GPU_PUSH);
    json_t *stats;
    const json_t *gpu = only_gpu(daemon, &stats);
    assert_text(text_of(gpu, "vram_source"), source);
    if (bytes > 0)
        assert_int_equal(stats_number(gpu, "vram_bytes"), bytes);
    else
        assert_true(json_is_null(json_object_get(gpu, "vram_bytes")));
    json_decref(stats);
    worker_close(&worker);
    daemon_stop(daemon);
}

static void sources(void **state)
{
    // A context of another process, so that there is a list before the daemon's.
    const struct cuda_driver *driver = memory_driver();
    (void)driver;
    expect_source(*state, "FAKE_NVML_PID_OFFSET", "0", CONTEXT_BYTES, "NVML");
    expect_source(*state, "FAKE_NVML_PID_OFFSET", "5000000", CONTEXT_BYTES, "NVML"); // as in a container
    expect_source(*state, "FAKE_NVML", "silent", CONTEXT_BYTES, "had more in use");
    expect_source(*state, "FAKE_NVML", "mute", CONTEXT_BYTES, "had more in use");
    expect_source(*state, "ICECACHE_NVML_LIBRARY", "/nowhere/libnvidia-ml.so", 0, "no NVML: /nowhere/libnvidia-ml.so");
    expect_source(*state, "ICECACHE_NVML_LIBRARY", getenv("ICECACHE_CUDA_LIBRARY"), 0, "NVML has no nvmlInit_v2");
}

static void every_nvml_entry_fails(void **state)
{
    static const char *const symbols[] = {
#define SYMBOL(field, symbol, parameters) symbol,
        NVML_ENTRIES(SYMBOL)
#undef SYMBOL
    };
    struct daemon *daemon = *state;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        char line[128];
        snprintf(line, sizeof line, "icecached %s 999", symbols[i]);
        daemon_start(daemon);
        memory_fail(line);
        struct worker worker;
        open_worker(&worker, daemon, ICE_GPU_PUSH);
        json_t *stats;
        const json_t *gpu = only_gpu(daemon, &stats);
        if (strcmp(symbols[i], "nvmlShutdown") == 0) {
            assert_int_equal(stats_number(gpu, "vram_bytes"), CONTEXT_BYTES);
        } else {
            assert_true(json_is_null(json_object_get(gpu, "vram_bytes")));
            assert_text(text_of(gpu, "vram_source"), "answers 999");
        }
        json_decref(stats);
        worker_close(&worker);
        daemon_stop(daemon);
        memory_fail(NULL);
    }
}

// It costs the landings on that GPU that are to be opened or closed, and no answer to anybody else.
static void nvml_hangs(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    open_worker(&worker, daemon, ICE_GPU_PUSH);
    memory_fail("icecached nvmlDeviceGetComputeRunningProcesses_v3 stall");
    sleep_us(1100000); // the figure is due again
    for (int i = 0; i < 3; i++) {
        json_t *stats;
        assert_int_equal(stats_number(only_gpu(daemon, &stats), "vram_bytes"), CONTEXT_BYTES);
        json_decref(stats);
    }
    assert_ok(gpu_retrieve_all(&worker, &history, 1, 1, true));
    gpu_expect_service(daemon, &history, ICE_GPU_PULL);
    memory_fail(NULL);
    worker_close(&worker);
}

// It fails later on: what was seen before is not shown for ever.
static void nvml_fails_later(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    open_worker(&worker, daemon, ICE_GPU_PUSH);
    memory_fail("icecached nvmlDeviceGetComputeRunningProcesses_v3 15");
    sleep_us(1100000);
    json_decref(stats_read(daemon)); // asks
    uint64_t until_us = now_us() + TEST_DEADLINE_US;
    for (bool seen = false; !seen;) {
        json_t *stats;
        seen = strstr(text_of(only_gpu(daemon, &stats), "vram_source"), "had more in use") != NULL;
        json_decref(stats);
        assert_true(now_us() < until_us);
    }
    memory_fail(NULL);
    worker_close(&worker);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 75);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(pull_takes_no_gpu_memory),
        DAEMON_TEST(copies_are_counted),
        DAEMON_TEST(a_gpu_that_was_given_up_says_why),
        FOLDER_TEST(sources),
        FOLDER_TEST(every_nvml_entry_fails),
        DAEMON_TEST(nvml_hangs),
        DAEMON_TEST(nvml_fails_later),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
