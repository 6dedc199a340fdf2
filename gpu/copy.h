// From staging to a landing in GPU memory, in either process: the daemon's copier (push) or the worker (pull).
#ifndef ICECACHE_GPU_COPY_H
#define ICECACHE_GPU_COPY_H

#include "gpu/device.h"
#include "proto/shm.h"

// How much one call registers with the driver: more takes its locks for long. No copy crosses such a piece's end.
#define GPU_REGISTER_BYTES (256ull << 20)

// The most copies in one call: drivers have crashed with tens of thousands. A retrieve has no more rows.
#define GPU_BATCH_MAX      256u

#define GPU_CHOICE_NS      20000000u            // how long a choice of the way may be measured
#define GPU_CHOICE_WAIT_NS (2ull * 1000000000u) // for the copies of one measurement: they have to end

// How the blocks of several rows are copied.
enum gpu_copy_way {
    GPU_COPY_AUTO, // as measured
    GPU_COPY_LOOP, // a call for each
    GPU_COPY_BATCH // one call for all, where the driver has it (CUDA 12.8)
};

// The way from one staging to one landing.
struct gpu_path {
    const struct gpu_device *device; // borrowed
    cuda_address to;                 // the landing
    struct landing_shape shape;
    struct landing_layout layout;
    uint8_t *from;              // the staging, held.total_bytes, registered
    struct landing_layout held; // its layout
    uint64_t registered_bytes;  // from its beginning
    // From how many rows on one call copies all of them; 0: never. Read by any thread.
    _Atomic uint32_t batch_from;
};

// Fills the path and registers the staging. On failure nothing stays registered. Device entered.
ICE_MUST_CHECK ice_status gpu_path_open(struct gpu_path *path, const struct gpu_device *device, cuda_address to,
                                        const struct landing_shape *shape, enum landing_place place, uint8_t *staging,
                                        char *text);
void gpu_path_close(struct gpu_path *path); // device entered; no copy may be in flight

// Issues, in the stream: the counts of all layers of a row become 0. Device entered, as in the next.
ICE_MUST_CHECK ice_status gpu_path_clear(const struct gpu_path *path, cuda_stream stream, uint32_t row, char *text);

// Issues, in the stream, the copies of a layer of these rows, in one call or several: of each row's block, K and V of
// all heads, positions, counts. A text that is not empty is for the log: the driver has refused a batch, and this path
// will not try it again.
ICE_MUST_CHECK ice_status gpu_path_copy_rows(struct gpu_path *path, cuda_stream stream, const uint32_t *rows,
                                             uint32_t count, uint32_t layer, char *text);
// Settles how rows are copied. GPU_COPY_AUTO measures, with copies of the staging to layer 0 of the landing that have
// ended when this returns; nobody else may use either meanwhile. The text is as above. Device entered.
ICE_MUST_CHECK ice_status gpu_path_choose(struct gpu_path *path, enum gpu_copy_way way, char *text);
// "loop", "batch" or "batch from 8 rows on"; static. Any thread.
const char *gpu_path_way(const struct gpu_path *path);

#endif
