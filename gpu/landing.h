// Copying selections into workers' buffers. One ops table with three places: host (a memfd that the worker maps), pull
// (a memfd that stages one layer of each row, which the worker copies to its GPU) and push (the worker's GPU memory, to
// which the daemon copies what it has staged).
//
// Threads: open and close on one thread that may be kept waiting (close may come from any thread once no copy is in
// flight); targets and submit from the shard that gathers, several shards at once on different (row, layer, head)
// cells; clear_row from the thread that binds the row, while nothing else works on it; copy on one thread per GPU.
#ifndef ICECACHE_GPU_LANDING_H
#define ICECACHE_GPU_LANDING_H

#include "gpu/copy.h"
#include "gpu/record.h"
#include "proto/shm.h"
#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

struct gpu_device;
struct gpu_export;
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
    // How rows are written to keys and values: memcpy's contract, for whole slots.
    void (*store)(void *to, const void *from, size_t bytes);
};

// What a push landing opens. NULL for the other places.
struct gpu_source {
    struct gpu_device *device; // borrowed until close
    const struct gpu_export *memory;
    enum gpu_copy_way copy_way;
};

struct gpu_landing_ops {
    const char *name;
    // *fd_out: what is passed to the worker, owned by the caller; -1 where nothing is passed. text[CUDA_TEXT_BYTES]:
    // why it failed where the status does not say enough; on success what
    // the log should say; else "".
    ice_status (*open)(const struct gpu_system *system, const struct landing_shape *shape,
                       const struct gpu_source *source, struct gpu_landing **out, int *fd_out, char *text);
    void (*close)(struct gpu_landing *landing);
    // Never fails for a cell inside the shape. Staged: any two layers of a row share the place, so a row belongs to one
    // request at a time.
    void (*target)(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, struct gpu_target *out);
    // What the landing holds of a cell; never NULL. Who gathers plans and settles it.
    struct record_cell *(*record)(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head);
    // The target holds the `count` tokens of the cell's record now, those that are not kept in it newly: makes them,
    // the count and, where it is staged, which are new visible to whoever reads the memory. The record is settled by
    // then.
    void (*submit)(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, uint32_t count);
    // Empties every cell of a row (the row is bound to another sequence).
    void (*clear_row)(struct gpu_landing *landing, uint32_t row);
    // A request on these rows is over: stores its value in their timeline words, for the GPU that waits. Any thread,
    // after what the request leaves there. NULL: the place has none.
    void (*signal)(struct gpu_landing *landing, const uint32_t *rows, uint32_t count, uint64_t value);
    // Issues the copies of a layer of these rows to the GPU; they are done when a later fence of the device is. NULL
    // where submit was all. text[CUDA_TEXT_BYTES]: the failing call; on success what the log should say, or "".
    ice_status (*copy)(struct gpu_landing *landing, const uint32_t *rows, uint32_t count, uint32_t layer, char *text);
};

extern const struct gpu_landing_ops gpu_host_ops, gpu_pull_ops, gpu_push_ops;

// What a landing of this shape takes of the daemon's own memory, beside the memory that is shared with the worker.
uint64_t gpu_landing_own_bytes(const struct landing_shape *shape);

// Of the whole landing.
const struct landing_layout *gpu_landing_layout(const struct gpu_landing *landing);
const struct landing_shape *gpu_landing_shape(const struct gpu_landing *landing);
// How the rows of one retrieve are copied to the GPU from here; "": not at all. Static. Any thread.
const char *gpu_landing_copy_way(const struct gpu_landing *landing);

#endif
