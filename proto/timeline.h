// Timeline words: a u64 for each row of a landing in GPU memory, which a worker's GPU can wait for. A retrieve names a
// value; the daemon stores it in the words of the retrieve's rows when what the retrieve leaves is there, or nothing
// will come. Values grow, and a GPU waits for "at least"; so a word tells of every retrieve of its row up to one.
//
// The words lie in whole pages of their own, because the worker registers them with its driver: behind the staging of a
// pull landing, in the same memfd; for a push landing in a memfd of their own.
#ifndef ICECACHE_PROTO_TIMELINE_H
#define ICECACHE_PROTO_TIMELINE_H

#include "proto/shm.h"

#include <stdatomic.h>

_Static_assert(sizeof(_Atomic uint64_t) == sizeof(uint64_t) && ATOMIC_LLONG_LOCK_FREE == 2,
               "words are shared with other processes and GPUs and must be plain and lock-free");

static inline uint64_t timeline_bytes(const struct landing_shape *shape, enum landing_place place)
{
    return place == LANDING_HOST ? 0 : ((uint64_t)shape->rows * sizeof(uint64_t) + 4095) / 4096 * 4096;
}

// Where the words begin in the memfd that is passed to the worker, and how large that is. held: the layout of what is
// held in host memory.
static inline uint64_t timeline_offset(const struct landing_layout *held, enum landing_place place)
{
    return place == LANDING_PUSH ? 0 : held->total_bytes;
}

static inline uint64_t timeline_passed_bytes(const struct landing_layout *held, const struct landing_shape *shape,
                                             enum landing_place place)
{
    return timeline_offset(held, place) + timeline_bytes(shape, place);
}

#endif
