// Copies of one layer's selection. The staging has one place for each row and the landing's layout within it, so K and
// V of all heads of a row are one contiguous piece on both sides, and so are its positions and its counts.
//
// Invariants: every source is registered memory; counts are copied last, in stream order, so that who sees a count on
// the GPU sees the slots too. Threads: one at a time per path.
#include "gpu/copy.h"

static void unregister(const struct gpu_device *device, uint8_t *memory, uint64_t bytes)
{
    for (uint64_t offset = 0; offset < bytes; offset += GPU_REGISTER_BYTES) {
        (void)device->driver.host_unregister(memory + offset);
    }
}

ice_status gpu_path_open(struct gpu_path *path, const struct gpu_device *device, cuda_address to,
                         const struct landing_shape *shape, uint8_t *staging, char *text)
{
    *path = (struct gpu_path){.device = device, .stream = device->stream, .to = to, .shape = *shape, .from = staging};
    const struct landing_shape held = landing_held_shape(shape, LANDING_PULL);
    if (!landing_layout_init(&path->layout, shape) || !landing_layout_init(&path->held, &held)) {
        text[0] = '\0';
        return ICE_TOO_LARGE;
    }
    while (path->registered_bytes < path->held.total_bytes) {
        const uint64_t left = path->held.total_bytes - path->registered_bytes;
        const uint64_t bytes = left < GPU_REGISTER_BYTES ? left : GPU_REGISTER_BYTES;
        const cuda_result result = device->driver.host_register(staging + path->registered_bytes, bytes, 0);
        if (result != CUDA_OK) {
            unregister(device, staging, path->registered_bytes);
            return cuda_failed(&device->driver, "cuMemHostRegister", result, text);
        }
        path->registered_bytes += bytes;
    }
    return ICE_OK;
}

void gpu_path_close(struct gpu_path *path)
{
    unregister(path->device, path->from, path->registered_bytes);
}

// Cut where a registered piece ends.
static ice_status copy_piece(const struct gpu_path *path, uint64_t to, uint64_t from, uint64_t bytes, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    while (bytes > 0) {
        const uint64_t room = GPU_REGISTER_BYTES - from % GPU_REGISTER_BYTES;
        const uint64_t part = bytes < room ? bytes : room;
        const cuda_result result = driver->copy_to_device(path->to + to, path->from + from, part, path->stream);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuMemcpyHtoDAsync", result, text);
        }
        to += part;
        from += part;
        bytes -= part;
    }
    return ICE_OK;
}

ice_status gpu_path_copy(const struct gpu_path *path, uint32_t row, uint32_t layer, char *text)
{
    const struct landing_shape held = landing_held_shape(&path->shape, LANDING_PULL);
    return copy_piece(path, landing_block(&path->layout, &path->shape, row, layer),
                      landing_block(&path->held, &held, row, 0), path->layout.block_bytes, text);
}

ice_status gpu_path_clear(const struct gpu_path *path, uint32_t row, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    for (uint32_t layer = 0; layer < path->shape.layers; layer++) {
        const uint64_t counts = landing_block(&path->layout, &path->shape, row, layer) + path->layout.counts_offset;
        const cuda_result result =
            driver->fill(path->to + counts, 0, path->shape.kv_heads * sizeof(uint32_t), path->stream);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuMemsetD8Async", result, text);
        }
    }
    return ICE_OK;
}
