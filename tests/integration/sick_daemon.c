// icecached as it is, but that its table of outside effects goes through here: the linker puts __wrap_env_linux_init in
// the place of env_linux_init. Faults hit the data file of the spill folder, and its manifests; all else is real.
//
// The journal. Each write of the data file, and each making and unlinking of a manifest, stands in the shared file
// before it begins, with its bytes. A sync makes all writes that had returned when it began stable: they go to a second
// file. Whatever the moment of a kill, the second file and the journal are all that a loss of power needs (power.c).
#include "sick.h"

#include "cached/disk.h"
#include "cached/env_linux.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAUSE_US_MAX 3000u

static struct env real;
static struct sick *sick;
static int stable_fd = -1;
static _Atomic int data_fd = -1;                         // the trials of an engine go to another file, and are real
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // of the journal's end, the syncs, and random
static uint64_t random_state;
static _Atomic uint32_t turns;

static void fail(const char *what)
{
    fprintf(stderr, "sick daemon: %s: %s\n", what, strerror(errno));
    abort();
}

// Sometimes, so that a kill comes in the middle of things.
static void pause_now_and_then(void)
{
    if (!sick->keeps_journal)
        return;
    pthread_mutex_lock(&lock);
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t us = (uint32_t)(random_state >> 40) % (4 * PAUSE_US_MAX);
    pthread_mutex_unlock(&lock);
    if (us < PAUSE_US_MAX)
        usleep(us);
}

// ---- the journal ----

static struct sick_entry *journal_add(enum sick_kind kind, const char *name, uint64_t offset, const void *data,
                                      size_t bytes)
{
    const uint64_t room = (sizeof(struct sick_entry) + bytes + 63) / 64 * 64;
    pthread_mutex_lock(&lock);
    const uint64_t at = atomic_load(&sick->journal_used);
    if (room > SICK_JOURNAL_BYTES - at)
        fail("the journal is full");
    struct sick_entry *entry = (struct sick_entry *)(sick->journal + at);
    entry->bytes = bytes;
    entry->room = room;
    entry->offset = offset;
    entry->kind = kind;
    atomic_store(&entry->state, SICK_BEGUN);
    snprintf(entry->name, sizeof entry->name, "%s", name);
    if (bytes > 0)
        memcpy(entry->data, data, bytes);
    atomic_store(&sick->journal_used, at + room);
    pthread_mutex_unlock(&lock);
    return entry;
}

// Where nothing in it can be lost any more it begins anew.
static void journal_trim(void)
{
    const uint64_t used = atomic_load(&sick->journal_used);
    for (uint64_t at = 0; at < used;) {
        const struct sick_entry *entry = (const struct sick_entry *)(sick->journal + at);
        if (atomic_load(&entry->state) != (entry->kind == SICK_WRITE ? SICK_STABLE : SICK_DONE))
            return;
        at += entry->room;
    }
    atomic_store(&sick->journal_used, 0);
}

// The writes that had returned: to the stable file, or forgotten by the system.
static void journal_sync(bool drop)
{
    pthread_mutex_lock(&lock);
    const uint64_t used = atomic_load(&sick->journal_used);
    for (uint64_t at = 0; at < used;) { // others become done meanwhile
        struct sick_entry *entry = (struct sick_entry *)(sick->journal + at);
        int done = SICK_DONE;
        at += entry->room;
        if (entry->kind != SICK_WRITE || !atomic_compare_exchange_strong(&entry->state, &done, SICK_SYNCING) || drop)
            continue;
        if (pwrite(stable_fd, entry->data, entry->bytes, (off_t)entry->offset) != (ssize_t)entry->bytes)
            fail("the stable file");
    }
    for (uint64_t at = 0; at < used;) {
        struct sick_entry *entry = (struct sick_entry *)(sick->journal + at);
        int syncing = SICK_SYNCING;
        at += entry->room;
        (void)atomic_compare_exchange_strong(&entry->state, &syncing, drop ? SICK_DROPPED : SICK_STABLE);
    }
    journal_trim();
    pthread_mutex_unlock(&lock);
}

// ---- the data file ----

static void hang(void)
{
    atomic_fetch_add(&sick->hanging, 1);
    while (atomic_load(&sick->hangs))
        usleep(1000);
    atomic_fetch_sub(&sick->hanging, 1);
}

static int write_refusal(void)
{
    const int error = atomic_load(&sick->write_error);
    uint32_t left = atomic_load(&sick->write_failures);
    while (error && left > 0 && left < UINT32_MAX &&
           !atomic_compare_exchange_weak(&sick->write_failures, &left, left - 1))
        ;
    return left > 0 ? error : 0;
}

// What the device says instead of moving bytes; 0: it moves them.
static int refusal(bool is_write, uint64_t offset, uint64_t bytes)
{
    atomic_fetch_add(is_write ? &sick->writes : &sick->reads, 1);
    if (atomic_load(&sick->hangs))
        hang();
    const int error = is_write ? write_refusal() : atomic_load(&sick->read_error);
    if (error)
        return error;
    return !is_write && offset < atomic_load(&sick->bad_until) && offset + bytes > atomic_load(&sick->bad_from) ? -EIO
                                                                                                                : 0;
}

static size_t part_of(size_t bytes)
{
    static const size_t most[] = {4096, 512, 8192, 4096 + 512, 100};
    const size_t limit = most[atomic_fetch_add(&turns, 1) % 5];
    return atomic_load(&sick->shortens) && bytes > limit ? limit : bytes;
}

static ssize_t sick_pread(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    if (fd != data_fd)
        return real.pread(&real, fd, memory, bytes, offset);
    const int error = refusal(false, offset, bytes);
    if (error)
        return error;
    const ssize_t got = real.pread(&real, fd, memory, bytes, offset);
    const size_t part = part_of(bytes);
    if (got > (ssize_t)part)
        memset((uint8_t *)memory + part, 0xbb, (size_t)got - part); // has not come
    return got > (ssize_t)part ? (ssize_t)part : got;
}

static ssize_t sick_pwrite(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    if (fd != data_fd)
        return real.pwrite(&real, fd, memory, bytes, offset);
    const int error = refusal(true, offset, bytes);
    if (error)
        return error;
    if (!sick->keeps_journal) {
        const ssize_t put = real.pwrite(&real, fd, memory, bytes, offset);
        const size_t part = part_of(bytes); // the rest may be there or not
        return put > (ssize_t)part ? (ssize_t)part : put;
    }
    struct sick_entry *entry = journal_add(SICK_WRITE, "", offset, memory, bytes);
    pause_now_and_then();
    const ssize_t put = real.pwrite(&real, fd, memory, bytes, offset);
    if (put == (ssize_t)bytes)
        atomic_store(&entry->state, SICK_DONE);
    return put;
}

static int sick_open_data_file(struct env *env, int directory, const char *name, struct env_file *out)
{
    (void)env;
    const int error = real.open_data_file(&real, directory, name, out);
    if (!error && strcmp(name, "data") == 0)
        data_fd = out->fd;
    return error;
}

static int sick_sync(struct env *env, int fd)
{
    (void)env;
    (void)fd;
    atomic_fetch_add(&sick->syncs, 1);
    if (atomic_load(&sick->hangs))
        hang();
    const int error = atomic_exchange(&sick->sync_error, 0);
    if (!sick->keeps_journal)
        return error ? error : real.sync_file(&real, fd);
    pause_now_and_then();
    journal_sync(error != 0);
    return error;
}

// Through the kernel's ring the transfer has been done by now: only its answer can be another.
static int sick_ring(struct env *env, bool is_write, uint64_t offset, uint32_t bytes, int result)
{
    (void)env;
    if (bytes == 0) {
        atomic_fetch_add(&sick->syncs, 1);
        if (atomic_load(&sick->hangs))
            hang();
        const int error = atomic_exchange(&sick->sync_error, 0);
        return error ? error : result;
    }
    const int error = refusal(is_write, offset, bytes);
    return error ? error : result > 0 ? (int)part_of((size_t)result) : result;
}

// ---- manifests ----

static bool is_manifest(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && strcmp(dot, ".seal") == 0;
}

static int sick_write_file(struct env *env, int directory, const char *name, const struct iovec *pieces, int count)
{
    (void)env;
    if (!sick->keeps_journal || count != 1)
        return real.write_file(&real, directory, name, pieces, count);
    struct sick_entry *entry = journal_add(SICK_FILE_WRITTEN, name, 0, pieces->iov_base, pieces->iov_len);
    pause_now_and_then();
    const int error = real.write_file(&real, directory, name, pieces, count);
    pause_now_and_then();
    if (!error)
        atomic_store(&entry->state, SICK_DONE);
    return error;
}

static int sick_read_file(struct env *env, int directory, const char *name, void *memory, size_t capacity,
                          size_t *bytes_out)
{
    (void)env;
    const int error = atomic_load(&sick->read_file_error);
    return error ? error : real.read_file(&real, directory, name, memory, capacity, bytes_out);
}

static int sick_unlink_file(struct env *env, int directory, const char *name)
{
    (void)env;
    if (!is_manifest(name))
        return real.unlink_file(&real, directory, name);
    static uint8_t bytes[1 << 20]; // the keeper's, or the main thread's before it
    size_t count = 0;
    struct sick_entry *entry = NULL;
    if (sick->keeps_journal && real.read_file(&real, directory, name, bytes, sizeof bytes, &count) == 0)
        entry = journal_add(SICK_FILE_UNLINKED, name, 0, bytes, count);
    usleep(atomic_load(&sick->unlink_pause_us));
    pause_now_and_then();
    const int told = atomic_load(&sick->unlink_error), error = told ? told : real.unlink_file(&real, directory, name);
    pause_now_and_then();
    if (!error && entry)
        atomic_store(&entry->state, SICK_DONE);
    return error;
}

// ---- the table ----

static int open_shared(const char *folder, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    return fd;
}

int __real_disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text, size_t capacity);
int __wrap_disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text, size_t capacity);

int __wrap_disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text, size_t capacity)
{
    struct disk_params others = *params;
    others.close_wait_ns = sick ? sick->close_wait_ns : 0;
    return __real_disk_open(env, &others, out, text, capacity);
}

void __real_env_linux_init(struct env *env);
void __wrap_env_linux_init(struct env *env);

void __wrap_env_linux_init(struct env *env)
{
    const char *folder = getenv(SICK_FOLDER_VARIABLE);
    __real_env_linux_init(env);
    if (!folder)
        return;
    const int fd = open_shared(folder, SICK_FILE);
    sick = mmap(NULL, sizeof *sick, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (sick == MAP_FAILED)
        fail("mmap");
    close(fd);
    stable_fd = open_shared(folder, SICK_STABLE_FILE);
    random_state = sick->seed;
    real = *env;
    env->open_data_file = sick_open_data_file;
    env->pread = sick_pread;
    env->pwrite = sick_pwrite;
    env->sync_file = sick_sync;
    env->ring_result = sick_ring;
    env->write_file = sick_write_file;
    env->read_file = sick_read_file;
    env->unlink_file = sick_unlink_file;
}
