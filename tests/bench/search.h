// What the `search` command knows of one data set: its lanes with their trees and scans, and what was measured.
// Private to search.c, search_row.c and peers.c.
#ifndef ICECACHE_BENCH_SEARCH_H
#define ICECACHE_BENCH_SEARCH_H

#include "measure.h"
#include "options.h"
#include "reference.h"
#include "scan.h"
#include "tree.h"

#include <jansson.h>
#include <stdbool.h>

#define SEEDS_MAX   16u
#define EFFORTS_MAX 32u
#define RECALLS     4u
#define SHARES      3u
#define METHODS     4u

extern const double search_recalls[RECALLS], search_shares[SHARES];
extern const char *const search_recall_names[RECALLS], *const search_share_names[SHARES];

// A row of the result. A further build policy of the tree is one more entry.
struct search_method {
    const char *name;
    bool is_tree;
    enum scan_format format;
};
extern const struct search_method search_methods[METHODS];

enum mode { ALONE, TOGETHER, MODES };

struct search_lane {
    const struct data_lane *data; // borrowed
    struct reference reference;
    struct arena scan_arenas[SCAN_FORMATS], tree_arenas[SEEDS_MAX];
    struct scan_keys keys[SCAN_FORMATS];
    struct tree trees[SEEDS_MAX];
};

// One way to ask a method: the tree at an effort, or the scan.
struct setting {
    double effort, recall, share, scanned;
    struct samples us[MODES][2]; // [mode][cold], per query
    bool timed[MODES];
};

struct measured {
    struct setting settings[EFFORTS_MAX]; // [0]: the default
    uint32_t setting_count;
    double pack_us, bytes_per_key; // scans
};

struct search {
    const struct options *options;
    struct data data;
    struct search_lane *lanes;
    uint32_t seeds, budget;
    const struct scan_ops *ops;
    struct scan_stream *stream;
    struct scan_query *prepared;
    struct index_search *context;
    struct arena context_arena;
    struct bandwidth bandwidth;
    // The tree's costs over all lanes and seeds.
    struct tree_costs costs;
    struct tree_latencies latencies;
    struct samples build_us, insert_us;
    double bytes_per_key, fill, moved_per_1000;
    struct measured measured[METHODS];
};

// The cheapest setting (lowest effort) that reaches a recall or a share; NULL: none does.
const struct setting *search_reaching_recall(const struct measured *measured, double recall);
const struct setting *search_reaching_share(const struct measured *measured, double share);

void search_rows(struct search *search, json_t *rows, json_t *ratios, json_t *peers);

// Peers: one process that does a round when told. NULL where Python or a wheel is missing, with a line on stderr.
struct peers;
struct peers *peers_open(const struct search *search);
void peers_round(struct peers *peers, bool cold);
json_t *peers_close(struct peers *peers); // array of rows, the caller's; accepts NULL

#endif
