// Memory shared with workers: landings and staging. The reactor owns them; the keeper thread makes and unmakes them,
// because populating and unmapping take long, and touches nothing but its job meanwhile. What a CUDA driver is needed
// for is the finder's and the GPU's opener's: a driver may hang.
//
// Invariant: memory is unmapped only when no request uses it, and a closing needs no memory of its own (close_job).
#include "cached/log.h"
#include "cached/server.h"
#include "gpu/export.h"
#include "proto/timeline.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

// Work for the keeper, or the finder and a GPU's opener: makes or unmakes shared memory, then reports to the reactor.
struct job {
    struct task task;
    struct completion completion;
    struct server *server;
    struct session *session; // held
    struct landing *landing; // being opened or closed; NULL: staging
    uint64_t request_id;
    uint64_t bytes;             // of shared memory, already counted
    uint8_t *base;              // staging
    int fd;                     // for the worker
    struct gpu_landing *opened; // handed to the landing on the reactor, like the next
    struct gpu *gpu;
    struct gpu_export *memory; // on the worker's GPU, of a landing being opened there; owned
    ice_status status;
    char text[CUDA_TEXT_BYTES]; // why, where the status does not say it
};

// ---- keeper jobs ----

static struct job *job_create(struct server *server, struct session *session, void (*run)(struct task *, void *),
                              void (*done)(struct completion *, struct server *))
{
    struct job *job = env_acquire_zeroed(server->env, sizeof *job);
    if (!job)
        return NULL;
    job->task.run = run;
    job->task.flow = session->slot;
    job->completion.done = done;
    job->server = server;
    job->session = session;
    job->fd = -1;
    session_hold(session);
    return job;
}

static struct job *job_of(struct completion *completion)
{
    return (struct job *)((char *)completion - offsetof(struct job, completion));
}

static void job_free(struct server *server, struct job *job)
{
    struct session *session = job->session;
    server->env->close_fd(server->env, job->fd); // the worker has its own by now
    if (job->memory) {
        session->descriptors -= job->memory->piece_count;
        gpu_export_close(job->memory);
        server->env->release(server->env, job->memory, sizeof *job->memory);
    }
    server->env->release(server->env, job, sizeof *job);
    session_release(server, session);
}

static void landing_free(struct server *server, struct landing *landing)
{
    budget_give(&server->shared_budget, landing->held_bytes);
    server->env->release(server->env, landing->rows, landing->shape.rows * sizeof *landing->rows);
    server->env->release(server->env, landing, sizeof *landing);
}

// ---- landings ----

static void run_landing_open(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    const struct landing *landing = job->landing;
    job->status =
        landing->ops->open(&job->server->gpu_system, &landing->shape, NULL, &job->opened, &job->fd, job->text);
    completion_post(&job->server->completions, &job->completion);
}

static enum gpu_copy_way copy_way_of(const struct config *config)
{
    switch (config->gpu_copy) {
    case CONFIG_GPU_COPY_LOOP:
        return GPU_COPY_LOOP;
    case CONFIG_GPU_COPY_BATCH:
        return GPU_COPY_BATCH;
    default:
        return GPU_COPY_AUTO;
    }
}

static void run_landing_open_gpu(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    const struct landing *landing = job->landing;
    job->status = gpu_ready(job->gpu, job->text);
    if (job->status == ICE_OK) {
        const struct gpu_source source = {&job->gpu->device, job->memory, copy_way_of(job->server->config)};
        job->status =
            landing->ops->open(&job->server->gpu_system, &landing->shape, &source, &job->opened, &job->fd, job->text);
        if (job->status == ICE_OK && job->text[0])
            log_warn("GPU %s: %s", job->gpu->device.name, job->text);
    }
    completion_post(&job->server->completions, &job->completion);
}

// Finder: which GPU it is. The rest is its opener's.
static void run_landing_find_gpu(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    job->status = gpus_find(job->server, job->memory->uuid, &job->gpu, job->text);
    if (job->status == ICE_OK) {
        job->task.run = run_landing_open_gpu;
        task_queue_push(&job->gpu->queue, TASK_BULK, &job->task);
        return;
    }
    completion_post(&job->server->completions, &job->completion);
}

static void landing_unlink(struct landing *landing)
{
    struct landing **link = &landing->session->landings;
    while (*link != landing)
        link = &(*link)->next;
    *link = landing->next;
    landing->session->landing_count--;
}

static void run_landing_close(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    job->landing->ops->close(job->landing->memory);
    completion_post(&job->server->completions, &job->completion);
}

static void landing_closed(struct completion *completion, struct server *server)
{
    struct job *job = job_of(completion);
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    bool asked = job->landing->close_asked;
    reply.request_id = job->landing->close_request_id;
    if (job->landing->gpu)
        job->landing->gpu->landings--;
    landing_free(server, job->landing);
    if (asked)
        control_reply(server, job->session, &reply, -1);
    job_free(server, job);
}

// Unmaps a landing that nobody uses any more. The job's memory was taken when the landing was made.
static void landing_unmap(struct server *server, struct landing *landing)
{
    landing_unlink(landing);
    struct job *job = landing->close_job;
    session_hold(landing->session);
    *job = (struct job){
        .task = {.run = run_landing_close, .flow = landing->session->slot},
        .completion = {.done = landing_closed},
        .server = server,
        .session = landing->session,
        .landing = landing,
        .fd = -1,
    };
    task_queue_push(landing->gpu ? &landing->gpu->queue : &server->keeper_queue, TASK_ADMIN, &job->task);
}

void landing_close(struct server *server, struct landing *landing)
{
    if (landing->closing)
        return;
    landing->closing = true;
    if (landing->users == 0)
        landing_unmap(server, landing);
}

void landing_release(struct server *server, struct landing *landing)
{
    landing->used_ns = env_now_ns(server->env);
    if (--landing->users == 0 && landing->closing)
        landing_unmap(server, landing);
}

struct landing *landing_find(struct session *session, uint32_t id)
{
    struct landing *landing = session->landings;
    while (landing && (landing->id != id || landing->closing))
        landing = landing->next;
    return landing && landing->memory ? landing : NULL;
}

static void log_refusal(const struct session *session, const char *text)
{
    log_info("landing on a GPU refused session=%llu pid=%d: %s", (unsigned long long)session->id, (int)session->pid,
             text);
}

static void landing_opened(struct completion *completion, struct server *server)
{
    struct job *job = job_of(completion);
    struct landing *landing = job->landing;
    struct session *session = job->session;
    if (job->status != ICE_OK) {
        // Gone before the reply: a reply that cannot be sent ends the session, which closes all landings it finds.
        landing_unlink(landing);
        server->env->release(server->env, landing->close_job, sizeof(struct job));
        landing_free(server, landing);
        if (job->memory && !session->dead)
            log_refusal(session, job->text[0] ? job->text : status_text((int)job->status));
        control_error(server, session, job->request_id, job->status, job->text);
        job_free(server, job);
        return;
    }
    landing->memory = job->opened;
    landing->gpu = job->gpu;
    if (landing->gpu)
        landing->gpu->landings++;
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    Icecache__Wire__LandingReply body = ICECACHE__WIRE__LANDING_REPLY__INIT;
    reply.request_id = job->request_id;
    reply.body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_LANDING;
    reply.landing = &body;
    body.landing_id = landing->id;
    body.bytes = landing->passed_bytes;
    body.copy_way = (char *)gpu_landing_copy_way(landing->memory);
    control_reply(server, session, &reply, job->fd);
    landing_release(server, landing); // the job's; unmaps it where the session has ended meanwhile
    job_free(server, job);
}

static ice_status landing_allocate(struct server *server, struct session *session, const struct landing_shape *shape,
                                   uint64_t bytes, struct landing **out)
{
    struct env *env = server->env;
    if (session->landing_count >= server->config->landings_max)
        return ICE_LIMIT;
    const uint64_t held_bytes = bytes + gpu_landing_own_bytes(shape);
    if (!budget_take(&server->shared_budget, NULL, held_bytes))
        return ICE_SHARED_FULL;
    struct landing *landing = env_acquire_zeroed(env, sizeof *landing);
    struct landing_row *rows = env_acquire_zeroed(env, shape->rows * sizeof *rows);
    struct job *close_job = env_acquire_zeroed(env, sizeof *close_job);
    if (!landing || !rows || !close_job) {
        env->release(env, close_job, sizeof *close_job);
        env->release(env, rows, shape->rows * sizeof *rows);
        env->release(env, landing, sizeof *landing);
        budget_give(&server->shared_budget, held_bytes);
        return ICE_NO_MEMORY;
    }
    *landing = (struct landing){
        .id = ++session->next_landing_id,
        .session = session,
        .opened_ns = env_now_ns(env),
        .used_ns = env_now_ns(env),
        .shape = *shape,
        .held_bytes = held_bytes,
        .rows = rows,
        .users = 1, // the opening job
        .close_job = close_job,
        .next = session->landings,
    };
    session->landings = landing;
    session->landing_count++;
    *out = landing;
    return ICE_OK;
}

// Copies the worker's description of its GPU memory, descriptors included. NULL: refused, and answered.
static struct gpu_export *take_gpu_memory(struct server *server, struct session *session, uint64_t request_id,
                                          const Icecache__Wire__GpuMemory *message,
                                          struct control_descriptors *descriptors)
{
    if (!server->config->gpu_push) {
        control_error(server, session, request_id, ICE_NOT_SUPPORTED, "the daemon was started with --gpu-push 0");
        return NULL;
    }
    if (descriptors->count != message->n_piece_bytes) {
        control_error(server, session, request_id, ICE_SYSTEM,
                      "not all descriptors of the GPU memory have arrived; raise the daemon's limit of open files");
        return NULL;
    }
    // The opener may be kept waiting, and the table of open files is everybody's.
    if (session->descriptors + descriptors->count > WIRE_DESCRIPTORS_MAX) {
        char text[128];
        snprintf(text, sizeof text, "%u descriptors of GPU memory are on their way, more than %u of a session may be",
                 session->descriptors + descriptors->count, WIRE_DESCRIPTORS_MAX);
        control_error(server, session, request_id, ICE_LIMIT, text);
        return NULL;
    }
    struct gpu_export *memory = env_acquire_zeroed(server->env, sizeof *memory);
    if (!memory) {
        control_error(server, session, request_id, ICE_NO_MEMORY, NULL);
        return NULL;
    }
    memcpy(memory->uuid, message->uuid.data, sizeof memory->uuid);
    memcpy(memory->probe, message->probe.data, sizeof memory->probe);
    memory->offset = message->offset;
    memory->whole = message->handle.len > 0;
    if (memory->whole)
        memcpy(memory->handle, message->handle.data, sizeof memory->handle);
    for (uint32_t i = 0; i < descriptors->count; i++) {
        memory->piece_bytes[i] = message->piece_bytes[i];
        memory->fds[i] = descriptors->fds[i];
    }
    memory->piece_count = descriptors->count;
    session->descriptors += descriptors->count;
    descriptors->count = 0;
    return memory;
}

static const struct gpu_landing_ops *ops_of(enum landing_place place)
{
    return place == LANDING_HOST ? &gpu_host_ops : place == LANDING_PULL ? &gpu_pull_ops : &gpu_push_ops;
}

// With a job that knows the landing's GPU memory where it has some. Frees the job on failure.
static void landing_start(struct server *server, struct job *job, const struct landing_shape *shape,
                          enum landing_place place)
{
    struct session *session = job->session;
    struct landing_layout held;
    struct landing *landing = NULL;
    ice_status status = ICE_TOO_LARGE;
    if (landing_held_init(&held, shape, place))
        status = landing_allocate(server, session, shape, held.total_bytes + timeline_bytes(shape, place), &landing);
    if (status != ICE_OK) {
        control_error(server, session, job->request_id, status,
                      status == ICE_LIMIT ? "the session has as many landings as --landings-max allows" : NULL);
        job_free(server, job);
        return;
    }
    landing->ops = ops_of(place);
    landing->passed_bytes = timeline_passed_bytes(&held, shape, place);
    job->landing = landing;
    server->gpus.used = server->gpus.used || place == LANDING_PUSH;
    struct task_queue *queue = job->gpu                ? &job->gpu->queue
                               : place == LANDING_PUSH ? &server->gpus.queue
                                                       : &server->keeper_queue;
    task_queue_push(queue, TASK_BULK, &job->task);
}

void landing_open(struct server *server, struct session *session, uint64_t request_id,
                  const Icecache__Wire__LandingOpen *message, struct control_descriptors *descriptors)
{
    const struct landing_shape shape = {message->rows,  message->layers,   message->kv_heads,
                                        message->slots, message->head_dim, message->dtype};
    enum landing_place place = (enum landing_place)message->place;
    struct gpu_export *memory = NULL;
    if (place == LANDING_PUSH) {
        memory = take_gpu_memory(server, session, request_id, message->gpu, descriptors);
        if (!memory)
            return;
    }
    struct gpu *gpu = memory ? gpus_known(&server->gpus, memory->uuid) : NULL;
    struct job *job = job_create(server, session,
                                 gpu      ? run_landing_open_gpu
                                 : memory ? run_landing_find_gpu
                                          : run_landing_open,
                                 landing_opened);
    if (!job) {
        if (memory) {
            session->descriptors -= memory->piece_count;
            gpu_export_close(memory);
            server->env->release(server->env, memory, sizeof *memory);
        }
        control_error(server, session, request_id, ICE_NO_MEMORY, NULL);
        return;
    }
    job->memory = memory;
    job->gpu = gpu;
    job->request_id = request_id;
    char text[CUDA_TEXT_BYTES];
    const ice_status status = gpu ? gpu_check(gpu, text) : ICE_OK;
    if (status != ICE_OK) { // at once: its opener may not answer
        log_refusal(session, text);
        control_error(server, session, request_id, status, text);
        job_free(server, job);
        return;
    }
    landing_start(server, job, &shape, place);
}

// ---- staging ----

static void run_staging_open(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    struct env *env = job->server->env;
    void *base = NULL;
    int error = env->memfd_create(env, "icecache-staging", job->bytes, &job->fd);
    if (error == 0)
        error = env->map_shared(env, job->fd, job->bytes, &base);
    job->base = base;
    job->status = error == 0 ? ICE_OK : error == -ENOMEM || error == -ENOSPC ? ICE_SHARED_FULL : ICE_SYSTEM;
    completion_post(&job->server->completions, &job->completion);
}

static void run_staging_close(struct task *task, void *thread)
{
    (void)thread;
    struct job *job = (struct job *)task;
    job->server->env->unmap_shared(job->server->env, job->base, job->bytes);
    completion_post(&job->server->completions, &job->completion);
}

static void staging_closed(struct completion *completion, struct server *server)
{
    struct job *job = job_of(completion);
    budget_give(&server->shared_budget, job->bytes);
    job_free(server, job);
}

void staging_close(struct server *server, struct session *session)
{
    struct staging *staging = &session->staging;
    struct job *job = staging->close_job;
    if (!staging->base || staging->users > 0)
        return;
    session_hold(session);
    *job = (struct job){
        .task = {.run = run_staging_close},
        .completion = {.done = staging_closed},
        .server = server,
        .session = session,
        .base = staging->base,
        .bytes = staging->bytes,
        .fd = -1,
    };
    *staging = (struct staging){0};
    task_queue_push(&server->keeper_queue, TASK_ADMIN, &job->task);
}

void staging_release(struct server *server, struct session *session)
{
    session->staging.users--;
    session->staging.used_ns = env_now_ns(server->env);
    if (session->dead)
        staging_close(server, session);
}

static void staging_opened(struct completion *completion, struct server *server)
{
    struct job *job = job_of(completion);
    struct session *session = job->session;
    struct staging *staging = &session->staging;
    session->staging_pending = false;
    if (job->status != ICE_OK) {
        control_error(server, session, job->request_id, job->status, NULL);
        server->env->release(server->env, staging->close_job, sizeof(struct job));
        staging->close_job = NULL;
        budget_give(&server->shared_budget, job->bytes);
        job_free(server, job);
        return;
    }
    staging->base = job->base;
    staging->bytes = job->bytes;
    staging->opened_ns = staging->used_ns = env_now_ns(server->env);
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    Icecache__Wire__StagingReply body = ICECACHE__WIRE__STAGING_REPLY__INIT;
    reply.request_id = job->request_id;
    reply.body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_STAGING;
    reply.staging = &body;
    body.bytes = staging->bytes;
    control_reply(server, session, &reply, job->fd);
    if (session->dead)
        staging_close(server, session);
    job_free(server, job);
}

void staging_open(struct server *server, struct session *session, uint64_t request_id, uint64_t bytes)
{
    if (session->staging.base || session->staging_pending) {
        control_error(server, session, request_id, ICE_LIMIT, "the session has its staging area already");
        return;
    }
    if (bytes == 0 || bytes > server->config->staging_bytes_max) {
        control_error(server, session, request_id, ICE_TOO_LARGE,
                      "the staging area must have 1 to --staging-bytes-max bytes");
        return;
    }
    if (!budget_take(&server->shared_budget, NULL, bytes)) {
        control_error(server, session, request_id, ICE_SHARED_FULL, NULL);
        return;
    }
    struct job *job = job_create(server, session, run_staging_open, staging_opened);
    session->staging.close_job = env_acquire_zeroed(server->env, sizeof(struct job));
    if (!job || !session->staging.close_job) {
        server->env->release(server->env, session->staging.close_job, sizeof(struct job));
        session->staging.close_job = NULL;
        budget_give(&server->shared_budget, bytes);
        if (job)
            job_free(server, job);
        control_error(server, session, request_id, ICE_NO_MEMORY, NULL);
        return;
    }
    session->staging_pending = true;
    job->request_id = request_id;
    job->bytes = bytes;
    task_queue_push(&server->keeper_queue, TASK_BULK, &job->task);
}
