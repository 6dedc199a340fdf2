// The worker's GPU waits for timeline words (proto/timeline.h), and marks tell how far a stream has come.
//
// Threads: open and close alone; the rest by several. Nothing need be entered.
#ifndef ICECACHE_GPU_TIMELINE_H
#define ICECACHE_GPU_TIMELINE_H

#include "gpu/device.h"

#include <stdatomic.h>

struct gpu_timeline {
    const struct gpu_device *device; // borrowed
    _Atomic uint64_t *words;         // registered
    cuda_address address;            // of the words, as the GPU has it
};

// Registers the words: whole pages. ICE_NOT_SUPPORTED where the driver or the GPU cannot wait for them, and why in
// text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_timeline_open(const struct gpu_device *device, _Atomic uint64_t *words, uint64_t bytes,
                                            struct gpu_timeline *out, char *text);
void gpu_timeline_close(const struct gpu_timeline *timeline); // no stream may wait for a word any more

// May this stream of the context be made to wait (NULL: the default one)?
ICE_MUST_CHECK ice_status gpu_timeline_check(const struct gpu_timeline *timeline, void *stream, char *text);
// Issues: what comes behind it in the stream begins when the word has at least this value.
ICE_MUST_CHECK ice_status gpu_timeline_wait(const struct gpu_timeline *timeline, uint32_t word, uint64_t value,
                                            void *stream, char *text);

// A mark: how far a stream has come.
ICE_MUST_CHECK ice_status gpu_mark_create(const struct gpu_device *device, cuda_event *out, char *text);
void gpu_mark_destroy(const struct gpu_device *device, cuda_event mark);
// Behind all that is issued in the stream. Setting it again moves it there.
ICE_MUST_CHECK ice_status gpu_mark_set(const struct gpu_device *device, cuda_event mark, void *stream, char *text);
ICE_MUST_CHECK ice_status gpu_mark_poll(const struct gpu_device *device, cuda_event mark, bool *passed, char *text);

#endif
