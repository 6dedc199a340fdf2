// Host memory of landings, and the two places that need nothing else: host and pull. The memory is a memfd that the
// daemon made and the worker maps.
//
// Invariants: the daemon only writes to the memory, since the worker may write anywhere at any time; a cell's count is
// stored last and with release order, so that a worker that sees it sees the slots and positions too.
// Threads: open and close on the keeper; target and submit from several shards on different cells, which touch no
// shared state of the landing; clear_row from the thread that binds the row, while no shard works on it.

// Asserts are for our own bugs and stay on in release builds.
#undef NDEBUG
#include "gpu/held.h"
#include "gpu/store.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

_Static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t) && ATOMIC_INT_LOCK_FREE == 2,
               "counts are shared with other processes and must be plain lock-free words");

static ice_status system_status(int error)
{
    return error == -ENOMEM || error == -ENOSPC ? ICE_SHARED_FULL : ICE_SYSTEM;
}

ice_status held_open(const struct gpu_system *system, const struct landing_shape *shape, enum landing_place place,
                     struct gpu_landing **out, int *fd_out)
{
    struct gpu_landing *landing = calloc(1, sizeof(*landing));
    if (!landing) {
        return ICE_NO_MEMORY;
    }
    *landing = (struct gpu_landing){
        .place = place, .shape = *shape, .held_shape = landing_held_shape(shape, place), .system = *system};
    ice_status status = ICE_TOO_LARGE;
    if (!landing_layout_init(&landing->layout, shape) || !landing_held_init(&landing->held, shape, place)) {
        goto free_landing;
    }
    status = records_init(&landing->records, shape);
    if (status != ICE_OK) {
        goto free_landing;
    }
    landing->memory_bytes = landing->held.total_bytes + (place == LANDING_PULL ? timeline_bytes(shape, place) : 0);
    int fd = -1;
    void *memory = NULL;
    int rc = system->memfd_create(system->owner, "icecache-landing", landing->memory_bytes, &fd);
    if (rc < 0) {
        status = system_status(rc);
        goto free_records;
    }
    rc = system->map_shared(system->owner, fd, landing->memory_bytes, &memory);
    if (rc < 0) {
        status = system_status(rc);
        goto close_fd;
    }
    landing->memory = memory;
    if (place == LANDING_PULL) {
        landing->words = (void *)(landing->memory + landing->held.total_bytes);
    }
    *out = landing;
    *fd_out = fd;
    return ICE_OK;

close_fd:
    system->close_fd(system->owner, fd);
free_records:
    records_fini(&landing->records);
free_landing:
    free(landing);
    return status;
}

void held_close(struct gpu_landing *landing)
{
    if (landing) {
        landing->system.unmap(landing->system.owner, landing->memory, landing->memory_bytes);
        records_fini(&landing->records);
        free(landing);
    }
}

// Every layer has the one block of its row where the memory is a staging.
static uint8_t *block_of(const struct gpu_landing *landing, uint32_t row, uint32_t layer)
{
    assert(row < landing->shape.rows && layer < landing->shape.layers);
    const uint32_t held_layer = layer < landing->held_shape.layers ? layer : 0;
    return landing->memory + landing_block(&landing->held, &landing->held_shape, row, held_layer);
}

// Read by a GPU next, not by a core.
static bool is_staged(const struct gpu_landing *landing)
{
    return landing->place != LANDING_HOST;
}

static _Atomic uint32_t *counts_of(const struct gpu_landing *landing, uint8_t *block)
{
    return (_Atomic uint32_t *)(void *)(block + landing->held.counts_offset);
}

void held_target(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, struct gpu_target *out)
{
    assert(kv_head < landing->shape.kv_heads);
    uint8_t *const block = block_of(landing, row, layer);
    out->keys = block + kv_head * landing->held.head_bytes;
    out->values = out->keys + landing->held.side_bytes;
    uint32_t *const positions = (void *)(block + landing->held.positions_offset);
    out->positions = positions + (uint64_t)kv_head * landing->shape.slots;
    out->store = is_staged(landing) ? store_streaming : store_cached;
}

struct record_cell *held_record(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head)
{
    return records_cell(&landing->records, row, layer, kv_head);
}

// Which slots of the staging are new. Of a whole selection too: who reads it may not know that it is.
static void list_changed(const struct gpu_landing *landing, uint8_t *block, uint32_t kv_head,
                         const struct record_cell *cell)
{
    uint32_t *const changed =
        (uint32_t *)(void *)(block + landing->held.changed_offset) + (uint64_t)kv_head * landing->shape.slots;
    uint32_t *const changed_counts = (void *)(block + landing->held.changed_counts_offset);
    uint32_t count = 0;
    for (uint32_t i = 0; i < cell->count; i++) {
        if (!cell->entries[i].is_kept) {
            changed[count++] = cell->entries[i].slot;
        }
    }
    changed_counts[kv_head] = count;
}

void held_submit(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, uint32_t count)
{
    assert(kv_head < landing->shape.kv_heads && count <= landing->shape.slots);
    if (landing->held.changed_offset) {
        list_changed(landing, block_of(landing, row, layer), kv_head, held_record(landing, row, layer, kv_head));
    }
    if (is_staged(landing)) {
        store_fence();
    }
    // Pairs with the worker's acquire load: who sees the count sees what was gathered before it.
    atomic_store_explicit(counts_of(landing, block_of(landing, row, layer)) + kv_head, count, memory_order_release);
}

void held_clear_row(struct gpu_landing *landing, uint32_t row)
{
    records_forget_row(&landing->records, row);
    for (uint32_t layer = 0; layer < landing->held_shape.layers; layer++) {
        _Atomic uint32_t *const counts = counts_of(landing, block_of(landing, row, layer));
        for (uint32_t head = 0; head < landing->held_shape.kv_heads; head++) {
            atomic_store_explicit(counts + head, 0, memory_order_release);
        }
    }
}

void held_signal(struct gpu_landing *landing, const uint32_t *rows, uint32_t count, uint64_t value)
{
    for (uint32_t i = 0; i < count; i++) {
        assert(rows[i] < landing->shape.rows);
        // Release: who sees the value sees what was gathered and told to this thread before.
        atomic_store_explicit(&landing->words[rows[i]], value, memory_order_release);
    }
}

static ice_status host_open(const struct gpu_system *system, const struct landing_shape *shape,
                            const struct gpu_source *source, struct gpu_landing **out, int *fd_out, char *text)
{
    assert(!source);
    text[0] = '\0';
    return held_open(system, shape, LANDING_HOST, out, fd_out);
}

static ice_status pull_open(const struct gpu_system *system, const struct landing_shape *shape,
                            const struct gpu_source *source, struct gpu_landing **out, int *fd_out, char *text)
{
    assert(!source);
    text[0] = '\0';
    return held_open(system, shape, LANDING_PULL, out, fd_out);
}

const struct gpu_landing_ops gpu_host_ops = {
    .name = "host",
    .open = host_open,
    .close = held_close,
    .target = held_target,
    .record = held_record,
    .submit = held_submit,
    .clear_row = held_clear_row,
};

const struct gpu_landing_ops gpu_pull_ops = {
    .name = "pull",
    .open = pull_open,
    .close = held_close,
    .target = held_target,
    .record = held_record,
    .submit = held_submit,
    .clear_row = held_clear_row,
    .signal = held_signal,
};

uint64_t gpu_landing_own_bytes(const struct landing_shape *shape)
{
    return records_bytes(shape);
}

const struct landing_layout *gpu_landing_layout(const struct gpu_landing *landing)
{
    return &landing->layout;
}

const struct landing_shape *gpu_landing_shape(const struct gpu_landing *landing)
{
    return &landing->shape;
}
