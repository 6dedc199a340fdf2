// From a worker's GPU memory into host memory: appends, whose memory the daemon reads, and a retrieve's queries.
//
// Threads: fetch and wait by several, each with its own part of the host memory and its own fence; open and close
// alone.
#ifndef ICECACHE_GPU_FETCH_H
#define ICECACHE_GPU_FETCH_H

#include "gpu/device.h"

#define GPU_FETCH_BYTES_MAX (256ull << 20) // of host memory, which is registered in one call

struct gpu_fetch {
    struct gpu_device device;
};

// Rows of equal size, packed at the destination.
struct gpu_rows {
    uint64_t row_bytes, rows, stride_bytes; // stride: from one row to the next in GPU memory
};

// The way from the GPU that the address is on. Nothing need be entered, as in all calls here. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_fetch_open(const char *library, cuda_address address, struct gpu_fetch *out, char *text);
void gpu_fetch_close(struct gpu_fetch *fetch);
// Host memory that it may lead to, until it is unregistered, before the close. ICE_TOO_LARGE beyond
// GPU_FETCH_BYTES_MAX.
ICE_MUST_CHECK ice_status gpu_fetch_register(const struct gpu_fetch *fetch, uint8_t *memory, uint64_t bytes,
                                             char *text);
void gpu_fetch_unregister(const struct gpu_fetch *fetch, uint8_t *memory);
// Is the address on this way's GPU?
ICE_MUST_CHECK ice_status gpu_fetch_check(const struct gpu_fetch *fetch, cuda_address address, char *text);

// May copies be issued in the worker's stream (NULL: the default one)?
ICE_MUST_CHECK ice_status gpu_fetch_check_stream(const struct gpu_fetch *fetch, void *stream, char *text);

// Issues the copy of rows in the worker's stream (NULL: the default one).
ICE_MUST_CHECK ice_status gpu_fetch(const struct gpu_fetch *fetch, uint8_t *to, cuda_address from,
                                    const struct gpu_rows *rows, void *stream, char *text);
// Until all that was issued in the stream has ended. ICE_TIMEOUT at until_us of the monotonic clock; the copies then
// still write to the host memory.
ICE_MUST_CHECK ice_status gpu_fetch_wait(const struct gpu_fetch *fetch, uint32_t fence, void *stream, uint64_t until_us,
                                         char *text);
// After that time-out: have they ended meanwhile?
bool gpu_fetch_is_over(const struct gpu_fetch *fetch, uint32_t fence);

#endif
