// A lane: one (sequence, layer, KV head) with its DCI-tree and the frames of its pages. Everything in it belongs to the
// shard that owns the lane; only the atomics are read elsewhere.
#ifndef ICECACHE_CACHED_LANE_H
#define ICECACHE_CACHED_LANE_H

#include "cached/pool.h"
#include "index/index.h"
#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct sequence;
struct shard;

struct lane {
    struct sequence *sequence; // immutable, as the next three
    uint32_t layer, kv_head;
    uint32_t shard;
    bool building;       // memory taken now is the build's, not the running append's
    bool due;            // linked in the shard's list of lanes with clustering to do
    struct index *index; // made at the first append
    void **frames;       // page -> frame, NULL: none
    uint32_t frame_capacity;
    uint32_t *fresh_pages; // pages given a frame by the prepared append
    uint32_t fresh_count, fresh_capacity;
    uint32_t prepared_tokens;
    bool plan_runs;                   // a plan is pending and being carried out:
    uint32_t plan_frames, plan_moves; // so many of its new pages have frames, so many of its moves are done
    struct lane *due_previous, *due_next;
    _Atomic uint64_t indexed; // mirror of index_indexed for statistics
};

// An append's part as the lane sees it: `tokens` packed rows each of K and V, from shared memory that may change
// meanwhile.
struct lane_input {
    const uint8_t *keys, *values;
    size_t stride_bytes; // from one token's row to the next
    uint64_t first;
    uint32_t tokens;
};

// Compares what overlaps with stored tokens, checks and stores the rest. On success the lane holds a prepared append
// (maybe an empty one) until lane_commit or lane_drop. On failure nothing has changed.
ICE_MUST_CHECK ice_status lane_prepare(struct lane *lane, struct shard *shard, const struct lane_input *input);
void lane_commit(struct lane *lane, struct shard *shard);
void lane_drop(struct lane *lane);

// What an append of `tokens` to a lane of `length` takes at most: frames, and bytes of index and tables. A bound from
// how the tree stores keys, tokens and pages (in chunks); a test holds it against what it really takes.
uint64_t lane_promise_frames(const struct sequence *sequence, uint64_t tokens);
uint64_t lane_promise_bytes(const struct sequence *sequence, uint64_t length, uint64_t tokens);

uint64_t lane_length(const struct lane *lane);
// K rows of first .. first+tokens-1 to keys, V rows to values, packed. The positions must exist.
void lane_read(const struct lane *lane, uint64_t first, uint32_t tokens, uint8_t *keys, uint8_t *values);
// One token's K row and, right behind it, its V row. Borrowed until the lane's next change.
const uint8_t *lane_token(const struct lane *lane, struct index_place place);
void lane_destroy(struct lane *lane);

enum lane_work { LANE_IDLE, LANE_MORE, LANE_STALLED };
// One slice of clustering: index work, or copies of a plan. LANE_STALLED: no memory or no frames now.
enum lane_work lane_build(struct lane *lane);

#endif
