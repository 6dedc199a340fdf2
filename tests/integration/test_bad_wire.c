// What only a faulty or hostile worker sends: each refused with its own status and text, and the daemon serves on.
#include "raw.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

enum { HEAD_DIM = 32, KV_HEADS = 2, QUERY_HEADS = 4, LENGTH = 50, SLOTS = 64, STAGING = 1 << 20 };
enum { QUERY_BYTES = QUERY_HEADS * HEAD_DIM * 2 };

// A session with one sequence of LENGTH zero tokens in two layers, and a landing.
struct bench {
    struct raw raw;
    uint8_t *staging;
    uint64_t sequence;
    uint32_t landing;
};

static Icecache__Wire__Append valid_append(const struct bench *bench)
{
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    append.sequence_id = bench->sequence;
    append.layers = 2;
    append.tokens = LENGTH;
    return append;
}

static raw_reply *call_append(struct bench *bench, Icecache__Wire__Append *append)
{
    raw_request request;
    raw_request_init(&bench->raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = append;
    return raw_call(&bench->raw, &request, NULL, 0);
}

static raw_reply *call_read(struct bench *bench, Icecache__Wire__Read *read)
{
    raw_request request;
    raw_request_init(&bench->raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_READ;
    request.read = read;
    return raw_call(&bench->raw, &request, NULL, 0);
}

static void bench_open(struct bench *bench, const struct daemon *daemon)
{
    raw_open(&bench->raw, daemon);
    raw_staging_open(&bench->raw, STAGING, &bench->staging);
    bench->sequence = raw_sequence_open(&bench->raw, 2, KV_HEADS, QUERY_HEADS, HEAD_DIM, DTYPE_BF16);
    bench->landing = raw_landing_open(&bench->raw, 2, SLOTS, KV_HEADS, HEAD_DIM, DTYPE_BF16);
    Icecache__Wire__Append append = valid_append(bench);
    raw_expect(call_append(bench, &append), ICE_OK, "");
}

// A valid retrieve and its two entries' arrays, which a test may spoil.
struct asked {
    Icecache__Wire__Retrieve message;
    uint64_t sequences[300], firsts[300];
    uint32_t rows[300];
    uint8_t queries[2 * QUERY_BYTES];
    size_t bytes;
};

static void asked_init(struct asked *asked, const struct bench *bench)
{
    memset(asked, 0, sizeof *asked);
    icecache__wire__retrieve__init(&asked->message);
    for (uint32_t i = 0; i < 300; i++) {
        asked->sequences[i] = bench->sequence + i;
        asked->firsts[i] = LENGTH - 1;
        asked->rows[i] = i;
    }
    asked->message.landing_id = bench->landing;
    asked->message.sequence_ids = asked->sequences;
    asked->message.first_queries = asked->firsts;
    asked->message.rows = asked->rows;
    asked->message.n_sequence_ids = asked->message.n_first_queries = asked->message.n_rows = 1;
    asked->message.queries = 1;
    asked->message.query_dtype = DTYPE_BF16;
    asked->message.budget = 16;
    asked->message.sinks = asked->message.window = 4;
    asked->bytes = QUERY_BYTES;
}

static raw_reply *call_retrieve(struct bench *bench, struct asked *asked)
{
    raw_request request;
    raw_request_init(&bench->raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &asked->message;
    return raw_call(&bench->raw, &request, asked->bytes ? asked->queries : NULL, asked->bytes);
}

static void check_alive(struct bench *bench)
{
    struct asked asked;
    asked_init(&asked, bench);
    raw_expect(call_retrieve(bench, &asked), ICE_OK, "");
}

// ---- hello and the control socket ----

static void hello(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__StagingOpen staging = ICECACHE__WIRE__STAGING_OPEN__INIT;
    char long_name[WIRE_NAME_BYTES_MAX + 2];
    memset(long_name, 'n', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    staging.bytes = 4096;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN;
    request.staging_open = &staging;
    raw_connect(&raw, daemon);
    raw_control_expect(raw_control(&raw, &request, NULL), ICE_UNKNOWN_SESSION, "say hello first");
    raw_control_expect(raw_hello(&raw, 99, "raw", false), ICE_VERSION_MISMATCH, "version 99");
    raw_control_expect(raw_hello(&raw, 0, "raw", false), ICE_VERSION_MISMATCH, "version 0");
    raw_control_expect(raw_hello(&raw, WIRE_PROTOCOL_VERSION, "a\nb", false), ICE_INVALID_ARGUMENT, "printable");
    raw_control_expect(raw_hello(&raw, WIRE_PROTOCOL_VERSION, long_name, false), ICE_TOO_LARGE, "WIRE_NAME_BYTES_MAX");
    raw_control_expect(raw_hello(&raw, WIRE_PROTOCOL_VERSION, "raw", false), ICE_OK, "");
    raw_control_expect(raw_hello(&raw, WIRE_PROTOCOL_VERSION, "raw", false), ICE_INVALID_ARGUMENT, "already");
    raw_control_expect(raw_control(&raw, &request, NULL), ICE_OK, "");
    raw_control_expect(raw_control(&raw, &request, NULL), ICE_LIMIT, "already");
    raw_close(&raw);
}

static void control_garbage(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    uint8_t large[WIRE_CONTROL_BYTES_MAX + 64] = {0};
    const uint8_t garbage[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0x12};
    raw_control_request empty = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    raw_open(&raw, daemon);
    raw_control_expect(raw_control_bytes(&raw, garbage, sizeof garbage), ICE_BAD_MESSAGE, "garbled");
    raw_control_expect(raw_control(&raw, &empty, NULL), ICE_BAD_MESSAGE, "no body");
    // A packet over the limit loses its end, so what came is worth nothing: that session ends.
    assert_true(write(raw.control_fd, large, sizeof large) == sizeof large);
    assert_null(raw_control_receive(&raw, NULL));
    raw_close(&raw);
    struct bench bench;
    bench_open(&bench, daemon);
    check_alive(&bench);
    raw_close(&bench.raw);
}

static void landing_shapes(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    raw_open(&raw, daemon);
    const struct {
        uint32_t rows, layers, kv_heads, slots, head_dim, dtype;
        ice_status status;
        const char *text;
    } cases[] = {
        {0, 1, 1, 16, 64, DTYPE_BF16, ICE_INVALID_ARGUMENT, "rows"},
        {1, 0, 1, 16, 64, DTYPE_BF16, ICE_INVALID_ARGUMENT, "layers"},
        {1, 1, 0, 16, 64, DTYPE_BF16, ICE_INVALID_ARGUMENT, "kv_heads"},
        {1, 1, 1, 0, 64, DTYPE_BF16, ICE_INVALID_ARGUMENT, "slots"},
        {1, 1, 1, 16, 0, DTYPE_BF16, ICE_INVALID_ARGUMENT, "head_dim"},
        {1, 1, 1, 16, 72, DTYPE_BF16, ICE_NOT_SUPPORTED, "head_dim 72"},
        {1, 1, 1, 16, 272, DTYPE_BF16, ICE_NOT_SUPPORTED, "head_dim 272"},
        {1, 1, 1, 16, 64, 4, ICE_NOT_SUPPORTED, "dtype 4"},
        {5000, 1, 1, 16, 64, DTYPE_BF16, ICE_TOO_LARGE, "WIRE_ROWS_MAX"},
        {1, 600, 1, 16, 64, DTYPE_BF16, ICE_TOO_LARGE, "WIRE_LAYERS_MAX"},
        {1, 1, 300, 16, 64, DTYPE_BF16, ICE_TOO_LARGE, "WIRE_KV_HEADS_MAX"},
        {1, 1, 1, 1u << 25, 64, DTYPE_BF16, ICE_TOO_LARGE, "WIRE_SLOTS_MAX"},
        {4096, 64, 256, 1u << 24, 256, DTYPE_FP32, ICE_TOO_LARGE, "WIRE_SHARED_BYTES_MAX"},
        {1024, 8, 8, 4096, 128, DTYPE_BF16, ICE_SHARED_FULL, "--shared-bytes"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
        Icecache__Wire__LandingOpen open = ICECACHE__WIRE__LANDING_OPEN__INIT;
        open.rows = cases[i].rows;
        open.layers = cases[i].layers;
        open.kv_heads = cases[i].kv_heads;
        open.slots = cases[i].slots;
        open.head_dim = cases[i].head_dim;
        open.dtype = cases[i].dtype;
        request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
        request.landing_open = &open;
        raw_control_expect(raw_control(&raw, &request, NULL), cases[i].status, cases[i].text);
    }
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__LandingClose close_message = ICECACHE__WIRE__LANDING_CLOSE__INIT;
    close_message.landing_id = 77;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
    request.landing_close = &close_message;
    raw_control_expect(raw_control(&raw, &request, NULL), ICE_UNKNOWN_LANDING, "no such landing");
    raw_close(&raw);
}

// ---- frames ----

static void frames(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    bench_open(&bench, daemon);
    struct raw *raw = &bench.raw;
    static uint8_t large[WIRE_HEADER_BYTES_MAX + 1];
    uint8_t header[512];
    raw_request request;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    info.sequence_id = bench.sequence;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    size_t size = icecache__wire__request__pack(&request, header);

    const void *const three[] = {header, "two", "three"};
    const size_t three_sizes[] = {size, 3, 5};
    raw_send_frames(raw, three, three_sizes, 3);
    raw_expect(raw_receive(raw), ICE_TOO_LARGE, "at most 2 frames");
    const void *const one[] = {header};
    const size_t cut[] = {size - 3}, none[] = {0};
    raw_send_frames(raw, one, cut, 1);
    raw_expect(raw_receive(raw), ICE_BAD_MESSAGE, "truncated or garbled");
    raw_send_frames(raw, one, none, 1);
    raw_expect(raw_receive(raw), ICE_BAD_MESSAGE, "empty");
    const void *const over[] = {large};
    const size_t over_sizes[] = {sizeof large};
    raw_send_frames(raw, over, over_sizes, 1);
    raw_expect(raw_receive(raw), ICE_TOO_LARGE, "WIRE_HEADER_BYTES_MAX");
    raw_request no_body;
    raw_request_init(raw, &no_body);
    raw_expect(raw_call(raw, &no_body, NULL, 0), ICE_BAD_MESSAGE, "body");
    raw_expect(raw_call(raw, &request, NULL, 0), ICE_OK, "");
    raw_close(raw);
}

// A frame over the largest size is dropped with its connection by the transport; the session outlives that.
static void a_frame_over_the_limit(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    bench_open(&bench, daemon);
    uint8_t *large = calloc(1, WIRE_VECTORS_BYTES_MAX + 1);
    assert_non_null(large);
    const void *const frames_sent[] = {"header", large};
    const size_t sizes[] = {6, WIRE_VECTORS_BYTES_MAX + 1};
    raw_send_frames(&bench.raw, frames_sent, sizes, 2);
    assert_null(raw_receive_try(&bench.raw, 300));
    free(large);
    zmq_close(bench.raw.socket);
    zmq_ctx_term(bench.raw.context);
    raw_data_connect(&bench.raw);
    check_alive(&bench);
    raw_close(&bench.raw);
}

static void identity(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    struct raw other, admin;
    bench_open(&bench, daemon);
    raw_request request;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    info.sequence_id = bench.sequence;
    raw_request_init(&bench.raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    request.protocol_version = 2;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_VERSION_MISMATCH, "protocol version 2");
    request.protocol_version = WIRE_PROTOCOL_VERSION;
    request.session_id++;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    request.session_id--;
    bench.raw.token[15] ^= 1;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    bench.raw.token[15] ^= 1;
    request.session_token.len = 15;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_BAD_MESSAGE, "session_token");
    request.session_token.len = 16;
    info.sequence_id += 1000;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "no such sequence");
    info.sequence_id -= 1000;
    raw_expect(raw_call(&bench.raw, &request, NULL, 0), ICE_OK, "");

    raw_open(&other, daemon); // another session's sequence is none of its own
    raw_request_init(&other, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(&other, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "no such sequence");
    raw_close(&other);

    raw_connect(&admin, daemon); // statistics only
    raw_control_reply *reply = raw_hello(&admin, WIRE_PROTOCOL_VERSION, "admin", true);
    admin.session_id = reply->hello->session_id;
    admin.boot_token = reply->hello->boot_token;
    memcpy(admin.token, reply->hello->session_token.data, sizeof admin.token);
    strcpy(admin.endpoint, reply->hello->endpoint);
    raw_control_free(reply);
    raw_data_connect(&admin);
    raw_request_init(&admin, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(&admin, &request, NULL, 0), ICE_PERMISSION, "admin session");
    raw_close(&admin);
    check_alive(&bench);
    raw_close(&bench.raw);
}

// borrow ENDPOINT SESSION BOOT TOKEN: another process with a stolen token.
static int run_borrow(int argc, char **argv)
{
    assert_int_equal(argc, 5);
    struct raw raw = {.control_fd = -1};
    strcpy(raw.endpoint, argv[1]);
    raw.session_id = strtoull(argv[2], NULL, 16);
    raw.boot_token = strtoull(argv[3], NULL, 16);
    for (size_t i = 0; i < sizeof raw.token; i++) {
        char digits[3] = {argv[4][2 * i], argv[4][2 * i + 1], '\0'};
        raw.token[i] = (uint8_t)strtoul(digits, NULL, 16);
    }
    raw_request request;
    Icecache__Wire__Stats stats = ICECACHE__WIRE__STATS__INIT;
    raw_data_connect(&raw);
    raw_request_init(&raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &stats;
    raw_expect(raw_call(&raw, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    raw_close(&raw);
    return 0;
}

static void a_stolen_token(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    struct child thief;
    char session[32], boot[32], token[64];
    raw_open(&raw, daemon);
    snprintf(session, sizeof session, "%llx", (unsigned long long)raw.session_id);
    snprintf(boot, sizeof boot, "%llx", (unsigned long long)raw.boot_token);
    for (size_t i = 0; i < sizeof raw.token; i++)
        snprintf(token + 2 * i, 3, "%02x", raw.token[i]);
    const char *arguments[] = {"borrow", raw.endpoint, session, boot, token, NULL};
    child_start_role(&thief, arguments);
    child_expect_exit(&thief, 0);
    raw_close(&raw);
}

// ---- requests ----

#define EXPECT_OPEN(expected, text, spoil)                                                                             \
    do {                                                                                                               \
        open_init(&open, digest);                                                                                      \
        spoil;                                                                                                         \
        raw_expect(call_open(&raw, &open), expected, text);                                                            \
    } while (0)

static void open_init(Icecache__Wire__SequenceOpen *open, uint8_t *digest)
{
    icecache__wire__sequence_open__init(open);
    open->model_digest.data = digest;
    open->model_digest.len = 8;
    open->layers = 4;
    open->kv_heads = 2;
    open->query_heads = 4;
    open->head_dim = 64;
    open->dtype = DTYPE_BF16;
}

static raw_reply *call_open(struct raw *raw, Icecache__Wire__SequenceOpen *open)
{
    raw_request request;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN;
    request.sequence_open = open;
    return raw_call(raw, &request, NULL, 0);
}

static void sequence_shapes(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    Icecache__Wire__SequenceOpen open;
    uint8_t digest[128] = {0};
    uint32_t anchors[] = {0, 0, 1, 3}, later[] = {1, 1, 2, 3}, selves[] = {0, 1, 2, 3}, beyond[] = {0, 1, 2, 4};
    raw_open(&raw, daemon);
    EXPECT_OPEN(ICE_OK, "", (void)0);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "layers", open.layers = 0);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_LAYERS_MAX", open.layers = 513);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_LANES_MAX", (open.layers = 512, open.kv_heads = open.query_heads = 64));
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "kv_heads", open.kv_heads = 0);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "query_heads", open.query_heads = 0);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "not a multiple", open.query_heads = 5);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_GROUP_MAX", open.query_heads = 2 * 65);
    EXPECT_OPEN(ICE_NOT_SUPPORTED, "head_dim 24", open.head_dim = 24);
    EXPECT_OPEN(ICE_NOT_SUPPORTED, "head_dim 512", open.head_dim = 512);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "head_dim", open.head_dim = 0);
    EXPECT_OPEN(ICE_NOT_SUPPORTED, "dtype 7", open.dtype = 7);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "model_digest", open.model_digest.len = 0);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_DIGEST_BYTES_MAX", open.model_digest.len = 65);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "tp_rank", open.tp_rank = 1);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "softmax_scale", open.softmax_scale = NAN);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "softmax_scale", open.softmax_scale = -1.0f);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_BLOCK_TOKENS_MAX", open.block_tokens = 5000);
    EXPECT_OPEN(ICE_TOO_LARGE, "WIRE_TOKENS_MAX", open.max_tokens = 1u << 25);
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "name_space", open.name_space = (char *)(uintptr_t) "tab\there");
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "anchor_layers[2]", (open.anchor_layers = anchors, open.n_anchor_layers = 4));
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "anchor_layers[0]", (open.anchor_layers = later, open.n_anchor_layers = 4));
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "anchor_layers[3]", (open.anchor_layers = beyond, open.n_anchor_layers = 4));
    EXPECT_OPEN(ICE_INVALID_ARGUMENT, "3 entries", (open.anchor_layers = selves, open.n_anchor_layers = 3));
    EXPECT_OPEN(ICE_OK, "", (open.anchor_layers = selves, open.n_anchor_layers = 4));
    raw_close(&raw);
}

#define EXPECT_RETRIEVE(expected, text, spoil)                                                                         \
    do {                                                                                                               \
        asked_init(&asked, &bench);                                                                                    \
        spoil;                                                                                                         \
        raw_expect(call_retrieve(&bench, &asked), expected, text);                                                     \
    } while (0)

static void retrieves(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    struct asked asked;
    bench_open(&bench, daemon);
    Icecache__Wire__Retrieve *message = &asked.message;
    EXPECT_RETRIEVE(ICE_OK, "", (void)0);
    EXPECT_RETRIEVE(ICE_UNKNOWN_SEQUENCE, "is not open", asked.sequences[0] += 9);
    EXPECT_RETRIEVE(ICE_UNKNOWN_LANDING, "landing 9", message->landing_id = 9);
    EXPECT_RETRIEVE(ICE_UNKNOWN_LAYER, "the sequence has layers 0..1", message->layer = 2);
    EXPECT_RETRIEVE(ICE_UNKNOWN_LAYER, "the landing has layers 0..0", message->layer = 1);
    EXPECT_RETRIEVE(ICE_OUT_OF_BOUNDS, "row 2", asked.rows[0] = 2);
    EXPECT_RETRIEVE(ICE_OUT_OF_BOUNDS, "WIRE_ROWS_MAX", asked.rows[0] = 4096);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "entries", message->n_rows = 2);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "sequence_ids",
                    message->n_rows = message->n_sequence_ids = message->n_first_queries = 0);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "WIRE_SEQUENCES_PER_RETRIEVE_MAX",
                    message->n_rows = message->n_sequence_ids = message->n_first_queries = 257);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "row 0 again",
                    (message->n_rows = message->n_sequence_ids = message->n_first_queries = 2, asked.rows[1] = 0));
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "same sequence",
                    (message->n_rows = message->n_sequence_ids = message->n_first_queries = 2,
                     asked.sequences[1] = asked.sequences[0]));
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "queries", message->queries = 0);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "WIRE_QUERIES_MAX", message->queries = 257);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", message->queries = 2);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", asked.bytes -= HEAD_DIM * 2); // a head too few
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", asked.bytes += HEAD_DIM * 2); // a head too many
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", asked.bytes = 0);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", message->query_dtype = DTYPE_FP32);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head counts or dtype", message->append = true);
    EXPECT_RETRIEVE(ICE_NOT_SUPPORTED, "query_dtype 9", message->query_dtype = 9);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "budget", message->budget = 0);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "budget", message->budget = UINT32_MAX);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "65 slots", message->budget = SLOTS - 7);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "WIRE_SLOTS_MAX", message->sinks = UINT32_MAX);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "WIRE_SLOTS_MAX", message->window = UINT32_MAX);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "coverage", message->coverage = NAN);
    EXPECT_RETRIEVE(ICE_INVALID_ARGUMENT, "coverage", message->coverage = 1.5f);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "deadline", message->deadline_us = UINT32_MAX);
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "first_queries", asked.firsts[0] = UINT64_MAX);
    EXPECT_RETRIEVE(ICE_POSITION_GAP, "the last query stands at position 50", asked.firsts[0] = LENGTH);
    EXPECT_RETRIEVE(ICE_NOT_FINITE, "NaN", memset(asked.queries, 0xff, 2));
    uint32_t other = raw_landing_open(&bench.raw, 1, SLOTS, KV_HEADS, HEAD_DIM, DTYPE_FP16);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "fp16", message->landing_id = other);
    other = raw_landing_open(&bench.raw, 1, SLOTS, KV_HEADS, 2 * HEAD_DIM, DTYPE_BF16);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "head_dim 64", message->landing_id = other);
    other = raw_landing_open(&bench.raw, 1, SLOTS, 3, HEAD_DIM, DTYPE_BF16);
    EXPECT_RETRIEVE(ICE_SHAPE_MISMATCH, "3 KV heads", message->landing_id = other);
    // A page-wise budget below a page still takes a whole page, for which there must be room.
    other = raw_landing_open(&bench.raw, 1, 12, KV_HEADS, HEAD_DIM, DTYPE_BF16);
    EXPECT_RETRIEVE(ICE_OK, "", (message->landing_id = other, message->budget = 4));
    EXPECT_RETRIEVE(ICE_TOO_LARGE, "at least a page) need 24 slots",
                    (message->landing_id = other, message->budget = 4, message->page_wise = true));
    // The positions come in the reply too, where asked for.
    asked_init(&asked, &bench);
    message->want_positions = message->resend = true;
    raw_reply *reply = call_retrieve(&bench, &asked);
    assert_int_equal(reply->status, ICE_OK);
    assert_int_equal(reply->retrieve->n_counts, KV_HEADS);
    assert_int_equal(reply->retrieve->n_positions, KV_HEADS * 24);
    assert_int_equal(reply->retrieve->positions[23], LENGTH - 1);
    raw_free(reply);
    raw_close(&bench.raw);
}

#define EXPECT_APPEND(expected, text, spoil)                                                                           \
    do {                                                                                                               \
        append = valid_append(&bench);                                                                                 \
        spoil;                                                                                                         \
        raw_expect(call_append(&bench, &append), expected, text);                                                      \
    } while (0)

static void appends_and_reads(void **state)
{
    const struct daemon *daemon = *state;
    struct bench bench;
    Icecache__Wire__Append append;
    const uint64_t bytes = 2u * 2 * KV_HEADS * HEAD_DIM * 2 * LENGTH; // of a valid append
    bench_open(&bench, daemon);
    EXPECT_APPEND(ICE_OK, "", append.staging_offset = STAGING - bytes);
    EXPECT_APPEND(ICE_OUT_OF_BOUNDS, "staging area", append.staging_offset = STAGING - bytes + 1);
    EXPECT_APPEND(ICE_OUT_OF_BOUNDS, "staging", append.staging_offset = UINT64_MAX);
    EXPECT_APPEND(ICE_OUT_OF_BOUNDS, "staging area", append.tokens = 1u << 20);
    EXPECT_APPEND(ICE_INVALID_ARGUMENT, "tokens", append.tokens = 0);
    EXPECT_APPEND(ICE_TOO_LARGE, "WIRE_TOKENS_MAX", append.tokens = UINT32_MAX);
    EXPECT_APPEND(ICE_INVALID_ARGUMENT, "layers", append.layers = 0);
    EXPECT_APPEND(ICE_UNKNOWN_LAYER, "the sequence has layers 0..1", append.layers = 3);
    EXPECT_APPEND(ICE_UNKNOWN_LAYER, "the sequence has layers 0..1", append.layer = 1);
    EXPECT_APPEND(ICE_UNKNOWN_LAYER, "WIRE_LAYERS_MAX", append.layers = UINT32_MAX);
    EXPECT_APPEND(ICE_UNKNOWN_SEQUENCE, "is not open", append.sequence_id += 5);
    EXPECT_APPEND(ICE_POSITION_GAP, "starts at position 51, the length is 50", append.first = LENGTH + 1);
    EXPECT_APPEND(ICE_TOO_LARGE, "WIRE_TOKENS_MAX", append.first = UINT64_MAX);
    EXPECT_APPEND(ICE_INVALID_ARGUMENT, "reserve_tokens", append.reserve_tokens = 1);
    EXPECT_APPEND(ICE_TOO_LARGE, "reserve_tokens", append.reserve_tokens = UINT64_MAX);
    bench.staging[3] = 0x11;
    EXPECT_APPEND(ICE_CONFLICT, "cannot be rewritten", (void)0);

    Icecache__Wire__Read read = ICECACHE__WIRE__READ__INIT;
    read.sequence_id = bench.sequence;
    read.layers = 1;
    read.tokens = LENGTH;
    raw_expect(call_read(&bench, &read), ICE_OK, "");
    read.first = 1;
    raw_expect(call_read(&bench, &read), ICE_OUT_OF_BOUNDS, "the read ends at position 51, the length is 50");
    read.first = 0;
    read.staging_offset = STAGING - 1;
    raw_expect(call_read(&bench, &read), ICE_OUT_OF_BOUNDS, "staging area");
    read.staging_offset = 0;
    read.layer = 2;
    raw_expect(call_read(&bench, &read), ICE_UNKNOWN_LAYER, "the sequence has layers 0..1");
    check_alive(&bench);
    raw_close(&bench.raw);

    struct raw bare; // a session that has opened no staging area
    raw_open(&bare, daemon);
    bench.raw = bare;
    bench.sequence = raw_sequence_open(&bench.raw, 2, KV_HEADS, QUERY_HEADS, HEAD_DIM, DTYPE_BF16);
    EXPECT_APPEND(ICE_OUT_OF_BOUNDS, "no staging area is open", (void)0);
    raw_close(&bench.raw);
}

// Valid messages with bytes changed, cut or added, and noise: an answer or none, but never the daemon's end.
static void noise(void **state)
{
    const struct daemon *daemon = *state;
    uint64_t random = random_seed("noise");
    const uint32_t rounds = scaled_count(2000, 20000);
    struct bench bench;
    struct asked asked;
    bench_open(&bench, daemon);
    for (uint32_t round = 0; round < rounds; round++) {
        uint8_t header[1024], vectors[1024];
        raw_request request;
        raw_request_init(&bench.raw, &request);
        asked_init(&asked, &bench);
        request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
        request.retrieve = &asked.message;
        size_t size = icecache__wire__request__pack(&request, header);
        for (uint64_t i = random_below(&random, 6); i > 0; i--)
            header[random_below(&random, size)] ^= (uint8_t)(1u << random_below(&random, 8));
        if (random_below(&random, 4) == 0)
            size = random_below(&random, size + 1);
        for (size_t i = 0; i < sizeof vectors; i++)
            vectors[i] = (uint8_t)random_next(&random);
        const void *const sent[] = {header, vectors, vectors};
        const size_t sizes[] = {size, random_below(&random, 2) ? QUERY_BYTES : random_below(&random, sizeof vectors),
                                7};
        raw_send_frames(&bench.raw, sent, sizes, 1 + random_below(&random, 3));
        if (round % 64 == 63) { // replies must be taken
            for (raw_reply *reply; (reply = raw_receive_try(&bench.raw, 10)) != NULL;)
                raw_free(reply);
        }
    }
    for (raw_reply *reply; (reply = raw_receive_try(&bench.raw, 200)) != NULL;)
        raw_free(reply);
    check_alive(&bench);
    raw_close(&bench.raw);
}

// A connection that says nothing is closed after a while.
static void no_hello(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    raw_connect(&raw, daemon);
    uint64_t from = now_us();
    assert_null(raw_control_receive(&raw, NULL));
    assert_true(now_us() - from > 3000000);
    raw_close(&raw);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{"borrow", run_borrow}};
    int status;
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &status))
        return status;
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(hello),
        DAEMON_TEST(control_garbage),
        DAEMON_TEST(landing_shapes),
        DAEMON_TEST(frames),
        DAEMON_TEST(a_frame_over_the_limit),
        DAEMON_TEST(identity),
        DAEMON_TEST(a_stolen_token),
        DAEMON_TEST(sequence_shapes),
        DAEMON_TEST(retrieves),
        DAEMON_TEST(appends_and_reads),
        DAEMON_TEST(noise),
        DAEMON_TEST(no_hello),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
