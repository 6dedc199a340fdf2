// Offsets inside a landing's memory, computed alike by the daemon and the worker.
//
// Invariants: no offset wraps, because every product is checked against WIRE_SHARED_BYTES_MAX; blocks start on 512
// bytes; *layout is written on success only. Threads: stateless, any thread.
#include "proto/shm.h"

#include "proto/dtype.h"
#include "proto/limits.h"

#define BLOCK_ALIGNMENT 512u
#define PAGE_BYTES      4096u

static bool multiply(uint64_t *product, uint64_t factor)
{
    return !__builtin_mul_overflow(*product, factor, product) && *product <= WIRE_SHARED_BYTES_MAX;
}

// bytes is far from the end of the type.
static uint64_t round_up(uint64_t bytes, uint64_t alignment)
{
    return (bytes + alignment - 1) / alignment * alignment;
}

static bool in_limits(const struct landing_shape *shape)
{
    return shape->rows > 0 && shape->rows <= WIRE_ROWS_MAX && shape->layers > 0 && shape->layers <= WIRE_LAYERS_MAX &&
           shape->kv_heads > 0 && shape->kv_heads <= WIRE_KV_HEADS_MAX && shape->slots > 0 &&
           shape->slots <= WIRE_SLOTS_MAX && shape->head_dim > 0 && shape->head_dim <= WIRE_HEAD_DIM_MAX &&
           dtype_is_valid(shape->dtype);
}

static bool layout_init(struct landing_layout *layout, const struct landing_shape *shape, bool has_changed)
{
    if (!in_limits(shape)) {
        return false;
    }
    const uint64_t slot_bytes = shape->head_dim * dtype_bytes((enum dtype)shape->dtype);
    const uint64_t side_bytes = shape->slots * slot_bytes; // at most 2^34
    const uint64_t data_bytes = 2 * side_bytes * shape->kv_heads;
    const uint64_t slots_bytes = sizeof(uint32_t) * shape->slots * shape->kv_heads; // a word for each
    const uint64_t heads_bytes = sizeof(uint32_t) * shape->kv_heads;
    const uint64_t counts_offset = data_bytes + slots_bytes, changed_offset = counts_offset + heads_bytes;
    const uint64_t changed_bytes = has_changed ? slots_bytes + heads_bytes : 0;
    const uint64_t block_bytes = round_up(changed_offset + changed_bytes, BLOCK_ALIGNMENT);
    uint64_t total_bytes = block_bytes; // at most 2^44
    if (!multiply(&total_bytes, (uint64_t)shape->rows * shape->layers)) {
        return false;
    }
    *layout = (struct landing_layout){
        .slot_bytes = slot_bytes,
        .side_bytes = side_bytes,
        .head_bytes = 2 * side_bytes,
        .positions_offset = data_bytes,
        .counts_offset = counts_offset,
        .changed_offset = has_changed ? changed_offset : 0,
        .changed_counts_offset = has_changed ? changed_offset + slots_bytes : 0,
        .block_bytes = block_bytes,
        .total_bytes = round_up(total_bytes, PAGE_BYTES), // the limit is one too
    };
    return true;
}

bool landing_layout_init(struct landing_layout *layout, const struct landing_shape *shape)
{
    return layout_init(layout, shape, false);
}

bool landing_held_init(struct landing_layout *layout, const struct landing_shape *shape, enum landing_place place)
{
    const struct landing_shape held = landing_held_shape(shape, place);
    return layout_init(layout, &held, place == LANDING_PULL);
}
