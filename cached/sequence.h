// A sequence: identity, shape, lanes, and the order of the requests on it.
//
// The reactor owns all of it except the lanes' insides (their shards) and the atomics. Requests on a sequence are
// admitted in the order in which they came: any number of readers, or one writer.
#ifndef ICECACHE_CACHED_SEQUENCE_H
#define ICECACHE_CACHED_SEQUENCE_H

#include "cached/budget.h"
#include "cached/completion.h"
#include "cached/lane.h"
#include "cached/prefix.h"
#include "cached/task_queue.h"
#include "cached/tenant.h"
#include "proto/limits.h"
#include "proto/wire.h"

struct op;
struct server;
struct session;

// One request's place in a sequence's order.
struct admission {
    struct op *op;
    struct sequence *sequence;
    struct admission *next; // among the waiting
    bool exclusive;
};

// Destroys the lanes of one sequence that one shard owns.
struct sequence_reaper {
    struct task task;
    struct sequence *sequence;
    uint32_t next_lane;
};

struct sequence {
    // Immutable.
    uint64_t id;
    struct server *server;
    struct session *session;
    struct tenant *tenant;           // its namespace, which counts what it takes
    struct prefix_identity identity; // namespace, model, ranks, shape as a sealed prefix has them
    struct wire_shape shape;
    float scale;
    uint64_t tokens_max;
    uint64_t seed;            // of its trees
    uint64_t attached_tokens; // the sealed prefix it began with
    size_t row_bytes;         // one K or V row
    uint64_t frame_bytes;     // a page in memory and, with a disk, in its extent: then a multiple of DISK_ALIGN
    uint32_t lane_count;
    struct lane *lanes; // [layer][kv_head]
    size_t bytes;       // of this allocation, lanes and reapers included

    // Reactor only.
    uint64_t *lengths; // per layer, what has been committed
    bool closing;
    uint32_t readers;
    bool writer;
    struct admission *waiting, *waiting_tail;
    uint64_t retrieves, appended_tokens;
    struct sequence *hash_next, *session_next;
    struct pool_reservation frames_promised;
    struct extents_reservation extents_promised;
    struct reservation index_promised;
    struct tenant_promise quota_promised;
    struct completion closed;
    struct sequence_reaper *reapers; // one per shard
    struct prefix *prefix;           // that it was attached to; NULL: none
    struct op *sleep_op;             // it is falling asleep
    uint64_t opened_ns;
    uint64_t used_ns;    // when a request on it ended
    bool asleep;         // all of it, and nobody has needed it since
    struct op *close_op; // made with the sequence, so that closing never needs memory

    // Any thread.
    _Atomic uint32_t reapers_left;
    _Atomic uint64_t page_count;
    _Atomic uint64_t resident; // pages in memory
    _Atomic uint64_t index_bytes;
    _Atomic uint64_t build_ns;
    _Atomic uint32_t lanes_due; // lanes with clustering to do
};

static inline struct lane *sequence_lane(struct sequence *sequence, uint32_t layer, uint32_t kv_head)
{
    return &sequence->lanes[(uint64_t)layer * sequence->shape.kv_heads + kv_head];
}

// Does the layer take the selections of another one?
static inline bool sequence_follows(const struct sequence *sequence, uint32_t layer)
{
    return sequence->lanes[(uint64_t)layer * sequence->shape.kv_heads].anchor != layer;
}

// Makes a sequence for a validated message and links it to the session and the server. ICE_LIMIT, ICE_QUOTA,
// ICE_INDEX_FULL, ICE_NO_MEMORY; text (TENANT_TEXT_BYTES) says more, or is left as it is.
ICE_MUST_CHECK ice_status sequence_open(struct server *server, struct session *session,
                                        const Icecache__Wire__SequenceOpen *message, char *text, struct sequence **out);
// NULL where the session has no such sequence, or it is being closed.
struct sequence *sequence_find(struct server *server, const struct session *session, uint64_t id);
// Hands every lane to its shard for destruction; the sequence frees itself when they are done, then calls back.
void sequence_destroy_lanes(struct sequence *sequence);
// Room for `pages` that appends will make: extents where there is a disk, which pages can then leave for, frames of the
// pool where not. ICE_SPILL_FULL, ICE_POOL_FULL; nothing has changed then.
ICE_MUST_CHECK ice_status sequence_reserve_pages(struct sequence *sequence, uint64_t pages);
// Gives back what appends were promised and have not taken, of the index's memory too.
void sequence_unreserve(struct sequence *sequence);
uint64_t sequence_length(const struct sequence *sequence, uint32_t layer, uint32_t layers); // shortest of the layers
uint64_t sequence_indexed(const struct sequence *sequence, uint32_t layer);                 // smallest over its heads

#endif
