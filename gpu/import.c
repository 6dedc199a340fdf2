// The daemon's side of sharing GPU memory: opens what a worker described. Nothing in the description is believed: the
// driver says how large an opened allocation is, and refuses pieces of another size than they were made with.
#include "gpu/export.h"

#include <stdio.h>
#include <unistd.h>

// The landing inside what was opened: offset and bytes come from the worker.
static ice_status check_range(uint64_t offset, uint64_t bytes, uint64_t opened_bytes, char *text)
{
    if (offset <= opened_bytes && bytes <= opened_bytes - offset) {
        return ICE_OK;
    }
    (void)snprintf(text, CUDA_TEXT_BYTES, "%llu bytes at offset %llu do not fit the GPU memory of %llu bytes",
                   (unsigned long long)bytes, (unsigned long long)offset, (unsigned long long)opened_bytes);
    return ICE_OUT_OF_BOUNDS;
}

static ice_status open_failed(const struct cuda_driver *driver, cuda_result result, char *text)
{
    const ice_status status = cuda_failed(driver, "cuIpcOpenMemHandle", result, text);
    if (result != CUDA_INVALID_CONTEXT) {
        return status;
    }
    // The driver compares the numbers of the processes as each sees its own.
    (void)snprintf(
        text, CUDA_TEXT_BYTES,
        "cuIpcOpenMemHandle: daemon and worker must be two processes with different pids, also in containers "
        "(the daemon's is %d)",
        (int)getpid());
    return ICE_NOT_SUPPORTED;
}

static ice_status open_whole(const struct gpu_device *device, const struct gpu_export *memory, uint64_t bytes,
                             struct gpu_import *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    struct cuda_handle handle;
    for (size_t i = 0; i < sizeof(handle.bytes); i++) {
        handle.bytes[i] = (char)memory->handle[i];
    }
    cuda_result result = driver->ipc_open_handle(&out->base, handle, CUDA_IPC_LAZY_PEER);
    if (result != CUDA_OK) {
        return open_failed(driver, result, text);
    }
    cuda_address base = 0;
    size_t base_bytes = 0;
    result = driver->address_range(&base, &base_bytes, out->base);
    const ice_status status = result == CUDA_OK ? check_range(memory->offset, bytes, base_bytes, text)
                                                : cuda_failed(driver, "cuMemGetAddressRange", result, text);
    if (status != ICE_OK) {
        (void)driver->ipc_close_handle(out->base);
    }
    return status;
}

static void unmap_pieces(const struct gpu_device *device, cuda_address base, const uint64_t *piece_bytes,
                         uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        (void)device->driver.memory_unmap(base, piece_bytes[i]);
        base += piece_bytes[i];
    }
}

static ice_status map_piece(const struct gpu_device *device, cuda_address at, uint64_t bytes, int fd, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    cuda_allocation allocation;
    cuda_result result = driver->allocation_import(&allocation, (void *)(intptr_t)fd, CUDA_HANDLE_POSIX_FD);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemImportFromShareableHandle", result, text);
    }
    result = driver->memory_map(at, bytes, 0, allocation, 0);
    (void)driver->allocation_release(allocation); // the mapping holds it
    return result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemMap", result, text);
}

static ice_status map_pieces(const struct gpu_device *device, const struct gpu_export *memory, struct gpu_import *out,
                             char *text)
{
    const struct cuda_driver *driver = &device->driver;
    cuda_address at = out->base;
    uint32_t mapped = 0;
    ice_status status = ICE_OK;
    while (status == ICE_OK && mapped < memory->piece_count) {
        status = map_piece(device, at, memory->piece_bytes[mapped], memory->fds[mapped], text);
        if (status == ICE_OK) {
            at += memory->piece_bytes[mapped++];
        }
    }
    if (status == ICE_OK) {
        const struct cuda_access access = {{CUDA_LOCATION_DEVICE, device->id}, CUDA_ACCESS_READ_WRITE};
        const cuda_result result = driver->memory_set_access(out->base, out->mapped_bytes, &access, 1);
        status = result == CUDA_OK ? ICE_OK : cuda_failed(driver, "cuMemSetAccess", result, text);
    }
    if (status != ICE_OK) {
        unmap_pieces(device, out->base, memory->piece_bytes, mapped);
    }
    return status;
}

static ice_status open_pieces(const struct gpu_device *device, const struct gpu_export *memory, uint64_t bytes,
                              struct gpu_import *out, char *text)
{
    const struct cuda_driver *driver = &device->driver;
    for (uint32_t i = 0; i < memory->piece_count; i++) {
        out->piece_bytes[i] = memory->piece_bytes[i];
        out->mapped_bytes += memory->piece_bytes[i]; // each at most 2^46: no overflow
    }
    ice_status status = check_range(memory->offset, bytes, out->mapped_bytes, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = driver->address_reserve(&out->base, out->mapped_bytes, 0, 0, 0);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuMemAddressReserve", result, text);
    }
    out->piece_count = memory->piece_count;
    status = map_pieces(device, memory, out, text);
    if (status != ICE_OK) {
        (void)driver->address_free(out->base, out->mapped_bytes);
    }
    return status;
}

ice_status gpu_import_open(const struct gpu_device *device, const struct gpu_export *memory, uint64_t bytes,
                           struct gpu_import *out, char *text)
{
    *out = (struct gpu_import){0};
    const ice_status status =
        memory->whole ? open_whole(device, memory, bytes, out, text) : open_pieces(device, memory, bytes, out, text);
    out->address = out->base + memory->offset;
    return status;
}

void gpu_import_close(const struct gpu_device *device, struct gpu_import *import)
{
    if (import->mapped_bytes == 0) {
        (void)device->driver.ipc_close_handle(import->base);
        return;
    }
    unmap_pieces(device, import->base, import->piece_bytes, import->piece_count);
    (void)device->driver.address_free(import->base, import->mapped_bytes);
}
