// The disk on real files, by both engines: contents at many depths, syncs, more requests than the ring holds, threads
// that submit at once, caps, closing with requests on their way and with a device that hangs, files in memory.
//
// The folder is made under $TMPDIR, or /var/tmp, because /tmp may be memory.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/disk.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE  ((uint32_t)16 << 10)
#define PAGES 256u
#define BYTES ((uint64_t)PAGE * PAGES)

static struct env env;
static char folder[256];

// ---- a folder, a disk, requests that are waited for ----

static int make_folder(void **state)
{
    (void)state;
    const char *under = getenv("TMPDIR");
    env_linux_init(&env);
    (void)snprintf(folder, sizeof folder, "%s/icecache-disk-XXXXXX", under ? under : "/var/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static void unlink_in(const char *directory, const char *name)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", directory, name);
    (void)unlink(path);
}

// Also shows that nothing but the data file is left behind.
static int remove_folder(void **state)
{
    (void)state;
    unlink_in(folder, DISK_FILE);
    return rmdir(folder);
}

static struct disk *open_disk(struct disk_params params)
{
    struct disk *disk = NULL;
    char text[256] = "";
    params.directory = params.directory ? params.directory : folder;
    params.bytes = params.bytes ? params.bytes : BYTES;
    int error = disk_open(&env, &params, &disk, text, sizeof text);
    if (error)
        print_error("%s\n", text);
    assert_int_equal(error, 0);
    return disk;
}

// Where a machine has no io_uring, the other engine is tested twice.
static const enum disk_engine engines[] = {DISK_ENGINE_AUTO, DISK_ENGINE_THREADS};
#define EACH_ENGINE(engine) (const enum disk_engine *engine = engines; engine < engines + 2; engine++)

struct group {
    pthread_mutex_t lock;
    pthread_cond_t done;
    uint32_t left;
};

struct job {
    struct disk_request request; // first
    struct group *group;
    uint32_t answers;
};

static void job_done(struct disk_request *request)
{
    struct job *job = (struct job *)request;
    pthread_mutex_lock(&job->group->lock);
    job->answers++;
    if (--job->group->left == 0)
        pthread_cond_signal(&job->group->done);
    pthread_mutex_unlock(&job->group->lock);
}

static void group_init(struct group *group)
{
    pthread_mutex_init(&group->lock, NULL);
    pthread_cond_init(&group->done, NULL);
    group->left = 0;
}

static void group_fini(struct group *group)
{
    pthread_cond_destroy(&group->done);
    pthread_mutex_destroy(&group->lock);
}

// Submits all as one chain.
static void start(struct disk *disk, struct group *group, struct job *jobs, uint32_t count)
{
    group->left += count;
    for (uint32_t i = 0; i < count; i++) {
        jobs[i].group = group;
        jobs[i].answers = 0;
        jobs[i].request.done = job_done;
        jobs[i].request.next = i + 1 < count ? &jobs[i + 1].request : NULL;
        jobs[i].request.result = 12345;
    }
    disk_submit(disk, &jobs[0].request);
}

static void wait_for(struct group *group)
{
    pthread_mutex_lock(&group->lock);
    while (group->left > 0)
        pthread_cond_wait(&group->done, &group->lock);
    pthread_mutex_unlock(&group->lock);
}

static void run(struct disk *disk, struct job *jobs, uint32_t count)
{
    struct group group;
    group_init(&group);
    start(disk, &group, jobs, count);
    wait_for(&group);
    group_fini(&group);
    for (uint32_t i = 0; i < count; i++)
        assert_int_equal(jobs[i].answers, 1);
}

static int run_one(struct disk *disk, enum disk_op op, uint64_t offset, void *memory, uint32_t bytes)
{
    struct job job = {.request = {.op = op, .offset = offset, .memory = memory, .bytes = bytes}};
    run(disk, &job, 1);
    return job.request.result;
}

static uint8_t *pages(uint32_t count)
{
    uint8_t *memory = aligned_alloc(DISK_ALIGN, (size_t)count * PAGE);
    assert_non_null(memory);
    memset(memory, 0xee, (size_t)count * PAGE);
    return memory;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A page says in each of its words where it belongs and how often it has been written.
static void fill_page(uint8_t *page, uint64_t number, uint64_t turn)
{
    for (uint32_t i = 0; i < PAGE / 8; i++) {
        uint64_t word = mix(number << 40 ^ turn << 20 ^ i);
        memcpy(page + 8 * (size_t)i, &word, 8);
    }
}

static bool is_page(const uint8_t *page, uint64_t number, uint64_t turn)
{
    for (uint32_t i = 0; i < PAGE / 8; i++) {
        uint64_t word = mix(number << 40 ^ turn << 20 ^ i);
        if (memcmp(page + 8 * (size_t)i, &word, 8) != 0)
            return false;
    }
    return true;
}

// All pages in an order without order.
static void set_up(struct job *jobs, enum disk_op op, uint8_t *memory, uint64_t seed)
{
    uint32_t order[PAGES];
    for (uint32_t i = 0; i < PAGES; i++) {
        uint32_t j = (uint32_t)(mix(seed + i) % (i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    for (uint32_t i = 0; i < PAGES; i++)
        jobs[i] = (struct job){.request = {.op = op,
                                           .offset = (uint64_t)order[i] * PAGE,
                                           .memory = memory + (size_t)order[i] * PAGE,
                                           .bytes = PAGE}};
}

static void close_disk(struct disk *disk)
{
    assert_int_equal(disk_close(disk), 0);
}

// ---- tests ----

static void test_contents(void **state)
{
    (void)state;
    static const uint32_t depths[] = {0, 1, 2, 7, 32, DISK_DEPTH_MAX};
    static struct job jobs[PAGES];
    uint8_t *memory = pages(PAGES);
    uint64_t turn = 0;
    for
        EACH_ENGINE(engine)
        {
            for (unsigned d = 0; d < sizeof depths / sizeof *depths; d++, turn++) {
                struct disk *disk = open_disk((struct disk_params){.engine = *engine, .depth = depths[d]});
                for (uint32_t i = 0; i < PAGES; i++)
                    fill_page(memory + (size_t)i * PAGE, i, turn);
                set_up(jobs, DISK_WRITE, memory, turn);
                run(disk, jobs, PAGES);
                for (uint32_t i = 0; i < PAGES; i++)
                    assert_int_equal(jobs[i].request.result, 0);
                assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), 0);
                memset(memory, 0, (size_t)PAGES * PAGE);
                set_up(jobs, DISK_READ, memory, turn + 1000);
                run(disk, jobs, PAGES);
                for (uint32_t i = 0; i < PAGES; i++)
                    assert_true(jobs[i].request.result == 0 && is_page(memory + (size_t)i * PAGE, i, turn));
                struct disk_usage usage;
                disk_usage(disk, &usage);
                assert_int_equal(usage.reads + usage.writes + usage.syncs, 2 * PAGES + 1);
                assert_int_equal(usage.read_bytes + usage.written_bytes, 2 * BYTES);
                assert_int_equal(usage.errors, 0);
                assert_false(usage.off);
                close_disk(disk);
            }
        }
    free(memory);
}

static void test_engines(void **state)
{
    (void)state;
    struct disk_usage usage;
    struct disk *disk = open_disk((struct disk_params){.engine = DISK_ENGINE_THREADS});
    disk_usage(disk, &usage);
    assert_string_equal(usage.engine, "threads");
    assert_string_equal(usage.because, "configured");
    close_disk(disk);
    disk = open_disk((struct disk_params){0});
    disk_usage(disk, &usage);
    print_message("io_uring here: %s%s\n", usage.because[0] ? "no, " : "yes", usage.because);
    assert_string_equal(usage.engine, usage.because[0] ? "threads" : "io_uring");
    assert_int_equal(usage.direct, disk_memory_align(disk) > 1);
    close_disk(disk);
    assert_int_equal(disk_close(NULL), 0);
}

// What is there stays, longer or shorter, and is found by the other engine.
static void test_reopening(void **state)
{
    (void)state;
    uint8_t *page = pages(1);
    struct disk *disk = open_disk((struct disk_params){0});
    fill_page(page, 3, 1);
    assert_int_equal(run_one(disk, DISK_WRITE, 3 * PAGE, page, PAGE), 0);
    char text[256] = "";
    struct disk *second = NULL;
    struct disk_params params = {.directory = folder, .bytes = BYTES};
    assert_int_equal(disk_open(&env, &params, &second, text, sizeof text), -EBUSY);
    assert_non_null(strstr(text, "in use by another process"));
    close_disk(disk);
    for (uint64_t bytes = 4 * PAGE; bytes <= 2 * BYTES; bytes *= 2) {
        disk = open_disk(
            (struct disk_params){.bytes = bytes, .engine = bytes % 3 ? DISK_ENGINE_THREADS : DISK_ENGINE_AUTO});
        memset(page, 0, PAGE);
        assert_int_equal(run_one(disk, DISK_READ, 3 * PAGE, page, PAGE), 0);
        assert_true(is_page(page, 3, 1));
        char path[512];
        struct stat status;
        (void)snprintf(path, sizeof path, "%s/" DISK_FILE, folder);
        assert_int_equal(stat(path, &status), 0);
        assert_int_equal(status.st_size, bytes);
        assert_true((uint64_t)status.st_blocks * 512 >= bytes);
        close_disk(disk);
    }
    free(page);
}

static void test_refused_params(void **state)
{
    (void)state;
    static const struct {
        struct disk_params params;
        int error;
        const char *says;
    } wrong[] = {
        {{.directory = folder, .bytes = 0}, -EINVAL, "multiple of 4096"},
        {{.directory = folder, .bytes = DISK_ALIGN + 512}, -EINVAL, "multiple of 4096"},
        {{.directory = folder, .bytes = BYTES, .depth = DISK_DEPTH_MAX + 1}, -EINVAL, "at most 64"},
        {{.directory = "/nowhere/at/all", .bytes = BYTES}, -ENOENT, "/nowhere/at/all"},
        {{.directory = "/proc/self/cmdline", .bytes = BYTES}, -ENOTDIR, "cannot be opened"},
    };
    for (unsigned i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct disk *disk = NULL;
        char text[256] = "";
        assert_int_equal(disk_open(&env, &wrong[i].params, &disk, text, sizeof text), wrong[i].error);
        assert_non_null(strstr(text, wrong[i].says));
        assert_null(disk);
    }
}

// One request as large as the file, and the smallest ones at both ends.
static void test_sizes(void **state)
{
    (void)state;
    uint8_t *memory = pages(PAGES), *block = pages(1);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_disk((struct disk_params){.engine = *engine});
            for (uint32_t i = 0; i < PAGES; i++)
                fill_page(memory + (size_t)i * PAGE, i, 77);
            assert_int_equal(run_one(disk, DISK_WRITE, 0, memory, (uint32_t)BYTES), 0);
            assert_int_equal(run_one(disk, DISK_READ, BYTES - DISK_ALIGN, block, DISK_ALIGN), 0);
            assert_memory_equal(block, memory + BYTES - DISK_ALIGN, DISK_ALIGN);
            assert_int_equal(run_one(disk, DISK_READ, 0, block, DISK_ALIGN), 0);
            assert_memory_equal(block, memory, DISK_ALIGN);
            memset(memory, 0, BYTES);
            assert_int_equal(run_one(disk, DISK_READ, 0, memory, (uint32_t)BYTES), 0);
            for (uint32_t i = 0; i < PAGES; i++)
                assert_true(is_page(memory + (size_t)i * PAGE, i, 77));
            close_disk(disk);
        }
    free(block);
    free(memory);
}

// ---- many threads ----

struct worker {
    struct disk *disk;
    uint32_t first, count; // pages of its own
    const char *wrong;
};

static void *work(void *argument)
{
    struct worker *worker = argument;
    uint8_t *memory = pages(worker->count);
    struct job *jobs = calloc(worker->count, sizeof *jobs);
    for (uint64_t turn = 0; turn < 20 && !worker->wrong; turn++) {
        for (int op = DISK_WRITE; op >= DISK_READ; op--) {
            for (uint32_t i = 0; i < worker->count; i++) {
                uint8_t *page = memory + (size_t)i * PAGE;
                if (op == DISK_WRITE)
                    fill_page(page, worker->first + i, turn);
                else
                    memset(page, 0, PAGE);
                jobs[i].request = (struct disk_request){.op = (enum disk_op)op,
                                                        .offset = (uint64_t)(worker->first + i) * PAGE,
                                                        .memory = page,
                                                        .bytes = PAGE};
            }
            run(worker->disk, jobs, worker->count);
            if (turn % 8 == 0 && run_one(worker->disk, DISK_SYNC, 0, NULL, 0) != 0)
                worker->wrong = "a sync failed";
        }
        for (uint32_t i = 0; i < worker->count; i++)
            if (jobs[i].request.result != 0 || !is_page(memory + (size_t)i * PAGE, worker->first + i, turn))
                worker->wrong = "a page is not what was written";
    }
    free(jobs);
    free(memory);
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    for
        EACH_ENGINE(engine)
        {
            struct worker workers[4];
            pthread_t threads[4];
            struct disk *disk = open_disk((struct disk_params){.engine = *engine, .depth = 8});
            for (uint32_t i = 0; i < 4; i++) {
                workers[i] = (struct worker){.disk = disk, .first = i * 24, .count = i == 0 ? 1 : 24};
                assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
            }
            for (uint32_t i = 0; i < 4; i++) {
                pthread_join(threads[i], NULL);
                assert_null(workers[i].wrong);
            }
            struct disk_usage usage;
            disk_usage(disk, &usage);
            assert_int_equal(usage.waiting, 0);
            close_disk(disk);
        }
}

// ---- a chain that its own answers keep going ----

struct relay {
    struct disk_request request; // first
    struct disk *disk;
    _Atomic int32_t *left;
    struct group *group;
};

static void relay_done(struct disk_request *request)
{
    struct relay *relay = (struct relay *)request;
    if (request->result == 0 && atomic_fetch_sub(relay->left, 1) > 1) {
        disk_submit(relay->disk, request);
        return;
    }
    pthread_mutex_lock(&relay->group->lock);
    if (--relay->group->left == 0)
        pthread_cond_signal(&relay->group->done);
    pthread_mutex_unlock(&relay->group->lock);
}

static void test_relay(void **state)
{
    (void)state;
    enum { RUNNERS = 12, LEGS = 2000 };
    uint8_t *memory = pages(RUNNERS);
    for
        EACH_ENGINE(engine)
        {
            struct relay relays[RUNNERS];
            struct group group;
            _Atomic int32_t left = LEGS;
            struct disk *disk = open_disk((struct disk_params){.engine = *engine, .depth = 4});
            group_init(&group);
            group.left = RUNNERS;
            for (uint32_t i = 0; i < RUNNERS; i++) {
                relays[i] = (struct relay){.request = {.op = DISK_READ,
                                                       .offset = (uint64_t)i * PAGE,
                                                       .memory = memory + (size_t)i * PAGE,
                                                       .bytes = PAGE,
                                                       .done = relay_done},
                                           .disk = disk,
                                           .left = &left,
                                           .group = &group};
                disk_submit(disk, &relays[i].request);
            }
            wait_for(&group);
            struct disk_usage usage;
            disk_usage(disk, &usage);
            assert_in_range(usage.reads, LEGS, LEGS + RUNNERS);
            group_fini(&group);
            close_disk(disk);
        }
    free(memory);
}

// ---- caps ----

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Capped writes take the time that the cap says and hardly any CPU; reads pass them.
static void test_caps(void **state)
{
    (void)state;
    enum { COUNT = 40 };
    static struct job jobs[COUNT];
    uint8_t *memory = pages(COUNT), *page = pages(1);
    for
        EACH_ENGINE(engine)
        {
            struct group group;
            struct disk *disk =
                open_disk((struct disk_params){.engine = *engine, .write_bytes_per_s_max = (uint64_t)COUNT * PAGE * 4});
            for (uint32_t i = 0; i < COUNT; i++)
                jobs[i].request = (struct disk_request){
                    .op = DISK_WRITE, .offset = (uint64_t)i * PAGE, .memory = memory + (size_t)i * PAGE, .bytes = PAGE};
            group_init(&group);
            const double begun = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
            start(disk, &group, jobs, COUNT);
            assert_int_equal(run_one(disk, DISK_READ, 0, page, PAGE), 0);
            pthread_mutex_lock(&group.lock);
            assert_true(group.left > 0);
            pthread_mutex_unlock(&group.lock);
            wait_for(&group);
            assert_true(seconds(CLOCK_MONOTONIC) - begun > 0.2);
            assert_true(seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu < 0.15);
            group_fini(&group);
            close_disk(disk);
        }
    free(page);
    free(memory);
}

// ---- closing ----

static void test_closing(void **state)
{
    (void)state;
    static struct job jobs[PAGES];
    uint8_t *memory = pages(PAGES);
    for
        EACH_ENGINE(engine)
        {
            for (uint32_t depth = 1; depth <= 32; depth *= 32) {
                struct group group;
                struct disk *disk = open_disk((struct disk_params){.engine = *engine, .depth = depth});
                group_init(&group);
                set_up(jobs, DISK_WRITE, memory, depth);
                start(disk, &group, jobs, PAGES);
                close_disk(disk);
                assert_int_equal(group.left, 0);
                for (uint32_t i = 0; i < PAGES; i++)
                    assert_true(jobs[i].answers == 1 && jobs[i].request.result == 0);
                group_fini(&group);
            }
        }
    free(memory);
}

// Transfers of the threads engine that wait until they are let go.
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool hangs;
    uint32_t inside;
} device = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static ssize_t hanging_pread(struct env *real, int fd, void *memory, size_t bytes, uint64_t offset)
{
    (void)real;
    pthread_mutex_lock(&device.lock);
    device.inside++;
    pthread_cond_broadcast(&device.changed);
    while (device.hangs)
        pthread_cond_wait(&device.changed, &device.lock);
    device.inside--;
    pthread_mutex_unlock(&device.lock);
    ssize_t got = pread(fd, memory, bytes, (off_t)offset);
    return got < 0 ? -errno : got;
}

static _Atomic uint32_t disks_gone; // a disk closes its file and then gives its memory back
static _Atomic bool is_closed;

static void noted_close(struct env *real, struct env_file *file)
{
    (void)real;
    close(file->fd);
    atomic_store(&is_closed, true);
}

static void noted_release(struct env *real, void *memory, size_t bytes)
{
    (void)real;
    (void)bytes;
    free(memory);
    if (atomic_exchange(&is_closed, false))
        atomic_fetch_add(&disks_gone, 1);
}

static void test_hanging(void **state)
{
    (void)state;
    static struct job jobs[4];
    struct group group;
    uint8_t *memory = pages(4);
    static struct env hanging; // the disk's, for good
    hanging = env;
    hanging.pread = hanging_pread;
    hanging.close_data_file = noted_close;
    hanging.release = noted_release;
    const struct disk_params params = {
        .directory = folder, .bytes = BYTES, .engine = DISK_ENGINE_THREADS, .depth = 2, .close_wait_ns = 50000000};
    struct disk *disk = NULL;
    char text[256];
    assert_int_equal(disk_open(&hanging, &params, &disk, text, sizeof text), 0);
    const uint32_t gone = atomic_load(&disks_gone);
    group_init(&group);
    device.hangs = true;
    for (uint32_t i = 0; i < 4; i++)
        jobs[i].request = (struct disk_request){
            .op = DISK_READ, .offset = (uint64_t)i * PAGE, .memory = memory + (size_t)i * PAGE, .bytes = PAGE};
    start(disk, &group, jobs, 4);
    pthread_mutex_lock(&device.lock);
    while (device.inside < 2)
        pthread_cond_wait(&device.changed, &device.lock);
    pthread_mutex_unlock(&device.lock);
    const double begun = seconds(CLOCK_MONOTONIC);
    assert_int_equal(disk_close(disk), -ETIMEDOUT);
    assert_in_range((uint64_t)(1000 * (seconds(CLOCK_MONOTONIC) - begun)), 49, 5000);
    // The device comes back: nobody is answered, and the disk goes.
    pthread_mutex_lock(&device.lock);
    device.hangs = false;
    pthread_cond_broadcast(&device.changed);
    pthread_mutex_unlock(&device.lock);
    while (atomic_load(&disks_gone) == gone)
        usleep(1000);
    assert_int_equal(group.left, 4);
    group_fini(&group);
    free(memory);
}

// ---- files in memory ----

static void test_memory_file(void **state)
{
    (void)state;
    char directory[] = "/dev/shm/icecache-disk-XXXXXX";
    if (!mkdtemp(directory))
        skip();
    uint8_t *memory = pages(2);
    for
        EACH_ENGINE(engine)
        {
            struct disk *disk = open_disk((struct disk_params){.directory = directory, .engine = *engine});
            struct disk_usage usage;
            disk_usage(disk, &usage);
            assert_false(usage.direct);
            assert_int_equal(disk_memory_align(disk), 1);
            fill_page(memory + 3, 5, 5);
            assert_int_equal(run_one(disk, DISK_WRITE, 5 * PAGE, memory + 3, PAGE), 0);
            assert_int_equal(run_one(disk, DISK_SYNC, 0, NULL, 0), 0);
            memset(memory, 0, 2 * PAGE);
            assert_int_equal(run_one(disk, DISK_READ, 5 * PAGE, memory + 7, PAGE), 0);
            assert_true(is_page(memory + 7, 5, 5));
            close_disk(disk);
        }
    free(memory);
    unlink_in(directory, DISK_FILE);
    assert_int_equal(rmdir(directory), 0);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_contents), IN_FOLDER(test_engines), IN_FOLDER(test_reopening),   IN_FOLDER(test_refused_params),
        IN_FOLDER(test_sizes),    IN_FOLDER(test_threads), IN_FOLDER(test_relay),       IN_FOLDER(test_caps),
        IN_FOLDER(test_closing),  IN_FOLDER(test_hanging), IN_FOLDER(test_memory_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
