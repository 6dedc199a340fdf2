// Records of landings, see record.h.
//
// Invariant: no two entries of a cell have one slot.

// Asserts are for our own bugs and stay on in release builds.
#undef NDEBUG
#include "gpu/record.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// ---- cells ----

static uint64_t cell_bytes_of(const struct landing_shape *shape)
{
    const uint64_t bytes = sizeof(struct record_cell) + shape->slots * sizeof(struct record_entry);
    return (bytes + _Alignof(struct record_cell) - 1) / _Alignof(struct record_cell) * _Alignof(struct record_cell);
}

uint64_t records_bytes(const struct landing_shape *shape)
{
    return (uint64_t)shape->rows * shape->layers * shape->kv_heads * cell_bytes_of(shape); // below 2^64 by the limits
}

ice_status records_init(struct records *records, const struct landing_shape *shape)
{
    *records = (struct records){.shape = *shape, .bytes = records_bytes(shape), .cell_bytes = cell_bytes_of(shape)};
    records->memory = records->bytes <= SIZE_MAX ? calloc(1, records->bytes) : NULL; // nothing is known
    return records->memory ? ICE_OK : ICE_NO_MEMORY;
}

void records_fini(struct records *records)
{
    free(records->memory);
    records->memory = NULL;
}

struct record_cell *records_cell(const struct records *records, uint32_t row, uint32_t layer, uint32_t kv_head)
{
    const struct landing_shape *shape = &records->shape;
    assert(row < shape->rows && layer < shape->layers && kv_head < shape->kv_heads);
    const uint64_t number = ((uint64_t)row * shape->layers + layer) * shape->kv_heads + kv_head;
    return (void *)(records->memory + number * records->cell_bytes);
}

void records_forget_row(const struct records *records, uint32_t row)
{
    for (uint32_t layer = 0; layer < records->shape.layers; layer++) {
        for (uint32_t head = 0; head < records->shape.kv_heads; head++) {
            struct record_cell *const cell = records_cell(records, row, layer, head);
            cell->count = cell->is_known = 0;
        }
    }
}

// ---- slots ----

#define WORD_BITS 32u

static uint32_t used_words(uint32_t slots)
{
    return slots / WORD_BITS + 1;
}

uint64_t record_scratch_count(uint32_t slots)
{
    return (uint64_t)slots * (sizeof(struct record_entry) / sizeof(uint32_t)) + used_words(slots);
}

static void use(uint32_t *used, uint32_t slot)
{
    used[slot / WORD_BITS] |= 1u << slot % WORD_BITS;
}

// The first free slot from *slot on, which there is.
static uint32_t next_free(const uint32_t *used, uint32_t slot)
{
    while (used[slot / WORD_BITS] >> slot % WORD_BITS & 1u) {
        slot++;
    }
    return slot;
}

// Gives slots to those that have none of theirs.
static void fill_free(struct record_cell *cell, const uint32_t *used)
{
    uint32_t slot = 0;
    for (uint32_t i = 0; i < cell->count; i++) {
        struct record_entry *const entry = &cell->entries[i];
        if (!entry->is_kept && entry->slot != RECORD_NO_SLOT) {
            slot = next_free(used, slot);
            entry->slot = slot++ & RECORD_NO_SLOT;
        }
    }
}

uint32_t record_plan(struct record_cell *cell, const struct record_wish *wish, uint32_t *scratch)
{
    struct record_entry *const old = (void *)scratch;
    const uint32_t held = cell->is_known ? cell->count : 0;
    memcpy(old, cell->entries, held * sizeof(*old));
    uint32_t *const used = scratch + (uint64_t)held * (sizeof(*old) / sizeof(*scratch));
    memset(used, 0, used_words(wish->count) * sizeof(*used));
    uint32_t turnover = 0;
    cell->is_known = 0;
    cell->count = wish->count;
    for (uint32_t i = 0, at = 0; i < wish->count; i++) { // both ascend
        while (at < held && old[at].position < wish->positions[i]) {
            at++;
        }
        const bool is_held = at < held && old[at].position == wish->positions[i];
        const uint32_t slot = is_held ? old[at].slot : 0;
        const bool stays = is_held && !wish->resend && slot < wish->count && (!wish->is_all || slot == i);
        cell->entries[i] = (struct record_entry){wish->positions[i], slot & RECORD_NO_SLOT, stays, RECORD_AT_ENDS};
        turnover += !is_held;
        if (stays) {
            use(used, slot);
        }
    }
    fill_free(cell, used); // all in ascending order where none is kept, so slot i for position i
    return turnover;
}

// Takes the slots from tokens that cannot be had; returns how many are left. What is kept above them cannot stay.
static uint32_t leave_out(struct record_cell *cell, const bool *have_row, uint32_t room)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < cell->count; i++) {
        struct record_entry *const entry = &cell->entries[i];
        entry->is_kept = entry->is_kept && entry->slot < room;
        if (!entry->is_kept && !have_row[i]) {
            entry->slot = RECORD_NO_SLOT;
        }
        left += entry->slot != RECORD_NO_SLOT;
    }
    return left;
}

void record_cut(struct record_cell *cell, const bool *have_row, uint32_t *scratch)
{
    uint32_t room = cell->count;
    for (uint32_t left = leave_out(cell, have_row, room); left < room; left = leave_out(cell, have_row, room)) {
        room = left;
    }
    memset(scratch, 0, used_words(room) * sizeof(*scratch));
    for (uint32_t i = 0; i < cell->count; i++) {
        if (cell->entries[i].is_kept) {
            use(scratch, cell->entries[i].slot);
        }
    }
    fill_free(cell, scratch);
}

void record_settle(struct record_cell *cell)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < cell->count; i++) {
        if (cell->entries[i].slot != RECORD_NO_SLOT) {
            cell->entries[count++] = cell->entries[i];
        }
    }
    cell->count = count;
    cell->is_known = 1;
}
