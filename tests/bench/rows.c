// Pages of rows, provided and released as plans say.
#include "rows.h"

#include <stdlib.h>
#include <string.h>

void rows_init(struct rows *rows, struct arena *arena, uint32_t page_tokens, size_t key_bytes, bool with_values)
{
    *rows = (struct rows){
        .arena = arena,
        .page_tokens = page_tokens,
        .key_bytes = key_bytes,
        .row_bytes = with_values ? 2 * key_bytes : key_bytes,
    };
}

static void release_page(struct rows *rows, uint32_t page)
{
    arena_release(rows->arena, rows->pages[page], rows->page_tokens * rows->row_bytes);
    rows->pages[page] = NULL;
}

void rows_fini(struct rows *rows)
{
    for (uint32_t i = 0; i < rows->room; i++) {
        release_page(rows, i);
    }
    free(rows->pages);
    *rows = (struct rows){0};
}

static bool reserve(struct rows *rows, uint32_t page)
{
    if (page < rows->room) {
        return true;
    }
    const uint32_t room = page + page / 2 + 64;
    uint8_t **pages = realloc(rows->pages, room * sizeof(uint8_t *));
    if (pages == NULL) {
        return false;
    }
    memset(pages + rows->room, 0, (room - rows->room) * sizeof(uint8_t *));
    rows->pages = pages;
    rows->room = room;
    return true;
}

static bool provide(struct rows *rows, uint32_t page)
{
    if (!reserve(rows, page)) {
        return false;
    }
    if (rows->pages[page] == NULL) {
        rows->pages[page] = arena_acquire(rows->arena, rows->page_tokens * rows->row_bytes);
    }
    return rows->pages[page] != NULL;
}

bool rows_write(struct rows *rows, struct index_place place, const void *key)
{
    if (!provide(rows, place.page)) {
        return false;
    }
    uint8_t *row = memcpy(rows_at(rows, place), key, rows->key_bytes);
    for (size_t i = rows->key_bytes; i < rows->row_bytes; i++) {
        row[i] = row[i - rows->key_bytes] ^ ROWS_VALUE_BITS;
    }
    return true;
}

bool rows_move(struct rows *rows, const struct index_plan *plan)
{
    for (uint32_t i = 0; i < plan->new_page_count; i++) {
        if (!provide(rows, plan->new_pages[i])) {
            return false;
        }
    }
    for (uint32_t i = 0; i < plan->move_count; i++) {
        memcpy(rows_at(rows, plan->moves[i].to), rows_at(rows, plan->moves[i].from), rows->row_bytes);
    }
    return true;
}

void rows_release(struct rows *rows, const uint32_t *pages, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        release_page(rows, pages[i]);
    }
}

bool rows_is_right(const uint8_t *key, const uint8_t *value, const uint8_t *wanted, size_t key_bytes)
{
    for (size_t i = 0; i < key_bytes; i++) {
        if (key[i] != wanted[i] || value[i] != (wanted[i] ^ ROWS_VALUE_BITS)) {
            return false;
        }
    }
    return true;
}
