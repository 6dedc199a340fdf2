// The disk's engine for where io_uring is refused: threads that transfer one request each, by the calls in the table of
// outside effects. Measured beside io_uring at 8 KiB pages: the same throughput up to 16 in flight, from there on .7 to
// 1 of it, at 1.3 to 2 times the CPU.
//
// There are as many threads as requests may be in flight, up to DISK_THREADS_MAX: each is one more to be scheduled, and
// 16 already bring most of what the device can do.
#include "cached/disk_engine.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define SECOND_NS 1000000000u

struct threads {
    pthread_cond_t wanted;
    uint32_t idle; // guarded by the disk's lock
};

// The memory may change meanwhile, as it may under a ring: what was written then is not counted on (PAGE_CHANGED).
static int64_t write_as_it_is(struct disk *disk, const uint8_t *memory, uint32_t bytes, uint64_t offset)
{
    return disk->env->pwrite(disk->env, disk->file.fd, memory, bytes, offset);
}

static int64_t move(struct disk *disk, const struct disk_transfer *transfer)
{
    struct env *env = disk->env;
    const struct disk_request *request = transfer->request;
    uint8_t *memory = (uint8_t *)request->memory + transfer->bytes;
    const uint64_t offset = request->offset + transfer->bytes;
    const uint32_t bytes = request->bytes - transfer->bytes;
    switch (request->op) {
    case DISK_READ:
        return env->pread(env, disk->file.fd, memory, bytes, offset);
    case DISK_WRITE:
        return write_as_it_is(disk, memory, bytes, offset);
    default:
        return env->sync_file(env, disk->file.fd);
    }
}

static void serve(struct disk *disk, struct disk_request *request)
{
    struct disk_transfer transfer = {.request = request};
    if (disk_is_off(disk))
        request->result = -EIO;
    else
        while (disk_transfer_go_on(disk, &transfer, move(disk, &transfer)))
            ;
    disk_answer(disk, request);
}

// With the lock.
static void wait_for_work(struct disk *disk, uint64_t now_ns, uint64_t wait_ns)
{
    struct threads *threads = disk->engine;
    threads->idle++;
    if (wait_ns == DISK_NEVER_NS) {
        pthread_cond_wait(&threads->wanted, &disk->lock);
    } else {
        const uint64_t until_ns = now_ns + wait_ns;
        const struct timespec until = {.tv_sec = (time_t)(until_ns / SECOND_NS),
                                       .tv_nsec = (long)(until_ns % SECOND_NS)};
        (void)pthread_cond_timedwait(&threads->wanted, &disk->lock, &until);
    }
    threads->idle--;
}

static void *run(void *argument)
{
    struct disk *disk = argument;
    pthread_mutex_lock(&disk->lock);
    while (!disk->abandoned) {
        uint64_t wait_ns;
        const uint64_t now_ns = env_now_ns(disk->env);
        struct disk_request *request = disk_take(disk, now_ns, &wait_ns);
        if (request) {
            pthread_mutex_unlock(&disk->lock);
            serve(disk, request);
            pthread_mutex_lock(&disk->lock);
        } else if (disk->stopping && disk->waiting == 0) {
            // What is answered now may submit once more, to whoever answers it.
            break;
        } else {
            wait_for_work(disk, now_ns, wait_ns);
        }
    }
    pthread_mutex_unlock(&disk->lock);
    disk_thread_end(disk);
    return NULL;
}

static int probe_by_calls(struct disk *disk, const struct env_file *file, char because[DISK_TEXT_BYTES])
{
    struct env *env = disk->env;
    const size_t bytes = 3 * DISK_ALIGN; // two blocks, and what aligns them
    uint8_t *memory = env_acquire_zeroed(env, bytes);
    if (!memory) {
        (void)snprintf(because, DISK_TEXT_BYTES, "no memory");
        return -ENOMEM;
    }
    uint8_t *written = memory + (DISK_ALIGN - (uintptr_t)memory % DISK_ALIGN) % DISK_ALIGN,
            *read = written + DISK_ALIGN;
    disk_pattern(written, env_now_ns(env));
    const char *step = "pwrite";
    int64_t moved = env->pwrite(env, file->fd, written, DISK_ALIGN, 0);
    if (moved == DISK_ALIGN) {
        step = "pread";
        moved = env->pread(env, file->fd, read, DISK_ALIGN, 0);
    }
    int error = moved < 0 ? (int)moved : moved != DISK_ALIGN || memcmp(read, written, DISK_ALIGN) != 0 ? -EIO : 0;
    if (error)
        (void)snprintf(because, DISK_TEXT_BYTES, "%s: %s", step, strerror(-error));
    env->release(env, memory, bytes);
    return error;
}

static void stop_all(struct disk *disk)
{
    pthread_mutex_lock(&disk->lock);
    disk->stopping = true;
    disk->ops->wake(disk, 0);
    pthread_mutex_unlock(&disk->lock);
    disk_threads_join(disk);
    disk->stopping = false;
}

static int threads_start(struct disk *disk, const struct env_file *probe, char because[DISK_TEXT_BYTES])
{
    int error = probe_by_calls(disk, probe, because);
    if (error)
        return error;
    struct threads *threads = env_acquire_zeroed(disk->env, sizeof *threads);
    if (!threads) {
        (void)snprintf(because, DISK_TEXT_BYTES, "no memory");
        return -ENOMEM;
    }
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&threads->wanted, &attributes);
    pthread_condattr_destroy(&attributes);
    disk->engine = threads;
    const uint32_t count = disk->depth < DISK_THREADS_MAX ? disk->depth : DISK_THREADS_MAX;
    for (uint32_t i = 0; i < count && !error; i++)
        error = disk_thread_start(disk, run, disk);
    if (error) {
        (void)snprintf(because, DISK_TEXT_BYTES, "a thread: %s", strerror(-error));
        stop_all(disk);
        disk->ops->fini(disk);
    }
    return error;
}

static void threads_wake(struct disk *disk, uint32_t count)
{
    struct threads *threads = disk->engine;
    if (count == 0 || count >= threads->idle)
        pthread_cond_broadcast(&threads->wanted);
    else
        for (uint32_t i = 0; i < count; i++)
            pthread_cond_signal(&threads->wanted);
}

static void threads_fini(struct disk *disk)
{
    struct threads *threads = disk->engine;
    pthread_cond_destroy(&threads->wanted);
    disk->env->release(disk->env, threads, sizeof *threads);
}

const struct disk_engine_ops disk_threads = {
    .name = "threads", .start = threads_start, .wake = threads_wake, .fini = threads_fini};
