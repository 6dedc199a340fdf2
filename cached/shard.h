// A shard: a thread that owns lanes. It runs decode work before bulk before admin, and clusters lanes in slices when
// there is nothing else to do.
#ifndef ICECACHE_CACHED_SHARD_H
#define ICECACHE_CACHED_SHARD_H

#include "cached/arena.h"
#include "cached/image.h"
#include "cached/lane.h"
#include "cached/task_queue.h"
#include "cached/tier.h"

#include <pthread.h>

struct gather;
struct op_lane;
struct server;

// A search, and the queries that it looks at until its end.
struct search_room {
    struct index_search *search;
    float *queries; // one lane's
    size_t queries_bytes;
};

#define SHARD_SEARCHES_CUT_MAX 8u // at one time; one more runs to its end

struct shard {
    struct server *server; // immutable
    uint32_t index;
    pthread_t thread;
    struct task_queue queue; // any thread

    // The shard's thread only.
    struct arena arena;                               // of its lanes' indexes
    struct search_room now;                           // what searches use
    struct search_room spare[SHARD_SEARCHES_CUT_MAX]; // while others are cut
    uint32_t spare_count, spare_made;
    uint32_t *record; // scratch: planning what goes to which slot
    size_t record_bytes;
    struct index_selected *followed; // scratch: what a layer takes over from its anchor
    size_t followed_bytes;
    struct index_selected *kept; // scratch: a selection that keeps some of the last one
    size_t kept_bytes;
    struct index_place *places; // scratch of an append
    size_t places_bytes;
    struct lane *due_head, *due_tail; // lanes with clustering to do
    uint32_t tasks_since_slice;       // while some had
    bool stalled;                     // a lane got no memory, or has to wait for others: the due lanes rest
    uint64_t stalled_until_ns;
    struct tier tier;
    struct gather *gathers, *gathers_tail; // wait for pages, in the order in which they came
    struct op_lane *parked, *parked_tail;  // wait for pages or for room, likewise
    bool woken;                            // pages have come or room has been made since those were looked at
    struct images images;
    bool images_due;        // something of them may go on
    uint64_t look_again_ns; // the earliest of their deadlines
    uint64_t looked_ns;     // when they were looked at last
};

// 0 or -errno. init makes a shard without a thread, whose rounds somebody else calls.
int shard_init(struct server *server, struct shard *shard, uint32_t index);
int shard_start(struct server *server, struct shard *shard, uint32_t index);
// What the thread does over and over: goes on with what waits, then runs one task or a slice of clustering. False: the
// queue is empty and stopped.
bool shard_round(struct shard *shard, bool may_wait);
void shard_stop(struct shard *shard); // runs what is queued, joins
void shard_fini(struct shard *shard); // after all I/O has ended
// Shard thread: the search in progress becomes the part's, so that others can search before it goes on. False: it
// cannot. shard_search_resume makes it the shard's again.
bool shard_search_cut(struct shard *shard, struct op_lane *part);
void shard_search_resume(struct shard *shard, struct op_lane *part);
// Shard thread: the lane may have clustering to do.
void shard_lane_due(struct shard *shard, struct lane *lane);
void shard_lane_forget(struct shard *shard, struct lane *lane);
// Shard thread: a plan of the lane has waited and can be committed now: it is the next slice, before any other task.
void shard_commit_soon(struct shard *shard, struct lane *lane);
// Shard thread: what waits for pages or room may go on.
void shard_wake(struct shard *shard);
// Shard thread: what waits is looked at again at this time at the latest.
void shard_look_again(struct shard *shard, uint64_t at_ns);
// Shard thread: scratch of at least `bytes`, kept between calls; NULL when there is no memory.
void *shard_scratch(struct shard *shard, void **memory, size_t *held_bytes, size_t bytes);

#endif
