// The disk where things go wrong: every outside call of its opening fails once; devices that answer errors or half of
// what was asked for; folders that are full, read-only or gone; io_uring that is refused.
//
// The folder is made under $TMPDIR, or /var/tmp, because /tmp may be memory.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "faulty.h"

#include "cached/disk.h"

#include <dirent.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE   ((uint32_t)16 << 10)
#define PAGES  64u
#define BYTES  ((uint64_t)PAGE * PAGES)
#define NOBODY 65534u

static struct faulty faulty;
static char folder[256];

static int make_folder(void **state)
{
    (void)state;
    const char *under = getenv("TMPDIR");
    faulty_init(&faulty);
    (void)snprintf(folder, sizeof folder, "%s/icecache-disk-XXXXXX", under ? under : "/var/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    static const char *const names[] = {DISK_FILE,
                                        "probe.tmp"}; // a trial's file may be left where it cannot be unlinked
    for (int i = 0; i < 2; i++) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        (void)unlink(path);
    }
    return rmdir(folder) && errno != ENOENT ? -1 : 0;
}

static int try_open(struct env *env, enum disk_engine engine, struct disk **out, char *text, size_t capacity)
{
    const struct disk_params params = {.directory = folder, .bytes = BYTES, .engine = engine, .depth = 8};
    text[0] = '\0';
    return disk_open(env, &params, out, text, capacity);
}

static struct disk *open_disk(struct env *env, enum disk_engine engine)
{
    char text[256];
    struct disk *disk = NULL;
    int error = try_open(env, engine, &disk, text, sizeof text);
    if (error)
        print_error("%s\n", text);
    assert_int_equal(error, 0);
    return disk;
}

static bool has_ring(void)
{
    struct disk_usage usage;
    struct disk *disk = open_disk(&faulty.real, DISK_ENGINE_AUTO);
    disk_usage(disk, &usage);
    bool has = strcmp(usage.engine, "io_uring") == 0;
    assert_int_equal(disk_close(disk), 0);
    return has;
}

struct wait {
    struct disk_request request; // first
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool is_done;
};

static void wait_done(struct disk_request *request)
{
    struct wait *wait = (struct wait *)request;
    pthread_mutex_lock(&wait->lock);
    wait->is_done = true;
    pthread_cond_signal(&wait->changed);
    pthread_mutex_unlock(&wait->lock);
}

static int run_one(struct disk *disk, enum disk_op op, uint64_t offset, void *memory, uint32_t bytes)
{
    struct wait wait = {
        .request = {.op = op, .offset = offset, .memory = memory, .bytes = bytes, .done = wait_done},
        .lock = PTHREAD_MUTEX_INITIALIZER,
        .changed = PTHREAD_COND_INITIALIZER,
    };
    disk_submit(disk, &wait.request);
    pthread_mutex_lock(&wait.lock);
    while (!wait.is_done)
        pthread_cond_wait(&wait.changed, &wait.lock);
    pthread_mutex_unlock(&wait.lock);
    return wait.request.result;
}

static uint8_t *pages(uint32_t count)
{
    uint8_t *memory = aligned_alloc(DISK_ALIGN, (size_t)count * PAGE);
    assert_non_null(memory);
    for (uint32_t i = 0; i < count * PAGE; i++)
        memory[i] = (uint8_t)(i % 251);
    return memory;
}

// ---- opening ----

static unsigned count_descriptors(void)
{
    unsigned count = 0;
    DIR *listing = opendir("/proc/self/fd");
    assert_non_null(listing);
    while (readdir(listing))
        count++;
    closedir(listing);
    return count;
}

// Fails each call of a kind in turn. The disk opens, by one engine or the other, or says why not; nothing is left.
static void every_call(enum fault_kind kind, int error, enum disk_engine engine, bool must_open)
{
    char text[256];
    unsigned before = count_descriptors();
    uint32_t nth = 1;
    for (bool fired = true; fired; nth++) {
        struct disk *disk = NULL;
        faulty_arm(&faulty, kind, nth, error);
        int result = try_open(&faulty.env, engine, &disk, text, sizeof text);
        fired = faulty_disarm(&faulty);
        if (!fired)
            assert_int_equal(result, 0);
        if (must_open)
            assert_int_equal(result, 0);
        if (result == 0) {
            uint8_t *page = pages(1);
            assert_int_equal(run_one(disk, DISK_WRITE, PAGE, page, PAGE), 0);
            free(page);
            assert_int_equal(disk_close(disk), 0);
        } else {
            assert_true(text[0] != '\0');
            assert_null(disk);
        }
        assert_int_equal(atomic_load(&faulty.bytes), 0);
        assert_int_equal(count_descriptors(), before);
    }
    assert_true(nth > 2); // the kind is called at all
}

static void test_opening(void **state)
{
    (void)state;
    for (enum disk_engine engine = DISK_ENGINE_AUTO; engine <= DISK_ENGINE_THREADS; engine += 2) {
        every_call(FAULT_ACQUIRE, 0, engine, false);
        every_call(FAULT_OPEN_FOLDER, -EACCES, engine, false);
        every_call(FAULT_OPEN_FILE, -EROFS, engine, false);
        every_call(FAULT_FILE_BYTES, -EIO, engine, false);
        every_call(FAULT_PREALLOCATE, -ENOSPC, engine, false);
        every_call(FAULT_UNLINK_FILE, -EIO, engine, true);
    }
    every_call(FAULT_PREAD, -EIO, DISK_ENGINE_THREADS, false);
    every_call(FAULT_PREAD, 512, DISK_ENGINE_THREADS, false);
    faulty_arm(&faulty, FAULT_RESIZE_FILE, 1, -EIO);
    char path[512], text[256];
    (void)snprintf(path, sizeof path, "%s/" DISK_FILE, folder);
    assert_int_equal(truncate(path, 2 * BYTES), 0);
    struct disk *disk;
    assert_int_equal(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text), -EIO);
    assert_true(faulty_disarm(&faulty));
}

// A file that could not be had in full is not left half.
static void test_no_room(void **state)
{
    (void)state;
    char path[512], text[256];
    struct disk *disk = NULL;
    (void)snprintf(path, sizeof path, "%s/" DISK_FILE, folder);
    faulty_arm(&faulty, FAULT_PREALLOCATE, 1, -ENOSPC);
    assert_int_equal(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text), -ENOSPC);
    assert_non_null(strstr(text, "has no room for 1 MiB"));
    assert_int_equal(access(path, F_OK), -1);
    disk = open_disk(&faulty.env, DISK_ENGINE_AUTO);
    assert_int_equal(disk_close(disk), 0);
    faulty_arm(&faulty, FAULT_PREALLOCATE, 1, -ENOSPC);
    assert_int_equal(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text), -ENOSPC);
    assert_int_equal(access(path, F_OK), 0); // pages may be in it
}

// io_uring's trial fails: the other engine, with the reason.
static void test_ring_trial(void **state)
{
    (void)state;
    if (!has_ring())
        skip();
    static const struct {
        int error;
        const char *says;
    } trials[] = {
        {-EOPNOTSUPP, "not supported"}, {-EINVAL, "Invalid argument"}, {-EIO, "output error"}, {100, "output error"}};
    for (unsigned i = 0; i < sizeof trials / sizeof *trials; i++) {
        for (uint32_t nth = 1; nth <= 2; nth++) {
            struct disk_usage usage;
            char text[256];
            struct disk *disk = NULL;
            faulty_arm(&faulty, FAULT_RING_RESULT, nth, trials[i].error);
            disk = open_disk(&faulty.env, DISK_ENGINE_AUTO);
            assert_true(faulty_disarm(&faulty));
            disk_usage(disk, &usage);
            assert_string_equal(usage.engine, "threads");
            assert_non_null(strstr(usage.because, trials[i].says));
            assert_non_null(strstr(usage.because, nth == 1 ? "a write by io_uring" : "a read by io_uring"));
            assert_int_equal(disk_close(disk), 0);
            faulty_arm(&faulty, FAULT_RING_RESULT, nth, trials[i].error);
            int error = trials[i].error < 0 ? trials[i].error : -EIO;
            assert_int_equal(try_open(&faulty.env, DISK_ENGINE_URING, &disk, text, sizeof text), error);
            assert_non_null(strstr(text, trials[i].says));
            assert_true(faulty_disarm(&faulty));
        }
    }
}

// ---- errors of the device ----

// A device with a state of its own, behind both engines.
static struct {
    struct env env; // first
    struct env real;
    _Atomic int reads, writes; // what all of them answer; 0: as the real one
    _Atomic uint64_t bad;      // the place that cannot be read; UINT64_MAX: none
    _Atomic uint32_t calls;
    _Atomic uint32_t fail_sync_at; // the n-th sync from now on; 0: none
} sick;

static int64_t sick_answer(bool is_write, uint64_t offset, int64_t answer)
{
    atomic_fetch_add(&sick.calls, 1);
    int all = atomic_load(is_write ? &sick.writes : &sick.reads);
    if (!is_write && offset == atomic_load(&sick.bad))
        return -EIO;
    return all ? all : answer;
}

static ssize_t sick_pread(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    return (ssize_t)sick_answer(false, offset, sick.real.pread(&sick.real, fd, memory, bytes, offset));
}

static ssize_t sick_pwrite(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    return (ssize_t)sick_answer(true, offset, sick.real.pwrite(&sick.real, fd, memory, bytes, offset));
}

static int64_t sick_sync_answer(int64_t answer)
{
    const bool fails = atomic_load(&sick.fail_sync_at) > 0 && atomic_fetch_sub(&sick.fail_sync_at, 1) == 1;
    return fails ? -EIO : sick_answer(true, 0, answer);
}

static int sick_sync(struct env *env, int fd)
{
    (void)env;
    return (int)sick_sync_answer(sick.real.sync_file(&sick.real, fd));
}

static int sick_ring(struct env *env, bool is_write, uint64_t offset, uint32_t bytes, int result)
{
    (void)env;
    return (int)(bytes == 0 ? sick_sync_answer(result) : sick_answer(is_write, offset, result));
}

static struct disk *open_sick(enum disk_engine engine)
{
    env_linux_init(&sick.real);
    sick.env = sick.real;
    sick.env.pread = sick_pread;
    sick.env.pwrite = sick_pwrite;
    sick.env.sync_file = sick_sync;
    sick.env.ring_result = sick_ring;
    sick.bad = UINT64_MAX;
    sick.reads = sick.writes = 0;
    sick.fail_sync_at = 0;
    return open_disk(&sick.env, engine);
}

static const enum disk_engine engines[] = {DISK_ENGINE_AUTO, DISK_ENGINE_THREADS};
#define EACH_ENGINE(engine) (const enum disk_engine *engine = engines; engine < engines + 2; engine++)

// One bad place is answered as such, however often, and is not the device's end.
static void test_bad_place(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_sick(*engine);
            sick.bad = 7 * PAGE;
            for (uint32_t i = 0; i < 5 * DISK_FAILURES_MAX; i++) {
                assert_int_equal(run_one(disk, DISK_READ, 7 * PAGE, page, PAGE), -EIO);
                assert_int_equal(run_one(disk, DISK_WRITE, 8 * PAGE, page, PAGE), 0);
                if (i % 16 == 15)
                    assert_int_equal(run_one(disk, DISK_READ, 8 * PAGE, page, PAGE), 0);
            }
            assert_false(disk_is_off(disk));
            struct disk_usage usage;
            disk_usage(disk, &usage);
            assert_int_equal(usage.errors, 5 * DISK_FAILURES_MAX);
            assert_int_equal(disk_close(disk), 0);
        }
    free(page);
}

// Failures at one place after the other switch it off; then nothing reaches the device.
static void switches_off(enum disk_engine engine, enum disk_op op, int error)
{
    uint8_t *page = pages(1);
    struct disk *disk = open_sick(engine);
    struct disk_usage usage;
    for (uint32_t turn = 0; turn < 3; turn++) { // a success between them
        atomic_store(op == DISK_READ ? &sick.reads : &sick.writes, error);
        for (uint32_t i = 0; i < DISK_FAILURES_MAX - 1; i++)
            assert_int_equal(run_one(disk, op, (uint64_t)i * PAGE, page, PAGE), error);
        atomic_store(op == DISK_READ ? &sick.reads : &sick.writes, 0);
        assert_int_equal(run_one(disk, op, 9 * PAGE, page, PAGE), 0);
    }
    assert_false(disk_is_off(disk));
    atomic_store(op == DISK_READ ? &sick.reads : &sick.writes, error);
    for (uint32_t i = 0; i < DISK_FAILURES_MAX; i++) {
        assert_false(disk_is_off(disk));
        assert_int_equal(run_one(disk, op, (uint64_t)i * PAGE, page, PAGE), error);
        if (op != DISK_READ && i < DISK_FAILURES_MAX - 1) // reads that work do not make up for it
            assert_int_equal(run_one(disk, DISK_READ, 0, page, PAGE), 0);
    }
    assert_true(disk_is_off(disk));
    uint32_t calls = atomic_load(&sick.calls);
    for (enum disk_op other = DISK_READ; other <= DISK_SYNC; other++)
        assert_int_equal(run_one(disk, other, 0, page, PAGE), -EIO);
    assert_int_equal(atomic_load(&sick.calls), calls);
    disk_usage(disk, &usage);
    assert_true(usage.off);
    assert_int_equal(usage.off_error, error);
    assert_int_equal(disk_close(disk), 0);
    free(page);
}

static void test_switching_off(void **state)
{
    (void)state;
    static const int errors[] = {-EIO, -ENXIO, -ENODEV, -EROFS, -ESTALE, -ENOSPC};
    for
        EACH_ENGINE(engine)
    for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
        for (enum disk_op op = DISK_READ; op <= DISK_WRITE; op++)
            switches_off(*engine, op, errors[i]);
}

// The system may have forgotten what a sync could not write: no later one promises anything. All else goes on.
static void test_failed_sync(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_sick(*engine);
            struct disk_usage usage;
            assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), 0);
            sick.writes = -EDQUOT;
            assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), -EDQUOT);
            sick.writes = 0;
            for (uint32_t i = 0; i < 2 * DISK_FAILURES_MAX; i++) {
                assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), -EIO);
                assert_int_equal(run_one(disk, DISK_WRITE, PAGE, page, PAGE), 0);
                assert_int_equal(run_one(disk, DISK_READ, PAGE, page, PAGE), 0);
            }
            disk_usage(disk, &usage);
            assert_true(usage.sync_failed && !usage.off);
            assert_int_equal(disk_close(disk), 0);
        }
    free(page);
}

// Many at once, of which one fails: it does, and all that were taken after it.
static void test_failed_sync_among_many(void **state)
{
    (void)state;
    enum { SYNCS = 24 };
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_sick(*engine);
            struct wait waits[SYNCS];
            for (uint32_t i = 0; i < SYNCS; i++) {
                waits[i] = (struct wait){.request = {.op = DISK_SYNC, .done = wait_done},
                                         .lock = PTHREAD_MUTEX_INITIALIZER,
                                         .changed = PTHREAD_COND_INITIALIZER};
                waits[i].request.next = i > 0 ? &waits[i - 1].request : NULL;
            }
            sick.fail_sync_at = SYNCS / 2;
            disk_submit(disk, &waits[SYNCS - 1].request); // the last one is the chain's first
            assert_int_equal(disk_close(disk), 0);
            for (uint32_t nth = 1; nth <= SYNCS; nth++)
                assert_int_equal(waits[SYNCS - nth].request.result, nth < SYNCS / 2 ? 0 : -EIO);
        }
}

// A process without memory is not a device without a future.
static void test_other_errors(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_sick(*engine);
            sick.reads = -ENOMEM;
            for (uint32_t i = 0; i < 3 * DISK_FAILURES_MAX; i++)
                assert_int_equal(run_one(disk, DISK_READ, (uint64_t)i * PAGE, page, PAGE), -ENOMEM);
            assert_false(disk_is_off(disk));
            sick.reads = -EAGAIN; // tried again, but not for ever
            assert_int_equal(run_one(disk, DISK_READ, 0, page, PAGE), -EIO);
            sick.reads = 0;
            assert_int_equal(run_one(disk, DISK_READ, 0, page, PAGE), 0);
            assert_int_equal(disk_close(disk), 0);
        }
    free(page);
}

// ---- half of what was asked for ----

static _Atomic uint32_t turn;

// At most some of the bytes, now and then none for the moment.
static size_t shorter(size_t bytes)
{
    static const size_t most[] = {4096, 512, 8192, 4096 + 512, 100};
    size_t limit = most[atomic_fetch_add(&turn, 1) % 5];
    return bytes < limit ? bytes : limit;
}

static ssize_t short_pread(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    if (atomic_load(&turn) % 7 == 6 && atomic_fetch_add(&turn, 1))
        return -EAGAIN;
    size_t moved = shorter(bytes);
    ssize_t got = pread(fd, memory, bytes, (off_t)offset);
    if (got > (ssize_t)moved)
        memset((uint8_t *)memory + moved, 0xbb, (size_t)got - moved); // the rest has not come
    return got < 0 ? -errno : got < (ssize_t)moved ? got : (ssize_t)moved;
}

static ssize_t short_pwrite(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    if (atomic_load(&turn) % 7 == 6 && atomic_fetch_add(&turn, 1))
        return -EAGAIN;
    size_t moved = shorter(bytes), whole = (moved + 4095) / 4096 * 4096;
    ssize_t put = pwrite(fd, memory, whole < bytes ? whole : bytes, (off_t)offset);
    return put < 0 ? -errno : put < (ssize_t)moved ? put : (ssize_t)moved;
}

static int short_ring(struct env *env, bool is_write, uint64_t offset, uint32_t bytes, int result)
{
    (void)env;
    (void)is_write;
    (void)offset;
    if (bytes == 0 || bytes == DISK_ALIGN) // a sync, and the trials
        return result;
    if (atomic_load(&turn) % 7 == 6 && atomic_fetch_add(&turn, 1))
        return -EINTR;
    return result > 0 ? (int)shorter((size_t)result) : result;
}

static void test_short(void **state)
{
    (void)state;
    static struct env env;
    uint8_t *memory = pages(PAGES), *found = pages(PAGES);
    for
        EACH_ENGINE(engine)
        {
            env_linux_init(&env);
            struct disk *disk = NULL;
            env.ring_result = short_ring;
            disk = open_disk(&env, *engine);
            env.pread = short_pread; // after the trials, which take no part for the whole
            env.pwrite = short_pwrite;
            for (uint32_t bytes = PAGE; bytes <= BYTES; bytes *= 8) {
                memset(found, 0, BYTES);
                assert_int_equal(run_one(disk, DISK_WRITE, 0, memory, bytes), 0);
                assert_int_equal(run_one(disk, DISK_READ, 0, found, bytes), 0);
                assert_memory_equal(found, memory, bytes);
                memory[0]++;
            }
            assert_int_equal(disk_close(disk), 0);
        }
    free(found);
    free(memory);
}

// The file was cut behind the disk's back.
static void test_cut(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    char path[512];
    (void)snprintf(path, sizeof path, "%s/" DISK_FILE, folder);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_disk(&faulty.env, *engine);
            assert_int_equal(truncate(path, 5 * PAGE + 4096), 0);
            assert_int_equal(run_one(disk, DISK_READ, 5 * PAGE, page, PAGE), -EIO);
            assert_int_equal(run_one(disk, DISK_READ, 4 * PAGE, page, PAGE), 0);
            assert_false(disk_is_off(disk));
            assert_int_equal(disk_close(disk), 0);
        }
    free(page);
}

// ---- folders ----

// Gone: a sync must not promise what nobody will find; nor does a failure wait for others.
static void test_folder_gone(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    for
        EACH_ENGINE(engine)
        {
            for (int by_failure = 0; by_failure < 2; by_failure++) {
                struct disk *disk = open_sick(*engine);
                assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), 0);
                void *none = NULL;
                assert_int_equal(remove_folder(&none), 0);
                if (by_failure) {
                    sick.bad = 0;
                    assert_int_equal(run_one(disk, DISK_READ, 0, page, PAGE), -EIO);
                } else {
                    assert_int_equal(run_one(disk, DISK_WRITE, 0, page, PAGE), 0);
                    assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), -ESTALE);
                }
                assert_true(disk_is_off(disk));
                assert_int_equal(run_one(disk, DISK_READ, PAGE, page, PAGE), -EIO);
                assert_int_equal(disk_close(disk), 0);
                assert_int_equal(mkdir(folder, 0700), 0);
            }
        }
    free(page);
}

// ---- what a process may not do; each in a child ----

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            (void)fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                              \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)
#define CANNOT_TRY 77

static void in_child(void (*child)(void))
{
    (void)fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        child();
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == CANNOT_TRY)
        skip();
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// Root may do too much: continues as nobody, to whom the folder then belongs.
static void become_nobody(mode_t mode)
{
    CHECK(chmod(folder, mode) == 0);
    if (geteuid() != 0)
        return;
    char path[256];
    (void)snprintf(path, sizeof path, "%s", folder);
    CHECK(chown(folder, NOBODY, NOBODY) == 0);
    if (setgid(NOBODY) || setuid(NOBODY))
        _exit(CANNOT_TRY);
    *strrchr(path, '/') = '\0';
    if (access(path, X_OK)) // a TMPDIR of root's own
        _exit(CANNOT_TRY);
}

static void child_read_only(void)
{
    char text[256];
    struct disk *disk;
    become_nobody(0500);
    CHECK(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text) == -EACCES);
    CHECK(strstr(text, "cannot be opened for writing: Permission denied"));
}

static void test_read_only(void **state)
{
    (void)state;
    in_child(child_read_only);
}

// A file system of 512 KiB for a file of 1 MiB.
static void child_full(void)
{
    char text[256];
    struct disk *disk;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("icecache", folder, "tmpfs", 0, "size=512k"))
        _exit(CANNOT_TRY);
    CHECK(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text) == -ENOSPC);
    CHECK(strstr(text, "has no room for 1 MiB"));
}

static void test_full(void **state)
{
    (void)state;
    in_child(child_full);
}

static void child_limit(void)
{
    char text[256];
    struct disk *disk;
    struct rlimit limit = {BYTES / 2, BYTES / 2};
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR && setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text) == -EFBIG);
    CHECK(strstr(text, "has no room for 1 MiB"));
}

static void test_limit(void **state)
{
    (void)state;
    in_child(child_limit);
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

// Works by the other engine, and says why.
static void works_by_threads(int error, const char *says)
{
    char text[256];
    struct disk *disk = NULL;
    struct disk_usage usage;
    CHECK(try_open(&faulty.env, DISK_ENGINE_URING, &disk, text, sizeof text) == error);
    CHECK(strstr(text, says));
    CHECK(try_open(&faulty.env, DISK_ENGINE_AUTO, &disk, text, sizeof text) == 0);
    disk_usage(disk, &usage);
    CHECK(strcmp(usage.engine, "threads") == 0 && strstr(usage.because, says));
    uint8_t *page = aligned_alloc(DISK_ALIGN, PAGE);
    CHECK(page);
    memset(page, 0x3c, PAGE);
    CHECK(run_one(disk, DISK_WRITE, PAGE, page, PAGE) == 0 && run_one(disk, DISK_SYNC, 0, NULL, 0) == 0);
    memset(page, 0, PAGE);
    CHECK(run_one(disk, DISK_READ, PAGE, page, PAGE) == 0 && page[0] == 0x3c && page[PAGE - 1] == 0x3c);
    CHECK(disk_close(disk) == 0);
    free(page);
}

static void child_setup_refused(void)
{
    if (!refuse_call(SYS_io_uring_setup, EPERM))
        _exit(CANNOT_TRY);
    works_by_threads(-EPERM, "io_uring_setup: Operation not permitted (a seccomp filter");
}

static void child_setup_unknown(void)
{
    if (!refuse_call(SYS_io_uring_setup, ENOSYS))
        _exit(CANNOT_TRY);
    works_by_threads(-ENOSYS, "io_uring_setup: Function not implemented");
}

// The ring is there, but cannot be used: only a trial finds that.
static void child_enter_refused(void)
{
    if (!refuse_call(SYS_io_uring_enter, EPERM))
        _exit(CANNOT_TRY);
    works_by_threads(-EPERM, "a write by io_uring: Operation not permitted");
}

static void child_no_locked_memory(void)
{
    struct rlimit limit = {0, 0};
    become_nobody(0700);
    CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
    works_by_threads(-ENOMEM, "io_uring_setup: Cannot allocate memory (RLIMIT_MEMLOCK");
}

static void test_ring_refused(void **state)
{
    (void)state;
    if (!has_ring())
        skip();
    in_child(child_setup_refused);
    in_child(child_setup_unknown);
    in_child(child_enter_refused);
}

static void test_no_locked_memory(void **state)
{
    (void)state;
    if (!has_ring())
        skip();
    void *none = NULL;
    assert_int_equal(remove_folder(&none), 0); // has_ring's file is root's
    assert_int_equal(mkdir(folder, 0700), 0);
    in_child(child_no_locked_memory);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_opening),       IN_FOLDER(test_no_room),
        IN_FOLDER(test_ring_trial),    IN_FOLDER(test_bad_place),
        IN_FOLDER(test_switching_off), IN_FOLDER(test_other_errors),
        IN_FOLDER(test_short),         IN_FOLDER(test_cut),
        IN_FOLDER(test_folder_gone),   IN_FOLDER(test_read_only),
        IN_FOLDER(test_full),          IN_FOLDER(test_limit),
        IN_FOLDER(test_ring_refused),  IN_FOLDER(test_no_locked_memory),
        IN_FOLDER(test_failed_sync),   IN_FOLDER(test_failed_sync_among_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
