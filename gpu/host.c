// The host backend: a landing is a memfd that the daemon made and the worker maps.
//
// Invariants: the daemon only writes to the memory, since the worker may write anywhere at any time; a cell's count is
// stored last and with release order, so that a worker that sees it sees the slots and positions too.
// Threads: open and close on the reactor; target and submit from several shards on different cells, which touch no
// shared state of the landing; clear_row from the thread that binds the row, while no shard works on it.

// Asserts are for our own bugs and stay on in release builds.
#undef NDEBUG
#include "gpu/landing.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct gpu_landing {
    struct landing_shape shape;
    struct landing_layout layout;
    struct gpu_system system; // owner borrowed until close
    uint8_t *memory;          // layout.total_bytes
};

_Static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t) && ATOMIC_INT_LOCK_FREE == 2,
               "counts are shared with other processes and must be plain lock-free words");

static ice_status system_status(int error)
{
    return error == -ENOMEM || error == -ENOSPC ? ICE_SHARED_FULL : ICE_SYSTEM;
}

static ice_status host_open(const struct gpu_landing_ops *ops, const struct gpu_system *system,
                            const struct landing_shape *shape, struct gpu_landing **out, int *fd_out)
{
    assert(ops == &gpu_host_ops);
    struct landing_layout layout;
    if (!landing_layout_init(&layout, shape)) {
        return ICE_TOO_LARGE;
    }
    struct gpu_landing *landing = calloc(1, sizeof(*landing));
    if (!landing) {
        return ICE_NO_MEMORY;
    }
    int fd = -1;
    void *memory = NULL;
    ice_status status = ICE_OK;
    int rc = system->memfd_create(system->owner, "icecache-landing", layout.total_bytes, &fd);
    if (rc < 0) {
        status = system_status(rc);
        goto free_landing;
    }
    rc = system->map_shared(system->owner, fd, layout.total_bytes, &memory);
    if (rc < 0) {
        status = system_status(rc);
        goto close_fd;
    }
    *landing = (struct gpu_landing){.shape = *shape, .layout = layout, .system = *system, .memory = memory};
    *out = landing;
    *fd_out = fd;
    return ICE_OK;

close_fd:
    system->close_fd(system->owner, fd);
free_landing:
    free(landing);
    return status;
}

static void host_close(struct gpu_landing *landing)
{
    if (landing) {
        landing->system.unmap(landing->system.owner, landing->memory, landing->layout.total_bytes);
        free(landing);
    }
}

static uint64_t cell_index(const struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head)
{
    assert(row < landing->shape.rows && layer < landing->shape.layers && kv_head < landing->shape.kv_heads);
    return landing_cell(&landing->shape, row, layer, kv_head);
}

static _Atomic uint32_t *cell_count(struct gpu_landing *landing, uint64_t cell)
{
    return (_Atomic uint32_t *)(void *)(landing->memory + landing->layout.counts_offset) + cell;
}

static void host_target(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head,
                        struct gpu_target *out)
{
    const uint64_t cell = cell_index(landing, row, layer, kv_head);
    uint8_t *const head = landing->memory + cell * landing->layout.head_bytes;
    uint32_t *const positions = (void *)(landing->memory + landing->layout.positions_offset);
    out->keys = head;
    out->values = head + landing->layout.side_bytes;
    out->positions = positions + cell * landing->shape.slots;
}

static ice_status host_submit(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head,
                              uint32_t count)
{
    const uint64_t cell = cell_index(landing, row, layer, kv_head);
    assert(count <= landing->shape.slots);
    // Pairs with the worker's acquire load: who sees the count sees what was gathered before it.
    atomic_store_explicit(cell_count(landing, cell), count, memory_order_release);
    return ICE_OK;
}

static void host_clear_row(struct gpu_landing *landing, uint32_t row)
{
    const uint64_t first = cell_index(landing, row, 0, 0);
    const uint64_t cells = (uint64_t)landing->shape.layers * landing->shape.kv_heads;
    for (uint64_t i = 0; i < cells; i++) {
        atomic_store_explicit(cell_count(landing, first + i), 0, memory_order_release);
    }
}

const struct gpu_landing_ops gpu_host_ops = {
    .name = "host",
    .open = host_open,
    .close = host_close,
    .target = host_target,
    .submit = host_submit,
    .clear_row = host_clear_row,
};

const struct landing_layout *gpu_landing_layout(const struct gpu_landing *landing)
{
    return &landing->layout;
}

const struct landing_shape *gpu_landing_shape(const struct gpu_landing *landing)
{
    return &landing->shape;
}
