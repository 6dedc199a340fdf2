// Latency histogram with logarithmic buckets: 16 per power of two, so a quantile is at most 6 % off. Plain memory: one
// thread, or the caller's lock.
#ifndef ICECACHE_CACHED_HISTOGRAM_H
#define ICECACHE_CACHED_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_SUB_BITS 4u
#define HISTOGRAM_BUCKETS  ((64u - HISTOGRAM_SUB_BITS + 1u) << HISTOGRAM_SUB_BITS)

struct histogram {
    uint64_t count;
    uint64_t max;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *histogram, uint64_t value);
// Value below which the share `quantile` (0..1) of the values lies, the bucket's upper end; 0 when empty.
uint64_t histogram_quantile(const struct histogram *histogram, double quantile);

#endif
