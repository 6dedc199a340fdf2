// How a sequence of the mixed load begins with another one's tokens.
#ifndef ICECACHE_BENCH_SERVE_FORK_H
#define ICECACHE_BENCH_SERVE_FORK_H

#include "client/icecache.h"

// What serve_fork is made of, for rows.
extern const char *const serve_fork_way;

struct serve_fork_source {
    ice_client *client;
    ice_sequence *sequence;                     // has at least `tokens` tokens in all layers
    const struct ice_sequence_options *options; // that it was opened with
    const uint32_t *token_ids;                  // [tokens]: which they are
    uint32_t tokens;                            // of the fork, a multiple of block_tokens (16)
};
// *out has the first tokens and is the caller's. The error's text is in ice_last_error.
ice_status serve_fork(const struct serve_fork_source *source, uint64_t deadline_us, ice_sequence **out);

#endif
