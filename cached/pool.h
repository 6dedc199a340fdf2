// The page pool: populated memory in the largest pages there are, cut into slabs of 2 MiB; a slab holds frames of
// one size, a frame holds one page (the K and V rows of page_tokens tokens). A slab whose frames are all free returns
// to the arena, so that shapes can come and go.
//
// Frames can be promised before they are taken (an append of several parts), see pool_reserve. Thread-safe.
#ifndef ICECACHE_CACHED_POOL_H
#define ICECACHE_CACHED_POOL_H

#include "cached/pool_regions.h"

#include <stdbool.h>
#include <stdint.h>

#define POOL_CLASSES_MAX 64u // distinct frame sizes: 16 head_dims x 3 dtypes at one page size is below it

#define POOL_SLAB_NONE   UINT32_MAX
#define POOL_KEEP_NS     20000000u

struct pool;

// A holder's promise of frames of one size. Zero-initialised by its owner; guarded by the pool's lock.
struct pool_reservation {
    uint64_t rest_frames;
};

// The regions are handed over on success. -ENOMEM where there is no memory for the pool's books.
int pool_create(struct env *env, const struct pool_regions *regions, struct pool **out);
void pool_destroy(struct pool *pool); // accepts NULL; all frames must be back

// Sets the reservation's rest to `frames`. False, unchanged, where the pool has no room.
bool pool_reserve(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes, uint64_t frames);
// Gives the reservation's rest back.
void pool_unreserve(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes);
// NULL where the pool is full (or all the rest is promised to others). reservation may be NULL. Not zeroed.
void *pool_acquire(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes);
void pool_release(struct pool *pool, void *frame);
// Somebody whose frames can leave waits for a frame of this size, and slabs of other sizes are all there is: one of
// those is to be given up. It hands out no frames any more, and when its last one has come back it is this size's for
// POOL_KEEP_NS. Called again and again while none is there, also where this size has what it needs.
void pool_want(struct pool *pool, uint64_t frame_bytes);
// The slab whose frames are to leave, POOL_SLAB_NONE: none. A moment's value, without the lock.
uint32_t pool_given_up(struct pool *pool);
uint64_t pool_capacity_bytes(const struct pool *pool);
// What could still be taken, promises included, if it were of the right size. A moment's value, without the lock.
uint64_t pool_free_bytes(struct pool *pool);
// Where a frame lies in the pool, below its capacity: a number for it.
uint64_t pool_offset(const struct pool *pool, const void *frame);

struct pool_usage {
    uint64_t capacity_bytes, used_bytes, used_frames;
    enum env_huge kind;
    uint64_t huge_bytes;
};
void pool_usage(struct pool *pool, struct pool_usage *out);
const char *pool_huge_name(enum env_huge kind);

#endif
