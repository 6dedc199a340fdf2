// GPUs of the daemon. A copier is the only thread that issues copies on its GPU and asks for their ends; the opener is
// the only one that makes and unmakes mappings of workers' memory. Neither is ever waited for by the reactor, the
// shards or the keeper: a driver that hangs costs what waits in its thread (for the opener that is every landing in GPU
// memory that is to be opened or closed, with its session), not host landings.
//
// Invariants: copies of a GPU are in one stream, so they end in the order in which they were issued; an op is completed
// after its copies have ended, or when the copier has given its GPU up.
#include "cached/gpus.h"

#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

struct copier {
    struct server *server;
    struct task_queue queue;
    pthread_t thread;
    struct gpu_device device;

    // Written by the copier's thread, once; read by the opener's too.
    _Atomic bool broken;               // the GPU answers with errors, or not at all
    char broken_text[CUDA_TEXT_BYTES]; // before the flag

    // The copier's thread only.
    struct op *flying[GPU_FENCES_MAX]; // in order of issue; the fence is the place
    uint32_t first, count;
};

// ---- one copier ----

static void fail_op(struct op *op, ice_status status, const char *text)
{
    uint32_t none = ICE_OK;
    if (atomic_compare_exchange_strong_explicit(&op->failure, &none, status, memory_order_acq_rel,
                                                memory_order_relaxed))
        snprintf(op->copy_text, sizeof op->copy_text, "copying to the GPU: %.200s", text);
}

static bool is_broken(const struct copier *copier)
{
    return atomic_load_explicit(&copier->broken, memory_order_acquire);
}

static void break_off(struct copier *copier, const char *text)
{
    log_error("GPU %s is given up until the daemon starts again: %s", copier->device.name, text);
    snprintf(copier->broken_text, sizeof copier->broken_text, "%s", text);
    atomic_store_explicit(&copier->broken, true, memory_order_release);
}

static void complete(struct copier *copier, struct op *op)
{
    op->push_ns = env_now_ns(copier->server->env) - op->pushed_ns;
    op_signal(op);
    completion_post(&copier->server->completions, &op->completion);
}

// Completes everything in flight as failed: nobody knows where the copies are.
static void abandon(struct copier *copier)
{
    for (; copier->count > 0; copier->count--) {
        struct op *op = copier->flying[copier->first];
        copier->first = (copier->first + 1) % GPU_FENCES_MAX;
        fail_op(op, ICE_SYSTEM, copier->broken_text);
        complete(copier, op);
    }
}

static void issue(struct task *task, void *thread)
{
    struct copier *copier = thread;
    struct op *op = (struct op *)((char *)task - offsetof(struct op, copy_task));
    struct landing *landing = op->landing;
    char text[CUDA_TEXT_BYTES];
    op->pushed_ns = env_now_ns(copier->server->env);
    if (is_broken(copier)) {
        fail_op(op, ICE_SYSTEM, copier->broken_text);
        complete(copier, op);
        return;
    }
    ice_status status = landing->ops->copy(landing->memory, op->rows, op->sequence_count, op->layer, text);
    if (status != ICE_OK)
        fail_op(op, status, text);
    // Also behind copies of which some could not be issued: the others still read the staging.
    uint32_t fence = (copier->first + copier->count) % GPU_FENCES_MAX;
    copier->flying[fence] = op;
    copier->count++;
    if (gpu_fence_set(&copier->device, fence, text) != ICE_OK) {
        break_off(copier, text);
        abandon(copier);
    }
}

// Looks at the oldest copies. False: they are still under way.
static bool finish_first(struct copier *copier)
{
    struct op *op = copier->flying[copier->first];
    char text[CUDA_TEXT_BYTES];
    bool done = false;
    ice_status status = gpu_fence_poll(&copier->device, copier->first, &done, text);
    if (status == ICE_OK && !done) {
        if (env_now_ns(copier->server->env) - op->pushed_ns < GPUS_COPY_DEADLINE_NS)
            return false;
        status = ICE_SYSTEM;
        snprintf(text, sizeof text, "a copy has not ended within %llu s", GPUS_COPY_DEADLINE_NS / 1000000000u);
    }
    if (status != ICE_OK) {
        break_off(copier, text);
        abandon(copier);
        return true;
    }
    copier->first = (copier->first + 1) % GPU_FENCES_MAX;
    copier->count--;
    complete(copier, op);
    return true;
}

static void pause_a_little(const struct copier *copier)
{
    const struct op *op = copier->flying[copier->first];
    if (env_now_ns(copier->server->env) - op->pushed_ns < GPUS_SPIN_NS)
        return;
    const struct timespec pause = {0, GPUS_PAUSE_NS};
    nanosleep(&pause, NULL);
}

static void *copier_main(void *argument)
{
    struct copier *copier = argument;
    char text[CUDA_TEXT_BYTES];
    bool entered = gpu_device_enter(&copier->device, text) == ICE_OK;
    if (!entered)
        break_off(copier, text);
    for (;;) {
        bool stopped = false;
        struct task *task = NULL;
        if (copier->count < GPU_FENCES_MAX)
            task = task_queue_pop(&copier->queue, copier->count > 0 ? 0 : 1000000000u, &stopped);
        if (task)
            task->run(task, copier);
        else if (copier->count > 0 && !finish_first(copier))
            pause_a_little(copier);
        else if (stopped && copier->count == 0)
            break;
    }
    if (entered)
        gpu_device_leave(&copier->device);
    return NULL;
}

struct gpu_device *copier_device(struct copier *copier)
{
    return &copier->device;
}

void copier_push(struct copier *copier, struct op *op)
{
    op->copy_task.run = issue;
    task_queue_push(&copier->queue, TASK_DECODE, &op->copy_task);
}

// ---- opener ----

static ice_status seek_driver(struct server *server, char *text)
{
    struct gpus *gpus = &server->gpus;
    if (!gpus->driver_sought) {
        const char *library = server->config->cuda_library;
        gpus->driver_status = cuda_driver_open(library, &gpus->driver, gpus->driver_text);
        gpus->driver_sought = true;
        if (gpus->driver_status != ICE_OK)
            log_warn("%s", gpus->driver_text);
    }
    snprintf(text, CUDA_TEXT_BYTES, "%s", gpus->driver_text);
    return gpus->driver_status;
}

static ice_status copier_start(struct server *server, cuda_device id, struct copier **out, char *text)
{
    struct gpus *gpus = &server->gpus;
    if (gpus->copier_count == GPUS_MAX) {
        snprintf(text, CUDA_TEXT_BYTES, "the daemon copies to %u GPUs already, as many as it can", GPUS_MAX);
        return ICE_LIMIT;
    }
    struct copier *copier = env_acquire_zeroed(server->env, sizeof *copier);
    if (!copier)
        return ICE_NO_MEMORY;
    copier->server = server;
    ice_status status = gpu_device_open(&gpus->driver, id, NULL, &copier->device, text);
    if (status != ICE_OK) {
        server->env->release(server->env, copier, sizeof *copier);
        return status;
    }
    task_queue_init(&copier->queue);
    int error = pthread_create(&copier->thread, NULL, copier_main, copier);
    if (error) {
        snprintf(text, CUDA_TEXT_BYTES, "cannot start a copier: %s", strerror(error));
        gpu_device_close(&copier->device);
        task_queue_fini(&copier->queue);
        server->env->release(server->env, copier, sizeof *copier);
        return ICE_SYSTEM;
    }
    char name[16];
    snprintf(name, sizeof name, "copier-%u", gpus->copier_count % 1000u);
    pthread_setname_np(copier->thread, name);
    gpus->copiers[gpus->copier_count++] = copier;
    cuda_uuid_format(copier->device.uuid, text);
    log_info("copying to GPU %s (%s)", copier->device.name, text);
    *out = copier;
    return ICE_OK;
}

ice_status gpus_copier(struct server *server, const uint8_t *uuid, struct copier **out, char *text)
{
    struct gpus *gpus = &server->gpus;
    text[0] = '\0';
    for (uint32_t i = 0; i < gpus->copier_count; i++) {
        struct copier *copier = gpus->copiers[i];
        if (memcmp(copier->device.uuid, uuid, CUDA_UUID_BYTES) != 0)
            continue;
        if (is_broken(copier)) {
            snprintf(text, CUDA_TEXT_BYTES, "the daemon has given the GPU up: %.200s", copier->broken_text);
            return ICE_NOT_SUPPORTED;
        }
        *out = copier;
        return ICE_OK;
    }
    cuda_device id;
    ice_status status = seek_driver(server, text);
    if (status == ICE_OK)
        status = cuda_device_find(&gpus->driver, uuid, &id, text);
    return status == ICE_OK ? copier_start(server, id, out, text) : status;
}

static void *opener_main(void *argument)
{
    struct server *server = argument;
    for (;;) {
        bool stopped;
        struct task *task = task_queue_pop(&server->gpus.queue, 1000000000u, &stopped);
        if (task)
            task->run(task, server);
        else if (stopped)
            return NULL;
    }
}

// ---- start and stop ----

void gpus_init(struct gpus *gpus)
{
    *gpus = (struct gpus){0};
    task_queue_init(&gpus->queue);
}

void gpus_fini(struct gpus *gpus)
{
    task_queue_fini(&gpus->queue);
}

int gpus_start(struct gpus *gpus, struct server *server)
{
    int error = pthread_create(&gpus->opener, NULL, opener_main, server);
    gpus->opener_runs = error == 0;
    if (gpus->opener_runs)
        pthread_setname_np(gpus->opener, "gpu-opener");
    return -error;
}

static bool join(pthread_t thread, const char *what)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += GPUS_STOP_DEADLINE_S;
    if (pthread_timedjoin_np(thread, NULL, &until) == 0)
        return true;
    log_error("the CUDA driver keeps the %s waiting", what);
    return false;
}

bool gpus_stop(struct gpus *gpus, struct server *server)
{
    task_queue_stop(&gpus->queue);
    if (gpus->opener_runs && !join(gpus->opener, "opener"))
        return false;
    gpus->opener_runs = false;
    for (; gpus->copier_count > 0; gpus->copier_count--) {
        struct copier *copier = gpus->copiers[gpus->copier_count - 1];
        task_queue_stop(&copier->queue);
        if (!join(copier->thread, "copier"))
            return false;
        gpu_device_close(&copier->device);
        task_queue_fini(&copier->queue);
        server->env->release(server->env, copier, sizeof *copier);
    }
    return true;
}
