// The ranges of every field of a request, as far as they need no state of the daemon.
//
// Invariants: what passes has every count, enum and float in range, so that no later product of them overflows 64 bits;
// no byte of a message reaches an assert; nothing of a message but numbers goes into an error's text.
// Threads: stateless, any thread.
#include "proto/wire_check.h"

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/shm.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

// ---- fields that several messages share ----

// A count from 1 to its limit.
struct count_field {
    const char *name;
    uint64_t value, max;
    const char *limit, *advice;
};

static ice_status check_counts(const struct count_field *fields, size_t count, struct wire_error *error)
{
    for (size_t i = 0; i < count; i++) {
        const struct count_field *field = &fields[i];
        if (field->value == 0) {
            return wire_refuse(error, ICE_INVALID_ARGUMENT, "%s is 0 or missing; give 1 to %" PRIu64, field->name,
                               field->max);
        }
        if (field->value > field->max) {
            return wire_refuse(error, ICE_TOO_LARGE, "%s is %" PRIu64 ", over %s = %" PRIu64 "; %s", field->name,
                               field->value, field->limit, field->max, field->advice);
        }
    }
    return ICE_OK;
}

static ice_status check_head_dim(uint32_t head_dim, struct wire_error *error)
{
    if (head_dim == 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "head_dim is 0 or missing; give a multiple of %u up to %u",
                           WIRE_HEAD_DIM_STEP, WIRE_HEAD_DIM_MAX);
    }
    if (head_dim > WIRE_HEAD_DIM_MAX || head_dim % WIRE_HEAD_DIM_STEP != 0) {
        return wire_refuse(
            error, ICE_NOT_SUPPORTED,
            "head_dim %u is not supported; it must be a multiple of %u up to %u: pad the heads with zeros", head_dim,
            WIRE_HEAD_DIM_STEP, WIRE_HEAD_DIM_MAX);
    }
    return ICE_OK;
}

static ice_status check_dtype(const char *name, uint32_t dtype, struct wire_error *error)
{
    if (!dtype_is_valid(dtype)) {
        return wire_refuse(error, ICE_NOT_SUPPORTED,
                           "%s %u is not supported (nor is fp8); convert to bf16 (%u), fp16 (%u) or fp32 (%u)", name,
                           dtype, DTYPE_BF16, DTYPE_FP16, DTYPE_FP32);
    }
    return ICE_OK;
}

static ice_status check_lanes(uint32_t layers, uint32_t kv_heads, struct wire_error *error)
{
    const uint64_t lanes = (uint64_t)layers * kv_heads;
    if (lanes > WIRE_LANES_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "layers x kv_heads is %u x %u = %" PRIu64
                           ", over WIRE_LANES_MAX = %u; split the heads over more "
                           "ranks",
                           layers, kv_heads, lanes, WIRE_LANES_MAX);
    }
    return ICE_OK;
}

// Printable ASCII, so that a name can go into logs, metrics and terminals as it is.
static ice_status check_name(const char *field, const char *name, struct wire_error *error)
{
    const size_t length = strlen(name);
    if (length > WIRE_NAME_BYTES_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE, "%s has %zu bytes, over WIRE_NAME_BYTES_MAX = %u; give a shorter one",
                           field, length, WIRE_NAME_BYTES_MAX);
    }
    for (size_t i = 0; i < length; i++) {
        const unsigned char byte = (unsigned char)name[i];
        if (byte < 0x20 || byte > 0x7e) {
            return wire_refuse(error, ICE_INVALID_ARGUMENT,
                               "%s holds byte 0x%02x at %zu; use printable ASCII characters only", field, byte, i);
        }
    }
    return ICE_OK;
}

static ice_status check_layers(uint32_t layer, uint32_t layers, struct wire_error *error)
{
    if (layers == 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "layers is 0 or missing; give 1 to %u", WIRE_LAYERS_MAX);
    }
    if ((uint64_t)layer + layers > WIRE_LAYERS_MAX) {
        return wire_refuse(error, ICE_UNKNOWN_LAYER,
                           "layer %u + layers %u ends at %" PRIu64
                           ", over WIRE_LAYERS_MAX = %u; name layers of the sequence",
                           layer, layers, (uint64_t)layer + layers, WIRE_LAYERS_MAX);
    }
    return ICE_OK;
}

// first .. first + count - 1 are positions of a sequence; count is at most WIRE_TOKENS_MAX.
static ice_status check_positions(const char *name, uint64_t first, uint64_t count, struct wire_error *error)
{
    if (first > WIRE_TOKENS_MAX || first + count > WIRE_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "%s is %" PRIu64 " and %" PRIu64 " tokens from there pass WIRE_TOKENS_MAX = %u; a sequence "
                           "cannot be longer",
                           name, first, count, WIRE_TOKENS_MAX);
    }
    return ICE_OK;
}

static ice_status check_transfer(uint64_t first, uint32_t tokens, uint64_t staging_offset, struct wire_error *error)
{
    const struct count_field count = {"tokens", tokens, LIMIT(WIRE_TOKENS_MAX), "split the transfer"};
    ice_status status = check_counts(&count, 1, error);
    if (status == ICE_OK) {
        status = check_positions("first", first, tokens, error);
    }
    if (status == ICE_OK && staging_offset > WIRE_SHARED_BYTES_MAX) {
        status = wire_refuse(error, ICE_OUT_OF_BOUNDS,
                             "staging_offset is %" PRIu64
                             ", over WIRE_SHARED_BYTES_MAX = %llu; stay inside the staging area",
                             staging_offset, WIRE_SHARED_BYTES_MAX);
    }
    return status;
}

// ---- control requests ----

ice_status wire_check_version(const char *peer, uint32_t version, struct wire_error *error)
{
    if (version != WIRE_PROTOCOL_VERSION) {
        return wire_refuse(error, ICE_VERSION_MISMATCH,
                           "%s speaks protocol version %u, this daemon version %u; install the same release of both",
                           peer, version, WIRE_PROTOCOL_VERSION);
    }
    return ICE_OK;
}

static ice_status check_hello(const Icecache__Wire__Hello *hello, struct wire_error *error)
{
    ice_status status = wire_check_version("the client", hello->protocol_version, error);
    if (status == ICE_OK) {
        status = check_name("client_name", hello->client_name, error);
    }
    return status == ICE_OK ? check_name("name_space", hello->name_space, error) : status;
}

static ice_status check_staging_open(const Icecache__Wire__StagingOpen *staging, struct wire_error *error)
{
    const struct count_field bytes = {"bytes of the staging area", staging->bytes, LIMIT(WIRE_SHARED_BYTES_MAX),
                                      "ask for less"};
    return check_counts(&bytes, 1, error);
}

static ice_status check_gpu_memory(const Icecache__Wire__GpuMemory *gpu, struct wire_error *error)
{
    if (gpu->uuid.len != WIRE_GPU_UUID_BYTES || gpu->probe.len != WIRE_GPU_PROBE_BYTES) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "a GPU's uuid has %zu bytes and the probe %zu; they have %u and %u", gpu->uuid.len,
                           gpu->probe.len, WIRE_GPU_UUID_BYTES, WIRE_GPU_PROBE_BYTES);
    }
    if (gpu->handle.len != WIRE_GPU_HANDLE_BYTES && gpu->handle.len != 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "the handle of GPU memory has %zu bytes; it has %u",
                           gpu->handle.len, WIRE_GPU_HANDLE_BYTES);
    }
    if ((gpu->handle.len == 0) == (gpu->n_piece_bytes == 0)) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "GPU memory has a handle or pieces: give one of them");
    }
    if (gpu->n_piece_bytes > WIRE_DESCRIPTORS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE, "GPU memory of %zu pieces; WIRE_DESCRIPTORS_MAX is %u",
                           gpu->n_piece_bytes, WIRE_DESCRIPTORS_MAX);
    }
    for (size_t i = 0; i < gpu->n_piece_bytes; i++) {
        if (gpu->piece_bytes[i] == 0 || gpu->piece_bytes[i] > WIRE_SHARED_BYTES_MAX) {
            return wire_refuse(error, ICE_OUT_OF_BOUNDS, "piece %zu of GPU memory has %" PRIu64 " bytes", i,
                               gpu->piece_bytes[i]);
        }
    }
    if (gpu->offset > WIRE_SHARED_BYTES_MAX) {
        return wire_refuse(error, ICE_OUT_OF_BOUNDS, "offset %" PRIu64 " into GPU memory is over WIRE_SHARED_BYTES_MAX",
                           gpu->offset);
    }
    return ICE_OK;
}

static ice_status check_place(const Icecache__Wire__LandingOpen *landing, struct wire_error *error)
{
    if (landing->place > LANDING_PUSH) {
        return wire_refuse(error, ICE_NOT_SUPPORTED, "place %u of a landing is unknown to this daemon", landing->place);
    }
    if ((landing->place == LANDING_PUSH) != (landing->gpu != NULL)) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "a landing of place %u %s", landing->place,
                           landing->gpu ? "has no GPU memory" : "must name its GPU memory");
    }
    return landing->gpu ? check_gpu_memory(landing->gpu, error) : ICE_OK;
}

static ice_status check_landing_open(const Icecache__Wire__LandingOpen *landing, struct wire_error *error)
{
    const struct count_field counts[] = {
        {"rows", landing->rows, LIMIT(WIRE_ROWS_MAX), "open several landings"},
        {"layers", landing->layers, LIMIT(WIRE_LAYERS_MAX), "open several landings"},
        {"kv_heads", landing->kv_heads, LIMIT(WIRE_KV_HEADS_MAX), "split the heads over more ranks"},
        {"slots", landing->slots, LIMIT(WIRE_SLOTS_MAX), "sinks + window + budget slots are enough"},
    };
    ice_status status = check_counts(counts, sizeof(counts) / sizeof(counts[0]), error);
    if (status == ICE_OK) {
        status = check_lanes(landing->layers, landing->kv_heads, error);
    }
    if (status == ICE_OK) {
        status = check_head_dim(landing->head_dim, error);
    }
    if (status == ICE_OK) {
        status = check_dtype("dtype", landing->dtype, error);
    }
    struct landing_layout layout;
    const struct landing_shape shape = {.rows = landing->rows,
                                        .layers = landing->layers,
                                        .kv_heads = landing->kv_heads,
                                        .slots = landing->slots,
                                        .head_dim = landing->head_dim,
                                        .dtype = landing->dtype};
    if (status == ICE_OK && !landing_layout_init(&layout, &shape)) {
        status = wire_refuse(error, ICE_TOO_LARGE,
                             "a landing of %u rows x %u layers x %u kv_heads x %u slots needs more than "
                             "WIRE_SHARED_BYTES_MAX = %llu bytes; use fewer slots or rows",
                             landing->rows, landing->layers, landing->kv_heads, landing->slots, WIRE_SHARED_BYTES_MAX);
    }
    return status == ICE_OK ? check_place(landing, error) : status;
}

ice_status wire_check_control_request(const Icecache__Wire__ControlRequest *request, struct wire_error *error)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO:
        return check_hello(request->hello, error);
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN:
        return check_staging_open(request->staging_open, error);
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN:
        return check_landing_open(request->landing_open, error);
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE:
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN:
        return ICE_OK; // an id at most
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY__NOT_SET:
    default:
        return wire_refuse(error, ICE_BAD_MESSAGE,
                           "the control request has no body that this version knows; use a client library of the "
                           "daemon's version");
    }
}

// ---- requests ----

static ice_status check_anchor_layers(const Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    if (open->n_anchor_layers != 0 && open->n_anchor_layers != open->layers) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "anchor_layers has %zu entries for %u layers; give one per layer, or none",
                           open->n_anchor_layers, open->layers);
    }
    for (uint32_t i = 0; i < open->n_anchor_layers; i++) {
        const uint32_t anchor = open->anchor_layers[i];
        if (anchor >= open->layers) {
            return wire_refuse(error, ICE_INVALID_ARGUMENT,
                               "anchor_layers[%u] is %u, but the sequence has %u layers; name one of them", i, anchor,
                               open->layers);
        }
        if (open->anchor_layers[anchor] != anchor || anchor > i) {
            return wire_refuse(
                error, ICE_INVALID_ARGUMENT,
                "anchor_layers[%u] is %u: a layer follows an earlier one that follows none; let that one "
                "name itself",
                i, anchor);
        }
    }
    return ICE_OK;
}

static ice_status check_heads(const Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    if (open->query_heads % open->kv_heads != 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "query_heads %u is not a multiple of kv_heads %u; give both as they are on this rank",
                           open->query_heads, open->kv_heads);
    }
    const uint32_t group = open->query_heads / open->kv_heads;
    if (group > WIRE_GROUP_MAX) {
        return wire_refuse(
            error, ICE_TOO_LARGE,
            "query_heads %u over kv_heads %u is a group of %u, over WIRE_GROUP_MAX = %u; repeat the KV heads "
            "for smaller groups",
            open->query_heads, open->kv_heads, group, WIRE_GROUP_MAX);
    }
    return check_lanes(open->layers, open->kv_heads, error);
}

static ice_status check_identity(const Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    const ice_status status = check_name("name_space", open->name_space, error);
    if (status != ICE_OK) {
        return status;
    }
    const struct count_field digest = {"the length of model_digest", open->model_digest.len,
                                       LIMIT(WIRE_DIGEST_BYTES_MAX), "hash it"};
    if (open->tp_rank >= (open->tp_size ? open->tp_size : 1)) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "tp_rank is %u, but tp_size is %u; ranks count from 0",
                           open->tp_rank, open->tp_size ? open->tp_size : 1);
    }
    return check_counts(&digest, 1, error);
}

static ice_status check_sequence_options(const Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    if (!isfinite(open->softmax_scale) || open->softmax_scale < 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "softmax_scale is %g; give a finite positive number, or 0 for 1/sqrt(head_dim)",
                           (double)open->softmax_scale);
    }
    if (open->block_tokens > WIRE_BLOCK_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "block_tokens is %u, over WIRE_BLOCK_TOKENS_MAX = %u; use smaller blocks, or 0 for %u",
                           open->block_tokens, WIRE_BLOCK_TOKENS_MAX, WIRE_BLOCK_TOKENS_DEFAULT);
    }
    if (open->max_tokens > WIRE_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "max_tokens is %" PRIu64
                           ", over WIRE_TOKENS_MAX = %u; give less, or 0 for the daemon's limit",
                           open->max_tokens, WIRE_TOKENS_MAX);
    }
    return ICE_OK;
}

static ice_status check_sequence_open(const Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    const struct count_field counts[] = {
        {"layers", open->layers, LIMIT(WIRE_LAYERS_MAX), "split the model over more sequences"},
        {"kv_heads", open->kv_heads, LIMIT(WIRE_KV_HEADS_MAX), "split the heads over more ranks"},
        {"query_heads", open->query_heads, LIMIT(WIRE_QUERY_HEADS_MAX), "split the heads over more ranks"},
    };
    ice_status status = check_counts(counts, sizeof(counts) / sizeof(counts[0]), error);
    if (status == ICE_OK) {
        status = check_heads(open, error);
    }
    if (status == ICE_OK) {
        status = check_head_dim(open->head_dim, error);
    }
    if (status == ICE_OK) {
        status = check_dtype("dtype", open->dtype, error);
    }
    if (status == ICE_OK) {
        status = check_identity(open, error);
    }
    if (status == ICE_OK) {
        status = check_sequence_options(open, error);
    }
    return status == ICE_OK ? check_anchor_layers(open, error) : status;
}

// Zero and empty stand for a default; the daemon sees only the default itself. tp_size 0 and 1 must be one identity.
static void fill_defaults(Icecache__Wire__SequenceOpen *open)
{
    static char default_name_space[] = WIRE_NAME_SPACE_DEFAULT; // never written to, never freed
    if (open->name_space[0] == '\0') {
        open->name_space = default_name_space;
    }
    if (open->tp_size == 0) {
        open->tp_size = 1;
    }
    if (open->block_tokens == 0) {
        open->block_tokens = WIRE_BLOCK_TOKENS_DEFAULT;
    }
}

// A SequenceOpen by itself, or inside of a Lookup or an Attach, where it may be missing.
static ice_status take_sequence_open(const char *name, Icecache__Wire__SequenceOpen *open, struct wire_error *error)
{
    if (!open) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "%s is missing; describe the sequence as in a SequenceOpen",
                           name);
    }
    const ice_status status = check_sequence_open(open, error);
    if (status == ICE_OK) {
        fill_defaults(open);
    }
    return status;
}

static ice_status check_lookup(const Icecache__Wire__Lookup *lookup, struct wire_error *error)
{
    const ice_status status = take_sequence_open("identity", lookup->identity, error);
    if (status == ICE_OK && lookup->all_ranks && lookup->identity->tp_size > WIRE_RANKS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "tp_size is %u, over WIRE_RANKS_MAX = %u for a lookup of all ranks; look up each rank",
                           lookup->identity->tp_size, WIRE_RANKS_MAX);
    }
    return status;
}

static ice_status check_attach(const Icecache__Wire__Attach *attach, struct wire_error *error)
{
    const ice_status status = take_sequence_open("open", attach->open, error);
    if (status == ICE_OK && attach->tokens_max > WIRE_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "tokens_max is %" PRIu64 ", over WIRE_TOKENS_MAX = %u; give less, or 0 for no limit",
                           attach->tokens_max, WIRE_TOKENS_MAX);
    }
    return status;
}

ice_status wire_hashes_check(size_t bytes, uint32_t block_tokens, uint32_t *count_out, struct wire_error *error)
{
    const size_t count = bytes / WIRE_HASH_BYTES;
    if (count == 0 || bytes % WIRE_HASH_BYTES != 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "frame 2 has %zu bytes; it holds one hash of %u bytes for each block of the prefix", bytes,
                           WIRE_HASH_BYTES);
    }
    if (count > WIRE_BLOCKS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE, "%zu hashes, over WIRE_BLOCKS_MAX = %u; use larger blocks", count,
                           WIRE_BLOCKS_MAX);
    }
    if ((uint64_t)count * block_tokens > WIRE_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "%zu blocks of %u tokens pass WIRE_TOKENS_MAX = %u; a sequence cannot be longer", count,
                           block_tokens, WIRE_TOKENS_MAX);
    }
    *count_out = (uint32_t)count;
    return ICE_OK;
}

static ice_status check_append(const Icecache__Wire__Append *append, struct wire_error *error)
{
    ice_status status = check_layers(append->layer, append->layers, error);
    if (status == ICE_OK) {
        status = check_transfer(append->first, append->tokens, append->staging_offset, error);
    }
    if (status != ICE_OK || append->reserve_tokens == 0) {
        return status;
    }
    if (append->reserve_tokens < append->tokens) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "reserve_tokens is %" PRIu64 ", less than tokens %u; count this part too, or give 0",
                           append->reserve_tokens, append->tokens);
    }
    if (append->reserve_tokens > WIRE_TOKENS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "reserve_tokens is %" PRIu64 ", over WIRE_TOKENS_MAX = %u; a sequence cannot be longer",
                           append->reserve_tokens, WIRE_TOKENS_MAX);
    }
    return check_positions("first of the reserved range", append->first, append->reserve_tokens, error);
}

static ice_status check_read(const Icecache__Wire__Read *read, struct wire_error *error)
{
    const ice_status status = check_layers(read->layer, read->layers, error);
    return status == ICE_OK ? check_transfer(read->first, read->tokens, read->staging_offset, error) : status;
}

// No sequence twice.
static ice_status check_sequences(const uint64_t *ids, size_t count, struct wire_error *error)
{
    // At most WIRE_SEQUENCES_PER_RETRIEVE_MAX entries: cheaper than any table.
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < i; j++) {
            if (ids[j] == ids[i]) {
                return wire_refuse(error, ICE_INVALID_ARGUMENT,
                                   "sequence_ids[%zu] and [%zu] are the same sequence; name each sequence once", j, i);
            }
        }
    }
    return ICE_OK;
}

// rows[i] below WIRE_ROWS_MAX and no row or sequence twice: two selections would be written over each other, or one
// step's K and V appended twice.
static ice_status check_targets(const Icecache__Wire__Retrieve *retrieve, struct wire_error *error)
{
    uint64_t seen[(WIRE_ROWS_MAX + 63) / 64] = {0};
    for (size_t i = 0; i < retrieve->n_rows; i++) {
        const uint32_t row = retrieve->rows[i];
        if (row >= WIRE_ROWS_MAX) {
            return wire_refuse(
                error, ICE_OUT_OF_BOUNDS,
                "rows[%zu] is %u, but no landing has more than WIRE_ROWS_MAX = %u rows; rows count from 0", i, row,
                WIRE_ROWS_MAX);
        }
        const uint64_t bit = UINT64_C(1) << (row % 64);
        if (seen[row / 64] & bit) {
            return wire_refuse(error, ICE_INVALID_ARGUMENT,
                               "rows[%zu] names row %u again; give each sequence its own row", i, row);
        }
        seen[row / 64] |= bit;
    }
    return check_sequences(retrieve->sequence_ids, retrieve->n_sequence_ids, error);
}

static ice_status check_retrieve_arrays(const Icecache__Wire__Retrieve *retrieve, struct wire_error *error)
{
    const struct count_field counts[] = {
        {"the number of sequence_ids", retrieve->n_sequence_ids, LIMIT(WIRE_SEQUENCES_PER_RETRIEVE_MAX),
         "split the retrieve"},
        {"queries", retrieve->queries, LIMIT(WIRE_QUERIES_MAX), "split the retrieve"},
    };
    ice_status status = check_counts(counts, sizeof(counts) / sizeof(counts[0]), error);
    if (status != ICE_OK) {
        return status;
    }
    if (retrieve->n_rows != retrieve->n_sequence_ids || retrieve->n_first_queries != retrieve->n_sequence_ids) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "sequence_ids, rows and first_queries have %zu, %zu and %zu entries; give one of each per "
                           "sequence",
                           retrieve->n_sequence_ids, retrieve->n_rows, retrieve->n_first_queries);
    }
    for (size_t i = 0; i < retrieve->n_first_queries; i++) {
        status = check_positions("an entry of first_queries", retrieve->first_queries[i], retrieve->queries, error);
        if (status != ICE_OK) {
            return status;
        }
    }
    return check_targets(retrieve, error);
}

static ice_status check_keep(const Icecache__Wire__Retrieve *retrieve, struct wire_error *error)
{
    if (retrieve->keep > retrieve->budget) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "keep is %u, more than the budget of %u tokens; give at most the budget", retrieve->keep,
                           retrieve->budget);
    }
    if (retrieve->keep > 0 && retrieve->page_wise) {
        return wire_refuse(error, ICE_NOT_SUPPORTED,
                           "keep is of tokens and page_wise selects whole pages; give one of them");
    }
    return ICE_OK;
}

// What is asked of a search.
static ice_status check_search(uint32_t budget, uint32_t sinks, uint32_t window, uint32_t deadline_us,
                               struct wire_error *error)
{
    if (budget == 0) {
        return wire_refuse(error, ICE_INVALID_ARGUMENT,
                           "budget is 0 or missing; give the tokens to select per KV head");
    }
    const uint64_t slots = (uint64_t)budget + sinks + window;
    if (slots > WIRE_SLOTS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "budget %u + sinks %u + window %u is %" PRIu64
                           ", over WIRE_SLOTS_MAX = %u; ask for fewer tokens",
                           budget, sinks, window, slots, WIRE_SLOTS_MAX);
    }
    if (deadline_us > WIRE_DEADLINE_US_MAX) {
        return wire_refuse(
            error, ICE_TOO_LARGE,
            "deadline_us is %u, over WIRE_DEADLINE_US_MAX = %u; give less, or 0 for the daemon's default", deadline_us,
            WIRE_DEADLINE_US_MAX);
    }
    return ICE_OK;
}

// Sinks and window that need no slots are searched all the same.
static ice_status check_ends(uint32_t sinks, uint32_t window, struct wire_error *error)
{
    const uint64_t ends = (uint64_t)sinks + window;
    if (ends > WIRE_ENDS_MAX) {
        return wire_refuse(error, ICE_TOO_LARGE,
                           "sinks %u + window %u is %" PRIu64
                           ", over WIRE_ENDS_MAX = %u without slots for them; give fewer",
                           sinks, window, ends, WIRE_ENDS_MAX);
    }
    return ICE_OK;
}

static ice_status check_retrieve(const Icecache__Wire__Retrieve *retrieve, struct wire_error *error)
{
    ice_status status = check_layers(retrieve->layer, 1, error);
    if (status == ICE_OK) {
        status = check_retrieve_arrays(retrieve, error);
    }
    if (status == ICE_OK) {
        status = check_dtype("query_dtype", retrieve->query_dtype, error);
    }
    if (status == ICE_OK) {
        status = check_search(retrieve->budget, retrieve->sinks, retrieve->window, retrieve->deadline_us, error);
    }
    if (status == ICE_OK && retrieve->worker_holds_ends) {
        status = check_ends(retrieve->sinks, retrieve->window, error);
    }
    if (status != ICE_OK) {
        return status;
    }
    if (!(retrieve->coverage >= 0 && retrieve->coverage <= 1)) { // NaN too
        return wire_refuse(error, ICE_INVALID_ARGUMENT, "coverage is %g; give a share from 0 (off) to 1",
                           (double)retrieve->coverage);
    }
    return check_keep(retrieve, error);
}

static ice_status check_hint(const Icecache__Wire__Hint *hint, struct wire_error *error)
{
    const struct count_field counts[] = {
        {"the number of sequence_ids", hint->n_sequence_ids, LIMIT(WIRE_SEQUENCES_PER_RETRIEVE_MAX), "split the hint"},
        {"queries", hint->queries, LIMIT(WIRE_QUERIES_MAX), "split the hint"},
    };
    ice_status status = check_layers(hint->layer, 1, error);
    if (status == ICE_OK) {
        status = check_counts(counts, sizeof(counts) / sizeof(counts[0]), error);
    }
    if (status == ICE_OK) {
        status = check_sequences(hint->sequence_ids, hint->n_sequence_ids, error);
    }
    if (status == ICE_OK) {
        status = check_dtype("query_dtype", hint->query_dtype, error);
    }
    if (status == ICE_OK) {
        status = check_search(hint->budget, hint->sinks, hint->window, hint->deadline_us, error);
    }
    return status == ICE_OK ? check_ends(hint->sinks, hint->window, error) : status;
}

ice_status wire_check_request(Icecache__Wire__Request *request, struct wire_error *error)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        return take_sequence_open("sequence_open", request->sequence_open, error);
    case ICECACHE__WIRE__REQUEST__BODY_APPEND:
        return check_append(request->append, error);
    case ICECACHE__WIRE__REQUEST__BODY_RETRIEVE:
        return check_retrieve(request->retrieve, error);
    case ICECACHE__WIRE__REQUEST__BODY_HINT:
        return check_hint(request->hint, error);
    case ICECACHE__WIRE__REQUEST__BODY_READ:
        return check_read(request->read, error);
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        return check_lookup(request->lookup, error);
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        return check_attach(request->attach, error);
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        return check_name("name_space", request->prefix_remove->name_space, error);
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
        return check_name("name_space", request->prefix_list->name_space, error);
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE:
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_FORK:     // their tokens are held against
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_TRUNCATE: // the sequence's
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO:
    case ICECACHE__WIRE__REQUEST__BODY_STATS:
    case ICECACHE__WIRE__REQUEST__BODY_SEAL:
    case ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST:
    case ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST:
        return ICE_OK; // nothing but numbers
    case ICECACHE__WIRE__REQUEST__BODY__NOT_SET:
    default:
        return wire_refuse(
            error, ICE_BAD_MESSAGE,
            "the request has no body that this version knows; use a client library of the daemon's version");
    }
}
