// icecache-replay: plays a trace through libicecache as an engine would, and says how good the selections were.
//
// First everything that an engine does, timed: append the prompt, wait for the index, decode step by step. What was
// selected is kept, and compared with full attention afterwards, so that no checking disturbs the timing.
#ifndef ICECACHE_EXAMPLES_REPLAY_H
#define ICECACHE_EXAMPLES_REPLAY_H

#include "trace.h"

#include "icecache.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define REPLAY_BUDGETS_MAX 8u

enum replay_exit { REPLAY_OK = 0, REPLAY_FAILED = 1, REPLAY_USAGE = 2, REPLAY_NO_DAEMON = 3 };

struct replay_options {
    const char *socket_directory; // NULL: the library's default
    const char *trace_folder;
    const char *name;
    uint32_t budgets[REPLAY_BUDGETS_MAX]; // ascending
    uint32_t budget_count;
    uint32_t sinks, window;
    uint32_t steps; // 0: all of the trace
    bool exact, json, progress;
};

// What is learned about one budget, over all layers, heads and steps.
struct replay_row {
    uint32_t budget;
    double p50_us, p99_us; // of one retrieve (one layer), measured here
    double mass;           // attention mass of what is in the landing
    double share;          // mass of the chosen tokens over that of the exact shared best
    double output_error;   // |o - o_full| / |o_full|, mean
    double estimated_mass; // what the daemon believed `mass` to be
    uint64_t bytes_moved;
    uint64_t partial; // retrieves that the deadline cut short
};

struct replay {
    const struct replay_options *options;
    struct trace trace;
    uint32_t steps, slots;
    float scale;
    ice_client *client;
    ice_landing *landing;
    ice_sequence *sequence;
    // Kept per (step, layer, budget); see replay_cell.
    uint32_t *counts;                      // [cell][kv_head]
    uint32_t *positions;                   // [cell][kv_head][slot]
    float *outputs;                        // [cell][query_head][head_dim], attention over the landing
    float *latencies_us;                   // [budget][step * layers + layer]
    uint64_t wrong_rows;                   // landing rows whose bytes are not those of their position
    double append_s, ready_s, build_cpu_s; // client's time in append; until the index was idle; daemon's work
    uint64_t pool_bytes, index_bytes;
    struct replay_row rows[REPLAY_BUDGETS_MAX];
};

static inline size_t replay_cell(const struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index)
{
    return ((size_t)step * replay->trace.layers + layer) * replay->options->budget_count + budget_index;
}

// Fills *options from the command line; an enum replay_exit, or -1 to go on.
int replay_options_parse(struct replay_options *options, int argc, char **argv);

// The functions below return an enum replay_exit and have printed what went wrong when it is not REPLAY_OK.
// Connects and opens landing and sequence.
int replay_connect(struct replay *replay);
// Appends the prompt and waits until no clustering is due.
int replay_prefill(struct replay *replay);
// All decode steps, keeping what was selected.
int replay_decode(struct replay *replay);
// Fills in the rows' quality by full attention over the trace.
int replay_measure(struct replay *replay);
// All decode steps with everything selected: every bit must be as in the trace.
int replay_exact(struct replay *replay);

// One retrieve of one step and layer into the landing's row budget_index; the first budget of a step appends the
// step's K and V. *elapsed_us is the client's time.
int replay_retrieve(struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index,
                    struct ice_retrieve_result *result, double *elapsed_us);

void replay_print_table(const struct replay *replay);
void replay_print_json(const struct replay *replay);

double replay_now_s(void);
// One line on stderr, where --progress is given.
void replay_progress(const struct replay *replay, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Prints "icecache-replay: NAME: what: status: the error's own text" and returns the exit code for the status.
int replay_fail(const struct replay *replay, const char *what, ice_status status);

#endif
