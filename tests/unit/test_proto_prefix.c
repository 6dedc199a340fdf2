// Messages of sealed prefixes: what passes, every refusal by its status and text, how many hashes are in frame 2, and
// replies within their limits.
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
static uint8_t token[WIRE_SESSION_TOKEN_BYTES], digest[WIRE_DIGEST_BYTES_MAX];

// ---- requests ----

struct fixture {
    Icecache__Wire__Request request;
    Icecache__Wire__SequenceOpen open;
    Icecache__Wire__Lookup lookup;
    Icecache__Wire__Attach attach;
    Icecache__Wire__PrefixRemove removal;
    Icecache__Wire__PrefixList list;
    uint32_t anchors[4];
};

static void fixture_init(struct fixture *f)
{
    *f = (struct fixture){
        .request = ICECACHE__WIRE__REQUEST__INIT,
        .open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT,
        .lookup = ICECACHE__WIRE__LOOKUP__INIT,
        .attach = ICECACHE__WIRE__ATTACH__INIT,
        .removal = ICECACHE__WIRE__PREFIX_REMOVE__INIT,
        .list = ICECACHE__WIRE__PREFIX_LIST__INIT,
        .anchors = {0, 1, 2, 3},
    };
    f->request.protocol_version = WIRE_PROTOCOL_VERSION;
    f->request.request_id = UINT64_C(0x123456789abcdef0);
    f->request.session_token = (ProtobufCBinaryData){.len = sizeof(token), .data = token};
    f->open.name_space = (char *)(uintptr_t) "tenant-a";
    f->open.model_digest = (ProtobufCBinaryData){.len = 32, .data = digest};
    f->open.tp_rank = 1;
    f->open.tp_size = 2;
    f->open.layers = 4;
    f->open.kv_heads = 8;
    f->open.query_heads = 32;
    f->open.head_dim = 128;
    f->open.dtype = DTYPE_BF16;
    f->open.block_tokens = 32;
    f->open.n_anchor_layers = 4;
    f->open.anchor_layers = f->anchors;
}

static void use_lookup(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_LOOKUP;
    f->request.lookup = &f->lookup;
    f->lookup.identity = &f->open;
}

static void use_attach(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_ATTACH;
    f->request.attach = &f->attach;
    f->attach.open = &f->open;
    f->attach.tokens_max = WIRE_TOKENS_MAX;
}

static void use_remove(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    f->request.prefix_remove = &f->removal;
}

static void use_list(struct fixture *f)
{
    f->request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST;
    f->request.prefix_list = &f->list;
}

static void (*const uses[])(struct fixture *) = {use_lookup, use_attach};
enum { USES = sizeof(uses) / sizeof(uses[0]) };

struct decoded {
    ice_status status;
    uint64_t request_id;
    struct wire_error error;
    Icecache__Wire__Request *request;
};

// Exactly `size` bytes on the heap, so that a sanitizer sees any read beyond them.
static void decode_bytes(const uint8_t *bytes, size_t size, struct decoded *out)
{
    struct wire_arena arena;
    wire_arena_init(&arena, memory, sizeof(memory));
    uint8_t *copy = malloc(size ? size : 1);
    assert_non_null(copy);
    memcpy(copy, bytes, size);
    memset(out, 0, sizeof(*out));
    out->status = wire_request_decode(copy, size, &arena, &out->request, &out->request_id, &out->error);
    free(copy);
    assert_int_equal(out->status, out->error.status);
    assert_true((out->status == ICE_OK) == (out->request != NULL)); // written on success only
    assert_true((out->status == ICE_OK) == (out->error.text[0] == '\0'));
}

static size_t pack(const Icecache__Wire__Request *request, uint8_t **bytes)
{
    const size_t size = icecache__wire__request__get_packed_size(request);
    *bytes = malloc(size);
    assert_non_null(*bytes);
    assert_int_equal(icecache__wire__request__pack(request, *bytes), size);
    return size;
}

static void decode(const struct fixture *f, struct decoded *out)
{
    uint8_t *bytes;
    const size_t size = pack(&f->request, &bytes);
    decode_bytes(bytes, size, out);
    free(bytes);
    assert_int_equal(out->request_id, f->request.request_id); // also when refused
}

// (the body that is changed, name, change, status, words that its text must hold)
// clang-format off
#define CASES(X) \
    X(use_lookup, lookup_of_nothing, f->lookup.identity = NULL, ICE_INVALID_ARGUMENT, "identity is missing") \
    X(use_lookup, lookup_layers_0, f->open.layers = 0, ICE_INVALID_ARGUMENT, "layers is 0") \
    X(use_lookup, lookup_digest_empty, f->open.model_digest.len = 0, ICE_INVALID_ARGUMENT, "model_digest is 0") \
    X(use_lookup, lookup_rank_over, f->open.tp_rank = 2, ICE_INVALID_ARGUMENT, "tp_rank is 2, but tp_size is 2") \
    X(use_lookup, lookup_block_over, f->open.block_tokens = 4097, ICE_TOO_LARGE, "WIRE_BLOCK_TOKENS_MAX = 4096") \
    X(use_lookup, lookup_ranks_over, (f->open.tp_size = 1025, f->lookup.all_ranks = true), ICE_TOO_LARGE, \
      "tp_size is 1025, over WIRE_RANKS_MAX = 1024") \
    X(use_remove, remove_name_high, f->removal.name_space = (char *)(uintptr_t)"\n", ICE_INVALID_ARGUMENT, "byte 0x0a") \
    X(use_list, list_name_high, f->list.name_space = (char *)(uintptr_t)"\x7f", ICE_INVALID_ARGUMENT, "byte 0x7f") \
    X(use_attach, attach_to_nothing, f->attach.open = NULL, ICE_INVALID_ARGUMENT, "open is missing") \
    X(use_attach, attach_dtype_fp8, f->open.dtype = 4, ICE_NOT_SUPPORTED, "fp8") \
    X(use_attach, attach_name_high, f->open.name_space = (char *)(uintptr_t)"\xff", ICE_INVALID_ARGUMENT, "byte 0xff") \
    X(use_attach, attach_anchor, f->anchors[1] = 2, ICE_INVALID_ARGUMENT, "a layer follows an earlier") \
    X(use_attach, attach_tokens_over, f->attach.tokens_max = WIRE_TOKENS_MAX + 1, ICE_TOO_LARGE, \
      "tokens_max is 16777217, over WIRE_TOKENS_MAX")
#define CHANGE(use, name, change, status, words) static void change_##name(struct fixture *f) { change; }
CASES(CHANGE)
// clang-format on

#define REFUSAL(use, name, change, status, words) {use, change_##name, status, #name, words},
static const struct {
    void (*use)(struct fixture *);
    void (*change)(struct fixture *);
    ice_status status;
    const char *name, *words;
} refusals[] = {CASES(REFUSAL)};

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

static void valid_bodies_pass_unchanged(void **state)
{
    (void)state;
    for (size_t i = 0; i < USES; i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        struct decoded decoded;
        decode(&f, &decoded);
        assert_int_equal(decoded.status, ICE_OK);
        uint8_t *sent, *seen;
        const size_t sent_size = pack(&f.request, &sent), seen_size = pack(decoded.request, &seen);
        assert_int_equal(sent_size, seen_size);
        assert_memory_equal(sent, seen, sent_size);
        free(sent);
        free(seen);
    }
}

static void every_truncation_and_changed_bit_is_answered(void **state)
{
    (void)state;
    for (size_t i = 0; i < USES; i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        uint8_t *bytes;
        const size_t size = pack(&f.request, &bytes);
        struct decoded decoded;
        for (size_t length = 0; length < size; length++) {
            decode_bytes(bytes, length, &decoded);
            assert_int_not_equal(decoded.status, ICE_OK); // the body comes last
        }
        for (size_t bit = 0; bit < size * 8; bit++) {
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            decode_bytes(bytes, size, &decoded); // its own assertions say what must hold
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        free(bytes);
    }
}

// The identity of a lookup and of an attach is that of an open: what means the same must name the same prefix.
static void lookup_and_attach_fill_in_defaults(void **state)
{
    (void)state;
    for (size_t i = 0; i < USES; i++) {
        struct fixture f;
        fixture_init(&f);
        uses[i](&f);
        f.open.name_space = (char *)(uintptr_t) "";
        f.open.tp_rank = f.open.tp_size = 0;
        f.open.block_tokens = 0;
        f.attach.tokens_max = 0;
        struct decoded decoded;
        decode(&f, &decoded);
        assert_int_equal(decoded.status, ICE_OK);
        const Icecache__Wire__SequenceOpen *open =
            uses[i] == use_lookup ? decoded.request->lookup->identity : decoded.request->attach->open;
        assert_string_equal(open->name_space, "default");
        assert_int_equal(open->tp_size, 1);
        assert_int_equal(open->block_tokens, 16);
    }
}

static void bodies_of_ids_pass(void **state)
{
    (void)state;
    struct fixture f;
    struct decoded decoded;
    Icecache__Wire__Seal seal = ICECACHE__WIRE__SEAL__INIT;
    Icecache__Wire__PrefixRemove removal = ICECACHE__WIRE__PREFIX_REMOVE__INIT;
    Icecache__Wire__PrefixList list = ICECACHE__WIRE__PREFIX_LIST__INIT;
    fixture_init(&f);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEAL;
    f.request.seal = &seal;
    seal.sequence_id = 98;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->seal->sequence_id, 98);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    f.request.prefix_remove = &removal;
    removal.prefix_id = 97;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->prefix_remove->prefix_id, 97);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST;
    f.request.prefix_list = &list;
    list.from = 512;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->prefix_list->from, 512);
    Icecache__Wire__LeaseList leases = ICECACHE__WIRE__LEASE_LIST__INIT;
    Icecache__Wire__NamespaceList namespaces = ICECACHE__WIRE__NAMESPACE_LIST__INIT;
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST;
    f.request.lease_list = &leases;
    leases.from = 3;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->lease_list->from, 3);
    f.request.body_case = ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST;
    f.request.namespace_list = &namespaces;
    namespaces.from = 4;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_int_equal(decoded.request->namespace_list->from, 4);
    use_lookup(&f);
    f.lookup.all_ranks = true;
    f.open.tp_size = WIRE_RANKS_MAX;
    decode(&f, &decoded);
    assert_int_equal(decoded.status, ICE_OK);
    assert_true(decoded.request->lookup->all_ranks);
}

// ---- frame 2 ----

static void hashes_are_counted(void **state)
{
    (void)state;
    static const struct {
        size_t bytes;
        uint32_t block_tokens, count;
        ice_status status;
        const char *words;
    } cases[] = {
        {16, 16, 1, ICE_OK, ""},
        {160, 4096, 10, ICE_OK, ""},
        {WIRE_VECTORS_BYTES_MAX, 16, WIRE_BLOCKS_MAX, ICE_OK, ""}, // all that frame 2 holds: the longest sequence
        {0, 16, 0, ICE_INVALID_ARGUMENT, "frame 2 has 0 bytes"},
        {15, 16, 0, ICE_INVALID_ARGUMENT, "frame 2 has 15 bytes"},
        {40, 16, 0, ICE_INVALID_ARGUMENT, "frame 2 has 40 bytes"},
        {WIRE_VECTORS_BYTES_MAX + 16, 1, 0, ICE_TOO_LARGE, "1048577 hashes, over WIRE_BLOCKS_MAX = 1048576"},
        {SIZE_MAX - 15, 1, 0, ICE_TOO_LARGE, "over WIRE_BLOCKS_MAX"},
        {WIRE_VECTORS_BYTES_MAX, 17, 0, ICE_TOO_LARGE, "1048576 blocks of 17 tokens pass WIRE_TOKENS_MAX"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct wire_error error = {.text = ""};
        uint32_t count = 0;
        assert_int_equal(wire_hashes_check(cases[i].bytes, cases[i].block_tokens, &count, &error), cases[i].status);
        assert_int_equal(count, cases[i].count); // written on success only
        assert_non_null(strstr(error.text, cases[i].words));
    }
}

// ---- replies ----

static ice_status decode_reply(const Icecache__Wire__Reply *reply, Icecache__Wire__Reply **out)
{
    const size_t size = icecache__wire__reply__get_packed_size(reply);
    uint8_t *bytes = malloc(size);
    assert_non_null(bytes);
    assert_int_equal(icecache__wire__reply__pack(reply, bytes), size);
    // Every truncation is answered, one way or the other, without a leak.
    for (size_t length = 0; length < size; length++) {
        Icecache__Wire__Reply *part = NULL;
        if (wire_reply_decode(bytes, length, &part) == ICE_OK) {
            icecache__wire__reply__free_unpacked(part, NULL);
        } else {
            assert_null(part);
        }
    }
    const ice_status status = wire_reply_decode(bytes, size, out);
    free(bytes);
    return status;
}

// Decodes with as many tokens as a sequence may have, and with one more.
static void check_tokens(Icecache__Wire__Reply *reply, uint64_t *tokens)
{
    Icecache__Wire__Reply *out = NULL;
    *tokens = WIRE_TOKENS_MAX;
    assert_int_equal(decode_reply(reply, &out), ICE_OK);
    assert_int_equal(out->body_case, reply->body_case);
    icecache__wire__reply__free_unpacked(out, NULL);
    out = NULL;
    *tokens = WIRE_TOKENS_MAX + 1;
    assert_int_equal(decode_reply(reply, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void tokens_of_replies_stay_in_range(void **state)
{
    (void)state;
    Icecache__Wire__SealReply seal = ICECACHE__WIRE__SEAL_REPLY__INIT;
    Icecache__Wire__LookupReply lookup = ICECACHE__WIRE__LOOKUP_REPLY__INIT;
    Icecache__Wire__AttachReply attach = ICECACHE__WIRE__ATTACH_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEAL;
    reply.seal = &seal;
    check_tokens(&reply, &seal.tokens);
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_LOOKUP;
    reply.lookup = &lookup;
    check_tokens(&reply, &lookup.tokens);
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_ATTACH;
    reply.attach = &attach;
    check_tokens(&reply, &attach.tokens);
}

static void lists_of_prefixes_are_bounded(void **state)
{
    (void)state;
    static Icecache__Wire__PrefixStats entries[WIRE_PREFIXES_LISTED_MAX + 1];
    static Icecache__Wire__PrefixStats *list[WIRE_PREFIXES_LISTED_MAX + 1];
    for (size_t i = 0; i <= WIRE_PREFIXES_LISTED_MAX; i++) {
        entries[i] = (Icecache__Wire__PrefixStats)ICECACHE__WIRE__PREFIX_STATS__INIT;
        list[i] = &entries[i];
    }
    Icecache__Wire__PrefixListReply prefixes = ICECACHE__WIRE__PREFIX_LIST_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *out = NULL;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST;
    reply.prefix_list = &prefixes;
    prefixes.prefix = list;
    prefixes.n_prefix = WIRE_PREFIXES_LISTED_MAX;
    assert_int_equal(decode_reply(&reply, &out), ICE_OK);
    assert_int_equal(out->prefix_list->n_prefix, WIRE_PREFIXES_LISTED_MAX);
    icecache__wire__reply__free_unpacked(out, NULL);
    out = NULL;
    prefixes.n_prefix++;
    assert_int_equal(decode_reply(&reply, &out), ICE_BAD_MESSAGE);
    assert_null(out);
}

static void other_lists_are_bounded(void **state)
{
    (void)state;
    static Icecache__Wire__Lease lease = ICECACHE__WIRE__LEASE__INIT, *leases[WIRE_LEASES_LISTED_MAX + 1];
    static Icecache__Wire__NamespaceStats row = ICECACHE__WIRE__NAMESPACE_STATS__INIT,
                                          *rows[WIRE_NAMESPACES_LISTED_MAX + 1];
    Icecache__Wire__LeaseListReply lease_list = ICECACHE__WIRE__LEASE_LIST_REPLY__INIT;
    Icecache__Wire__NamespaceListReply namespace_list = ICECACHE__WIRE__NAMESPACE_LIST_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *out = NULL;
    for (size_t i = 0; i <= WIRE_LEASES_LISTED_MAX; i++)
        leases[i] = &lease;
    for (size_t i = 0; i <= WIRE_NAMESPACES_LISTED_MAX; i++)
        rows[i] = &row;
    lease_list.lease = leases;
    namespace_list.name_space = rows;
    for (uint32_t more = 0; more < 2; more++) {
        lease_list.n_lease = WIRE_LEASES_LISTED_MAX + more;
        namespace_list.n_name_space = WIRE_NAMESPACES_LISTED_MAX + more;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_LEASE_LIST;
        reply.lease_list = &lease_list;
        assert_int_equal(decode_reply(&reply, &out), more ? ICE_BAD_MESSAGE : ICE_OK);
        if (!more)
            icecache__wire__reply__free_unpacked(out, NULL);
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST;
        reply.namespace_list = &namespace_list;
        assert_int_equal(decode_reply(&reply, &out), more ? ICE_BAD_MESSAGE : ICE_OK);
        if (!more)
            icecache__wire__reply__free_unpacked(out, NULL);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_refusal_has_its_status_and_text),
        cmocka_unit_test(valid_bodies_pass_unchanged),
        cmocka_unit_test(every_truncation_and_changed_bit_is_answered),
        cmocka_unit_test(lookup_and_attach_fill_in_defaults),
        cmocka_unit_test(bodies_of_ids_pass),
        cmocka_unit_test(hashes_are_counted),
        cmocka_unit_test(tokens_of_replies_stay_in_range),
        cmocka_unit_test(lists_of_prefixes_are_bounded),
        cmocka_unit_test(other_lists_are_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
