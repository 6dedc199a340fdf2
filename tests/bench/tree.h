// The tree under measurement, through index/index.h only.
#ifndef ICECACHE_BENCH_TREE_H
#define ICECACHE_BENCH_TREE_H

#include "arena.h"
#include "data.h"
#include "index/index.h"

#include <stdbool.h>
#include <stdint.h>

#define TREE_PAGE_TOKENS 16u

struct tree {
    struct arena *arena; // borrowed
    struct index *index;
};

struct tree_costs {
    double build_ns, insert_ns; // sums
    uint32_t build_tokens, inserted;
    uint64_t moved; // old tokens that insertions moved to another page
};

// Where the build of an index puts the time of single insertions.
struct tree_latencies {
    double *ns; // room for all insertions, or NULL
    uint32_t count;
};

// An empty tree. False when there is no memory.
bool tree_create(struct tree *tree, struct arena *arena, const struct data *data, uint64_t seed);
void tree_destroy(struct tree *tree); // accepts a zeroed struct
// Appends tokens first .. end-1 and clusters them: all at once, then until nothing is due.
bool tree_build(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t end,
                struct tree_costs *costs);
// Appends token `position`, the next one, and does one slice of clustering, as a service would.
bool tree_insert(struct tree *tree, const struct data *data, const struct data_lane *lane, uint32_t position,
                 struct tree_costs *costs, struct tree_latencies *latencies);
// Does the clustering that is still due.
bool tree_drain(struct tree *tree, struct tree_costs *costs);

struct tree_question {
    uint32_t query, first_head, heads, budget;
    bool page_wise;
    float effort; // 0: the index's default
};
void tree_query(const struct data *data, const struct data_lane *lane, const struct tree_question *question,
                struct index_query *out);
// One search from begin to finish. False when the index refuses.
bool tree_search(struct index_search *search, const struct tree *tree, const struct index_query *query,
                 struct index_selection *selection, const struct index_selected **tokens);
// page_of[position], for all tokens.
void tree_pages(const struct tree *tree, uint32_t tokens, uint32_t *page_of);

#endif
