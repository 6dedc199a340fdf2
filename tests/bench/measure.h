// Time, medians, and what the machine is.
#ifndef ICECACHE_BENCH_MEASURE_H
#define ICECACHE_BENCH_MEASURE_H

#include "arena.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#define MEASURE_SAMPLES_MAX 256u

uint64_t measure_ns(void); // monotonic

struct samples {
    uint32_t count;
    double values[MEASURE_SAMPLES_MAX];
};
void samples_add(struct samples *samples, double value); // forgets what is beyond the room
double samples_median(const struct samples *samples);    // NAN when there are none
double samples_min(const struct samples *samples);
double samples_max(const struct samples *samples);
// q in [0, 1]; sorts the values.
double quantile(double *values, uint32_t count, double q);

// GB/s that one core reads from memory, out of cache; measured once in each round, beside what is compared with it.
struct bandwidth {
    struct arena arena;
    void *memory;
    struct samples gb_per_s;
};
bool bandwidth_init(struct bandwidth *bandwidth); // false when there is no memory
void bandwidth_fini(struct bandwidth *bandwidth);
void bandwidth_measure(struct bandwidth *bandwidth);

uint64_t measure_free_bytes(void); // memory that could be had at once; 0: unknown
json_t *measure_machine(void);     // owned by the caller

#endif
