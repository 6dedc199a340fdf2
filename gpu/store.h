// Writing gathered rows.
#ifndef ICECACHE_GPU_STORE_H
#define ICECACHE_GPU_STORE_H

#include <stddef.h>

// Both have memcpy's contract; streaming wants `to` and bytes to be multiples of 16 (slots are of 32).
void store_cached(void *to, const void *from, size_t bytes);
// Past the caches where the machine can: a GPU reads what lies in memory much faster than what lies in other cores'
// caches.
void store_streaming(void *to, const void *from, size_t bytes);
// Between streamed stores and the store that tells of them.
void store_fence(void);

#endif
