// Copying selections into workers' buffers. One ops table; the host backend writes into a memfd that the daemon made
// and the worker maps, the cuda backend (CUDA IPC) into GPU memory.
//
// Threads: open and close on the reactor (close may come from any thread once no copy is in flight); targets and
// submit from the shard that gathers, several shards at once on different (row, layer, head) cells.
#ifndef ICECACHE_GPU_LANDING_H
#define ICECACHE_GPU_LANDING_H

#include "proto/shm.h"
#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

struct gpu_landing;

// The system calls a backend needs, so that tests can fail them. All return 0 or -errno.
struct gpu_system {
    int (*memfd_create)(void *owner, const char *name, uint64_t bytes, int *fd_out); // sized, sealed against resizing
    int (*map_shared)(void *owner, int fd, uint64_t bytes, void **out);              // populated
    void (*unmap)(void *owner, void *memory, uint64_t bytes);
    void (*close_fd)(void *owner, int fd);
    void *owner;
};

// Where the selection of one (row, layer, KV head) is gathered to, and what the worker reads beside it.
struct gpu_target {
    uint8_t *keys;       // slots x slot_bytes
    uint8_t *values;     // slots x slot_bytes
    uint32_t *positions; // one per slot
};

struct gpu_landing_ops {
    const char *name;
    // *fd_out: what is passed to the worker, owned by the caller; -1 where nothing is passed.
    ice_status (*open)(const struct gpu_landing_ops *ops, const struct gpu_system *system,
                       const struct landing_shape *shape, struct gpu_landing **out, int *fd_out);
    void (*close)(struct gpu_landing *landing);
    // Never fails for a cell inside the shape.
    void (*target)(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, struct gpu_target *out);
    // The target holds `count` tokens now: makes them and the count visible to the worker.
    ice_status (*submit)(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, uint32_t count);
    // Empties every cell of a row (the row is bound to another sequence).
    void (*clear_row)(struct gpu_landing *landing, uint32_t row);
};

extern const struct gpu_landing_ops gpu_host_ops;

const struct landing_layout *gpu_landing_layout(const struct gpu_landing *landing);
const struct landing_shape *gpu_landing_shape(const struct gpu_landing *landing);

#endif
