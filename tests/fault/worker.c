#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "worker.h"

#include "proto/control.h"
#include "proto/dtype.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#define CLUSTER_DEADLINE_MS 20000
#define RECLAIM_DEADLINE_MS 10000

static void sleep_ms(long ms)
{
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&wait, NULL);
}

float worker_element(bool value, uint32_t layer, uint32_t head, uint64_t position, uint32_t element)
{
    uint64_t x = (((uint64_t)value * 31 + layer) * 31 + head) * 1000003u + position * 257 + element;
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    return (float)(x & 0xffffu) / 32768.0f - 1.0f;
}

void worker_init(struct worker *worker)
{
    *worker = (struct worker){.control = -1, .patience_ms = 10000};
}

void worker_close(struct worker *worker)
{
    if (worker->control >= 0)
        close(worker->control);
    if (worker->data)
        zmq_close(worker->data);
    if (worker->context)
        zmq_ctx_term(worker->context);
    if (worker->staging)
        munmap(worker->staging, STAGING_BYTES);
    if (worker->landing)
        munmap(worker->landing, worker->layout.total_bytes);
    worker_init(worker);
}

static ice_status keep_text(struct worker *worker, uint32_t status, const char *text)
{
    snprintf(worker->text, sizeof worker->text, "%s", text);
    if (status != ICE_OK)
        assert_true(text[0] != '\0'); // every refusal says why
    return (ice_status)status;
}

// ---- control socket ----

void worker_send_control(struct worker *worker, Icecache__Wire__ControlRequest *request)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    request->request_id = ++worker->next_request;
    size_t size = icecache__wire__control_request__pack(request, bytes);
    // A peer that is gone may have said why: the reply is read in any case.
    ice_status ignored = control_send(worker->control, bytes, size, -1, worker->patience_ms);
    (void)ignored;
}

ice_status worker_receive_control(struct worker *worker, Icecache__Wire__ControlReply **out, int *fd)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size;
    ice_status status = control_receive(worker->control, bytes, sizeof bytes, &size, fd, worker->patience_ms);
    return status == ICE_OK ? wire_control_reply_decode(bytes, size, out) : status;
}

// The reply's status; *fd and *out are the caller's where it is ICE_OK and they are asked for.
static ice_status control_exchange(struct worker *worker, Icecache__Wire__ControlRequest *request,
                                   Icecache__Wire__ControlReply **out, int *fd)
{
    int passed = -1;
    Icecache__Wire__ControlReply *reply = NULL;
    *out = NULL;
    if (fd)
        *fd = -1;
    worker_send_control(worker, request);
    if (worker->send_only)
        return ICE_OK;
    ice_status status = worker_receive_control(worker, &reply, &passed);
    if (status == ICE_OK)
        status = keep_text(worker, reply->status, reply->text);
    if (status == ICE_OK && fd)
        *fd = passed;
    else if (passed >= 0)
        close(passed);
    if (status == ICE_OK)
        *out = reply;
    else if (reply)
        icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

static void open_data(struct worker *worker)
{
    int none = 0;
    worker->context = zmq_ctx_new();
    worker->data = zmq_socket(worker->context, ZMQ_DEALER);
    assert_non_null(worker->data);
    assert_int_equal(zmq_setsockopt(worker->data, ZMQ_LINGER, &none, sizeof none), 0);
    assert_int_equal(zmq_connect(worker->data, worker->endpoint), 0);
}

ice_status worker_hello(struct worker *worker, const char *sockets)
{
    char path[128];
    assert_int_equal(control_path(path, sizeof path, sockets, CONTROL_SOCKET_NAME), ICE_OK);
    ice_status status = control_connect(path, &worker->control);
    if (status != ICE_OK)
        return status;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__Hello hello = ICECACHE__WIRE__HELLO__INIT;
    Icecache__Wire__ControlReply *reply;
    hello.protocol_version = WIRE_PROTOCOL_VERSION;
    hello.client_name = "script";
    hello.admin = worker->admin;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO;
    request.hello = &hello;
    status = control_exchange(worker, &request, &reply, NULL);
    if (status != ICE_OK || worker->send_only)
        return status;
    assert_int_equal(reply->body_case, ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO);
    worker->session_id = reply->hello->session_id;
    worker->boot_token = reply->hello->boot_token;
    memcpy(worker->token, reply->hello->session_token.data, sizeof worker->token);
    snprintf(worker->endpoint, sizeof worker->endpoint, "%s", reply->hello->endpoint);
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    open_data(worker);
    return ICE_OK;
}

static uint8_t *map(int fd, uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(memory != MAP_FAILED);
    close(fd);
    return memory;
}

ice_status worker_open_staging(struct worker *worker)
{
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__StagingOpen staging = ICECACHE__WIRE__STAGING_OPEN__INIT;
    Icecache__Wire__ControlReply *reply;
    int fd;
    staging.bytes = STAGING_BYTES;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN;
    request.staging_open = &staging;
    ice_status status = control_exchange(worker, &request, &reply, &fd);
    if (status != ICE_OK || worker->send_only)
        return status;
    assert_int_equal(reply->staging->bytes, STAGING_BYTES);
    worker->staging = map(fd, STAGING_BYTES);
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return ICE_OK;
}

ice_status worker_open_landing(struct worker *worker)
{
    const struct landing_shape shape = {1, LAYERS, KV_HEADS, SLOTS, HEAD_DIM, DTYPE_FP32};
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__LandingOpen landing = ICECACHE__WIRE__LANDING_OPEN__INIT;
    Icecache__Wire__ControlReply *reply;
    int fd;
    landing.rows = shape.rows;
    landing.layers = shape.layers;
    landing.kv_heads = shape.kv_heads;
    landing.slots = shape.slots;
    landing.head_dim = shape.head_dim;
    landing.dtype = shape.dtype;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
    request.landing_open = &landing;
    ice_status status = control_exchange(worker, &request, &reply, &fd);
    if (status != ICE_OK || worker->send_only)
        return status;
    assert_true(landing_layout_init(&worker->layout, &shape));
    assert_int_equal(reply->landing->bytes, worker->layout.total_bytes);
    worker->landing_id = reply->landing->landing_id;
    worker->landing = map(fd, worker->layout.total_bytes);
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return ICE_OK;
}

ice_status worker_close_landing(struct worker *worker)
{
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__LandingClose landing = ICECACHE__WIRE__LANDING_CLOSE__INIT;
    Icecache__Wire__ControlReply *reply;
    landing.landing_id = worker->landing_id;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
    request.landing_close = &landing;
    ice_status status = control_exchange(worker, &request, &reply, NULL);
    if (reply)
        icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

// ---- data plane ----

void worker_send(struct worker *worker, Icecache__Wire__Request *request, const void *vectors, size_t bytes)
{
    uint8_t header[4096];
    request->protocol_version = WIRE_PROTOCOL_VERSION;
    request->request_id = ++worker->next_request;
    request->session_id = worker->session_id;
    request->session_token.data = worker->token;
    request->session_token.len = sizeof worker->token;
    size_t size = icecache__wire__request__pack(request, header);
    assert_int_equal(zmq_send(worker->data, header, size, bytes ? ZMQ_SNDMORE : 0), size);
    if (bytes)
        assert_int_equal(zmq_send(worker->data, vectors, bytes, 0), bytes);
}

// Waits for a message or for the daemon to hang up.
static ice_status wait_reply(struct worker *worker)
{
    zmq_pollitem_t items[] = {{worker->data, 0, ZMQ_POLLIN, 0}, {NULL, worker->control, ZMQ_POLLIN, 0}};
    int count = zmq_poll(items, 2, worker->patience_ms);
    if (count > 0 && items[0].revents)
        return ICE_OK;
    return count > 0 ? ICE_DISCONNECTED : ICE_TIMEOUT; // nothing but its end comes unasked on the control socket
}

ice_status worker_receive(struct worker *worker, Icecache__Wire__Reply **out)
{
    ice_status status = wait_reply(worker);
    if (status != ICE_OK)
        return status;
    zmq_msg_t message;
    zmq_msg_init(&message);
    assert_true(zmq_msg_recv(&message, worker->data, 0) >= 0);
    assert_false(zmq_msg_more(&message));
    status = wire_reply_decode(zmq_msg_data(&message), zmq_msg_size(&message), out);
    zmq_msg_close(&message);
    return status;
}

static ice_status exchange(struct worker *worker, Icecache__Wire__Request *request, const void *vectors, size_t bytes,
                           Icecache__Wire__Reply **out)
{
    *out = NULL;
    worker_send(worker, request, vectors, bytes);
    if (worker->send_only)
        return ICE_OK;
    Icecache__Wire__Reply *reply;
    ice_status status = worker_receive(worker, &reply);
    if (status != ICE_OK)
        return status;
    assert_int_equal(reply->request_id, request->request_id);
    assert_int_equal(reply->boot_token, worker->boot_token);
    status = keep_text(worker, reply->status, reply->text);
    if (status == ICE_OK)
        *out = reply;
    else
        icecache__wire__reply__free_unpacked(reply, NULL);
    return status;
}

static void done(Icecache__Wire__Reply *reply)
{
    if (reply)
        icecache__wire__reply__free_unpacked(reply, NULL);
}

ice_status worker_open_sequence(struct worker *worker)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__SequenceOpen open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    Icecache__Wire__Reply *reply;
    uint8_t digest = 1;
    open.model_digest.data = &digest;
    open.model_digest.len = 1;
    open.layers = LAYERS;
    open.kv_heads = KV_HEADS;
    open.query_heads = QUERY_HEADS;
    open.head_dim = HEAD_DIM;
    open.dtype = DTYPE_FP32;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN;
    request.sequence_open = &open;
    ice_status status = exchange(worker, &request, NULL, 0, &reply);
    if (reply)
        worker->sequence_id = reply->sequence_open->sequence_id;
    done(reply);
    return status;
}

// The staging's content, K [layer][kv_head][token][head_dim], then V.
static void walk_staging(struct worker *worker, uint64_t first, uint32_t tokens, bool write)
{
    float *at = (float *)(void *)worker->staging;
    for (int value = 0; value < 2; value++)
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            for (uint32_t head = 0; head < KV_HEADS; head++)
                for (uint64_t position = first; position < first + tokens; position++)
                    for (uint32_t i = 0; i < HEAD_DIM; i++, at++) {
                        float expected = worker_element(value, layer, head, position, i);
                        if (write)
                            *at = expected;
                        else
                            assert_true(*at == expected);
                    }
}

static ice_status append(struct worker *worker, uint64_t first, uint32_t tokens, uint64_t reserve)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Append body = ICECACHE__WIRE__APPEND__INIT;
    Icecache__Wire__Reply *reply;
    walk_staging(worker, first, tokens, true);
    body.sequence_id = worker->sequence_id;
    body.layers = LAYERS;
    body.first = first;
    body.tokens = tokens;
    body.reserve_tokens = reserve;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = &body;
    ice_status status = exchange(worker, &request, NULL, 0, &reply);
    if (reply)
        assert_int_equal(reply->append->length, first + tokens);
    done(reply);
    return status;
}

ice_status worker_append_first(struct worker *worker)
{
    return append(worker, 0, FIRST_PART, TOKENS);
}

ice_status worker_append_rest(struct worker *worker)
{
    return append(worker, FIRST_PART, TOKENS - FIRST_PART, 0);
}

// Every slot holds the K and V of the position that stands beside it; sinks and window are there.
static void check_landing(const struct worker *worker, uint32_t layer)
{
    const uint8_t *block = worker->landing + layer * worker->layout.block_bytes;
    const uint32_t *counts = (const uint32_t *)(const void *)(block + worker->layout.counts_offset);
    const uint32_t *positions = (const uint32_t *)(const void *)(block + worker->layout.positions_offset);
    for (uint32_t head = 0; head < KV_HEADS; head++) {
        const uint8_t *data = block + head * worker->layout.head_bytes;
        bool seen[TOKENS + 1] = {false};
        assert_in_range(counts[head], SINKS + WINDOW, SLOTS);
        for (uint32_t slot = 0; slot < counts[head]; slot++) {
            uint32_t position = positions[head * SLOTS + slot];
            assert_in_range(position, 0, TOKENS);
            assert_false(seen[position]);
            seen[position] = true;
            for (uint32_t i = 0; i < HEAD_DIM; i++) {
                float key, value;
                memcpy(&key, data + slot * ROW_BYTES + i * 4, 4);
                memcpy(&value, data + worker->layout.side_bytes + slot * ROW_BYTES + i * 4, 4);
                assert_true(key == worker_element(false, layer, head, position, i));
                assert_true(value == worker_element(true, layer, head, position, i));
            }
        }
        for (uint32_t i = 0; i < SINKS; i++)
            assert_true(seen[i]);
        for (uint32_t i = 0; i < WINDOW; i++)
            assert_true(seen[TOKENS - i]);
    }
}

ice_status worker_retrieve(struct worker *worker, uint32_t layer)
{
    float vectors[(QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM];
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Retrieve body = ICECACHE__WIRE__RETRIEVE__INIT;
    Icecache__Wire__Reply *reply;
    uint64_t sequence = worker->sequence_id, first = TOKENS;
    uint32_t row = 0;
    for (uint32_t i = 0; i < QUERY_HEADS * HEAD_DIM; i++)
        vectors[i] = worker_element(false, layer, i / HEAD_DIM / 2, 17, i % HEAD_DIM);
    for (uint32_t i = 0; i < 2 * KV_HEADS * HEAD_DIM; i++)
        vectors[QUERY_HEADS * HEAD_DIM + i] =
            worker_element(i >= KV_HEADS * HEAD_DIM, layer, i / HEAD_DIM % KV_HEADS, TOKENS, i % HEAD_DIM);
    body.landing_id = worker->landing_id;
    body.layer = layer;
    body.n_sequence_ids = body.n_rows = body.n_first_queries = 1;
    body.sequence_ids = &sequence;
    body.rows = &row;
    body.first_queries = &first;
    body.queries = 1;
    body.query_dtype = DTYPE_FP32;
    body.budget = BUDGET;
    body.sinks = SINKS;
    body.window = WINDOW;
    body.append = true;
    body.want_positions = true;
    body.deadline_us = 10000000;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &body;
    ice_status status = exchange(worker, &request, vectors, sizeof vectors, &reply);
    if (reply)
        check_landing(worker, layer);
    done(reply);
    return status;
}

ice_status worker_read(struct worker *worker)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Read body = ICECACHE__WIRE__READ__INIT;
    Icecache__Wire__Reply *reply;
    memset(worker->staging, 0, STAGING_BYTES);
    body.sequence_id = worker->sequence_id;
    body.layers = LAYERS;
    body.tokens = TOKENS + 1;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_READ;
    request.read = &body;
    ice_status status = exchange(worker, &request, NULL, 0, &reply);
    if (reply)
        walk_staging(worker, 0, TOKENS + 1, false);
    done(reply);
    return status;
}

ice_status worker_wait_clustered(struct worker *worker)
{
    for (int ms = 0; ms < CLUSTER_DEADLINE_MS; ms += 2) {
        Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
        Icecache__Wire__SequenceInfo body = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
        Icecache__Wire__Reply *reply;
        body.sequence_id = worker->sequence_id;
        request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
        request.sequence_info = &body;
        ice_status status = exchange(worker, &request, NULL, 0, &reply);
        bool idle = reply && reply->sequence_info->idle && reply->sequence_info->indexed[0] > 0;
        done(reply);
        if (status != ICE_OK || idle || worker->send_only)
            return status;
        sleep_ms(2);
    }
    fail_msg("the tail was not clustered in time");
    return ICE_TIMEOUT;
}

ice_status worker_close_sequence(struct worker *worker)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__SequenceClose body = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT;
    Icecache__Wire__Reply *reply;
    body.sequence_id = worker->sequence_id;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
    request.sequence_close = &body;
    ice_status status = exchange(worker, &request, NULL, 0, &reply);
    done(reply);
    return status;
}

// ---- the whole session ----

static ice_status retrieve_first(struct worker *worker)
{
    return worker_retrieve(worker, 0);
}

static ice_status retrieve_last(struct worker *worker)
{
    return worker_retrieve(worker, LAYERS - 1);
}

const struct step worker_steps[] = {
    {"staging", worker_open_staging},   {"landing", worker_open_landing},        {"open", worker_open_sequence},
    {"append", worker_append_first},    {"append rest", worker_append_rest},     {"retrieve", retrieve_first},
    {"retrieve again", retrieve_first}, {"retrieve last", retrieve_last},        {"read", worker_read},
    {"cluster", worker_wait_clustered}, {"retrieve clustered", retrieve_first},  {"read clustered", worker_read},
    {"close", worker_close_sequence},   {"close landing", worker_close_landing},
};
const uint32_t worker_step_count = sizeof worker_steps / sizeof *worker_steps;

ice_status worker_session(struct worker *worker, const char *sockets, const char **step)
{
    const char *name = "hello";
    ice_status status = worker_hello(worker, sockets);
    for (uint32_t i = 0; status == ICE_OK && i < worker_step_count; i++) {
        name = worker_steps[i].name;
        status = worker_steps[i].run(worker);
    }
    if (step)
        *step = name;
    return status;
}

void worker_send_step(struct worker *worker, uint32_t step)
{
    worker->send_only = true;
    assert_int_equal(worker_steps[step].run(worker), ICE_OK);
    worker->send_only = false;
}

// ---- statistics ----

ice_status worker_stats(struct worker *worker, struct held *held)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Stats body = ICECACHE__WIRE__STATS__INIT;
    Icecache__Wire__Reply *reply;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &body;
    ice_status status = exchange(worker, &request, NULL, 0, &reply);
    if (reply) {
        const Icecache__Wire__StatsReply *stats = reply->stats;
        assert_int_equal(stats->n_sequence, stats->sequences);
        *held = (struct held){stats->sessions, stats->sequences, stats->pool_bytes, stats->index_bytes,
                              stats->shared_bytes};
        assert_true((stats->pool_bytes == 0) == (stats->pages == 0));
    }
    done(reply);
    return status;
}

void worker_expect_nothing_held(const char *sockets)
{
    struct worker admin;
    struct held held = {0};
    worker_init(&admin);
    admin.admin = true;
    assert_int_equal(worker_hello(&admin, sockets), ICE_OK);
    for (int ms = 0;; ms += 2) {
        assert_int_equal(worker_stats(&admin, &held), ICE_OK);
        if (held.sessions + held.sequences + held.pool_bytes + held.index_bytes + held.shared_bytes == 0)
            break;
        if (ms >= RECLAIM_DEADLINE_MS)
            fail_msg("still held: %lu sessions, %lu sequences, %lu bytes of pool, %lu of index, %lu shared",
                     held.sessions, held.sequences, held.pool_bytes, held.index_bytes, held.shared_bytes);
        sleep_ms(2);
    }
    worker_close(&admin);
}
