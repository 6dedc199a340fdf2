// What rounds of the serve command add up to: one set for each row.
#ifndef ICECACHE_BENCH_SERVE_ROWS_H
#define ICECACHE_BENCH_SERVE_ROWS_H

#include "serve.h"

struct serve_round {                    // what one round of some workers gave
    const struct serve_answer *answers; // [workers]
    const struct serve_record *records; // [record_count]: those of the first worker, then those of the next
    uint32_t workers, record_count;
    uint32_t builds; // that have ended meanwhile
    double build_s;  // that the daemon has spent on the last one
    struct serve_stats before, after;
    const double *device_us; // [device_count], for a batch of as many pages as a retrieve read; none: 0
    uint32_t device_count;
};

// Each is the samples' median over rounds of what the name says.
struct serve_set {
    char data[128];
    uint32_t tokens, workers;
    double ram_cap;          // 0: none
    uint32_t hint;           // enum option_hint
    bool building;           // beside a worker that builds
    uint32_t order;          // which of the job's places
    enum option_place place; // as it is
    struct samples p50, p99, p999, mean, queue, search, fetch, copy, wire, per_s, slowest, kept, resident, cpu_us;
    struct samples moved_over_turnover, build_s;
    uint32_t build_tokens, build_lanes; // of the sequences that are clustered meanwhile
    uint64_t builds;                    // of them, ended
    struct samples hinted, useful;      // pages that hints brought, of a retrieve; of them, asked for later
    struct samples pages_read, device_p50, device_p99, over_device, mean_over_device;
    double bytes_moved; // by one retrieve
    double ready_s;
    uint64_t retrieves, partial, wrong_rows;
};

double serve_pages_read(const struct serve_round *round); // by one retrieve, on average
// False after a message on stderr: no memory.
bool serve_set_add(struct serve_set *set, const struct serve_round *round);
json_t *serve_set_row(const struct serve_set *set); // owned by the caller
json_t *serve_base_row(enum serve_base base, const struct serve_set *set, uint64_t bytes);
// Quantiles of a baseline's round.
void serve_base_add(struct serve_set *set, double *us, uint32_t count);
// The median of what the rounds give.
double serve_median_ratio(const struct samples *above, const struct samples *below);

#endif
