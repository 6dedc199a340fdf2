// A worker's GPU memory. The context is the one that the memory belongs to, or the device's primary one, which is what
// PyTorch and the CUDA runtime use.
#include "gpu/buffer.h"

#include <stdio.h>

static ice_status allocate(struct gpu_buffer *buffer, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status != ICE_OK) {
        return status;
    }
    const struct cuda_driver *driver = &buffer->device.driver;
    const cuda_result result = driver->memory_alloc(&buffer->address, buffer->bytes);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemAlloc", result, text);
    buffer->owned = status == ICE_OK;
    gpu_device_leave(&buffer->device);
    return status;
}

static ice_status find_ordinal(const struct cuda_driver *driver, int ordinal, cuda_device *device, char *text)
{
    int count = 0;
    const cuda_result result = driver->device_count(&count);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuDeviceGetCount", result, text);
    }
    if (ordinal < 0 || ordinal >= count || driver->device_get(device, ordinal) != CUDA_OK) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "GPU %d: this process sees GPUs 0 to %d", ordinal, count - 1);
        return ICE_INVALID_ARGUMENT;
    }
    return ICE_OK;
}

ice_status gpu_buffer_open(const char *library, cuda_address address, uint64_t bytes, int ordinal,
                           struct gpu_buffer *out, char *text)
{
    struct cuda_driver driver;
    ice_status status = cuda_driver_open(library, &driver, text);
    if (status != ICE_OK) {
        return status;
    }
    *out = (struct gpu_buffer){.address = address, .bytes = bytes};
    cuda_device device = 0;
    cuda_context context = NULL;
    status = address != 0 ? gpu_address_find(&driver, address, &device, &context, text)
                          : find_ordinal(&driver, ordinal, &device, text);
    if (status == ICE_OK) {
        status = gpu_device_open(&driver, device, context, &out->device, text);
    }
    if (status == ICE_OK && address == 0) {
        status = allocate(out, text);
        if (status != ICE_OK) {
            gpu_device_close(&out->device);
        }
    }
    return status;
}

void gpu_buffer_close(struct gpu_buffer *buffer)
{
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(&buffer->device, text) == ICE_OK) {
        if (buffer->pulls) {
            gpu_pull_close(&buffer->pull);
        }
        if (buffer->owned) {
            (void)buffer->device.driver.memory_free(buffer->address);
        }
        gpu_device_leave(&buffer->device);
    }
    gpu_device_close(&buffer->device);
}

ice_status gpu_buffer_clear(const struct gpu_buffer *buffer, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status != ICE_OK) {
        return status;
    }
    const struct cuda_driver *driver = &buffer->device.driver;
    cuda_result result = driver->fill_waiting(buffer->address, 0, buffer->bytes);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemsetD8", result, text);
    if (status == ICE_OK) {
        uint8_t first; // a fill may be under way when its call returns; a copy to the host comes after it, and is over
        result = driver->copy_to_host_waiting(&first, buffer->address, sizeof(first));
        status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemcpyDtoH", result, text);
    }
    gpu_device_leave(&buffer->device);
    return status;
}

ice_status gpu_buffer_export(const struct gpu_buffer *buffer, const uint8_t *random, struct gpu_export *out, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status != ICE_OK) {
        return status;
    }
    status = gpu_export_open(&buffer->device, buffer->address, buffer->bytes, out, text);
    if (status == ICE_OK) {
        for (size_t i = 0; i < sizeof(out->probe); i++) {
            out->probe[i] = random[i];
        }
        status = gpu_probe_write(&buffer->device, buffer->address, buffer->bytes, out->probe, text);
        if (status != ICE_OK) {
            gpu_export_close(out);
        }
    }
    gpu_device_leave(&buffer->device);
    return status;
}

ice_status gpu_buffer_check(const struct gpu_buffer *buffer, const struct gpu_export *memory, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status == ICE_OK) {
        status = gpu_probe_check(&buffer->device, buffer->address, buffer->bytes, memory->probe, true, text);
        gpu_device_leave(&buffer->device);
    }
    return status;
}

ice_status gpu_buffer_pull_open(struct gpu_buffer *buffer, const struct landing_shape *shape, uint8_t *staging,
                                enum gpu_copy_way way, bool wants_kernel, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status == ICE_OK) {
        status =
            gpu_pull_open(&buffer->pull, &buffer->device, buffer->address, shape, staging, way, wants_kernel, text);
        buffer->pulls = buffer->pull.path.registered_bytes > 0; // until close, also where what follows fails
        gpu_device_leave(&buffer->device);
    }
    return status;
}

// With the device entered.
static ice_status bring_rows(struct gpu_pull *pull, cuda_stream stream, const uint32_t *rows, const bool *cleared,
                             uint32_t count, uint32_t layer, bool whole, char *text)
{
    ice_status status = ICE_OK;
    for (uint32_t i = 0; i < count && status == ICE_OK; i++) {
        if (cleared[i]) {
            status = gpu_path_clear(&pull->path, stream, rows[i], text);
        }
    }
    return status == ICE_OK ? gpu_pull_issue(pull, stream, rows, count, layer, whole, text) : status;
}

ice_status gpu_buffer_pull(struct gpu_buffer *buffer, const uint32_t *rows, const bool *cleared, uint32_t count,
                           uint32_t layer, bool whole, uint32_t fence, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status != ICE_OK) {
        return status;
    }
    status = bring_rows(&buffer->pull, buffer->device.stream, rows, cleared, count, layer, whole, text);
    if (status == ICE_OK) {
        status = gpu_fence_set(&buffer->device, fence, text);
    }
    gpu_device_leave(&buffer->device);
    return status;
}

ice_status gpu_buffer_pull_in(struct gpu_buffer *buffer, void *stream, const uint32_t *rows, const bool *cleared,
                              uint32_t count, uint32_t layer, bool whole, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status != ICE_OK) {
        return status;
    }
    status = bring_rows(&buffer->pull, stream, rows, cleared, count, layer, whole, text);
    gpu_device_leave(&buffer->device);
    return status;
}

ice_status gpu_buffer_poll(const struct gpu_buffer *buffer, uint32_t fence, bool *done, char *text)
{
    ice_status status = gpu_device_enter(&buffer->device, text);
    if (status == ICE_OK) {
        status = gpu_fence_poll(&buffer->device, fence, done, text);
        gpu_device_leave(&buffer->device);
    }
    return status;
}
