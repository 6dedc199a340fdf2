// What a landing of any place holds in host memory: all of it, or the staging of one layer of each row.
// Inside gpu/ only.
#ifndef ICECACHE_GPU_HELD_H
#define ICECACHE_GPU_HELD_H

#include "gpu/landing.h"
#include "gpu/record.h"
#include "proto/timeline.h"

struct gpu_push;

struct gpu_landing {
    enum landing_place place;
    struct landing_shape shape; // of the landing
    struct landing_layout layout;
    struct landing_shape held_shape; // of `memory`: equal where nothing is staged, else of one layer
    struct landing_layout held;
    struct gpu_system system; // owner borrowed until close
    uint8_t *memory;          // held.total_bytes, and the timeline words behind it of a pull landing
    uint64_t memory_bytes;
    _Atomic uint64_t *words; // timeline words, [rows]; NULL: none
    struct gpu_push *push;   // the GPU's side, owned; NULL: none
    struct records records;  // of what is in the landing
};

// Makes the landing with its host memory for a place. *fd_out is the caller's.
ICE_MUST_CHECK ice_status held_open(const struct gpu_system *system, const struct landing_shape *shape,
                                    enum landing_place place, struct gpu_landing **out, int *fd_out);
void held_close(struct gpu_landing *landing);
// As the ops of these names.
void held_target(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, struct gpu_target *out);
struct record_cell *held_record(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head);
void held_submit(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, uint32_t count);
void held_clear_row(struct gpu_landing *landing, uint32_t row);
void held_signal(struct gpu_landing *landing, const uint32_t *rows, uint32_t count, uint64_t value);

#endif
