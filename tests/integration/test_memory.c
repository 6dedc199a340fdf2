// The daemon's memory: what pages the pool gets, what is refused at start, and that what it uses stays within what it
// was given.
#include "worker.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t free_pages(void)
{
    unsigned long long number[2] = {0, 0};
    static const char *const names[] = {"free", "resv"};
    for (int i = 0; i < 2; i++) {
        char path[128];
        snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-2048kB/%s_hugepages", names[i]);
        FILE *file = fopen(path, "re");
        if (file && fscanf(file, "%llu", &number[i]) != 1)
            number[i] = 0;
        if (file)
            fclose(file);
    }
    return number[0] - number[1];
}

static void expect_start_refused(const struct daemon *daemon, const char *const *options, const char *const *texts)
{
    const char *arguments[CHILD_ARGUMENTS_MAX] = {daemon_path(), "--socket-dir", daemon->sockets};
    char output[8192];
    for (size_t i = 0; options[i]; i++)
        arguments[i + 3] = options[i];
    int status = child_run(arguments, output, sizeof output);
    if (status != 1)
        fail_msg("icecached %s exits with %d: %s", options[0], status, output);
    for (; *texts; texts++)
        assert_text(output, *texts);
}

#define LIST(...)                                                                                                      \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }

// ---- huge pages ----

static void expect_kind(const struct daemon *daemon, const char *kind, uint64_t huge_bytes)
{
    json_t *stats = stats_read(daemon);
    assert_string_equal(json_string_value(json_object_get(stats, "huge_pages")), kind);
    assert_int_equal(stats_number(stats, "bytes.pool_huge"), huge_bytes);
    json_decref(stats);
}

static void huge_pages_off(void **state)
{
    struct daemon *daemon = *state;
    char text[8192];
    daemon->options =
        LIST("--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m", "--huge-pages", "off");
    daemon_start(daemon);
    expect_kind(daemon, "none", 0);
    assert_int_equal(daemon_ctl(daemon, LIST("stats"), text, sizeof text), 0);
    assert_text(text, "huge pages none (0 B of 64.0 MiB)");
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, "pool: 64 MiB, huge pages: none (0/64 MiB)");
    assert_null(strstr(text, "vm.nr_hugepages")); // as it was wanted, nobody is told how to change it
}

static void huge_pages_preferred(void **state)
{
    struct daemon *daemon = *state;
    char text[8192];
    daemon->options = LIST("--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m");
    daemon_start(daemon);
    json_t *stats = stats_read(daemon);
    const char *kind = json_string_value(json_object_get(stats, "huge_pages"));
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, kind); // the log names the same
    if (strcmp(kind, "hugetlb-2m") != 0)
        assert_text(text, "sysctl vm.nr_hugepages=");
    json_decref(stats);
}

static void huge_pages_required(void **state)
{
    struct daemon *daemon = *state;
    const char *const *options =
        LIST("--huge-pages", "require", "--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m");
    if (free_pages() < 32) {
        expect_start_refused(daemon, options,
                             LIST("--huge-pages require: no reserved huge pages for --pool-bytes 67108864",
                                  "of 32 2 MiB pages free", "needed: 32 pages of 2 MiB; free: node0 ",
                                  "sysctl vm.nr_hugepages=", "--huge-pages prefer"));
    } else {
        daemon->options = options;
        daemon_start(daemon);
        expect_kind(daemon, "hugetlb-2m", 64u << 20);
    }
}

// ---- what is refused at start ----

static void shares_beyond_the_machine(void **state)
{
    const struct daemon *daemon = *state;
    expect_start_refused(daemon, LIST("--pool-bytes", "4m", "--index-bytes", "60t", "--shared-bytes", "4m"),
                         LIST("--pool-bytes 4 MiB", "--index-bytes 62914560 MiB", "--shared-bytes 4 MiB",
                              "64 MiB for the daemon itself", "Lower one of them"));
    expect_start_refused(daemon, LIST("--pool-bytes", "60t"), LIST("--pool-bytes 62914560 MiB, ", "Lower one of them"));
}

static void shares_beyond_the_machine_if_wanted(void **state)
{
    struct daemon *daemon = *state;
    char text[8192];
    daemon->options =
        LIST("--pool-bytes", "4m", "--index-bytes", "60t", "--shared-bytes", "4m", "--memory-check", "warn");
    daemon_start(daemon);
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, "warn  --pool-bytes 4 MiB");
}

// A real cgroup with a limit of 144 MiB, of version 2 or 1, where we may make one. Empty where not.
struct cgroup {
    char folder[128], limit[160];
};

static bool write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "we");
    bool ok = file && fputs(text, file) >= 0;
    return file && fclose(file) == 0 && ok;
}

static bool cgroup_make(struct cgroup *group)
{
    static const char *const roots[][2] = {{"/sys/fs/cgroup", "memory.max"},
                                           {"/sys/fs/cgroup/unified", "memory.max"},
                                           {"/sys/fs/cgroup/memory", "memory.limit_in_bytes"}};
    for (size_t i = 0; i < sizeof roots / sizeof *roots; i++) {
        snprintf(group->folder, sizeof group->folder, "%s/icecache-test-%d", roots[i][0], (int)getpid());
        snprintf(group->limit, sizeof group->limit, "%s/%s", group->folder, roots[i][1]);
        if (mkdir(group->folder, 0700) != 0)
            continue;
        if (access(group->limit, W_OK) == 0 && write_text(group->limit, "150994944"))
            return true;
        rmdir(group->folder);
    }
    return false;
}

// Starts the daemon in the group: a shell moves itself there and becomes it.
#define IN_GROUP(group, ...)                                                                                           \
    LIST("/bin/sh", "-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\"", (group).folder, daemon_path(),               \
         "--socket-dir", daemon->sockets, __VA_ARGS__)

static void cgroup_limit(void **state)
{
    struct daemon *daemon = *state;
    struct cgroup group;
    char text[8192];
    if (!cgroup_make(&group)) {
        print_message("skipped: no cgroup with a memory limit can be made here\n");
        skip();
    }
    int status = child_run(IN_GROUP(group, "--pool-bytes", "64m", "--index-bytes", "32m", "--shared-bytes", "32m"),
                           text, sizeof text);
    if (status == 1)
        status = strstr(text, group.limit) && strstr(text, "are 192 MiB") && strstr(text, "has 144 MiB") ? 1 : -1;
    // Defaults fit themselves to it.
    child_start(&daemon->child, IN_GROUP(group, "--shards", "1"), daemon->log);
    for (uint64_t until = now_us() + TEST_DEADLINE_US; now_us() < until; sleep_us(2000)) {
        daemon_read_log(daemon, text, sizeof text);
        if (strstr(text, "ready: version="))
            break;
    }
    bool ready = strstr(text, "ready: version=") != NULL, said = strstr(text, "so they are smaller") != NULL;
    if (ready) {
        json_t *stats = stats_read(daemon);
        ready = stats_number(stats, "bytes.pool_capacity") == 26u << 20 &&
                stats_number(stats, "bytes.index_capacity") == 26u << 20;
        json_decref(stats);
        daemon_stop(daemon);
    }
    rmdir(group.folder);
    if (status != 1 || !ready || !said)
        fail_msg("status %d, ready %d, said %d: %s", status, ready, said, text);
}

// ---- what is used ----

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

enum { SHARED_MIB = 24, FIXED_MIB = 32, STEP = 256 };

// The most that the daemon has had at once, by looks at /proc/PID/status.
struct watcher {
    pthread_t thread;
    pid_t pid;
    _Atomic bool stop;
    uint64_t looks, most_kib; // of the thread until it ends
};

static uint64_t kib_in_use(pid_t pid)
{
    char path[64], line[128];
    unsigned long long kib, sum = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "VmRSS: %llu kB", &kib) == 1 || sscanf(line, "HugetlbPages: %llu kB", &kib) == 1)
            sum += kib;
    }
    if (file)
        fclose(file);
    return sum;
}

static void *watcher_main(void *argument)
{
    struct watcher *watcher = argument;
    while (!atomic_load(&watcher->stop)) {
        uint64_t kib = kib_in_use(watcher->pid);
        watcher->most_kib = kib > watcher->most_kib ? kib : watcher->most_kib;
        watcher->looks++;
        sleep_us(1000);
    }
    return NULL;
}

// What waits for clustering takes more until then; clustering may in turn wait for memory, so it is not waited for
// long.
static void wait_for_room(ice_sequence *sequence)
{
    struct ice_sequence_info info = {0};
    for (uint64_t until = now_us() + 2000000; !info.idle && now_us() < until; sleep_us(5000))
        assert_ok(ice_sequence_info(sequence, 0, &info));
}

// Appends until the daemon has no more room, in ever smaller parts; answers the length reached.
static uint64_t fill(struct worker *worker, const struct history *history)
{
    uint64_t length = 0;
    for (uint64_t step = STEP; step > 0 && length + step <= history->length;) {
        const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, length);
        ice_status status = ice_append(worker->sequence, ICE_ALL_LAYERS, length, step, &source, 0, &length);
        if (status == ICE_OK)
            continue;
        assert_true(status == ICE_POOL_FULL || status == ICE_INDEX_FULL);
        wait_for_room(worker->sequence);
        step /= 2;
    }
    return length;
}

static void ask(struct worker *worker, const struct history *history, uint64_t length)
{
    for (uint32_t layer = 0; layer < worker->shape.layers; layer++) {
        struct retrieve retrieve;
        retrieve_init(&retrieve, worker, history, layer, length - 4, 4);
        assert_ok(ice_retrieve(worker->client, &retrieve.options, NULL));
        retrieve_fini(&retrieve);
    }
}

// Pool, index and shared memory full, with searches all along: what the kernel counts for the daemon stays below the
// sum of the shares and 2 % of it, or 32 MiB.
static void stays_within_its_shares(void **state)
{
    const uint32_t layers = scaled_count(2, 8), heads = scaled_count(2, 4);
    const uint32_t pool_mib = scaled_count(48, 640), index_mib = scaled_count(12, 160);
    const struct shape many = {layers, heads, 2 * heads, 128, ICE_BF16}, wide = {1, 2, 2, 256, ICE_FP32};
    struct daemon *daemon = *state;
    char pool_option[16], index_option[16];
    struct worker first, second;
    struct history history, wide_history;
    struct watcher watcher = {0};
    ice_landing *landings[64];
    uint32_t count = 0;
    const uint64_t cap_kib = ((uint64_t)pool_mib + index_mib + SHARED_MIB) << 10;
    const uint64_t more_kib = cap_kib / 50 > FIXED_MIB << 10 ? cap_kib / 50 : FIXED_MIB << 10;
    if (SANITIZED) {
        print_message("skipped: a sanitizer's own memory counts too\n");
        skip();
    }
    snprintf(pool_option, sizeof pool_option, "%um", pool_mib);
    snprintf(index_option, sizeof index_option, "%um", index_mib);
    daemon->options =
        LIST("--pool-bytes", pool_option, "--index-bytes", index_option, "--shared-bytes", "24m", "--shards", "2");
    daemon_start(daemon);
    watcher.pid = daemon->child.pid;
    assert_int_equal(pthread_create(&watcher.thread, NULL, watcher_main, &watcher), 0);
    history_create(&history, &many, scaled_count(26000, 42000), 307);
    history_create(&wide_history, &wide, scaled_count(6500, 40000), 311);
    worker_open(&first, daemon->sockets, &many, 1, 400);
    worker_open(&second, daemon->sockets, &wide, 1, 400);
    uint64_t length = fill(&first, &history);
    ask(&first, &history, length);
    uint64_t wide_length = fill(&second, &wide_history);
    const struct ice_landing_shape small = landing_shape(&many, 1, scaled_count(256, 64));
    while (count < 64 && ice_landing_open(first.client, &small, 0, &landings[count]) == ICE_OK)
        count++;
    for (int round = 0; round < 50; round++) {
        ask(&first, &history, length);
        if (wide_length >= 4)
            ask(&second, &wide_history, wide_length);
    }
    json_t *stats = stats_read(daemon);
    const uint64_t pool = stats_number(stats, "bytes.pool"), index = stats_number(stats, "bytes.index");
    const uint64_t shared = stats_number(stats, "bytes.shared");
    json_decref(stats);
    atomic_store(&watcher.stop, true);
    pthread_join(watcher.thread, NULL);
    print_message("pool %.1f of %u MiB, index %.1f of %u, shared %.1f of %d; at most %.1f MiB in %llu looks\n",
                  (double)pool / 1048576, pool_mib, (double)index / 1048576, index_mib, (double)shared / 1048576,
                  SHARED_MIB, (double)watcher.most_kib / 1024, (unsigned long long)watcher.looks);
    assert_true(pool > (uint64_t)pool_mib * 80 / 100 << 20 && index > (uint64_t)index_mib * 80 / 100 << 20);
    assert_true(shared > (uint64_t)SHARED_MIB * 80 / 100 << 20);
    assert_true(watcher.most_kib > cap_kib * 80 / 100); // it looks at the right thing
    assert_true(watcher.most_kib <= cap_kib + more_kib);
    while (count > 0)
        ice_landing_close(landings[--count]);
    worker_close(&first);
    worker_close(&second);
    history_destroy(&history);
    history_destroy(&wide_history);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        FOLDER_TEST(huge_pages_off),
        FOLDER_TEST(huge_pages_preferred),
        FOLDER_TEST(huge_pages_required),
        FOLDER_TEST(shares_beyond_the_machine),
        FOLDER_TEST(shares_beyond_the_machine_if_wanted),
        FOLDER_TEST(cgroup_limit),
        FOLDER_TEST(stays_within_its_shares),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
