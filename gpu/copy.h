// From staging to a landing in GPU memory, in either process: the daemon's copier (push) or the worker (pull).
#ifndef ICECACHE_GPU_COPY_H
#define ICECACHE_GPU_COPY_H

#include "gpu/device.h"
#include "proto/shm.h"

// How much one call registers with the driver: more takes its locks for long. No copy crosses such a piece's end.
#define GPU_REGISTER_BYTES (256ull << 20)

// The way from one staging to one landing.
struct gpu_path {
    const struct gpu_device *device; // borrowed
    cuda_stream stream;              // where copies are issued: the device's own, unless the caller sets another
    cuda_address to;                 // the landing
    struct landing_shape shape;
    struct landing_layout layout;
    uint8_t *from;              // the staging, held.total_bytes, registered
    struct landing_layout held; // its layout
    uint64_t registered_bytes;  // from its beginning
};

// Fills the path and registers the staging. On failure nothing stays registered. Device entered.
ICE_MUST_CHECK ice_status gpu_path_open(struct gpu_path *path, const struct gpu_device *device, cuda_address to,
                                        const struct landing_shape *shape, uint8_t *staging, char *text);
void gpu_path_close(struct gpu_path *path); // device entered; no copy may be in flight

// Issues, in the path's stream, one copy of a row's block: K and V of all heads, positions, counts. Device entered.
ICE_MUST_CHECK ice_status gpu_path_copy(const struct gpu_path *path, uint32_t row, uint32_t layer, char *text);
// Issues: the counts of all layers of a row become 0. Device entered.
ICE_MUST_CHECK ice_status gpu_path_clear(const struct gpu_path *path, uint32_t row, char *text);

#endif
