// Plain sockets and proto/. Single thread.
#include "raw.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zmq.h>

// ---- control socket ----

void raw_connect(struct raw *raw, const struct daemon *daemon)
{
    char path[128];
    *raw = (struct raw){.control_fd = -1};
    assert_int_equal(control_path(path, sizeof path, daemon->sockets, CONTROL_SOCKET_NAME), ICE_OK);
    assert_int_equal(control_connect(path, &raw->control_fd), ICE_OK);
}

raw_control_reply *raw_control_receive(struct raw *raw, int *fd_out)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size = 0;
    int fd = -1;
    ice_status status = control_receive(raw->control_fd, bytes, sizeof bytes, &size, &fd, TEST_DEADLINE_US / 1000);
    if (status == ICE_DISCONNECTED)
        return NULL;
    assert_int_equal(status, ICE_OK);
    raw_control_reply *reply = NULL;
    assert_int_equal(wire_control_reply_decode(bytes, size, &reply), ICE_OK);
    if (fd_out)
        *fd_out = fd;
    else if (fd >= 0)
        close(fd);
    return reply;
}

raw_control_reply *raw_control_bytes(struct raw *raw, const void *bytes, size_t size)
{
    assert_int_equal(control_send(raw->control_fd, bytes, size, -1, 1000), ICE_OK);
    return raw_control_receive(raw, NULL);
}

raw_control_reply *raw_control(struct raw *raw, raw_control_request *request, int *fd_out)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    request->request_id = ++raw->next_id;
    assert_true(icecache__wire__control_request__get_packed_size(request) <= sizeof bytes);
    size_t size = icecache__wire__control_request__pack(request, bytes);
    assert_int_equal(control_send(raw->control_fd, bytes, size, -1, 1000), ICE_OK);
    raw_control_reply *reply = raw_control_receive(raw, fd_out);
    if (reply)
        assert_int_equal(reply->request_id, request->request_id);
    return reply;
}

void raw_control_free(raw_control_reply *reply)
{
    if (reply)
        icecache__wire__control_reply__free_unpacked(reply, NULL);
}

raw_control_reply *raw_hello(struct raw *raw, uint32_t version, const char *name, bool admin)
{
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__Hello hello = ICECACHE__WIRE__HELLO__INIT;
    hello.protocol_version = version;
    hello.client_name = (char *)(uintptr_t)name; // packing only reads it
    hello.admin = admin;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO;
    request.hello = &hello;
    return raw_control(raw, &request, NULL);
}

void raw_data_connect(struct raw *raw)
{
    int linger = 0;
    raw->context = zmq_ctx_new();
    assert_non_null(raw->context);
    raw->socket = zmq_socket(raw->context, ZMQ_DEALER);
    assert_non_null(raw->socket);
    assert_int_equal(zmq_setsockopt(raw->socket, ZMQ_LINGER, &linger, sizeof linger), 0);
    assert_int_equal(zmq_connect(raw->socket, raw->endpoint), 0);
}

void raw_open(struct raw *raw, const struct daemon *daemon)
{
    raw_connect(raw, daemon);
    raw_control_reply *reply = raw_hello(raw, WIRE_PROTOCOL_VERSION, "raw", false);
    assert_non_null(reply);
    assert_int_equal(reply->status, ICE_OK);
    assert_int_equal(reply->body_case, ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO);
    raw->session_id = reply->hello->session_id;
    raw->boot_token = reply->hello->boot_token;
    assert_true(raw->boot_token != 0);
    assert_int_equal(reply->hello->session_token.len, sizeof raw->token);
    memcpy(raw->token, reply->hello->session_token.data, sizeof raw->token);
    assert_true(strlen(reply->hello->endpoint) < sizeof raw->endpoint);
    strcpy(raw->endpoint, reply->hello->endpoint);
    raw_control_free(reply);
    raw_data_connect(raw);
}

void raw_close(struct raw *raw)
{
    if (raw->socket)
        zmq_close(raw->socket);
    if (raw->context)
        zmq_ctx_term(raw->context);
    if (raw->control_fd >= 0)
        close(raw->control_fd);
    *raw = (struct raw){.control_fd = -1};
}

uint64_t raw_staging_open(struct raw *raw, uint64_t bytes, uint8_t **base)
{
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__StagingOpen open = ICECACHE__WIRE__STAGING_OPEN__INIT;
    int fd = -1;
    open.bytes = bytes;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN;
    request.staging_open = &open;
    raw_control_reply *reply = raw_control(raw, &request, &fd);
    assert_non_null(reply);
    assert_int_equal(reply->status, ICE_OK);
    assert_int_equal(reply->body_case, ICECACHE__WIRE__CONTROL_REPLY__BODY_STAGING);
    uint64_t size = reply->staging->bytes;
    assert_true(fd >= 0);
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(memory != MAP_FAILED);
    *base = memory;
    close(fd);
    raw_control_free(reply);
    return size;
}

uint32_t raw_landing_open(struct raw *raw, uint32_t rows, uint32_t slots, uint32_t kv_heads, uint32_t head_dim,
                          uint32_t dtype)
{
    raw_control_request request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__LandingOpen open = ICECACHE__WIRE__LANDING_OPEN__INIT;
    int fd = -1;
    open.rows = rows;
    open.layers = 1;
    open.kv_heads = kv_heads;
    open.slots = slots;
    open.head_dim = head_dim;
    open.dtype = dtype;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN;
    request.landing_open = &open;
    raw_control_reply *reply = raw_control(raw, &request, &fd);
    assert_non_null(reply);
    assert_int_equal(reply->status, ICE_OK);
    uint32_t id = reply->landing->landing_id;
    assert_true(fd >= 0);
    close(fd);
    raw_control_free(reply);
    return id;
}

// ---- data plane ----

void raw_request_init(struct raw *raw, raw_request *request)
{
    icecache__wire__request__init(request);
    request->protocol_version = WIRE_PROTOCOL_VERSION;
    request->request_id = ++raw->next_id;
    request->session_id = raw->session_id;
    request->session_token.data = raw->token;
    request->session_token.len = sizeof raw->token;
}

void raw_send_frames(struct raw *raw, const void *const *frames, const size_t *sizes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        assert_true(zmq_send(raw->socket, frames[i], sizes[i], i + 1 < count ? ZMQ_SNDMORE : 0) >= 0);
}

void raw_send(struct raw *raw, const raw_request *request, const void *vectors, size_t bytes)
{
    static uint8_t header[2 * WIRE_HEADER_BYTES_MAX];
    assert_true(icecache__wire__request__get_packed_size(request) <= sizeof header);
    const void *frames[] = {header, vectors};
    const size_t sizes[] = {icecache__wire__request__pack(request, header), bytes};
    raw_send_frames(raw, frames, sizes, vectors ? 2 : 1);
}

raw_reply *raw_receive_try(struct raw *raw, int timeout_ms)
{
    zmq_msg_t message;
    assert_int_equal(zmq_setsockopt(raw->socket, ZMQ_RCVTIMEO, &timeout_ms, sizeof timeout_ms), 0);
    assert_int_equal(zmq_msg_init(&message), 0);
    raw_reply *reply = NULL;
    if (zmq_msg_recv(&message, raw->socket, 0) >= 0) {
        assert_int_equal(wire_reply_decode(zmq_msg_data(&message), zmq_msg_size(&message), &reply), ICE_OK);
        assert_int_equal(reply->boot_token, raw->boot_token);
    }
    zmq_msg_close(&message);
    return reply;
}

raw_reply *raw_receive(struct raw *raw)
{
    raw_reply *reply = raw_receive_try(raw, TEST_DEADLINE_US / 1000);
    assert_non_null(reply);
    return reply;
}

raw_reply *raw_call(struct raw *raw, const raw_request *request, const void *vectors, size_t bytes)
{
    raw_send(raw, request, vectors, bytes);
    raw_reply *reply = raw_receive(raw);
    assert_int_equal(reply->request_id, request->request_id);
    return reply;
}

void raw_free(raw_reply *reply)
{
    if (reply)
        icecache__wire__reply__free_unpacked(reply, NULL);
}

uint64_t raw_sequence_open(struct raw *raw, uint32_t layers, uint32_t kv_heads, uint32_t query_heads, uint32_t head_dim,
                           uint32_t dtype)
{
    raw_request request;
    Icecache__Wire__SequenceOpen open = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    uint8_t digest[] = "digest";
    raw_request_init(raw, &request);
    open.model_digest.data = digest;
    open.model_digest.len = sizeof digest;
    open.layers = layers;
    open.kv_heads = kv_heads;
    open.query_heads = query_heads;
    open.head_dim = head_dim;
    open.dtype = dtype;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN;
    request.sequence_open = &open;
    raw_reply *reply = raw_call(raw, &request, NULL, 0);
    assert_int_equal(reply->status, ICE_OK);
    uint64_t id = reply->sequence_open->sequence_id;
    raw_free(reply);
    return id;
}

// ---- what came back ----

static void expect(uint32_t status, const char *text, ice_status expected, const char *part)
{
    if (status == (uint32_t)expected && (expected == ICE_OK || (text[0] != '\0' && strstr(text, part))))
        return;
    fail_msg("the daemon answers %s \"%s\", expected %s \"...%s...\"", status_name((int)status), text,
             status_name((int)expected), part);
}

void raw_expect(raw_reply *reply, ice_status status, const char *text)
{
    expect(reply->status, reply->text, status, text);
    raw_free(reply);
}

void raw_control_expect(raw_control_reply *reply, ice_status status, const char *text)
{
    assert_non_null(reply);
    expect(reply->status, reply->text, status, text);
    raw_control_free(reply);
}
