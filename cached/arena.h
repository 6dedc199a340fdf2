// Memory of the indexes of one shard: blocks cut from chunks of 2 MiB, which the system backs with large pages where it
// can. A search of many lanes touches a new page for nearly every cell; with large pages it takes a fifth less time.
// Belongs to the shard's thread.
#ifndef ICECACHE_CACHED_ARENA_H
#define ICECACHE_CACHED_ARENA_H

#include "cached/env.h"

#include <stdbool.h>

#define ARENA_CLASSES 57u // sizes: eight for each power of two from 512 bytes to 64 KiB

struct arena_chunk;
struct arena_span;

struct arena {
    struct env *env;
    struct arena_span *partial[ARENA_CLASSES]; // spans with free blocks
    struct arena_chunk *chunks;                // those with free spans
};

void arena_init(struct arena *arena, struct env *env);
void arena_fini(struct arena *arena); // all blocks must be back
// 64-byte aligned, not zeroed; NULL when there is none. What is larger than 64 KiB comes from the environment.
void *arena_acquire(struct arena *arena, size_t bytes);
void arena_release(struct arena *arena, void *memory, size_t bytes); // accepts NULL

#endif
