// Decoding of control requests (from workers, hostile) and of both kinds of replies (from the daemon, trusted, but a
// garbled one must not crash a client).
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/wire.h"

#include <stdalign.h>
#include <stdlib.h>
#include <string.h>

static alignas(max_align_t) uint8_t memory[WIRE_ARENA_BYTES_MAX];

// ---- control requests ----

struct fixture {
    Icecache__Wire__ControlRequest request;
    Icecache__Wire__Hello hello;
    Icecache__Wire__StagingOpen staging;
    Icecache__Wire__LandingOpen landing;
    Icecache__Wire__LandingClose landing_close;
};

static void fixture_init(struct fixture *f)
{
    *f = (struct fixture){
        .request = ICECACHE__WIRE__CONTROL_REQUEST__INIT,
        .hello = ICECACHE__WIRE__HELLO__INIT,
        .staging = ICECACHE__WIRE__STAGING_OPEN__INIT,
        .landing = ICECACHE__WIRE__LANDING_OPEN__INIT,
        .landing_close = ICECACHE__WIRE__LANDING_CLOSE__INIT,
    };
    f->request.request_id = UINT64_C(0xfedcba9876543210);
}

static void use_hello(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO;
    f->request.hello = &f->hello;
    f->hello.protocol_version = WIRE_PROTOCOL_VERSION;
    f->hello.client_name = (char *)(uintptr_t) "engine worker 3";
    f->hello.admin = 1;
}

static void use_staging(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN;
    f->request.staging_open = &f->staging;
    f->staging.bytes = 64u << 20;
}

static void use_landing(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
    f->request.landing_open = &f->landing;
    f->landing.rows = 4;
    f->landing.layers = 32;
    f->landing.kv_heads = 8;
    f->landing.slots = 336;
    f->landing.head_dim = 128;
    f->landing.dtype = DTYPE_FP16;
}

static void use_nothing(struct fixture *f)
{
    (void)f;
}

struct decoded {
    ice_status status;
    uint64_t request_id;
    struct wire_error error;
    Icecache__Wire__ControlRequest *request;
};

static void decode_bytes(const uint8_t *bytes, size_t size, size_t arena_bytes, struct decoded *out)
{
    struct wire_arena arena;
    wire_arena_init(&arena, memory, arena_bytes);
    uint8_t *copy = malloc(size ? size : 1); // exactly so long, for the sanitizer
    assert_non_null(copy);
    if (size) {
        memcpy(copy, bytes, size);
    }
    memset(out, 0, sizeof(*out));
    out->request_id = 1;
    out->status = wire_control_request_decode(copy, size, &arena, &out->request, &out->request_id, &out->error);
    free(copy);
    assert_int_equal(out->status, out->error.status);
    if (out->status == ICE_OK) {
        assert_non_null(out->request);
        assert_string_equal(out->error.text, "");
    } else {
        assert_null(out->request);
        assert_true(strlen(out->error.text) > 20);
        assert_true(strlen(out->error.text) < sizeof(out->error.text) - 1);
    }
}

static size_t pack(const struct fixture *f, uint8_t **bytes)
{
    const size_t size = icecache__wire__control_request__get_packed_size(&f->request);
    *bytes = malloc(size);
    assert_non_null(*bytes);
    assert_int_equal(icecache__wire__control_request__pack(&f->request, *bytes), size);
    return size;
}

static char long_name[WIRE_NAME_BYTES_MAX + 2];

// clang-format off
#define CASES(X) \
    X(use_nothing, no_body, , ICE_BAD_MESSAGE, "no body that this version knows") \
    X(use_hello, version_0, f->hello.protocol_version = 0, ICE_VERSION_MISMATCH, "version 0, this daemon version 1") \
    X(use_hello, version_2, f->hello.protocol_version = 2, ICE_VERSION_MISMATCH, "version 2, this daemon version 1") \
    X(use_hello, name_long, f->hello.client_name = long_name, ICE_TOO_LARGE, "client_name has 129 bytes, over WIRE_NAME") \
    X(use_hello, name_escape, f->hello.client_name = (char *)(uintptr_t)"\x1b[2J", ICE_INVALID_ARGUMENT, "byte 0x1b at 0") \
    X(use_staging, staging_0, f->staging.bytes = 0, ICE_INVALID_ARGUMENT, "bytes of the staging area is 0") \
    X(use_staging, staging_over, f->staging.bytes = UINT64_MAX, ICE_TOO_LARGE, "over WIRE_SHARED_BYTES_MAX") \
    X(use_landing, rows_0, f->landing.rows = 0, ICE_INVALID_ARGUMENT, "rows is 0") \
    X(use_landing, rows_over, f->landing.rows = 4097, ICE_TOO_LARGE, "rows is 4097, over WIRE_ROWS_MAX = 4096") \
    X(use_landing, layers_0, f->landing.layers = 0, ICE_INVALID_ARGUMENT, "layers is 0") \
    X(use_landing, layers_over, f->landing.layers = 513, ICE_TOO_LARGE, "layers is 513, over WIRE_LAYERS_MAX = 512") \
    X(use_landing, heads_0, f->landing.kv_heads = 0, ICE_INVALID_ARGUMENT, "kv_heads is 0") \
    X(use_landing, heads_over, f->landing.kv_heads = 257, ICE_TOO_LARGE, "kv_heads is 257, over WIRE_KV_HEADS_MAX") \
    X(use_landing, lanes_over, f->landing.layers = 512; f->landing.kv_heads = 33, ICE_TOO_LARGE, "over WIRE_LANES_MAX") \
    X(use_landing, slots_0, f->landing.slots = 0, ICE_INVALID_ARGUMENT, "slots is 0") \
    X(use_landing, slots_over, f->landing.slots = UINT32_MAX, ICE_TOO_LARGE, "slots is 4294967295, over WIRE_SLOTS_MAX") \
    X(use_landing, dim_0, f->landing.head_dim = 0, ICE_INVALID_ARGUMENT, "head_dim is 0") \
    X(use_landing, dim_odd, f->landing.head_dim = 100, ICE_NOT_SUPPORTED, "head_dim 100 is not supported") \
    X(use_landing, dim_over, f->landing.head_dim = 512, ICE_NOT_SUPPORTED, "head_dim 512 is not supported") \
    X(use_landing, dtype_0, f->landing.dtype = 0, ICE_NOT_SUPPORTED, "dtype 0 is not supported") \
    X(use_landing, dtype_4, f->landing.dtype = 4, ICE_NOT_SUPPORTED, "fp8") \
    X(use_landing, size_over, f->landing.rows = 4096; f->landing.slots = WIRE_SLOTS_MAX, ICE_TOO_LARGE, \
      "needs more than WIRE_SHARED_BYTES_MAX")
#define CHANGE(use, name, change, status, words) static void change_##name(struct fixture *f) { (void)f; change; }
CASES(CHANGE)
// clang-format on

#define REFUSAL(use, name, change, status, words) {use, change_##name, status, #name, words},
static const struct {
    void (*use)(struct fixture *);
    void (*change)(struct fixture *);
    ice_status status;
    const char *name, *words;
} refusals[] = {CASES(REFUSAL)};

static void every_control_refusal_has_its_status_and_text(void **state)
{
    (void)state;
    memset(long_name, 'c', sizeof(long_name) - 1);
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        refusals[i].use(&f);
        refusals[i].change(&f);
        uint8_t *bytes;
        const size_t size = pack(&f, &bytes);
        struct decoded decoded;
        decode_bytes(bytes, size, sizeof(memory), &decoded);
        free(bytes);
        assert_int_equal(decoded.request_id, f.request.request_id);
        if (decoded.status != refusals[i].status || !strstr(decoded.error.text, refusals[i].words)) {
            fail_msg("%s: %s \"%s\"", refusals[i].name, status_name((int)decoded.status), decoded.error.text);
        }
    }
}

static void valid_control_requests_pass(void **state)
{
    (void)state;
    static void (*const uses[])(struct fixture *) = {use_hello, use_staging, use_landing};
    for (size_t i = 0; i < sizeof(uses) / sizeof(uses[0]); i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        uint8_t *bytes, *seen;
        const size_t size = pack(&f, &bytes);
        for (size_t length = 0; length <= size; length++) { // truncated everywhere, then whole
            struct decoded decoded;
            decode_bytes(bytes, length, sizeof(memory), &decoded);
            if (length >= 11) {
                assert_int_equal(decoded.request_id, f.request.request_id);
            }
            if (length == size) {
                assert_int_equal(decoded.status, ICE_OK);
                const struct fixture again = {.request = *decoded.request};
                assert_int_equal(pack(&again, &seen), size);
                assert_memory_equal(seen, bytes, size);
                free(seen);
            } else {
                assert_int_not_equal(decoded.status, ICE_OK);
            }
        }
        for (size_t bit = 0; bit < size * 8; bit++) {
            struct decoded decoded;
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            decode_bytes(bytes, size, sizeof(memory), &decoded);
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        free(bytes);
    }
    struct fixture f;
    fixture_init(&f);
    f.request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
    f.request.landing_close = &f.landing_close;
    f.landing_close.landing_id = 8;
    uint8_t *bytes;
    const size_t size = pack(&f, &bytes);
    struct decoded decoded;
    decode_bytes(bytes, size, sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->landing_close->landing_id, 8);
    free(bytes);
}

static void control_requests_are_capped(void **state)
{
    (void)state;
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX + 1] = {0x08, 0x2a};
    struct decoded decoded;
    decode_bytes(bytes, sizeof(bytes), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_TOO_LARGE);
    assert_non_null(strstr(decoded.error.text, "4097 bytes, over WIRE_CONTROL_BYTES_MAX = 4096"));
    assert_int_equal(decoded.request_id, 42);
    decode_bytes(bytes, 0, sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_BAD_MESSAGE);
    struct fixture f;
    fixture_init(&f);
    use_hello(&f);
    uint8_t *hello;
    const size_t size = pack(&f, &hello);
    decode_bytes(hello, size, 100, &decoded);
    assert_int_equal(decoded.status, ICE_TOO_LARGE);
    assert_non_null(strstr(decoded.error.text, "100 bytes"));
    free(hello);
}

// Writes one field of bytes that no version knows, `size` bytes in all.
static void fill_with_unknown(uint8_t *bytes, size_t size)
{
    const size_t rest = size - 6;
    const uint8_t field[] = {0xfa,
                             0x01,
                             (uint8_t)(rest | 0x80),
                             (uint8_t)(rest >> 7 | 0x80),
                             (uint8_t)(rest >> 14 | 0x80),
                             (uint8_t)(rest >> 21)};
    memset(bytes, 0, size);
    memcpy(bytes, field, sizeof(field));
}

static void a_control_request_at_the_cap_passes(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    use_staging(&f);
    uint8_t *packed, bytes[WIRE_CONTROL_BYTES_MAX];
    const size_t size = pack(&f, &packed);
    memcpy(bytes, packed, size);
    fill_with_unknown(bytes + size, sizeof(bytes) - size);
    struct decoded decoded;
    decode_bytes(bytes, sizeof(bytes), sizeof(memory), &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    free(packed);
}

// ---- replies ----

static ice_status decode_reply(const Icecache__Wire__Reply *reply, Icecache__Wire__Reply **out)
{
    const size_t size = icecache__wire__reply__get_packed_size(reply);
    uint8_t *bytes = malloc(size ? size : 1);
    assert_non_null(bytes);
    assert_int_equal(icecache__wire__reply__pack(reply, bytes), size);
    // Every truncation and every changed bit is answered, one way or the other, without a leak.
    for (size_t length = 0; length < size; length++) {
        uint8_t *copy = malloc(length ? length : 1);
        assert_non_null(copy);
        memcpy(copy, bytes, length);
        Icecache__Wire__Reply *part = NULL;
        if (wire_reply_decode(copy, length, &part) == ICE_OK) {
            icecache__wire__reply__free_unpacked(part, NULL);
        } else {
            assert_null(part);
        }
        free(copy);
    }
    for (size_t bit = 0; bit < size * 8; bit++) {
        Icecache__Wire__Reply *changed = NULL;
        bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        if (wire_reply_decode(bytes, size, &changed) == ICE_OK) {
            icecache__wire__reply__free_unpacked(changed, NULL);
        }
        bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    const ice_status status = wire_reply_decode(bytes, size, out);
    free(bytes);
    return status;
}

static uint32_t counts[] = {2, 0, 3}, changed[] = {1, 0, 3, 4}, positions[] = {7, 9, 1, 2, 3, 4};
static float masses[] = {0.5f, 0.25f, 1.0f, 0.0f};
static uint64_t indexed[] = {100, 200, 300, 400}, versions[] = {1, 2, 3, 4};

static Icecache__Wire__RetrieveReply valid_retrieve(void)
{
    Icecache__Wire__RetrieveReply retrieve = ICECACHE__WIRE__RETRIEVE_REPLY__INIT;
    retrieve.n_counts = retrieve.n_changed = retrieve.n_masses = retrieve.n_indexed = retrieve.n_versions = 3;
    retrieve.counts = counts;
    retrieve.changed = changed;
    retrieve.masses = masses;
    retrieve.indexed = indexed;
    retrieve.versions = versions;
    retrieve.n_positions = 5;
    retrieve.positions = positions;
    return retrieve;
}

static ice_status decode_retrieve(Icecache__Wire__RetrieveReply *retrieve, Icecache__Wire__Reply **out)
{
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    reply.request_id = 4;
    reply.boot_token = 5;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_RETRIEVE;
    reply.retrieve = retrieve;
    return decode_reply(&reply, out);
}

static void retrieve_replies_agree_with_themselves(void **state)
{
    (void)state;
    Icecache__Wire__Reply *out = NULL;
    Icecache__Wire__RetrieveReply retrieve = valid_retrieve();
    assert_int_equal(decode_retrieve(&retrieve, &out), ICE_OK);
    assert_int_equal(out->request_id, 4);
    assert_int_equal(out->retrieve->n_positions, 5);
    assert_int_equal(out->retrieve->positions[4], 3);
    assert_true(out->retrieve->masses[1] == 0.25f);
    icecache__wire__reply__free_unpacked(out, NULL);
    retrieve.n_positions = 0; // not asked for
    assert_int_equal(decode_retrieve(&retrieve, &out), ICE_OK);
    icecache__wire__reply__free_unpacked(out, NULL);

    out = NULL;
    for (int i = 0; i < 12; i++) {
        retrieve = valid_retrieve();
        size_t *const lengths[] = {&retrieve.n_counts,   &retrieve.n_masses,    &retrieve.n_indexed,
                                   &retrieve.n_versions, &retrieve.n_positions, &retrieve.n_changed};
        *lengths[i / 2] = i % 2 ? *lengths[i / 2] - 1 : i / 2 == 0 ? 0 : *lengths[i / 2] + 1;
        assert_int_equal(decode_retrieve(&retrieve, &out), ICE_BAD_MESSAGE);
        assert_null(out);
    }
    // Counts whose sum wraps 32 bits are not taken for a short list.
    uint32_t wrapping[] = {UINT32_MAX, 5, 1};
    retrieve = valid_retrieve();
    retrieve.counts = wrapping;
    assert_int_equal(decode_retrieve(&retrieve, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void other_replies_pass(void **state)
{
    (void)state;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *out = NULL;
    reply.status = 999; // a later daemon's code
    reply.text = (char *)(uintptr_t) "the pool is full";
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    assert_string_equal(out->text, "the pool is full");
    assert_int_equal(out->status, 999);
    icecache__wire__reply__free_unpacked(out, NULL);

    Icecache__Wire__SequenceOpenReply open = ICECACHE__WIRE__SEQUENCE_OPEN_REPLY__INIT;
    open.sequence_id = 12;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN;
    reply.sequence_open = &open;
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    assert_int_equal(out->sequence_open->sequence_id, 12);
    icecache__wire__reply__free_unpacked(out, NULL);

    Icecache__Wire__SequenceInfoReply info = ICECACHE__WIRE__SEQUENCE_INFO_REPLY__INIT;
    info.n_lengths = info.n_indexed = 4;
    info.lengths = versions;
    info.indexed = indexed;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO;
    reply.sequence_info = &info;
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    icecache__wire__reply__free_unpacked(out, NULL);
    info.n_indexed = 3;
    out = NULL;
    assert_int_equal(decode_reply(&reply, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void stats_list_a_bounded_number_of_sequences(void **state)
{
    (void)state;
    static Icecache__Wire__SequenceStats entries[WIRE_STATS_SEQUENCES_MAX + 1];
    static Icecache__Wire__SequenceStats *list[WIRE_STATS_SEQUENCES_MAX + 1];
    for (size_t i = 0; i <= WIRE_STATS_SEQUENCES_MAX; i++) {
        entries[i] = (Icecache__Wire__SequenceStats)ICECACHE__WIRE__SEQUENCE_STATS__INIT;
        list[i] = &entries[i];
    }
    Icecache__Wire__StatsReply stats = ICECACHE__WIRE__STATS_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *out = NULL;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_STATS;
    reply.stats = &stats;
    stats.sequence = list;
    stats.n_sequence = WIRE_STATS_SEQUENCES_MAX;
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    assert_int_equal(out->stats->n_sequence, WIRE_STATS_SEQUENCES_MAX);
    icecache__wire__reply__free_unpacked(out, NULL);
    out = NULL;
    stats.n_sequence++;
    assert_int_equal(decode_reply(&reply, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void stats_list_a_bounded_number_of_gpus(void **state)
{
    (void)state;
    Icecache__Wire__GpuStats gpu = ICECACHE__WIRE__GPU_STATS__INIT, *list[WIRE_STATS_GPUS_MAX + 1];
    for (size_t i = 0; i <= WIRE_STATS_GPUS_MAX; i++)
        list[i] = &gpu;
    Icecache__Wire__StatsReply stats = ICECACHE__WIRE__STATS_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *out = NULL;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_STATS;
    reply.stats = &stats;
    stats.gpu = list;
    stats.n_gpu = WIRE_STATS_GPUS_MAX;
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    icecache__wire__reply__free_unpacked(out, NULL);
    out = NULL;
    stats.n_gpu++;
    assert_int_equal(decode_reply(&reply, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void replies_are_capped(void **state)
{
    (void)state;
    uint8_t *bytes = calloc(1, WIRE_REPLY_BYTES_MAX + 1);
    assert_non_null(bytes);
    Icecache__Wire__Reply *reply = NULL;
    assert_int_equal(wire_reply_decode(bytes, WIRE_REPLY_BYTES_MAX + 1, &reply), ICE_TOO_LARGE);
    assert_int_equal(wire_reply_decode(bytes, 64, &reply), ICE_BAD_MESSAGE);
    assert_null(reply);
    Icecache__Wire__ControlReply *control = NULL;
    assert_int_equal(wire_control_reply_decode(bytes, WIRE_CONTROL_BYTES_MAX + 1, &control), ICE_TOO_LARGE);
    assert_int_equal(wire_control_reply_decode(bytes, 64, &control), ICE_BAD_MESSAGE);
    assert_null(control);
    // Exactly at the cap they pass.
    fill_with_unknown(bytes, WIRE_REPLY_BYTES_MAX);
    assert_int_equal(wire_reply_decode(bytes, WIRE_REPLY_BYTES_MAX, &reply), ICE_OK);
    icecache__wire__reply__free_unpacked(reply, NULL);
    fill_with_unknown(bytes, WIRE_CONTROL_BYTES_MAX);
    assert_int_equal(wire_control_reply_decode(bytes, WIRE_CONTROL_BYTES_MAX, &control), ICE_OK);
    icecache__wire__control_reply__free_unpacked(control, NULL);
    free(bytes);
}

static ice_status decode_hello_reply(size_t token_bytes, Icecache__Wire__ControlReply **out)
{
    uint8_t token[WIRE_SESSION_TOKEN_BYTES + 1] = {1, 2, 3}, bytes[256];
    Icecache__Wire__HelloReply hello = ICECACHE__WIRE__HELLO_REPLY__INIT;
    hello.session_token = (ProtobufCBinaryData){.len = token_bytes, .data = token};
    hello.endpoint = (char *)(uintptr_t) "ipc:///run/icecache/data.sock";
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    reply.request_id = 3;
    reply.body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO;
    reply.hello = &hello;
    assert_true(icecache__wire__control_reply__get_packed_size(&reply) <= sizeof(bytes));
    const size_t size = icecache__wire__control_reply__pack(&reply, bytes);
    for (size_t length = 0; length < size; length++) {
        Icecache__Wire__ControlReply *part = NULL;
        if (wire_control_reply_decode(bytes, length, &part) == ICE_OK) {
            icecache__wire__control_reply__free_unpacked(part, NULL);
        }
    }
    return wire_control_reply_decode(bytes, size, out);
}

static void control_replies_carry_a_whole_token(void **state)
{
    (void)state;
    Icecache__Wire__ControlReply *out = NULL;
    assert_int_equal(decode_hello_reply(WIRE_SESSION_TOKEN_BYTES - 1, &out), ICE_BAD_MESSAGE);
    assert_int_equal(decode_hello_reply(WIRE_SESSION_TOKEN_BYTES + 1, &out), ICE_BAD_MESSAGE);
    assert_int_equal(decode_hello_reply(0, &out), ICE_BAD_MESSAGE);
    assert_null(out);
    assert_int_equal(decode_hello_reply(WIRE_SESSION_TOKEN_BYTES, &out), ICE_OK);
    assert_int_equal(out->request_id, 3);
    assert_string_equal(out->hello->endpoint, "ipc:///run/icecache/data.sock");
    icecache__wire__control_reply__free_unpacked(out, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_control_refusal_has_its_status_and_text),
        cmocka_unit_test(valid_control_requests_pass),
        cmocka_unit_test(control_requests_are_capped),
        cmocka_unit_test(a_control_request_at_the_cap_passes),
        cmocka_unit_test(retrieve_replies_agree_with_themselves),
        cmocka_unit_test(other_replies_pass),
        cmocka_unit_test(stats_list_a_bounded_number_of_sequences),
        cmocka_unit_test(stats_list_a_bounded_number_of_gpus),
        cmocka_unit_test(replies_are_capped),
        cmocka_unit_test(control_replies_carry_a_whole_token),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
