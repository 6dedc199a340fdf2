// The server's parts from start to end, apart from the reactor: main.c says in which order. Runs on the main thread
// while no other thread of ours is there; the keeper's loop runs on its own.
#include "cached/server.h"

#include "cached/log.h"
#include "proto/control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- the backend's system calls go through the table of outside effects ----

static int gpu_memfd(void *owner, const char *name, uint64_t bytes, int *fd_out)
{
    struct env *env = owner;
    return env->memfd_create(env, name, bytes, fd_out);
}

static int gpu_map(void *owner, int fd, uint64_t bytes, void **out)
{
    struct env *env = owner;
    return env->map_shared(env, fd, bytes, out);
}

static void gpu_unmap(void *owner, void *memory, uint64_t bytes)
{
    struct env *env = owner;
    env->unmap_shared(env, memory, bytes);
}

static void gpu_close_fd(void *owner, int fd)
{
    struct env *env = owner;
    env->close_fd(env, fd);
}

// ---- the whole ----

bool server_init(struct server *server, struct env *env, const struct config *config)
{
    *server = (struct server){
        .env = env, .config = config, .lock_fd = -1, .epoll_fd = -1, .listener_fd = -1, .signal_fd = -1};
    server->gpu_system = (struct gpu_system){gpu_memfd, gpu_map, gpu_unmap, gpu_close_fd, env};
    server->started_ns = env_now_ns(env);
    int error = env->random(env, &server->boot_token, sizeof server->boot_token);
    if (!error)
        error = completion_list_init(&server->completions);
    if (!error && !tenants_init(&server->tenants, env, config)) {
        completion_list_fini(&server->completions);
        error = -ENOMEM;
    }
    if (error) {
        tenants_fini(&server->tenants, env);
        log_error("cannot start: %s", strerror(-error));
        return false;
    }
    server->boot_token |= 1; // never 0: that means "not connected" to clients
    budget_init(&server->index_budget, config->index_bytes);
    budget_init(&server->shared_budget, config->shared_bytes);
    task_queue_init(&server->keeper_queue);
    gpus_init(&server->gpus);
    return true;
}

void server_fini(struct server *server)
{
    struct env *env = server->env;
    prefixes_fini(server);
    tenants_fini(&server->tenants, env);
    extents_destroy(server->extents);
    if (server->books)
        env->release(env, server->books, pool_capacity_bytes(server->pool) / EXTENT_UNIT * sizeof *server->books);
    pool_destroy(server->pool);
    completion_list_fini(&server->completions);
    task_queue_fini(&server->keeper_queue);
    gpus_fini(&server->gpus);
    budget_fini(&server->shared_budget);
    budget_fini(&server->index_budget);
    env->close_fd(env, server->lock_fd); // the lock goes last: then nothing of ours is left
}

// ---- what it needs ----

bool server_take_directory(struct server *server)
{
    struct env *env = server->env;
    const char *directory = server->config->socket_directory;
    if (control_path(server->control_path, sizeof server->control_path, directory, CONTROL_SOCKET_NAME) != ICE_OK ||
        control_path(server->data_path, sizeof server->data_path, directory, CONTROL_DATA_SOCKET_NAME) != ICE_OK ||
        control_path(server->lock_path, sizeof server->lock_path, directory, CONTROL_LOCK_NAME) != ICE_OK) {
        log_error("--socket-dir %s: the path is too long for a socket (107 bytes with the socket's name)", directory);
        return false;
    }
    pid_t holder = 0;
    int error = env->make_directory(env, directory);
    if (error)
        log_error("cannot use %s for the sockets: %s; choose another --socket-dir or mend it", directory,
                  error == -EPERM ? "it belongs to another user" : strerror(-error));
    else if ((error = env->lock_file(env, server->lock_path, &server->lock_fd, &holder)) == -EWOULDBLOCK)
        log_error("another icecached (pid %d) serves %s; stop it or choose another --socket-dir", (int)holder,
                  directory);
    else if (error)
        log_error("cannot lock %s: %s", server->lock_path, strerror(-error));
    return error == 0;
}

uint64_t server_frame_bytes(const struct server *server, uint64_t row_bytes)
{
    const uint64_t bytes = server->config->page_tokens * 2 * row_bytes;
    return server->disk ? (bytes + DISK_ALIGN - 1) / DISK_ALIGN * DISK_ALIGN : bytes;
}

static enum disk_engine engine_of(const struct config *config)
{
    switch (config->spill_engine) {
    case CONFIG_SPILL_URING:
        return DISK_ENGINE_URING;
    case CONFIG_SPILL_THREADS:
        return DISK_ENGINE_THREADS;
    default:
        return DISK_ENGINE_AUTO;
    }
}

// The spill tier: without it the daemon serves what fits the pool.
bool server_take_disk(struct server *server)
{
    const struct config *config = server->config;
    struct env *env = server->env;
    if (config->spill_directory[0] == '\0')
        return true;
    const struct disk_params params = {
        .directory = config->spill_directory,
        .bytes = config->spill_bytes / EXTENTS_SLAB_BYTES * EXTENTS_SLAB_BYTES,
        .engine = engine_of(config),
        .depth = (uint32_t)config->spill_depth,
        .read_bytes_per_s_max = config->spill_read_bytes_per_s,
        .write_bytes_per_s_max = config->spill_write_bytes_per_s,
    };
    char text[256] = "";
    int error = disk_open(env, &params, &server->disk, text, sizeof text);
    if (error) {
        log_error("--spill-dir %s: %s", config->spill_directory, text);
        return false;
    }
    error = extents_create(env, params.bytes, &server->extents);
    const uint64_t books = pool_capacity_bytes(server->pool) / EXTENT_UNIT;
    server->books = error ? NULL : env_acquire_zeroed(env, books * sizeof *server->books);
    if (error || !server->books) {
        log_error("no memory for the book of the spill file: ask for less --spill-bytes or --pool-bytes");
        return false;
    }
    struct disk_usage usage;
    disk_usage(server->disk, &usage);
    log_info("spill: %llu MiB in %s by %s%s%s%s%s", (unsigned long long)(params.bytes >> 20), config->spill_directory,
             usage.engine, usage.direct ? "" : ", through the page cache", usage.because[0] ? " (" : "", usage.because,
             usage.because[0] ? ")" : "");
    return true;
}

// ---- threads ----

// The keeper: work that takes long.
static void *keeper_main(void *argument)
{
    struct server *server = argument;
    for (;;) {
        bool stopped;
        struct task *task = task_queue_pop(&server->keeper_queue, 1000000000u, &stopped);
        if (task)
            task->run(task, server);
        else if (stopped)
            return NULL;
    }
}

static uint32_t default_shards(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores <= 2 ? 1 : cores > 9 ? 8 : (uint32_t)cores - 1;
}

bool server_start_threads(struct server *server)
{
    uint32_t wanted = server->config->shards ? (uint32_t)server->config->shards : default_shards();
    server->shards = env_acquire_zeroed(server->env, wanted * sizeof *server->shards);
    int error = server->shards ? pthread_create(&server->keeper, NULL, keeper_main, server) : ENOMEM;
    if (server->shards)
        server->shard_room = wanted;
    if (error) {
        log_error("cannot start threads: %s", strerror(error));
        return false;
    }
    server->keeper_runs = true;
    error = gpus_start(&server->gpus, server);
    if (error) {
        log_error("cannot start threads: %s", strerror(-error));
        return false;
    }
    while (server->shard_count < wanted && error == 0) {
        error = shard_start(server, &server->shards[server->shard_count], server->shard_count);
        server->shard_count += error == 0;
    }
    if (error)
        log_error("cannot start shard %u of %u: %s", server->shard_count, wanted, strerror(-error));
    return error == 0;
}

void server_abandon(const char *what)
{
    log_error("%s; leaving without freeing what the driver may still use", what);
    _exit(EXIT_FAILURE);
}

void server_stop_threads(struct server *server)
{
    if (!gpus_stop(&server->gpus, server))
        server_abandon("a thread does not end");
    for (uint32_t i = 0; i < server->shard_count; i++)
        shard_stop(&server->shards[i]);
    if (server->disk && disk_close(server->disk) != 0) // what is in flight ends on the shards' lists
        server_abandon("the disk does not answer");
    for (uint32_t i = 0; i < server->shard_count; i++)
        shard_fini(&server->shards[i]);
    server->disk = NULL;
    server->shard_count = 0;
    task_queue_stop(&server->keeper_queue);
    if (server->keeper_runs)
        pthread_join(server->keeper, NULL);
    server->keeper_runs = false;
    server->env->release(server->env, server->shards, server->shard_room * sizeof *server->shards);
    server->shards = NULL;
    server->shard_room = 0;
}
