// Waiting on the GPU's side.
//
// The words are registered as mapped memory, whose address on the GPU need not be the host's.
#include "gpu/timeline.h"

#include <stdio.h>

static ice_status check_support(const struct gpu_device *device, char *text)
{
    if (!device->driver.stream_wait_value) {
        (void)snprintf(text, CUDA_TEXT_BYTES,
                       "the CUDA driver has no cuStreamWaitValue64: wait with ice_retrieve_wait, or update the driver");
        return ICE_NOT_SUPPORTED;
    }
    int can = 0;
    const cuda_result result = device->driver.device_attribute(&can, CUDA_DEVICE_CAN_WAIT_FOR_64_BITS, device->id);
    if (result != CUDA_OK) {
        return cuda_failed(&device->driver, "cuDeviceGetAttribute", result, text);
    }
    if (can == 0) {
        (void)snprintf(text, CUDA_TEXT_BYTES,
                       "%s cannot wait for 64-bit values in a stream: wait with ice_retrieve_wait", device->name);
        return ICE_NOT_SUPPORTED;
    }
    return ICE_OK;
}

ice_status gpu_timeline_open(const struct gpu_device *device, _Atomic uint64_t *words, uint64_t bytes,
                             struct gpu_timeline *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    ice_status status = check_support(device, text);
    if (status == ICE_OK) {
        status = gpu_device_enter(device, text);
    }
    if (status != ICE_OK) {
        return status;
    }
    cuda_address address = 0;
    cuda_result result = driver->host_register((void *)words, bytes, CUDA_HOST_DEVICE_MAPPED);
    if (result != CUDA_OK) {
        status = cuda_failed(driver, "cuMemHostRegister", result, text);
    } else {
        result = driver->host_address(&address, (void *)words, 0);
        if (result != CUDA_OK) {
            status = cuda_failed(driver, "cuMemHostGetDevicePointer", result, text);
            (void)driver->host_unregister((void *)words);
        }
    }
    gpu_device_leave(device);
    if (status == ICE_OK) {
        *out = (struct gpu_timeline){device, words, address};
    }
    return status;
}

void gpu_timeline_close(const struct gpu_timeline *timeline)
{
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(timeline->device, text) == ICE_OK) {
        (void)timeline->device->driver.host_unregister((void *)timeline->words);
        gpu_device_leave(timeline->device);
    }
}

ice_status gpu_timeline_check(const struct gpu_timeline *timeline, void *stream, char *text)
{
    ice_status status = gpu_device_enter(timeline->device, text);
    if (status == ICE_OK) {
        status = gpu_stream_check(timeline->device, stream, text);
        gpu_device_leave(timeline->device);
    }
    return status;
}

ice_status gpu_timeline_wait(const struct gpu_timeline *timeline, uint32_t word, uint64_t value, void *stream,
                             char *text)
{
    const struct cuda_driver *driver = &timeline->device->driver;
    ice_status status = gpu_device_enter(timeline->device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result =
        driver->stream_wait_value(stream, timeline->address + word * sizeof(uint64_t), value, CUDA_WAIT_AT_LEAST);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuStreamWaitValue64", result, text);
    gpu_device_leave(timeline->device);
    return status;
}

// ---- marks ----

ice_status gpu_mark_create(const struct gpu_device *device, cuda_event *out, char *text)
{
    ice_status status = gpu_device_enter(device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = device->driver.event_create(out, CUDA_EVENT_DISABLE_TIMING);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuEventCreate", result, text);
    gpu_device_leave(device);
    return status;
}

void gpu_mark_destroy(const struct gpu_device *device, cuda_event mark)
{
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(device, text) == ICE_OK) {
        (void)device->driver.event_destroy(mark);
        gpu_device_leave(device);
    }
}

ice_status gpu_mark_set(const struct gpu_device *device, cuda_event mark, void *stream, char *text)
{
    ice_status status = gpu_device_enter(device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = device->driver.event_record(mark, stream);
    status = result == CUDA_OK ? ICE_OK : cuda_failed(&device->driver, "cuEventRecord", result, text);
    gpu_device_leave(device);
    return status;
}

ice_status gpu_mark_poll(const struct gpu_device *device, cuda_event mark, bool *passed, char *text)
{
    ice_status status = gpu_device_enter(device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = device->driver.event_query(mark);
    *passed = result == CUDA_OK;
    status = result == CUDA_OK || result == CUDA_NOT_READY ? ICE_OK
                                                           : cuda_failed(&device->driver, "cuEventQuery", result, text);
    gpu_device_leave(device);
    return status;
}
