// Taking the pool's memory at start, which may last minutes: progress and a stop meanwhile, and what is said to the
// operator. Main thread, while no other thread of ours is there.
#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
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

// ---- what the operator is told ----

#define NODES_LISTED 16u
#define TEXT_BYTES   640u

// How many pages of 2 MiB are free on each node: "node0 0, node1 512".
static void list_free(struct env *env, char *text, size_t capacity)
{
    size_t used = 0;
    text[0] = '\0';
    for (unsigned node = 0; node < NODES_LISTED && used < capacity; node++) {
        char path[128];
        snprintf(path, sizeof path, "/sys/devices/system/node/node%u/hugepages/hugepages-2048kB/free_hugepages", node);
        const uint64_t pages = env_system_number(env, path, UINT64_MAX);
        if (pages != UINT64_MAX)
            used += (size_t)snprintf(text + used, capacity - used, "%snode%u %llu", used ? ", " : "", node,
                                     (unsigned long long)pages);
    }
}

// What makes the kernel set aside as many pages as the pool needs beyond those that are free.
static void tell_how_to_reserve(struct env *env, uint64_t bytes, char *text, size_t capacity)
{
    const char *folder = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    const uint64_t needed = bytes / POOL_SLAB_BYTES;
    char path[128];
    snprintf(path, sizeof path, "%s/free_hugepages", folder);
    uint64_t free_pages = env_system_number(env, path, 0);
    free_pages = free_pages < needed ? free_pages : needed;
    const unsigned long long wanted = env_system_number(env, "/proc/sys/vm/nr_hugepages", 0) + needed - free_pages;
    snprintf(text, capacity,
             "sysctl vm.nr_hugepages=%llu (per node: /sys/devices/system/node/nodeX/hugepages/hugepages-2048kB/"
             "nr_hugepages), best at boot: hugepagesz=2M hugepages=%llu",
             wanted, wanted);
}

static void say_where(const struct env_region *region)
{
    const unsigned long long mib = region->bytes >> 20, there = region->node_bytes >> 20;
    log_info("pool: node%d: %llu MiB, %llu of them on it, huge pages: %s (%llu/%llu MiB)", region->node, mib, there,
             pool_huge_name(region->kind), (unsigned long long)(region->huge_bytes >> 20), mib);
    if (region->node_bytes < region->bytes)
        log_warn("%llu MiB of node%d's part of the pool lie on other nodes, which is slower: %s", mib - there,
                 region->node, region->reasons[0] ? region->reasons : "the node has no more memory");
}

static void say_what_was_got(struct server *server, const struct pool_regions *regions, uint64_t taken_ns)
{
    const uint64_t bytes = regions->slab_count * POOL_SLAB_BYTES, huge = pool_regions_huge_bytes(regions);
    const enum env_huge kind = pool_regions_kind(regions);
    const char *reasons = regions->region[regions->worst].reasons;
    char how[TEXT_BYTES];
    tell_how_to_reserve(server->env, bytes, how, sizeof how);
    log_info("pool: %llu MiB, huge pages: %s (%llu/%llu MiB), populated in %.1f s (%.2f GB/s)",
             (unsigned long long)(bytes >> 20), pool_huge_name(kind), (unsigned long long)(huge >> 20),
             (unsigned long long)(bytes >> 20), (double)taken_ns / 1e9, (double)bytes / (double)taken_ns);
    for (uint32_t i = 0; regions->count > 1 && i < regions->count; i++)
        say_where(&regions->region[i]);
    if (server->config->huge_pages == CONFIG_HUGE_OFF)
        return;
    if (huge < bytes)
        log_warn("%llu MiB of the pool are in pages of 4 KiB: %s. For huge ones: %s; or echo madvise > "
                 "/sys/kernel/mm/transparent_hugepage/enabled",
                 (unsigned long long)((bytes - huge) >> 20), reasons, how);
    else if (!(ENV_RUNG(kind) & ENV_RUNGS_RESERVED))
        log_info("%s: using %s huge pages. To reserve: %s", reasons, pool_huge_name(kind), how);
}

static void say_why_not(struct server *server, const struct pool_regions *regions, uint64_t bytes, int error)
{
    char how[TEXT_BYTES], free_pages[256];
    tell_how_to_reserve(server->env, bytes, how, sizeof how);
    list_free(server->env, free_pages, sizeof free_pages);
    if (error == -ECANCELED)
        log_info("stopped while the pool was populated");
    else if (server->config->huge_pages == CONFIG_HUGE_REQUIRE)
        log_error(
            "--huge-pages require: no reserved huge pages for --pool-bytes %llu: %s; needed: %llu pages of 2 MiB; "
            "free: %s; reserve them: %s; or start with --huge-pages prefer",
            (unsigned long long)bytes, regions->region[regions->worst].reasons,
            (unsigned long long)(bytes / POOL_SLAB_BYTES), free_pages[0] ? free_pages : "no node says", how);
    else
        log_error("cannot take --pool-bytes %llu: %s; free memory or ask for less", (unsigned long long)bytes,
                  strerror(-error));
}

// ---- the pool ----

static uint32_t rungs_wanted(const struct config *config)
{
    switch (config->huge_pages) {
    case CONFIG_HUGE_REQUIRE:
        return ENV_RUNGS_RESERVED;
    case CONFIG_HUGE_OFF:
        return ENV_RUNG(ENV_HUGE_NONE);
    default:
        return ENV_RUNGS_ALL;
    }
}

bool server_take_pool(struct server *server)
{
    struct env *env = server->env;
    const uint64_t bytes = server->config->pool_bytes, from_ns = env_now_ns(env);
    struct progress progress = {server, from_ns, from_ns, bytes};
    const struct env_watch watch = {go_on, &progress};
    const struct pool_wish wish = {.capacity_bytes = bytes, .rungs = rungs_wanted(server->config), .watch = &watch};
    struct pool_regions regions;
    log_info("populating the pool: %llu MiB", (unsigned long long)(bytes >> 20));
    int error = pool_regions_map(env, &wish, &regions);
    if (error) {
        say_why_not(server, &regions, bytes, error);
        return false;
    }
    say_what_was_got(server, &regions, env_now_ns(env) - from_ns);
    error = pool_create(env, &regions, &server->pool);
    if (error) {
        log_error("no memory for the pool's books: %s", strerror(-error));
        pool_regions_unmap(env, &regions);
    }
    return error == 0;
}
