// What the owner of an index keeps: K rows (with V behind them or without) by page, where the index says they belong.
//
// Thread-safety: that of the arena.
#ifndef ICECACHE_BENCH_ROWS_H
#define ICECACHE_BENCH_ROWS_H

#include "arena.h"
#include "index/index.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct rows {
    struct arena *arena; // borrowed
    uint32_t page_tokens;
    size_t key_bytes, row_bytes; // a row is K, or K and V
    uint8_t **pages;             // by page id; NULL: not provided
    uint32_t room;
};

void rows_init(struct rows *rows, struct arena *arena, uint32_t page_tokens, size_t key_bytes, bool with_values);
void rows_fini(struct rows *rows); // gives the pages back; accepts a zeroed struct

static inline uint8_t *rows_at(const struct rows *rows, struct index_place place)
{
    return rows->pages[place.page] + place.row * rows->row_bytes;
}
// Writes a token's row where it lies, with a page provided as needed. False when there is no memory.
bool rows_write(struct rows *rows, struct index_place place, const void *key);
// Carries out a plan but for the pages that it releases: those hold what is searched until the commit.
bool rows_move(struct rows *rows, const struct index_plan *plan);
void rows_release(struct rows *rows, const uint32_t *pages, uint32_t count);

// The V row of a K row: the same with some bits turned, because V is only moved.
#define ROWS_VALUE_BITS 0x5a
bool rows_is_right(const uint8_t *key, const uint8_t *value, const uint8_t *wanted, size_t key_bytes);

#endif
