// Landings: opening, looking at what a retrieve left, and who owns a row.
//
// A row belongs to the daemon from a retrieve's submit until its reply, also when the caller has stopped waiting:
// row_owners names the request. The client's lock guards what changes after the opening (handles.h). A landing in host
// memory is written by the daemon only: it is mapped for reading, and its counts are checked before they are used. Of
// one on a GPU the watchdog stores timeline words, and its opening names changed slots to time the kernel.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include "proto/dtype.h"
#include "proto/timeline.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

_Static_assert((int)ICE_BF16 == (int)DTYPE_BF16 && (int)ICE_FP16 == (int)DTYPE_FP16 && (int)ICE_FP32 == (int)DTYPE_FP32,
               "icecache.h and dtype.h disagree");

// ---- rows ----

bool landing_rows_busy(const struct pending *pending)
{
    for (uint32_t i = 0; pending->landing != NULL && i < pending->row_count; i++) {
        if (pending->landing->row_owners[pending->rows[i]] != 0) {
            return true;
        }
    }
    return false;
}

ice_status landing_rows_acquire(const struct pending *pending)
{
    for (uint32_t i = 0; pending->landing != NULL && i < pending->row_count; i++) {
        uint64_t *owner = &pending->landing->row_owners[pending->rows[i]];
        if (*owner == pending->id) {
            return error_set(ICE_INVALID_ARGUMENT, "rows names row %u twice", pending->rows[i]);
        }
        if (*owner != 0) {
            return error_set(ICE_BUSY, "row %u still belongs to an earlier retrieve; wait for its reply",
                             pending->rows[i]);
        }
        *owner = pending->id;
    }
    return ICE_OK;
}

void landing_rows_release(const struct pending *pending)
{
    for (uint32_t i = 0; pending->landing != NULL && i < pending->row_count; i++) {
        uint64_t *owner = &pending->landing->row_owners[pending->rows[i]];
        if (*owner == pending->id) {
            *owner = 0;
        }
    }
}

// No request in flight owns a row. (A row whose copy to a GPU has failed is owned for good: nothing comes for it any
// more.)
static bool all_rows_free(void *argument)
{
    const ice_landing *landing = argument;
    for (uint32_t row = 0; row < landing->shape.rows; row++) {
        uint64_t owner = landing->row_owners[row];
        const struct pending *pending = landing->client->table[owner % EXCHANGE_REQUESTS_MAX];
        if (owner != 0 && pending != NULL && pending->id == owner) {
            return false;
        }
    }
    return true;
}

// ---- open ----

static ice_status shape_check(const struct ice_landing_shape *shape, struct landing_shape *out,
                              struct landing_layout *layout)
{
    if (shape == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "shape is NULL");
    }
    if (!dtype_is_valid((uint32_t)shape->dtype)) {
        return error_set(ICE_INVALID_ARGUMENT, "shape.dtype %d is none of ICE_BF16, ICE_FP16, ICE_FP32",
                         (int)shape->dtype);
    }
    const struct {
        const char *name;
        uint32_t value, most;
    } fields[] = {
        {"rows", shape->rows, WIRE_ROWS_MAX},
        {"layers", shape->layers, WIRE_LAYERS_MAX},
        {"kv_heads", shape->kv_heads, WIRE_KV_HEADS_MAX},
        {"slots", shape->slots, WIRE_SLOTS_MAX},
        {"head_dim", shape->head_dim, WIRE_HEAD_DIM_MAX},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i].value == 0) {
            return error_set(ICE_INVALID_ARGUMENT, "shape.%s is 0", fields[i].name);
        }
        if (fields[i].value > fields[i].most) {
            return error_set(ICE_TOO_LARGE, "shape.%s is %u, the limit is %u", fields[i].name, fields[i].value,
                             fields[i].most);
        }
    }
    if (shape->head_dim % WIRE_HEAD_DIM_STEP != 0) {
        return error_set(ICE_INVALID_ARGUMENT, "shape.head_dim %u is not a multiple of %u", shape->head_dim,
                         WIRE_HEAD_DIM_STEP);
    }
    *out = (struct landing_shape){shape->rows,  shape->layers,   shape->kv_heads,
                                  shape->slots, shape->head_dim, (uint32_t)shape->dtype};
    if (!landing_layout_init(layout, out) || layout->total_bytes > SIZE_MAX) {
        return error_set(ICE_TOO_LARGE, "a landing of this shape is larger than any memory; use fewer rows or slots");
    }
    return ICE_OK;
}

ice_landing *landing_create(ice_client *client, const struct ice_landing_shape *shape, ice_status *status)
{
    struct landing_shape wanted;
    struct landing_layout layout;
    *status = shape_check(shape, &wanted, &layout);
    if (*status != ICE_OK) {
        return NULL;
    }
    ice_landing *landing = calloc(1, sizeof *landing);
    uint64_t *owners = calloc(wanted.rows, sizeof *owners);
    if (landing == NULL || owners == NULL) {
        free(landing);
        free(owners);
        *status = error_set(ICE_NO_MEMORY, "no memory for a landing's record");
        return NULL;
    }
    landing->client = client;
    landing->shape = wanted;
    landing->layout = layout;
    landing->row_owners = owners;
    return landing;
}

struct pending *landing_request(ice_landing *landing, Icecache__Wire__GpuMemory *memory, const int *fds, uint32_t count,
                                uint64_t until_us, ice_status *status)
{
    ice_client *client = landing->client;
    struct pending *pending = pending_create();
    if (pending == NULL) {
        *status = ICE_NO_MEMORY;
        return NULL;
    }
    Icecache__Wire__LandingOpen open = ICECACHE__WIRE__LANDING_OPEN__INIT;
    open.rows = landing->shape.rows;
    open.layers = landing->shape.layers;
    open.kv_heads = landing->shape.kv_heads;
    open.slots = landing->shape.slots;
    open.head_dim = landing->shape.head_dim;
    open.dtype = landing->shape.dtype;
    open.place = (uint32_t)landing->place;
    open.gpu = memory;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
    request.landing_open = &open;
    *status = exchange_submit_descriptors(client, landing->generation, &request, fds, count, pending);
    if (*status != ICE_OK) {
        pending_destroy(pending);
        return NULL;
    }
    *status = exchange_wait(client, landing->generation, pending, until_us);
    const Icecache__Wire__ControlReply *reply = pending->control_reply;
    if (*status == ICE_OK && reply != NULL && reply->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_LANDING) {
        landing->id = reply->landing->landing_id;
        return pending;
    }
    if (*status == ICE_OK) {
        *status = error_set(ICE_BAD_MESSAGE, "the daemon's answer brings no landing");
    }
    exchange_abandon(client, pending);
    return NULL;
}

// Accepts the memory only if it is all there and cannot shrink under our reads. What a GPU's driver
// registers, and the timeline words, must be writable.
ice_status landing_map(ice_landing *landing, const struct pending *pending)
{
    const Icecache__Wire__ControlReply *reply = pending->control_reply;
    struct landing_layout held;
    struct stat stat;
    if (reply == NULL || reply->body_case != ICECACHE__WIRE__CONTROL_REPLY__BODY_LANDING || pending->fd < 0 ||
        !landing_held_init(&held, &landing->shape, landing->place)) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer brings no landing memory");
    }
    int seals = fcntl(pending->fd, F_GET_SEALS);
    const uint64_t bytes = timeline_passed_bytes(&held, &landing->shape, landing->place);
    if (reply->landing->bytes != bytes || fstat(pending->fd, &stat) != 0 || stat.st_size < 0 ||
        (uint64_t)stat.st_size < bytes) {
        return error_set(ICE_INTERNAL, "the landing's memory does not have the %llu bytes of its shape",
                         (unsigned long long)bytes);
    }
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        return error_set(ICE_INTERNAL, "the landing's memory is not sealed against shrinking");
    }
    int protection = landing->place == LANDING_HOST ? PROT_READ : PROT_READ | PROT_WRITE;
    void *base = mmap(NULL, (size_t)bytes, protection, MAP_SHARED, pending->fd, 0);
    if (base == MAP_FAILED) {
        return error_set(errno == ENOMEM ? ICE_NO_MEMORY : ICE_SYSTEM, "mmap of a landing: %s", strerror(errno));
    }
    (void)madvise(base, (size_t)bytes, MADV_DONTDUMP);
    landing->base = base;
    landing->base_bytes = bytes;
    if (landing->place != LANDING_HOST) {
        landing->words = (void *)(landing->base + timeline_offset(&held, landing->place));
    }
    return ICE_OK;
}

ice_status landing_request_close(ice_client *client, uint64_t generation, uint32_t id, uint64_t until_us)
{
    struct pending *pending = pending_create();
    if (pending == NULL) {
        return ICE_TIMEOUT; // the daemon frees it with the session
    }
    Icecache__Wire__LandingClose close = ICECACHE__WIRE__LANDING_CLOSE__INIT;
    close.landing_id = id;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
    request.landing_close = &close;
    if (exchange_submit_control(client, generation, &request, pending) != ICE_OK) {
        pending_destroy(pending);
        return ICE_TIMEOUT;
    }
    // Waited for, so that what it held is free again when this returns.
    ice_status status = exchange_wait(client, generation, pending, until_us);
    exchange_abandon(client, pending);
    return status;
}

static ice_status landing_open(ice_client *client, ice_landing *landing, uint64_t until_us)
{
    (void)pthread_mutex_lock(&client->lock);
    landing->generation = client->generation;
    ice_status status;
    struct pending *pending = landing_request(landing, NULL, NULL, 0, until_us, &status);
    if (pending != NULL) {
        status = landing_map(landing, pending);
        if (status == ICE_OK) {
            handle_link(&client->landings, &landing->handle);
        } else {
            error_hold();
            ice_status ignored = landing_request_close(client, landing->generation, landing->id, until_us);
            (void)ignored;
            error_let_go();
        }
        exchange_abandon(client, pending);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

ice_status ice_landing_open(ice_client *client, const struct ice_landing_shape *shape, uint64_t deadline_us,
                            ice_landing **out)
{
    error_clear();
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "out is NULL");
    }
    uint64_t until_us = client_until(client, deadline_us);
    ice_landing *landing = landing_create(client, shape, &status);
    if (landing == NULL) {
        return status;
    }
    status = landing_open(client, landing, until_us);
    if (status != ICE_OK) {
        landing_free(landing);
        return status;
    }
    *out = landing;
    return ICE_OK;
}

ice_status ice_landing_bytes(const struct ice_landing_shape *shape, uint64_t *bytes_out)
{
    error_clear();
    struct landing_shape wanted;
    struct landing_layout layout;
    if (bytes_out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "bytes_out is NULL");
    }
    ice_status status = shape_check(shape, &wanted, &layout);
    if (status == ICE_OK) {
        *bytes_out = layout.total_bytes;
    }
    return status;
}

// ---- close ----

void landing_free(ice_landing *landing)
{
    if (landing->gpu != NULL && !client_is_forked(landing->client)) {
        gpu_buffer_close(&landing->gpu->buffer); // before the staging that it has registered goes
    }
    if (landing->gpu != NULL) {
        free(landing->gpu->row_sequences);
        free(landing->gpu->cells);
        free(landing->gpu);
    }
    if (landing->base != NULL) {
        (void)munmap(landing->base, (size_t)landing->base_bytes);
    }
    free(landing->row_owners);
    free(landing);
}

// A stream still has work with the landing's memory before it: what it uses is left where it is.
static void landing_lose(ice_landing *landing)
{
    free(landing->gpu->row_sequences);
    free(landing->gpu->cells);
    free(landing->gpu);
    landing->gpu = NULL;
    landing->base = NULL;
}

void ice_landing_close(ice_landing *landing)
{
    if (landing == NULL) {
        return;
    }
    ice_client *client = landing->client;
    if (client_is_forked(client)) {
        landing_free(landing);
        return;
    }
    uint64_t until_us = client_until(client, 0);
    error_hold();
    (void)pthread_mutex_lock(&client->lock);
    stream_detach(landing);
    pull_forget(landing, until_us);
    if (exchange_check(client, landing->generation) == ICE_OK) {
        ice_status status = exchange_wait_until(client, landing->generation, all_rows_free, landing, until_us);
        (void)status; // whatever it is, the memory goes now: the daemon has its own mapping
        status = landing_request_close(client, landing->generation, landing->id, until_us);
        if (status == ICE_TIMEOUT && landing->place == LANDING_PUSH) {
            landing->gpu->buffer.owned = false; // the daemon may still have it open: rather lost than freed under it
        }
    }
    const bool passed = stream_close(landing, client_until(client, 0));
    for (uint32_t i = 0; i < EXCHANGE_REQUESTS_MAX; i++) {
        if (client->table[i] != NULL && client->table[i]->landing == landing) {
            client->table[i]->landing = NULL;
        }
    }
    handle_unlink(&landing->handle);
    (void)pthread_mutex_unlock(&client->lock);
    error_let_go();
    if (!passed) {
        landing_lose(landing);
    }
    landing_free(landing);
}

// ---- view ----

static ice_status row_check(ice_landing *landing, uint32_t row)
{
    ice_client *client = landing->client;
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = exchange_check(client, landing->generation);
    if (status == ICE_OK && landing->row_owners[row] != 0) {
        // Nobody may be receiving: the late reply, or the end of the session, may already be here.
        exchange_pump(client);
        exchange_pump_control(client);
        status = exchange_check(client, landing->generation);
    }
    if (status == ICE_OK && landing->row_owners[row] != 0) {
        status = error_set(ICE_BUSY, "row %u belongs to a retrieve in flight; wait for its reply", row);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

ice_status ice_landing_view(ice_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head,
                            struct ice_landing_view *out)
{
    error_clear();
    if (landing == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", landing == NULL ? "landing" : "out");
    }
    ice_status status = client_check(landing->client);
    if (status != ICE_OK) {
        return status;
    }
    if (landing->gpu != NULL) {
        return error_set(ICE_NOT_SUPPORTED, "the landing is in GPU memory: see ice_landing_gpu, and a result's counts");
    }
    const struct landing_shape *shape = &landing->shape;
    if (row >= shape->rows || kv_head >= shape->kv_heads) {
        return error_set(ICE_INVALID_ARGUMENT, "row %u, KV head %u: the landing has %u rows of %u KV heads", row,
                         kv_head, shape->rows, shape->kv_heads);
    }
    if (layer >= shape->layers) {
        return error_set(ICE_UNKNOWN_LAYER, "layer %u: the landing has %u layers", layer, shape->layers);
    }
    status = row_check(landing, row);
    if (status != ICE_OK) {
        return status;
    }
    const uint8_t *block = landing->base + landing_block(&landing->layout, shape, row, layer);
    uint32_t count;
    memcpy(&count, block + landing->layout.counts_offset + kv_head * sizeof count, sizeof count);
    if (count > shape->slots) {
        return error_set(ICE_INTERNAL, "the landing says %u tokens in %u slots", count, shape->slots);
    }
    const uint8_t *keys = block + kv_head * landing->layout.head_bytes;
    const uint8_t *positions =
        block + landing->layout.positions_offset + (uint64_t)kv_head * shape->slots * sizeof(uint32_t);
    out->keys = keys;
    out->values = keys + landing->layout.side_bytes;
    out->positions = (const void *)positions; // a multiple of 4 bytes from a page boundary
    out->count = count;
    return ICE_OK;
}
