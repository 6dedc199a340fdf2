// Decoding of messages: size caps, protobuf into a bounded arena, protocol version, session token, body, then every
// field (wire_check.c).
//
// Invariants: no allocation outside the arena for requests (replies come from the daemon and are decoded on the heap);
// *out is written on success only; a refusal has a status and a text, and the request's id wherever that can be read.
// Threads: stateless; one arena belongs to one thread.
#include "proto/wire.h"

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/wire_check.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

// ---- arena ----

void wire_arena_init(struct wire_arena *arena, void *memory, size_t bytes)
{
    *arena = (struct wire_arena){.memory = memory, .capacity_bytes = bytes};
}

void wire_arena_reset(struct wire_arena *arena)
{
    arena->used_bytes = 0;
}

// One decoding: protobuf-c answers NULL for garbage and for a refused allocation alike, `refused` tells them apart.
struct decoding {
    struct wire_arena *arena;
    bool refused;
};

static void *arena_alloc(void *context, size_t bytes)
{
    struct decoding *decoding = context;
    struct wire_arena *arena = decoding->arena;
    const uintptr_t here = (uintptr_t)arena->memory + arena->used_bytes;
    const size_t padding = (size_t)(-here % _Alignof(max_align_t));
    const size_t left = arena->capacity_bytes - arena->used_bytes;
    if (padding > left || bytes > left - padding) {
        decoding->refused = true;
        return NULL;
    }
    void *memory = arena->memory + arena->used_bytes + padding;
    arena->used_bytes += padding + bytes;
    return memory;
}

static void arena_free(void *context, void *memory)
{
    (void)context;
    (void)memory;
}

// ---- errors ----

static void set_text(struct wire_error *error, ice_status status, const char *format, va_list arguments)
{
    error->status = status;
    vsnprintf(error->text, sizeof(error->text), format, arguments);
}

void wire_error_set(struct wire_error *error, ice_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_text(error, status, format, arguments);
    va_end(arguments);
}

ice_status wire_refuse(struct wire_error *error, ice_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_text(error, status, format, arguments);
    va_end(arguments);
    return status;
}

// ---- decoding ----

// Top-level integers of a message that may not decode as a whole: 0 where not found.
struct peeked {
    uint64_t field_1, field_2;
};

static bool peek_varint(const uint8_t *bytes, size_t size, size_t *at, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 64 && *at < size; shift += 7) {
        const uint8_t byte = bytes[(*at)++];
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            return true;
        }
    }
    return false;
}

// Walks the wire format as far as it is sound. The last occurrence wins, as in protobuf.
static struct peeked peek(const uint8_t *bytes, size_t size)
{
    struct peeked found = {0};
    size_t at = 0;
    uint64_t tag;
    while (peek_varint(bytes, size, &at, &tag)) {
        uint64_t value = 0;
        size_t skip = 0;
        switch (tag & 7) {
        case 0: // varint
            if (!peek_varint(bytes, size, &at, &value)) {
                return found;
            }
            found.field_1 = tag >> 3 == 1 ? value : found.field_1;
            found.field_2 = tag >> 3 == 2 ? value : found.field_2;
            break;
        case 1: // 64 bits
            skip = 8;
            break;
        case 2: // length and bytes
            if (!peek_varint(bytes, size, &at, &value) || value > size - at) {
                return found;
            }
            skip = (size_t)value;
            break;
        case 5: // 32 bits
            skip = 4;
            break;
        default:
            return found;
        }
        if (skip > size - at) {
            return found;
        }
        at += skip;
    }
    return found;
}

static ice_status check_size(const char *what, size_t size, size_t max, const char *limit, struct wire_error *error)
{
    if (size == 0) {
        return wire_refuse(error, ICE_BAD_MESSAGE, "the %s is empty; use a client library of the daemon's version",
                           what);
    }
    if (size > max) {
        return wire_refuse(error, ICE_TOO_LARGE, "the %s has %zu bytes, over %s = %zu; split it", what, size, limit,
                           max);
    }
    return ICE_OK;
}

// Why protobuf-c gave no message.
static ice_status refuse_undecoded(const struct decoding *decoding, struct wire_error *error)
{
    if (decoding->refused) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "the message needs more than the %zu bytes that one request may take when decoded; split it",
                           decoding->arena->capacity_bytes);
    }
    return wire_refuse(error, ICE_BAD_MESSAGE,
                       "the message is truncated or garbled; use a client library of the daemon's version");
}

ice_status wire_request_decode(const void *bytes, size_t size, struct wire_arena *arena, Icecache__Wire__Request **out,
                               uint64_t *request_id_out, struct wire_error *error)
{
    const size_t known = size < WIRE_HEADER_BYTES_MAX ? size : WIRE_HEADER_BYTES_MAX;
    const struct peeked peeked = peek(bytes, known);
    *request_id_out = peeked.field_2;
    *error = (struct wire_error){.status = ICE_OK};
    ice_status status = check_size("request", size, LIMIT(WIRE_HEADER_BYTES_MAX), error);
    if (status != ICE_OK) {
        return status;
    }
    struct decoding decoding = {.arena = arena};
    ProtobufCAllocator allocator = {.alloc = arena_alloc, .free = arena_free, .allocator_data = &decoding};
    Icecache__Wire__Request *request = icecache__wire__request__unpack(&allocator, size, bytes);
    if (!request) {
        // A later version may not decode here at all: say so rather than "garbled".
        const uint32_t version = (uint32_t)peeked.field_1;
        return version != 0 && version != WIRE_PROTOCOL_VERSION ? wire_check_version("the client", version, error)
                                                                : refuse_undecoded(&decoding, error);
    }
    *request_id_out = request->request_id;
    status = wire_check_version("the client", request->protocol_version, error);
    if (status != ICE_OK) {
        return status;
    }
    if (request->session_token.len != WIRE_SESSION_TOKEN_BYTES) {
        return wire_refuse(error, ICE_BAD_MESSAGE,
                           "session_token has %zu bytes; send the %u bytes of the hello's reply",
                           request->session_token.len, WIRE_SESSION_TOKEN_BYTES);
    }
    status = wire_check_request(request, error);
    if (status == ICE_OK) {
        *out = request;
    }
    return status;
}

ice_status wire_control_request_decode(const void *bytes, size_t size, struct wire_arena *arena,
                                       Icecache__Wire__ControlRequest **out, uint64_t *request_id_out,
                                       struct wire_error *error)
{
    const size_t known = size < WIRE_CONTROL_BYTES_MAX ? size : WIRE_CONTROL_BYTES_MAX;
    *request_id_out = peek(bytes, known).field_1;
    *error = (struct wire_error){.status = ICE_OK};
    ice_status status = check_size("control request", size, LIMIT(WIRE_CONTROL_BYTES_MAX), error);
    if (status != ICE_OK) {
        return status;
    }
    struct decoding decoding = {.arena = arena};
    ProtobufCAllocator allocator = {.alloc = arena_alloc, .free = arena_free, .allocator_data = &decoding};
    Icecache__Wire__ControlRequest *request = icecache__wire__control_request__unpack(&allocator, size, bytes);
    if (!request) {
        return refuse_undecoded(&decoding, error);
    }
    *request_id_out = request->request_id;
    status = wire_check_control_request(request, error);
    if (status == ICE_OK) {
        *out = request;
    }
    return status;
}

// ---- replies ----

static bool retrieve_reply_is_sound(const Icecache__Wire__RetrieveReply *reply)
{
    if (reply->n_masses != reply->n_counts || reply->n_indexed != reply->n_counts ||
        reply->n_versions != reply->n_counts || reply->n_changed != reply->n_counts) {
        return false;
    }
    uint64_t positions = 0;
    for (size_t i = 0; i < reply->n_counts; i++) {
        positions += reply->counts[i];
    }
    return reply->n_positions == 0 || reply->n_positions == positions;
}

static bool reply_is_sound(const Icecache__Wire__Reply *reply)
{
    switch (reply->body_case) {
    case ICECACHE__WIRE__REPLY__BODY_RETRIEVE:
        return retrieve_reply_is_sound(reply->retrieve);
    case ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO:
        return reply->sequence_info->n_lengths == reply->sequence_info->n_indexed;
    case ICECACHE__WIRE__REPLY__BODY_STATS:
        return reply->stats->n_sequence <= WIRE_STATS_SEQUENCES_MAX && reply->stats->n_gpu <= WIRE_STATS_GPUS_MAX &&
               reply->stats->n_service <= WIRE_STATS_COUNTS_MAX;
    case ICECACHE__WIRE__REPLY__BODY_SEAL:
        return reply->seal->tokens <= WIRE_TOKENS_MAX;
    case ICECACHE__WIRE__REPLY__BODY_LOOKUP:
        return reply->lookup->tokens <= WIRE_TOKENS_MAX;
    case ICECACHE__WIRE__REPLY__BODY_ATTACH:
        return reply->attach->tokens <= WIRE_TOKENS_MAX;
    case ICECACHE__WIRE__REPLY__BODY_SEQUENCE_FORK:
        return reply->sequence_fork->tokens <= WIRE_TOKENS_MAX;
    case ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST:
        return reply->prefix_list->n_prefix <= WIRE_PREFIXES_LISTED_MAX;
    case ICECACHE__WIRE__REPLY__BODY_LEASE_LIST:
        return reply->lease_list->n_lease <= WIRE_LEASES_LISTED_MAX;
    case ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST:
        return reply->namespace_list->n_name_space <= WIRE_NAMESPACES_LISTED_MAX;
    case ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN:
    case ICECACHE__WIRE__REPLY__BODY_APPEND:
    case ICECACHE__WIRE__REPLY__BODY_READ:
    case ICECACHE__WIRE__REPLY__BODY_HINT:
    case ICECACHE__WIRE__REPLY__BODY__NOT_SET: // errors, closes and removals
    default:
        return true;
    }
}

ice_status wire_reply_decode(const void *bytes, size_t size, Icecache__Wire__Reply **out)
{
    if (size > WIRE_REPLY_BYTES_MAX) {
        return ICE_TOO_LARGE;
    }
    Icecache__Wire__Reply *reply = icecache__wire__reply__unpack(NULL, size, bytes);
    if (!reply) {
        return ICE_BAD_MESSAGE;
    }
    if (!reply_is_sound(reply)) {
        icecache__wire__reply__free_unpacked(reply, NULL);
        return ICE_BAD_MESSAGE;
    }
    *out = reply;
    return ICE_OK;
}

ice_status wire_control_reply_decode(const void *bytes, size_t size, Icecache__Wire__ControlReply **out)
{
    if (size > WIRE_CONTROL_BYTES_MAX) {
        return ICE_TOO_LARGE;
    }
    Icecache__Wire__ControlReply *reply = icecache__wire__control_reply__unpack(NULL, size, bytes);
    if (!reply) {
        return ICE_BAD_MESSAGE;
    }
    if (reply->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO &&
        reply->hello->session_token.len != WIRE_SESSION_TOKEN_BYTES) {
        icecache__wire__control_reply__free_unpacked(reply, NULL);
        return ICE_BAD_MESSAGE;
    }
    *out = reply;
    return ICE_OK;
}

// ---- frame 2 ----

// Factors in range, so that the sums below stay under 2^38.
static bool queries_in_range(size_t sequences, uint32_t queries, uint32_t query_dtype, const struct wire_shape *shape)
{
    return sequences <= WIRE_SEQUENCES_PER_RETRIEVE_MAX && queries <= WIRE_QUERIES_MAX && dtype_is_valid(query_dtype) &&
           shape->query_heads <= WIRE_QUERY_HEADS_MAX && shape->kv_heads <= WIRE_KV_HEADS_MAX &&
           shape->head_dim <= WIRE_HEAD_DIM_MAX && dtype_is_valid(shape->dtype);
}

static uint64_t queries_bytes(size_t sequences, uint32_t queries, uint32_t query_dtype, const struct wire_shape *shape)
{
    if (!queries_in_range(sequences, queries, query_dtype, shape)) {
        return 0;
    }
    return (uint64_t)sequences * queries * shape->query_heads * shape->head_dim * dtype_bytes((enum dtype)query_dtype);
}

uint64_t wire_hint_vectors_bytes(const Icecache__Wire__Hint *hint, const struct wire_shape *shape)
{
    return queries_bytes(hint->n_sequence_ids, hint->queries, hint->query_dtype, shape);
}

uint64_t wire_retrieve_query_bytes(const Icecache__Wire__Retrieve *retrieve, const struct wire_shape *shape)
{
    return retrieve->follows ? 0
                             : queries_bytes(retrieve->n_sequence_ids, retrieve->queries, retrieve->query_dtype, shape);
}

uint64_t wire_retrieve_vectors_bytes(const Icecache__Wire__Retrieve *retrieve, const struct wire_shape *shape)
{
    const uint64_t query_bytes = wire_retrieve_query_bytes(retrieve, shape);
    if (!queries_in_range(retrieve->n_sequence_ids, retrieve->queries, retrieve->query_dtype, shape) ||
        !retrieve->append) {
        return query_bytes;
    }
    return query_bytes + 2 * (uint64_t)retrieve->n_sequence_ids * retrieve->queries * shape->kv_heads *
                             shape->head_dim * dtype_bytes((enum dtype)shape->dtype);
}
