// Copies of one layer's selection. The staging has one place for each row and the landing's layout within it, so K and
// V of all heads of a row are one contiguous piece on both sides, and so are its positions and its counts.
//
// Invariants: every source is registered memory; counts are copied last, in stream order, so that who sees a count on
// the GPU sees the slots too. Threads: one at a time per path.
#include "gpu/copy.h"

#include <stdatomic.h>
#include <stdio.h>

static void unregister(const struct gpu_device *device, uint8_t *memory, uint64_t bytes)
{
    for (uint64_t offset = 0; offset < bytes; offset += GPU_REGISTER_BYTES) {
        (void)device->driver.host_unregister(memory + offset);
    }
}

ice_status gpu_path_open(struct gpu_path *path, const struct gpu_device *device, cuda_address to,
                         const struct landing_shape *shape, enum landing_place place, uint8_t *staging, char *text)
{
    *path = (struct gpu_path){.device = device, .to = to, .shape = *shape, .from = staging};
    if (!landing_layout_init(&path->layout, shape) || !landing_held_init(&path->held, shape, place)) {
        text[0] = '\0';
        return ICE_TOO_LARGE;
    }
    while (path->registered_bytes < path->held.total_bytes) {
        const uint64_t left = path->held.total_bytes - path->registered_bytes;
        const uint64_t bytes = left < GPU_REGISTER_BYTES ? left : GPU_REGISTER_BYTES;
        const cuda_result result =
            device->driver.host_register(staging + path->registered_bytes, bytes, CUDA_HOST_DEVICE_MAPPED);
        if (result != CUDA_OK) {
            unregister(device, staging, path->registered_bytes);
            path->registered_bytes = 0;
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
static ice_status copy_piece(const struct gpu_path *path, cuda_stream stream, uint64_t to, uint64_t from,
                             uint64_t bytes, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    while (bytes > 0) {
        const uint64_t room = GPU_REGISTER_BYTES - from % GPU_REGISTER_BYTES;
        const uint64_t part = bytes < room ? bytes : room;
        const cuda_result result = driver->copy_to_device(path->to + to, path->from + from, part, stream);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuMemcpyHtoDAsync", result, text);
        }
        to += part;
        from += part;
        bytes -= part;
    }
    return ICE_OK;
}

static ice_status copy_block(const struct gpu_path *path, cuda_stream stream, uint32_t row, uint32_t layer, char *text)
{
    const struct landing_shape held = landing_held_shape(&path->shape, LANDING_PULL);
    return copy_piece(path, stream, landing_block(&path->layout, &path->shape, row, layer),
                      landing_block(&path->held, &held, row, 0), path->layout.block_bytes, text);
}

// ---- one call for several rows ----

struct batch {
    cuda_address to[GPU_BATCH_MAX], from[GPU_BATCH_MAX];
    size_t bytes[GPU_BATCH_MAX];
    size_t count;
};

static ice_status issue_batch(const struct gpu_path *path, cuda_stream stream, struct batch *batch, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    struct cuda_batch_attributes attributes = {.source_order = CUDA_SOURCE_IN_STREAM_ORDER};
    size_t first = 0, failed = 0; // one attribute, for all copies from the first on
    if (batch->count == 0) {
        return ICE_OK;
    }
    const cuda_result result =
        driver->copy_batch
            ? driver->copy_batch(batch->to, batch->from, batch->bytes, batch->count, &attributes, &first, 1, stream)
            : driver->copy_batch_12(batch->to, batch->from, batch->bytes, batch->count, &attributes, &first, 1, &failed,
                                    stream);
    batch->count = 0;
    return result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemcpyBatchAsync", result, text);
}

// Copies of one call are in no order, so a block in two pieces is copied by itself: its counts come last.
static ice_status copy_batched(const struct gpu_path *path, cuda_stream stream, const uint32_t *rows, uint32_t count,
                               uint32_t layer, char *text)
{
    const struct landing_shape held = landing_held_shape(&path->shape, LANDING_PULL);
    struct batch batch;
    batch.count = 0;
    ice_status status = ICE_OK;
    for (uint32_t i = 0; i < count && status == ICE_OK; i++) {
        const uint64_t bytes = path->layout.block_bytes, from = landing_block(&path->held, &held, rows[i], 0);
        if (from / GPU_REGISTER_BYTES != (from + bytes - 1) / GPU_REGISTER_BYTES) {
            status = copy_block(path, stream, rows[i], layer, text);
            continue;
        }
        batch.to[batch.count] = path->to + landing_block(&path->layout, &path->shape, rows[i], layer);
        batch.from[batch.count] = (cuda_address)(uintptr_t)(path->from + from);
        batch.bytes[batch.count++] = bytes;
        if (batch.count == GPU_BATCH_MAX) {
            status = issue_batch(path, stream, &batch, text);
        }
    }
    return status == ICE_OK ? issue_batch(path, stream, &batch, text) : status;
}

ice_status gpu_path_copy_rows(struct gpu_path *path, cuda_stream stream, const uint32_t *rows, uint32_t count,
                              uint32_t layer, char *text)
{
    const uint32_t batch_from = atomic_load_explicit(&path->batch_from, memory_order_relaxed);
    text[0] = '\0';
    if (batch_from != 0 && count >= batch_from) {
        char reason[CUDA_TEXT_BYTES];
        if (copy_batched(path, stream, rows, count, layer, reason) == ICE_OK) {
            return ICE_OK;
        }
        // What was issued is issued again behind it: the same bytes.
        atomic_store_explicit(&path->batch_from, 0, memory_order_relaxed);
        (void)snprintf(text, CUDA_TEXT_BYTES, "rows are copied one by one from now on: %.200s", reason);
    }
    ice_status status = ICE_OK;
    for (uint32_t i = 0; i < count && status == ICE_OK; i++) {
        status = copy_block(path, stream, rows[i], layer, text);
    }
    return status;
}

ice_status gpu_path_clear(const struct gpu_path *path, cuda_stream stream, uint32_t row, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    for (uint32_t layer = 0; layer < path->shape.layers; layer++) {
        const uint64_t counts = landing_block(&path->layout, &path->shape, row, layer) + path->layout.counts_offset;
        const cuda_result result = driver->fill(path->to + counts, 0, path->shape.kv_heads * sizeof(uint32_t), stream);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuMemsetD8Async", result, text);
        }
    }
    return ICE_OK;
}
