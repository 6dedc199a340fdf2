// What the `search` command knows of one data set: its lanes with their trees and scans, and what was measured.
// Private to search.c, search_judge.c, search_row.c and peers.c.
#ifndef ICECACHE_BENCH_SEARCH_H
#define ICECACHE_BENCH_SEARCH_H

#include "measure.h"
#include "options.h"
#include "reference.h"
#include "scan.h"
#include "tree.h"

#include <jansson.h>
#include <stdbool.h>

#define SEEDS_MAX       16u
#define EFFORTS_MAX     32u
#define RECALLS         4u
#define SHARES          3u
#define COVERAGES       3u
#define COVERAGE_BUDGET 1024u // tokens that a question with a coverage target may have
#define METHODS         5u

extern const double search_recalls[RECALLS], search_shares[SHARES], search_coverages[COVERAGES];
extern const char *const search_recall_names[RECALLS], *const search_share_names[SHARES],
                                                           *const search_coverage_names[COVERAGES];

// A row of the result.
struct search_method {
    const char *name;
    bool is_tree;
    enum index_policy policy; // of a tree
    enum scan_format format;  // of a scan
};
extern const struct search_method search_methods[METHODS];

enum mode { ALONE, TOGETHER, MODES };

struct search_lane {
    const struct data_lane *data; // borrowed
    struct reference reference;
    struct arena scan_arenas[SCAN_FORMATS], tree_arenas[TREE_POLICIES][SEEDS_MAX];
    struct scan_keys keys[SCAN_FORMATS];
    struct tree trees[TREE_POLICIES][SEEDS_MAX];
};

// One way to ask a method: the tree at an effort (0: its default), or the scan.
struct setting {
    double effort, recall, share, scanned;
    double error, error_size;    // of the estimated mass: mean, and mean of the absolute values
    struct samples us[MODES][2]; // [mode][cold], per query
    bool timed[MODES];
};

struct measured {
    struct setting settings[EFFORTS_MAX]; // [0]: the default
    uint32_t setting_count;
    double bytes_per_key;
    double pack_us; // scans
    // Trees: over all lanes and seeds.
    struct samples build_us, insert_us;
    struct tree_latencies latencies;
    double fill, moved_per_1000, behind;
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
    struct arena context_arena, row_arena;
    struct bandwidth bandwidth;
    struct measured measured[METHODS];
};

// ---- search.c ----
bool search_is_asked_for(const struct search *search, uint32_t method);

// ---- search_judge.c: what the answers are worth ----
struct tree_question search_question(const struct search *search, uint32_t query, enum mode mode, double effort);
struct asked;
// One question to one method. Copies the answer out only where `asked` wants it. False when the index refuses.
bool search_ask(struct search *search, const struct search_lane *lane, const struct search_method *method,
                uint32_t seed, const struct tree_question *question, struct asked *asked);
// Judges all settings and marks those that are worth timing.
bool search_judge(struct search *search);
// The lowest effort that reaches a recall or a share; NULL: none does.
const struct setting *search_reaching_recall(const struct measured *measured, double recall);
const struct setting *search_reaching_share(const struct measured *measured, double share);
// The masses by budget of a tree's default effort, token by token and in pages, beside what was possible.
json_t *search_masses(struct search *search, const struct search_method *method, uint32_t budget);
// What questions with a coverage target gave, of those where COVERAGE_BUDGET tokens can reach it.
json_t *search_coverage(struct search *search, const struct search_method *method, double target);

// ---- search_row.c ----
void search_rows(struct search *search, json_t *rows, json_t *ratios, json_t *peers);

// ---- peers.c ----
// One process that does a round when told. NULL where Python or a wheel is missing, with a line on stderr.
struct peers;
struct peers *peers_open(const struct search *search);
void peers_round(struct peers *peers, bool cold);
json_t *peers_close(struct peers *peers); // array of rows, the caller's; accepts NULL

#endif
