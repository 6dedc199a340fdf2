// GPU memory as another process can open it: described by the worker that owns it, opened by the daemon, and proved on
// both sides by a pattern.
//
// Threads: any, one at a time per struct; the device is entered unless said otherwise.
#ifndef ICECACHE_GPU_EXPORT_H
#define ICECACHE_GPU_EXPORT_H

#include "gpu/device.h"
#include "proto/limits.h"

#define GPU_PROBE_SIDE_BYTES (WIRE_GPU_PROBE_BYTES / 2) // at each end of the landing

struct gpu_export {
    uint8_t uuid[CUDA_UUID_BYTES];
    bool whole; // a handle of one allocation, else pieces
    uint8_t handle[CUDA_HANDLE_BYTES];
    uint32_t piece_count;
    uint64_t piece_bytes[WIRE_DESCRIPTORS_MAX];
    int fds[WIRE_DESCRIPTORS_MAX]; // one per piece, owned
    uint64_t offset;               // of the landing in the allocation, or in the first piece
    uint8_t probe[WIRE_GPU_PROBE_BYTES];
};

// ---- worker ----

// Which device an address is on, and the context that its memory belongs to (NULL: none in particular, as for memory
// that is mapped). Nothing need be entered. ICE_INVALID_ARGUMENT where it is no GPU memory or managed memory.
ICE_MUST_CHECK ice_status gpu_address_find(const struct cuda_driver *driver, cuda_address address, cuda_device *device,
                                           cuda_context *context, char *text);
// Describes bytes from address on; the probe is left out. ICE_OUT_OF_BOUNDS: the memory ends before; ICE_NOT_SUPPORTED:
// it cannot be shared, and why.
ICE_MUST_CHECK ice_status gpu_export_open(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                                          struct gpu_export *out, char *text);
void gpu_export_close(struct gpu_export *memory); // its descriptors; nothing need be entered

// ---- daemon ----

struct gpu_import {
    cuda_address address;  // of the landing
    cuda_address base;     // of what was opened
    uint64_t mapped_bytes; // pieces: the reserved range; 0: a whole allocation
    uint32_t piece_count;
    uint64_t piece_bytes[WIRE_DESCRIPTORS_MAX];
};

// Opens it; `bytes` from the offset on must be there. On failure nothing stays open.
ICE_MUST_CHECK ice_status gpu_import_open(const struct gpu_device *device, const struct gpu_export *memory,
                                          uint64_t bytes, struct gpu_import *out, char *text);
void gpu_import_close(const struct gpu_device *device, struct gpu_import *import);

// ---- both ----

// Writes the pattern to the first and last bytes of the landing; it is there when the call returns.
ICE_MUST_CHECK ice_status gpu_probe_write(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                                          const uint8_t *probe, char *text);
// Reads both ends and compares: ICE_CONFLICT where they hold something else. inverted: every bit of the pattern is.
ICE_MUST_CHECK ice_status gpu_probe_check(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                                          const uint8_t *probe, bool inverted, char *text);

#endif
