// Time, medians, and what the machine is.
#ifndef ICECACHE_BENCH_MEASURE_H
#define ICECACHE_BENCH_MEASURE_H

#include <jansson.h>
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

// GB/s that one core reads from memory, out of cache; the best of some passes. 0 when there is no memory.
double measure_bandwidth(void);
json_t *measure_machine(void); // owned by the caller

#endif
