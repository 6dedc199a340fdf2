// Append and read: K and V between the caller's memory and the staging area, in parts.
//
// A part covers all layers of the call and as many tokens as fit half of the staging area: K [layer][kv_head][token]
// [head_dim], packed, and V of the same shape right behind it. While the daemon takes one part in, the next one is
// copied into the other half if that is free; parts are sent one after the other, each after the reply to the one
// before, so that a part always meets the length that it expects.
//
// A half belongs to the call from staging_acquire until staging_release. If the caller's deadline passes first, it goes
// with the abandoned request's record and is released by the daemon's late reply. Locks: the client's, for everything
// but the bytes of an acquired half.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"
#include "client/staging.h"

#include "gpu/fetch.h"
#include "proto/dtype.h"
#include "proto/shm.h"

#include <stdlib.h>
#include <string.h>

// One call, append or read: what does not change over its parts.
struct transfer {
    ice_sequence *sequence;
    ice_client *client;
    struct layer_range layers;
    uint64_t first, n;
    uint64_t row_bytes; // of one token of one head
    uint64_t until_us;
    // The caller's memory; one of the two pairs is set.
    const uint8_t *source_keys, *source_values;
    uint8_t *target_keys, *target_values;
    size_t layer_stride, token_stride, head_stride;
    // An append from GPU memory: the source is there.
    bool on_gpu;
    bool token_major; // a token's heads lie side by side, in the staging too
    void *stream;
};

// A part in one half of the staging area.
struct part {
    struct staging *staging; // NULL: none
    uint32_t half;
    uint64_t begin;  // token of the call
    uint32_t tokens; // 0: none
};

// ---- checks ----

// The end of the last element, or false where the sum overflows.
static bool extent(const struct transfer *transfer, uint64_t *end)
{
    const struct {
        uint64_t count;
        size_t stride;
    } dimensions[] = {
        {transfer->layers.count, transfer->layer_stride},
        {transfer->n, transfer->token_stride},
        {transfer->sequence->shape.kv_heads, transfer->head_stride},
    };
    *end = transfer->row_bytes;
    for (size_t i = 0; i < sizeof dimensions / sizeof dimensions[0]; i++) {
        uint64_t offset;
        if (__builtin_mul_overflow(dimensions[i].count - 1, (uint64_t)dimensions[i].stride, &offset) ||
            __builtin_add_overflow(*end, offset, end)) {
            return false;
        }
    }
    return true;
}

static ice_status bounds_check(const struct transfer *transfer, size_t keys_bytes, size_t values_bytes)
{
    uint64_t end;
    if (!extent(transfer, &end)) {
        return error_set(ICE_OUT_OF_BOUNDS, "the strides reach beyond any memory");
    }
    if (end > keys_bytes || end > values_bytes) {
        bool keys = end > keys_bytes;
        return error_set(ICE_OUT_OF_BOUNDS,
                         "the last element (layer %u, token %llu, KV head %u) ends at byte %llu of %s, which has %zu",
                         transfer->layers.count - 1, (unsigned long long)(transfer->n - 1),
                         transfer->sequence->shape.kv_heads - 1, (unsigned long long)end, keys ? "keys" : "values",
                         keys ? keys_bytes : values_bytes);
    }
    return ICE_OK;
}

static ice_status transfer_init(struct transfer *transfer, ice_sequence *sequence, uint32_t layer, uint64_t first,
                                uint64_t n, uint64_t deadline_us)
{
    *transfer = (struct transfer){.sequence = sequence, .first = first, .n = n};
    if (sequence == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "sequence is NULL");
    }
    ice_status status = client_check(sequence->client);
    if (status != ICE_OK) {
        return status;
    }
    transfer->client = sequence->client;
    transfer->until_us = client_until(sequence->client, deadline_us);
    transfer->row_bytes = sequence->shape.head_dim * dtype_bytes((enum dtype)sequence->shape.dtype);
    status = sequence_layers(sequence, layer, &transfer->layers);
    if (status != ICE_OK) {
        return status;
    }
    if (n == 0) {
        return error_set(ICE_INVALID_ARGUMENT, "n is 0");
    }
    if (first > WIRE_TOKENS_MAX || n > WIRE_TOKENS_MAX - first) {
        return error_set(ICE_TOO_LARGE, "positions from %llu, %llu of them: a sequence holds at most %u tokens",
                         (unsigned long long)first, (unsigned long long)n, WIRE_TOKENS_MAX);
    }
    return ICE_OK;
}

// Rows of a target must not overlap, or the result would depend on the order of copying.
static ice_status overlap_check(const struct transfer *transfer)
{
    uint64_t row_bytes = transfer->row_bytes;
    if ((transfer->layers.count > 1 && transfer->layer_stride < row_bytes) ||
        (transfer->n > 1 && transfer->token_stride < row_bytes) ||
        (transfer->sequence->shape.kv_heads > 1 && transfer->head_stride < row_bytes)) {
        return error_set(ICE_INVALID_ARGUMENT,
                         "a stride is smaller than the %llu bytes of one row of head_dim elements",
                         (unsigned long long)row_bytes);
    }
    return ICE_OK;
}

// ---- parts ----

static uint64_t token_bytes(const struct transfer *transfer)
{
    return 2 * staging_side_bytes(transfer->layers.count, transfer->sequence->shape.kv_heads, 1, transfer->row_bytes);
}

// Tokens of a part that begins at token `begin`; 0 where not even one fits (the error is set).
static uint32_t part_tokens(const struct transfer *transfer, const struct staging *staging, uint64_t begin)
{
    uint64_t fit = staging->half_bytes / token_bytes(transfer);
    uint64_t left = transfer->n - begin;
    if (fit == 0) {
        (void)error_set(ICE_TOO_LARGE,
                        "one token of %u layers takes %llu bytes, half of the staging area has %llu; raise the "
                        "client's staging_bytes (%llu)",
                        transfer->layers.count, (unsigned long long)token_bytes(transfer),
                        (unsigned long long)staging->half_bytes, (unsigned long long)transfer->client->staging_bytes);
        return 0;
    }
    return (uint32_t)(fit < left ? fit : left);
}

// Calls copy(caller's row, staging's row) for the part's rows; runs of tokens that lie packed in both go in one call.
static void part_copy(const struct transfer *transfer, const struct part *part, bool to_staging)
{
    uint32_t heads = transfer->sequence->shape.kv_heads;
    uint8_t *base = part->staging->base + staging_offset(part->staging, part->half);
    uint64_t side = staging_side_bytes(transfer->layers.count, heads, part->tokens, transfer->row_bytes);
    bool packed = transfer->token_stride == transfer->row_bytes;
    size_t run_bytes = (size_t)(packed ? part->tokens * transfer->row_bytes : transfer->row_bytes);
    uint32_t runs = packed ? 1 : part->tokens;
    for (uint32_t layer = 0; layer < transfer->layers.count; layer++) {
        for (uint32_t head = 0; head < heads; head++) {
            uint8_t *row = base + ((uint64_t)layer * heads + head) * part->tokens * transfer->row_bytes;
            size_t offset = layer * transfer->layer_stride + (size_t)part->begin * transfer->token_stride +
                            head * transfer->head_stride;
            for (uint32_t run = 0; run < runs; run++, row += run_bytes, offset += transfer->token_stride) {
                if (to_staging) {
                    memcpy(row, transfer->source_keys + offset, run_bytes);
                    memcpy(row + side, transfer->source_values + offset, run_bytes);
                } else {
                    memcpy(transfer->target_keys + offset, row, run_bytes);
                    memcpy(transfer->target_values + offset, row + side, run_bytes);
                }
            }
        }
    }
}

// The part's K and V from the caller's GPU memory, one run for each layer, or for each layer and head. Where their end
// is not known, the half is lost for good (and part->staging NULL): something may still write to it.
static ice_status part_fetch(const struct transfer *transfer, struct part *part)
{
    ice_status status = staging_fetch_open(transfer->client, part->staging, (uintptr_t)transfer->source_keys);
    if (status == ICE_OK) {
        status = staging_fetch_open(transfer->client, part->staging, (uintptr_t)transfer->source_values); // checked
    }
    if (status != ICE_OK) {
        return status;
    }
    const uint32_t heads = transfer->sequence->shape.kv_heads, runs = transfer->token_major ? 1 : heads;
    uint8_t *base = part->staging->base + staging_offset(part->staging, part->half);
    const uint64_t side = staging_side_bytes(transfer->layers.count, heads, part->tokens, transfer->row_bytes);
    const struct gpu_rows rows = {.row_bytes = transfer->row_bytes * (transfer->token_major ? heads : 1),
                                  .rows = part->tokens,
                                  .stride_bytes = transfer->token_stride};
    char text[CUDA_TEXT_BYTES] = "";
    status = gpu_fetch_check_stream(part->staging->fetch, transfer->stream, text);
    if (status != ICE_OK) {
        return error_set(status, "copying from the GPU: %s", text);
    }
    for (uint32_t run = 0; run < transfer->layers.count * runs && status == ICE_OK; run++) {
        uint8_t *to = base + (uint64_t)run * rows.rows * rows.row_bytes;
        const size_t offset = run / runs * transfer->layer_stride + (size_t)part->begin * transfer->token_stride +
                              run % runs * transfer->head_stride;
        status = gpu_fetch(part->staging->fetch, to, (uintptr_t)transfer->source_keys + offset, &rows, transfer->stream,
                           text);
        if (status == ICE_OK) {
            status = gpu_fetch(part->staging->fetch, to + side, (uintptr_t)transfer->source_values + offset, &rows,
                               transfer->stream, text);
        }
    }
    // Waited for also where not all could be issued: what was writes to the staging.
    const ice_status waited =
        gpu_fetch_wait(part->staging->fetch, part->half, transfer->stream, transfer->until_us, text);
    if (waited != ICE_OK) {
        (void)pthread_mutex_lock(&transfer->client->lock);
        staging_lose(part->staging);
        (void)pthread_mutex_unlock(&transfer->client->lock);
        part->staging = NULL;
        status = waited;
    }
    return status == ICE_OK ? ICE_OK : error_set(status, "copying from the GPU: %s", text);
}

// The caller's K and V into the part's half.
static ice_status part_fill(const struct transfer *transfer, struct part *part)
{
    if (transfer->on_gpu) {
        return part_fetch(transfer, part);
    }
    part_copy(transfer, part, true);
    return ICE_OK;
}

static void part_release(const struct transfer *transfer, struct part *part)
{
    if (part->staging != NULL) {
        (void)pthread_mutex_lock(&transfer->client->lock);
        staging_release(transfer->client, part->staging, part->half);
        (void)pthread_mutex_unlock(&transfer->client->lock);
        part->staging = NULL;
    }
}

// A half for the tokens from begin on: waits for it, or only tries (ICE_OK with tokens 0 where none is free).
static ice_status part_acquire(const struct transfer *transfer, uint64_t begin, bool wait, struct part *part)
{
    ice_client *client = transfer->client;
    *part = (struct part){.begin = begin};
    ice_status status = ICE_OK;
    (void)pthread_mutex_lock(&client->lock);
    if (wait) {
        status =
            staging_acquire(client, transfer->sequence->generation, transfer->until_us, &part->staging, &part->half);
    } else if (client->generation == transfer->sequence->generation) {
        (void)staging_try_acquire(client, &part->staging, &part->half);
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (status == ICE_OK && part->staging != NULL) {
        part->tokens = part_tokens(transfer, part->staging, begin);
        if (part->tokens == 0) {
            part_release(transfer, part);
            return ICE_TOO_LARGE;
        }
    }
    return status;
}

// Sends a part's request. On success the record is in flight; it takes the half over if it is abandoned.
static ice_status part_submit(const struct transfer *transfer, Icecache__Wire__Request *request,
                              const struct part *part, struct pending **out)
{
    struct pending *pending = pending_create();
    if (pending == NULL) {
        return ICE_NO_MEMORY;
    }
    ice_client *client = transfer->client;
    (void)pthread_mutex_lock(&client->lock);
    ice_status status =
        exchange_submit(client, transfer->sequence->generation, request, NULL, pending, transfer->until_us);
    if (status == ICE_OK) {
        pending->staging = part->staging;
        pending->staging_half = part->half;
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (status != ICE_OK) {
        pending_destroy(pending);
        return status;
    }
    *out = pending;
    return ICE_OK;
}

// Waits for the part's reply. Where it has come, *done is set and the half is still the caller's; else the record has
// been abandoned and the half gone with it.
static ice_status part_wait(const struct transfer *transfer, struct pending *pending, struct part *part, bool *done)
{
    ice_client *client = transfer->client;
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = exchange_wait(client, transfer->sequence->generation, pending, transfer->until_us);
    *done = pending->done;
    if (!pending->done) {
        exchange_abandon(client, pending);
        part->staging = NULL;
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

// ---- append ----

static ice_status append_submit(const struct transfer *transfer, const struct part *part, struct pending **out)
{
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    append.sequence_id = transfer->sequence->id;
    append.layer = transfer->layers.first;
    append.layers = transfer->layers.count;
    append.first = transfer->first + part->begin;
    append.tokens = part->tokens;
    append.staging_offset = staging_offset(part->staging, part->half);
    append.reserve_tokens = transfer->n - part->begin;
    append.token_major = transfer->token_major;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = &append;
    return part_submit(transfer, &request, part, out);
}

// Waits for the reply, remembers the length that it tells (also with an error) and gives the half back.
static ice_status append_finish(const struct transfer *transfer, struct pending *pending, struct part *part,
                                uint64_t *length)
{
    bool done = false;
    ice_status status = part_wait(transfer, pending, part, &done);
    if (!done) {
        return status;
    }
    const Icecache__Wire__Reply *reply = pending->reply;
    if (reply != NULL && reply->body_case == ICECACHE__WIRE__REPLY__BODY_APPEND) {
        *length = reply->append->length;
    } else if (status == ICE_OK) {
        status = error_set(ICE_BAD_MESSAGE, "the daemon's answer to an append tells no length");
    }
    pending_destroy(pending);
    part_release(transfer, part);
    return status;
}

// A half that holds the tokens from begin on. Not wait: ICE_OK with tokens 0 where none is free.
static ice_status part_make(const struct transfer *transfer, uint64_t begin, bool wait, struct part *part)
{
    ice_status status = part_acquire(transfer, begin, wait, part);
    if (status == ICE_OK && part->tokens > 0) {
        status = part_fill(transfer, part);
        if (status != ICE_OK) {
            part_release(transfer, part);
            part->tokens = 0;
        }
    }
    return status;
}

// One part after the other. *length is the length last heard.
static ice_status append_parts(const struct transfer *transfer, uint64_t *length)
{
    struct part current, next;
    ice_status status = part_make(transfer, 0, true, &current);
    if (status != ICE_OK) {
        return status;
    }
    for (;;) {
        struct pending *pending = NULL;
        status = append_submit(transfer, &current, &pending);
        if (status != ICE_OK) {
            part_release(transfer, &current);
            return status;
        }
        uint64_t done = current.begin + current.tokens;
        next = (struct part){.begin = done};
        ice_status ahead = done < transfer->n ? part_make(transfer, done, false, &next) : ICE_OK;
        if (ahead != ICE_OK) {
            error_hold(); // told once the part in flight has ended
        }
        status = append_finish(transfer, pending, &current, length);
        if (ahead != ICE_OK) {
            error_let_go();
            status = ahead;
        }
        if (status != ICE_OK || done == transfer->n) {
            part_release(transfer, &next);
            return status;
        }
        if (next.tokens == 0) {
            status = part_make(transfer, done, true, &next);
            if (status != ICE_OK) {
                return status;
            }
        }
        current = next;
    }
}

static ice_status append_check(struct transfer *transfer, const struct ice_kv_source *source)
{
    if (source == NULL || source->keys == NULL || source->values == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL",
                         source == NULL         ? "source"
                         : source->keys == NULL ? "source.keys"
                                                : "source.values");
    }
    transfer->source_keys = source->keys;
    transfer->source_values = source->values;
    transfer->layer_stride = source->layer_stride;
    transfer->token_stride = source->token_stride;
    transfer->head_stride = source->head_stride;
    return bounds_check(transfer, source->keys_bytes, source->values_bytes);
}

// Where the source's runs are long enough to be copied from a GPU.
static ice_status gpu_check(struct transfer *transfer)
{
    // The stride of a dimension of one element says nothing: frameworks put anything there.
    if (transfer->sequence->shape.kv_heads == 1) {
        transfer->head_stride = transfer->row_bytes;
    }
    if (transfer->n == 1) {
        transfer->token_stride = transfer->head_stride == transfer->row_bytes
                                     ? transfer->row_bytes * transfer->sequence->shape.kv_heads
                                     : transfer->row_bytes;
    }
    transfer->token_major = transfer->head_stride == transfer->row_bytes;
    if (!transfer->token_major && transfer->token_stride != transfer->row_bytes) {
        return error_set(ICE_NOT_SUPPORTED,
                         "from GPU memory, head_stride or token_stride must be the %llu bytes of a row of head_dim "
                         "elements; make the tensors contiguous",
                         (unsigned long long)transfer->row_bytes);
    }
    if (transfer->token_major && transfer->n > 1 &&
        transfer->token_stride < transfer->row_bytes * transfer->sequence->shape.kv_heads) {
        return error_set(ICE_INVALID_ARGUMENT, "token_stride is smaller than the %llu bytes of a token's heads",
                         (unsigned long long)(transfer->row_bytes * transfer->sequence->shape.kv_heads));
    }
    return ICE_OK;
}

static ice_status append_run(struct transfer *transfer, ice_status status, uint64_t *length_out)
{
    uint64_t length = 0;
    bool known = transfer->layers.count > 0;
    if (known) {
        (void)pthread_mutex_lock(&transfer->client->lock);
        length = sequence_length(transfer->sequence, transfer->layers);
        (void)pthread_mutex_unlock(&transfer->client->lock);
    }
    if (status == ICE_OK) {
        status = append_parts(transfer, &length);
        (void)pthread_mutex_lock(&transfer->client->lock);
        sequence_length_set(transfer->sequence, transfer->layers, length);
        (void)pthread_mutex_unlock(&transfer->client->lock);
    }
    if (length_out != NULL && known) {
        *length_out = length;
    }
    return status;
}

ice_status ice_append(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                      const struct ice_kv_source *source, uint64_t deadline_us, uint64_t *length_out)
{
    error_clear();
    struct transfer transfer;
    ice_status status = transfer_init(&transfer, sequence, layer, first, n, deadline_us);
    if (status == ICE_OK) {
        status = append_check(&transfer, source);
    }
    return append_run(&transfer, status, length_out);
}

ice_status ice_append_gpu(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                          const struct ice_kv_source *source, void *stream, uint64_t deadline_us, uint64_t *length_out)
{
    error_clear();
    struct transfer transfer;
    ice_status status = transfer_init(&transfer, sequence, layer, first, n, deadline_us);
    if (status == ICE_OK) {
        status = append_check(&transfer, source);
    }
    transfer.on_gpu = true;
    transfer.stream = stream;
    if (status == ICE_OK) {
        status = gpu_check(&transfer);
    }
    return append_run(&transfer, status, length_out);
}

// ---- read ----

static ice_status read_part(const struct transfer *transfer, struct part *part)
{
    Icecache__Wire__Read read = ICECACHE__WIRE__READ__INIT;
    read.sequence_id = transfer->sequence->id;
    read.layer = transfer->layers.first;
    read.layers = transfer->layers.count;
    read.first = transfer->first + part->begin;
    read.tokens = part->tokens;
    read.staging_offset = staging_offset(part->staging, part->half);
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_READ;
    request.read = &read;
    struct pending *pending = NULL;
    ice_status status = part_submit(transfer, &request, part, &pending);
    if (status != ICE_OK) {
        return status;
    }
    bool done = false;
    status = part_wait(transfer, pending, part, &done);
    if (!done) {
        return status;
    }
    if (status == ICE_OK && (pending->reply->body_case != ICECACHE__WIRE__REPLY__BODY_READ ||
                             pending->reply->read->tokens != part->tokens)) {
        status = error_set(ICE_BAD_MESSAGE, "the daemon did not read all the tokens asked for");
    }
    if (status == ICE_OK) {
        part_copy(transfer, part, false);
    }
    pending_destroy(pending);
    return status;
}

static ice_status read_check(struct transfer *transfer, const struct ice_kv_target *target)
{
    if (target == NULL || target->keys == NULL || target->values == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL",
                         target == NULL         ? "target"
                         : target->keys == NULL ? "target.keys"
                                                : "target.values");
    }
    transfer->target_keys = target->keys;
    transfer->target_values = target->values;
    transfer->layer_stride = target->layer_stride;
    transfer->token_stride = target->token_stride;
    transfer->head_stride = target->head_stride;
    ice_status status = overlap_check(transfer);
    return status == ICE_OK ? bounds_check(transfer, target->keys_bytes, target->values_bytes) : status;
}

ice_status ice_read(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                    const struct ice_kv_target *target, uint64_t deadline_us)
{
    error_clear();
    struct transfer transfer;
    ice_status status = transfer_init(&transfer, sequence, layer, first, n, deadline_us);
    if (status == ICE_OK) {
        status = read_check(&transfer, target);
    }
    for (uint64_t begin = 0; status == ICE_OK && begin < n;) {
        struct part part;
        status = part_acquire(&transfer, begin, true, &part);
        if (status == ICE_OK) {
            begin += part.tokens;
            status = read_part(&transfer, &part);
            part_release(&transfer, &part);
        }
    }
    return status;
}
