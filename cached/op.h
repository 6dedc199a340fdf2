// An operation: one request on its way through the daemon.
//
//   received (reactor) -> admitted by all its sequences (reactor) -> phases on the shards of its lanes -> done
//   (reactor)
//
// Phases: APPEND and TRUNCATE = prepare, then commit or drop; RETRIEVE = search, or prepare, then commit and search, or
// drop; READ = read; SEAL and SLEEP = save; WAKE = wake; HINT = hint; FORK has none. The shard that finishes a phase
// last starts the next one; the last phase's last shard hands the op to the reactor, or to the copier of a GPU, which
// does so when the selections are there.
#ifndef ICECACHE_CACHED_OP_H
#define ICECACHE_CACHED_OP_H

#include "cached/completion.h"
#include "cached/env.h"
#include "cached/sequence.h"
#include "cached/session.h"
#include "cached/shard.h"
#include "cached/task_queue.h"
#include "gpu/driver.h"
#include "gpu/record.h"
#include "proto/wire.h"

enum op_kind { OP_APPEND, OP_RETRIEVE, OP_READ, OP_CLOSE, OP_SEAL, OP_SLEEP, OP_WAKE, OP_FORK, OP_TRUNCATE, OP_HINT };
enum op_phase { PHASE_PREPARE, PHASE_COMMIT, PHASE_DROP, PHASE_SEARCH, PHASE_READ, PHASE_SAVE, PHASE_WAKE, PHASE_HINT };

// One lane's part of an op, and what came of it. Written by the lane's shard, read by the reactor when the op is done.
struct op_lane {
    struct task task;
    struct op *op;
    struct lane *lane;
    struct admission *admission; // the sequence's place in the op
    uint32_t sequence_index;     // in the request
    uint32_t layer_index;        // in the request
    bool prepared;
    bool known;           // of a sealing: there is an image of it
    uint32_t compared;    // of a prepare that waits: so many repeated tokens are known to be equal
    struct lane *awaited; // the lane that it waits for while that wakes
    bool partial;
    bool searched;       // not where the last selection is kept as it is, or an anchor's is taken
    bool late;           // the deadline had passed before the search: the last selection is given again, a hint is none
    uint32_t wished;     // of a hint: pages that it has asked for
    uint32_t read;       // tokens of a read that are in the staging
    uint32_t count;      // slots filled
    uint32_t changed;    // tokens that the landing did not hold before
    uint32_t moved;      // tokens that were copied
    uint32_t *positions; // of the slots, where the worker asked for them in the reply
    float mass;
    uint64_t indexed, version;
    uint64_t begun_ns, search_ns, fetch_ns, copy_ns, searched_ns;
    struct search_room cut;      // the search that has been cut; empty: none
    uint64_t cut_ns;             // when
    struct image *image;         // of PHASE_SAVE
    struct op_lane *parked_next; // waits for pages or for room (shard->parked)
    uint64_t parked_until_ns;    // 0: has not waited in this phase
};

struct op {
    // Immutable once admitted.
    enum op_kind kind;
    size_t bytes; // of this allocation
    struct server *server;
    struct session *session; // held
    uint64_t request_id;
    uint8_t route[256];
    size_t route_bytes;
    uint64_t received_ns, deadline_ns;
    struct env_message message; // frame 2 of a retrieve or hint, held until the op is done
    uint32_t layer, layers;
    uint64_t first; // append, read; fork, truncate: where to cut
    uint32_t tokens;
    uint64_t reserve_tokens;
    uint64_t staging_offset;
    bool token_major;        // append: how the staging is laid out
    struct landing *landing; // held
    uint32_t queries, query_dtype, budget, sinks, window;
    uint32_t keep; // of the last selection, so many stay selected
    bool holds_ends, append, page_wise;
    bool follows; // the layer takes its anchor's selection: there are no queries
    bool resend;  // nothing of the selection is taken to be in the landing
    float coverage;
    uint64_t signal; // for the rows' timeline words; 0: none
    uint32_t sequence_count;
    struct admission *admissions; // [sequence_count]
    uint32_t *rows;               // [sequence_count]
    uint64_t *first_queries;      // [sequence_count]
    uint32_t lane_count;
    struct op_lane *lanes;
    uint32_t *positions; // [lane][slots_max], NULL: not asked for
    size_t positions_bytes;
    size_t held_bytes; // this op, its positions and its message, as the session counts them
    uint32_t slots_max;
    uint32_t blocks; // seal: hashes in the message's second frame

    // Reactor only.
    struct op *session_previous, *session_next; // in flight
    uint32_t admissions_missing;
    bool rows_taken;
    struct op *room_next; // waits for room on the disk (server->room_waiting)
    size_t lanes_bytes;   // of lanes, where they have memory of their own
    uint64_t idle_ns;     // sleep: for how long stems have not been used that it is about
    bool on_stems;        // counted as a user of its sequences' stems
    uint64_t forked_id;   // fork: what has come of it
    uint64_t prefix_id;   // seal: likewise
    bool prefix_known;
    struct completion completion;

    // The copier of the landing's GPU, after the last phase.
    struct task copy_task;
    uint64_t pushed_ns, push_ns;     // when the copies were issued, how long they took
    char copy_text[CUDA_TEXT_BYTES]; // why they failed

    // Shards, in phases.
    enum op_phase phase;
    _Atomic uint32_t lanes_left;
    _Atomic bool cancelled;   // the session has ended: be quick
    _Atomic uint32_t failure; // ice_status of the first lane that failed
    struct op_lane *failed;   // that lane; written once, by the one that set failure
};

// Makes an op for a validated message, or sends the error reply and answers NULL. The op owns `message` then.
struct op *op_create(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                     struct env_message *message);
// Enters the queues of its sequences; starts at once where nothing is in the way.
void op_submit(struct op *op);
// A close op without a request behind it where request is NULL (the session has ended).
void op_close_sequence(struct server *server, struct sequence *sequence, const Icecache__Wire__Request *request,
                       const struct env_message *message);
// Asks the shards to be quick with everything that a dead session has in flight.
void op_cancel_all(struct session *session);
// Links an op to its session, which it holds from now on; unlinks it.
void op_attach(struct op *op, struct session *session);
void op_detach(struct op *op);
// The lane of a stem, of the same layer and head as the part's.
static inline struct lane *op_lane_in(const struct op_lane *part, const struct stem *stem)
{
    return stem_lane(stem, part->lane->layer, part->lane->kv_head);
}
// The lane that a position of the part's sequence lies in.
static inline struct lane *op_lane_at(const struct op_lane *part, uint64_t position)
{
    return op_lane_in(part, sequence_stem_at(part->admission->sequence, position));
}
// No lane that the part looks at falls asleep between the two; with a cut search no plan of one is committed either.
void op_lane_hold(const struct op_lane *part);
void op_lane_release(const struct op_lane *part);
void op_lane_hold_cut(const struct op_lane *part);
void op_lane_release_cut(const struct op_lane *part, struct shard *shard);
// The op no longer counts as a user of its sequences' stems: before their chains change, and at its end.
void op_leave_stems(struct op *op);
// Is the stem among what a sealing of the op's tokens is about? Where a sealed prefix knows its images they are not
// written again; it is only looked whether the stem can be read.
bool op_seal_concerns(const struct op *op, const struct stem *stem);
struct image *op_seal_known(const struct stem *stem, uint32_t lane); // held; NULL: to be written
// The images of the op's lanes are from now on those of a prefix's parts.
void op_fill_parts(struct op *op, struct prefix *prefix);
// Whoever is attached to the prefix shares the sequence's stems, from now on the own one as well, where it can be.
void op_share_stems(struct op *op, struct prefix *prefix);
// Gives back what an op holds that was made and has not been attached.
void op_discard(struct op *op);
// Sealing (op_prefix.c): what depends on the sequence's state; whether nothing need be done; what follows the lanes.
ICE_MUST_CHECK ice_status op_check_seal(struct op *op, char *text, size_t capacity);
bool op_seal_is_known(struct op *op);
void op_sealed_lanes(struct op *op, ice_status status, const char *text);
// What has waited for room on the disk begins again.
void op_retry_waiting(struct server *server);
// The stems of a sequence that nobody has used for so long fall asleep, lane by lane, unless a request comes.
void op_sleep_sequence(struct server *server, struct sequence *sequence, uint64_t idle_ns);
// Lets all lanes of a sequence's sleeping stems begin to wake, where some sleep.
void op_wake_sequence(struct server *server, struct sequence *sequence);
// What a retrieve took and moved, over its lanes: the phases in parallel, so the slowest lane's. Done ops only.
struct op_totals {
    uint64_t queue_ns, search_ns, fetch_ns, copy_ns, bytes_moved;
    bool partial;
};
struct op_totals op_totals(const struct op *op);
// Tells a worker's GPU that waits for a retrieve that it is over, however: what the retrieve leaves is there. Any
// thread, also twice, until the reply is sent. The second: of a retrieve that was refused before there was an op.
void op_signal(const struct op *op);
void op_signal_refused(struct session *session, const Icecache__Wire__Request *request);
// Reactor: ends an op: reply, statistics, next in the queues.
void op_finish(struct op *op, ice_status status, const char *text);
// What sequence i of a retrieve takes over from its anchor's selection: the entries that are neither sinks nor in the
// window of this retrieve, which lie side by side.
struct op_followed {
    const struct record_entry *entries;
    uint32_t count;
};
struct op_followed op_follow(const struct op *op, uint32_t i, const struct record_cell *anchor);
// Shards (op_phase.c).
void op_lane_run(struct task *task, void *shard);
// Goes on with every part of the shard that waits for pages or room. Returns when the next one's time is up.
uint64_t op_lane_run_parked(struct shard *shard, uint64_t now_ns);
// What a dead session has in flight is only finished as far as the lane needs it: nobody waits for the answer, but the
// session's memory waits for its requests. LANE_WAITS: a prepare is to be tried again, or a gather finishes the part.
ICE_MUST_CHECK ice_status op_lane_phase(struct op_lane *part, struct shard *shard);
// The queries of the lane's head, [query][head of the group][head_dim] floats, in the shard's scratch for the search in
// progress. NULL: no memory.
float *op_lane_queries(const struct op_lane *part, struct shard *shard);
// The selection is in its slots: the worker may see it. *spent_ns: what it has taken since it was known.
void op_lane_end_copy(struct op_lane *part, uint64_t *spent_ns);
// Ends a part whose gather is over.
void op_lane_finish(struct op_lane *part, struct shard *shard, ice_status status);
void op_start_phase(struct op *op, enum op_phase phase);
void op_done_without_lanes(struct op *op); // reactor: the end of an op that had nothing to do on shards

#endif
