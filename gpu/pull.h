// The worker's way from a staging to its landing: a copy of whole blocks, or the scatter kernel for what has changed.
//
// Threads: one at a time per pull. The device is entered in all calls.
#ifndef ICECACHE_GPU_PULL_H
#define ICECACHE_GPU_PULL_H

#include "gpu/copy.h"
#include "gpu/scatter.h"

#include <stdbool.h>

// What one row takes until it has landed, measured when the pull was opened; us.
struct gpu_pull_costs {
    float block;                     // a copy of its block
    float changed_none, changed_all; // the kernel, where no slot has changed, and where all have
};

struct gpu_pull {
    struct gpu_path path;
    struct gpu_scatter scatter;
    cuda_address staging;         // as the GPU sees it; 0: no kernel
    char reason[CUDA_TEXT_BYTES]; // why there is none, else ""
    struct gpu_pull_costs costs;
};

// Opens the path, loads the kernel where the GPU can read the staging, and measures both with the landing's first row,
// of which nothing is held to yet, for some ms. Where the kernel cannot be had that is no error: reason says why.
// wants_kernel false: it is not tried.
ICE_MUST_CHECK ice_status gpu_pull_open(struct gpu_pull *pull, const struct gpu_device *device, cuda_address to,
                                        const struct landing_shape *shape, uint8_t *staging, enum gpu_copy_way way,
                                        bool wants_kernel, char *text);
// Also after a failure where path.registered_bytes is not 0. No copy may be in flight.
void gpu_pull_close(struct gpu_pull *pull);

// Whether the kernel is the faster one for this many rows, of whose slots this share will have changed.
bool gpu_pull_prefers_kernel(const struct gpu_pull *pull, uint32_t rows, float share);
// Issues, in the stream, what brings the staged layer of these rows to the landing: whole blocks, or what has
// changed in them (then there is a kernel). At most SCATTER_ROWS_MAX rows.
ICE_MUST_CHECK ice_status gpu_pull_issue(struct gpu_pull *pull, cuda_stream stream, const uint32_t *rows,
                                         uint32_t count, uint32_t layer, bool whole, char *text);

#endif
