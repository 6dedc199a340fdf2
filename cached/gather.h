// Copying chosen tokens to where the worker reads them, when some of their pages are not in memory: what is there is
// copied at once, the missing pages are read in one batch, and each is copied when it comes. A gather holds no page:
// whatever comes into memory is copied in the same task, before anything can evict it, so that any number of gathers
// get through a pool of any size.
#ifndef ICECACHE_CACHED_GATHER_H
#define ICECACHE_CACHED_GATHER_H

#include "cached/lane.h"
#include "gpu/record.h"
#include "index/index.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

// Tokens that one gather waits for at a time. Tokens of one page are anywhere in a sequence: the more are looked at
// together, the less often a page is read.
#define GATHER_BATCH 8192u

struct op_lane;
struct shard;

// The tokens of a plan, by number: positions 0 .. sinks-1, then the selected, then positions window_from on.
struct gather_plan {
    uint32_t sinks;
    uint32_t selected_count;
    const struct index_selected *selected; // borrowed during the call
    uint64_t window_from;                  // a read's first position: sinks and selected_count are 0
    uint32_t window;
    struct record_cell *cell; // entry i: where token i goes; NULL: to slot i
};

// A token and the slot that it goes to.
struct gather_token {
    uint32_t slot, position;
    struct lane *lane; // that the place is in
    struct index_place place;
};

// Its K row and, behind it, its V row; NULL: see lane_token.
static inline const uint8_t *gather_row(const struct gather_token *token, size_t bytes)
{
    return lane_token(token->lane, token->place, bytes);
}

// Puts one token where it belongs; `row` is its K row and, behind it, its V row.
void gather_put(const struct op_lane *part, const struct gather_token *token, const uint8_t *row);
// Starts a gather for a part whose tokens are not all in memory. ICE_OK: it goes on behind this call and ends the part
// by op_lane_finish (perhaps within the call); ICE_INDEX_FULL.
ICE_MUST_CHECK ice_status gather_start(struct op_lane *part, struct shard *shard, const struct gather_plan *plan);
// Goes on with every gather of the shard. Returns when the next one must look at its deadline, UINT64_MAX: none.
uint64_t gather_all(struct shard *shard, uint64_t now_ns);
// The next tokens of a plan that have to be copied, from number *number on, which moves behind them: at most n, fewer
// only at the end.
uint32_t gather_next(const struct op_lane *part, const struct gather_plan *plan, uint32_t *number, uint32_t n,
                     struct gather_token *tokens);
// Are all their pages in memory?
bool gather_is_resident(const struct op_lane *part, const struct gather_plan *plan);

#endif
