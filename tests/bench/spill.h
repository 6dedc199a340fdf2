// Parts of the spill command: one measurement of the product's disk, and one of fio on the same file.
#ifndef ICECACHE_BENCH_SPILL_H
#define ICECACHE_BENCH_SPILL_H

#include <stdbool.h>
#include <stdint.h>

struct spill_load {
    const char *folder; // that holds the data file
    uint64_t bytes;     // of the file
    uint32_t page_bytes, depth;
    bool is_write;
    double seconds;
    uint64_t seed;
};

struct spill_figures {
    double pages_per_s, cpu_us_per_page, p50_us, p99_us;
};

// Whether fio can be run; says on stderr how to get it where it cannot.
bool spill_fio_is_there(void);
// Runs it with the load's pattern. False after a message on stderr.
bool spill_fio_run(const struct spill_load *load, struct spill_figures *out);

#endif
