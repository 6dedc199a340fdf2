// Writing gathered rows.
#ifndef ICECACHE_GPU_STORE_H
#define ICECACHE_GPU_STORE_H

#include <stddef.h>

// How many rows before its turn a row is asked for: they lie at random places, and streamed stores wait for nothing but
// them.
#define STORE_ROWS_AHEAD 8u

static inline void store_ask(const void *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch((const char *)from + i, 0, 0);
    }
}

// Both have memcpy's contract; streaming wants `to` and bytes to be multiples of 16 (slots are of 32).
void store_cached(void *to, const void *from, size_t bytes);
// Past the caches where the machine can: a GPU reads what lies in memory much faster than what lies in other cores'
// caches.
void store_streaming(void *to, const void *from, size_t bytes);
// Between streamed stores and the store that tells of them.
void store_fence(void);

#endif
