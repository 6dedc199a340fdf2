// A stem: a run of tokens, of all layers and KV heads, with their trees and pages. A sequence is a chain of stems. Only
// the last one, its own, is appended to; those before it may be in the chains of other sequences (forks, or attached to
// the same sealed prefix) and change no more, but for clustering, spilling and sleep. So nothing is ever copied for a
// fork: pages, trees and extents belong to one stem, and a sequence that sees only the first of a stem's tokens says so
// in its chain.
//
// The reactor makes stems, holds and lets go of them; lanes belong to their shards.
#ifndef ICECACHE_CACHED_STEM_H
#define ICECACHE_CACHED_STEM_H

#include "cached/budget.h"
#include "cached/completion.h"
#include "cached/extents.h"
#include "cached/lane.h"
#include "cached/pool.h"
#include "cached/task_queue.h"
#include "cached/tenant.h"
#include "proto/wire.h"

struct image;
struct op;
struct prefix_part;
struct sequence;
struct server;
struct stem;

// Walks over the lanes of one stem that one shard owns.
struct stem_walk {
    struct task task;
    struct stem *stem;
    uint32_t next_lane;
};

struct stem {
    // Immutable.
    struct server *server;
    struct tenant *tenant; // its sequences' namespace; NULL: it is not counted
    uint64_t sequence_id;  // that it was made for: for the log
    uint64_t root;         // its lanes' shards are a function of it, the same for all stems of a chain
    uint64_t seed;         // of its trees, likewise
    uint64_t first;        // where it begins in its sequences
    uint32_t depth;        // stems before it
    struct wire_shape shape;
    size_t row_bytes;     // one K or V row
    uint64_t frame_bytes; // a page in memory and, with a disk, in its extent: then a multiple of DISK_ALIGN
    uint32_t lane_count;
    struct lane *lanes; // [layer][kv_head]
    size_t bytes;       // of this allocation, lanes and walks included
    // Of a sealed prefix, held, that its lanes were made from; NULL: none. [lane_count]
    struct image **images;

    // Reactor only.
    uint32_t holds; // chains that it is in
    uint32_t users; // requests in flight on sequences that have it
    bool asleep;    // all of it, and nobody has needed it since
    struct op *sleep_op;
    uint64_t used_ns;            // when a request on it ended
    struct prefix_part *sources; // parts of sealed prefixes that are these tokens
    struct pool_reservation frames_promised;
    struct extents_reservation extents_promised;
    struct reservation index_promised;
    struct tenant_promise quota_promised;
    struct sequence *told; // its last holder, which waits for its end
    struct completion gone;
    struct stem_walk *walks;   // one for each shard: clustering of what is shared,
    struct stem_walk *reapers; // and the end, which must not overtake it: in the walks' flow, where there were some
    bool walked;
    uint32_t walk_flow;

    // Any thread.
    _Atomic bool shared; // no appends come any more
    _Atomic uint32_t reapers_left;
    _Atomic uint64_t page_count;
    _Atomic uint64_t resident; // pages in memory
    _Atomic uint64_t index_bytes;
    _Atomic uint64_t build_ns;
    _Atomic uint32_t lanes_due; // lanes with clustering to do
};

struct stem_mould {
    struct tenant *tenant;
    uint64_t sequence_id, root, seed, first;
    uint32_t depth;
    struct wire_shape shape;
    const uint32_t *anchors;     // of each layer; NULL: those of `like`,
    const struct stem *like;     // or none where that is NULL, too
    struct image *const *images; // of a sealed prefix, which make it shared from the beginning; NULL: none
};

// Memory of a stem of so many lanes without images.
size_t stem_bytes(const struct server *server, uint32_t lane_count);
// A stem that is held once. ICE_INDEX_FULL, ICE_NO_MEMORY.
ICE_MUST_CHECK ice_status stem_create(struct server *server, const struct stem_mould *mould, struct stem **out);
// Of one that no shard has seen yet: gone at once.
void stem_discard(struct stem *stem);
void stem_hold(struct stem *stem);
// One chain less. True where it was the last one: then its lanes are destroyed, and `told` hears of its end by
// sequence_stem_gone.
bool stem_release(struct stem *stem, struct sequence *told);
// Other chains may hold it now, and no appends come any more.
void stem_share(struct stem *stem, const struct sequence *by);

// Room for `pages` that appends will make: extents where there is a disk, which pages can then leave for, frames of the
// pool where not. ICE_SPILL_FULL, ICE_POOL_FULL; nothing has changed then.
ICE_MUST_CHECK ice_status stem_reserve_pages(struct stem *stem, uint64_t pages);
// Gives back what appends were promised and have not taken, of the index's memory too.
void stem_unreserve(struct stem *stem);

static inline struct lane *stem_lane(const struct stem *stem, uint32_t layer, uint32_t kv_head)
{
    return &stem->lanes[(uint64_t)layer * stem->shape.kv_heads + kv_head];
}

// A search scans the tail of each stem, some 300 tokens. The first few of a chain keep theirs when they are shared, so
// that what is sealed is selected from as before; those behind them are clustered to the end, so that a search of a
// long chain does not scan more.
#define STEM_TAILS_MAX 4u
static inline bool stem_is_flushed(const struct stem *stem)
{
    return stem->depth >= STEM_TAILS_MAX && atomic_load_explicit(&stem->shared, memory_order_relaxed);
}

// How many of the stem's tokens, from its first on, no search of a layer scans: the fewest over its heads.
uint64_t stem_indexed(const struct stem *stem, uint32_t layer);

#endif
