// A worker's GPU memory as the destination of selections: its own or made here, shared with the daemon (push) or filled
// by the worker from a staging (pull).
//
// Threads: one at a time per buffer, unless said otherwise. No call needs a current context or leaves one.
#ifndef ICECACHE_GPU_BUFFER_H
#define ICECACHE_GPU_BUFFER_H

#include "gpu/export.h"
#include "gpu/pull.h"

struct gpu_buffer {
    struct gpu_device device;
    cuda_address address;
    uint64_t bytes;
    bool owned; // allocated here
    bool pulls; // pull is open
    struct gpu_pull pull;
};

// Finds the GPU of [address, address + bytes), or allocates bytes on a device of this process (address 0). The memory's
// context must stay until close. ICE_NOT_SUPPORTED: no driver or no such memory, and why in text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_buffer_open(const char *library, cuda_address address, uint64_t bytes, int ordinal,
                                          struct gpu_buffer *out, char *text);
// Nothing may be in flight, and no other process may have the memory open.
void gpu_buffer_close(struct gpu_buffer *buffer);

// Makes all of it 0, so all counts: the empty landing. Done when it returns, whatever stream comes next.
ICE_MUST_CHECK ice_status gpu_buffer_clear(const struct gpu_buffer *buffer, char *text);
// Describes the memory for the daemon and writes the probe, of which `random` is the pattern. Close the export.
ICE_MUST_CHECK ice_status gpu_buffer_export(const struct gpu_buffer *buffer, const uint8_t *random,
                                            struct gpu_export *out, char *text);
// Has the daemon written to this very memory?
ICE_MUST_CHECK ice_status gpu_buffer_check(const struct gpu_buffer *buffer, const struct gpu_export *memory,
                                           char *text);

// Pull: registers the staging of a landing of this shape, which stays until close. As gpu_pull_open.
ICE_MUST_CHECK ice_status gpu_buffer_pull_open(struct gpu_buffer *buffer, const struct landing_shape *shape,
                                               uint8_t *staging, enum gpu_copy_way way, bool wants_kernel, char *text);
// Issues what brings these rows' staged layer to the landing, as gpu_pull_issue, and a fence behind it. cleared[i]: the
// row's counts become 0 first.
ICE_MUST_CHECK ice_status gpu_buffer_pull(struct gpu_buffer *buffer, const uint32_t *rows, const bool *cleared,
                                          uint32_t count, uint32_t layer, bool whole, uint32_t fence, char *text);
// The same in a stream of the worker's (NULL: the default one), and no fence. What is staged may still be on its way:
// it is read when the stream comes to it. Beside the other calls of the
// buffer, from any thread.
ICE_MUST_CHECK ice_status gpu_buffer_pull_in(struct gpu_buffer *buffer, void *stream, const uint32_t *rows,
                                             const bool *cleared, uint32_t count, uint32_t layer, bool whole,
                                             char *text);
// *done: the fence has been reached. Any thread.
ICE_MUST_CHECK ice_status gpu_buffer_poll(const struct gpu_buffer *buffer, uint32_t fence, bool *done, char *text);

#endif
