// The pool's regions, see pool_regions.h. One for each NUMA node, so that looking them through costs less than a
// search.
#include "cached/pool_regions.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define WATCH_NS (20l * 1000000)

// Regions on their way, each with a thread, so that every node populates its own at the same time.
struct mappings;
struct mapping {
    struct mappings *all;
    struct env_region_request request;
    struct env_watch watch;
    struct env_region *region;
    _Atomic uint64_t done_bytes;
    int error; // the thread's until it ends
    pthread_t thread;
    bool threaded; // main thread
};
struct mappings {
    struct env *env;
    _Atomic uint32_t running;
    _Atomic bool stop;
    struct mapping mapping[POOL_REGIONS_MAX];
};

static bool mapping_goes_on(void *owner, uint64_t done_bytes)
{
    struct mapping *mapping = owner;
    atomic_store(&mapping->done_bytes, done_bytes);
    return !atomic_load(&mapping->all->stop);
}

static void *mapping_main(void *argument)
{
    struct mapping *mapping = argument;
    struct env *env = mapping->all->env;
    mapping->error = env->map_region(env, &mapping->request, mapping->region);
    if (mapping->error)
        atomic_store(&mapping->all->stop, true); // the others are of no use
    atomic_fetch_sub(&mapping->all->running, 1);
    return NULL;
}

// Asks a last time when all have ended. False where the answer was no.
static bool mappings_watch(struct mappings *all, const struct pool_regions *regions, const struct env_watch *watch)
{
    for (bool last = false; !last;) {
        uint64_t done = 0;
        last = atomic_load(&all->running) == 0;
        for (uint32_t i = 0; i < regions->count; i++)
            done += atomic_load(&all->mapping[i].done_bytes);
        if (watch && !watch->go_on(watch->owner, done)) {
            atomic_store(&all->stop, true);
            return false;
        }
        if (!last)
            nanosleep(&(struct timespec){.tv_nsec = WATCH_NS}, NULL);
    }
    return true;
}

// What went wrong first, not what was stopped because of it.
static int mappings_join(struct mappings *all, struct pool_regions *regions)
{
    int error = 0;
    for (uint32_t i = 0; i < regions->count; i++) {
        struct mapping *mapping = &all->mapping[i];
        if (mapping->threaded)
            pthread_join(mapping->thread, NULL);
        if (mapping->error && (!error || error == -ECANCELED)) {
            error = mapping->error;
            regions->worst = i;
        }
    }
    return error;
}

static int map_side_by_side(struct env *env, const struct pool_wish *wish, const int *nodes, struct pool_regions *out)
{
    struct mappings all = {.env = env, .running = out->count};
    for (uint32_t i = 0; i < out->count; i++) {
        struct mapping *mapping = &all.mapping[i];
        mapping->all = &all;
        mapping->region = &out->region[i];
        mapping->watch = (struct env_watch){mapping_goes_on, mapping};
        mapping->request = (struct env_region_request){
            .bytes = (out->slabs_before[i + 1] - out->slabs_before[i]) * POOL_SLAB_BYTES,
            .rungs = wish->rungs,
            .node = nodes[i],
            .watch = &mapping->watch,
        };
        mapping->threaded = pthread_create(&mapping->thread, NULL, mapping_main, mapping) == 0;
        if (!mapping->threaded)
            mapping_main(mapping);
    }
    const bool wanted = mappings_watch(&all, out, wish->watch);
    const int error = mappings_join(&all, out);
    return !error && !wanted ? -ECANCELED : error;
}

static int map_one(struct env *env, const struct pool_wish *wish, struct pool_regions *out)
{
    const struct env_region_request request = {
        .bytes = out->slab_count * POOL_SLAB_BYTES, .rungs = wish->rungs, .node = ENV_NODE_ANY, .watch = wish->watch};
    return env->map_region(env, &request, &out->region[0]);
}

int pool_regions_map(struct env *env, const struct pool_wish *wish, struct pool_regions *out)
{
    const uint64_t slabs = wish->capacity_bytes / POOL_SLAB_BYTES + (wish->capacity_bytes % POOL_SLAB_BYTES != 0);
    int nodes[POOL_REGIONS_MAX];
    *out = (struct pool_regions){0};
    if (slabs == 0 || slabs >= UINT32_MAX)
        return -EINVAL;
    const uint32_t node_count = env->nodes(env, nodes, POOL_REGIONS_MAX);
    out->slab_count = (uint32_t)slabs;
    out->count = node_count < 2 ? 1 : node_count < slabs ? node_count : (uint32_t)slabs;
    for (uint32_t i = 0; i <= out->count; i++)
        out->slabs_before[i] = (uint32_t)(slabs * i / out->count);
    int error = out->count == 1 ? map_one(env, wish, out) : map_side_by_side(env, wish, nodes, out);
    if (error)
        pool_regions_unmap(env, out);
    for (uint32_t i = 0; i < out->count; i++) {
        if (out->region[i].kind > out->region[out->worst].kind)
            out->worst = i;
    }
    return error;
}

void pool_regions_unmap(struct env *env, struct pool_regions *regions)
{
    for (uint32_t i = 0; i < regions->count; i++) {
        if (!regions->region[i].base) // was not to be had
            continue;
        char reasons[ENV_REASONS_BYTES];
        strcpy(reasons, regions->region[i].reasons);
        env->unmap_region(env, &regions->region[i]);
        strcpy(regions->region[i].reasons, reasons);
    }
    regions->count = regions->slab_count = 0;
}

void *pool_regions_slab(const struct pool_regions *regions, uint32_t slab)
{
    assert(slab < regions->slab_count);
    uint32_t i = 0;
    while (slab >= regions->slabs_before[i + 1])
        i++;
    return (uint8_t *)regions->region[i].base + (slab - regions->slabs_before[i]) * POOL_SLAB_BYTES;
}

uint32_t pool_regions_find(const struct pool_regions *regions, const void *address)
{
    for (uint32_t i = 0; i < regions->count; i++) {
        const uint64_t offset = (uintptr_t)address - (uintptr_t)regions->region[i].base;
        if (offset < regions->region[i].bytes) // below the region it wraps to more
            return regions->slabs_before[i] + (uint32_t)(offset / POOL_SLAB_BYTES);
    }
    return regions->slab_count;
}

enum env_huge pool_regions_kind(const struct pool_regions *regions)
{
    return regions->region[regions->worst].kind;
}

uint64_t pool_regions_huge_bytes(const struct pool_regions *regions)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < regions->count; i++)
        bytes += regions->region[i].huge_bytes;
    return bytes;
}
