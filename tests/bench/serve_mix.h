// The mixed load of serve: workers whose sequences come, are prefilled, decode together, fork and go.
#ifndef ICECACHE_BENCH_SERVE_MIX_H
#define ICECACHE_BENCH_SERVE_MIX_H

#include "serve.h"
#include "serve_plan.h"

enum serve_class { SERVE_DECODE, SERVE_BULK, SERVE_ADMIN, SERVE_CLASSES };
extern const char *const serve_class_names[SERVE_CLASSES];
extern const char *const plan_kind_names[PLAN_KINDS];
enum serve_class serve_class_of(enum plan_kind kind);

struct serve_mix_job {
    struct serve_job job; // whose tokens and steps are those of the data; a sequence begins anywhere in it
    struct plan_params plan;
    uint64_t limit_ns; // after which nothing is begun any more
};
// Follows the go of a worker that has answered one byte.
struct serve_mix_answer {
    uint64_t begun_ns, ended_ns;
    uint32_t record_count; // that follow
    uint32_t wrong_rows;
    bool is_cut; // the time limit ended it
};
struct serve_mix_record { // of one request
    float total_us, queue_us, search_us, fetch_us, copy_us;
    uint32_t kind;   // enum plan_kind
    uint32_t tokens; // appended (one layer's), by all sequences; of a fork: taken over
    uint32_t lanes;  // of a retrieve: sequences
    uint32_t bytes;  // moved
    bool partial;
};
int serve_mix_worker(void); // the role

#endif
