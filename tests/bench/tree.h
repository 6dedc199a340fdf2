// The tree under measurement, through index/index.h only, and the rows that it asks for.
//
// What is counted: the index's own work, which is appends (the copy that the index makes of a new key included), slices
// of clustering, index_rows_get and index_rows_give, and commits. The owner's work, which is to write rows into pages,
// to move them when a plan comes and to provide and release pages, is done between and left out; it costs the same
// whatever the index does inside.
#ifndef ICECACHE_BENCH_TREE_H
#define ICECACHE_BENCH_TREE_H

#include "arena.h"
#include "data.h"
#include "index/index.h"
#include "rows.h"

#include <stdbool.h>
#include <stdint.h>

#define TREE_PAGE_TOKENS 16u
#define TREE_POLICIES    2u // of enum index_policy

extern const char *const tree_methods[TREE_POLICIES]; // names of rows

struct tree {
    struct index *index;
    struct rows rows;
    const void **keys; // for index_rows_give
    uint32_t keys_room;
    uint64_t owner_ns; // spent on rows
};

struct tree_costs {
    double build_ns, insert_ns; // sums
    uint32_t build_tokens, inserted;
    uint32_t behind; // tokens whose clustering was due and not done after the last insertion
    uint64_t moved;  // old tokens that insertions moved to another page
};

// Where the build of an index puts the time of single insertions.
struct tree_latencies {
    double *ns; // room for all insertions, or NULL
    uint32_t count;
};

struct tree_memory {
    struct arena *index, *rows;
    bool with_values; // rows hold K and V; else K alone, which is what the index asks for
};

// An empty tree. False when there is no memory.
bool tree_create(struct tree *tree, const struct tree_memory *memory, const struct data *data, enum index_policy policy,
                 uint64_t seed);
void tree_destroy(struct tree *tree); // accepts a zeroed struct
// Gives the rows back where only searches follow.
void tree_release_rows(struct tree *tree);
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
    float effort;   // 0: the index's default
    float coverage; // 0: the whole budget
};
void tree_query(const struct data *data, const struct data_lane *lane, const struct tree_question *question,
                struct index_query *out);
// One search from begin to finish. False when the index refuses.
bool tree_search(struct index_search *search, const struct tree *tree, const struct index_query *query,
                 struct index_selection *selection, const struct index_selected **tokens);
// page_of[position], for all tokens.
void tree_pages(const struct tree *tree, uint32_t tokens, uint32_t *page_of);

#endif
