// The disk without its engines: the queue, the caps, the counters, and when to give up.
//
// Requests go in the order in which they came, but that urgent reads go first (of which no more than DISK_PASSES_MAX
// pass the others in a row) and a capped kind (reads, writes) lets the other one pass. What has been taken from the
// queue is in flight until its done has returned.
//
// When the disk is off. An error of the device on one request says little: a bad place on a disk stays bad, while all
// the rest can be read. So what counts is failures one after the other, with no success of the same kind between them
// and at another place than the one before: DISK_FAILURES_MAX of them. Reads are counted apart from writes and syncs,
// because a file system that has gone read-only still answers reads. Errors that are not the device's (no memory, a
// wrong argument) are not counted. A data file that has lost its name (its folder was removed) is the end at once:
// nobody finds it after a restart; looked at when a request failed and at each sync, which would promise otherwise. Off
// is for good: a device that comes and goes must not take the daemon through that again and again.
//
// A sync that fails is the end of syncs, at once: the system may have forgotten what it could not write, so that a
// later one would succeed without it. There is one at a time, because the system tells a failure to one of several
// only.
//
// A device that hangs is not off, because it answers nothing: who waits for it has a deadline of his own.
//
// Closing lets all that waits go, caps or not, and waits for it, because the device writes into the requests' memory.
// One that hangs is left with all it holds; whoever comes back from it last frees the disk, and answers nobody.
#include "cached/disk.h"
#include "cached/disk_engine.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define PROBE_FILE "probe.tmp"
#define TRIES_MAX  64u       // of a transfer that moves nothing
#define BURST_NS   10000000u // of a capped kind, after a pause
#define SECOND_NS  1000000000u
#define NO_PLACE   UINT64_MAX

static int say(char *text, size_t capacity, int error, const char *format, ...) __attribute__((format(printf, 4, 5)));

static int say(char *text, size_t capacity, int error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, capacity, format, arguments);
    va_end(arguments);
    return error;
}

// ---- queue and caps ----

static bool bucket_allows(struct disk_bucket *bucket, uint64_t now_ns, uint64_t *wait_ns)
{
    if (bucket->bytes_per_s == 0)
        return true;
    const double rate = (double)bucket->bytes_per_s / SECOND_NS, most = rate * BURST_NS;
    if (now_ns > bucket->filled_ns) {
        const double level = bucket->level_bytes + rate * (double)(now_ns - bucket->filled_ns);
        bucket->level_bytes = level < most ? level : most;
        bucket->filled_ns = now_ns;
    }
    if (bucket->level_bytes >= 0)
        return true;
    uint64_t wait = (uint64_t)(-bucket->level_bytes / rate) + 1;
    *wait_ns = wait < *wait_ns ? wait : *wait_ns;
    return false;
}

// The queue, among those that are not urgent, whose first request has waited longest and may go. NULL: none may.
static struct disk_queue *oldest_queue(struct disk *disk, bool is_free, uint64_t now_ns, uint64_t *wait_ns)
{
    struct disk_queue *oldest = NULL;
    for (enum disk_op op = DISK_READ; op <= DISK_SYNC; op++) {
        struct disk_queue *queue = &disk->queues[op];
        if (queue->first && !(op == DISK_SYNC && disk->syncing) &&
            (!oldest || queue->first->submitted_ns < oldest->first->submitted_ns) &&
            (is_free || op == DISK_SYNC || bucket_allows(&disk->buckets[op], now_ns, wait_ns)))
            oldest = queue;
    }
    return oldest;
}

static struct disk_queue *queue_in_turn(struct disk *disk, uint64_t now_ns, uint64_t *wait_ns)
{
    const bool is_free = disk_is_off(disk) || disk->stopping; // of caps
    if (disk->urgent.first && disk->passed < DISK_PASSES_MAX &&
        (is_free || bucket_allows(&disk->buckets[DISK_READ], now_ns, wait_ns))) {
        disk->passed++;
        return &disk->urgent;
    }
    struct disk_queue *oldest = oldest_queue(disk, is_free, now_ns, wait_ns);
    if (oldest || !disk->urgent.first || (!is_free && !bucket_allows(&disk->buckets[DISK_READ], now_ns, wait_ns))) {
        disk->passed = 0;
        return oldest;
    }
    return &disk->urgent; // it has passed many, but none of those may go
}

struct disk_request *disk_take(struct disk *disk, uint64_t now_ns, uint64_t *wait_ns)
{
    *wait_ns = DISK_NEVER_NS;
    if (disk->waiting == 0)
        return NULL;
    struct disk_queue *oldest = queue_in_turn(disk, now_ns, wait_ns);
    if (!oldest)
        return NULL;
    struct disk_request *request = oldest->first;
    oldest->first = request->next;
    request->next = NULL;
    disk->waiting--;
    if (disk->in_flight++ == 0)
        disk->moved_ns = now_ns;
    disk->syncing |= request->op == DISK_SYNC;
    if (request->op != DISK_SYNC && disk->buckets[request->op].bytes_per_s > 0)
        disk->buckets[request->op].level_bytes -= (double)request->bytes;
    return request;
}

void disk_submit(struct disk *disk, struct disk_request *first)
{
    const uint64_t now_ns = env_now_ns(disk->env);
    uint32_t count = 0;
    pthread_mutex_lock(&disk->lock);
    assert(!disk->stopping || disk->answering > 0);
    for (struct disk_request *request = first, *next; request; request = next) {
        assert(!request->urgent || request->op == DISK_READ);
        assert(request->op == DISK_SYNC ||
               (request->op <= DISK_SYNC && request->bytes > 0 &&
                (request->offset | request->bytes) % DISK_ALIGN == 0 && request->bytes <= disk->bytes &&
                request->offset <= disk->bytes - request->bytes &&
                (uintptr_t)request->memory % disk->file.memory_align == 0));
        struct disk_queue *queue = request->urgent ? &disk->urgent : &disk->queues[request->op];
        next = request->next;
        request->next = NULL;
        request->submitted_ns = now_ns;
        if (queue->first)
            queue->last->next = request;
        else
            queue->first = request;
        queue->last = request;
        count++;
    }
    disk->waiting += count;
    if (count > 0)
        disk->ops->wake(disk, count);
    pthread_mutex_unlock(&disk->lock);
}

// ---- answers ----

bool disk_transfer_go_on(const struct disk *disk, struct disk_transfer *transfer, int64_t moved)
{
    struct disk_request *request = transfer->request;
    const bool again = moved == -EAGAIN || moved == -EINTR;
    request->result = again ? -EIO : moved < 0 ? (int)moved : 0;
    if (moved < 0 && !again)
        return false;
    if (!again) {
        if (request->op == DISK_SYNC)
            return false;
        const uint32_t before = transfer->bytes, left = request->bytes - before;
        request->result = moved == 0 ? -EIO : 0; // the file has become shorter
        if (moved == 0 || moved >= left)
            return false;
        const uint32_t align =
            disk->file.place_align > disk->file.memory_align ? disk->file.place_align : disk->file.memory_align;
        transfer->bytes = (before + (uint32_t)moved) / align * align; // what goes on must be aligned again
        request->result = -EIO;
        if (transfer->bytes > before)
            transfer->tries = 0;
    }
    return ++transfer->tries < TRIES_MAX;
}

static bool is_device_error(int result)
{
    return result < 0 && result != -EINVAL && result != -EFAULT && result != -ENOMEM && result != -EBADF;
}

static void switch_off(struct disk *disk, int error)
{
    if (disk_is_off(disk))
        return;
    disk->off_error = error;
    atomic_store_explicit(&disk->off, true, memory_order_release);
}

// Counts what the device has answered, and makes of it what the requester is told.
static void count(struct disk *disk, struct disk_request *request)
{
    const bool promised = request->op != DISK_SYNC || !disk->sync_failed;
    const unsigned kind = request->op != DISK_READ;
    const uint64_t place = request->op == DISK_SYNC ? NO_PLACE : request->offset;
    if (request->result == 0) {
        disk->failures[kind] = 0;
        disk->last_failed[kind] = NO_PLACE;
        disk->reads += request->op == DISK_READ;
        disk->read_bytes += request->op == DISK_READ ? request->bytes : 0;
        disk->writes += request->op == DISK_WRITE;
        disk->written_bytes += request->op == DISK_WRITE ? request->bytes : 0;
        disk->syncs += request->op == DISK_SYNC;
        request->result = promised ? 0 : -EIO;
        return;
    }
    disk->errors++;
    disk->sync_failed |= request->op == DISK_SYNC;
    if (!is_device_error(request->result))
        return;
    if (place == NO_PLACE || place != disk->last_failed[kind])
        disk->failures[kind]++;
    disk->last_failed[kind] = place;
    if (disk->failures[kind] >= DISK_FAILURES_MAX)
        switch_off(disk, request->result);
}

void disk_answer(struct disk *disk, struct disk_request *first)
{
    bool gone = false, is_off = disk_is_off(disk);
    for (struct disk_request *request = first; request && !is_off; request = request->next) {
        if (!gone && (request->result < 0 || request->op == DISK_SYNC))
            gone = disk->env->check_file(disk->env, disk->file.fd) == -ESTALE;
        if (gone && request->op == DISK_SYNC)
            request->result = -ESTALE;
    }
    pthread_mutex_lock(&disk->lock);
    uint32_t answers = 0;
    bool synced = false;
    for (struct disk_request *request = first; request; request = request->next, answers++) {
        synced |= request->op == DISK_SYNC;
        count(disk, request);
    }
    if (gone)
        switch_off(disk, -ESTALE);
    const bool abandoned = disk->abandoned;
    disk->answering++;
    pthread_mutex_unlock(&disk->lock);
    for (struct disk_request *request = abandoned ? NULL : first, *next; request; request = next) {
        next = request->next; // the request may be gone after done
        request->next = NULL;
        request->done(request);
    }
    pthread_mutex_lock(&disk->lock);
    disk->in_flight -= answers;
    disk->answering--;
    disk->moved_ns = env_now_ns(disk->env);
    disk->syncing &= !synced;
    if (synced && (disk->stopping || disk->queues[DISK_SYNC].first))
        disk->ops->wake(disk, 0);
    if (disk->stopping)
        pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
}

// ---- threads ----

int disk_thread_start(struct disk *disk, void *(*run)(void *), void *argument)
{
    pthread_mutex_lock(&disk->lock);
    int error = -pthread_create(&disk->threads[disk->thread_count], NULL, run, argument);
    if (!error) {
        disk->thread_count++;
        disk->running++;
    }
    pthread_mutex_unlock(&disk->lock);
    return error;
}

static void disk_free(struct disk *disk)
{
    struct env *env = disk->env;
    disk->ops->fini(disk);
    env->close_data_file(env, &disk->file);
    env->close_fd(env, disk->directory);
    pthread_cond_destroy(&disk->changed);
    pthread_mutex_destroy(&disk->lock);
    env->release(env, disk, sizeof *disk);
}

void disk_thread_end(struct disk *disk)
{
    pthread_mutex_lock(&disk->lock);
    const bool is_last = --disk->running == 0 && disk->is_left;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
    if (is_last)
        disk_free(disk);
}

void disk_threads_join(struct disk *disk)
{
    for (uint32_t i = 0; i < disk->thread_count; i++)
        pthread_join(disk->threads[i], NULL);
    disk->thread_count = 0;
}

// With the lock: until all threads have ended, or nothing was answered for the time that a device gets.
static void await_end(struct disk *disk)
{
    uint64_t deadline_ns = 0, seen = UINT64_MAX;
    while (disk->running > 0) {
        const uint64_t now_ns = env_now_ns(disk->env);
        const uint64_t answered = disk->reads + disk->writes + disk->syncs + disk->errors;
        if (answered != seen)
            deadline_ns = now_ns + disk->close_wait_ns;
        else if (now_ns >= deadline_ns)
            break;
        seen = answered;
        const struct timespec deadline = {.tv_sec = (time_t)(deadline_ns / SECOND_NS),
                                          .tv_nsec = (long)(deadline_ns % SECOND_NS)};
        (void)pthread_cond_timedwait(&disk->changed, &disk->lock, &deadline);
    }
}

int disk_close(struct disk *disk)
{
    if (!disk)
        return 0;
    pthread_mutex_lock(&disk->lock);
    disk->stopping = true;
    disk->ops->wake(disk, 0);
    await_end(disk);
    const bool hangs = disk->running > 0;
    if (hangs) {
        disk->abandoned = true;
        while (disk->answering > 0) // of what came in time; done does not block
            pthread_cond_wait(&disk->changed, &disk->lock);
    }
    disk->is_left = disk->running > 0;
    const bool is_left = disk->is_left;
    for (uint32_t i = 0; i < disk->thread_count && is_left; i++)
        pthread_detach(disk->threads[i]);
    pthread_mutex_unlock(&disk->lock);
    if (!is_left) {
        disk_threads_join(disk);
        disk_free(disk);
    }
    return hangs ? -ETIMEDOUT : 0;
}

// ---- opening ----

void disk_pattern(uint8_t *block, uint64_t seed)
{
    for (uint32_t i = 0; i < DISK_ALIGN; i += sizeof seed) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        memcpy(block + i, &seed, sizeof seed);
    }
}

static int check_params(const struct disk_params *params, char *text, size_t capacity)
{
    if (params->bytes == 0 || params->bytes % DISK_ALIGN != 0 || params->bytes > INT64_MAX)
        return say(text, capacity, -EINVAL, "the data file must be a multiple of %u bytes, not %" PRIu64, DISK_ALIGN,
                   params->bytes);
    if (params->depth > DISK_DEPTH_MAX)
        return say(text, capacity, -EINVAL, "at most %u requests can be in flight, not %" PRIu32, DISK_DEPTH_MAX,
                   params->depth);
    return 0;
}

static int open_file(struct disk *disk, const struct disk_params *params, char *text, size_t capacity)
{
    struct env *env = disk->env;
    int error = env->open_data_file(env, disk->directory, DISK_FILE, &disk->file);
    // The kernel ends the ring of a process that was killed, and with it the lock, some time after the process.
    const uint64_t until_ns = env_now_ns(env) + DISK_OPEN_WAIT_NS;
    while (error == -EBUSY && env_now_ns(env) < until_ns) {
        poll(NULL, 0, 10);
        error = env->open_data_file(env, disk->directory, DISK_FILE, &disk->file);
    }
    if (error == -EBUSY)
        return say(text, capacity, error, "%s is in use by another process", params->directory);
    if (error)
        return say(text, capacity, error, "%s/" DISK_FILE " cannot be opened for writing: %s", params->directory,
                   strerror(-error));
    uint64_t before = 0;
    error = env->file_bytes(env, disk->file.fd, &before);
    if (!error && before > disk->bytes)
        error = env->resize_file(env, disk->file.fd, disk->bytes);
    if (!error)
        error = env->preallocate(env, disk->file.fd, disk->bytes);
    if (!error)
        return 0;
    if (error == -ENOSPC || error == -EDQUOT || error == -EFBIG)
        say(text, capacity, error, "%s has no room for %" PRIu64 " MiB (%s): free some, or configure less",
            params->directory, disk->bytes >> 20, strerror(-error));
    else
        say(text, capacity, error, "%s/" DISK_FILE " cannot be given %" PRIu64 " MiB: %s", params->directory,
            disk->bytes >> 20, strerror(-error));
    env->close_data_file(env, &disk->file);
    if (before == 0)
        (void)env->unlink_file(env, disk->directory, DISK_FILE);
    return error;
}

static int start_engine(struct disk *disk, enum disk_engine engine, char *text, size_t capacity)
{
    struct env *env = disk->env;
    struct env_file probe;
    char because[DISK_TEXT_BYTES] = "";
    int error = env->open_data_file(env, disk->directory, PROBE_FILE, &probe);
    if (error)
        return say(text, capacity, error, "no file can be made in the spill folder: %s", strerror(-error));
    error = env->preallocate(env, probe.fd, DISK_ALIGN);
    if (error) {
        say(text, capacity, error, "the spill folder has no room for a trial: %s", strerror(-error));
        goto out;
    }
    disk->ops = &disk_uring;
    error = engine == DISK_ENGINE_THREADS ? -ENOSYS : disk_uring.start(disk, &probe, because);
    if (engine == DISK_ENGINE_THREADS)
        (void)snprintf(disk->because, sizeof disk->because, "configured");
    else if (error)
        memcpy(disk->because, because, sizeof because);
    if (error && engine != DISK_ENGINE_URING) {
        disk->ops = &disk_threads;
        error = disk_threads.start(disk, &probe, because);
    }
    if (error)
        say(text, capacity, error, "a trial of the spill folder failed: %s", because);
out:
    env->close_data_file(env, &probe);
    (void)env->unlink_file(env, disk->directory, PROBE_FILE); // one that is left over is used again
    return error;
}

static void disk_init(struct disk *disk, struct env *env, const struct disk_params *params)
{
    const uint64_t rates[DISK_SYNC] = {params->read_bytes_per_s_max, params->write_bytes_per_s_max};
    disk->env = env;
    disk->bytes = params->bytes;
    disk->depth = params->depth ? params->depth : DISK_DEPTH_DEFAULT;
    disk->close_wait_ns = params->close_wait_ns ? params->close_wait_ns : DISK_CLOSE_WAIT_NS;
    for (int i = 0; i < DISK_SYNC; i++)
        disk->buckets[i] = (struct disk_bucket){.bytes_per_s = rates[i], .filled_ns = env_now_ns(env)};
    disk->last_failed[0] = disk->last_failed[1] = NO_PLACE;
    pthread_mutex_init(&disk->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&disk->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

int disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text, size_t capacity)
{
    int error = check_params(params, text, capacity);
    if (error)
        return error;
    struct disk *disk = env_acquire_zeroed(env, sizeof *disk);
    if (!disk)
        return say(text, capacity, -ENOMEM, "no memory");
    disk_init(disk, env, params);
    error = env->open_directory(env, params->directory, &disk->directory);
    if (error) {
        say(text, capacity, error, "the spill folder %s cannot be opened: %s", params->directory, strerror(-error));
        goto fail_directory;
    }
    error = open_file(disk, params, text, capacity);
    if (error)
        goto fail_file;
    error = start_engine(disk, params->engine, text, capacity);
    if (error)
        goto fail_engine;
    *out = disk;
    return 0;

fail_engine:
    env->close_data_file(env, &disk->file);
fail_file:
    env->close_fd(env, disk->directory);
fail_directory:
    pthread_cond_destroy(&disk->changed);
    pthread_mutex_destroy(&disk->lock);
    env->release(env, disk, sizeof *disk);
    return error;
}

// ---- what it says of itself ----

bool disk_hangs(struct disk *disk)
{
    pthread_mutex_lock(&disk->lock);
    const bool hangs = disk->in_flight > 0 && env_now_ns(disk->env) - disk->moved_ns >= disk->close_wait_ns;
    pthread_mutex_unlock(&disk->lock);
    return hangs;
}

uint32_t disk_memory_align(const struct disk *disk)
{
    return disk->file.memory_align;
}

bool disk_is_off(const struct disk *disk)
{
    return atomic_load_explicit(&disk->off, memory_order_acquire);
}

void disk_usage(struct disk *disk, struct disk_usage *out)
{
    pthread_mutex_lock(&disk->lock);
    *out = (struct disk_usage){
        .engine = disk->ops->name,
        .because = disk->because,
        .direct = disk->file.direct,
        .off = disk_is_off(disk),
        .off_error = disk->off_error,
        .sync_failed = disk->sync_failed,
        .in_flight = disk->in_flight,
        .waiting = disk->waiting,
        .reads = disk->reads,
        .read_bytes = disk->read_bytes,
        .writes = disk->writes,
        .written_bytes = disk->written_bytes,
        .syncs = disk->syncs,
        .errors = disk->errors,
    };
    pthread_mutex_unlock(&disk->lock);
}
