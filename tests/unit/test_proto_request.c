// Decoding of requests: what is valid passes unchanged, and every refusal has its own status and text.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/wire.h"

#include <math.h>
#include <stdalign.h>
#include <stdlib.h>
#include <string.h>

static alignas(max_align_t) uint8_t memory[WIRE_ARENA_BYTES_MAX];

// One request with every body at hand; `request` points to the one in use.
struct fixture {
    Icecache__Wire__Request request;
    Icecache__Wire__SequenceOpen open;
    Icecache__Wire__SequenceClose close;
    Icecache__Wire__Append append;
    Icecache__Wire__Retrieve retrieve;
    Icecache__Wire__Hint hint;
    Icecache__Wire__Read read;
    Icecache__Wire__SequenceInfo info;
    Icecache__Wire__Stats stats;
    uint8_t token[WIRE_SESSION_TOKEN_BYTES + 1], digest[WIRE_DIGEST_BYTES_MAX + 1];
    char name_space[WIRE_NAME_BYTES_MAX + 2];
    uint32_t anchors[4], rows[WIRE_SEQUENCES_PER_RETRIEVE_MAX + 1];
    uint64_t ids[WIRE_SEQUENCES_PER_RETRIEVE_MAX + 1], firsts[WIRE_SEQUENCES_PER_RETRIEVE_MAX + 1];
};

static void fixture_init(struct fixture *f)
{
    *f = (struct fixture){
        .request = ICECACHE__WIRE__REQUEST__INIT,
        .open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT,
        .close = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT,
        .append = ICECACHE__WIRE__APPEND__INIT,
        .retrieve = ICECACHE__WIRE__RETRIEVE__INIT,
        .hint = ICECACHE__WIRE__HINT__INIT,
        .read = ICECACHE__WIRE__READ__INIT,
        .info = ICECACHE__WIRE__SEQUENCE_INFO__INIT,
        .stats = ICECACHE__WIRE__STATS__INIT,
    };
    for (uint32_t i = 0; i <= WIRE_SEQUENCES_PER_RETRIEVE_MAX; i++) {
        f->rows[i] = i * 3;
        f->ids[i] = UINT64_C(0xa000000000000000) + i;
        f->firsts[i] = 1000 + i;
    }
    for (uint32_t i = 0; i < 4; i++) {
        f->anchors[i] = i;
    }
    memset(f->token, 7, sizeof(f->token));
    memset(f->digest, 9, sizeof(f->digest));
    memset(f->name_space, 'n', sizeof(f->name_space) - 1);
    f->request.protocol_version = WIRE_PROTOCOL_VERSION;
    f->request.request_id = UINT64_C(0x123456789abcdef0);
    f->request.session_id = 77;
    f->request.session_token = (ProtobufCBinaryData){.len = WIRE_SESSION_TOKEN_BYTES, .data = f->token};
}

static void use_open(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN;
    f->request.sequence_open = &f->open;
    Icecache__Wire__SequenceOpen *open = &f->open;
    open->name_space = (char *)(uintptr_t) "tenant-a";
    open->model_digest = (ProtobufCBinaryData){.len = 32, .data = f->digest};
    open->tp_rank = 1;
    open->tp_size = 2;
    open->layers = 4;
    open->kv_heads = 8;
    open->query_heads = 32;
    open->head_dim = 128;
    open->dtype = DTYPE_BF16;
    open->softmax_scale = 0.125f;
    open->block_tokens = 32;
    open->n_anchor_layers = 4;
    open->anchor_layers = f->anchors;
    open->max_tokens = 131072;
}

static void use_append(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    f->request.append = &f->append;
    f->append.sequence_id = 5;
    f->append.layer = 3;
    f->append.layers = 2;
    f->append.first = 4096;
    f->append.tokens = 512;
    f->append.staging_offset = 65536;
    f->append.reserve_tokens = 1024;
}

static void use_read(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_READ;
    f->request.read = &f->read;
    f->read.sequence_id = 5;
    f->read.layer = 1;
    f->read.layers = 1;
    f->read.first = 10;
    f->read.tokens = 90;
}

static void use_retrieve(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    f->request.retrieve = &f->retrieve;
    Icecache__Wire__Retrieve *retrieve = &f->retrieve;
    retrieve->landing_id = 1;
    retrieve->layer = 2;
    retrieve->n_sequence_ids = retrieve->n_rows = retrieve->n_first_queries = 3;
    retrieve->sequence_ids = f->ids;
    retrieve->rows = f->rows;
    retrieve->first_queries = f->firsts;
    retrieve->queries = 2;
    retrieve->query_dtype = DTYPE_FP32;
    retrieve->budget = 256;
    retrieve->sinks = 16;
    retrieve->window = 64;
    retrieve->append = 1;
    retrieve->coverage = 0.95f;
    retrieve->deadline_us = 20000;
    retrieve->want_positions = 1;
}

static void use_hint(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_HINT;
    f->request.hint = &f->hint;
    Icecache__Wire__Hint *hint = &f->hint;
    hint->layer = 2;
    hint->n_sequence_ids = 3;
    hint->sequence_ids = f->ids;
    hint->queries = 2;
    hint->query_dtype = DTYPE_FP32;
    hint->budget = 256;
    hint->sinks = 16;
    hint->window = 64;
    hint->deadline_us = 20000;
}

static void use_nothing(struct fixture *f)
{
    (void)f;
}

struct decoded {
    ice_status status;
    uint64_t request_id;
    struct wire_error error;
    Icecache__Wire__Request *request;
    size_t used_bytes;
};

// Exactly `size` bytes on the heap, so that a sanitizer sees any read beyond them.
static void decode_bytes(const uint8_t *bytes, size_t size, size_t arena_bytes, struct decoded *out)
{
    struct wire_arena arena;
    wire_arena_init(&arena, memory, arena_bytes);
    uint8_t *copy = malloc(size ? size : 1);
    assert_non_null(copy);
    if (size) {
        memcpy(copy, bytes, size);
    }
    memset(out, 0, sizeof(*out));
    out->request_id = 1;
    memset(&out->error, 'x', sizeof(out->error));
    out->status = wire_request_decode(copy, size, &arena, &out->request, &out->request_id, &out->error);
    free(copy);
    assert_true(arena.used_bytes <= arena_bytes);
    out->used_bytes = arena.used_bytes;
    assert_int_equal(out->status, out->error.status);
    assert_non_null(memchr(out->error.text, 0, sizeof(out->error.text)));
    if (out->status == ICE_OK) {
        assert_non_null(out->request);
        assert_string_equal(out->error.text, "");
    } else {
        assert_null(out->request); // written on success only
        assert_true(strlen(out->error.text) > 20);
        assert_true(strlen(out->error.text) < sizeof(out->error.text) - 1); // not cut short
    }
}

static size_t pack(const struct fixture *f, uint8_t **bytes)
{
    const size_t size = icecache__wire__request__get_packed_size(&f->request);
    *bytes = malloc(size);
    assert_non_null(*bytes);
    assert_int_equal(icecache__wire__request__pack(&f->request, *bytes), size);
    return size;
}

static void decode(const struct fixture *f, struct decoded *out)
{
    uint8_t *bytes;
    const size_t size = pack(f, &bytes);
    decode_bytes(bytes, size, sizeof(memory), out);
    free(bytes);
    assert_int_equal(out->request_id, f->request.request_id); // also when refused
}

// ---- refusals ----

// (the body that is changed, name, change, status, words that its text must hold)
#define ANY_CASES(X)                                                                                                   \
    X(use_append, version_0, f->request.protocol_version = 0, ICE_VERSION_MISMATCH,                                    \
      "version 0, this daemon version 1")                                                                              \
    X(use_append, version_2, f->request.protocol_version = 2, ICE_VERSION_MISMATCH,                                    \
      "version 2, this daemon version 1")                                                                              \
    X(use_append, token_empty, f->request.session_token.len = 0, ICE_BAD_MESSAGE, "session_token has 0 bytes")         \
    X(use_append, token_short, f->request.session_token.len = 15, ICE_BAD_MESSAGE, "session_token has 15 bytes")       \
    X(use_append, token_long, f->request.session_token.len = 17, ICE_BAD_MESSAGE, "session_token has 17 bytes")        \
    X(use_nothing, no_body, , ICE_BAD_MESSAGE, "no body that this version knows")

#define OPEN_CASES(X)                                                                                                  \
    X(use_open, layers_0, f->open.layers = 0, ICE_INVALID_ARGUMENT, "layers is 0")                                     \
    X(use_open, layers_over, f->open.layers = 513, ICE_TOO_LARGE, "layers is 513, over WIRE_LAYERS_MAX = 512")         \
    X(use_open, kv_heads_0, f->open.kv_heads = 0, ICE_INVALID_ARGUMENT, "kv_heads is 0")                               \
    X(use_open, kv_heads_over, f->open.kv_heads = 257, ICE_TOO_LARGE, "over WIRE_KV_HEADS_MAX = 256")                  \
    X(use_open, query_heads_0, f->open.query_heads = 0, ICE_INVALID_ARGUMENT, "query_heads is 0")                      \
    X(use_open, query_heads_over, f->open.query_heads = 1032, ICE_TOO_LARGE, "over WIRE_QUERY_HEADS_MAX = 1024")       \
    X(use_open, heads_uneven, f->open.query_heads = 36, ICE_INVALID_ARGUMENT, "36 is not a multiple of kv_heads 8")    \
    X(use_open, heads_fewer, f->open.query_heads = 4, ICE_INVALID_ARGUMENT, "4 is not a multiple of kv_heads 8")       \
    X(use_open, group_over, f->open.query_heads = 520, ICE_TOO_LARGE, "a group of 65, over WIRE_GROUP_MAX = 64")       \
    X(use_open, lanes_over, f->open.layers = 512;                                                                      \
      f->open.kv_heads = f->open.query_heads = 33, ICE_TOO_LARGE, "16896, over WIRE_LANES_MAX = 16384")                \
    X(use_open, head_dim_0, f->open.head_dim = 0, ICE_INVALID_ARGUMENT, "head_dim is 0")                               \
    X(use_open, head_dim_odd, f->open.head_dim = 72, ICE_NOT_SUPPORTED, "head_dim 72 is not supported")                \
    X(use_open, head_dim_over, f->open.head_dim = 272, ICE_NOT_SUPPORTED, "multiple of 16 up to 256")                  \
    X(use_open, dtype_0, f->open.dtype = 0, ICE_NOT_SUPPORTED, "dtype 0 is not supported")                             \
    X(use_open, dtype_fp8, f->open.dtype = 4, ICE_NOT_SUPPORTED, "fp8")                                                \
    X(use_open, name_long, f->open.name_space = f->name_space, ICE_TOO_LARGE, "129 bytes, over WIRE_NAME_BYTES_MAX")   \
    X(use_open, name_newline, f->open.name_space = (char *)(uintptr_t) "a\nb", ICE_INVALID_ARGUMENT,                   \
      "name_space holds byte 0x0a at 1")                                                                               \
    X(use_open, name_high, f->open.name_space = (char *)(uintptr_t) "\xff", ICE_INVALID_ARGUMENT, "byte 0xff at 0")    \
    X(use_open, name_delete, f->open.name_space = (char *)(uintptr_t) "\x7f", ICE_INVALID_ARGUMENT, "byte 0x7f at 0")  \
    X(use_open, digest_empty, f->open.model_digest.len = 0, ICE_INVALID_ARGUMENT, "model_digest is 0")                 \
    X(use_open, digest_long, f->open.model_digest.len = 65, ICE_TOO_LARGE, "over WIRE_DIGEST_BYTES_MAX = 64")          \
    X(use_open, rank_over, f->open.tp_rank = 2, ICE_INVALID_ARGUMENT, "tp_rank is 2, but tp_size is 2")                \
    X(use_open, rank_without_size, f->open.tp_size = 0, ICE_INVALID_ARGUMENT, "tp_rank is 1, but tp_size is 1")        \
    X(use_open, scale_nan, f->open.softmax_scale = NAN, ICE_INVALID_ARGUMENT, "softmax_scale is")                      \
    X(use_open, scale_infinite, f->open.softmax_scale = INFINITY, ICE_INVALID_ARGUMENT, "softmax_scale is inf")        \
    X(use_open, scale_negative, f->open.softmax_scale = -1, ICE_INVALID_ARGUMENT, "softmax_scale is -1")               \
    X(use_open, block_over, f->open.block_tokens = 4097, ICE_TOO_LARGE, "over WIRE_BLOCK_TOKENS_MAX = 4096")           \
    X(use_open, max_tokens_over, f->open.max_tokens = WIRE_TOKENS_MAX + 1, ICE_TOO_LARGE, "max_tokens is 16777217")    \
    X(use_open, anchors_few, f->open.n_anchor_layers = 3, ICE_INVALID_ARGUMENT, "3 entries for 4 layers")              \
    X(use_open, anchor_outside, f->anchors[2] = 4, ICE_INVALID_ARGUMENT, "anchor_layers[2] is 4, but")                 \
    X(use_open, anchor_later, f->anchors[1] = 2, ICE_INVALID_ARGUMENT, "a layer follows an earlier one")               \
    X(use_open, anchor_of_anchor, (f->anchors[2] = 1, f->anchors[1] = 0), ICE_INVALID_ARGUMENT, "anchor_layers[2] is 1")

#define APPEND_CASES(X)                                                                                                \
    X(use_append, append_layers_0, f->append.layers = 0, ICE_INVALID_ARGUMENT, "layers is 0")                          \
    X(use_append, append_layers_over, f->append.layers = 510, ICE_UNKNOWN_LAYER, "ends at 513, over WIRE_LAYERS_MAX")  \
    X(use_append, append_layer_wraps, f->append.layer = UINT32_MAX, ICE_UNKNOWN_LAYER, "ends at 4294967297")           \
    X(use_append, append_tokens_0, f->append.tokens = 0, ICE_INVALID_ARGUMENT, "tokens is 0")                          \
    X(use_append, append_tokens_over, f->append.tokens = WIRE_TOKENS_MAX + 1, ICE_TOO_LARGE, "over WIRE_TOKENS_MAX")   \
    X(use_append, append_first_over, f->append.first = WIRE_TOKENS_MAX - 511, ICE_TOO_LARGE, "first is 16776705")      \
    X(use_append, append_first_wraps, f->append.first = UINT64_MAX, ICE_TOO_LARGE, "first is 18446744073709551615")    \
    X(use_append, append_offset_over, f->append.staging_offset = UINT64_MAX, ICE_OUT_OF_BOUNDS, "staging_offset is")   \
    X(use_append, reserve_less, f->append.reserve_tokens = 511, ICE_INVALID_ARGUMENT, "511, less than tokens 512")     \
    X(use_append, reserve_over, f->append.reserve_tokens = UINT64_MAX, ICE_TOO_LARGE, "reserve_tokens is 184467")      \
    X(use_append, reserve_end, f->append.reserve_tokens = WIRE_TOKENS_MAX, ICE_TOO_LARGE, "first of the reserved")

#define READ_CASES(X)                                                                                                  \
    X(use_read, read_layers_0, f->read.layers = 0, ICE_INVALID_ARGUMENT, "layers is 0")                                \
    X(use_read, read_layer_over, f->read.layer = 512, ICE_UNKNOWN_LAYER, "layer 512 + layers 1")                       \
    X(use_read, read_tokens_0, f->read.tokens = 0, ICE_INVALID_ARGUMENT, "tokens is 0")                                \
    X(use_read, read_tokens_over, f->read.tokens = UINT32_MAX, ICE_TOO_LARGE, "tokens is 4294967295")                  \
    X(use_read, read_first_over, f->read.first = WIRE_TOKENS_MAX, ICE_TOO_LARGE, "first is 16777216")                  \
    X(use_read, read_offset_over, f->read.staging_offset = (1ull << 46) + 1, ICE_OUT_OF_BOUNDS, "WIRE_SHARED_BYTES_MAX")

#define RETRIEVE_CASES(X)                                                                                              \
    X(use_retrieve, layer_over, f->retrieve.layer = 512, ICE_UNKNOWN_LAYER, "layer 512")                               \
    X(use_retrieve, no_sequence, f->retrieve.n_sequence_ids = f->retrieve.n_rows = f->retrieve.n_first_queries = 0,    \
      ICE_INVALID_ARGUMENT, "number of sequence_ids is 0")                                                             \
    X(use_retrieve, sequences_over,                                                                                    \
      f->retrieve.n_sequence_ids = f->retrieve.n_rows = f->retrieve.n_first_queries = 257, ICE_TOO_LARGE,              \
      "257, over WIRE_SEQUENCES_PER_RETRIEVE_MAX = 256")                                                               \
    X(use_retrieve, rows_few, f->retrieve.n_rows = 2, ICE_INVALID_ARGUMENT, "have 3, 2 and 3 entries")                 \
    X(use_retrieve, rows_none, f->retrieve.n_rows = 0, ICE_INVALID_ARGUMENT, "have 3, 0 and 3 entries")                \
    X(use_retrieve, rows_many, f->retrieve.n_rows = 4, ICE_INVALID_ARGUMENT, "have 3, 4 and 3 entries")                \
    X(use_retrieve, firsts_few, f->retrieve.n_first_queries = 1, ICE_INVALID_ARGUMENT, "have 3, 3 and 1 entries")      \
    X(use_retrieve, row_twice, f->rows[2] = f->rows[0], ICE_INVALID_ARGUMENT, "rows[2] names row 0 again")             \
    X(use_retrieve, row_over, f->rows[1] = WIRE_ROWS_MAX, ICE_OUT_OF_BOUNDS, "rows[1] is 4096")                        \
    X(use_retrieve, sequence_twice, f->ids[2] = f->ids[1], ICE_INVALID_ARGUMENT,                                       \
      "sequence_ids[1] and [2] are the same")                                                                          \
    X(use_retrieve, first_over, f->firsts[1] = WIRE_TOKENS_MAX - 1, ICE_TOO_LARGE, "first_queries is 16777215")        \
    X(use_retrieve, first_wraps, f->firsts[1] = UINT64_MAX, ICE_TOO_LARGE, "first_queries is 1844674407370955161")     \
    X(use_retrieve, queries_0, f->retrieve.queries = 0, ICE_INVALID_ARGUMENT, "queries is 0")                          \
    X(use_retrieve, queries_over, f->retrieve.queries = 257, ICE_TOO_LARGE, "queries is 257, over WIRE_QUERIES_MAX")   \
    X(use_retrieve, query_dtype_0, f->retrieve.query_dtype = 0, ICE_NOT_SUPPORTED, "query_dtype 0")                    \
    X(use_retrieve, query_dtype_4, f->retrieve.query_dtype = 4, ICE_NOT_SUPPORTED, "query_dtype 4")                    \
    X(use_retrieve, budget_0, f->retrieve.budget = 0, ICE_INVALID_ARGUMENT, "budget is 0")                             \
    X(use_retrieve, budget_over, f->retrieve.budget = WIRE_SLOTS_MAX - 79, ICE_TOO_LARGE,                              \
      "16777217, over WIRE_SLOTS_MAX")                                                                                 \
    X(use_retrieve, ends_wrap, f->retrieve.sinks = f->retrieve.window = UINT32_MAX, ICE_TOO_LARGE, "is 8589934846")    \
    X(use_retrieve, held_ends_over, (f->retrieve.worker_holds_ends = 1, f->retrieve.window = WIRE_ENDS_MAX - 15),      \
      ICE_TOO_LARGE, "16385, over WIRE_ENDS_MAX")                                                                      \
    X(use_retrieve, coverage_over, f->retrieve.coverage = 1.5f, ICE_INVALID_ARGUMENT, "coverage is 1.5")               \
    X(use_retrieve, coverage_negative, f->retrieve.coverage = -0.5f, ICE_INVALID_ARGUMENT, "coverage is -0.5")         \
    X(use_retrieve, coverage_nan, f->retrieve.coverage = NAN, ICE_INVALID_ARGUMENT, "coverage is")                     \
    X(use_retrieve, keep_over, f->retrieve.keep = f->retrieve.budget + 1, ICE_INVALID_ARGUMENT, "more than the")       \
    X(use_retrieve, keep_pages, (f->retrieve.keep = 1, f->retrieve.page_wise = 1), ICE_NOT_SUPPORTED, "whole pages")   \
    X(use_retrieve, deadline_over, f->retrieve.deadline_us = 600000001, ICE_TOO_LARGE, "over WIRE_DEADLINE_US_MAX")

#define HINT_CASES(X)                                                                                                  \
    X(use_hint, hint_layer_over, f->hint.layer = 512, ICE_UNKNOWN_LAYER, "layer 512")                                  \
    X(use_hint, hint_no_sequence, f->hint.n_sequence_ids = 0, ICE_INVALID_ARGUMENT, "number of sequence_ids is 0")     \
    X(use_hint, hint_sequences_over, f->hint.n_sequence_ids = 257, ICE_TOO_LARGE,                                      \
      "257, over WIRE_SEQUENCES_PER_RETRIEVE_MAX = 256")                                                               \
    X(use_hint, hint_sequence_twice, f->ids[2] = f->ids[1], ICE_INVALID_ARGUMENT,                                      \
      "sequence_ids[1] and [2] are the same")                                                                          \
    X(use_hint, hint_queries_0, f->hint.queries = 0, ICE_INVALID_ARGUMENT, "queries is 0")                             \
    X(use_hint, hint_queries_over, f->hint.queries = 257, ICE_TOO_LARGE, "queries is 257, over WIRE_QUERIES_MAX")      \
    X(use_hint, hint_dtype_4, f->hint.query_dtype = 4, ICE_NOT_SUPPORTED, "query_dtype 4")                             \
    X(use_hint, hint_budget_0, f->hint.budget = 0, ICE_INVALID_ARGUMENT, "budget is 0")                                \
    X(use_hint, hint_ends_wrap, f->hint.sinks = f->hint.window = UINT32_MAX, ICE_TOO_LARGE, "is 8589934846")           \
    X(use_hint, hint_ends_over, f->hint.window = WIRE_ENDS_MAX - 15, ICE_TOO_LARGE, "16385, over WIRE_ENDS_MAX")       \
    X(use_hint, hint_deadline_over, f->hint.deadline_us = 600000001, ICE_TOO_LARGE, "over WIRE_DEADLINE_US_MAX")

// clang-format off
#define ALL_CASES(X) ANY_CASES(X) OPEN_CASES(X) APPEND_CASES(X) READ_CASES(X) RETRIEVE_CASES(X) HINT_CASES(X)
#define CHANGE(use, name, change, status, words) \
    static void change_##name(struct fixture *f) { (void)f; change; }
ALL_CASES(CHANGE)
// clang-format on

struct refusal {
    void (*use)(struct fixture *);
    void (*change)(struct fixture *);
    ice_status status;
    const char *name, *words;
};
#define REFUSAL(use, name, change, status, words) {use, change_##name, status, #name, words},
static const struct refusal refusals[] = {ALL_CASES(REFUSAL)};

static void every_refusal_has_its_status_and_text(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        refusals[i].use(&f);
        refusals[i].change(&f);
        struct decoded decoded;
        decode(&f, &decoded);
        if (decoded.status != refusals[i].status || !strstr(decoded.error.text, refusals[i].words)) {
            fail_msg("%s: %s \"%s\"", refusals[i].name, status_name((int)decoded.status), decoded.error.text);
        }
    }
}

// ---- what passes ----

static void valid_bodies_pass_unchanged(void **state)
{
    (void)state;
    static void (*const uses[])(struct fixture *) = {use_open, use_append, use_read, use_retrieve, use_hint};
    for (size_t i = 0; i < sizeof(uses) / sizeof(uses[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        struct decoded decoded;
        decode(&f, &decoded);
        assert_int_equal(decoded.status, ICE_OK);
        struct fixture again = f;
        again.request = *decoded.request;
        uint8_t *sent, *seen;
        const size_t sent_size = pack(&f, &sent), seen_size = pack(&again, &seen);
        assert_int_equal(sent_size, seen_size);
        assert_memory_equal(sent, seen, sent_size);
        free(sent);
        free(seen);
    }
}

static void bodies_of_ids_pass(void **state)
{
    (void)state;
    struct fixture f;
    struct decoded decoded;
    fixture_init(&f);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
    f.request.sequence_close = &f.close;
    f.close.sequence_id = 99;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->sequence_close->sequence_id, 99);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    f.request.sequence_info = &f.info;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    f.request.stats = &f.stats;
    f.stats.sequences_from = 256;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->stats->sequences_from, 256);
}

static void open_fills_in_defaults(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_open(&f);
    f.open.name_space = (char *)(uintptr_t) "";
    f.open.tp_rank = f.open.tp_size = 0;
    f.open.block_tokens = 0;
    f.open.softmax_scale = 0;
    f.open.max_tokens = 0;
    f.open.n_anchor_layers = 0;
    struct decoded decoded;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    const Icecache__Wire__SequenceOpen *open = decoded.request->sequence_open;
    assert_string_equal(open->name_space, "default");
    assert_int_equal(open->tp_size, 1);
    assert_int_equal(open->block_tokens, 16);
    assert_true(open->softmax_scale == 0);
    assert_int_equal(open->max_tokens, 0);
}

static void values_at_their_limits_pass(void **state)
{
    (void)state;
    struct fixture f;
    struct decoded decoded;
    fixture_init(&f);
    use_open(&f);
    f.name_space[WIRE_NAME_BYTES_MAX] = '\0';
    f.open.name_space = f.name_space;
    f.open.model_digest.len = WIRE_DIGEST_BYTES_MAX;
    f.open.layers = WIRE_LAYERS_MAX;
    f.open.kv_heads = WIRE_LANES_MAX / WIRE_LAYERS_MAX;
    f.open.query_heads = WIRE_QUERY_HEADS_MAX;
    f.open.head_dim = WIRE_HEAD_DIM_MAX;
    f.open.block_tokens = WIRE_BLOCK_TOKENS_MAX;
    f.open.max_tokens = WIRE_TOKENS_MAX;
    f.open.n_anchor_layers = 0;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    f.open.kv_heads = 2;
    f.open.query_heads = 2 * WIRE_GROUP_MAX;
    f.open.name_space = (char *)(uintptr_t) " ~"; // first and last printable character
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);

    fixture_init(&f);
    use_append(&f);
    f.append.staging_offset = WIRE_SHARED_BYTES_MAX;
    f.append.layer = WIRE_LAYERS_MAX - 1;
    f.append.layers = 1;
    f.append.first = WIRE_TOKENS_MAX - 1;
    f.append.tokens = 1;
    f.append.reserve_tokens = 1;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);

    fixture_init(&f);
    use_retrieve(&f);
    f.retrieve.n_sequence_ids = f.retrieve.n_rows = f.retrieve.n_first_queries = WIRE_SEQUENCES_PER_RETRIEVE_MAX;
    f.rows[9] = WIRE_ROWS_MAX - 1;
    f.retrieve.queries = WIRE_QUERIES_MAX;
    f.firsts[3] = WIRE_TOKENS_MAX - WIRE_QUERIES_MAX;
    f.retrieve.budget = WIRE_SLOTS_MAX - 80;
    f.retrieve.coverage = 1;
    f.retrieve.deadline_us = WIRE_DEADLINE_US_MAX;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    f.retrieve.coverage = 0; // off
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
}

// ---- hostile bytes ----

static void sizes_are_capped(void **state)
{
    (void)state;
    struct fixture f;
    struct decoded decoded;
    fixture_init(&f);
    use_append(&f);
    uint8_t *bytes;
    const size_t size = pack(&f, &bytes);
    uint8_t *large = calloc(1, WIRE_HEADER_BYTES_MAX + 1);
    assert_non_null(large);
    memcpy(large, bytes, size);
    decode_bytes(large, WIRE_HEADER_BYTES_MAX + 1, sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_TOO_LARGE);
    assert_non_null(strstr(decoded.error.text, "65537 bytes, over WIRE_HEADER_BYTES_MAX = 65536"));
    assert_int_equal(decoded.request_id, f.request.request_id);
    // Exactly at the cap, filled up with bytes of a field that this version does not know: it passes.
    const size_t rest = WIRE_HEADER_BYTES_MAX - size - 5;
    const uint8_t field[] = {0xfa, 0x01, (uint8_t)(rest | 0x80), (uint8_t)(rest >> 7 | 0x80), (uint8_t)(rest >> 14)};
    memcpy(large + size, field, sizeof(field));
    decode_bytes(large, WIRE_HEADER_BYTES_MAX, sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    decode_bytes(large, 0, sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_BAD_MESSAGE);
    assert_non_null(strstr(decoded.error.text, "empty"));
    assert_int_equal(decoded.request_id, 0);
    free(large);
    free(bytes);
}

static void every_truncation_is_answered(void **state)
{
    (void)state;
    static void (*const uses[])(struct fixture *) = {use_open, use_append, use_read, use_retrieve, use_hint};
    for (size_t i = 0; i < sizeof(uses) / sizeof(uses[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        uint8_t *bytes;
        const size_t size = pack(&f, &bytes);
        for (size_t length = 0; length < size; length++) {
            struct decoded decoded;
            decode_bytes(bytes, length, sizeof(memory), &decoded);
            assert_int_not_equal(decoded.status, ICE_OK); // the body comes last
            if (length >= 12) {                           // version and id are whole
                assert_int_equal(decoded.request_id, f.request.request_id);
            }
        }
        free(bytes);
    }
}

static void every_changed_bit_is_answered(void **state)
{
    (void)state;
    static void (*const uses[])(struct fixture *) = {use_open, use_append, use_read, use_retrieve, use_hint};
    for (size_t i = 0; i < sizeof(uses) / sizeof(uses[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        uint8_t *bytes;
        const size_t size = pack(&f, &bytes);
        for (size_t bit = 0; bit < size * 8; bit++) {
            struct decoded decoded;
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            decode_bytes(bytes, size, sizeof(memory), &decoded); // its own assertions say what must hold
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        free(bytes);
    }
}

static void an_arena_too_small_is_a_clean_refusal(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_retrieve(&f);
    uint8_t *bytes;
    const size_t size = pack(&f, &bytes);
    bool passed = false;
    for (size_t arena_bytes = 0; arena_bytes < 4096; arena_bytes++) {
        struct decoded decoded;
        decode_bytes(bytes, size, arena_bytes, &decoded);
        assert_int_equal(decoded.request_id, f.request.request_id);
        if (decoded.status == ICE_OK) {
            if (!passed) { // refused while a byte was missing, and not longer
                assert_int_equal(decoded.used_bytes, arena_bytes);
            }
            passed = true;
            continue;
        }
        assert_false(passed); // more memory never hurts
        assert_int_equal(decoded.status, ICE_TOO_LARGE);
        assert_non_null(strstr(decoded.error.text, "when decoded"));
    }
    assert_true(passed);
    free(bytes);
}

static void an_arena_of_any_alignment_works_and_is_reused(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_retrieve(&f);
    uint8_t *bytes;
    const size_t size = pack(&f, &bytes);
    for (size_t shift = 0; shift < 16; shift++) {
        struct wire_arena arena;
        wire_arena_init(&arena, memory + shift, 2048);
        for (int round = 0; round < 3; round++) {
            Icecache__Wire__Request *request = NULL;
            uint64_t id;
            struct wire_error error;
            assert_int_equal(wire_request_decode(bytes, size, &arena, &request, &id, &error), ICE_OK);
            assert_int_equal((uintptr_t)request % alignof(max_align_t), 0);
            assert_int_equal((uintptr_t)request->retrieve->sequence_ids % alignof(max_align_t), 0);
            assert_int_equal(request->retrieve->sequence_ids[2], f.ids[2]);
            wire_arena_reset(&arena);
            assert_int_equal(arena.used_bytes, 0);
        }
    }
    free(bytes);
}

// 64 KiB of the cheapest fields, each kind of which costs the decoder far more memory than bytes.
static void amplification_is_bounded(void **state)
{
    (void)state;
    static const uint8_t fields[][2] = {
        {0x5a, 0x00}, // an empty sub-message of the body, again and again
        {0x78, 0x01}, // an unknown integer
        {0x7a, 0x00}, // unknown bytes
    };
    uint8_t *bytes = malloc(WIRE_HEADER_BYTES_MAX);
    assert_non_null(bytes);
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        for (size_t at = 0; at < WIRE_HEADER_BYTES_MAX; at += 2) {
            memcpy(bytes + at, fields[i], 2);
        }
        struct decoded decoded;
        decode_bytes(bytes, WIRE_HEADER_BYTES_MAX, sizeof(memory), &decoded);
        assert_int_not_equal(decoded.status, ICE_OK);
    }
    free(bytes);
}

static void a_later_version_that_does_not_decode_is_named(void **state)
{
    (void)state;
    // version 9, id 300, then a field of a kind that proto3 does not have
    static const uint8_t bytes[] = {0x08, 0x09, 0x10, 0xac, 0x02, 0x1f};
    struct decoded decoded;
    decode_bytes(bytes, sizeof(bytes), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_VERSION_MISMATCH);
    assert_non_null(strstr(decoded.error.text, "version 9, this daemon version 1"));
    assert_int_equal(decoded.request_id, 300);
}

static void the_id_is_found_behind_other_fields(void **state)
{
    (void)state;
    // 64 bits, 5 bytes, 32 bits, the id twice (the last counts), an empty field, then a length beyond the end
    static const uint8_t bytes[] = {0x19, 1, 2, 3, 4, 5,    6,    7,    8,    0x22, 5,    0x10, 0x10, 0x10, 0x10, 0x10,
                                    0x2d, 1, 2, 3, 4, 0x10, 0x07, 0x10, 0x2b, 0x3a, 0x00, 0x42, 0x7f, 0x10, 0x63};
    struct decoded decoded;
    decode_bytes(bytes, sizeof(bytes), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_BAD_MESSAGE);
    assert_int_equal(decoded.request_id, 0x2b);
    // A number of more than 10 bytes is no number: the walk stops in front of it.
    static const uint8_t endless[] = {0x10, 0x05, 0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                                      0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x10, 0x06};
    decode_bytes(endless, sizeof(endless), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_BAD_MESSAGE);
    assert_int_equal(decoded.request_id, 5);
}

static void garbage_is_named(void **state)
{
    (void)state;
    uint8_t bytes[64];
    memset(bytes, 0xff, sizeof(bytes));
    struct decoded decoded;
    decode_bytes(bytes, sizeof(bytes), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_BAD_MESSAGE);
    assert_non_null(strstr(decoded.error.text, "truncated or garbled"));
    assert_int_equal(decoded.request_id, 0);
}

// ---- frame 2 ----

static void bytes_of_the_vectors(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_retrieve(&f);
    struct wire_shape shape = {.layers = 4, .kv_heads = 8, .query_heads = 32, .head_dim = 128, .dtype = DTYPE_BF16};
    assert_int_equal(wire_retrieve_query_bytes(&f.retrieve, &shape), 3 * 2 * 32 * 128 * 4);
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 3 * 2 * (32 * 128 * 4 + 2 * 8 * 128 * 2));
    f.retrieve.append = 0;
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 3 * 2 * 32 * 128 * 4);
    // The largest that any decoded request can ask for does not wrap.
    f.retrieve.append = 1;
    f.retrieve.n_sequence_ids = WIRE_SEQUENCES_PER_RETRIEVE_MAX;
    f.retrieve.queries = WIRE_QUERIES_MAX;
    shape = (struct wire_shape){.layers = 1,
                                .kv_heads = WIRE_KV_HEADS_MAX,
                                .query_heads = WIRE_QUERY_HEADS_MAX,
                                .head_dim = WIRE_HEAD_DIM_MAX,
                                .dtype = DTYPE_FP32};
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape),
                     (UINT64_C(1) << 36) + (UINT64_C(1) << (8 + 8 + 1 + 8 + 8 + 2)));
}

static void vectors_out_of_range_need_0_bytes(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_retrieve(&f);
    const struct wire_shape good = {
        .layers = 4, .kv_heads = 8, .query_heads = 32, .head_dim = 128, .dtype = DTYPE_BF16};
    struct wire_shape shape = good;
    shape.query_heads = UINT32_MAX;
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 0);
    shape = good;
    shape.kv_heads = WIRE_KV_HEADS_MAX + 1;
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 0);
    shape = good;
    shape.head_dim = 0;
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 0);
    shape = good;
    shape.dtype = 0;
    assert_int_equal(wire_retrieve_vectors_bytes(&f.retrieve, &shape), 0);
    f.retrieve.query_dtype = 9;
    assert_int_equal(wire_retrieve_query_bytes(&f.retrieve, &good), 0);
}

static void error_texts_are_cut_not_overrun(void **state)
{
    (void)state;
    struct wire_error error;
    char text[600];
    memset(text, 'y', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    wire_error_set(&error, ICE_BUSY, "row %d: %s", 3, text);
    assert_int_equal(error.status, ICE_BUSY);
    assert_int_equal(strlen(error.text), sizeof(error.text) - 1);
    assert_memory_equal(error.text, "row 3: yyy", 10);
}

// A recursive message type would let 64 KiB of nesting overrun the decoder's stack.
static void visit(const ProtobufCMessageDescriptor *message, const ProtobufCMessageDescriptor **path, size_t depth)
{
    assert_true(depth < 8);
    for (size_t i = 0; i < depth; i++) {
        assert_ptr_not_equal(path[i], message);
    }
    path[depth] = message;
    for (unsigned i = 0; i < message->n_fields; i++) {
        if (message->fields[i].type == PROTOBUF_C_TYPE_MESSAGE) {
            visit(message->fields[i].descriptor, path, depth + 1);
        }
    }
}

static void no_message_is_recursive(void **state)
{
    (void)state;
    const ProtobufCMessageDescriptor *path[8];
    visit(&icecache__wire__request__descriptor, path, 0);
    visit(&icecache__wire__reply__descriptor, path, 0);
    visit(&icecache__wire__control_request__descriptor, path, 0);
    visit(&icecache__wire__control_reply__descriptor, path, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_refusal_has_its_status_and_text),
        cmocka_unit_test(valid_bodies_pass_unchanged),
        cmocka_unit_test(bodies_of_ids_pass),
        cmocka_unit_test(open_fills_in_defaults),
        cmocka_unit_test(values_at_their_limits_pass),
        cmocka_unit_test(sizes_are_capped),
        cmocka_unit_test(every_truncation_is_answered),
        cmocka_unit_test(every_changed_bit_is_answered),
        cmocka_unit_test(an_arena_too_small_is_a_clean_refusal),
        cmocka_unit_test(an_arena_of_any_alignment_works_and_is_reused),
        cmocka_unit_test(amplification_is_bounded),
        cmocka_unit_test(a_later_version_that_does_not_decode_is_named),
        cmocka_unit_test(the_id_is_found_behind_other_fields),
        cmocka_unit_test(garbage_is_named),
        cmocka_unit_test(bytes_of_the_vectors),
        cmocka_unit_test(vectors_out_of_range_need_0_bytes),
        cmocka_unit_test(error_texts_are_cut_not_overrun),
        cmocka_unit_test(no_message_is_recursive),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
