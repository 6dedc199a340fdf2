// Sealed prefixes: sealing the head of a sequence, looking one up, opening a sequence that begins with one, removing
// it.
//
// Stateless beside the handles: what is sealed is known to the daemon alone. The hashes go into frame 2 as they are.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include <string.h>

// What a call without a deadline has at least: writing a long prefix behind other writers takes minutes on a slow disk,
// and the daemon's death is noticed in any case.
#define SEAL_DEADLINE_US   (600u * 1000u * 1000u)
#define ATTACH_DEADLINE_US (60u * 1000u * 1000u)

static uint64_t until_at_least(const ice_client *client, uint64_t deadline_us, uint64_t least_us)
{
    if (deadline_us == 0) {
        deadline_us = client->deadline_us > least_us ? client->deadline_us : least_us;
    }
    return client_until(client, deadline_us);
}

// ---- hashes ----

static ice_status hashes_check(ice_client *client, const void *hashes, size_t count, uint32_t block_tokens)
{
    if (hashes == NULL || count == 0) {
        return error_set(ICE_INVALID_ARGUMENT, "%s; give the hash of at least one block",
                         hashes == NULL ? "hashes is NULL" : "count is 0");
    }
    uint64_t most = client_vectors_bytes_max(client) / WIRE_HASH_BYTES;
    most = most < WIRE_BLOCKS_MAX ? most : WIRE_BLOCKS_MAX;
    if (count > most) {
        return error_set(ICE_TOO_LARGE, "count is %zu, the limit is %llu; use larger blocks", count,
                         (unsigned long long)most);
    }
    if ((uint64_t)count * block_tokens > WIRE_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "count is %zu: blocks of %u tokens, but a sequence has at most %u tokens",
                         count, block_tokens, WIRE_TOKENS_MAX);
    }
    return ICE_OK;
}

// Sends a request with the hashes as its frame 2. As exchange_call.
static ice_status call_with_hashes(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                                   const void *hashes, size_t count, uint64_t until_us, struct pending **out)
{
    zmq_msg_t frame;
    if (zmq_msg_init_size(&frame, count * WIRE_HASH_BYTES) != 0) {
        *out = NULL;
        (void)error_set(ICE_NO_MEMORY, "no memory for %zu hashes", count);
        return ICE_NO_MEMORY;
    }
    memcpy(zmq_msg_data(&frame), hashes, count * WIRE_HASH_BYTES);
    return exchange_call_vectors(client, generation, request, &frame, until_us, out);
}

// How many tokens the daemon says there are: whole blocks, and no more than the hashes name.
static ice_status tokens_check(uint64_t tokens, size_t count, uint32_t block_tokens)
{
    if (tokens % block_tokens != 0 || tokens > (uint64_t)count * block_tokens) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer names %llu tokens for %zu blocks of %u",
                         (unsigned long long)tokens, count, block_tokens);
    }
    return ICE_OK;
}

// ---- seal ----

static ice_status seal_fill(const ice_sequence *sequence, const Icecache__Wire__Reply *reply, size_t count,
                            struct ice_seal_result *result)
{
    if (reply->body_case != ICECACHE__WIRE__REPLY__BODY_SEAL ||
        reply->seal->tokens != (uint64_t)count * sequence->block_tokens) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer does not say that %zu blocks are sealed", count);
    }
    if (result != NULL) {
        *result = (struct ice_seal_result){
            .prefix_id = reply->seal->prefix_id,
            .tokens = reply->seal->tokens,
            .known = reply->seal->known != 0,
        };
    }
    return ICE_OK;
}

ice_status ice_sequence_seal(ice_sequence *sequence, const void *hashes, size_t count, uint64_t deadline_us,
                             struct ice_seal_result *result)
{
    error_clear();
    if (sequence == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "sequence is NULL");
    }
    ice_client *client = sequence->client;
    ice_status status = client_check(client);
    if (status == ICE_OK) {
        status = hashes_check(client, hashes, count, sequence->block_tokens);
    }
    if (status != ICE_OK) {
        return status;
    }
    Icecache__Wire__Seal seal = ICECACHE__WIRE__SEAL__INIT;
    seal.sequence_id = sequence->id;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEAL;
    request.seal = &seal;
    struct pending *pending = NULL;
    status = call_with_hashes(client, sequence->generation, &request, hashes, count,
                              until_at_least(client, deadline_us, SEAL_DEADLINE_US), &pending);
    if (status == ICE_OK) {
        status = seal_fill(sequence, pending->reply, count, result);
    }
    pending_destroy(pending);
    return status;
}

// ---- lookup and attach ----

// What both of them take.
static ice_status arguments_check(ice_client *client, const struct ice_sequence_options *options, const void *hashes,
                                  size_t count, const char *out_name, const void *out)
{
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (options == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", options == NULL ? "options" : out_name);
    }
    status = sequence_options_check(options);
    if (status == ICE_OK) {
        status = hashes_check(client, hashes, count,
                              options->block_tokens != 0 ? options->block_tokens : WIRE_BLOCK_TOKENS_DEFAULT);
    }
    return status;
}

static ice_status lookup(ice_client *client, const struct ice_sequence_options *options, bool all_ranks,
                         const void *hashes, size_t count, uint64_t deadline_us, uint64_t *tokens_out)
{
    error_clear();
    ice_status status = arguments_check(client, options, hashes, count, "tokens_out", tokens_out);
    if (status != ICE_OK) {
        return status;
    }
    Icecache__Wire__SequenceOpen identity = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    Icecache__Wire__Lookup body = ICECACHE__WIRE__LOOKUP__INIT;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    sequence_options_fill(&identity, client, options);
    body.identity = &identity;
    body.all_ranks = all_ranks;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_LOOKUP;
    request.lookup = &body;
    struct pending *pending = NULL;
    status = call_with_hashes(client, client_generation(client), &request, hashes, count,
                              client_until(client, deadline_us), &pending);
    if (status == ICE_OK) {
        const Icecache__Wire__Reply *reply = pending->reply;
        status = reply->body_case == ICECACHE__WIRE__REPLY__BODY_LOOKUP
                     ? tokens_check(reply->lookup->tokens, count, identity.block_tokens)
                     : error_set(ICE_BAD_MESSAGE, "the daemon's answer names no tokens");
        *tokens_out = status == ICE_OK ? reply->lookup->tokens : *tokens_out;
    }
    pending_destroy(pending);
    return status;
}

ice_status ice_prefix_lookup(ice_client *client, const struct ice_sequence_options *options, const void *hashes,
                             size_t count, uint64_t deadline_us, uint64_t *tokens_out)
{
    return lookup(client, options, false, hashes, count, deadline_us, tokens_out);
}

ice_status ice_prefix_lookup_group(ice_client *client, const struct ice_sequence_options *options, const void *hashes,
                                   size_t count, uint64_t deadline_us, uint64_t *tokens_out)
{
    return lookup(client, options, true, hashes, count, deadline_us, tokens_out);
}

// Asks the daemon; on success the handle has its id and its lengths.
static ice_status attach_request(ice_sequence *sequence, const struct ice_sequence_options *options, const void *hashes,
                                 size_t count, uint64_t tokens_max, uint64_t until_us)
{
    Icecache__Wire__SequenceOpen open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    Icecache__Wire__Attach attach = ICECACHE__WIRE__ATTACH__INIT;
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    sequence_options_fill(&open, sequence->client, options);
    attach.open = &open;
    attach.tokens_max = tokens_max;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_ATTACH;
    request.attach = &attach;
    struct pending *pending = NULL;
    ice_status status =
        call_with_hashes(sequence->client, sequence->generation, &request, hashes, count, until_us, &pending);
    if (status == ICE_OK) {
        const Icecache__Wire__Reply *reply = pending->reply;
        if (reply->body_case != ICECACHE__WIRE__REPLY__BODY_ATTACH) {
            status = error_set(ICE_BAD_MESSAGE, "the daemon's answer names no sequence");
        } else {
            sequence->id = reply->attach->sequence_id;
            // Nobody else has the handle yet: the lengths need no lock.
            sequence_length_set(sequence, (struct layer_range){0, sequence->shape.layers}, reply->attach->tokens);
        }
    }
    pending_destroy(pending);
    return status;
}

ice_status ice_sequence_attach(ice_client *client, const struct ice_sequence_options *options, const void *hashes,
                               size_t count, uint64_t tokens_max, uint64_t deadline_us, ice_sequence **out,
                               uint64_t *tokens_out)
{
    error_clear();
    ice_status status = arguments_check(client, options, hashes, count, "out", out);
    if (status != ICE_OK) {
        return status;
    }
    if (tokens_max > WIRE_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "tokens_max is %llu, the limit is %u", (unsigned long long)tokens_max,
                         WIRE_TOKENS_MAX);
    }
    ice_sequence *sequence = sequence_create(client, options);
    if (sequence == NULL) {
        return ICE_NO_MEMORY;
    }
    status = attach_request(sequence, options, hashes, count, tokens_max,
                            until_at_least(client, deadline_us, ATTACH_DEADLINE_US));
    if (status != ICE_OK) {
        sequence_free(sequence);
        return status;
    }
    sequence_link(sequence);
    uint64_t tokens = sequence->lengths[0];
    status = tokens != 0 ? tokens_check(tokens, count, sequence->block_tokens)
                         : error_set(ICE_BAD_MESSAGE, "the daemon's answer names a sequence without tokens");
    if (status != ICE_OK) {
        ice_sequence_close(sequence);
        return status;
    }
    if (tokens_out != NULL) {
        *tokens_out = tokens;
    }
    *out = sequence;
    return ICE_OK;
}

// ---- remove ----

ice_status ice_prefix_remove(ice_client *client, uint64_t prefix_id, uint64_t deadline_us)
{
    return ice_prefix_remove_from(client, NULL, prefix_id, deadline_us);
}

ice_status ice_prefix_remove_from(ice_client *client, const char *name_space, uint64_t prefix_id, uint64_t deadline_us)
{
    error_clear();
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (name_space != NULL && (name_space[0] == '\0' || strlen(name_space) > WIRE_NAME_BYTES_MAX)) {
        return error_set(ICE_INVALID_ARGUMENT, "name_space is empty or longer than %u bytes", WIRE_NAME_BYTES_MAX);
    }
    Icecache__Wire__PrefixRemove removal = ICECACHE__WIRE__PREFIX_REMOVE__INIT;
    removal.prefix_id = prefix_id;
    removal.name_space = (char *)(uintptr_t)client_name_space(client, name_space); // packing only reads it
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    request.prefix_remove = &removal;
    struct pending *pending = NULL;
    status = exchange_call(client, client_generation(client), &request, client_until(client, deadline_us), &pending);
    pending_destroy(pending);
    return status;
}
