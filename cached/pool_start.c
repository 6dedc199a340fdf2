// Taking the pool's memory at start, which may last minutes: progress and a stop meanwhile, and what is said to the
// operator. Main thread, while no other thread of ours is there.
#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define SAY_NS (2ull * 1000000000u) // between two lines about progress

struct progress {
    struct server *server;
    uint64_t from_ns, said_ns, bytes;
};

// Nobody reads the signals yet, so one that has come is still there to be taken.
static bool stop_is_wanted(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    return sigtimedwait(&signals, NULL, &(struct timespec){0}) > 0;
}

static bool go_on(void *owner, uint64_t done_bytes)
{
    struct progress *progress = owner;
    if (stop_is_wanted()) {
        progress->server->stopped_early = true;
        return false;
    }
    uint64_t now = env_now_ns(progress->server->env);
    if (now - progress->said_ns >= SAY_NS) {
        log_info("populating the pool: %llu of %llu MiB, %.2f GB/s", (unsigned long long)(done_bytes >> 20),
                 (unsigned long long)(progress->bytes >> 20), (double)done_bytes / (double)(now - progress->from_ns));
        progress->said_ns = now;
    }
    return true;
}

static void say_what_was_got(const struct pool_regions *regions, uint64_t taken_ns)
{
    const uint64_t bytes = regions->slab_count * POOL_SLAB_BYTES, huge = pool_regions_huge_bytes(regions);
    const char *reasons = regions->region[0].reasons;
    log_info("pool: %llu MiB, %llu of them in huge pages (%s), populated in %.1f s (%.2f GB/s)",
             (unsigned long long)(bytes >> 20), (unsigned long long)(huge >> 20),
             pool_huge_name(pool_regions_kind(regions)), (double)taken_ns / 1e9, (double)bytes / (double)taken_ns);
    if (reasons[0])
        log_info("pool: no better pages: %s", reasons);
    if (huge < bytes)
        log_warn("%llu MiB of the pool are in pages of 4 KiB: reserve huge pages with sysctl vm.nr_hugepages=%llu, or "
                 "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
                 (unsigned long long)((bytes - huge) >> 20), (unsigned long long)(bytes >> 21));
}

bool server_take_pool(struct server *server)
{
    struct env *env = server->env;
    const uint64_t bytes = server->config->pool_bytes, from_ns = env_now_ns(env);
    struct progress progress = {server, from_ns, from_ns, bytes};
    const struct env_watch watch = {go_on, &progress};
    const struct pool_wish wish = {.capacity_bytes = bytes, .rungs = ENV_RUNGS_ALL, .watch = &watch};
    struct pool_regions regions;
    log_info("populating the pool: %llu MiB", (unsigned long long)(bytes >> 20));
    int error = pool_regions_map(env, &wish, &regions);
    if (!error) {
        say_what_was_got(&regions, env_now_ns(env) - from_ns);
        error = pool_create(env, &regions, &server->pool);
        if (error)
            pool_regions_unmap(env, &regions);
    }
    if (error == -ECANCELED)
        log_info("stopped while the pool was populated");
    else if (error)
        log_error("cannot take --pool-bytes %llu: %s; free memory or ask for less", (unsigned long long)bytes,
                  strerror(-error));
    return error == 0;
}
