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
    char *out = to;
    const char *in = from;
    // Whole lines where there are some: all of a line is read before any of it is written.
    for (; bytes >= 64; bytes -= 64, in += 64, out += 64) {
        const __m128i a = _mm_loadu_si128((const void *)in), b = _mm_loadu_si128((const void *)(in + 16));
        const __m128i c = _mm_loadu_si128((const void *)(in + 32)), d = _mm_loadu_si128((const void *)(in + 48));
        _mm_stream_si128((void *)out, a);
        _mm_stream_si128((void *)(out + 16), b);
        _mm_stream_si128((void *)(out + 32), c);
        _mm_stream_si128((void *)(out + 48), d);
    }
    for (; bytes > 0; bytes -= 16, in += 16, out += 16) {
        _mm_stream_si128((void *)out, _mm_loadu_si128((const void *)in));
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
