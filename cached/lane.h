// A lane: one (stem, layer, KV head) with its DCI-tree and the frames of its pages. Everything in it belongs to the
// shard that owns the lane; only the atomics are read elsewhere. Positions are those of the stem: its first token is 0.
#ifndef ICECACHE_CACHED_LANE_H
#define ICECACHE_CACHED_LANE_H

#include "cached/tier.h"
#include "index/index.h"
#include "proto/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct image;
struct lane_rows;
struct shard;
struct stem;

enum lane_state {
    LANE_AWAKE,
    LANE_ASLEEP, // tree and table are in its image
    LANE_WAKING,
    LANE_LOST, // its image cannot be read
};

struct lane {
    struct stem *stem; // immutable, as the next three
    uint32_t layer, kv_head;
    uint32_t anchor; // the layer whose selections it takes, and then it has no tree; its own: none
    uint32_t shard;
    enum lane_state state;
    bool image_is_prefix;    // the image belongs to a sealed prefix; the stem holds it
    bool saving;             // its image is being written: no clustering
    bool write_failed;       // a page could not be written
    struct image *image;     // asleep or waking
    ice_status wake_failure; // why the last waking failed, until somebody has heard of it
    struct lane *wake_next;  // among those that wait to wake
    bool appending;          // memory taken now is the running append's, which has been promised some
    bool fetching;           // its clustering waits for pages
    bool due;                // linked in the shard's list of lanes with clustering to do
    struct index *index;     // made at the first append
    struct page *pages;      // by the index's number
    uint32_t page_capacity;
    uint32_t absent;        // of its pages, not in memory
    struct tier_bets hints; // pages that hints brought
    uint32_t *fresh_pages;  // pages made by the prepared append
    uint32_t fresh_count, fresh_capacity;
    uint32_t prepared_tokens;         // that the index has taken in, of which
    uint32_t stored_tokens;           // so many have their rows: fewer while the append waits for pages or room
    bool lacks_room;                  // what waited last did so for room, not for the disk
    bool plan_runs;                   // a plan is pending and being carried out:
    uint32_t plan_frames, plan_moves; // so many of its new pages have frames, so many of its moves are done
    struct lane_rows *rows;           // copies that the index works with
    bool copying;                     // the newest of which is not complete
    uint32_t gathers;                 // and cut searches of this lane: it does not fall asleep meanwhile
    uint32_t cuts;                    // searches of this lane that are cut: no plan is committed meanwhile
    uint64_t commit_since_ns;         // since when a plan is ready but for them; 0: none is
    bool damaged;                     // a page that clustering needs is lost: it goes on without clustering
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
    uint32_t compared; // so many of them, the first ones, are known to be equal to stored ones
};

// No status of the protocol: pages are on their way, or room is being made; try again after the shard's next wake-up.
#define LANE_WAITS ((ice_status)0x7fff)

// Neither: a slice's worth of work is done (SERVER_APPEND_SLICE_BYTES); call again when others had their turn.
#define LANE_CUT ((ice_status)0x7ffe)

// Do the stored tokens input->first .. first+tokens-1 equal the input's first rows, byte for byte? ICE_CONFLICT where
// not. LANE_WAITS, LANE_CUT: call again with the same input, which knows how far it has come (compared).
ICE_MUST_CHECK ice_status lane_compare(struct lane *lane, struct shard *shard, struct lane_input *input,
                                       uint32_t tokens);
// Compares what overlaps with stored tokens, checks and stores the rest. On success the lane holds a prepared append
// (maybe an empty one) until lane_commit or lane_drop. On failure nothing has changed. LANE_WAITS, also instead of
// ICE_POOL_FULL as long as pages can leave for the disk: call again with the same input, which goes on where this call
// stopped, or lane_drop. What has been stored by then may leave for the disk again, so that an append of any length
// gets through a pool of a few pages.
ICE_MUST_CHECK ice_status lane_prepare(struct lane *lane, struct shard *shard, struct lane_input *input);
void lane_commit(struct lane *lane, struct shard *shard);
void lane_drop(struct lane *lane, struct shard *shard);

// What an append of `tokens` to a lane of `length` takes at most: pages, and bytes of index and tables. A bound from
// how the tree stores keys, tokens and pages (in chunks); a test holds it against what it really takes.
uint64_t lane_promise_pages(const struct stem *stem, uint64_t tokens);
uint64_t lane_promise_bytes(const struct stem *stem, uint64_t length, uint64_t tokens);

uint64_t lane_length(const struct lane *lane);
// K rows of first .. first+tokens-1 to keys, V rows to values, packed. The positions must exist, in memory.
void lane_read(const struct lane *lane, uint64_t first, uint32_t tokens, uint8_t *keys, uint8_t *values);
// One token's K row and, right behind it, its V row, which counts as a use of its page; NULL, which does not, where the
// page is not in memory. Borrowed until the shard's next task.
static inline const uint8_t *lane_token(struct lane *lane, struct index_place place, size_t token_bytes)
{
    struct page *page = &lane->pages[place.page];
    if (!page->memory)
        return NULL;
    if (page->flags & (PAGE_AHEAD | PAGE_HINTED))
        tier_early_used(lane, page);
    if (!page->visited) // mostly it is: then its cache line stays shared
        page->visited = 1;
    return page->memory + place.row * token_bytes;
}
// Memory of the lane's, counted as the index's. NULL: none. release accepts NULL.
void *lane_acquire_memory(struct lane *lane, size_t bytes);
void lane_release_memory(struct lane *lane, void *memory, size_t bytes);
// The lane gets no appends any more: what has waited for more tokens is clustered.
void lane_end_appends(struct lane *lane, struct shard *shard);
// Forgets the tokens from `length` on, and cannot fail: room that index_truncate wants has been made before, in this
// shard's scratch, and nothing is clustered in between. The lane is awake, and nobody else's. drop: it stays as it is.
ICE_MUST_CHECK ice_status lane_truncate_prepare(struct lane *lane, struct shard *shard);
void lane_truncate_drop(struct lane *lane, struct shard *shard);
void lane_truncate(struct lane *lane, struct shard *shard, uint64_t length);
// A new lane begins asleep, as a sealed prefix's image, which the stem holds.
void lane_attach(struct lane *lane, struct image *image);
void lane_detach(struct lane *lane); // the same undone, before any shard has seen it
// ICE_OK: the lane is awake. LANE_WAITS: it wakes; the shard is woken when it has. Otherwise why it cannot.
ICE_MUST_CHECK ice_status lane_need(struct lane *lane, struct shard *shard);
// Its tree, its table and its memory go; `image`, from now on the lane's, has them. Nobody waits for pages of it.
void lane_fall_asleep(struct lane *lane, struct shard *shard, struct image *image);
// A pending plan is dropped, with the pages that were made for it.
void lane_drop_plan(struct lane *lane, struct shard *shard);
// Parts of waking (image_load.c): the tree, a page of the table, and the end with its outcome.
ICE_MUST_CHECK ice_status lane_load_begin(struct lane *lane, uint64_t bytes, struct index_load **out);
ICE_MUST_CHECK ice_status lane_load_feed(struct index_load *load, const void *bytes, size_t n);
ICE_MUST_CHECK ice_status lane_load_end(struct lane *lane, struct index_load *load);
ICE_MUST_CHECK ice_status lane_load_page(struct lane *lane, uint32_t page, uint32_t extent, uint64_t checksum);
void lane_woken(struct lane *lane, struct shard *shard, ice_status status);
bool lane_page_is_lost(const struct lane *lane, uint32_t page);
bool lane_is_whole(const struct lane *lane); // as far as is known, nothing of it is lost
void lane_destroy(struct lane *lane, struct shard *shard);

enum lane_work { LANE_IDLE, LANE_MORE, LANE_FETCHES, LANE_STALLED };
// One slice of clustering: index work, or copies of a plan. LANE_FETCHES: pages are on their way; the shard is woken
// when they are there; or cut searches must end first. LANE_STALLED: no memory or no frames now.
enum lane_work lane_build(struct lane *lane, struct shard *shard);

#endif
