// Forks and truncations of sequences.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include <string.h>

static ice_status sequence_check(const ice_sequence *sequence, const void *out)
{
    error_clear();
    if (sequence == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", sequence == NULL ? "sequence" : "out");
    }
    return client_check(sequence->client);
}

// ---- fork ----

// Asks the daemon; on success the child has its id and its lengths.
static ice_status fork_request(const ice_sequence *parent, uint64_t tokens, uint64_t until_us, ice_sequence *child)
{
    Icecache__Wire__SequenceFork fork = ICECACHE__WIRE__SEQUENCE_FORK__INIT;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    fork.sequence_id = parent->id;
    fork.tokens = tokens;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_FORK;
    request.sequence_fork = &fork;
    struct pending *pending = NULL;
    ice_status status = exchange_call(parent->client, parent->generation, &request, until_us, &pending);
    if (status == ICE_OK) {
        const Icecache__Wire__Reply *reply = pending->reply;
        if (reply->body_case != ICECACHE__WIRE__REPLY__BODY_SEQUENCE_FORK) {
            status = error_set(ICE_BAD_MESSAGE, "the daemon's answer names no sequence");
        } else {
            child->id = reply->sequence_fork->sequence_id;
            // Nobody else has the handle yet: the lengths need no lock.
            sequence_length_set(child, (struct layer_range){0, child->shape.layers}, reply->sequence_fork->tokens);
        }
    }
    pending_destroy(pending);
    return status;
}

ice_status ice_sequence_fork(ice_sequence *sequence, uint64_t tokens, uint64_t deadline_us, ice_sequence **out)
{
    ice_status status = sequence_check(sequence, out);
    if (status != ICE_OK) {
        return status;
    }
    const struct ice_sequence_options like = {
        .layers = sequence->shape.layers,
        .kv_heads = sequence->shape.kv_heads,
        .query_heads = sequence->shape.query_heads,
        .head_dim = sequence->shape.head_dim,
        .dtype = (ice_dtype)sequence->shape.dtype,
        .block_tokens = sequence->block_tokens,
        .anchor_layers = sequence->anchors,
    };
    ice_sequence *child = sequence_create(sequence->client, &like);
    if (child == NULL) {
        return ICE_NO_MEMORY;
    }
    child->generation = sequence->generation;
    status = fork_request(sequence, tokens, client_until(sequence->client, deadline_us), child);
    if (status != ICE_OK) {
        sequence_free(child);
        return status;
    }
    sequence_link(child);
    *out = child;
    return ICE_OK;
}

// ---- truncate ----

// What ice_append reports where the daemon's answer does not come.
static void shorten(ice_sequence *sequence, uint64_t tokens)
{
    (void)pthread_mutex_lock(&sequence->client->lock);
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++) {
        if (sequence->lengths[layer] > tokens) {
            sequence->lengths[layer] = tokens;
        }
    }
    (void)pthread_mutex_unlock(&sequence->client->lock);
}

ice_status ice_sequence_truncate(ice_sequence *sequence, uint64_t tokens, uint64_t deadline_us)
{
    ice_status status = sequence_check(sequence, sequence);
    if (status != ICE_OK) {
        return status;
    }
    Icecache__Wire__SequenceTruncate truncate = ICECACHE__WIRE__SEQUENCE_TRUNCATE__INIT;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    truncate.sequence_id = sequence->id;
    truncate.tokens = tokens;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_TRUNCATE;
    request.sequence_truncate = &truncate;
    struct pending *pending = NULL;
    status = exchange_call(sequence->client, sequence->generation, &request,
                           client_until(sequence->client, deadline_us), &pending);
    if (status == ICE_OK) {
        shorten(sequence, tokens);
    }
    pending_destroy(pending);
    return status;
}
