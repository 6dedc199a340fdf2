// What an append is promised before its first part is stored: a bound on what its lanes take.
#include "cached/arena.h"
#include "cached/server.h"

uint64_t lane_promise_pages(const struct stem *stem, uint64_t tokens)
{
    return tokens / stem->server->config->page_tokens + 2;
}

// What one array takes that grows from nothing to `count` entries by at least `percent` each time: the new one is there
// before the old one goes, and what goes is not promised again. The last one is at most 1 + percent/100 times the
// count, all of them together are a geometric series.
static uint64_t growth_entries(uint64_t count, uint64_t percent)
{
    return count * (100 + percent) / 100 * (100 + percent) / percent;
}

// The index stores 8-bit codes of keys, places and pages in chunks of the sizes below and points to the chunks from
// tables. The build takes its memory elsewhere, but the ids of its pages make the tables larger that an append then
// pays for.
//
// Chunks of codes and places: the parts of an append fill them up one after the other, so that whole chunks of
// `tokens` and one more are new. Pages: an append takes one id for each whole page of tokens and two at the ends; it
// pays for a new chunk each time that it takes the first id of one. Ids are used again, so there are never more of them
// than pages at one time: those of a plan together with those that it replaces, at most PAGES_PER_PAGE for each page of
// tokens (a page of a division is a third full at least, and a plan makes three of a full one before that goes).
uint64_t lane_promise_bytes(const struct stem *stem, uint64_t length, uint64_t tokens)
{
    enum { CODES_CHUNK = 64, PLACES_CHUNK = 256, PAGES_CHUNK = 64 }; // elements
    enum { PLACE_BYTES = 4, PAGE_BYTES = 12, CODE_HEAD_BYTES = 28, INDEX_BYTES = 8 << 10 };
    enum { PAGES_PER_PAGE = 4, TABLE_MIN = 16 };
    enum { SMALL_BLOCKS = 8 << 10 }; // what tables below 512 bytes take more, as all blocks have that
    const uint64_t page_tokens = stem->server->config->page_tokens, end = length + tokens;
    const uint64_t code_bytes = stem->shape.head_dim + CODE_HEAD_BYTES; // of a token
    const uint64_t taken = tokens / page_tokens + 2, ids = (end / page_tokens + 2) * PAGES_PER_PAGE;
    const uint64_t page_chunks = taken < ids / PAGES_CHUNK + 1 ? taken : ids / PAGES_CHUNK + 1;
    const struct arena *arena = &stem->server->shards[0].arena; // all are alike in this
    const uint64_t chunks = (tokens / CODES_CHUNK + 2) * arena_block_bytes(arena, CODES_CHUNK * code_bytes) +
                            (tokens / PLACES_CHUNK + 2) * arena_block_bytes(arena, PLACES_CHUNK * PLACE_BYTES) +
                            page_chunks * arena_block_bytes(arena, PAGES_CHUNK * PAGE_BYTES);
    const uint64_t tables = growth_entries(end / CODES_CHUNK + TABLE_MIN, 100) +
                            growth_entries(end / PLACES_CHUNK + TABLE_MIN, 100) +
                            growth_entries(ids / PAGES_CHUNK + TABLE_MIN, 100) + growth_entries(ids + TABLE_MIN, 50);
    const uint64_t table_bytes =
        tables * sizeof(void *) + growth_entries(taken + TABLE_MIN, 50) * sizeof(uint32_t) + INDEX_BYTES;
    return chunks + table_bytes * 11 / 8 + SMALL_BLOCKS; // of tables what arena_block_bytes adds at most
}
