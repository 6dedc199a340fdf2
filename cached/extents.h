// Which pieces of the data file are in use. The file is cut into slabs of 2 MiB; a slab holds extents of one size, an
// extent holds one page, or a piece of a lane's image. A slab whose extents are all free returns.
//
// An extent is counted: each lane's page table and each sealed prefix that names it holds it once, so that what is
// sealed and what lives on can share it. A count ends at EXTENT_HOLDS_MAX: an extent that is held more often stays in
// use until the next start, when the sealed prefixes are counted anew. Thread-safe.
#ifndef ICECACHE_CACHED_EXTENTS_H
#define ICECACHE_CACHED_EXTENTS_H

#include "cached/env.h"

#include <stdbool.h>
#include <stdint.h>

#define EXTENT_NONE         UINT32_MAX
#define EXTENT_UNIT         4096u // an extent's number is its place in the file in this unit
#define EXTENT_HOLDS_MAX    65535u
#define EXTENTS_SLAB_BYTES  ((uint64_t)2 << 20)
#define EXTENTS_CLASSES_MAX 64u
// The largest file whose extents have numbers: 16 TiB less a slab.
#define EXTENTS_BYTES_MAX (((uint64_t)1 << 44) - EXTENTS_SLAB_BYTES)

struct extents;

// capacity_bytes is rounded down to whole slabs. -ENOMEM, -EINVAL: no whole slab, -EFBIG: above EXTENTS_BYTES_MAX.
ICE_MUST_CHECK int extents_create(struct env *env, uint64_t capacity_bytes, struct extents **out);
void extents_destroy(struct extents *extents); // accepts NULL; forgets what is held

// Room promised before it is taken. Zero-initialised by its owner, guarded by the extents' lock.
struct extents_reservation {
    uint64_t rest;
};
// Promises up to `count` extents of `bytes` (rounded up to EXTENT_UNIT) and answers how many; the reservation's rest
// becomes that, whatever it was. Sizes of 0 and above a slab are refused. What is promised is there, memory for its
// bookkeeping included.
uint64_t extents_reserve(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes,
                         uint64_t count);
// Gives up the rest. bytes: as it was reserved.
void extents_unreserve(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes);

// Takes a free extent, held once. EXTENT_NONE where there is none, all the rest is promised to others, or no memory.
// reservation may be NULL.
uint32_t extents_acquire(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes);
// Holds or gives up each of `count` extents once more; EXTENT_NONE entries are skipped.
void extents_hold(struct extents *extents, const uint32_t *list, size_t count);
void extents_release(struct extents *extents, const uint32_t *list, size_t count);
// An extent of the caller alone in place of one that it holds: the same where nobody else holds it, else another, taken
// without a promise; EXTENT_NONE where there is none. The hold is given up then.
uint32_t extents_own(struct extents *extents, uint32_t extent, uint64_t bytes);
// Start-up: takes an extent that a sealed prefix names, or holds it once more. False where it lies outside, across the
// extents of another size, is held too often, is promised to others, or where there is no memory.
bool extents_claim(struct extents *extents, uint32_t extent, uint64_t bytes);

// How often an extent is held, 0: it is free. A moment's value.
uint32_t extents_holds(struct extents *extents, uint32_t extent);

struct extents_usage {
    uint64_t capacity_bytes, used_bytes, used_extents;
};
void extents_usage(struct extents *extents, struct extents_usage *out);

// The sum by which whoever names an extent knows what it holds. The extent is part of it, so that another one's bytes
// are found out too.
uint64_t extent_checksum(const void *memory, size_t bytes, uint32_t extent);

static inline uint64_t extent_offset(uint32_t extent)
{
    return (uint64_t)extent * EXTENT_UNIT;
}

#endif
