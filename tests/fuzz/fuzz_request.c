// Requests of the data plane: whatever comes in, it is refused with a text or it keeps every promise of wire.h.
#include "fuzz.h"

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/wire.h"

#include <math.h>
#include <stdalign.h>
#include <string.h>

static alignas(max_align_t) uint8_t memory[WIRE_ARENA_BYTES_MAX];

static void check_open(const Icecache__Wire__SequenceOpen *open)
{
    const size_t name_bytes = strlen(open->name_space);
    FUZZ_CHECK(name_bytes >= 1 && name_bytes <= WIRE_NAME_BYTES_MAX);
    FUZZ_CHECK(open->model_digest.len >= 1 && open->model_digest.len <= WIRE_DIGEST_BYTES_MAX);
    FUZZ_CHECK(open->tp_size >= 1 && open->tp_rank < open->tp_size);
    FUZZ_CHECK(open->layers >= 1 && open->kv_heads >= 1 && open->layers * open->kv_heads <= WIRE_LANES_MAX);
    FUZZ_CHECK(open->query_heads % open->kv_heads == 0 && open->query_heads / open->kv_heads <= WIRE_GROUP_MAX);
    FUZZ_CHECK(open->head_dim >= 1 && open->head_dim <= WIRE_HEAD_DIM_MAX && open->head_dim % WIRE_HEAD_DIM_STEP == 0);
    FUZZ_CHECK(dtype_is_valid(open->dtype));
    FUZZ_CHECK(isfinite(open->softmax_scale) && open->softmax_scale >= 0);
    FUZZ_CHECK(open->block_tokens >= 1 && open->block_tokens <= WIRE_BLOCK_TOKENS_MAX);
    FUZZ_CHECK(open->max_tokens <= WIRE_TOKENS_MAX);
    for (uint32_t i = 0; i < open->n_anchor_layers; i++) {
        FUZZ_CHECK(open->n_anchor_layers == open->layers && open->anchor_layers[i] <= i &&
                   open->anchor_layers[open->anchor_layers[i]] == open->anchor_layers[i]);
    }
}

static void check_retrieve(const Icecache__Wire__Retrieve *retrieve)
{
    const size_t count = retrieve->n_sequence_ids;
    FUZZ_CHECK(count >= 1 && count <= WIRE_SEQUENCES_PER_RETRIEVE_MAX);
    FUZZ_CHECK(retrieve->n_rows == count && retrieve->n_first_queries == count);
    FUZZ_CHECK(retrieve->queries >= 1 && retrieve->queries <= WIRE_QUERIES_MAX);
    for (size_t i = 0; i < count; i++) {
        FUZZ_CHECK(retrieve->rows[i] < WIRE_ROWS_MAX);
        FUZZ_CHECK(retrieve->first_queries[i] <= WIRE_TOKENS_MAX - retrieve->queries);
        for (size_t j = 0; j < i; j++) {
            FUZZ_CHECK(retrieve->rows[i] != retrieve->rows[j] &&
                       retrieve->sequence_ids[i] != retrieve->sequence_ids[j]);
        }
    }
    FUZZ_CHECK(retrieve->layer < WIRE_LAYERS_MAX && dtype_is_valid(retrieve->query_dtype));
    FUZZ_CHECK(retrieve->budget >= 1);
    FUZZ_CHECK((uint64_t)retrieve->budget + retrieve->sinks + retrieve->window <= WIRE_SLOTS_MAX);
    FUZZ_CHECK(retrieve->coverage >= 0 && retrieve->coverage <= 1);
    FUZZ_CHECK(retrieve->deadline_us <= WIRE_DEADLINE_US_MAX);
    const struct wire_shape shape = {
        .layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = WIRE_HEAD_DIM_STEP, .dtype = DTYPE_BF16};
    FUZZ_CHECK(retrieve->follows || wire_retrieve_vectors_bytes(retrieve, &shape) >= count * retrieve->queries * 32);
}

static void check_hint(const Icecache__Wire__Hint *hint)
{
    const size_t count = hint->n_sequence_ids;
    FUZZ_CHECK(count >= 1 && count <= WIRE_SEQUENCES_PER_RETRIEVE_MAX);
    FUZZ_CHECK(hint->queries >= 1 && hint->queries <= WIRE_QUERIES_MAX);
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < i; j++) {
            FUZZ_CHECK(hint->sequence_ids[i] != hint->sequence_ids[j]);
        }
    }
    FUZZ_CHECK(hint->layer < WIRE_LAYERS_MAX && dtype_is_valid(hint->query_dtype) && hint->budget >= 1);
    FUZZ_CHECK((uint64_t)hint->budget + hint->sinks + hint->window <= WIRE_SLOTS_MAX);
    FUZZ_CHECK((uint64_t)hint->sinks + hint->window <= WIRE_ENDS_MAX);
    FUZZ_CHECK(hint->deadline_us <= WIRE_DEADLINE_US_MAX);
    const struct wire_shape shape = {
        .layers = 1, .kv_heads = 1, .query_heads = 1, .head_dim = WIRE_HEAD_DIM_STEP, .dtype = DTYPE_BF16};
    FUZZ_CHECK(wire_hint_vectors_bytes(hint, &shape) >= count * hint->queries * 32);
}

static void check_range(uint32_t layer, uint32_t layers, uint64_t first, uint32_t tokens, uint64_t offset)
{
    FUZZ_CHECK(layers >= 1 && layers <= WIRE_LAYERS_MAX && layer <= WIRE_LAYERS_MAX - layers);
    FUZZ_CHECK(tokens >= 1 && tokens <= WIRE_TOKENS_MAX && first <= WIRE_TOKENS_MAX - tokens);
    FUZZ_CHECK(offset <= WIRE_SHARED_BYTES_MAX);
}

static void check_request(const Icecache__Wire__Request *request)
{
    FUZZ_CHECK(request->protocol_version == WIRE_PROTOCOL_VERSION);
    FUZZ_CHECK(request->session_token.len == WIRE_SESSION_TOKEN_BYTES);
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        check_open(request->sequence_open);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_APPEND: {
        const Icecache__Wire__Append *append = request->append;
        check_range(append->layer, append->layers, append->first, append->tokens, append->staging_offset);
        FUZZ_CHECK(append->reserve_tokens == 0 || (append->reserve_tokens >= append->tokens &&
                                                   append->reserve_tokens <= WIRE_TOKENS_MAX - append->first));
        break;
    }
    case ICECACHE__WIRE__REQUEST__BODY_RETRIEVE:
        check_retrieve(request->retrieve);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_HINT:
        check_hint(request->hint);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_READ: {
        const Icecache__Wire__Read *read = request->read;
        check_range(read->layer, read->layers, read->first, read->tokens, read->staging_offset);
        break;
    }
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        FUZZ_CHECK(request->lookup->identity != NULL);
        check_open(request->lookup->identity);
        FUZZ_CHECK(!request->lookup->all_ranks || request->lookup->identity->tp_size <= WIRE_RANKS_MAX);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        FUZZ_CHECK(request->attach->open != NULL && request->attach->tokens_max <= WIRE_TOKENS_MAX);
        check_open(request->attach->open);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE:
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_FORK:
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_TRUNCATE:
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO:
    case ICECACHE__WIRE__REQUEST__BODY_STATS:
    case ICECACHE__WIRE__REQUEST__BODY_SEAL:
    case ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST:
    case ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST:
        break;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        FUZZ_CHECK(strlen(request->prefix_remove->name_space) <= WIRE_NAME_BYTES_MAX);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
        FUZZ_CHECK(strlen(request->prefix_list->name_space) <= WIRE_NAME_BYTES_MAX);
        break;
    case ICECACHE__WIRE__REQUEST__BODY__NOT_SET:
    default:
        FUZZ_CHECK(false); // a body that wire.h does not promise
    }
}

static ice_status decode(const uint8_t *bytes, size_t size, size_t arena_bytes)
{
    struct wire_arena arena;
    struct wire_error error;
    Icecache__Wire__Request *request = NULL;
    uint64_t id = 0;
    wire_arena_init(&arena, memory, arena_bytes);
    const ice_status status = wire_request_decode(bytes, size, &arena, &request, &id, &error);
    FUZZ_CHECK(error.status == status && arena.used_bytes <= arena_bytes);
    FUZZ_CHECK((status == ICE_OK) == (request != NULL) && (status == ICE_OK) == (error.text[0] == '\0'));
    FUZZ_CHECK(strnlen(error.text, sizeof(error.text)) < sizeof(error.text) - 1);
    if (request) {
        FUZZ_CHECK(request->request_id == id);
        check_request(request);
    }
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    const ice_status status = decode(bytes, size, sizeof(memory));
    // Where memory runs out in the middle, that is the answer, or the same one as with enough of it.
    const ice_status cramped = decode(bytes, size, size ? bytes[size - 1] * 8u : 0);
    FUZZ_CHECK(cramped == status || cramped == ICE_TOO_LARGE || cramped == ICE_VERSION_MISMATCH);
    return 0;
}
