// The memory of the pool and how it is numbered: regions of private memory, cut into slabs of 2 MiB that are counted
// through over all regions. Immutable once mapped, so any thread may ask.
#ifndef ICECACHE_CACHED_POOL_REGIONS_H
#define ICECACHE_CACHED_POOL_REGIONS_H

#include "cached/env.h"

#define POOL_SLAB_BYTES  ((uint64_t)2 << 20)
#define POOL_REGIONS_MAX ENV_NODES_MAX // one on each NUMA node

struct pool_regions {
    uint32_t count, slab_count;
    uint32_t slabs_before[POOL_REGIONS_MAX + 1]; // region i has slabs slabs_before[i] .. slabs_before[i + 1] - 1
    uint32_t worst; // the region that could not be had, else the one with the smallest pages
    struct env_region region[POOL_REGIONS_MAX];
};

struct pool_wish {
    uint64_t capacity_bytes;       // rounded up to whole slabs
    uint32_t rungs;                // see env_region_request
    const struct env_watch *watch; // may be NULL
};

// 0 or -errno: -EINVAL for no slab or too many, -ECANCELED by the watch. Nothing is mapped then, but the regions'
// reasons can be read.
int pool_regions_map(struct env *env, const struct pool_wish *wish, struct pool_regions *out);
void pool_regions_unmap(struct env *env, struct pool_regions *regions);

void *pool_regions_slab(const struct pool_regions *regions, uint32_t slab); // its first byte
// The slab that holds the address, slab_count where none does.
uint32_t pool_regions_find(const struct pool_regions *regions, const void *address);

// Of all regions: the kind of the one with the smallest pages, and their huge bytes.
enum env_huge pool_regions_kind(const struct pool_regions *regions);
uint64_t pool_regions_huge_bytes(const struct pool_regions *regions);

#endif
