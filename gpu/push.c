// The push place: selections are staged in registered host memory and copied to the worker's GPU memory, which is
// opened here.
//
// Invariants: a row's staging belongs to one request from its submit to its reply, which comes after the copies; so no
// source of a copy is written while the copy runs.
// Threads: open and close where a hanging driver does no harm; copy on the device's copier; stale rows are handed from
// the thread that clears them to the copier by the queue between them.

// Asserts are for our own bugs and stay on in release builds.
#undef NDEBUG
#include "gpu/copy.h"
#include "gpu/export.h"
#include "gpu/held.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

struct gpu_push {
    struct gpu_device *device; // borrowed
    struct gpu_import import;
    struct gpu_path path;
    bool stale_rows[]; // the GPU's counts of the row are another sequence's
};

// With the device entered: opens the memory and proves that it is the worker's.
static ice_status import_memory(struct gpu_push *push, const struct gpu_export *memory, uint64_t bytes, char *text)
{
    ice_status status = gpu_import_open(push->device, memory, bytes, &push->import, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_address address = push->import.address;
    status = gpu_probe_check(push->device, address, bytes, memory->probe, false, text);
    if (status != ICE_OK) {
        gpu_import_close(push->device, &push->import);
    }
    return status;
}

// The worker looks for the inverted pattern, which proves this side to it.
static ice_status answer_probe(const struct gpu_push *push, const struct gpu_export *memory, uint64_t bytes, char *text)
{
    uint8_t inverted[WIRE_GPU_PROBE_BYTES];
    for (size_t i = 0; i < sizeof(inverted); i++) {
        inverted[i] = (uint8_t)~memory->probe[i];
    }
    return gpu_probe_write(push->device, push->import.address, bytes, inverted, text);
}

static ice_status open_entered(struct gpu_landing *landing, struct gpu_push *push, const struct gpu_source *source,
                               char *text)
{
    const uint64_t bytes = landing->layout.total_bytes;
    ice_status status = import_memory(push, source->memory, bytes, text);
    if (status != ICE_OK) {
        return status;
    }
    status = gpu_path_open(&push->path, push->device, push->import.address, &landing->shape, LANDING_PUSH,
                           landing->memory, text);
    if (status == ICE_OK) {
        status = gpu_path_choose(&push->path, source->copy_way, text); // may write over the pattern
        char reason[CUDA_TEXT_BYTES];
        if (status == ICE_OK) {
            status = answer_probe(push, source->memory, bytes, reason);
            if (status != ICE_OK) {
                (void)snprintf(text, CUDA_TEXT_BYTES, "%s", reason);
            }
        }
        if (status != ICE_OK) {
            gpu_path_close(&push->path);
        }
    }
    if (status != ICE_OK) {
        gpu_import_close(push->device, &push->import);
    }
    return status;
}

// The words that the worker's GPU waits for, in memory of their own: the staging is none of the worker's business.
static ice_status words_open(struct gpu_landing *landing, int *fd_out)
{
    const struct gpu_system *const system = &landing->system;
    const uint64_t bytes = timeline_bytes(&landing->shape, LANDING_PUSH);
    void *memory = NULL;
    int fd = -1;
    int rc = system->memfd_create(system->owner, "icecache-timeline", bytes, &fd);
    if (rc == 0) {
        rc = system->map_shared(system->owner, fd, bytes, &memory);
    }
    if (rc < 0) {
        system->close_fd(system->owner, fd);
        return rc == -ENOMEM || rc == -ENOSPC ? ICE_SHARED_FULL : ICE_SYSTEM;
    }
    landing->words = memory;
    *fd_out = fd;
    return ICE_OK;
}

static void words_close(struct gpu_landing *landing)
{
    landing->system.unmap(landing->system.owner, landing->words, timeline_bytes(&landing->shape, LANDING_PUSH));
}

// The GPU's side, with everything else there.
static ice_status memory_open(struct gpu_landing *landing, const struct gpu_source *source, char *text)
{
    struct gpu_push *push = calloc(1, sizeof(*push) + landing->shape.rows * sizeof(push->stale_rows[0]));
    if (!push) {
        return ICE_NO_MEMORY;
    }
    push->device = source->device;
    ice_status status = gpu_device_enter(push->device, text);
    if (status == ICE_OK) {
        status = open_entered(landing, push, source, text);
        gpu_device_leave(push->device);
    }
    if (status != ICE_OK) {
        free(push);
        return status;
    }
    landing->push = push;
    return ICE_OK;
}

static ice_status push_open(const struct gpu_system *system, const struct landing_shape *shape,
                            const struct gpu_source *source, struct gpu_landing **out, int *fd_out, char *text)
{
    text[0] = '\0';
    struct gpu_landing *landing = NULL;
    int fd = -1, words_fd = -1;
    ice_status status = held_open(system, shape, LANDING_PUSH, &landing, &fd);
    if (status != ICE_OK) {
        return status;
    }
    system->close_fd(system->owner, fd); // the mapping is all that is needed
    status = words_open(landing, &words_fd);
    if (status != ICE_OK) {
        held_close(landing);
        return status;
    }
    status = memory_open(landing, source, text);
    if (status != ICE_OK) {
        system->close_fd(system->owner, words_fd);
        words_close(landing);
        held_close(landing);
        return status;
    }
    *out = landing;
    *fd_out = words_fd;
    return ICE_OK;
}

static void push_close(struct gpu_landing *landing)
{
    if (!landing) {
        return;
    }
    struct gpu_push *const push = landing->push;
    char text[CUDA_TEXT_BYTES];
    if (gpu_device_enter(push->device, text) == ICE_OK) {
        gpu_path_close(&push->path);
        gpu_import_close(push->device, &push->import);
        gpu_device_leave(push->device);
    }
    free(push);
    words_close(landing);
    held_close(landing);
}

static void push_clear_row(struct gpu_landing *landing, uint32_t row)
{
    held_clear_row(landing, row);
    landing->push->stale_rows[row] = true;
}

static ice_status push_copy(struct gpu_landing *landing, const uint32_t *rows, uint32_t count, uint32_t layer,
                            char *text)
{
    struct gpu_push *const push = landing->push;
    for (uint32_t i = 0; i < count; i++) {
        assert(rows[i] < landing->shape.rows && layer < landing->shape.layers);
        if (push->stale_rows[rows[i]]) {
            const ice_status status = gpu_path_clear(&push->path, push->device->stream, rows[i], text);
            if (status != ICE_OK) {
                return status;
            }
            push->stale_rows[rows[i]] = false;
        }
    }
    return gpu_path_copy_rows(&push->path, push->device->stream, rows, count, layer, text);
}

const char *gpu_landing_copy_way(const struct gpu_landing *landing)
{
    return landing->push ? gpu_path_way(&landing->push->path) : "";
}

const struct gpu_landing_ops gpu_push_ops = {
    .name = "push",
    .open = push_open,
    .close = push_close,
    .target = held_target,
    .record = held_record,
    .submit = held_submit,
    .clear_row = push_clear_row,
    .signal = held_signal,
    .copy = push_copy,
};
