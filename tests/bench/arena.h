// Memory for indexes, keys and pages: huge pages where the kernel gives them, so that what is measured is not the
// page walk, and in known ranges, so that it can be put out of all caches.
//
// Thread-safety: an arena belongs to one thread at a time.
#ifndef ICECACHE_BENCH_ARENA_H
#define ICECACHE_BENCH_ARENA_H

#include "index/index.h"

#include <stddef.h>
#include <stdint.h>

#define ARENA_CLASSES 512u

struct arena_chunk {
    struct arena_chunk *next;
    uint8_t *memory;
    size_t bytes, used;
};

struct arena {
    struct arena_chunk *chunks;    // newest first
    void *released[ARENA_CLASSES]; // lists, linked through their first word
    size_t live_bytes;             // handed out and not released
};

void *arena_acquire(struct arena *arena, size_t bytes); // 64-byte aligned; NULL when there is no memory
void arena_release(struct arena *arena, void *memory, size_t bytes);
void arena_fini(struct arena *arena);
size_t arena_bytes(const struct arena *arena); // used so far, released memory included
// Puts the arena's memory out of all caches.
void arena_flush(const struct arena *arena);
struct index_allocator arena_allocator(struct arena *arena);

#endif
