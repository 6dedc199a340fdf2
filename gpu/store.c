// Stores of gathered rows.
// Threads: stateless, any thread.
#include "gpu/store.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

void store_cached(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

void store_streaming(void *to, const void *from, size_t bytes)
{
#if defined(__x86_64__)
    for (size_t i = 0; i < bytes; i += sizeof(__m128i)) {
        const __m128i part = _mm_loadu_si128((const void *)((const char *)from + i));
        _mm_stream_si128((void *)((char *)to + i), part);
    }
#else
    memcpy(to, from, bytes);
#endif
}

void store_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
