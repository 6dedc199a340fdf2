// What the `step` command knows: all lanes of a model's shape, each at its own place in memory. Private to step.c and
// step_lanes.c.
#ifndef ICECACHE_BENCH_STEP_H
#define ICECACHE_BENCH_STEP_H

#include "measure.h"
#include "options.h"
#include "reference.h"
#include "scan.h"
#include "tree.h"

#include <stdbool.h>

struct step_lane {
    const struct data_lane *data; // borrowed
    const struct reference *reference;
    uint32_t query;
    struct tree tree; // with the rows that are gathered
    struct scan_keys keys;
    // Of the last search.
    uint32_t count;
    uint32_t *positions;        // room for the largest budget
    struct index_place *places; // likewise
    double scanned;             // share of the keys
};

// One thread's own things.
struct step_worker {
    struct arena arena;
    struct index_search *context;
    struct scan_stream *stream;
    struct scan_query *prepared;
};

struct step {
    const struct options *options;
    struct data data;
    struct reference *references; // [data lane]
    struct step_lane *lanes;
    uint32_t lane_count, budget_max, cores_max;
    struct arena tree_arena, scan_arena, row_arena, landing_arena;
    struct step_worker *workers; // [cores_max]
    uint8_t *landing;            // [lane]{K, V}[slot][head_dim]
    struct tree_costs costs;     // of the policy that is built
    struct bandwidth bandwidth;
};

enum step_job { STEP_TREE, STEP_SCAN, STEP_GATHER };

struct step_pass {
    enum step_job job;
    uint32_t cores, budget;
    double effort;
    bool warm; // each lane is done twice, and only the second time counts
};

// Everything but the trees. 0, or an exit code after a message.
int step_prepare(struct step *step);
void step_release(struct step *step);
// Builds the trees of all lanes, inserts the last tokens step by step. 0, or an exit code after a message.
int step_build(struct step *step, enum index_policy policy);
void step_clear(struct step *step); // destroys the trees
// Does a pass over all lanes and measures it. False when the index refuses.
bool step_run(struct step *step, const struct step_pass *pass, double *ms);
// The landing holds the K and V of the positions of the last search.
bool step_landing_is_right(const struct step *step);

#endif
