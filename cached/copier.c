// A copier is the only thread that issues retrieves' copies on its GPU and asks for their ends. (An opener times some,
// in a stream of its own, before a landing is handed out.)
//
// Invariants: a copier's copies are in one stream, so they end in the order in which they were issued; an op is
// completed once, after its copies have ended or when the GPU has been given up. The lock is never held across a call
// of the driver, so whoever looks from outside is not kept waiting. What a call that has not returned may still use,
// the op inside it and so its landing, stays until it returns.
#include "cached/copier.h"

#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

struct copier {
    struct server *server;
    const struct gpu_device *device; // borrowed
    struct task_queue queue;
    pthread_t thread;
    _Atomic uint64_t copies, bytes;

    // The copier's thread writes; under the lock where somebody else reads.
    uint32_t first, next; // of flying: the oldest copies, and where the next go

    pthread_mutex_t lock; // guards what follows
    bool broken;          // the GPU answers with errors, or not at all; set once
    char broken_text[CUDA_TEXT_BYTES];
    uint64_t call_ns;                  // when the driver was called that has not returned; 0: it has
    struct op *flying[GPU_FENCES_MAX]; // in order of issue; the fence is the place
    uint32_t count;
};

// ---- the ends of ops ----

static void fail_op(struct op *op, ice_status status, const char *text)
{
    uint32_t none = ICE_OK;
    if (atomic_compare_exchange_strong_explicit(&op->failure, &none, status, memory_order_acq_rel,
                                                memory_order_relaxed))
        snprintf(op->copy_text, sizeof op->copy_text, "copying to the GPU: %.200s", text);
}

static void complete(struct copier *copier, struct op *op)
{
    if (op->pushed_ns > 0)
        op->push_ns = env_now_ns(copier->server->env) - op->pushed_ns;
    op_signal(op);
    completion_post(&copier->server->completions, &op->completion);
}

// The GPU was given up before the op's copies could be issued, or while they were.
static void refuse(struct copier *copier, struct op *op)
{
    struct copier_usage usage;
    copier_usage(copier, &usage);
    fail_op(op, ICE_SYSTEM, usage.broken_text);
    complete(copier, op);
}

// Gives the GPU up. Everything in flight fails: nobody knows where the copies are.
static void break_off(struct copier *copier, const char *text)
{
    pthread_mutex_lock(&copier->lock);
    const bool first = !copier->broken;
    copier->broken = true;
    if (first)
        snprintf(copier->broken_text, sizeof copier->broken_text, "%s", text);
    for (uint32_t i = 0; i < copier->count; i++) {
        struct op *op = copier->flying[(copier->first + i) % GPU_FENCES_MAX];
        fail_op(op, ICE_SYSTEM, copier->broken_text);
        complete(copier, op);
    }
    copier->count = 0;
    pthread_mutex_unlock(&copier->lock);
    if (first)
        log_error("GPU %s is given up until the daemon starts again: %s", copier->device->name, text);
}

// ---- copies ----

static uint32_t flying_count(struct copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    const uint32_t count = copier->count;
    pthread_mutex_unlock(&copier->lock);
    return count;
}

// Before the driver is called. False: not any more.
static bool call_begins(struct copier *copier)
{
    const uint64_t now_ns = env_now_ns(copier->server->env);
    pthread_mutex_lock(&copier->lock);
    const bool goes = !copier->broken;
    copier->call_ns = goes ? now_ns : 0;
    pthread_mutex_unlock(&copier->lock);
    return goes;
}

// The driver has returned from issuing the op's copies. False: the GPU was given up meanwhile, and the op is the
// caller's.
static bool takes_off(struct copier *copier, struct op *op)
{
    pthread_mutex_lock(&copier->lock);
    copier->call_ns = 0;
    const bool goes = !copier->broken;
    if (goes) {
        copier->flying[copier->next] = op;
        copier->next = (copier->next + 1) % GPU_FENCES_MAX;
        copier->count++;
    }
    pthread_mutex_unlock(&copier->lock);
    return goes;
}

static void issue(struct task *task, void *thread)
{
    struct copier *copier = thread;
    struct op *op = (struct op *)((char *)task - offsetof(struct op, copy_task));
    struct landing *landing = op->landing;
    char text[CUDA_TEXT_BYTES];
    op->pushed_ns = env_now_ns(copier->server->env);
    if (!call_begins(copier)) {
        refuse(copier, op);
        return;
    }
    ice_status status = landing->ops->copy(landing->memory, op->rows, op->sequence_count, op->layer, text);
    if (status != ICE_OK)
        fail_op(op, status, text);
    else if (text[0])
        log_warn("GPU %s: %s", copier->device->name, text);
    // Also behind copies of which some could not be issued: the others still read the staging.
    status = gpu_fence_set(copier->device, copier->next, text);
    if (!takes_off(copier, op))
        refuse(copier, op);
    else if (status != ICE_OK)
        break_off(copier, text);
}

static void count_copies(struct copier *copier, const struct op *op)
{
    const uint64_t bytes = op->sequence_count * gpu_landing_layout(op->landing->memory)->block_bytes;
    atomic_fetch_add_explicit(&copier->copies, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&copier->bytes, bytes, memory_order_relaxed);
}

// Looks at the oldest copies. False: they are still under way.
static bool finish_first(struct copier *copier)
{
    char text[CUDA_TEXT_BYTES];
    bool done = false;
    if (!call_begins(copier))
        return true;
    ice_status status = gpu_fence_poll(copier->device, copier->first, &done, text);
    const uint64_t now_ns = env_now_ns(copier->server->env);
    pthread_mutex_lock(&copier->lock);
    copier->call_ns = 0;
    struct op *op = copier->count > 0 ? copier->flying[copier->first] : NULL;
    const uint64_t waited_ns = op ? now_ns - op->pushed_ns : 0;
    if (op && done) {
        copier->first = (copier->first + 1) % GPU_FENCES_MAX;
        copier->count--;
    }
    pthread_mutex_unlock(&copier->lock);
    if (!op)
        return true; // given up while the driver was asked
    if (status == ICE_OK && !done) {
        if (waited_ns < COPIER_DEADLINE_NS)
            return false;
        status = ICE_SYSTEM;
        snprintf(text, sizeof text, "a copy has not ended within %llu s", COPIER_DEADLINE_NS / 1000000000u);
    }
    if (status != ICE_OK) {
        break_off(copier, text);
        return true;
    }
    count_copies(copier, op);
    complete(copier, op);
    return true;
}

static void pause_a_little(struct copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    const uint64_t pushed_ns = copier->count > 0 ? copier->flying[copier->first]->pushed_ns : 0;
    pthread_mutex_unlock(&copier->lock);
    if (env_now_ns(copier->server->env) - pushed_ns < COPIER_SPIN_NS)
        return;
    const struct timespec pause = {0, COPIER_PAUSE_NS};
    nanosleep(&pause, NULL);
}

// Issues one retrieve's copies, or waits for one, then completes what has ended: also under load, where there is always
// something to issue. False: it is over.
static bool one_round(struct copier *copier)
{
    bool stopped = false;
    struct task *task = NULL;
    const uint32_t flying = flying_count(copier);
    if (flying < GPU_FENCES_MAX)
        task = task_queue_pop(&copier->queue, flying > 0 ? 0 : 1000000000u, &stopped);
    if (task)
        task->run(task, copier);
    while (flying_count(copier) > 0) {
        if (finish_first(copier))
            continue;
        if (!task)
            pause_a_little(copier);
        return true;
    }
    return task || !stopped;
}

static void *copier_main(void *argument)
{
    struct copier *copier = argument;
    char text[CUDA_TEXT_BYTES];
    (void)call_begins(copier); // nobody has given it up yet
    bool entered = gpu_device_enter(copier->device, text) == ICE_OK;
    pthread_mutex_lock(&copier->lock);
    copier->call_ns = 0;
    pthread_mutex_unlock(&copier->lock);
    if (!entered)
        break_off(copier, text);
    while (one_round(copier)) {
    }
    if (entered)
        gpu_device_leave(copier->device);
    return NULL;
}

// ---- from outside ----

void copier_usage(struct copier *copier, struct copier_usage *out)
{
    *out = (struct copier_usage){
        .copies = atomic_load_explicit(&copier->copies, memory_order_relaxed),
        .bytes = atomic_load_explicit(&copier->bytes, memory_order_relaxed),
    };
    pthread_mutex_lock(&copier->lock);
    out->broken = copier->broken;
    if (copier->broken)
        snprintf(out->broken_text, sizeof out->broken_text, "%s", copier->broken_text);
    pthread_mutex_unlock(&copier->lock);
}

static bool is_broken(struct copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    const bool broken = copier->broken;
    pthread_mutex_unlock(&copier->lock);
    return broken;
}

void copier_push(struct copier *copier, struct op *op)
{
    if (is_broken(copier)) { // its thread may be stuck
        refuse(copier, op);
        return;
    }
    op->copy_task.run = issue;
    op->copy_task.flow = op->session->slot;
    task_queue_push(&copier->queue, TASK_DECODE, &op->copy_task);
}

void copier_look(struct copier *copier, uint64_t now_ns)
{
    pthread_mutex_lock(&copier->lock);
    const uint64_t call_ns = copier->call_ns;
    pthread_mutex_unlock(&copier->lock);
    if (call_ns != 0 && now_ns > call_ns && now_ns - call_ns >= COPIER_DEADLINE_NS) {
        char text[CUDA_TEXT_BYTES];
        snprintf(text, sizeof text, "a call of the CUDA driver has not returned within %llu s",
                 COPIER_DEADLINE_NS / 1000000000u);
        break_off(copier, text);
    }
    if (!is_broken(copier))
        return;
    bool stopped;
    for (struct task *task; (task = task_queue_pop(&copier->queue, 0, &stopped)) != NULL;)
        refuse(copier, (struct op *)((char *)task - offsetof(struct op, copy_task)));
}

int copier_start(struct server *server, const struct gpu_device *device, uint32_t number, struct copier **out)
{
    struct copier *copier = env_acquire_zeroed(server->env, sizeof *copier);
    if (!copier)
        return -ENOMEM;
    copier->server = server;
    copier->device = device;
    task_queue_init(&copier->queue);
    pthread_mutex_init(&copier->lock, NULL);
    const int error = pthread_create(&copier->thread, NULL, copier_main, copier);
    if (error) {
        pthread_mutex_destroy(&copier->lock);
        task_queue_fini(&copier->queue);
        server->env->release(server->env, copier, sizeof *copier);
        return -error;
    }
    char name[16];
    snprintf(name, sizeof name, "copier-%u", number % 1000u);
    pthread_setname_np(copier->thread, name);
    *out = copier;
    return 0;
}

void copier_stop(struct copier *copier)
{
    struct env *env = copier->server->env;
    task_queue_stop(&copier->queue);
    pthread_join(copier->thread, NULL);
    pthread_mutex_destroy(&copier->lock);
    task_queue_fini(&copier->queue);
    env->release(env, copier, sizeof *copier);
}
