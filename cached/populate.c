// Populating memory in parallel: a range is cut into steps, threads take the next one each and have the kernel make its
// pages by one madvise call. Never by touching: a page that cannot be had would be a SIGBUS there, and is an error
// here.
//
// The calling thread does the first step alone and times it; from then on it only watches: progress, the caller's wish
// to stop, and huge pages that come far too slowly. Steps are short, because a stop is heeded between two of them.
#include "cached/env_linux.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1; glibc 2.36 does not have it
#endif

#define STEP_BYTES     ((uint64_t)64 << 20)
#define THREADS_MAX    8u // more do not help: the kernel's zeroing is bound by memory bandwidth
#define WATCH_NS       (100ull * 1000000u)
#define SLOW_WINDOW_NS (4ull * 1000000000u)
// On a fragmented host the kernel compacts memory in the page fault: 60 s a GiB and more, where cold memory of a
// virtual machine, the slowest that is healthy, takes 5. Beyond 16 s a GiB small pages are better than hours of
// start-up.
#define SLOW_NS_PER_GIB (16ull * 1000000000u)

struct work {
    const struct populate *what;
    uint64_t step_bytes;
    _Atomic uint64_t next, done; // bytes
    _Atomic int error;           // the first; nobody takes a step after it
    _Atomic bool slow;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    uint32_t running; // threads; guarded by lock
};

static uint64_t slow_ns(uint64_t bytes)
{
    return (bytes >> 20) * SLOW_NS_PER_GIB >> 10;
}

static int advise(const struct work *work, uint8_t *base, uint64_t bytes)
{
    const struct populate *what = work->what;
    bool slow = atomic_load(&work->slow);
    if (what->mode == POPULATE_COLLAPSE) {
        if (!slow)
            madvise(base, bytes, MADV_COLLAPSE); // what it could not do stays as it is
        return 0;
    }
    if (slow)
        madvise(base, bytes, MADV_NOHUGEPAGE);
    int rc;
    do
        rc = madvise(base, bytes, MADV_POPULATE_WRITE);
    while (rc != 0 && errno == EINTR);
    return rc ? -errno : 0;
}

// False when there is nothing more to take.
static bool one_step(struct work *work)
{
    const struct populate *what = work->what;
    if (atomic_load(&work->error))
        return false;
    uint64_t from = atomic_fetch_add(&work->next, work->step_bytes);
    if (from >= what->bytes)
        return false;
    uint64_t bytes = what->bytes - from < work->step_bytes ? what->bytes - from : work->step_bytes;
    int error = advise(work, what->base + from, bytes), none = 0;
    if (error)
        atomic_compare_exchange_strong(&work->error, &none, error);
    else
        atomic_fetch_add(&work->done, bytes);
    return !error;
}

static void *thread_main(void *argument)
{
    struct work *work = argument;
    numa_bind_thread(work->what->node);
    while (one_step(work))
        ;
    pthread_mutex_lock(&work->lock);
    work->running--;
    pthread_cond_signal(&work->ended);
    pthread_mutex_unlock(&work->lock);
    return NULL;
}

static void ask_watch(struct work *work)
{
    const struct env_watch *watch = work->what->watch;
    int none = 0;
    if (watch && !atomic_load(&work->error) && !watch->go_on(watch->owner, atomic_load(&work->done)))
        atomic_compare_exchange_strong(&work->error, &none, -ECANCELED);
}

// Looks at the rate of the last window: the first pages may come fast until no free huge ones are left.
static void judge_rate(struct work *work, uint64_t *window_ns, uint64_t *window_done)
{
    uint64_t now = env_now_ns(work->what->env), done = atomic_load(&work->done);
    if (work->what->mode == POPULATE_PLAIN || now - *window_ns < SLOW_WINDOW_NS)
        return;
    if (now - *window_ns > slow_ns(done - *window_done) && atomic_load(&work->next) < work->what->bytes)
        atomic_store(&work->slow, true);
    *window_ns = now;
    *window_done = done;
}

static void watch_threads(struct work *work)
{
    uint64_t window_ns = env_now_ns(work->what->env), window_done = atomic_load(&work->done);
    pthread_mutex_lock(&work->lock);
    while (work->running > 0) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)WATCH_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&work->ended, &work->lock, &until);
        pthread_mutex_unlock(&work->lock);
        ask_watch(work);
        judge_rate(work, &window_ns, &window_done);
        pthread_mutex_lock(&work->lock);
    }
    pthread_mutex_unlock(&work->lock);
}

static uint32_t cores_allowed(int node)
{
    const uint32_t of_node = numa_cores(node);
    cpu_set_t set;
    if (of_node > 0)
        return of_node;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return (uint32_t)CPU_COUNT(&set);
    return online > 0 ? (uint32_t)online : 1;
}

static void run_threads(struct work *work)
{
    pthread_t threads[THREADS_MAX];
    uint64_t steps = (work->what->bytes - atomic_load(&work->next) + work->step_bytes - 1) / work->step_bytes;
    uint32_t wanted = cores_allowed(work->what->node), count = 0;
    wanted = wanted < THREADS_MAX ? wanted : THREADS_MAX;
    wanted = wanted < steps ? wanted : (uint32_t)steps;
    work->running = wanted;
    while (count < wanted && pthread_create(&threads[count], NULL, thread_main, work) == 0)
        count++;
    pthread_mutex_lock(&work->lock);
    work->running -= wanted - count;
    pthread_mutex_unlock(&work->lock);
    if (count > 0)
        watch_threads(work);
    while (count > 0)
        pthread_join(threads[--count], NULL);
    while (one_step(work)) // where there was no thread to be had
        ask_watch(work);
}

int populate_run(const struct populate *what, bool *slow_out)
{
    struct work work = {.what = what};
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&work.ended, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&work.lock, NULL);
    work.step_bytes = what->page_bytes > STEP_BYTES ? what->page_bytes : STEP_BYTES;
    ask_watch(&work);
    uint64_t from = env_now_ns(what->env);
    bool ok = one_step(&work);
    if (what->mode != POPULATE_PLAIN && env_now_ns(what->env) - from > slow_ns(atomic_load(&work.done)))
        atomic_store(&work.slow, true);
    ask_watch(&work);
    if (ok && atomic_load(&work.next) < what->bytes)
        run_threads(&work);
    pthread_mutex_destroy(&work.lock);
    pthread_cond_destroy(&work.ended);
    *slow_out = atomic_load(&work.slow);
    return atomic_load(&work.error);
}
