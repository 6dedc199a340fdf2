// Offsets inside a landing's memory, computed alike by the daemon and the worker.
//
// Invariants: no offset wraps, because every product is checked against WIRE_SHARED_BYTES_MAX; parts start on 4 KiB
// boundaries; *layout is written on success only.
// Threads: stateless, any thread.
#include "proto/shm.h"

#include "proto/dtype.h"
#include "proto/limits.h"

#define PART_BYTES 4096u

static bool multiply(uint64_t *product, uint64_t factor)
{
    return !__builtin_mul_overflow(*product, factor, product) && *product <= WIRE_SHARED_BYTES_MAX;
}

// Both operands are at most WIRE_SHARED_BYTES_MAX, far from the end of the type.
static uint64_t next_part(uint64_t offset, uint64_t bytes)
{
    return (offset + bytes + PART_BYTES - 1) / PART_BYTES * PART_BYTES;
}

static bool in_limits(const struct landing_shape *shape)
{
    return shape->rows > 0 && shape->rows <= WIRE_ROWS_MAX && shape->layers > 0 && shape->layers <= WIRE_LAYERS_MAX &&
           shape->kv_heads > 0 && shape->kv_heads <= WIRE_KV_HEADS_MAX && shape->slots > 0 &&
           shape->slots <= WIRE_SLOTS_MAX && shape->head_dim > 0 && shape->head_dim <= WIRE_HEAD_DIM_MAX &&
           dtype_is_valid(shape->dtype);
}

bool landing_layout_init(struct landing_layout *layout, const struct landing_shape *shape)
{
    if (!in_limits(shape)) {
        return false;
    }
    const uint64_t cells = (uint64_t)shape->rows * shape->layers * shape->kv_heads; // at most 2^29
    const uint64_t slot_bytes = shape->head_dim * dtype_bytes((enum dtype)shape->dtype);
    const uint64_t side_bytes = shape->slots * slot_bytes; // at most 2^34
    uint64_t data_bytes = 2 * side_bytes;
    uint64_t positions_bytes = sizeof(uint32_t) * shape->slots;
    if (!multiply(&data_bytes, cells) || !multiply(&positions_bytes, cells)) {
        return false;
    }
    const uint64_t counts_offset = next_part(0, data_bytes);
    const uint64_t positions_offset = next_part(counts_offset, cells * sizeof(uint32_t));
    const uint64_t total_bytes = next_part(positions_offset, positions_bytes);
    if (total_bytes > WIRE_SHARED_BYTES_MAX) {
        return false;
    }
    *layout = (struct landing_layout){
        .slot_bytes = slot_bytes,
        .side_bytes = side_bytes,
        .head_bytes = 2 * side_bytes,
        .counts_offset = counts_offset,
        .positions_offset = positions_offset,
        .total_bytes = total_bytes,
    };
    return true;
}
