// Memory of the indexes of one shard: blocks cut from chunks of 2 MiB, which the system backs with large pages where it
// can. A search of many lanes touches a new page for nearly every cell; with large pages it takes a fifth less time.
// Belongs to the shard's thread.
#ifndef ICECACHE_CACHED_ARENA_H
#define ICECACHE_CACHED_ARENA_H

#include "cached/env.h"

#include <stdatomic.h>
#include <stdbool.h>

#define ARENA_CLASSES 57u // sizes: eight for each power of two from 512 bytes to 64 KiB

struct arena_chunk;
struct arena_span;

struct arena {
    struct env *env;
    struct arena_span *partial[ARENA_CLASSES]; // spans with free blocks
    struct arena_chunk *chunks;                // those with free spans
    // Any thread may read them: all chunks, and what of them is in blocks in use, as arena_block_bytes has it.
    _Atomic uint64_t chunk_bytes, used_bytes;
};

void arena_init(struct arena *arena, struct env *env);
void arena_fini(struct arena *arena); // all blocks must be back
// 64-byte aligned, not zeroed; NULL when there is none. What is larger than 64 KiB comes from the environment.
void *arena_acquire(struct arena *arena, size_t bytes);
void arena_release(struct arena *arena, void *memory, size_t bytes); // accepts NULL
// What a block of so many bytes takes: its share of a span. 512 bytes at least; up to 8 KiB at most 1/7 more, above at
// most 1/3, because a few large blocks fill a span badly.
size_t arena_block_bytes(const struct arena *arena, size_t bytes);
// Would a block of so many bytes take another chunk from the system?
bool arena_grows(const struct arena *arena, size_t bytes);

#endif
