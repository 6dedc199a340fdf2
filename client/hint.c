// Hints: a request like a retrieve's, whose answer nobody need wait for.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include <string.h>

static ice_status sequences_check(const ice_client *client, const struct ice_hint_options *options)
{
    if (options->sequences == NULL || options->query_vectors == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "options.%s is NULL",
                         options->sequences == NULL ? "sequences" : "query_vectors");
    }
    for (uint32_t i = 0; i < options->sequence_count; i++) {
        const ice_sequence *sequence = options->sequences[i];
        if (sequence == NULL || sequence->client != client) {
            return error_set(ICE_INVALID_ARGUMENT, "options.sequences[%u] %s", i,
                             sequence == NULL ? "is NULL" : "belongs to another client");
        }
        if (sequence->generation != options->sequences[0]->generation) {
            return error_set(ICE_UNKNOWN_SESSION,
                             "options.sequences[%u] or the first was made before ice_client_reconnect; close it", i);
        }
        if (memcmp(&sequence->shape, &options->sequences[0]->shape, sizeof sequence->shape) != 0) {
            return error_set(ICE_SHAPE_MISMATCH, "options.sequences[%u] has another shape than the first", i);
        }
        if (options->layer >= sequence->shape.layers) {
            return error_set(ICE_UNKNOWN_LAYER, "layer %u: the sequence has %u layers", options->layer,
                             sequence->shape.layers);
        }
        if (sequence->anchors[options->layer] != options->layer) {
            return error_set(ICE_SHAPE_MISMATCH, "layer %u follows layer %u: hint at that one", options->layer,
                             sequence->anchors[options->layer]);
        }
    }
    return ICE_OK;
}

static ice_status options_check(const ice_client *client, const struct ice_hint_options *options)
{
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (options == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "options is NULL");
    }
    const struct selection_numbers asked = {
        .sequence_count = options->sequence_count,
        .queries = options->queries,
        .query_dtype = options->query_dtype,
        .budget = options->budget,
        .sinks = options->sinks,
        .window = options->window,
    };
    status = selection_check(&asked);
    return status == ICE_OK ? sequences_check(client, options) : status;
}

static ice_status vectors_create(ice_client *client, const struct ice_hint_options *options,
                                 const Icecache__Wire__Hint *hint, zmq_msg_t *vectors)
{
    const uint64_t bytes = wire_hint_vectors_bytes(hint, &options->sequences[0]->shape);
    const uint64_t most = client_vectors_bytes_max(client);
    if (bytes > most) {
        return error_set(ICE_TOO_LARGE,
                         "the queries take %llu bytes, the limit (vectors_bytes_max) is %llu; use fewer sequences or "
                         "query positions per call",
                         (unsigned long long)bytes, (unsigned long long)most);
    }
    if (zmq_msg_init_size(vectors, (size_t)bytes) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for %llu bytes of vectors", (unsigned long long)bytes);
    }
    memcpy(zmq_msg_data(vectors), options->query_vectors, (size_t)bytes);
    return ICE_OK;
}

// Sends it, and nobody takes the answer.
static ice_status request_send(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                               zmq_msg_t *vectors, uint64_t until_us)
{
    struct pending *pending = pending_create();
    if (pending == NULL) {
        (void)zmq_msg_close(vectors);
        return ICE_NO_MEMORY;
    }
    (void)pthread_mutex_lock(&client->lock);
    const ice_status status = exchange_submit(client, generation, request, vectors, pending, until_us);
    if (status == ICE_OK) {
        exchange_abandon(client, pending);
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (status != ICE_OK) {
        (void)zmq_msg_close(vectors);
        pending_destroy(pending);
    }
    return status;
}

static ice_status request_call(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                               zmq_msg_t *vectors, uint64_t until_us, struct ice_hint_result *result)
{
    struct pending *pending = NULL;
    ice_status status = exchange_call_vectors(client, generation, request, vectors, until_us, &pending);
    if (status == ICE_OK) {
        const Icecache__Wire__Reply *reply = pending->reply;
        if (reply->body_case != ICECACHE__WIRE__REPLY__BODY_HINT) {
            status = error_set(ICE_BAD_MESSAGE, "the daemon's answer is none to a hint");
        } else {
            *result = (struct ice_hint_result){.pages = reply->hint->pages, .lanes = reply->hint->lanes};
        }
    }
    pending_destroy(pending);
    return status;
}

ice_status ice_hint(ice_client *client, const struct ice_hint_options *options, struct ice_hint_result *result)
{
    error_clear();
    ice_status status = options_check(client, options);
    if (status != ICE_OK) {
        return status;
    }
    uint64_t sequence_ids[WIRE_SEQUENCES_PER_RETRIEVE_MAX];
    for (uint32_t i = 0; i < options->sequence_count; i++) {
        sequence_ids[i] = options->sequences[i]->id;
    }
    Icecache__Wire__Hint hint = ICECACHE__WIRE__HINT__INIT;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    const uint64_t until_us = client_until(client, options->deadline_us), now_us = clock_us();
    const uint64_t left_us = until_us > now_us ? until_us - now_us : 1;
    hint.layer = options->layer;
    hint.sequence_ids = sequence_ids;
    hint.n_sequence_ids = options->sequence_count;
    hint.queries = options->queries != 0 ? options->queries : 1;
    hint.query_dtype = (uint32_t)options->query_dtype;
    hint.budget = options->budget;
    hint.sinks = options->sinks;
    hint.window = options->window;
    hint.deadline_us = left_us < WIRE_DEADLINE_US_MAX ? (uint32_t)left_us : WIRE_DEADLINE_US_MAX;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_HINT;
    request.hint = &hint;
    zmq_msg_t vectors;
    status = vectors_create(client, options, &hint, &vectors);
    if (status != ICE_OK) {
        return status;
    }
    const uint64_t generation = options->sequences[0]->generation;
    return result == NULL ? request_send(client, generation, &request, &vectors, until_us)
                          : request_call(client, generation, &request, &vectors, until_us, result);
}
