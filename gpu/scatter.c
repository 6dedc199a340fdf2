// Loading and launching the scatter kernel.
#include "gpu/scatter.h"

// Threads of a block, and blocks for each cell. A slot is a warp's work and waits for the link twice, so the more warps
// there are, the more of that overlaps; all together they fill a small part of any GPU.
#define BLOCK_THREADS 256u
#define CELL_BLOCKS   4u

ice_status gpu_scatter_open(const struct gpu_device *device, struct gpu_scatter *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    *out = (struct gpu_scatter){0};
    cuda_result result = driver->module_load(&out->module, scatter_ptx);
    if (result != CUDA_OK) {
        out->module = NULL;
        return cuda_failed(driver, "cuModuleLoadData", result, text);
    }
    result = driver->module_function(&out->function, out->module, "icecache_scatter");
    if (result != CUDA_OK) {
        gpu_scatter_close(device, out);
        return cuda_failed(driver, "cuModuleGetFunction", result, text);
    }
    return ICE_OK;
}

void gpu_scatter_close(const struct gpu_device *device, struct gpu_scatter *scatter)
{
    if (scatter->module) {
        (void)device->driver.module_unload(scatter->module);
    }
    *scatter = (struct gpu_scatter){0};
}

ice_status gpu_scatter_launch(const struct gpu_device *device, const struct gpu_scatter *scatter,
                              struct scatter_job *job, cuda_stream stream, char *text)
{
    void *parameters[] = {job};
    const cuda_result result = device->driver.launch(scatter->function, job->kv_heads, job->row_count, CELL_BLOCKS,
                                                     BLOCK_THREADS, 1, 1, 0, stream, parameters, NULL);
    return result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuLaunchKernel", result, text);
}
