// Namespaces: what the sequences and sealed prefixes of each have, and how much they may have (--quota).
//
// A namespace is there while something is in it, a sequence or a sealed prefix, or where it has a quota of its own. The
// reactor owns the table; shards count what their lanes take through the functions at the end of this file, and only
// these.
//
// Pages and trees of sequences are counted once, by the stem that they stand in (quota.h), however many sequences
// share it. A sealed prefix counts all that it names besides, whether sequences use it or not.
//
// RAM is pages in memory and trees. Where there is a disk, pages of a namespace over its quota leave for it (tier.c)
// and its idle sequences fall asleep (idle.c), so only trees are refused for. An append is refused for what it brings;
// what clustering takes later, moving tokens to other pages, is counted, but not refused.
#ifndef ICECACHE_CACHED_TENANT_H
#define ICECACHE_CACHED_TENANT_H

#include "cached/config.h"
#include "cached/env.h"
#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TENANT_BUCKETS    256u
#define TENANT_TEXT_BYTES 384u // of a refusal: the name and the figures

struct tenants;

struct tenant {
    // Immutable.
    char name[WIRE_NAME_BYTES_MAX + 1];
    const struct config_quota *quota;
    struct tenants *all;
    bool pinned; // it has a quota of its own, and stays when nothing is in it

    // Reactor only.
    struct tenant *next; // in its bucket
    uint32_t sequences, prefixes;
    uint64_t ram_promised, disk_promised; // to appends that run
    uint64_t refused;

    // Any thread, relaxed.
    _Atomic uint64_t ram_bytes;   // pages in memory and trees
    _Atomic uint64_t index_bytes; // of them, trees
    _Atomic uint64_t disk_bytes;
};

struct tenants {
    struct tenant *buckets[TENANT_BUCKETS]; // reactor only, as the next
    uint32_t count;
    struct tenant *refused; // whom tenant_may_take has refused last, to be read at once
    bool refused_for_disk;
    _Atomic uint32_t ram_over; // those over their quota of RAM
};

// What a running append has been promised. Zero-initialised by its sequence. Reactor only.
struct tenant_promise {
    uint64_t ram_bytes, disk_bytes;
};

// What is about to be taken.
struct tenant_need {
    uint64_t pool_bytes, index_bytes, disk_bytes;
};

// Those that have a quota of their own. False: no memory.
ICE_MUST_CHECK bool tenants_init(struct tenants *tenants, struct env *env, const struct config *config);
void tenants_fini(struct tenants *tenants, struct env *env);
// The namespace of this name, NULL: nothing is in it.
struct tenant *tenant_find(struct tenants *tenants, const char *name);
// The same, made where it is not there. It is the caller's to count something in, or to drop. NULL: no memory, or as
// many as --namespaces-max; what is on the disk already (forced) is not refused for that.
struct tenant *tenant_take(struct tenants *tenants, struct env *env, const struct config *config, const char *name,
                           bool forced, ice_status *status);
// Forgets a namespace in which nothing is. All of its counts must be back at 0.
void tenant_drop_empty(struct tenants *tenants, struct env *env, struct tenant *tenant);

// May it have one sequence more? ICE_QUOTA and its text (TENANT_TEXT_BYTES) where not.
ICE_MUST_CHECK ice_status tenant_may_open(struct tenant *tenant, char *text);
// May it take this, beside what others were promised? `promise`: replaced by this need; NULL: nothing is promised.
// has_disk: pages can leave memory. ICE_QUOTA and its text where not, with nothing changed.
ICE_MUST_CHECK ice_status tenant_may_take(struct tenant *tenant, struct tenant_promise *promise,
                                          const struct tenant_need *need, bool has_disk, char *text);
void tenant_unpromise(struct tenant *tenant, struct tenant_promise *promise);

// ---- counting. Any thread; tenant may be NULL, bytes may be negative ----

static inline void tenant_add_ram(struct tenant *tenant, int64_t bytes)
{
    if (!tenant || bytes == 0)
        return;
    const uint64_t quota = tenant->quota->ram_bytes;
    const uint64_t before = atomic_fetch_add_explicit(&tenant->ram_bytes, (uint64_t)bytes, memory_order_relaxed);
    const bool was_over = before > quota, is_over = before + (uint64_t)bytes > quota;
    // The sums follow each other in one order, so that every way up has its way down.
    if (quota > 0 && is_over && !was_over)
        atomic_fetch_add_explicit(&tenant->all->ram_over, 1, memory_order_relaxed);
    else if (quota > 0 && was_over && !is_over)
        atomic_fetch_sub_explicit(&tenant->all->ram_over, 1, memory_order_relaxed);
}

static inline void tenant_add_index(struct tenant *tenant, int64_t bytes)
{
    if (!tenant)
        return;
    atomic_fetch_add_explicit(&tenant->index_bytes, (uint64_t)bytes, memory_order_relaxed);
    tenant_add_ram(tenant, bytes);
}

static inline void tenant_add_disk(struct tenant *tenant, int64_t bytes)
{
    if (tenant)
        atomic_fetch_add_explicit(&tenant->disk_bytes, (uint64_t)bytes, memory_order_relaxed);
}

static inline bool tenant_is_over_ram(const struct tenant *tenant)
{
    return tenant && tenant->quota->ram_bytes > 0 &&
           atomic_load_explicit(&tenant->ram_bytes, memory_order_relaxed) > tenant->quota->ram_bytes;
}

static inline bool tenants_are_over_ram(const struct tenants *tenants)
{
    return atomic_load_explicit(&tenants->ram_over, memory_order_relaxed) > 0;
}

#endif
