// GPUs of the daemon. The finder is the only thread that asks for the driver and its devices; a GPU's opener is the
// only one that makes and unmakes mappings of workers' memory there. None of them, and no copier, is ever waited for by
// the reactor, the shards or the keeper. A driver that hangs costs what waits in its thread: for an opener the landings
// on its GPU that are to be opened or closed, with their sessions; for the finder the GPUs that are not in use yet.
#include "cached/gpus.h"

#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

// ---- opener ----

static struct copier *copier_of(const struct gpu *gpu)
{
    return atomic_load_explicit(&gpu->copier, memory_order_acquire);
}

ice_status gpu_check(const struct gpu *gpu, char *text)
{
    struct copier *copier = copier_of(gpu);
    struct copier_usage usage = {0};
    if (copier)
        copier_usage(copier, &usage);
    if (usage.broken) {
        snprintf(text, CUDA_TEXT_BYTES, "the daemon has given the GPU up: %.200s", usage.broken_text);
        return ICE_NOT_SUPPORTED;
    }
    const uint64_t busy_ns = atomic_load_explicit(&gpu->busy_ns, memory_order_relaxed);
    const uint64_t now_ns = env_now_ns(gpu->server->env);
    if (busy_ns != 0 && now_ns > busy_ns && now_ns - busy_ns >= GPUS_OPEN_DEADLINE_NS) {
        snprintf(text, CUDA_TEXT_BYTES, "the CUDA driver does not return from the GPU's last opening or closing");
        return ICE_NOT_SUPPORTED;
    }
    return ICE_OK;
}

static void read_vram(struct gpu *gpu)
{
    uint64_t bytes;
    const enum nvml_source source = nvml_watch_read(&gpu->watch, &bytes);
    const uint64_t now_ns = env_now_ns(gpu->server->env);
    pthread_mutex_lock(&gpu->lock);
    gpu->vram_ns = now_ns;
    gpu->vram_bytes = bytes;
    gpu->vram_source = source;
    snprintf(gpu->vram_text, sizeof gpu->vram_text, "%s", gpu->watch.text);
    pthread_mutex_unlock(&gpu->lock);
}

static void run_vram(struct task *task, void *thread)
{
    (void)task;
    struct gpu *gpu = thread;
    read_vram(gpu);
    atomic_store_explicit(&gpu->vram_asked, false, memory_order_release); // the task may be queued again
}

void gpu_vram(struct gpu *gpu, struct gpu_vram *out)
{
    pthread_mutex_lock(&gpu->lock);
    const uint64_t seen_ns = gpu->vram_ns;
    *out = (struct gpu_vram){.bytes = gpu->vram_bytes, .source = gpu->vram_source};
    const char *text = seen_ns == 0                       ? "not looked at yet"
                       : gpu->vram_source == NVML_PROCESS ? "NVML"
                       : gpu->vram_source == NVML_GROWTH  ? "what the GPU had more in use once the context was made"
                                                          : gpu->vram_text;
    snprintf(out->text, sizeof out->text, "%s", text);
    pthread_mutex_unlock(&gpu->lock);
    if (seen_ns == 0 || env_now_ns(gpu->server->env) - seen_ns < GPUS_VRAM_NS ||
        atomic_exchange_explicit(&gpu->vram_asked, true, memory_order_acquire))
        return;
    gpu->vram_task.run = run_vram;
    task_queue_push(&gpu->queue, TASK_ADMIN, &gpu->vram_task);
}

// With a look at the GPU's memory in use before and after.
static ice_status open_device(struct gpu *gpu, char *text)
{
    char uuid[CUDA_TEXT_BYTES];
    cuda_uuid_format(gpu->uuid, uuid);
    nvml_watch_open(&gpu->watch, gpu->server->config->nvml_library, uuid);
    const ice_status status = gpu_device_open(&gpu->server->gpus.driver, gpu->id, NULL, &gpu->device, text);
    if (status != ICE_OK) {
        nvml_watch_close(&gpu->watch);
        return status;
    }
    nvml_watch_context(&gpu->watch);
    read_vram(gpu);
    return ICE_OK;
}

static void close_device(struct gpu *gpu)
{
    gpu_device_close(&gpu->device);
    nvml_watch_close(&gpu->watch);
}

ice_status gpu_ready(struct gpu *gpu, char *text)
{
    text[0] = '\0';
    if (copier_of(gpu))
        return gpu_check(gpu, text);
    struct server *server = gpu->server;
    ice_status status = open_device(gpu, text);
    if (status != ICE_OK)
        return status;
    struct copier *copier;
    const int error = copier_start(server, &gpu->device, gpu->number, &copier);
    if (error) {
        snprintf(text, CUDA_TEXT_BYTES, "cannot start a copier: %s", strerror(-error));
        close_device(gpu);
        return error == -ENOMEM ? ICE_NO_MEMORY : ICE_SYSTEM;
    }
    atomic_store_explicit(&gpu->copier, copier, memory_order_release);
    char uuid[CUDA_TEXT_BYTES];
    cuda_uuid_format(gpu->uuid, uuid);
    log_info("copying to GPU %s (%s)", gpu->device.name, uuid);
    return ICE_OK;
}

static void run_busy(struct gpu *gpu, struct task *task)
{
    atomic_store_explicit(&gpu->busy_ns, env_now_ns(gpu->server->env), memory_order_relaxed);
    task->run(task, gpu);
    atomic_store_explicit(&gpu->busy_ns, 0, memory_order_relaxed);
}

static void *opener_main(void *argument)
{
    struct gpu *gpu = argument;
    for (bool stopped = false; !stopped;) {
        struct task *task = task_queue_pop(&gpu->queue, 1000000000u, &stopped);
        if (task)
            run_busy(gpu, task);
    }
    struct copier *copier = copier_of(gpu);
    if (copier) {
        copier_stop(copier);
        close_device(gpu);
    }
    return NULL;
}

// ---- finder ----

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

static void gpu_free(struct server *server, struct gpu *gpu)
{
    pthread_mutex_destroy(&gpu->lock);
    task_queue_fini(&gpu->queue);
    server->env->release(server->env, gpu, sizeof *gpu);
}

static ice_status gpu_start(struct server *server, const uint8_t *uuid, cuda_device id, struct gpu **out, char *text)
{
    struct gpus *gpus = &server->gpus;
    const uint32_t number = atomic_load_explicit(&gpus->count, memory_order_relaxed);
    if (number == GPUS_MAX) {
        snprintf(text, CUDA_TEXT_BYTES, "the daemon copies to %u GPUs already, as many as it can", GPUS_MAX);
        return ICE_LIMIT;
    }
    struct gpu *gpu = env_acquire_zeroed(server->env, sizeof *gpu);
    if (!gpu)
        return ICE_NO_MEMORY;
    gpu->server = server;
    gpu->number = number;
    gpu->id = id;
    memcpy(gpu->uuid, uuid, sizeof gpu->uuid);
    task_queue_init(&gpu->queue);
    pthread_mutex_init(&gpu->lock, NULL);
    const int error = pthread_create(&gpu->opener, NULL, opener_main, gpu);
    if (error) {
        snprintf(text, CUDA_TEXT_BYTES, "cannot start an opener: %s", strerror(error));
        gpu_free(server, gpu);
        return ICE_SYSTEM;
    }
    char name[16];
    snprintf(name, sizeof name, "opener-%u", number);
    pthread_setname_np(gpu->opener, name);
    gpus->list[number] = gpu;
    atomic_store_explicit(&gpus->count, number + 1, memory_order_release);
    *out = gpu;
    return ICE_OK;
}

struct gpu *gpus_known(struct gpus *gpus, const uint8_t *uuid)
{
    const uint32_t count = atomic_load_explicit(&gpus->count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++)
        if (memcmp(gpus->list[i]->uuid, uuid, CUDA_UUID_BYTES) == 0)
            return gpus->list[i];
    return NULL;
}

ice_status gpus_find(struct server *server, const uint8_t *uuid, struct gpu **out, char *text)
{
    text[0] = '\0';
    *out = gpus_known(&server->gpus, uuid);
    if (*out)
        return ICE_OK;
    cuda_device id;
    ice_status status = seek_driver(server, text);
    if (status == ICE_OK)
        status = cuda_device_find(&server->gpus.driver, uuid, &id, text);
    return status == ICE_OK ? gpu_start(server, uuid, id, out, text) : status;
}

static void *finder_main(void *argument)
{
    struct server *server = argument;
    for (bool stopped = false; !stopped;) {
        struct task *task = task_queue_pop(&server->gpus.queue, 1000000000u, &stopped);
        if (task)
            task->run(task, server);
    }
    return NULL;
}

// ---- reactor ----

void gpus_look(struct gpus *gpus, uint64_t now_ns)
{
    const uint32_t count = atomic_load_explicit(&gpus->count, memory_order_acquire);
    if (count == 0 || now_ns - gpus->looked_ns < GPUS_LOOK_NS)
        return;
    gpus->looked_ns = now_ns;
    for (uint32_t i = 0; i < count; i++) {
        struct copier *copier = copier_of(gpus->list[i]);
        if (copier)
            copier_look(copier, now_ns);
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
    int error = pthread_create(&gpus->finder, NULL, finder_main, server);
    gpus->finder_runs = error == 0;
    if (gpus->finder_runs)
        pthread_setname_np(gpus->finder, "gpu-finder");
    return -error;
}

static bool join(pthread_t thread, const char *what)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += GPUS_STOP_DEADLINE_S;
    if (pthread_timedjoin_np(thread, NULL, &until) == 0)
        return true;
    log_error("the CUDA driver keeps %s waiting", what);
    return false;
}

bool gpus_stop(struct gpus *gpus, struct server *server)
{
    task_queue_stop(&gpus->queue);
    if (gpus->finder_runs && !join(gpus->finder, "the search for GPUs"))
        return false;
    gpus->finder_runs = false;
    for (uint32_t count; (count = atomic_load_explicit(&gpus->count, memory_order_relaxed)) > 0;) {
        struct gpu *gpu = gpus->list[count - 1];
        task_queue_stop(&gpu->queue);
        if (!join(gpu->opener, "a GPU's opener or copier"))
            return false;
        gpu_free(server, gpu);
        atomic_store_explicit(&gpus->count, count - 1, memory_order_relaxed);
    }
    return true;
}
