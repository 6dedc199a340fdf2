// Sequences: opening, closing, and what the daemon knows of one.
//
// A handle is constant from open to close, except the lengths last heard, which the client's lock guards. They are
// what ice_append reports where the daemon's answer did not come; the daemon's own lengths are the truth.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include "proto/dtype.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

ice_status sequence_layers(const ice_sequence *sequence, uint32_t layer, struct layer_range *out)
{
    if (layer == ICE_ALL_LAYERS) {
        *out = (struct layer_range){0, sequence->shape.layers};
        return ICE_OK;
    }
    if (layer >= sequence->shape.layers) {
        return error_set(ICE_UNKNOWN_LAYER, "layer %u: the sequence has %u layers", layer, sequence->shape.layers);
    }
    *out = (struct layer_range){layer, 1};
    return ICE_OK;
}

uint64_t sequence_length(const ice_sequence *sequence, struct layer_range range)
{
    uint64_t shortest = UINT64_MAX;
    for (uint32_t i = 0; i < range.count; i++) {
        uint64_t length = sequence->lengths[range.first + i];
        shortest = length < shortest ? length : shortest;
    }
    return shortest;
}

void sequence_length_set(ice_sequence *sequence, struct layer_range range, uint64_t length)
{
    for (uint32_t i = 0; i < range.count; i++) {
        if (sequence->lengths[range.first + i] < length) {
            sequence->lengths[range.first + i] = length;
        }
    }
}

// ---- open ----

static ice_status shape_check(const struct ice_sequence_options *options)
{
    const struct {
        const char *name;
        uint32_t value, most;
    } fields[] = {
        {"layers", options->layers, WIRE_LAYERS_MAX},
        {"kv_heads", options->kv_heads, WIRE_KV_HEADS_MAX},
        {"query_heads", options->query_heads, WIRE_QUERY_HEADS_MAX},
        {"head_dim", options->head_dim, WIRE_HEAD_DIM_MAX},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i].value == 0) {
            return error_set(ICE_INVALID_ARGUMENT, "options.%s is 0", fields[i].name);
        }
        if (fields[i].value > fields[i].most) {
            return error_set(ICE_TOO_LARGE, "options.%s is %u, the limit is %u", fields[i].name, fields[i].value,
                             fields[i].most);
        }
    }
    if (options->head_dim % WIRE_HEAD_DIM_STEP != 0) {
        return error_set(ICE_INVALID_ARGUMENT, "options.head_dim %u is not a multiple of %u", options->head_dim,
                         WIRE_HEAD_DIM_STEP);
    }
    if (options->query_heads % options->kv_heads != 0 || options->query_heads / options->kv_heads > WIRE_GROUP_MAX) {
        return error_set(ICE_INVALID_ARGUMENT,
                         "options.query_heads %u is not a multiple (at most %u) of options.kv_heads %u",
                         options->query_heads, WIRE_GROUP_MAX, options->kv_heads);
    }
    if (options->layers * options->kv_heads > WIRE_LANES_MAX) {
        return error_set(ICE_TOO_LARGE, "options.layers x options.kv_heads is %u, the limit is %u",
                         options->layers * options->kv_heads, WIRE_LANES_MAX);
    }
    if (!dtype_is_valid((uint32_t)options->dtype)) {
        return error_set(ICE_INVALID_ARGUMENT, "options.dtype %d is none of ICE_BF16, ICE_FP16, ICE_FP32",
                         (int)options->dtype);
    }
    return ICE_OK;
}

static ice_status identity_check(const struct ice_sequence_options *options)
{
    if (options->name_space != NULL &&
        (options->name_space[0] == '\0' || strlen(options->name_space) > WIRE_NAME_BYTES_MAX)) {
        return error_set(ICE_INVALID_ARGUMENT, "options.name_space is empty or longer than %u bytes",
                         WIRE_NAME_BYTES_MAX);
    }
    if (options->model_digest == NULL || options->model_digest_bytes == 0 ||
        options->model_digest_bytes > WIRE_DIGEST_BYTES_MAX) {
        return error_set(ICE_INVALID_ARGUMENT, "options.model_digest must be 1 to %u bytes", WIRE_DIGEST_BYTES_MAX);
    }
    uint32_t tp_size = options->tp_size != 0 ? options->tp_size : 1;
    if (options->tp_rank >= tp_size) {
        return error_set(ICE_INVALID_ARGUMENT, "options.tp_rank %u is not below options.tp_size %u", options->tp_rank,
                         tp_size);
    }
    if (!isfinite(options->softmax_scale) || options->softmax_scale < 0) {
        return error_set(ICE_INVALID_ARGUMENT, "options.softmax_scale is negative or not finite");
    }
    if (options->block_tokens > WIRE_BLOCK_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "options.block_tokens is %u, the limit is %u", options->block_tokens,
                         WIRE_BLOCK_TOKENS_MAX);
    }
    if (options->max_tokens > WIRE_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "options.max_tokens is %llu, the limit is %u",
                         (unsigned long long)options->max_tokens, WIRE_TOKENS_MAX);
    }
    for (uint32_t i = 0; options->anchor_layers != NULL && i < options->layers; i++) {
        if (options->anchor_layers[i] >= options->layers) {
            return error_set(ICE_INVALID_ARGUMENT, "options.anchor_layers[%u] is %u, the sequence has %u layers", i,
                             options->anchor_layers[i], options->layers);
        }
        uint32_t anchor = options->anchor_layers[i];
        if (anchor > i || options->anchor_layers[anchor] != anchor) {
            return error_set(ICE_INVALID_ARGUMENT,
                             "options.anchor_layers[%u] is %u: a layer follows an earlier one that follows none", i,
                             anchor);
        }
    }
    return ICE_OK;
}

ice_status sequence_options_check(const struct ice_sequence_options *options)
{
    ice_status status = shape_check(options);
    return status == ICE_OK ? identity_check(options) : status;
}

void sequence_options_fill(Icecache__Wire__SequenceOpen *open, const ice_client *client,
                           const struct ice_sequence_options *options)
{
    // The generated fields are not const, but packing only reads them.
    open->name_space = (char *)(uintptr_t)client_name_space(client, options->name_space);
    open->model_digest.data = (uint8_t *)(uintptr_t)options->model_digest;
    open->model_digest.len = options->model_digest_bytes;
    open->tp_rank = options->tp_rank;
    open->tp_size = options->tp_size != 0 ? options->tp_size : 1;
    open->layers = options->layers;
    open->kv_heads = options->kv_heads;
    open->query_heads = options->query_heads;
    open->head_dim = options->head_dim;
    open->dtype = (uint32_t)options->dtype;
    open->softmax_scale = options->softmax_scale;
    open->block_tokens = options->block_tokens != 0 ? options->block_tokens : WIRE_BLOCK_TOKENS_DEFAULT;
    open->max_tokens = options->max_tokens;
    if (options->anchor_layers != NULL) {
        open->anchor_layers = (uint32_t *)(uintptr_t)options->anchor_layers;
        open->n_anchor_layers = options->layers;
    }
}

ice_sequence *sequence_create(ice_client *client, const struct ice_sequence_options *options)
{
    ice_sequence *sequence = calloc(1, sizeof *sequence);
    uint64_t *lengths = calloc(options->layers, sizeof *lengths);
    uint32_t *anchors = malloc(options->layers * sizeof *anchors);
    if (sequence == NULL || lengths == NULL || anchors == NULL) {
        free(sequence);
        free(lengths);
        free(anchors);
        (void)error_set(ICE_NO_MEMORY, "no memory for a sequence's record");
        return NULL;
    }
    sequence->client = client;
    sequence->generation = client_generation(client);
    sequence->lengths = lengths;
    sequence->anchors = anchors;
    for (uint32_t i = 0; i < options->layers; i++) {
        anchors[i] = options->anchor_layers != NULL ? options->anchor_layers[i] : i;
    }
    sequence->block_tokens = options->block_tokens != 0 ? options->block_tokens : WIRE_BLOCK_TOKENS_DEFAULT;
    sequence->shape = (struct wire_shape){options->layers, options->kv_heads, options->query_heads, options->head_dim,
                                          (uint32_t)options->dtype};
    return sequence;
}

void sequence_link(ice_sequence *sequence)
{
    ice_client *client = sequence->client;
    (void)pthread_mutex_lock(&client->lock);
    handle_link(&client->sequences, &sequence->handle);
    (void)pthread_mutex_unlock(&client->lock);
}

static ice_status sequence_request(ice_sequence *sequence, const struct ice_sequence_options *options,
                                   uint64_t until_us)
{
    Icecache__Wire__SequenceOpen open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    sequence_options_fill(&open, sequence->client, options);
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN;
    request.sequence_open = &open;
    struct pending *pending = NULL;
    ice_status status = exchange_call(sequence->client, sequence->generation, &request, until_us, &pending);
    if (status == ICE_OK) {
        if (pending->reply->body_case == ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN) {
            sequence->id = pending->reply->sequence_open->sequence_id;
        } else {
            status = error_set(ICE_BAD_MESSAGE, "the daemon's answer names no sequence");
        }
    }
    pending_destroy(pending);
    return status;
}

ice_status ice_sequence_open(ice_client *client, const struct ice_sequence_options *options, uint64_t deadline_us,
                             ice_sequence **out)
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
    status = sequence_options_check(options);
    if (status != ICE_OK) {
        return status;
    }
    ice_sequence *sequence = sequence_create(client, options);
    if (sequence == NULL) {
        return ICE_NO_MEMORY;
    }
    status = sequence_request(sequence, options, until_us);
    if (status != ICE_OK) {
        sequence_free(sequence);
        return status;
    }
    sequence_link(sequence);
    *out = sequence;
    return ICE_OK;
}

// ---- close ----

void sequence_free(ice_sequence *sequence)
{
    free(sequence->lengths);
    free(sequence->anchors);
    free(sequence);
}

void ice_sequence_close(ice_sequence *sequence)
{
    if (sequence == NULL) {
        return;
    }
    ice_client *client = sequence->client;
    if (client_is_forked(client)) {
        sequence_free(sequence);
        return;
    }
    Icecache__Wire__SequenceClose close = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT;
    close.sequence_id = sequence->id;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
    request.sequence_close = &close;
    struct pending *pending = NULL;
    error_hold();
    // Waited for, so that its memory is free again when this returns; the status says nothing to a closing caller.
    ice_status status = exchange_call(client, sequence->generation, &request, client_until(client, 0), &pending);
    (void)status;
    error_let_go();
    pending_destroy(pending);
    (void)pthread_mutex_lock(&client->lock);
    handle_unlink(&sequence->handle);
    (void)pthread_mutex_unlock(&client->lock);
    sequence_free(sequence);
}

// ---- info ----

static ice_status info_fill(const Icecache__Wire__Reply *reply, uint32_t layers, struct ice_sequence_info *out)
{
    const Icecache__Wire__SequenceInfoReply *info =
        reply->body_case == ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO ? reply->sequence_info : NULL;
    if (info == NULL || info->n_lengths != layers || info->n_indexed != layers) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer does not list the sequence's layers");
    }
    struct ice_sequence_info found = {
        .length_min = UINT64_MAX,
        .indexed_min = UINT64_MAX,
        .pages = info->pages,
        .pool_bytes = info->pool_bytes,
        .index_bytes = info->index_bytes,
        .build_us = info->build_us,
        .idle = info->idle != 0,
        .shared_tokens = info->shared_tokens,
    };
    for (uint32_t i = 0; i < layers; i++) {
        uint64_t length = info->lengths[i];
        found.length = length > found.length ? length : found.length;
        found.length_min = length < found.length_min ? length : found.length_min;
        found.indexed_min = info->indexed[i] < found.indexed_min ? info->indexed[i] : found.indexed_min;
    }
    *out = found;
    return ICE_OK;
}

ice_status ice_sequence_info(ice_sequence *sequence, uint64_t deadline_us, struct ice_sequence_info *out)
{
    error_clear();
    if (sequence == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", sequence == NULL ? "sequence" : "out");
    }
    ice_status status = client_check(sequence->client);
    if (status != ICE_OK) {
        return status;
    }
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    info.sequence_id = sequence->id;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    struct pending *pending = NULL;
    status = exchange_call(sequence->client, sequence->generation, &request,
                           client_until(sequence->client, deadline_us), &pending);
    if (status == ICE_OK) {
        status = info_fill(pending->reply, sequence->shape.layers, out);
    }
    pending_destroy(pending);
    return status;
}
