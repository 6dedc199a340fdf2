// The worker's side of sharing GPU memory, and the pattern that proves it.
//
// Memory of cudaMalloc is shared by a handle of the whole allocation, whatever was cut from it; memory that is mapped
// (PyTorch's expandable segments, cudaMallocAsync) by one descriptor for each physical piece. A handle says nothing of
// the place within the allocation, so the offset travels beside it.
#include "gpu/export.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

ice_status gpu_address_find(const struct cuda_driver *driver, cuda_address address, cuda_device *device,
                            cuda_context *context, char *text)
{
    unsigned type = 0, managed = 0;
    int ordinal = 0;
    if (driver->pointer_attribute(&type, CUDA_POINTER_MEMORY_TYPE, address) != CUDA_OK || type != CUDA_MEMORY_DEVICE) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "address 0x%llx is not in GPU memory", address);
        return ICE_INVALID_ARGUMENT;
    }
    if (driver->pointer_attribute(&managed, CUDA_POINTER_IS_MANAGED, address) == CUDA_OK && (managed & 0xffu) != 0) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "address 0x%llx is managed memory, which cannot be shared", address);
        return ICE_INVALID_ARGUMENT;
    }
    cuda_result result = driver->pointer_attribute(&ordinal, CUDA_POINTER_DEVICE_ORDINAL, address);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuPointerGetAttribute", result, text);
    }
    result = driver->device_get(device, ordinal);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuDeviceGet", result, text);
    }
    *context = NULL;
    if (driver->pointer_attribute(context, CUDA_POINTER_CONTEXT, address) != CUDA_OK) {
        *context = NULL;
    }
    return ICE_OK;
}

static ice_status too_short(cuda_address end, cuda_address wanted, char *text)
{
    (void)snprintf(text, CUDA_TEXT_BYTES, "the GPU memory ends %llu bytes before the landing does", wanted - end);
    return ICE_OUT_OF_BOUNDS;
}

static ice_status export_whole(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                               struct gpu_export *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    cuda_address base = 0;
    size_t base_bytes = 0;
    cuda_result result = driver->address_range(&base, &base_bytes, address);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemGetAddressRange", result, text);
    }
    if (address + bytes > base + base_bytes) {
        return too_short(base + base_bytes, address + bytes, text);
    }
    struct cuda_handle handle;
    result = driver->ipc_get_handle(&handle, base);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuIpcGetMemHandle", result, text);
    }
    memcpy(out->handle, handle.bytes, sizeof(out->handle));
    out->whole = true;
    out->offset = address - base;
    return ICE_OK;
}

// A descriptor of the physical piece that is mapped at base.
static ice_status export_piece(const struct gpu_device *device, cuda_address base, int *fd_out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    cuda_allocation allocation;
    cuda_result result = driver->allocation_retain(&allocation, (void *)(uintptr_t)base);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemRetainAllocationHandle", result, text);
    }
    result = driver->allocation_export(fd_out, allocation, CUDA_HANDLE_POSIX_FD, 0);
    (void)driver->allocation_release(allocation); // the mapping holds it
    return result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemExportToShareableHandle", result, text);
}

static ice_status export_pieces(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                                struct gpu_export *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    for (cuda_address at = address; at < address + bytes;) {
        cuda_address base = 0;
        size_t base_bytes = 0;
        unsigned long long types = 0;
        if (out->piece_count == WIRE_DESCRIPTORS_MAX) {
            (void)snprintf(text, CUDA_TEXT_BYTES,
                           "the GPU memory is in more than %u pieces: allocate it in one, or with cudaMalloc",
                           WIRE_DESCRIPTORS_MAX);
            return ICE_TOO_LARGE;
        }
        if (driver->address_range(&base, &base_bytes, at) != CUDA_OK || base_bytes == 0) {
            return too_short(at, address + bytes, text);
        }
        if (driver->pointer_attribute(&types, CUDA_POINTER_HANDLE_TYPES, at) != CUDA_OK ||
            (types & CUDA_HANDLE_POSIX_FD) == 0) {
            (void)snprintf(text, CUDA_TEXT_BYTES,
                           "the GPU memory was mapped without handles for other processes (as vLLM's sleep mode does)");
            return ICE_NOT_SUPPORTED;
        }
        const ice_status status = export_piece(device, base, &out->fds[out->piece_count], text);
        if (status != ICE_OK) {
            return status;
        }
        if (out->piece_count == 0) {
            out->offset = address - base;
        }
        out->piece_bytes[out->piece_count++] = base_bytes;
        at = base + base_bytes;
    }
    return ICE_OK;
}

ice_status gpu_export_open(const struct gpu_device *device, cuda_address address, uint64_t bytes,
                           struct gpu_export *out, char *text)
{
    *out = (struct gpu_export){0};
    memcpy(out->uuid, device->uuid, sizeof(out->uuid));
    unsigned legacy = 0;
    const cuda_result result = device->driver.pointer_attribute(&legacy, CUDA_POINTER_LEGACY_IPC, address);
    if (result != CUDA_OK) {
        return cuda_failed(&device->driver, "cuPointerGetAttribute", result, text);
    }
    const ice_status status = (legacy & 0xffu) != 0 ? export_whole(device, address, bytes, out, text)
                                                    : export_pieces(device, address, bytes, out, text);
    if (status != ICE_OK) {
        gpu_export_close(out);
    }
    return status;
}

void gpu_export_close(struct gpu_export *memory)
{
    for (uint32_t i = 0; i < memory->piece_count; i++) {
        (void)close(memory->fds[i]);
    }
    memory->piece_count = 0;
}

// ---- the pattern ----

ice_status gpu_probe_write(const struct gpu_device *device, cuda_address address, uint64_t bytes, const uint8_t *probe,
                           char *text)
{
    const struct cuda_driver *driver = &device->driver;
    cuda_result result = driver->copy_to_device_waiting(address, probe, GPU_PROBE_SIDE_BYTES);
    if (result == CUDA_OK) {
        result = driver->copy_to_device_waiting(address + bytes - GPU_PROBE_SIDE_BYTES, probe + GPU_PROBE_SIDE_BYTES,
                                                GPU_PROBE_SIDE_BYTES);
    }
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemcpyHtoD", result, text);
    }
    // A small copy may be under way when its call returns; one to the host comes after it, and is over.
    return gpu_probe_check(device, address, bytes, probe, false, text);
}

ice_status gpu_probe_check(const struct gpu_device *device, cuda_address address, uint64_t bytes, const uint8_t *probe,
                           bool inverted, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    uint8_t found[WIRE_GPU_PROBE_BYTES];
    cuda_result result = driver->copy_to_host_waiting(found, address, GPU_PROBE_SIDE_BYTES);
    if (result == CUDA_OK) {
        result = driver->copy_to_host_waiting(found + GPU_PROBE_SIDE_BYTES, address + bytes - GPU_PROBE_SIDE_BYTES,
                                              GPU_PROBE_SIDE_BYTES);
    }
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemcpyDtoH", result, text);
    }
    const uint8_t flip = inverted ? 0xffu : 0;
    for (size_t i = 0; i < sizeof(found); i++) {
        if (found[i] != (uint8_t)(probe[i] ^ flip)) {
            (void)snprintf(text, CUDA_TEXT_BYTES, "worker and daemon do not see the same GPU memory (byte %zu of %zu)",
                           i, sizeof(found));
            return ICE_CONFLICT;
        }
    }
    return ICE_OK;
}
