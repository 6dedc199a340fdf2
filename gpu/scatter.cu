// The scatter kernel of a worker, see scatter_job.h. One block of 8 warps for each KV head, row and part; a warp copies
// a slot at a time. Compiled to gpu/scatter.ptx, which is kept: gpu/make-ptx.
#include "gpu/scatter_job.h"

extern "C" __global__ void icecache_scatter(const struct scatter_job job)
{
    const uint32_t warps = blockDim.x / 32u;
    scatter_cell(&job, blockIdx.y, blockIdx.x, blockIdx.z * warps + threadIdx.x / 32u, gridDim.z * warps,
                 threadIdx.x % 32u, 32u);
}
