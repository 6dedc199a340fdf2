// A CUDA driver that does not return: what it costs is the GPU whose call it is. Over the fake driver only.
#include "memory.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

static const struct shape shape = {2, 2, 4, 32, ICE_FP16};
enum { LENGTH = 120, SLOTS = 128, ROWS = 2 };

static struct history history;
static char log_text[1 << 20];

static void open_on(struct worker *worker, const struct daemon *daemon, int device, enum ice_gpu_mode mode)
{
    worker_open_gpu(worker, daemon->sockets, &shape, ROWS, SLOTS,
                    &(struct ice_gpu_options){.device = device, .mode = mode});
    worker_append(worker, &history, 0, LENGTH);
}

// Tries to open a landing that is pushed to, in little time.
static ice_status try_open(const struct daemon *daemon, int device)
{
    ice_client *client = client_connect(daemon->sockets, 500000, 0);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    ice_landing *landing = NULL;
    ice_status status = ice_landing_open_gpu(
        client, &wanted, &(struct ice_gpu_options){.device = device, .mode = ICE_GPU_PUSH}, 0, &landing);
    ice_client_close(client);
    return status;
}

static uint32_t occurrences(const struct daemon *daemon, const char *text)
{
    uint32_t count = 0;
    daemon_read_log(daemon, log_text, sizeof log_text);
    for (const char *at = log_text; (at = strstr(at, text)) != NULL; at += strlen(text))
        count++;
    return count;
}

// The daemon cannot end in order while the driver keeps one of its threads.
static void expect_hard_end(struct daemon *daemon)
{
    daemon_signal(daemon, SIGTERM);
    int status = child_wait(&daemon->child, TEST_DEADLINE_US);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    assert_int_equal(occurrences(daemon, "leaving without freeing"), 1);
    memory_fail(NULL);
    memory_forget_mappings();
}

// An opening or closing that hangs on one GPU: the other one opens, copies and closes.
static void another_gpu_goes_on(struct daemon *daemon, const char *entry, bool open_before)
{
    struct worker before, worker;
    char line[128];
    if (open_before)
        open_on(&before, daemon, 1, ICE_GPU_PUSH);
    snprintf(line, sizeof line, "icecached %s hang 0", entry);
    memory_fail(line);
    assert_int_equal(try_open(daemon, 0), ICE_TIMEOUT);
    for (int i = 0; i < 3; i++) {
        open_on(&worker, daemon, 1, ICE_GPU_PUSH);
        assert_ok(gpu_retrieve_all(&worker, &history, 0, 1, true));
        worker_close(&worker);
    }
    if (open_before) {
        assert_ok(gpu_retrieve_all(&before, &history, 1, 0, true));
        worker_close(&before);
    }
}

static void an_opening_hangs(void **state)
{
    struct daemon *daemon = *state;
    another_gpu_goes_on(daemon, "cuIpcOpenMemHandle", true);
    sleep_us(16 * 1000000); // now its opener is avoided
    struct worker worker;
    struct ice_gpu_landing gpu;
    open_on(&worker, daemon, 0, ICE_GPU_ANY);
    assert_ok(ice_landing_gpu(worker.landing, &gpu));
    assert_int_equal(gpu.mode, ICE_GPU_PULL);
    assert_text(gpu.pull_reason, "does not return");
    assert_ok(gpu_retrieve_all(&worker, &history, 0, 0, true));
    worker_close(&worker);
    expect_hard_end(daemon);
}

static void making_a_gpus_context_hangs(void **state)
{
    struct daemon *daemon = *state;
    another_gpu_goes_on(daemon, "cuStreamCreateWithPriority", false);
    expect_hard_end(daemon);
}

static void a_closing_hangs(void **state)
{
    struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, 500000, 0);
    const struct ice_landing_shape wanted = landing_shape(&shape, ROWS, SLOTS);
    ice_landing *landing = NULL;
    assert_ok(ice_landing_open_gpu(client, &wanted, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH}, 0, &landing));
    memory_fail("icecached cuIpcCloseMemHandle hang 0");
    ice_client_close(client); // in the daemon the closing never ends
    another_gpu_goes_on(daemon, "cuIpcCloseMemHandle", false);
    expect_hard_end(daemon);
}

// The driver is looked for once more GPUs are named; those in use do without.
static void the_search_hangs(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker;
    open_on(&worker, daemon, 1, ICE_GPU_PUSH);
    memory_fail("icecached cuDeviceGetCount hang");
    assert_int_equal(try_open(daemon, 0), ICE_TIMEOUT);
    assert_ok(gpu_retrieve_all(&worker, &history, 0, 0, true));
    worker_close(&worker);
    open_on(&worker, daemon, 1, ICE_GPU_PUSH);
    assert_ok(gpu_retrieve_all(&worker, &history, 0, 0, true));
    worker_close(&worker);
    expect_hard_end(daemon);
}

// ---- copiers ----

static ice_ticket *submit(struct retrieve *retrieve, const struct worker *worker, uint32_t row)
{
    ice_ticket *ticket = NULL;
    retrieve_init(retrieve, worker, &history, 0, LENGTH - 1, 1);
    retrieve->row = row;
    retrieve_ends(retrieve, LENGTH, 0, 0);
    retrieve->options.deadline_us = TEST_DEADLINE_US;
    assert_ok(ice_retrieve_submit(worker->client, &retrieve->options, &ticket));
    return ticket;
}

// Slow issues keep the copier's queue full: what has ended is answered all the same.
static void answers_come_under_load(void **state)
{
    enum { LOAD = 16 };
    struct daemon *daemon = *state;
    struct worker worker;
    struct retrieve retrieves[LOAD];
    ice_ticket *tickets[LOAD];
    worker_open_gpu(&worker, daemon->sockets, &shape, LOAD, SLOTS, &(struct ice_gpu_options){.mode = ICE_GPU_PUSH});
    worker_append(&worker, &history, 0, LENGTH);
    memory_fail("icecached cuMemcpyHtoDAsync slow");
    const uint64_t begun_us = now_us();
    for (uint32_t row = 0; row < LOAD; row++)
        tickets[row] = submit(&retrieves[row], &worker, row);
    assert_ok(ice_retrieve_wait(tickets[0], TEST_DEADLINE_US, NULL));
    const uint64_t first_us = now_us() - begun_us;
    for (uint32_t row = 1; row < LOAD; row++)
        assert_ok(ice_retrieve_wait(tickets[row], TEST_DEADLINE_US, NULL));
    assert_true(first_us < (now_us() - begun_us) / 2);
    memory_fail(NULL);
    for (uint32_t row = 0; row < LOAD; row++) {
        gpu_check(&worker, row, 0, &history, LENGTH, LENGTH);
        ice_ticket_close(tickets[row]);
        retrieve_fini(&retrieves[row]);
    }
    worker_close(&worker);
}

// One retrieve is inside a call that does not return, another one behind it. The GPU is given up, once; the one behind
// is answered, the one inside when the call returns.
static void a_copy_does_not_return(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker, other;
    struct retrieve inside, behind;
    open_on(&worker, daemon, 0, ICE_GPU_PUSH);
    open_on(&other, daemon, 0, ICE_GPU_PUSH);
    assert_ok(gpu_retrieve_all(&worker, &history, 0, 0, true));
    memory_fail("icecached cuMemcpyHtoDAsync stall");
    ice_ticket *first = submit(&inside, &worker, 0);
    sleep_us(300000);
    ice_ticket *second = submit(&behind, &other, 1);
    assert_refused(ice_retrieve_wait(second, TEST_DEADLINE_US, NULL), ICE_SYSTEM, "has not returned within 10 s");
    assert_int_equal(gpu_retrieve_all(&other, &history, 0, 0, false), ICE_SYSTEM); // at once
    ice_ticket_close(second);
    retrieve_fini(&behind);
    worker_close(&other); // its opener is not kept
    assert_int_equal(ice_retrieve_wait(first, 1500000, NULL), ICE_TIMEOUT);
    assert_int_equal(occurrences(daemon, "is given up until the daemon starts again"), 1);
    memory_fail(NULL);
    assert_refused(ice_retrieve_wait(first, TEST_DEADLINE_US, NULL), ICE_SYSTEM, "has not returned");
    ice_ticket_close(first);
    retrieve_fini(&inside);
    worker_close(&worker);
    gpu_expect_service(daemon, &history, ICE_GPU_ANY);
    assert_int_equal(occurrences(daemon, "is given up until the daemon starts again"), 1);
    assert_int_equal(memory_foreign_mappings(), 0);
}

// The driver does not say whether copies have ended: all that is in flight is answered, and the other GPU goes on.
static void a_question_does_not_return(void **state)
{
    struct daemon *daemon = *state;
    struct worker worker, other;
    struct retrieve retrieves[ROWS];
    ice_ticket *tickets[ROWS];
    open_on(&worker, daemon, 0, ICE_GPU_PUSH);
    open_on(&other, daemon, 1, ICE_GPU_PUSH);
    memory_fail("icecached cuEventQuery hang 0");
    for (uint32_t row = 0; row < ROWS; row++)
        tickets[row] = submit(&retrieves[row], &worker, row);
    assert_ok(gpu_retrieve_all(&other, &history, 0, 1, true));
    for (uint32_t row = 0; row < ROWS; row++) {
        assert_refused(ice_retrieve_wait(tickets[row], TEST_DEADLINE_US, NULL), ICE_SYSTEM, "has not returned");
        ice_ticket_close(tickets[row]);
        retrieve_fini(&retrieves[row]);
    }
    worker_close(&worker);
    assert_int_equal(try_open(daemon, 0), ICE_NOT_SUPPORTED);
    assert_ok(gpu_retrieve_all(&other, &history, 0, 1, true));
    worker_close(&other);
    expect_hard_end(daemon);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    history_create(&history, &shape, LENGTH, 74);
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(an_opening_hangs),
        DAEMON_TEST(making_a_gpus_context_hangs),
        DAEMON_TEST(a_closing_hangs),
        DAEMON_TEST(the_search_hangs),
        DAEMON_TEST(a_copy_does_not_return),
        DAEMON_TEST(answers_come_under_load),
        DAEMON_TEST(a_question_does_not_return),
    };
    if (argc > 1) // one test by its name
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    history_destroy(&history);
    return failed;
}
