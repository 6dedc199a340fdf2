// Folders and systems on which the spill tier cannot work, or only by a fallback; and bytes of the spill file that have
// changed while the daemon was stopped: what they belong to is lost by name, and nothing of it is ever served.
#include "load.h"
#include "manifests.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/capability.h>

#define CANNOT_TRY 77
#define TMPFS      0x01021994

static const char *const options[] = {DAEMON_WITH_DISK("2m", "64m"), "--hibernate-ms", "0", NULL};

#define FOLDER_TEST_HERE(function)                                                                                     \
    cmocka_unit_test_prestate_setup_teardown(function, daemon_setup_stopped, daemon_teardown,                          \
                                             (void *)(uintptr_t)options)

// ---- roles: this program, restricted, becomes the daemon named by its arguments ----

static int become_daemon(char **argv)
{
    execv(argv[1], argv + 1);
    return CANNOT_TRY;
}

static bool refuse_call(unsigned call, unsigned error)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), // the call's number
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static int without_setup(int argc, char **argv)
{
    (void)argc;
    return refuse_call(SYS_io_uring_setup, EPERM) ? become_daemon(argv) : CANNOT_TRY;
}

static int before_ring(int argc, char **argv)
{
    (void)argc;
    return refuse_call(SYS_io_uring_setup, ENOSYS) ? become_daemon(argv) : CANNOT_TRY;
}

static int without_enter(int argc, char **argv)
{
    (void)argc;
    return refuse_call(SYS_io_uring_enter, EPERM) ? become_daemon(argv) : CANNOT_TRY;
}

// Also for root, which then may not lock without a limit.
static int without_locked_memory(int argc, char **argv)
{
    (void)argc;
    const struct rlimit limit = {0, 0};
    if ((geteuid() == 0 && prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)) || setrlimit(RLIMIT_MEMLOCK, &limit))
        return CANNOT_TRY;
    return become_daemon(argv);
}

static bool write_text(const char *path, const char *text)
{
    const int fd = open(path, O_WRONLY | O_CLOEXEC);
    const bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return written;
}

// Mounts of its own. A user needs a name space of users for that, in which it is itself.
static bool mounts_are_ours(void)
{
    char map[64];
    const uid_t user = geteuid();
    const gid_t group = getegid();
    if (unshare(CLONE_NEWNS | (user ? CLONE_NEWUSER : 0)))
        return false;
    if (user) {
        snprintf(map, sizeof map, "%u %u 1", (unsigned)user, (unsigned)user);
        if (!write_text("/proc/self/uid_map", map) || !write_text("/proc/self/setgroups", "deny"))
            return false;
        snprintf(map, sizeof map, "%u %u 1", (unsigned)group, (unsigned)group);
        if (!write_text("/proc/self/gid_map", map))
            return false;
    }
    return mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
}

static const char *spill_folder(char **argv)
{
    while (*argv && strcmp(*argv, "--spill-dir") != 0)
        argv++;
    return *argv ? argv[1] : "";
}

static int on_small_system(int argc, char **argv)
{
    (void)argc;
    if (!mounts_are_ours() || mount("icecache", spill_folder(argv), "tmpfs", 0, "size=8m"))
        return CANNOT_TRY;
    return become_daemon(argv);
}

static int on_read_only_system(int argc, char **argv)
{
    (void)argc;
    const char *folder = spill_folder(argv);
    if (!mounts_are_ours() || mount(folder, folder, NULL, MS_BIND, NULL) ||
        mount(NULL, folder, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
        return CANNOT_TRY;
    return become_daemon(argv);
}

static const struct role roles[] = {
    {"without_setup", without_setup},     {"before_ring", before_ring},
    {"without_enter", without_enter},     {"without_locked_memory", without_locked_memory},
    {"on_small_system", on_small_system}, {"on_read_only_system", on_read_only_system},
};

// ---- what ends a start ----

static void refuses_to_start(struct daemon *daemon, const char *launcher, const char *text)
{
    static char output[8192];
    const char *arguments[DAEMON_ARGUMENTS_MAX];
    daemon->launcher = launcher;
    daemon_arguments(daemon, arguments);
    const int status = child_run(arguments, output, sizeof output);
    daemon->launcher = NULL;
    if (status == CANNOT_TRY)
        skip();
    assert_int_equal(status, 1);
    assert_text(output, text);
    assert_text(output, daemon->spill);
}

static void full(void **state)
{
    refuses_to_start(*state, "on_small_system",
                     "has no room for 64 MiB (No space left on device): free some, or configure less");
}

static void read_only(void **state)
{
    refuses_to_start(*state, "on_read_only_system", "cannot be opened for writing: Read-only file system");
}

static void not_ours(void **state)
{
    struct daemon *daemon = *state;
    if (geteuid() == 0)
        skip(); // may do all
    assert_int_equal(chmod(daemon->spill, 0500), 0);
    refuses_to_start(daemon, NULL, "cannot be opened for writing: Permission denied");
    assert_int_equal(chmod(daemon->spill, 0700), 0);
}

static void missing(void **state)
{
    struct daemon *daemon = *state;
    assert_int_equal(rmdir(daemon->spill), 0);
    refuses_to_start(daemon, NULL, "cannot be opened: No such file or directory");
}

// ---- what it can do without ----

static void expect_spill(const struct daemon *daemon, const char *name, const char *part)
{
    json_t *stats = stats_read(daemon);
    assert_text(json_string_value(json_object_get(json_object_get(stats, "spill"), name)), part);
    json_decref(stats);
}

static void works(struct daemon *daemon)
{
    static struct load_ledger ledger;
    struct worker worker;
    ledger.count = 0;
    load_open(&worker, daemon);
    for (uint32_t document = 0; document < 3; document++)
        load_seal(&ledger, &worker, document, 50);
    worker_close(&worker);
    load_check(&ledger, daemon);
    daemon_kill(daemon);
    daemon_start(daemon);
    load_check(&ledger, daemon);
}

static void works_by_threads(struct daemon *daemon, const char *launcher, const char *reason)
{
    daemon_start(daemon);
    json_t *stats = stats_read(daemon);
    const bool has_ring =
        strcmp(json_string_value(json_object_get(json_object_get(stats, "spill"), "engine")), "io_uring") == 0;
    json_decref(stats);
    daemon_stop(daemon);
    if (!has_ring)
        skip(); // refused already, for a reason of its own
    daemon->launcher = launcher;
    daemon_start(daemon);
    expect_spill(daemon, "engine", "threads");
    expect_spill(daemon, "reason", reason);
    works(daemon);
    daemon_stop(daemon);
}

static void ring_filtered(void **state)
{
    works_by_threads(*state, "without_setup", "io_uring_setup: Operation not permitted (a seccomp filter");
}

static void ring_unknown(void **state)
{
    works_by_threads(*state, "before_ring", "io_uring_setup: Function not implemented");
}

static void ring_without_enter(void **state)
{
    works_by_threads(*state, "without_enter", "a write by io_uring: Operation not permitted");
}

static void ring_without_memory(void **state)
{
    works_by_threads(*state, "without_locked_memory", "io_uring_setup: Cannot allocate memory (RLIMIT_MEMLOCK");
}

// No direct transfers there.
static void on_tmpfs(void **state)
{
    struct daemon *daemon = *state;
    struct statfs system;
    char folder[] = "/dev/shm/icecache-test-XXXXXX", output[64], log[8192];
    if (statfs("/dev/shm", &system) || system.f_type != TMPFS || !mkdtemp(folder))
        skip();
    snprintf(daemon->spill, sizeof daemon->spill, "%s", folder);
    const char *const remove[] = {"/bin/rm", "-rf", folder, NULL};
    daemon_start(daemon);
    daemon_read_log(daemon, log, sizeof log);
    assert_text(log, "through the page cache");
    works(daemon);
    daemon_stop(daemon);
    assert_int_equal(child_run(remove, output, sizeof output), 0);
}

// ---- bytes that have changed ----

struct place {
    uint32_t lane;
    bool is_piece, is_looked_at; // is_looked_at: at the start
    uint64_t from, bytes;
};

static void pick(const struct manifest *manifest, uint64_t *random, struct place *place)
{
    *place = (struct place){.lane = (uint32_t)random_below(random, manifest->lane_count),
                            .is_piece = random_below(random, 2)};
    const struct manifest_lane *lane = &manifest->lanes[place->lane];
    const uint32_t count = place->is_piece ? lane->piece_count : lane->page_count;
    const uint32_t which = (uint32_t)random_below(random, count);
    place->from = (uint64_t)(place->is_piece ? lane->pieces : lane->pages)[which] * MANIFEST_UNIT_BYTES;
    place->bytes = place->is_piece ? MANIFEST_PIECE_BYTES : lane->frame_bytes;
    place->is_looked_at = place->is_piece && place->lane == 0 && which + 1 == count;
}

// Turns one bit over. Again: back.
static void turn_bit(const struct daemon *daemon, uint64_t at, uint32_t bit)
{
    char path[512];
    uint8_t byte = 0;
    snprintf(path, sizeof path, "%s/data", daemon->spill);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
    byte = (uint8_t)(byte ^ 1u << bit);
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
    close(fd);
}

static ice_status read_layer(const struct worker *worker, const struct history *history, uint32_t layer, uint64_t n)
{
    static uint8_t keys[LOAD_TOKENS_MAX * 2 * 128], values[LOAD_TOKENS_MAX * 2 * 128];
    const size_t bytes = shape_row_bytes(&load_shape);
    const struct ice_kv_target target = {keys, values, sizeof keys, sizeof values, 0, bytes, n * bytes};
    const ice_status status = ice_read(worker->sequence, layer, 0, n, &target, TEST_DEADLINE_US);
    for (uint32_t head = 0; head < load_shape.kv_heads && status == ICE_OK; head++) {
        assert_memory_equal(keys + head * n * bytes, history_key(history, layer, head, 0), n * bytes);
        assert_memory_equal(values + head * n * bytes, history_value(history, layer, head, 0), n * bytes);
    }
    return status;
}

static void expect_lost(const struct daemon *daemon, const struct load_seal *seal, const struct place *place)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    const struct ice_sequence_options of = sequence_options(&load_shape);
    struct worker worker;
    struct history history;
    load_hashes(seal->document, hashes);
    load_history(&history, seal->document);
    load_open(&worker, daemon);
    ice_status status = ice_sequence_attach(worker.client, &of, hashes, seal->blocks, 0, 0, &worker.sequence, NULL);
    assert_status(status, ICE_OK);
    const uint64_t tokens = seal->blocks * 16u;
    for (int again = 0; again < 2; again++) {
        for (uint32_t layer = 0; layer < load_shape.layers; layer++) {
            status = read_layer(&worker, &history, layer, tokens);
            assert_status(status, layer == place->lane / load_shape.kv_heads ? ICE_PAGE_LOST : ICE_OK);
        }
    }
    worker_close(&worker);
    history_destroy(&history);
}

static void changed_bytes(void **state)
{
    struct daemon *daemon = *state;
    static struct load_ledger ledger;
    struct manifest manifest;
    struct worker worker;
    uint64_t random = random_seed("changed_bytes");
    ledger.count = 0;
    daemon_start(daemon);
    load_open(&worker, daemon);
    load_seal(&ledger, &worker, 0, LOAD_BLOCKS_MAX);
    load_seal(&ledger, &worker, 1, 30);
    worker_close(&worker);
    manifest_read(&manifest, daemon->spill, ledger.seals[0].id);
    for (uint32_t round = 0, rounds = scaled_count(10, 200); round < rounds; round++) {
        struct place place;
        do
            pick(&manifest, &random, &place);
        while (place.is_looked_at); // missing then: see below
        const uint64_t at = place.from + random_below(&random, place.bytes);
        const uint32_t bit = (uint32_t)random_below(&random, 8);
        daemon_stop(daemon);
        turn_bit(daemon, at, bit);
        daemon_start(daemon);
        expect_lost(daemon, &ledger.seals[0], &place);
        daemon_stop(daemon);
        turn_bit(daemon, at, bit);
        daemon_start(daemon);
        load_check(&ledger, daemon);
    }
    // What is looked at at the start: all of it is missing, and what it had is free.
    daemon_stop(daemon);
    const struct manifest_lane *first = &manifest.lanes[0];
    turn_bit(daemon, (uint64_t)first->pieces[first->piece_count - 1] * MANIFEST_UNIT_BYTES, 3);
    daemon_start(daemon);
    ledger.seals[0] = ledger.seals[--ledger.count];
    load_check(&ledger, daemon);
    manifest_free(&manifest);
}

int main(int argc, char **argv)
{
    int exit_status;
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {
        FOLDER_TEST_HERE(full),
        FOLDER_TEST_HERE(read_only),
        FOLDER_TEST_HERE(not_ours),
        FOLDER_TEST_HERE(missing),
        FOLDER_TEST_HERE(ring_filtered),
        FOLDER_TEST_HERE(ring_unknown),
        FOLDER_TEST_HERE(ring_without_enter),
        FOLDER_TEST_HERE(ring_without_memory),
        FOLDER_TEST_HERE(on_tmpfs),
        FOLDER_TEST_HERE(changed_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
