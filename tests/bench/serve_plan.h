// What a worker of a mixed load does, drawn from a seed: sequences arrive, as new ones or as forks, are prefilled in
// chunks, decode together, and go. The same seed and parameters give the same operations.
//
// Thread-safety: none; a plan belongs to its caller.
#ifndef ICECACHE_BENCH_SERVE_PLAN_H
#define ICECACHE_BENCH_SERVE_PLAN_H

#include "random.h"

#include <stdbool.h>
#include <stdint.h>

#define PLAN_SEQUENCES_MAX 128u
#define PLAN_BLOCK         16u // forks begin at multiples of it

enum plan_kind {
    PLAN_OPEN,     // `sequence` has begun, empty
    PLAN_FORK,     // `sequence` has begun with the first `count` tokens of `from`
    PLAN_APPEND,   // `count` tokens at `first`
    PLAN_RETRIEVE, // a decode step of `list[count]`, all layers
    PLAN_INFO,     // of `sequence`
    PLAN_CLOSE,
    PLAN_KINDS
};

struct plan_params {
    uint64_t seed;
    uint32_t sequences, steps;          // at once; in all
    uint32_t prompt_least, prompt_most; // tokens
    uint32_t chunk;                     // most tokens of a prefill append
    uint32_t decode_least, decode_most; // steps of a sequence
};

struct plan_op {
    enum plan_kind kind;
    uint32_t sequence, from;
    uint32_t first, count;
    const uint32_t *list; // borrowed until the next call
};

enum plan_state { PLAN_ABSENT, PLAN_PREFILLING, PLAN_DECODING };
struct plan_sequence {
    enum plan_state state;
    uint32_t length, prompt, left; // tokens, of the prompt; decode steps to do
};

struct plan {
    struct plan_params params;
    struct random random;
    struct plan_sequence sequences[PLAN_SEQUENCES_MAX];
    uint32_t list[PLAN_SEQUENCES_MAX];
    uint32_t step, at; // at: next sequence of this step
};

// The longest that a sequence becomes.
uint32_t plan_length_most(const struct plan_params *params);
// At most PLAN_SEQUENCES_MAX sequences, least <= most, all but the seed at least 1.
void plan_init(struct plan *plan, const struct plan_params *params);
// False at the end, when every sequence that came has gone.
bool plan_next(struct plan *plan, struct plan_op *op);

#endif
