// The real files behind the table: the data file's opening, room and transfers; small files that are whole or not
// there. The folder is made under $TMPDIR, or /var/tmp, because /tmp may be memory.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/env.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK 4096u
#define MIB   ((uint64_t)1 << 20)

static struct env env;
static char folder[256];
static int directory;

static int make_folder(void **state)
{
    (void)state;
    const char *under = getenv("TMPDIR");
    env_linux_init(&env);
    (void)snprintf(folder, sizeof folder, "%s/icecache-file-XXXXXX", under ? under : "/var/tmp");
    if (!mkdtemp(folder))
        return -1;
    return env.open_directory(&env, folder, &directory);
}

static bool remove_one(void *context, const char *name)
{
    (void)context;
    return unlinkat(directory, name, 0) == 0 || unlinkat(directory, name, AT_REMOVEDIR) == 0;
}

static int remove_folder(void **state)
{
    (void)state;
    (void)env.list_files(&env, directory, "", remove_one, NULL);
    close(directory);
    return rmdir(folder);
}

static bool count_one(void *context, const char *name)
{
    (void)name;
    ++*(int *)context;
    return true;
}

static int count_files(const char *suffix)
{
    int count = 0;
    assert_int_equal(env.list_files(&env, directory, suffix, count_one, &count), 0);
    return count;
}

static uint64_t room_of(int fd)
{
    struct stat status;
    assert_int_equal(fstat(fd, &status), 0);
    return (uint64_t)status.st_blocks * 512;
}

static uint64_t size_of(int fd)
{
    uint64_t bytes = 0;
    assert_int_equal(env.file_bytes(&env, fd, &bytes), 0);
    return bytes;
}

static void test_open(void **state)
{
    (void)state;
    int fd = -1;
    assert_int_equal(env.open_directory(&env, "/nowhere/at/all", &fd), -ENOENT);
    assert_int_equal(env.open_directory(&env, "/proc/self/cmdline", &fd), -ENOTDIR);
    struct env_file file, second;
    assert_int_equal(env.open_data_file(&env, directory, "data", &file), 0);
    assert_int_equal(env.open_data_file(&env, directory, "data", &second), -EBUSY);
    assert_int_equal((fcntl(file.fd, F_GETFL) & O_DIRECT) != 0, file.direct);
    assert_int_equal((fcntl(file.fd, F_GETFL) & O_NONBLOCK), 0);
    if (file.direct)
        assert_in_range(file.memory_align, 512, BLOCK);
    else
        assert_int_equal(file.memory_align, 1);
    assert_in_range(file.place_align, 1, BLOCK);
    assert_int_equal(symlinkat("data", directory, "link"), 0);
    assert_int_equal(env.open_data_file(&env, directory, "link", &second), -ELOOP);
    assert_int_equal(mkfifoat(directory, "pipe", 0600), 0);
    assert_int_equal(env.open_data_file(&env, directory, "pipe", &second), -EINVAL);
    assert_int_equal(env.check_file(&env, file.fd), 0);
    env.close_data_file(&env, &file);
    assert_int_equal(env.open_data_file(&env, directory, "data", &file), 0);
    assert_int_equal(env.unlink_file(&env, directory, "data"), 0);
    assert_int_equal(env.check_file(&env, file.fd), -ESTALE);
    env.close_data_file(&env, &file);
}

// Files in memory have no direct transfers; nothing needs alignment there.
static void test_memory_file(void **state)
{
    (void)state;
    int shared = -1;
    struct env_file file;
    if (env.open_directory(&env, "/dev/shm", &shared) || faccessat(shared, ".", W_OK, AT_EACCESS))
        skip();
    char name[64];
    (void)snprintf(name, sizeof name, "icecache-file-%d", (int)getpid());
    assert_int_equal(env.open_data_file(&env, shared, name, &file), 0);
    assert_int_equal(env.unlink_file(&env, shared, name), 0);
    assert_false(file.direct);
    assert_int_equal(file.memory_align, 1);
    assert_int_equal(fcntl(file.fd, F_GETFL) & O_DIRECT, 0);
    assert_int_equal(env.pwrite(&env, file.fd, "odd", 3, 5), 3);
    char text[8] = "";
    assert_int_equal(env.pread(&env, file.fd, text, 8, 5), 3);
    assert_string_equal(text, "odd");
    env.close_data_file(&env, &file);
    env.close_fd(&env, shared);
}

// Room is real, what is there stays, shorter is shorter.
static void test_room(void **state)
{
    (void)state;
    struct env_file file;
    uint8_t *block = aligned_alloc(BLOCK, BLOCK);
    assert_non_null(block);
    memset(block, 0x5a, BLOCK);
    assert_int_equal(env.open_data_file(&env, directory, "data", &file), 0);
    assert_int_equal(env.preallocate(&env, file.fd, 4 * MIB), 0);
    assert_int_equal(size_of(file.fd), 4 * MIB);
    assert_true(room_of(file.fd) >= 4 * MIB);
    assert_int_equal(env.pwrite(&env, file.fd, block, BLOCK, MIB), BLOCK);
    assert_int_equal(env.sync_file(&env, file.fd), 0);
    assert_int_equal(env.preallocate(&env, file.fd, 6 * MIB), 0);
    assert_int_equal(env.preallocate(&env, file.fd, MIB), 0); // never shorter
    assert_int_equal(size_of(file.fd), 6 * MIB);
    memset(block, 0, BLOCK);
    assert_int_equal(env.pread(&env, file.fd, block, BLOCK, MIB), BLOCK);
    assert_int_equal(block[0] + block[BLOCK - 1], 2 * 0x5a);
    assert_int_equal(env.pread(&env, file.fd, block, BLOCK, 6 * MIB), 0);
    assert_int_equal(env.resize_file(&env, file.fd, MIB), 0);
    assert_int_equal(size_of(file.fd), MIB);
    assert_int_equal(env.pread(&env, -1, block, BLOCK, 0), -EBADF);
    assert_int_equal(env.pwrite(&env, -1, block, BLOCK, 0), -EBADF);
    assert_int_equal(env.sync_file(&env, -1), -EBADF);
    assert_int_equal(env.preallocate(&env, -1, BLOCK), -EBADF);
    env.close_data_file(&env, &file);
    free(block);
}

// From here on the process gets `error` for the call.
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

// A child answers 0, 77 where it could not be tried, or the line that is wrong.
static void expect_child(int status_wanted, pid_t child)
{
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        skip();
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), status_wanted);
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            (void)fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                              \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

// A file system without fallocate (NFS before 4.2, ext3): the room is written.
static void child_without_fallocate(void)
{
    struct env_file file;
    uint8_t *block = aligned_alloc(BLOCK, BLOCK);
    uint64_t bytes = 0;
    CHECK(block);
    if (!refuse_call(SYS_fallocate, EOPNOTSUPP))
        _exit(77);
    memset(block, 0x5a, BLOCK);
    CHECK(env.open_data_file(&env, directory, "data", &file) == 0);
    CHECK(env.pwrite(&env, file.fd, block, BLOCK, 0) == BLOCK);
    CHECK(env.resize_file(&env, file.fd, BLOCK - 96) == 0); // an end inside a block
    CHECK(env.preallocate(&env, file.fd, 2 * MIB + BLOCK) == 0);
    CHECK(env.file_bytes(&env, file.fd, &bytes) == 0 && bytes == 2 * MIB + BLOCK);
    struct stat status;
    CHECK(fstat(file.fd, &status) == 0 && status.st_blocks * 512 >= (off_t)bytes);
    CHECK(env.pread(&env, file.fd, block, BLOCK, 0) == BLOCK);
    CHECK(block[0] == 0x5a && block[BLOCK - 97] == 0x5a && block[BLOCK - 96] == 0);
    CHECK(env.pread(&env, file.fd, block, BLOCK, MIB) == BLOCK && block[17] == 0);
    // A limit stands for a full file system: as long as before.
    struct rlimit limit = {3 * MIB, 3 * MIB};
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR && setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(env.preallocate(&env, file.fd, 4 * MIB) == -EFBIG);
    CHECK(env.file_bytes(&env, file.fd, &bytes) == 0 && bytes == 2 * MIB + BLOCK);
    _exit(0);
}

static void test_without_fallocate(void **state)
{
    (void)state;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        child_without_fallocate();
    expect_child(0, child);
}

static void test_small_files(void **state)
{
    (void)state;
    char text[64] = "";
    size_t bytes = 0;
    struct iovec pieces[3] = {{"one ", 4}, {"", 0}, {"two", 3}};
    assert_int_equal(env.write_file(&env, directory, "a.seal", pieces, 3), 0);
    assert_int_equal(env.read_file(&env, directory, "a.seal", text, sizeof text, &bytes), 0);
    assert_int_equal(bytes, 7);
    assert_memory_equal(text, "one two", 7);
    assert_int_equal(env.read_file(&env, directory, "a.seal", text, 7, &bytes), 0);
    bytes = 0;
    assert_int_equal(env.read_file(&env, directory, "a.seal", text, 6, &bytes), -EFBIG);
    assert_int_equal(bytes, 7);
    assert_int_equal(env.write_file(&env, directory, "a.seal", pieces, 1), 0); // takes the old one's place
    assert_int_equal(env.read_file(&env, directory, "a.seal", text, sizeof text, &bytes), 0);
    assert_int_equal(bytes, 4);
    assert_int_equal(env.write_file(&env, directory, "empty.seal", NULL, 0), 0);
    assert_int_equal(env.read_file(&env, directory, "empty.seal", NULL, 0, &bytes), 0);
    assert_int_equal(bytes, 0);
    assert_int_equal(env.write_file(&env, directory, "b.other", pieces, 1), 0);
    assert_int_equal(count_files(".seal"), 2);
    assert_int_equal(count_files(""), 3);
    assert_int_equal(count_files(".tmp"), 0);
    assert_int_equal(env.unlink_file(&env, directory, "a.seal"), 0);
    assert_int_equal(env.unlink_file(&env, directory, "a.seal"), 0);
    assert_int_equal(env.read_file(&env, directory, "a.seal", text, sizeof text, &bytes), -ENOENT);
    assert_int_equal(count_files(".seal"), 1);
}

static bool first_only(void *context, const char *name)
{
    ++*(int *)context;
    assert_int_equal(env.unlink_file(&env, directory, name), 0);
    return false;
}

static void test_listing(void **state)
{
    (void)state;
    struct iovec piece = {"x", 1};
    for (int i = 0; i < 300; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "%d.seal", i);
        assert_int_equal(env.write_file(&env, directory, name, &piece, 1), 0);
    }
    assert_int_equal(count_files(".seal"), 300);
    assert_int_equal(count_files("9.seal"), 30);
    int count = 0;
    assert_int_equal(env.list_files(&env, directory, ".seal", first_only, &count), 0);
    assert_int_equal(count, 1);
    assert_int_equal(count_files(".seal"), 299);
    assert_int_equal(env.list_files(&env, -1, "", first_only, &count), -EBADF);
}

// What stands in the way is named, and the old file stays.
static void test_small_failures(void **state)
{
    (void)state;
    struct iovec piece = {"new", 3};
    char name[NAME_MAX + 1], text[8];
    size_t bytes = 0;
    memset(name, 'n', NAME_MAX);
    name[NAME_MAX] = '\0';
    assert_int_equal(env.write_file(&env, directory, name, &piece, 1), -ENAMETOOLONG);
    assert_int_equal(env.write_file(&env, -1, "a", &piece, 1), -EBADF);
    assert_int_equal(mkdirat(directory, "taken", 0700), 0);
    assert_int_equal(env.write_file(&env, directory, "taken", &piece, 1), -EISDIR);
    assert_int_equal(count_files(".tmp"), 0);
    assert_int_equal(env.read_file(&env, directory, "taken", text, sizeof text, &bytes), -EINVAL);
    assert_int_equal(symlinkat("taken", directory, "link"), 0);
    assert_int_equal(env.read_file(&env, directory, "link", text, sizeof text, &bytes), -ELOOP);
    assert_int_equal(env.write_file(&env, directory, "a", &piece, 1), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) { // a limit stands for a full file system
        static char much[4 * BLOCK];
        struct iovec large = {much, sizeof much};
        struct rlimit limit = {BLOCK, BLOCK};
        CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR && setrlimit(RLIMIT_FSIZE, &limit) == 0);
        CHECK(env.write_file(&env, directory, "a", &large, 1) == -EFBIG);
        _exit(0);
    }
    expect_child(0, child);
    assert_int_equal(count_files(".tmp"), 0);
    assert_int_equal(env.read_file(&env, directory, "a", text, sizeof text, &bytes), 0);
    assert_int_equal(bytes, 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_open, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_memory_file, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_room, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_without_fallocate, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_small_files, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_listing, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_small_failures, make_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
