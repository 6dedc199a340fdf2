// Start and stop of the daemon: sockets, locks, options, what SIGTERM waits for.
#include "worker.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/control.h"

static const struct shape wide = {1, 2, 8, 128, ICE_BF16};
enum { LENGTH = 8000, QUERIES = 256, ROWS = 32 };

static void path_in(const struct daemon *daemon, const char *name, char *path, size_t capacity)
{
    assert_int_equal(control_path(path, capacity, daemon->sockets, name), ICE_OK);
}

static mode_t mode_of(const struct daemon *daemon, const char *name)
{
    char path[128];
    struct stat stat_of;
    path_in(daemon, name, path, sizeof path);
    assert_int_equal(stat(path, &stat_of), 0);
    return stat_of.st_mode & 0777;
}

static bool exists(const struct daemon *daemon, const char *name)
{
    char path[128];
    path_in(daemon, name, path, sizeof path);
    return access(path, F_OK) == 0;
}

static void wait_for_exit(struct daemon *daemon, uint64_t deadline_us)
{
    int status = child_wait(&daemon->child, deadline_us);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

// ---- files ----

static void modes(void **state)
{
    struct daemon *daemon = *state;
    struct stat folder;
    mode_t before = umask(0); // the daemon's modes do not depend on it
    daemon_start(daemon);
    umask(before);
    assert_int_equal(stat(daemon->sockets, &folder), 0);
    assert_int_equal(folder.st_mode & 0777, 0700);
    assert_int_equal(mode_of(daemon, CONTROL_SOCKET_NAME), 0600);
    assert_int_equal(mode_of(daemon, CONTROL_DATA_SOCKET_NAME), 0600);
    assert_int_equal(mode_of(daemon, CONTROL_LOCK_NAME), 0600);
    daemon_stop(daemon);
    assert_false(exists(daemon, CONTROL_SOCKET_NAME));
    assert_false(exists(daemon, CONTROL_DATA_SOCKET_NAME));
    static const char *const options[] = {
        "--pool-bytes", "4m", "--index-bytes", "4m", "--shared-bytes", "4m", "--socket-mode", "660", NULL};
    daemon->options = options;
    daemon_start(daemon);
    assert_int_equal(mode_of(daemon, CONTROL_SOCKET_NAME), 0660);
    assert_int_equal(mode_of(daemon, CONTROL_DATA_SOCKET_NAME), 0660);
    daemon_stop(daemon);
}

static void stale_sockets_are_taken_over(void **state)
{
    struct daemon *daemon = *state;
    for (int round = 0; round < 5; round++) {
        daemon_kill(daemon);
        assert_true(exists(daemon, CONTROL_SOCKET_NAME));
        assert_true(exists(daemon, CONTROL_DATA_SOCKET_NAME));
        daemon_start(daemon);
        ice_client *client = client_connect(daemon->sockets, 0, 0);
        ice_sequence_close(sequence_open(client, &wide));
        ice_client_close(client);
    }
    for (int round = 0; round < 3; round++) {
        daemon_stop(daemon);
        daemon_start(daemon);
    }
}

static void a_second_daemon(void **state)
{
    struct daemon *daemon = *state;
    char output[4096], holder[64];
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    const char *arguments[] = {daemon_path(), "--socket-dir", daemon->sockets, "--pool-bytes", "4m", NULL};
    assert_int_equal(child_run(arguments, output, sizeof output), 1);
    snprintf(holder, sizeof holder, "another icecached (pid %d) serves", (int)daemon->child.pid);
    assert_text(output, holder);
    ice_sequence_close(sequence_open(client, &wide)); // the first has noticed nothing
    ice_client_close(client);
}

// ---- options ----

static void expect_run(const char *const *options, int exit_status, const char *text)
{
    const char *arguments[CHILD_ARGUMENTS_MAX] = {daemon_path()};
    char output[8192];
    for (size_t i = 0; options[i]; i++)
        arguments[i + 1] = options[i];
    int status = child_run(arguments, output, sizeof output);
    if (status != exit_status)
        fail_msg("icecached %s exits %d: %s", options[0], status, output);
    assert_text(output, text);
}

#define RUN(...)                                                                                                       \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }

static void options(void **state)
{
    const struct daemon *daemon = *state;
    char file[128], below[160], long_path[300];
    expect_run(RUN("--help"), 0, "--pool-bytes");
    expect_run(RUN("--version"), 0, ICECACHE_VERSION);
    expect_run(RUN("--nonsense"), 2, "unknown option --nonsense");
    expect_run(RUN("--pool-bytes"), 2, "--pool-bytes needs a value");
    expect_run(RUN("--pool-bytes", "lots"), 2, "--pool-bytes: 'lots' is not a size");
    expect_run(RUN("--pool-bytes", "1k"), 2, "--pool-bytes: '1k'");
    expect_run(RUN("--pool-bytes", "-1"), 2, "--pool-bytes: '-1'");
    expect_run(RUN("--index-bytes", "99999999t"), 2, "--index-bytes");
    expect_run(RUN("--shards", "257"), 2, "--shards: '257' is not a number from 0 to 256");
    expect_run(RUN("--page-tokens", "0"), 2, "--page-tokens");
    expect_run(RUN("--sessions-max", "3.5"), 2, "--sessions-max");
    expect_run(RUN("--socket-mode", "888"), 2, "--socket-mode: '888' is not a mode");
    expect_run(RUN("--log-level", "loud"), 2, "none of error, warn, info, debug");
    expect_run(RUN("serve"), 2, "unexpected argument 'serve'");
    memset(long_path, 'p', sizeof long_path - 1);
    long_path[0] = '/';
    long_path[sizeof long_path - 1] = '\0';
    expect_run(RUN("--socket-dir", long_path), 2, "--socket-dir");
    long_path[100] = '\0'; // fits by itself, but not with a socket's name
    expect_run(RUN("--socket-dir", long_path, "--pool-bytes", "4m"), 1, "too long for a socket");
    setenv("ICECACHE_POOL_BYTES", "nothing", 1);
    expect_run(RUN("--log-level", "info"), 2, "--pool-bytes: 'nothing'");
    unsetenv("ICECACHE_POOL_BYTES");
    snprintf(file, sizeof file, "%s/file", daemon->folder);
    snprintf(below, sizeof below, "%s/none/s", daemon->folder);
    FILE *stream = fopen(file, "we");
    assert_non_null(stream);
    fclose(stream);
    expect_run(RUN("--socket-dir", file, "--pool-bytes", "4m"), 1, file);
    expect_run(RUN("--socket-dir", below, "--pool-bytes", "4m"), 1, "No such file");
}

// An option also comes from the environment; the flag wins.
static void options_from_the_environment(void **state)
{
    struct daemon *daemon = *state;
    setenv("ICECACHE_POOL_BYTES", "8m", 1);
    setenv("ICECACHE_INDEX_BYTES", "8m", 1);
    static const char *const given[] = {"--index-bytes", "16m", "--shared-bytes", "4m", NULL};
    daemon->options = given;
    daemon_start(daemon);
    unsetenv("ICECACHE_POOL_BYTES");
    unsetenv("ICECACHE_INDEX_BYTES");
    json_t *stats = stats_read(daemon);
    assert_int_equal(stats_number(stats, "bytes.pool_capacity"), 8u << 20);
    assert_int_equal(stats_number(stats, "bytes.index_capacity"), 16u << 20);
    assert_int_equal(stats_number(stats, "bytes.shared_capacity"), 4u << 20);
    json_decref(stats);
}

// ---- stopping ----

// A pool of small pages takes a second or so to populate; a stop meanwhile is heeded at once.
static void sigterm_while_populating(void **state)
{
    struct daemon *daemon = *state;
    const char *arguments[] = {daemon_path(),   "--socket-dir", daemon->sockets,  "--pool-bytes", "1500m",
                               "--index-bytes", "16m",          "--shared-bytes", "16m",          NULL};
    char text[8192] = "";
    child_start(&daemon->child, arguments, daemon->log);
    for (uint64_t until = now_us() + TEST_DEADLINE_US; !strstr(text, "populating the pool"); sleep_us(500)) {
        assert_true(now_us() < until);
        daemon_read_log(daemon, text, sizeof text);
    }
    uint64_t from = now_us();
    daemon_signal(daemon, SIGTERM);
    wait_for_exit(daemon, 5000000);
    print_message("stopped after %.3f s\n", (double)(now_us() - from) / 1e6);
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, "stopped while the pool was populated");
    assert_null(strstr(text, "ready: version="));
    assert_false(exists(daemon, CONTROL_SOCKET_NAME));
}

// Retrieves that keep the daemon busy for about a second, all of them received.
struct flood {
    struct history history;
    struct worker worker;
    ice_ticket *tickets[ROWS];
    uint32_t count;
};

static void submit(struct flood *flood, uint32_t row)
{
    struct retrieve retrieve;
    retrieve_init(&retrieve, &flood->worker, &flood->history, 0, LENGTH - QUERIES, QUERIES);
    retrieve.row = row;
    assert_ok(ice_retrieve_submit(flood->worker.client, &retrieve.options, &flood->tickets[row]));
    retrieve_fini(&retrieve);
}

static void flood_begin(struct flood *flood, const struct daemon *daemon)
{
    struct ice_sequence_info info;
    history_create(&flood->history, &wide, LENGTH, 163);
    worker_open(&flood->worker, daemon->sockets, &wide, ROWS, 100);
    worker_append(&flood->worker, &flood->history, 0, LENGTH);
    worker_wait_idle(&flood->worker);
    uint64_t from = now_us();
    submit(flood, 0);
    assert_ok(ice_retrieve_wait(flood->tickets[0], 0, NULL));
    ice_ticket_close(flood->tickets[0]);
    uint64_t one = now_us() - from;
    flood->count = one > 250000 ? 4 : (uint32_t)(1000000 / one) + 1;
    flood->count = flood->count < ROWS ? flood->count : ROWS;
    for (uint32_t row = 0; row < flood->count; row++)
        submit(flood, row);
    assert_ok(ice_sequence_info(flood->worker.sequence, 0, &info)); // answered behind them: the daemon has them all
}

static void flood_end(struct flood *flood, ice_status expected)
{
    for (uint32_t row = 0; row < flood->count; row++) {
        assert_status(ice_retrieve_wait(flood->tickets[row], 0, NULL), expected);
        ice_ticket_close(flood->tickets[row]);
    }
    worker_close(&flood->worker);
    history_destroy(&flood->history);
}

static void sigterm_drains(void **state)
{
    struct daemon *daemon = *state;
    struct flood flood;
    struct ice_sequence_info info;
    const struct ice_client_options client_options = {.socket_directory = daemon->sockets};
    const struct ice_sequence_options sequence_of = sequence_options(&wide);
    const struct ice_landing_shape landing_of = landing_shape(&wide, 1, 16);
    ice_client *late = NULL;
    ice_sequence *sequence = NULL;
    ice_landing *landing = NULL;
    flood_begin(&flood, daemon);
    daemon_signal(daemon, SIGTERM);
    sleep_us(30000);
    // Nothing new is taken meanwhile, and the text says why.
    assert_refused(ice_sequence_info(flood.worker.sequence, 0, &info), ICE_SHUTTING_DOWN, "stopping");
    assert_refused(ice_sequence_open(flood.worker.client, &sequence_of, 0, &sequence), ICE_SHUTTING_DOWN, "stopping");
    assert_refused(ice_landing_open(flood.worker.client, &landing_of, 0, &landing), ICE_SHUTTING_DOWN, "stopping");
    assert_refused(ice_client_connect(&client_options, &late), ICE_SHUTTING_DOWN, "stopping");
    flood_end(&flood, ICE_OK); // all that was in flight is answered
    wait_for_exit(daemon, 5000000);
    assert_false(exists(daemon, CONTROL_SOCKET_NAME));
    daemon_start(daemon);
}

// --drain-ms 0: what is in flight is lost, and its callers hear so at once.
static void sigterm_without_patience(void **state)
{
    struct daemon *daemon = *state;
    struct flood flood;
    flood_begin(&flood, daemon);
    uint64_t from = now_us();
    daemon_signal(daemon, SIGTERM);
    flood.count -= 1; // the first may have been answered already
    ice_status first = ice_retrieve_wait(flood.tickets[flood.count], 0, NULL);
    assert_true(first == ICE_DISCONNECTED);
    ice_ticket_close(flood.tickets[flood.count]);
    wait_for_exit(daemon, 5000000);
    print_message("gone after %.3f s\n", (double)(now_us() - from) / 1e6);
    for (uint32_t row = 0; row < flood.count; row++) {
        ice_status status = ice_retrieve_wait(flood.tickets[row], 0, NULL);
        assert_true(status == ICE_DISCONNECTED || status == ICE_OK);
        ice_ticket_close(flood.tickets[row]);
    }
    flood.count = 0;
    flood_end(&flood, ICE_OK);
}

// The second signal ends the patience of the first.
static void a_second_signal(void **state)
{
    struct daemon *daemon = *state;
    struct flood flood;
    flood_begin(&flood, daemon);
    daemon_signal(daemon, SIGTERM);
    sleep_us(20000);
    daemon_signal(daemon, SIGINT);
    wait_for_exit(daemon, 5000000);
    assert_status(ice_retrieve_wait(flood.tickets[flood.count - 1], 0, NULL), ICE_DISCONNECTED);
    for (uint32_t row = 0; row < flood.count; row++)
        ice_ticket_close(flood.tickets[row]);
    flood.count = 0;
    flood_end(&flood, ICE_OK);
}

// Workers that hold things, cluster or only stay connected do not keep it from stopping.
static void stops_with_workers_connected(void **state)
{
    struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct ice_sequence_info info;
    history_create(&history, &wide, LENGTH, 167);
    worker_open(&worker, daemon->sockets, &wide, 4, 100);
    worker_append(&worker, &history, 0, LENGTH); // clustering begins
    uint64_t from = now_us();
    daemon_signal(daemon, SIGINT);
    wait_for_exit(daemon, 5000000);
    print_message("stopped after %.3f s\n", (double)(now_us() - from) / 1e6);
    assert_status(ice_sequence_info(worker.sequence, 0, &info), ICE_DISCONNECTED);
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    static const char *const patient[] = {
        "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--shards", "2", "--drain-ms",
        "60000",        NULL};
    static const char *const impatient[] = {"--pool-bytes",
                                            "64m",
                                            "--index-bytes",
                                            "64m",
                                            "--shared-bytes",
                                            "64m",
                                            "--shards",
                                            "2",
                                            "--drain-ms",
                                            "0",
                                            NULL};
    const struct CMUnitTest tests[] = {
        FOLDER_TEST(modes),
        DAEMON_TEST(stale_sockets_are_taken_over),
        DAEMON_TEST(a_second_daemon),
        FOLDER_TEST(options),
        FOLDER_TEST(options_from_the_environment),
        FOLDER_TEST(sigterm_while_populating),
        DAEMON_TEST_WITH(sigterm_drains, patient),
        DAEMON_TEST_WITH(sigterm_without_patience, impatient),
        DAEMON_TEST_WITH(a_second_signal, patient),
        DAEMON_TEST(stops_with_workers_connected),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
