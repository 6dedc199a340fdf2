// What the parts of a lane (lane.c, lane_build.c) share: its pages, one by one.
#ifndef ICECACHE_CACHED_LANE_PAGES_H
#define ICECACHE_CACHED_LANE_PAGES_H

#include "cached/lane.h"
#include "cached/stem.h"

#include <assert.h>

static inline struct server *lane_server(const struct lane *lane)
{
    return lane->stem->server;
}

// A token's K row and V row.
static inline size_t lane_token_bytes(const struct lane *lane)
{
    return 2 * lane->stem->row_bytes;
}

static inline bool lane_page_is_used(const struct lane *lane, uint32_t page)
{
    return page < lane->page_capacity && lane->pages[page].flags & PAGE_USED;
}

// A row of a page in memory.
static inline uint8_t *lane_row(const struct lane *lane, struct index_place place)
{
    assert(place.page < lane->page_capacity && lane->pages[place.page].memory);
    return lane->pages[place.page].memory + place.row * lane_token_bytes(lane);
}

// Memory for a new page and, where there is a disk, its extent.
ICE_MUST_CHECK ice_status lane_page_make(struct lane *lane, struct shard *shard, uint32_t page, bool promised);
void lane_page_drop(struct lane *lane, struct shard *shard, uint32_t page);
// Brings a page into memory. ICE_OK: it is there; LANE_WAITS: it is on its way, or will be; ICE_PAGE_LOST.
ICE_MUST_CHECK ice_status lane_page_need(struct lane *lane, struct shard *shard, uint32_t page);
// The rows that the index was given are not looked at any more.
void lane_release_rows(struct lane *lane);

#endif
