// Where a worker of the serve command has its selections: shared host memory, or memory of the first GPU, which is
// allocated here, as an engine does, and handed to the library. Looking at it is outside what is timed: it is copied to
// the host then.
#include "serve.h"

#include "client/icecache.h"

#include "gpu/buffer.h"

#include <stdio.h>
#include <stdlib.h>

#define OPEN_DEADLINE_US (60ull * 1000000u)

struct serve_landing {
    const struct serve_job *job; // borrowed
    ice_landing *handle;
    enum option_place place;
    struct ice_landing_shape shape;
    // Of GPU memory only.
    struct gpu_buffer gpu;
    struct ice_gpu_landing layout;
    uint8_t *block; // a layer's, on the host; NULL: the landing is in host memory
};

static bool failed(const char *what, const char *text)
{
    (void)fprintf(stderr, "icecache-bench: serve: %s: %s\n", what, text);
    return false;
}

static bool open_host(struct serve_landing *landing, ice_client *client)
{
    landing->place = PLACE_HOST;
    return ice_landing_open(client, &landing->shape, OPEN_DEADLINE_US, &landing->handle) == ICE_OK ||
           failed("a landing in host memory", ice_last_error());
}

static bool open_in_buffer(struct serve_landing *landing, ice_client *client, enum ice_gpu_mode mode)
{
    const struct ice_gpu_options options = {.address = landing->gpu.address, .bytes = landing->gpu.bytes, .mode = mode};
    if (ice_landing_open_gpu(client, &landing->shape, &options, OPEN_DEADLINE_US, &landing->handle) != ICE_OK ||
        ice_landing_gpu(landing->handle, &landing->layout) != ICE_OK) {
        return failed("a landing in GPU memory", ice_last_error());
    }
    landing->place = landing->layout.mode == ICE_GPU_PUSH ? PLACE_PUSH : PLACE_PULL;
    if (mode == ICE_GPU_ANY && landing->place == PLACE_PULL) {
        (void)fprintf(stderr, "icecache-bench: serve: auto is pull: %s\n", landing->layout.pull_reason);
    }
    landing->block = malloc(landing->layout.layer_bytes);
    return landing->block != NULL || failed("a landing in GPU memory", "no memory");
}

static bool open_gpu(struct serve_landing *landing, ice_client *client)
{
    static const enum ice_gpu_mode modes[PLACES] = {
        [PLACE_PULL] = ICE_GPU_PULL, [PLACE_PUSH] = ICE_GPU_PUSH, [PLACE_AUTO] = ICE_GPU_ANY};
    const enum option_place place = landing->place;
    char text[CUDA_TEXT_BYTES];
    uint64_t bytes;
    if (ice_landing_bytes(&landing->shape, &bytes) != ICE_OK) {
        return failed("a landing", ice_last_error());
    }
    const ice_status status = gpu_buffer_open(getenv("ICECACHE_CUDA_LIBRARY"), 0, bytes, 0, &landing->gpu, text);
    if (status != ICE_OK && place == PLACE_AUTO) {
        (void)fprintf(stderr, "icecache-bench: serve: auto is host: %s\n", text);
        return open_host(landing, client);
    }
    if (status != ICE_OK) {
        (void)fprintf(stderr, "icecache-bench: serve: --place %s: %s\n", option_place_names[place], text);
        return false;
    }
    const bool good = open_in_buffer(landing, client, modes[place]);
    if (!good) {
        ice_landing_close(landing->handle);
        landing->handle = NULL;
        gpu_buffer_close(&landing->gpu);
    }
    return good;
}

struct serve_landing *serve_landing_create(ice_client *client, const struct serve_job *job, enum option_place place)
{
    struct serve_landing *landing = calloc(1, sizeof *landing);
    if (landing == NULL) {
        (void)failed("a landing", "no memory");
        return NULL;
    }
    landing->job = job;
    landing->place = place;
    landing->shape = (struct ice_landing_shape){
        .rows = 1,
        .layers = job->layers,
        .kv_heads = job->kv_heads,
        .slots = serve_slots(job),
        .head_dim = job->head_dim,
        .dtype = (ice_dtype)job->dtype,
    };
    if (!(place == PLACE_HOST ? open_host(landing, client) : open_gpu(landing, client))) {
        free(landing->block);
        free(landing);
        return NULL;
    }
    return landing;
}

void serve_landing_destroy(struct serve_landing *landing)
{
    if (landing == NULL) {
        return;
    }
    ice_landing_close(landing->handle);
    if (landing->block != NULL) {
        gpu_buffer_close(&landing->gpu);
    }
    free(landing->block);
    free(landing);
}

ice_landing *serve_landing_handle(struct serve_landing *landing)
{
    return landing->handle;
}

enum option_place serve_landing_place(const struct serve_landing *landing)
{
    return landing->place;
}

bool serve_landing_fetch(struct serve_landing *landing, uint32_t layer, bool rows)
{
    if (landing->block == NULL) {
        return true;
    }
    char text[CUDA_TEXT_BYTES];
    const struct gpu_device *device = &landing->gpu.device;
    const uint64_t first = rows ? 0 : landing->layout.positions_offset;
    if (gpu_device_enter(device, text) != ICE_OK) {
        return failed("look at the landing", text);
    }
    const cuda_result result = device->driver.copy_to_host_waiting(
        landing->block + first, landing->layout.address + layer * landing->layout.layer_bytes + first,
        landing->layout.layer_bytes - first);
    if (result != CUDA_OK) {
        (void)cuda_failed(&device->driver, "cuMemcpyDtoH", result, text);
    }
    gpu_device_leave(device);
    return result == CUDA_OK || failed("look at the landing", text);
}

bool serve_landing_view(struct serve_landing *landing, uint32_t layer, uint32_t head, struct serve_view *out)
{
    if (landing->block == NULL) {
        struct ice_landing_view view;
        if (ice_landing_view(landing->handle, 0, layer, head, &view) != ICE_OK) {
            return failed("look at the landing", ice_last_error());
        }
        *out = (struct serve_view){view.keys, view.values, view.positions, view.count};
        return true;
    }
    const size_t slots = landing->shape.slots, side = slots * serve_row_bytes(landing->job);
    const uint8_t *keys = landing->block + 2 * head * side;
    const uint32_t *counts = (const void *)(landing->block + landing->layout.counts_offset);
    const uint32_t *positions = (const void *)(landing->block + landing->layout.positions_offset);
    *out = (struct serve_view){keys, keys + side, positions + head * slots, counts[head]};
    if (out->count > slots) {
        (void)fprintf(stderr, "icecache-bench: serve: a count of %u in %zu slots\n", out->count, slots);
        return false;
    }
    return true;
}
