// The protocol without the client library: what a faulty or hostile worker may send.
#ifndef ICECACHE_TESTS_RAW_H
#define ICECACHE_TESTS_RAW_H

#include "daemon.h"

#include "proto/control.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/wire.h"

typedef Icecache__Wire__Request raw_request;
typedef Icecache__Wire__Reply raw_reply;
typedef Icecache__Wire__ControlRequest raw_control_request;
typedef Icecache__Wire__ControlReply raw_control_reply;

struct raw {
    int control_fd;
    void *context, *socket; // the data plane, after raw_open
    uint64_t session_id, boot_token, next_id;
    uint8_t token[WIRE_SESSION_TOKEN_BYTES];
    char endpoint[160];
};

// The control socket only; no hello.
void raw_connect(struct raw *raw, const struct daemon *daemon);
// Hello and data socket too.
void raw_open(struct raw *raw, const struct daemon *daemon);
void raw_data_connect(struct raw *raw); // with the endpoint of the hello
void raw_close(struct raw *raw);

// Control socket. The reply is the caller's: free with raw_control_free. *fd_out: a descriptor that came along, or -1.
raw_control_reply *raw_control(struct raw *raw, raw_control_request *request, int *fd_out);
raw_control_reply *raw_control_bytes(struct raw *raw, const void *bytes, size_t size);
raw_control_reply *raw_control_receive(struct raw *raw, int *fd_out); // NULL: the daemon has closed the socket
void raw_control_free(raw_control_reply *reply);
raw_control_reply *raw_hello(struct raw *raw, uint32_t version, const char *name, bool admin);
uint64_t raw_staging_open(struct raw *raw, uint64_t bytes, uint8_t **base); // mapped; answers its size
uint32_t raw_landing_open(struct raw *raw, uint32_t rows, uint32_t slots, uint32_t kv_heads, uint32_t head_dim,
                          uint32_t dtype);

// Data plane. raw_request_init fills in version, id, session and token.
void raw_request_init(struct raw *raw, raw_request *request);
void raw_send_frames(struct raw *raw, const void *const *frames, const size_t *sizes, size_t count);
void raw_send(struct raw *raw, const raw_request *request, const void *vectors, size_t bytes); // NULL: one frame
raw_reply *raw_receive(struct raw *raw);                     // fails the test at the deadline
raw_reply *raw_receive_try(struct raw *raw, int timeout_ms); // NULL: none came
raw_reply *raw_call(struct raw *raw, const raw_request *request, const void *vectors, size_t bytes);
void raw_free(raw_reply *reply);
uint64_t raw_sequence_open(struct raw *raw, uint32_t layers, uint32_t kv_heads, uint32_t query_heads, uint32_t head_dim,
                           uint32_t dtype);

// Status and a part of the text; frees the reply.
void raw_expect(raw_reply *reply, ice_status status, const char *text);
void raw_control_expect(raw_control_reply *reply, ice_status status, const char *text);

#endif
