// The kernel that puts what has changed in a staged selection into the landing: one launch for all rows of a retrieve,
// however many slots have changed, read by the GPU from the staging itself. Used in the worker only: a kernel of the
// daemon would take turns with the worker's.
#ifndef ICECACHE_GPU_SCATTER_H
#define ICECACHE_GPU_SCATTER_H

#include "gpu/device.h"
#include "gpu/scatter_job.h"

struct gpu_scatter {
    cuda_module module; // NULL: closed
    cuda_function function;
};

extern const char scatter_ptx[]; // gpu/scatter.ptx, ends with a 0

// Compiles the kernel for the device, which takes the driver some ms. Device entered. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_scatter_open(const struct gpu_device *device, struct gpu_scatter *out, char *text);
void gpu_scatter_close(const struct gpu_device *device, struct gpu_scatter *scatter); // accepts a closed one
// Issues a job of 1 to SCATTER_ROWS_MAX rows in the stream; it is copied. Device entered.
ICE_MUST_CHECK ice_status gpu_scatter_launch(const struct gpu_device *device, const struct gpu_scatter *scatter,
                                             struct scatter_job *job, cuda_stream stream, char *text);

#endif
