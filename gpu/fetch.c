// Copies out of a worker's GPU memory. They go in the worker's own stream, so behind the kernels that make K and V.
#include "gpu/fetch.h"

#include "gpu/export.h"

#include <stdbool.h>
#include <stdio.h>
#include <time.h>

#define SPIN_US  200u // how long the end of a copy is asked for without a pause
#define PAUSE_US 20u

ice_status gpu_fetch_open(const char *library, cuda_address address, struct gpu_fetch *out, char *text)
{
    struct cuda_driver driver;
    cuda_device device = 0;
    cuda_context context = NULL;
    ice_status status = cuda_driver_open(library, &driver, text);
    if (status == ICE_OK) {
        status = gpu_address_find(&driver, address, &device, &context, text);
    }
    return status == ICE_OK ? gpu_device_open(&driver, device, context, &out->device, text) : status;
}

void gpu_fetch_close(struct gpu_fetch *fetch)
{
    gpu_device_close(&fetch->device);
}

ice_status gpu_fetch_register(const struct gpu_fetch *fetch, uint8_t *memory, uint64_t bytes, char *text)
{
    if (bytes > GPU_FETCH_BYTES_MAX) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "the staging area has more than %llu MiB; lower staging_bytes",
                       GPU_FETCH_BYTES_MAX >> 20);
        return ICE_TOO_LARGE;
    }
    ice_status status = gpu_device_enter(&fetch->device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = fetch->device.driver.host_register(memory, bytes, 0);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(&fetch->device.driver, "cuMemHostRegister", result, text);
    gpu_device_leave(&fetch->device);
    return status;
}

void gpu_fetch_unregister(const struct gpu_fetch *fetch, uint8_t *memory)
{
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(&fetch->device, text) == ICE_OK) {
        (void)fetch->device.driver.host_unregister(memory);
        gpu_device_leave(&fetch->device);
    }
}

ice_status gpu_fetch_check(const struct gpu_fetch *fetch, cuda_address address, char *text)
{
    cuda_device device = 0;
    cuda_context context = NULL;
    const ice_status status = gpu_address_find(&fetch->device.driver, address, &device, &context, text);
    if (status == ICE_OK && device != fetch->device.id) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "this client appends from another GPU already; connect once for each");
        return ICE_NOT_SUPPORTED;
    }
    return status;
}

ice_status gpu_fetch_check_stream(const struct gpu_fetch *fetch, void *stream, char *text)
{
    ice_status status = gpu_device_enter(&fetch->device, text);
    if (status == ICE_OK) {
        status = gpu_stream_check(&fetch->device, stream, text);
        gpu_device_leave(&fetch->device);
    }
    return status;
}

ice_status gpu_fetch(const struct gpu_fetch *fetch, uint8_t *to, cuda_address from, const struct gpu_rows *rows,
                     void *stream, char *text)
{
    ice_status status = gpu_device_enter(&fetch->device, text);
    if (status != ICE_OK) {
        return status;
    }
    const struct cuda_driver *driver = &fetch->device.driver;
    const bool packed = rows->stride_bytes == rows->row_bytes; // then one long row
    struct cuda_rows copy = {
        .from_type = CUDA_MEMORY_DEVICE,
        .from_device = from,
        .from_pitch = packed ? rows->row_bytes * rows->rows : rows->stride_bytes,
        .to_type = CUDA_MEMORY_HOST,
        .to_host = to,
        .width_bytes = packed ? rows->row_bytes * rows->rows : rows->row_bytes,
        .height = packed ? 1 : rows->rows,
    };
    copy.to_pitch = copy.width_bytes;
    const cuda_result result = driver->copy_rows(&copy, stream);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemcpy2DAsync", result, text);
    gpu_device_leave(&fetch->device);
    return status;
}

static uint64_t now_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

ice_status gpu_fetch_wait(const struct gpu_fetch *fetch, uint32_t fence, void *stream, uint64_t until_us, char *text)
{
    ice_status status = gpu_device_enter(&fetch->device, text);
    if (status != ICE_OK) {
        return status;
    }
    status = gpu_fence_set_in(&fetch->device, stream, fence, text);
    const uint64_t begun_us = now_us();
    for (bool done = false; status == ICE_OK && !done;) {
        status = gpu_fence_poll(&fetch->device, fence, &done, text);
        const uint64_t at_us = now_us();
        if (status == ICE_OK && !done && at_us >= until_us) {
            (void)snprintf(text, CUDA_TEXT_BYTES, "what is issued in the stream has not ended within the deadline");
            status = ICE_TIMEOUT;
        } else if (!done && at_us - begun_us >= SPIN_US) {
            const struct timespec pause = {0, PAUSE_US * 1000};
            (void)nanosleep(&pause, NULL);
        }
    }
    gpu_device_leave(&fetch->device);
    return status;
}

bool gpu_fetch_is_over(const struct gpu_fetch *fetch, uint32_t fence)
{
    char text[CUDA_TEXT_BYTES];
    bool done = false;
    if (gpu_device_enter(&fetch->device, text) == ICE_OK) {
        const ice_status status = gpu_fence_poll(&fetch->device, fence, &done, text);
        done = done && status == ICE_OK;
        gpu_device_leave(&fetch->device);
    }
    return done;
}
