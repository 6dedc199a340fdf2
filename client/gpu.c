// Landings in GPU memory: opening them as push, or as pull where push is refused.
//
// Push shares the worker's memory with the daemon and has it proved by a pattern that each side reads and the daemon
// inverts. What the daemon or the driver refuses is kept as the reason, and pull is tried, which needs nothing but a
// driver in this process.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#define ADDRESS_ALIGNMENT 16u // what kernels that read slots need at least

// ICE_OK or an error of the request's scope: pull may still work. text: why.
static ice_status set_error(ice_status status, const char *text)
{
    return error_set(status, "%s", text[0] != '\0' ? text : status_text((int)status));
}

// ---- push ----

static ice_status probe_random(uint8_t *probe)
{
    ssize_t got = getrandom(probe, WIRE_GPU_PROBE_BYTES, 0); // up to 256 bytes come whole
    return got == (ssize_t)WIRE_GPU_PROBE_BYTES ? ICE_OK : error_set(ICE_SYSTEM, "getrandom: %s", strerror(errno));
}

static ice_status push_request(ice_landing *landing, struct gpu_export *memory, uint64_t until_us)
{
    ice_client *client = landing->client;
    Icecache__Wire__GpuMemory gpu = ICECACHE__WIRE__GPU_MEMORY__INIT;
    gpu.uuid = (ProtobufCBinaryData){.len = sizeof memory->uuid, .data = memory->uuid};
    gpu.probe = (ProtobufCBinaryData){.len = sizeof memory->probe, .data = memory->probe};
    gpu.offset = memory->offset;
    if (memory->whole) {
        gpu.handle = (ProtobufCBinaryData){.len = sizeof memory->handle, .data = memory->handle};
    }
    gpu.piece_bytes = memory->piece_bytes;
    gpu.n_piece_bytes = memory->piece_count;
    ice_status status;
    (void)pthread_mutex_lock(&client->lock);
    struct pending *pending = landing_request(landing, &gpu, memory->fds, memory->piece_count, until_us, &status);
    if (pending != NULL) {
        status = landing_map(landing, pending);
        (void)strncpy(landing->gpu->copy_way, pending->control_reply->landing->copy_way,
                      sizeof landing->gpu->copy_way - 1);
        exchange_abandon(client, pending);
        if (status != ICE_OK) {
            error_hold();
            ice_status ignored = landing_request_close(client, landing->generation, landing->id, until_us);
            (void)ignored;
            error_let_go();
        }
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

// What the daemon has made for a push that does not come about.
static void push_unmap(ice_landing *landing)
{
    if (landing->base != NULL) {
        (void)munmap(landing->base, (size_t)landing->base_bytes);
    }
    landing->base = NULL;
    landing->words = NULL;
}

static void push_close(ice_landing *landing, uint64_t until_us)
{
    ice_client *client = landing->client;
    error_hold();
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = landing_request_close(client, landing->generation, landing->id, until_us);
    (void)status; // the session's end closes it otherwise
    (void)pthread_mutex_unlock(&client->lock);
    error_let_go();
}

static ice_status push_open(ice_landing *landing, uint64_t until_us)
{
    struct gpu_buffer *buffer = &landing->gpu->buffer;
    uint8_t random[WIRE_GPU_PROBE_BYTES];
    char text[CUDA_TEXT_BYTES] = "";
    ice_status status = probe_random(random);
    if (status != ICE_OK) {
        return status;
    }
    struct gpu_export *memory = malloc(sizeof *memory);
    if (memory == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for a description of GPU memory");
    }
    landing->place = LANDING_PUSH;
    status = gpu_buffer_export(buffer, random, memory, text);
    if (status != ICE_OK) {
        free(memory);
        return set_error(status, text);
    }
    status = push_request(landing, memory, until_us);
    if (status == ICE_OK) {
        status = gpu_buffer_check(buffer, memory, text);
        status = status == ICE_OK ? gpu_buffer_clear(buffer, text) : status; // of the probe
        if (status != ICE_OK) {
            push_close(landing, until_us);
            push_unmap(landing);
            status = set_error(status, text);
        }
    }
    gpu_export_close(memory);
    free(memory);
    return status;
}

// ---- pull ----

// Is there a kernel where it was asked for?
static ice_status kernel_check(const ice_landing *landing, ice_status opened, const char *text)
{
    const struct gpu_landing_side *gpu = landing->gpu;
    if (opened != ICE_OK) {
        return set_error(opened, text);
    }
    if (gpu->copy == ICE_COPY_CHANGED && gpu->buffer.pull.staging == 0) {
        return error_set(ICE_NOT_SUPPORTED, "no copying of changed slots: %s", gpu->buffer.pull.reason);
    }
    return ICE_OK;
}

static enum gpu_copy_way copy_way_of(enum ice_gpu_copy copy)
{
    return copy == ICE_COPY_LOOP ? GPU_COPY_LOOP : copy == ICE_COPY_BATCH ? GPU_COPY_BATCH : GPU_COPY_AUTO;
}

static bool wants_kernel(enum ice_gpu_copy copy)
{
    return copy == ICE_COPY_ANY || copy == ICE_COPY_CHANGED;
}

static ice_status pull_open(ice_landing *landing, enum ice_gpu_copy copy, uint64_t until_us)
{
    ice_client *client = landing->client;
    char text[CUDA_TEXT_BYTES] = "";
    landing->place = LANDING_PULL;
    landing->gpu->row_sequences = calloc(landing->shape.rows, sizeof(uint64_t));
    landing->gpu->cells = calloc((size_t)landing->shape.rows * landing->shape.layers, sizeof(uint64_t));
    if (landing->gpu->row_sequences == NULL || landing->gpu->cells == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for a landing's record");
    }
    ice_status status;
    (void)pthread_mutex_lock(&client->lock);
    struct pending *pending = landing_request(landing, NULL, NULL, 0, until_us, &status);
    if (pending != NULL) {
        status = landing_map(landing, pending);
        exchange_abandon(client, pending);
        if (status == ICE_OK) {
            (void)pthread_mutex_unlock(&client->lock); // what follows takes long, and nobody else has the landing yet
            status = kernel_check(landing,
                                  gpu_buffer_pull_open(&landing->gpu->buffer, &landing->shape, landing->base,
                                                       copy_way_of(copy), wants_kernel(copy), text),
                                  text);
            (void)pthread_mutex_lock(&client->lock);
        }
        if (status != ICE_OK) {
            error_hold();
            ice_status ignored = landing_request_close(client, landing->generation, landing->id, until_us);
            (void)ignored;
            error_let_go();
        }
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

// ---- open ----

static ice_status options_check(const struct ice_gpu_options *options, uint64_t bytes)
{
    if (options->mode != ICE_GPU_ANY && options->mode != ICE_GPU_PUSH && options->mode != ICE_GPU_PULL) {
        return error_set(ICE_INVALID_ARGUMENT, "options.mode %d is unknown", (int)options->mode);
    }
    if (options->copy < ICE_COPY_ANY || options->copy > ICE_COPY_BATCH) {
        return error_set(ICE_INVALID_ARGUMENT, "options.copy %d is unknown", (int)options->copy);
    }
    if (options->copy == ICE_COPY_CHANGED && options->mode == ICE_GPU_PUSH) {
        return error_set(ICE_INVALID_ARGUMENT, "options.copy: the daemon pushes whole blocks; use ICE_GPU_PULL");
    }
    if (options->address % ADDRESS_ALIGNMENT != 0) {
        return error_set(ICE_INVALID_ARGUMENT, "options.address is no multiple of %u", ADDRESS_ALIGNMENT);
    }
    if (options->address != 0 && options->bytes < bytes) {
        return error_set(ICE_OUT_OF_BOUNDS, "options.bytes is %llu, a landing of this shape has %llu",
                         (unsigned long long)options->bytes, (unsigned long long)bytes);
    }
    return ICE_OK;
}

static ice_status buffer_open(ice_landing *landing, const struct ice_gpu_options *options)
{
    char text[CUDA_TEXT_BYTES] = "";
    struct gpu_landing_side *gpu = calloc(1, sizeof *gpu);
    if (gpu == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for a landing's record");
    }
    ice_status status = gpu_buffer_open(secure_getenv("ICECACHE_CUDA_LIBRARY"), options->address,
                                        landing->layout.total_bytes, options->device, &gpu->buffer, text);
    if (status != ICE_OK) {
        free(gpu);
        return set_error(status, text);
    }
    gpu->copy = options->copy;
    landing->gpu = gpu;
    return ICE_OK;
}

// Whether another place may do where this error came.
static bool may_pull(ice_status status, enum ice_gpu_mode mode)
{
    return mode == ICE_GPU_ANY && status_scope((int)status) == ICE_SCOPE_REQUEST && status != ICE_TIMEOUT &&
           status != ICE_LIMIT;
}

static ice_status place_open(ice_landing *landing, const struct ice_gpu_options *options, uint64_t until_us)
{
    ice_status status = ICE_OK;
    if (options->mode != ICE_GPU_PULL && options->copy != ICE_COPY_CHANGED) {
        status = push_open(landing, until_us);
        if (status == ICE_OK || !may_pull(status, options->mode)) {
            return status;
        }
        (void)strncpy(landing->gpu->pull_reason, ice_last_error(), sizeof landing->gpu->pull_reason - 1);
    }
    char text[CUDA_TEXT_BYTES] = "";
    status = gpu_buffer_clear(&landing->gpu->buffer, text); // of the probe too
    return status == ICE_OK ? pull_open(landing, options->copy, until_us) : set_error(status, text);
}

ice_status ice_landing_open_gpu(ice_client *client, const struct ice_landing_shape *shape,
                                const struct ice_gpu_options *options, uint64_t deadline_us, ice_landing **out)
{
    error_clear();
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (options == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", options == NULL ? "options" : "out");
    }
    uint64_t until_us = client_until(client, deadline_us);
    ice_landing *landing = landing_create(client, shape, &status);
    if (landing == NULL) {
        return status;
    }
    (void)pthread_mutex_lock(&client->lock);
    landing->generation = client->generation;
    (void)pthread_mutex_unlock(&client->lock);
    status = options_check(options, landing->layout.total_bytes);
    if (status == ICE_OK) {
        status = buffer_open(landing, options);
    }
    if (status == ICE_OK) {
        status = place_open(landing, options, until_us);
    }
    if (status != ICE_OK) {
        if (status == ICE_TIMEOUT && landing->place == LANDING_PUSH) {
            landing->gpu->buffer.owned = false; // the daemon may still open it: rather lost than freed under it
        }
        landing_free(landing);
        return status;
    }
    (void)pthread_mutex_lock(&client->lock);
    handle_link(&client->landings, &landing->handle);
    (void)pthread_mutex_unlock(&client->lock);
    error_clear(); // a refused push is no error of this call
    *out = landing;
    return ICE_OK;
}

ice_status ice_landing_gpu(const ice_landing *landing, struct ice_gpu_landing *out)
{
    error_clear();
    if (landing == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", landing == NULL ? "landing" : "out");
    }
    if (landing->gpu == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "the landing is in host memory: see ice_landing_view");
    }
    *out = (struct ice_gpu_landing){
        .address = landing->gpu->buffer.address,
        .bytes = landing->layout.total_bytes,
        .layer_bytes = landing->layout.block_bytes,
        .positions_offset = landing->layout.positions_offset,
        .counts_offset = landing->layout.counts_offset,
        .mode = landing->place == LANDING_PUSH ? ICE_GPU_PUSH : ICE_GPU_PULL,
        .pull_reason = landing->gpu->pull_reason,
        .device_name = landing->gpu->buffer.device.name,
        .copy_way =
            landing->place == LANDING_PULL ? gpu_path_way(&landing->gpu->buffer.pull.path) : landing->gpu->copy_way,
    };
    if (landing->place == LANDING_PULL) {
        const struct gpu_pull *pull = &landing->gpu->buffer.pull;
        out->block_us = pull->costs.block;
        out->changed_none_us = pull->costs.changed_none;
        out->changed_all_us = pull->costs.changed_all;
        out->copies_changed = pull->staging != 0;
    }
    out->copy_reason = landing->place == LANDING_PULL ? landing->gpu->buffer.pull.reason : "the daemon sends blocks";
    return ICE_OK;
}

// ---- the end of a client ----

static ice_landing *find_pushed(ice_client *client)
{
    (void)pthread_mutex_lock(&client->lock);
    ice_landing *found = NULL;
    for (struct handle *at = client->landings.next; at != &client->landings && found == NULL; at = at->next) {
        ice_landing *landing = (ice_landing *)at;
        found = landing->place == LANDING_PUSH ? landing : NULL;
    }
    (void)pthread_mutex_unlock(&client->lock);
    return found;
}

void gpu_close_pushed(ice_client *client)
{
    for (ice_landing *landing = find_pushed(client); landing != NULL; landing = find_pushed(client)) {
        ice_landing_close(landing);
    }
}
