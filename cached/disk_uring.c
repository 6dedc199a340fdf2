// The disk's engine of choice: one ring of io_uring and one thread, which alone touches the ring. One is enough: with
// 32 in flight a request costs it 6 to 10 us of CPU at 8 KiB and 10 to 14 at 64 KiB on the machine where it was
// measured, so that it moves some 5 GB/s in large pieces, more than that device does; the rest is the device's.
//
// The thread takes what waits, submits it all by the same system call that waits for an answer, and answers some of
// what has come by then. While it works nobody has to wake it; before it sleeps it says so, under the disk's lock, and
// whoever submits then writes to an eventfd that the ring reads.
//
// No polling thread of the kernel's (SQPOLL): it starves small machines. No registered memory: it is charged against
// RLIMIT_MEMLOCK, and gains little beside the registered file.
#include "cached/disk_engine.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

// Answers between two looks at the queue. Beside fio, which looks after each: taking all that had come gave .86 to .93
// of its pages a second at 8 to 64 in flight, one by one cost up to 1.15 of its CPU, 4 gave .9 and more at .6 to .98 of
// its CPU.
#define REAP_MAX      4u
#define SPARE_ENTRIES 3u // beside the requests: the eventfd's, and what liburing takes for a time-out
#define WAKE          UINT64_MAX
#define PROBE         (UINT64_MAX - 1)
#define DATA_INDEX    0
#define PROBE_INDEX   1
#define SECOND_NS     1000000000u

struct uring {
    struct disk *disk;
    struct io_uring ring; // the thread's own, as all up to the handshake
    bool fixed;           // the file is registered
    int wake_fd;
    uint64_t wakes;
    bool is_armed; // the ring reads the eventfd
    struct disk_transfer transfers[DISK_DEPTH_MAX];
    uint32_t free[DISK_DEPTH_MAX], free_count;

    const struct env_file *probe; // the handshake: borrowed until it is over
    char *because;
    bool is_started; // guarded by the disk's lock, as what follows
    int error;
    bool is_sleeping;
};

// ---- the ring ----

static int explain(char because[DISK_TEXT_BYTES], const char *step, int error)
{
    const char *hint = "";
    if (error == -EPERM || error == -EACCES)
        hint = " (a seccomp filter, as of a container, or kernel.io_uring_disabled)";
    else if (error == -ENOSYS)
        hint = " (a kernel without it, or a seccomp filter)";
    else if (error == -ENOMEM)
        hint = " (RLIMIT_MEMLOCK is too low: LimitMEMLOCK=infinity)";
    else if (error == -EINVAL || error == -EOPNOTSUPP)
        hint = " (the kernel or the file system refuses it)";
    (void)snprintf(because, DISK_TEXT_BYTES, "%s: %s%s", step, strerror(-error), hint);
    return error;
}

static int open_ring(struct uring *uring)
{
    const unsigned entries = uring->disk->depth + SPARE_ENTRIES;
    // 6.1: one thread submits, and completions are worked off when it asks for them instead of by interrupting it.
    int error = io_uring_queue_init(entries, &uring->ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (error == -EINVAL)
        error = io_uring_queue_init(entries, &uring->ring, 0);
    if (error)
        return explain(uring->because, "io_uring_setup", error);
    const int files[] = {[DATA_INDEX] = uring->disk->file.fd, [PROBE_INDEX] = uring->probe->fd};
    uring->fixed = io_uring_register_files(&uring->ring, files, 2) == 0;
    return 0;
}

static struct io_uring_sqe *next_entry(struct uring *uring)
{
    struct io_uring_sqe *entry = io_uring_get_sqe(&uring->ring);
    assert(entry); // there is one for each transfer, and the spare ones
    return entry;
}

static int64_t probe_step(struct uring *uring, bool is_write, uint8_t *memory)
{
    const int fd = uring->fixed ? PROBE_INDEX : uring->probe->fd;
    struct io_uring_sqe *entry = next_entry(uring);
    if (is_write)
        io_uring_prep_write(entry, fd, memory, DISK_ALIGN, 0);
    else
        io_uring_prep_read(entry, fd, memory, DISK_ALIGN, 0);
    io_uring_sqe_set_data64(entry, PROBE);
    if (uring->fixed)
        io_uring_sqe_set_flags(entry, IOSQE_FIXED_FILE);
    struct io_uring_cqe *answer;
    int error = io_uring_submit(&uring->ring);
    if (error < 0)
        return error;
    do
        error = io_uring_wait_cqe(&uring->ring, &answer);
    while (error == -EINTR);
    if (error < 0)
        return error;
    int result = answer->res;
    io_uring_cqe_seen(&uring->ring, answer);
    struct env *env = uring->disk->env;
    return env->ring_result ? env->ring_result(env, is_write, 0, DISK_ALIGN, result) : result;
}

static int probe_by_ring(struct uring *uring)
{
    struct env *env = uring->disk->env;
    const size_t bytes = 3 * DISK_ALIGN; // two blocks, and what aligns them
    uint8_t *memory = env_acquire_zeroed(env, bytes);
    if (!memory)
        return explain(uring->because, "memory", -ENOMEM);
    uint8_t *written = memory + (DISK_ALIGN - (uintptr_t)memory % DISK_ALIGN) % DISK_ALIGN,
            *read = written + DISK_ALIGN;
    disk_pattern(written, env_now_ns(env));
    const char *step = "a write by io_uring";
    int64_t moved = probe_step(uring, true, written);
    if (moved == DISK_ALIGN) {
        step = "a read by io_uring";
        moved = probe_step(uring, false, read);
    }
    int error = moved < 0 ? (int)moved : moved != DISK_ALIGN || memcmp(read, written, DISK_ALIGN) != 0 ? -EIO : 0;
    if (error)
        (void)explain(uring->because, step, error);
    if (uring->fixed) {
        const int none = -1;
        (void)io_uring_register_files_update(&uring->ring, PROBE_INDEX, &none, 1); // one more descriptor for its time
    }
    env->release(env, memory, bytes);
    return error;
}

// ---- requests ----

static void prepare(struct uring *uring, uint32_t index)
{
    const struct disk_transfer *transfer = &uring->transfers[index];
    const struct disk_request *request = transfer->request;
    const int fd = uring->fixed ? DATA_INDEX : uring->disk->file.fd;
    uint8_t *memory = (uint8_t *)request->memory + transfer->bytes;
    const uint64_t offset = request->offset + transfer->bytes;
    const uint32_t bytes = request->bytes - transfer->bytes;
    struct io_uring_sqe *entry = next_entry(uring);
    if (request->op == DISK_READ)
        io_uring_prep_read(entry, fd, memory, bytes, offset);
    else if (request->op == DISK_WRITE)
        io_uring_prep_write(entry, fd, memory, bytes, offset);
    else
        io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data64(entry, index);
    if (uring->fixed)
        io_uring_sqe_set_flags(entry, IOSQE_FIXED_FILE);
}

static void arm(struct uring *uring)
{
    if (uring->is_armed)
        return;
    struct io_uring_sqe *entry = next_entry(uring);
    io_uring_prep_read(entry, uring->wake_fd, &uring->wakes, sizeof uring->wakes, 0);
    io_uring_sqe_set_data64(entry, WAKE);
    uring->is_armed = true;
}

// With the lock: prepares what may go. Answers what cannot, because the disk is off.
static struct disk_request *take(struct uring *uring, uint64_t *wait_ns)
{
    struct disk *disk = uring->disk;
    struct disk_request *refused = NULL, **last = &refused, *request;
    const uint64_t now_ns = disk->waiting > 0 ? env_now_ns(disk->env) : 0;
    *wait_ns = DISK_NEVER_NS;
    while (uring->free_count > 0 && (request = disk_take(disk, now_ns, wait_ns))) {
        if (disk_is_off(disk)) {
            request->result = -EIO;
            *last = request;
            last = &request->next;
            continue;
        }
        const uint32_t index = uring->free[--uring->free_count];
        uring->transfers[index] = (struct disk_transfer){.request = request};
        prepare(uring, index);
    }
    return refused;
}

// Takes in one completion; a request that is complete is put at the chain's end.
static void complete(struct uring *uring, uint32_t index, int moved, struct disk_request ***last)
{
    struct disk_transfer *transfer = &uring->transfers[index];
    struct disk_request *request = transfer->request;
    struct env *env = uring->disk->env;
    if (env->ring_result)
        moved = env->ring_result(env, request->op == DISK_WRITE, request->offset + transfer->bytes,
                                 request->op == DISK_SYNC ? 0 : request->bytes - transfer->bytes, moved);
    if (disk_transfer_go_on(uring->disk, transfer, moved)) {
        prepare(uring, index);
        return;
    }
    uring->free[uring->free_count++] = index;
    **last = request;
    *last = &request->next;
}

static struct disk_request *reap(struct uring *uring)
{
    struct disk_request *answered = NULL, **last = &answered;
    struct io_uring_cqe *answer;
    unsigned head, count = 0;
    io_uring_for_each_cqe(&uring->ring, head, answer)
    {
        count++;
        if (answer->user_data == WAKE)
            uring->is_armed = false;
        else if (answer->user_data < DISK_DEPTH_MAX)
            complete(uring, (uint32_t)answer->user_data, answer->res, &last);
        if (count == REAP_MAX)
            break;
    }
    io_uring_cq_advance(&uring->ring, count);
    return answered;
}

static void submit_and_wait(struct uring *uring, uint64_t wait_ns)
{
    int error;
    if (wait_ns == DISK_NEVER_NS) {
        error = io_uring_submit_and_wait(&uring->ring, 1);
    } else {
        struct io_uring_cqe *answer;
        struct __kernel_timespec wait = {.tv_sec = (long long)(wait_ns / SECOND_NS),
                                         .tv_nsec = (long long)(wait_ns % SECOND_NS)};
        error = io_uring_submit_and_wait_timeout(&uring->ring, &answer, 1, &wait, NULL);
    }
    // Short of memory, or a filter that came later: what is prepared stays so and is tried again, without a spin.
    if (error < 0 && error != -ETIME && error != -EINTR)
        (void)usleep(1000);
}

static void serve(struct uring *uring)
{
    struct disk *disk = uring->disk;
    for (;;) {
        uint64_t wait_ns;
        pthread_mutex_lock(&disk->lock);
        uring->is_sleeping = false;
        struct disk_request *refused = disk->abandoned ? NULL : take(uring, &wait_ns);
        const bool is_idle = uring->free_count == disk->depth;
        const bool is_over = is_idle && (disk->abandoned || (disk->stopping && disk->waiting == 0 && !refused));
        uring->is_sleeping = !refused && !is_over && uring->free_count > 0;
        if (disk->abandoned)
            wait_ns = DISK_NEVER_NS;
        pthread_mutex_unlock(&disk->lock);
        if (refused) {
            disk_answer(disk, refused);
            continue;
        }
        if (is_over)
            return;
        arm(uring);
        submit_and_wait(uring, wait_ns);
        struct disk_request *answered = reap(uring);
        if (answered)
            disk_answer(disk, answered);
    }
}

// ---- the thread ----

static void *run(void *argument)
{
    struct uring *uring = argument;
    struct disk *disk = uring->disk;
    int error = open_ring(uring);
    const bool is_open = error == 0;
    if (!error)
        error = probe_by_ring(uring);
    pthread_mutex_lock(&disk->lock);
    uring->is_started = true;
    uring->error = error;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
    if (!error)
        serve(uring);
    if (is_open)
        io_uring_queue_exit(&uring->ring);
    disk_thread_end(disk);
    return NULL;
}

static void uring_fini(struct disk *disk)
{
    struct uring *uring = disk->engine;
    close(uring->wake_fd);
    disk->env->release(disk->env, uring, sizeof *uring);
}

static int uring_start(struct disk *disk, const struct env_file *probe, char because[DISK_TEXT_BYTES])
{
    struct uring *uring = env_acquire_zeroed(disk->env, sizeof *uring);
    if (!uring)
        return explain(because, "memory", -ENOMEM);
    uring->disk = disk;
    uring->probe = probe;
    uring->because = because;
    for (uint32_t i = 0; i < disk->depth; i++)
        uring->free[uring->free_count++] = disk->depth - 1 - i;
    disk->engine = uring;
    uring->wake_fd = eventfd(0, EFD_CLOEXEC);
    int error = uring->wake_fd < 0 ? explain(because, "eventfd", -errno) : 0;
    if (error) {
        disk->env->release(disk->env, uring, sizeof *uring);
        return error;
    }
    error = disk_thread_start(disk, run, uring);
    if (error) {
        (void)explain(because, "a thread", error);
    } else {
        pthread_mutex_lock(&disk->lock);
        while (!uring->is_started)
            pthread_cond_wait(&disk->changed, &disk->lock);
        error = uring->error;
        pthread_mutex_unlock(&disk->lock);
    }
    if (error) {
        disk_threads_join(disk);
        uring_fini(disk);
    }
    return error;
}

static void uring_wake(struct disk *disk, uint32_t count)
{
    struct uring *uring = disk->engine;
    const uint64_t one = 1;
    if (count > 0 && !uring->is_sleeping)
        return;
    uring->is_sleeping = false;
    ssize_t written = write(uring->wake_fd, &one, sizeof one);
    assert(written == (ssize_t)sizeof one); // the counter is read long before it is full
    (void)written;
}

const struct disk_engine_ops disk_uring = {
    .name = "io_uring", .start = uring_start, .wake = uring_wake, .fini = uring_fini};
