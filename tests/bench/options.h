// The command line of icecache-bench.
#ifndef ICECACHE_BENCH_OPTIONS_H
#define ICECACHE_BENCH_OPTIONS_H

#include "data.h"

#include <stdbool.h>
#include <stdint.h>

#define OPTIONS_LIST_MAX          16u
#define OPTIONS_MIX_WORKERS_MAX   64u
#define OPTIONS_MIX_SEQUENCES_MAX 128u

enum { EXIT_CHECK = 1, EXIT_USAGE = 2, EXIT_MISSING = 3 };

struct option_list {
    uint32_t count;
    uint32_t values[OPTIONS_LIST_MAX];
};

// Where workers of serve have their landings. Automatic: push, else pull, else host memory.
enum option_place { PLACE_HOST, PLACE_PULL, PLACE_PUSH, PLACE_AUTO, PLACES };
extern const char *const option_place_names[PLACES];

// How workers of serve and the daemon talk, as enum ice_transport.
enum option_transport { TRANSPORT_AUTO, TRANSPORT_ZMQ, TRANSPORT_RING, TRANSPORTS };
extern const char *const option_transport_names[TRANSPORTS];

// What serve's workers hint at before a retrieve of the layer behind: nothing; that layer with this layer's queries,
// with its own of the step before, or with those that will be asked, as if they were known.
enum option_hint { HINT_NONE, HINT_LAYER, HINT_STEP, HINT_EXACT, HINTS };
extern const char *const option_hint_names[HINTS];

struct option_shares {
    uint32_t count;
    double values[OPTIONS_LIST_MAX + 1];
};

// Of a model.
struct options_shape {
    const char *name;
    uint32_t layers, kv_heads, query_heads, head_dim; // query heads of one KV head
};

struct options {
    const char *command;
    bool json, peers;
    uint64_t seed;
    uint32_t rounds, queries, seeds;
    double insert_share; // search: of the tokens, inserted one by one after the build
    const char *traces[OPTIONS_LIST_MAX];
    uint32_t trace_count;
    bool kinds[2];    // by enum data_kind
    bool policies[2]; // of trees, by enum index_policy
    struct option_list tokens, head_dims, query_heads, budgets, cores;
    const char *shape, *python;
    uint32_t sinks, window, copies;
    const char *folder; // spill, serve: where its folder is made; NULL: TMPDIR or here
    uint64_t bytes;     // spill: of the file, at least page_bytes
    uint32_t page_bytes;
    double seconds; // spill, serve: of one measurement
    struct option_list depths;
    struct option_list workers; // serve: processes
    struct option_list places;  // serve: each once
    uint32_t transport;         // serve: enum option_transport
    uint32_t steps;             // serve: of a round; 0: as many as the seconds allow
    uint32_t build_tokens;      // serve: of a sequence of the builder; 0: the default
    uint32_t mix_workers;       // serve: 0: none
    uint32_t mix_sequences;     // of each
    uint32_t mix_steps;         // of each worker
    uint32_t idle;              // serve: idle sequences; 0: none
    bool mix_given, idle_given;
    struct option_shares ram_caps; // serve: 1 first, then what was asked for; none: no cap
    struct option_list hints;      // serve, with ram_caps: enum option_hint, each once
    uint32_t think_us;             // serve: between two retrieves of a worker
    const char *daemon;            // serve: NULL: beside this program
    bool pages;                    // step: with the gather of K and V, which needs their memory
};

// Fills *options. Returns 0, or the exit code after a message on stderr; -1: nothing to do (help was printed).
int options_parse(struct options *options, int argc, char **argv);

const struct options_shape *options_shape(const struct options *options);

#endif
