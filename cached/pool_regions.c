// The pool's regions, see pool_regions.h. A handful at most, so that looking them through costs less than a search.
#include "cached/pool_regions.h"

#include <assert.h>
#include <errno.h>

int pool_regions_map(struct env *env, const struct pool_wish *wish, struct pool_regions *out)
{
    const uint64_t slabs = wish->capacity_bytes / POOL_SLAB_BYTES + (wish->capacity_bytes % POOL_SLAB_BYTES != 0);
    *out = (struct pool_regions){0};
    if (slabs == 0 || slabs >= UINT32_MAX)
        return -EINVAL;
    const struct env_region_request request = {
        .bytes = slabs * POOL_SLAB_BYTES, .rungs = wish->rungs, .watch = wish->watch};
    int error = env->map_region(env, &request, &out->region[0]);
    if (error)
        return error;
    out->count = 1;
    out->slab_count = out->slabs_before[1] = (uint32_t)slabs;
    return 0;
}

void pool_regions_unmap(struct env *env, struct pool_regions *regions)
{
    for (uint32_t i = 0; i < regions->count; i++)
        env->unmap_region(env, &regions->region[i]);
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
    enum env_huge kind = ENV_HUGE_NONE;
    for (uint32_t i = 0; i < regions->count; i++)
        kind = regions->region[i].kind < kind ? regions->region[i].kind : kind;
    return kind;
}

uint64_t pool_regions_huge_bytes(const struct pool_regions *regions)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < regions->count; i++)
        bytes += regions->region[i].huge_bytes;
    return bytes;
}
