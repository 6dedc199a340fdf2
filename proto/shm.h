// Layout of the shared memory between the daemon and a worker.
//
// A landing is one block for each (row, layer): the data, [kv_head][{K,V}][slot][head_dim], right behind it u32
// positions [kv_head][slot] and a u32 count per [kv_head]. All that one retrieve leaves for a row is one piece, so it
// goes to a GPU in one copy, and a kernel there reads counts and positions at fixed addresses. Blocks start on 512
// bytes. No pointers, no headers: both sides compute the same offsets from the shape that was agreed on the control
// socket.
//
// A landing in GPU memory has the same layout there. In host memory it is **staged**: the memory holds one layer of
// each row, that of the row's last retrieve, in the layout of a landing of one layer. Who reads the staging copies it
// to the GPU before the row's next retrieve.
//
// **Step reuse**: a retrieve leaves tokens that a cell holds already where they are. A staged block then has only the
// others, at their slots, and says which: behind the counts, u32 changed [kv_head][slot], the slots that are new, and
// u32 changed_counts [kv_head].
//
// The worker may write anywhere at any time: the daemon only ever writes, and never reads back what it wrote.
#ifndef ICECACHE_PROTO_SHM_H
#define ICECACHE_PROTO_SHM_H

#include <stdbool.h>
#include <stdint.h>

// Where the daemon writes selections. Values are part of the wire protocol.
enum landing_place {
    LANDING_HOST = 0, // a memfd that holds the whole landing
    LANDING_PULL = 1, // a memfd that stages it; the worker copies from there to its GPU
    LANDING_PUSH = 2, // the worker's GPU memory; the daemon stages and copies
};

struct landing_shape {
    uint32_t rows, layers, kv_heads, slots, head_dim;
    uint32_t dtype; // enum dtype
};

struct landing_layout {
    uint64_t slot_bytes;       // one K or V row
    uint64_t side_bytes;       // slots x slot_bytes: all K, or all V, of one (row, layer, head)
    uint64_t head_bytes;       // 2 x side_bytes
    uint64_t positions_offset; // in a block: u32 [kv_head][slot]
    uint64_t counts_offset;    // in a block: u32 [kv_head]
    uint64_t changed_offset;   // in a staged block of a pull: u32 [kv_head][slot]; 0: there is none
    uint64_t changed_counts_offset;
    uint64_t block_bytes; // from one block to the next
    uint64_t total_bytes; // of all blocks; a multiple of 4 KiB
};

// Fills *layout on success; false where a dimension is zero or above its limit, the dtype is unknown, or the size
// exceeds WIRE_SHARED_BYTES_MAX.
bool landing_layout_init(struct landing_layout *layout, const struct landing_shape *shape);
// The same of what is held in host memory: of landing_held_shape.
bool landing_held_init(struct landing_layout *layout, const struct landing_shape *shape, enum landing_place place);

// The shape of what is held in host memory.
static inline struct landing_shape landing_held_shape(const struct landing_shape *shape, enum landing_place place)
{
    struct landing_shape held = *shape;
    held.layers = place == LANDING_HOST ? shape->layers : 1;
    return held;
}

// Where the block of a (row, layer) begins.
static inline uint64_t landing_block(const struct landing_layout *layout, const struct landing_shape *shape,
                                     uint32_t row, uint32_t layer)
{
    return ((uint64_t)row * shape->layers + layer) * layout->block_bytes;
}

// Bytes of one side (K or V) of a staging area's content in Append's and Read's layout.
static inline uint64_t staging_side_bytes(uint32_t layers, uint32_t kv_heads, uint64_t tokens, uint64_t slot_bytes)
{
    return (uint64_t)layers * kv_heads * tokens * slot_bytes;
}

#endif
