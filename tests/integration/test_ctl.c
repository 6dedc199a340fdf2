// icecachectl: what it prints, its JSON keys and values, its exit statuses.
#include "worker.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

#define CTL(...)                                                                                                       \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }

static void expect(const struct daemon *daemon, const char *const *arguments, int exit_status, const char *text)
{
    static char output[1 << 16];
    int status = daemon_ctl(daemon, arguments, output, sizeof output);
    if (status != exit_status)
        fail_msg("icecachectl %s exits %d: %s", arguments[0], status, output);
    assert_text(output, text);
}

static void commands(void **state)
{
    const struct daemon *daemon = *state;
    expect(daemon, CTL("ping"), 0, "icecached " ICECACHE_VERSION " answers");
    expect(daemon, CTL("--json", "ping"), 0, "{\"version\":\"" ICECACHE_VERSION "\"}");
    expect(daemon, CTL("version"), 0, ICECACHE_VERSION);
    expect(daemon, CTL("stats"), 0, "phase");
    expect(daemon, CTL("stats", "--json"), 0, "\"sequence\":[]");
    expect(daemon, CTL("leases"), 0, "kind ");
    expect(daemon, CTL("leases", "--json"), 0, "{\"lease\":[]}");
    expect(daemon, CTL("namespaces"), 0, "namespace ");
    expect(daemon, CTL("namespaces", "--json"), 0, "{\"namespace\":[]}");
    expect(daemon, CTL("--help"), 0, "usage");
    expect(daemon, CTL("--version"), 0, ICECACHE_VERSION);
}

static void usage_errors(void **state)
{
    const struct daemon *daemon = *state;
    expect(daemon, CTL("--json"), 2, "usage");
    expect(daemon, CTL("dance"), 2, "unknown command 'dance'");
    expect(daemon, CTL("ping", "twice"), 2, "usage");
    expect(daemon, CTL("remove-prefix"), 2, "usage");
    expect(daemon, CTL("remove-prefix", "12"), 2, "'12' is not the id of a prefix, 16 hexadecimal digits");
    expect(daemon, CTL("remove-prefix", "0123456789abcdeg"), 2, "is not the id of a prefix");
    expect(daemon, CTL("--nonsense", "ping"), 2, "usage");
    expect(daemon, CTL("--timeout", "soon", "ping"), 2, "'soon' is not a number of seconds");
    expect(daemon, CTL("--timeout", "0", "ping"), 2, "'0' is not a number of seconds");
}

static void without_a_daemon(void **state)
{
    struct daemon *daemon = *state;
    expect(daemon, CTL("ping"), 3, "no daemon answers");
    expect(daemon, CTL("stats", "--json"), 3, "no daemon answers");
    daemon_start(daemon);
    expect(daemon, CTL("ping"), 0, "answers");
    daemon_kill(daemon); // its sockets are still there
    expect(daemon, CTL("ping"), 3, "no daemon answers");
}

static void a_daemon_that_does_not_answer(void **state)
{
    const struct daemon *daemon = *state;
    daemon_signal(daemon, SIGSTOP);
    uint64_t from = now_us();
    expect(daemon, CTL("--timeout", "0.3", "ping"), 1, "deadline");
    assert_true(now_us() - from < 5000000);
    daemon_signal(daemon, SIGCONT);
    expect(daemon, CTL("ping"), 0, "answers");
}

static void a_full_daemon(void **state)
{
    const struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    const struct ice_client_options options = {.socket_directory = daemon->sockets};
    ice_client *second = NULL;
    assert_refused(ice_client_connect(&options, &second), ICE_LIMIT, "--sessions-max");
    expect(daemon, CTL("ping"), 0, "answers");
    ice_client_close(client);
}

// The folder comes from the environment too, for icecachectl as for clients.
static void the_folder_from_the_environment(void **state)
{
    const struct daemon *daemon = *state;
    char output[4096];
    const char *const arguments[] = {daemon_ctl_path(), "ping", NULL};
    ice_client *client = NULL;
    setenv("ICECACHE_SOCKET_DIR", daemon->sockets, 1);
    assert_int_equal(child_run(arguments, output, sizeof output), 0);
    ice_status status = ice_client_connect(NULL, &client);
    unsetenv("ICECACHE_SOCKET_DIR");
    assert_ok(status);
    ice_client_close(client);
}

// Without a name of its own a client is called like its program, which may be called anything.
static void a_program_of_any_name(void **state)
{
    const struct daemon *daemon = *state;
    char *name = program_invocation_short_name, odd[] = "f\xc3\xbcnf\n";
    const struct ice_client_options options = {.socket_directory = daemon->sockets};
    ice_client *client = NULL;
    program_invocation_short_name = odd;
    ice_status status = ice_client_connect(&options, &client);
    program_invocation_short_name = name;
    assert_ok(status);
    (void)sequence_open(client, &shape);
    expect(daemon, CTL("stats"), 0, "f??nf?");
    ice_client_close(client);
}

// ---- JSON ----

static void check_keys(const json_t *object, const char *const *keys)
{
    size_t count = 0;
    for (; keys[count]; count++) {
        if (!json_object_get(object, keys[count]))
            fail_msg("no key \"%s\"", keys[count]);
    }
    assert_int_equal(json_object_size(object), count); // whoever adds one documents it here
}

static void check_phases(const json_t *stats, uint64_t retrieves, uint64_t appends, uint64_t reads)
{
    static const char *const names[] = {"queue", "search", "fetch", "copy", "total", "append", "read"};
    static const char *const keys[] = {"count", "p50_us", "p99_us", "p999_us", "max_us", NULL};
    const json_t *phases = json_object_get(stats, "phases");
    assert_int_equal(json_object_size(phases), 7);
    for (size_t i = 0; i < 7; i++) {
        const json_t *phase = json_object_get(phases, names[i]);
        check_keys(phase, keys);
        uint64_t expected = i < 5 ? retrieves : i == 5 ? appends : reads;
        assert_int_equal(stats_number(phase, "count"), expected);
        double p50 = json_number_value(json_object_get(phase, "p50_us"));
        double p99 = json_number_value(json_object_get(phase, "p99_us"));
        double p999 = json_number_value(json_object_get(phase, "p999_us"));
        double max = json_number_value(json_object_get(phase, "max_us"));
        assert_true(p50 >= 0 && p50 <= p99 && p99 <= p999);
        assert_true(i == 2 ? max == 0 : max > 0);    // nothing is fetched where there is no disk
        assert_true(max < 30e6 && p50 <= max * 1.5); // quantiles are those of buckets
    }
}

static void check_sequence(const json_t *sequence, const struct ice_sequence_info *info, uint64_t retrieves)
{
    static const char *const keys[] = {"id",        "session",         "pid",           "worker",     "namespace",
                                       "tokens",    "indexed",         "pages",         "pool_bytes", "index_bytes",
                                       "retrieves", "appended_tokens", "shared_tokens", "phase",      NULL};
    check_keys(sequence, keys);
    assert_int_equal(stats_number(sequence, "pid"), getpid());
    assert_int_equal(stats_number(sequence, "tokens"), info->length);
    assert_int_equal(stats_number(sequence, "appended_tokens"), info->length);
    assert_int_equal(stats_number(sequence, "indexed"), info->indexed_min);
    assert_int_equal(stats_number(sequence, "pages"), info->pages);
    assert_int_equal(stats_number(sequence, "pool_bytes"), info->pool_bytes);
    assert_int_equal(stats_number(sequence, "index_bytes"), info->index_bytes);
    assert_int_equal(stats_number(sequence, "retrieves"), retrieves);
    assert_string_equal(json_string_value(json_object_get(sequence, "worker")), "test");
    assert_string_equal(json_string_value(json_object_get(sequence, "namespace")), "a\"b\\c");
    assert_string_equal(json_string_value(json_object_get(sequence, "phase")), "idle");
    assert_int_equal(strlen(json_string_value(json_object_get(sequence, "session"))), 16);
}

static void check_totals(const json_t *stats, const struct ice_sequence_info *info)
{
    static const char *const keys[] = {"version",
                                       "uptime_seconds",
                                       "shards",
                                       "huge_pages",
                                       "sessions",
                                       "ring_sessions",
                                       "sequences",
                                       "tokens",
                                       "pages",
                                       "retrieves",
                                       "retrieves_partial",
                                       "appends",
                                       "reads",
                                       "hints",
                                       "errors",
                                       "sessions_reclaimed",
                                       "bytes",
                                       "phases",
                                       "gpu",
                                       "sequence",
                                       "service",
                                       NULL};
    static const char *const counts[] = {"refused_inflight",   "refused_overload",   "refused_deadline",
                                         "refused_messages",   "refused_strangers",  "dropped_messages",
                                         "dropped_replies",    "retrieves_late",     "hints_late",
                                         "deadlines_missed",   "requests_abandoned", "ended_closed",
                                         "ended_mid_request",  "ended_no_hello",     "ended_deaf",
                                         "ended_deaf_control", "ended_flood",        "ended_bad_control",
                                         "ended_spoilt_ring",  "ended_no_memory",    NULL};
    static const char *const kinds[] = {"moved",          "pool",   "pool_capacity",   "pool_huge", "index",
                                        "index_capacity", "shared", "shared_capacity", NULL};
    check_keys(stats, keys);
    check_keys(json_object_get(stats, "bytes"), kinds);
    check_keys(json_object_get(stats, "service"), counts);
    assert_string_equal(json_string_value(json_object_get(stats, "version")), ICECACHE_VERSION);
    assert_int_equal(stats_number(stats, "shards"), 2);
    assert_int_equal(stats_number(stats, "sessions"), 1);
    assert_int_equal(stats_number(stats, "sequences"), 1);
    assert_int_equal(stats_number(stats, "tokens"), info->length);
    assert_int_equal(stats_number(stats, "pages"), info->pages);
    assert_int_equal(stats_number(stats, "bytes.pool_capacity"), 64u << 20);
    assert_true(stats_number(stats, "bytes.pool") >= info->pool_bytes);
    assert_true(stats_number(stats, "bytes.index") >= info->index_bytes);
    assert_true(stats_number(stats, "bytes.shared") > 4u << 20); // the staging area and a landing
}

static void json_says_what_happened(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct ice_sequence_info info;
    struct ice_retrieve_result result;
    uint64_t moved = 0;
    history_create(&history, &shape, 500, 173);
    worker_open(&worker, daemon->sockets, &shape, 1, 200);
    ice_sequence_close(worker.sequence);
    struct ice_sequence_options options = sequence_options(&shape);
    options.name_space = "a\"b\\c";
    assert_ok(ice_sequence_open(worker.client, &options, 0, &worker.sequence));
    worker_append(&worker, &history, 0, 300);
    worker_append(&worker, &history, 300, 200);
    sequence_wait_idle(worker.sequence, &info);
    for (uint32_t i = 0; i < 7; i++) {
        retrieve_init(&retrieve, &worker, &history, i % 2, 499, 1);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, &result));
        moved += result.bytes_moved;
        retrieve_fini(&retrieve);
    }
    uint8_t keys[128], values[128];
    const struct ice_kv_target target = {keys, values, sizeof keys, sizeof values, 128, 128, 0};
    assert_status(ice_read(worker.sequence, 0, 0, 1, &target, 0), ICE_INVALID_ARGUMENT); // not even sent
    const struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    assert_status(ice_append(worker.sequence, ICE_ALL_LAYERS, 501, 10, &source, 0, NULL), ICE_POSITION_GAP);
    uint8_t both[256];
    const struct ice_kv_target heads = {both, both, sizeof both, sizeof both, 256, 256, 128};
    assert_ok(ice_read(worker.sequence, 0, 0, 1, &heads, 0));
    json_t *stats = stats_read(daemon);
    check_totals(stats, &info);
    check_phases(stats, 7, 2, 1);
    check_sequence(json_array_get(json_object_get(stats, "sequence"), 0), &info, 7);
    assert_int_equal(stats_number(stats, "retrieves"), 7);
    assert_int_equal(stats_number(stats, "appends"), 2);
    assert_int_equal(stats_number(stats, "reads"), 1);
    assert_int_equal(stats_number(stats, "errors"), 1);
    assert_int_equal(stats_number(stats, "bytes.moved"), moved);
    json_decref(stats);
    expect(daemon, CTL("stats"), 0, "a\"b\\c");
    worker_close(&worker);
    history_destroy(&history);
}

// More sequences than one reply lists.
static void many_sequences(void **state)
{
    const struct daemon *daemon = *state;
    enum { COUNT = 600 };
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    for (uint32_t i = 0; i < COUNT; i++)
        (void)sequence_open(client, &shape);
    json_t *stats = stats_read(daemon);
    const json_t *list = json_object_get(stats, "sequence");
    assert_int_equal(stats_number(stats, "sequences"), COUNT);
    assert_int_equal(json_array_size(list), COUNT);
    bool seen[COUNT + 1] = {false};
    for (uint32_t i = 0; i < COUNT; i++) {
        uint64_t id = stats_number(json_array_get(list, i), "id");
        assert_true(id >= 1 && id <= COUNT && !seen[id]); // each once
        seen[id] = true;
    }
    json_decref(stats);
    ice_client_close(client);
}

int main(void)
{
    static const char *const single[] = {
        "--pool-bytes", "4m", "--index-bytes", "4m", "--shared-bytes", "4m", "--sessions-max", "1", NULL};
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(commands),
        DAEMON_TEST(usage_errors),
        FOLDER_TEST(without_a_daemon),
        DAEMON_TEST(a_daemon_that_does_not_answer),
        DAEMON_TEST_WITH(a_full_daemon, single),
        DAEMON_TEST(the_folder_from_the_environment),
        DAEMON_TEST(a_program_of_any_name),
        DAEMON_TEST(json_says_what_happened),
        DAEMON_TEST(many_sequences),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
