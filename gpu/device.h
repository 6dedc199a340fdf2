// One GPU as a process uses it: a context, a stream of its own, fences on that stream.
//
// Threads: open and close by the owner. enter and leave by any thread, around every other call of gpu/ that takes the
// device; fences from one thread at a time.
#ifndef ICECACHE_GPU_DEVICE_H
#define ICECACHE_GPU_DEVICE_H

#include "gpu/driver.h"

#include <stdbool.h>

#define GPU_FENCES_MAX 64u // copies in flight per device; more wait

struct gpu_device {
    struct cuda_driver driver;
    cuda_device id;
    cuda_context context;
    bool retained; // the context is the primary one, held by us
    uint8_t uuid[CUDA_UUID_BYTES];
    char name[64];
    cuda_stream stream;
    cuda_event fences[GPU_FENCES_MAX];
};

// A device by its number in this process. context NULL: the primary one, which takes GPU memory where it is not there
// already; else borrowed until close. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_device_open(const struct cuda_driver *driver, cuda_device id, cuda_context context,
                                          struct gpu_device *out, char *text);
void gpu_device_close(struct gpu_device *device);

// Makes the device's context current to this thread until leave. Nests.
ICE_MUST_CHECK ice_status gpu_device_enter(const struct gpu_device *device, char *text);
void gpu_device_leave(const struct gpu_device *device);

// A fence behind everything issued so far. Setting it again moves it there.
ICE_MUST_CHECK ice_status gpu_fence_set(const struct gpu_device *device, uint32_t fence, char *text);
// The same in another stream of the context, which is the worker's.
ICE_MUST_CHECK ice_status gpu_fence_set_in(const struct gpu_device *device, cuda_stream stream, uint32_t fence,
                                           char *text);
// Work of this stream of the context would be carried out, not recorded into a graph: ICE_NOT_SUPPORTED otherwise.
ICE_MUST_CHECK ice_status gpu_stream_check(const struct gpu_device *device, cuda_stream stream, char *text);
// *done: all that was issued before it has been carried out. An error is the device's, and stays.
ICE_MUST_CHECK ice_status gpu_fence_poll(const struct gpu_device *device, uint32_t fence, bool *done, char *text);
// Sets a fence and asks for it without a pause: for what is timed. *done: it has been reached within the time.
ICE_MUST_CHECK ice_status gpu_fence_spin(const struct gpu_device *device, uint32_t fence, uint64_t within_ns,
                                         bool *done, char *text);
uint64_t gpu_now_ns(void); // of the monotonic clock

#endif
