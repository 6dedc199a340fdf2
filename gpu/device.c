// A GPU's context, stream and fences.
//
// Invariant: what open has not made, it has undone.
#include "gpu/device.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

ice_status gpu_device_enter(const struct gpu_device *device, char *text)
{
    const cuda_result result = device->driver.context_push(device->context);
    return result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuCtxPushCurrent", result, text);
}

void gpu_device_leave(const struct gpu_device *device)
{
    cuda_context popped;
    (void)device->driver.context_pop(&popped); // only fails where nothing was pushed
}

// With the context current: the stream and its fences.
static ice_status streams_create(struct gpu_device *device, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    // Of the highest priority there is: the driver takes what is out of range as its nearest.
    cuda_result result = driver->stream_create(&device->stream, CUDA_STREAM_NON_BLOCKING, -100);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuStreamCreateWithPriority", result, text);
    }
    for (uint32_t i = 0; i < GPU_FENCES_MAX; i++) {
        result = driver->event_create(&device->fences[i], CUDA_EVENT_DISABLE_TIMING);
        if (result != CUDA_OK) {
            device->fences[i] = NULL;
            return cuda_failed(driver, "cuEventCreate", result, text);
        }
    }
    return ICE_OK;
}

static void streams_destroy(struct gpu_device *device)
{
    for (uint32_t i = 0; i < GPU_FENCES_MAX && device->fences[i]; i++) {
        (void)device->driver.event_destroy(device->fences[i]);
    }
    if (device->stream) {
        (void)device->driver.stream_destroy(device->stream);
    }
}

static ice_status identify(struct gpu_device *device, char *text)
{
    struct cuda_uuid uuid;
    cuda_result result = device->driver.device_uuid(&uuid, device->id);
    if (result != CUDA_OK) {
        return cuda_failed(&device->driver, "cuDeviceGetUuid", result, text);
    }
    memcpy(device->uuid, uuid.bytes, sizeof(device->uuid));
    result = device->driver.device_name(device->name, (int)sizeof(device->name), device->id);
    return result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuDeviceGetName", result, text);
}

ice_status gpu_device_open(const struct cuda_driver *driver, cuda_device id, cuda_context context,
                           struct gpu_device *out, char *text)
{
    *out = (struct gpu_device){.driver = *driver, .id = id, .context = context};
    ice_status status = identify(out, text);
    if (status != ICE_OK) {
        return status;
    }
    if (!context) {
        const cuda_result result = driver->primary_retain(&out->context, id);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuDevicePrimaryCtxRetain", result, text);
        }
        out->retained = true;
    }
    status = gpu_device_enter(out, text);
    if (status == ICE_OK) {
        status = streams_create(out, text);
        if (status != ICE_OK) {
            streams_destroy(out);
        }
        gpu_device_leave(out);
    }
    if (status != ICE_OK && out->retained) {
        (void)driver->primary_release(id);
    }
    return status;
}

void gpu_device_close(struct gpu_device *device)
{
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(device, text) == ICE_OK) {
        streams_destroy(device);
        gpu_device_leave(device);
    }
    if (device->retained) {
        (void)device->driver.primary_release(device->id);
    }
}

ice_status gpu_fence_set(const struct gpu_device *device, uint32_t fence, char *text)
{
    return gpu_fence_set_in(device, device->stream, fence, text);
}

ice_status gpu_fence_set_in(const struct gpu_device *device, cuda_stream stream, uint32_t fence, char *text)
{
    const cuda_result result = device->driver.event_record(device->fences[fence], stream);
    return result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuEventRecord", result, text);
}

ice_status gpu_fence_poll(const struct gpu_device *device, uint32_t fence, bool *done, char *text)
{
    const cuda_result result = device->driver.event_query(device->fences[fence]);
    *done = result == CUDA_OK;
    return result == CUDA_OK || result == CUDA_NOT_READY ? ICE_OK
                                                         : cuda_failed(&device->driver, "cuEventQuery", result, text);
}

uint64_t gpu_now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

ice_status gpu_fence_spin(const struct gpu_device *device, uint32_t fence, uint64_t within_ns, bool *done, char *text)
{
    const uint64_t begun_ns = gpu_now_ns();
    *done = false;
    ice_status status = gpu_fence_set(device, fence, text);
    while (status == ICE_OK && !*done && gpu_now_ns() - begun_ns < within_ns) {
        status = gpu_fence_poll(device, fence, done, text);
    }
    return status;
}

ice_status gpu_stream_check(const struct gpu_device *device, cuda_stream stream, char *text)
{
    int capture = CUDA_CAPTURE_NONE;
    const cuda_result result = device->driver.stream_capturing(stream, &capture);
    if (result != CUDA_OK) {
        return cuda_failed(&device->driver, "cuStreamIsCapturing", result, text);
    }
    if (capture != CUDA_CAPTURE_NONE) {
        (void)snprintf(text, CUDA_TEXT_BYTES,
                       "the stream is being captured into a CUDA graph; make this call outside of the capture");
        return ICE_NOT_SUPPORTED;
    }
    return ICE_OK;
}
