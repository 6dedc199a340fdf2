// The spill tier as a shard sees it: which of its pages are in memory, which leave it for the disk, which come back.
//
// Every page has an extent of the data file from the moment it is made, so that it can always be written out; the pool
// is a cache of the pages. A page in memory is clean (its extent holds the same bytes, known by a checksum) or dirty.
// What leaves memory is chosen by SIEVE (Zhang et al., NSDI 2024): pages stand in the order in which they came, a hand
// walks from the oldest to the newest, passes over those that were used since it came by last and takes the first that
// was not. A page that is clean goes at once, a dirty one is written first and goes when it is still unused then.
//
// All of it belongs to the shard's thread, except what I/O threads hand in (`done`).
#ifndef ICECACHE_CACHED_TIER_H
#define ICECACHE_CACHED_TIER_H

#include "cached/disk.h"
#include "cached/extents.h"
#include "cached/pool.h"
#include "cached/task_queue.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define TIER_IO_MAX     256u  // pages of a shard on their way to or from the disk
#define TIER_WRITES_MAX 128u  // of them, so that reads always find some
#define TIER_AHEAD_MAX  32u   // pages that are read ahead after one retrieve of a lane
#define TIER_EARLY_MAX  128u  // pages on their way beyond which nothing is read before it is asked for
#define TIER_WISHES_MAX 1024u // pages that hints have named and whose reading has not begun
#define TIER_SCAN_MAX   1024u // pages that one call looks at for something to evict: 0.1 to 0.2 ms
#define TIER_ROUND_MAX  8192u // that one round of the shard looks at, over all its calls

struct lane;
struct server;
struct shard;

// One page of a lane.
struct page {
    uint8_t *memory;   // NULL: not in memory
    uint64_t checksum; // of what the extent holds; clean pages only
    uint32_t extent;   // EXTENT_NONE: none, the memory is the only place
    uint16_t flags;    // enum page_flag
    uint8_t visited;   // used since the hand came by
};

enum page_flag {
    PAGE_USED = 1,     // the index has given out its number
    PAGE_CLEAN = 2,    // the extent holds the page
    PAGE_READING = 4,  // on its way into memory
    PAGE_WRITING = 8,  // on its way to its extent
    PAGE_CHANGED = 16, // since the writing began
    PAGE_LOST = 32,    // its extent cannot be read, or holds something else
    PAGE_AHEAD = 64,   // read before anybody asked for it, and not asked for yet
    PAGE_HINTED = 128, // likewise, because of a hint
    PAGE_WISHED = 256, // stands among the shard's wishes
};

// Pages that were read before anybody asked for them, of late: does that pay?
struct tier_bets {
    uint16_t used, wasted;
    uint16_t skipped; // bets that were not made since it does not
};

// A page that a hint has named.
struct tier_wish {
    struct lane *lane; // NULL: it is gone
    uint32_t page;
};

// A place of the pool in the order of its shard. One for each EXTENT_UNIT of the pool, of which a frame uses its first.
struct tier_book {
    struct lane *lane; // the owner's, as the rest
    uint32_t page;
    uint32_t older, newer;  // TIER_NONE at the ends
    _Atomic uint32_t owner; // 1 + the shard in whose order it is, 0: none; any thread reads it
};
#define TIER_NONE UINT32_MAX

// A page on its way, its memory in the request.
struct page_io {
    struct disk_request request;
    struct page_io *next; // among the free, or the done
    struct shard *shard;
    struct lane *lane; // NULL: the page is gone
    uint32_t page, extent;
    uint64_t checksum; // wanted, or written
    bool matches;      // what was read
};

struct tier {
    uint32_t oldest, newest, hand; // books
    uint32_t count;                // of pages in the order
    uint32_t looked_at;            // pages in this round of the shard
    bool balances;                 // keeps evicting until enough is free
    struct page_io *ios;           // [TIER_IO_MAX]
    struct page_io *free_ios;
    uint32_t in_flight, writes; // ios in use; those that write
    struct tier_bets ahead;
    struct tier_wish *wishes; // [TIER_WISHES_MAX], a ring
    uint32_t wish_first, wish_count;
    struct disk_request *asked; // a chain that the disk does not have yet
    bool urgent;                // what is read now is what a retrieve waits for
    bool starved;               // something waits for room; look again soon
    struct task done_task, relief_task;
    _Atomic bool relief_asked;
    pthread_mutex_t lock;
    struct page_io *done; // guarded by lock
};

// Counters of the whole tier. Any thread, relaxed.
struct tier_stats {
    _Atomic uint64_t pages_read, pages_written, pages_evicted, pages_lost, write_errors;
    _Atomic uint64_t resident;                        // pages in memory
    _Atomic uint64_t asleep;                          // lanes
    _Atomic uint64_t ahead, ahead_used, ahead_wasted; // pages read ahead: all, asked for later, evicted before
    // Because of hints: likewise; asked for before their reading began; not read for want of room.
    _Atomic uint64_t hinted, hinted_used, hinted_wasted, hinted_late, hinted_dropped;
};

// 0 or -errno. Where the server has no disk the tier does nothing and needs nothing.
ICE_MUST_CHECK int tier_init(struct shard *shard);
// After the disk has been closed: what was in flight gives its memory back.
void tier_fini(struct shard *shard);
// There is a disk and it works.
bool tier_serves(const struct server *server);

// So little of the pool is free that pages leave as soon as they can.
bool tier_is_short(const struct server *server);

// Memory of a frame, which the caller owns. As tier_take_frame, but of no page.
uint8_t *tier_take_memory(struct shard *shard, uint64_t bytes, struct pool_reservation *promised);
// A frame for a page that has none, which enters the order as the newest. Evicts clean pages where the pool is full.
// NULL: none now (tier_serves: ask again after the shard's next wake-up).
uint8_t *tier_take_frame(struct shard *shard, struct lane *lane, uint32_t page, struct pool_reservation *promised);
// The page goes for good: its memory and its extent are given back, at once or when its I/O ends.
void tier_forget(struct shard *shard, struct lane *lane, uint32_t page);
// The page, in memory, is about to be written to: what its extent holds counts no more.
void tier_change(struct shard *shard, struct lane *lane, uint32_t page);
// Starts reading a page that is not in memory, where that has not been done. False: it cannot be now; the shard looks
// again soon.
bool tier_read(struct shard *shard, struct lane *lane, uint32_t page);
// Starts reading pages that are likely to be asked for soon, as far as that costs nobody anything: where the disk and
// the shard's I/O are not busy, and of late enough of such pages were asked for.
void tier_read_ahead(struct shard *shard, struct lane *lane, const uint32_t *pages, uint32_t count);
// A page that was read ahead, or because of a hint, is asked for.
void tier_early_used(struct lane *lane, struct page *page);
// Of late enough of the lane's pages that hints brought were asked for, or it is time to try again.
bool tier_hints_pay(struct lane *lane);
// A hint names a page that is not in memory. Its reading begins when no more than TIER_EARLY_MAX pages are on their
// way. False: nothing is to be done, or there is no room for more wishes.
bool tier_wish(struct shard *shard, struct lane *lane, uint32_t page);
// Begins to read what was wished, as far as may be now.
void tier_grant(struct shard *shard);
// The lane's page table is going.
void tier_forget_wishes(struct shard *shard, const struct lane *lane);
// Starts writing a dirty page. False: it cannot be now (no room for it on the disk, or too much is on its way).
bool tier_write(struct shard *shard, struct lane *lane, uint32_t page);
// Hands what was started since the last call to the disk, in one piece: one wake-up of its thread and one system call
// for the pages of a selection. After each task, and before the shard sleeps.
void tier_submit(struct shard *shard);
// Keeps some of the pool free. One slice, in each round of the shard; true where more is to be done at once.
bool tier_balance(struct shard *shard);
// Any thread: lets every shard balance soon, because a namespace is over its quota.
void tier_relieve(struct server *server);

#endif
