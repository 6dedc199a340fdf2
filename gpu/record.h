// What the slots of a landing hold, as far as the daemon has put it there: step reuse (IceCache, arXiv 2604.10539). A
// selection that shares tokens with the one before it leaves them where they are; only the others are gathered and
// sent.
//
// The memory itself is never asked: a worker may write to it, and where it is staged it is another layer's by now.
//
// Threads: one at a time per cell (the lane's shard; while no shard works on the row, the thread that binds it). A cell
// that is settled is read by others while its row belongs to a retrieve of a layer that follows.
// Growth: 12 bytes for each slot of the landing; planning takes time linear in the tokens of both selections.
#ifndef ICECACHE_GPU_RECORD_H
#define ICECACHE_GPU_RECORD_H

#include "proto/shm.h"
#include "proto/status.h"

#define RECORD_NO_SLOT 0x7fffffffu
#define RECORD_AT_ENDS (-1.0f) // mass of a token that was not selected, but among sinks or window

// A token and its slot.
struct record_entry {
    uint32_t position;
    uint32_t slot : 31;
    uint32_t is_kept : 1; // it is in the slot already
    float mass;           // estimated when it was selected; record_plan: RECORD_AT_ENDS
};

// Of one (row, layer, KV head).
struct record_cell {
    uint32_t count;                // entries
    uint32_t is_known;             // the slots hold what the entries say: not while they are written
    float mass;                    // that the selection was estimated to cover
    uint64_t indexed, version;     // of the index at the last search
    struct record_entry entries[]; // in ascending order of positions
};

struct records {
    struct landing_shape shape;
    uint8_t *memory; // owned
    uint64_t bytes, cell_bytes;
};

uint64_t records_bytes(const struct landing_shape *shape); // of a valid shape
ICE_MUST_CHECK ice_status records_init(struct records *records, const struct landing_shape *shape);
void records_fini(struct records *records);
struct record_cell *records_cell(const struct records *records, uint32_t row, uint32_t layer, uint32_t kv_head);
// The row is bound to another sequence: its cells hold nothing.
void records_forget_row(const struct records *records, uint32_t row);

// What a plan needs beside the record, for a landing of so many slots; in uint32_t.
uint64_t record_scratch_count(uint32_t slots);
// The tokens of a selection, positions[count] in ascending order, count at most the slots.
struct record_wish {
    const uint32_t *positions;
    uint32_t count;
    bool is_all; // every token of the sequence: position i goes to slot i
    bool resend; // none is kept
};
// Gives each token a slot below count, its own where the cell holds it in one of them. The entries are the wish's then,
// in its order, and unknown until record_settle. Returns how many tokens the cell held in no slot: the selection's
// turnover. `scratch` is the caller's.
uint32_t record_plan(struct record_cell *cell, const struct record_wish *wish, uint32_t *scratch);
// Only tokens that are kept or have_row[entry] can be had. Slots are given anew, below the number of those that can;
// the others have RECORD_NO_SLOT. A kept one whose slot is too high is sent again where have_row, else lost too.
void record_cut(struct record_cell *cell, const bool *have_row, uint32_t *scratch);
// The slots hold what the entries say; those without a slot are left out.
void record_settle(struct record_cell *cell);

#endif
