// Making and ending a session.
//
// A session is made by one thread before anybody else sees it (connect) or while it is marked dead (reconnect), so
// there is no lock here. The data socket has no routing id of ours: the daemon knows a session by its token.
#include "client/session.h"

#include "client/error.h"
#include "client/exchange.h"
#include "client/ring.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

void session_init(struct session *session)
{
    *session = (struct session){.socket_fd = -1, .control_fd = -1};
}

void session_close(struct session *session)
{
    ring_destroy(session->ring);
    if (session->socket != NULL) {
        (void)zmq_close(session->socket);
    }
    if (session->control_fd >= 0) {
        (void)close(session->control_fd);
    }
    session_init(session);
}

// Reads the daemon's answer to the hello into the session.
static ice_status hello_accept(struct session *session, const Icecache__Wire__ControlReply *reply)
{
    if (reply->status != ICE_OK) {
        ice_status status = status_is_known((int)reply->status) ? (ice_status)reply->status : ICE_INTERNAL;
        bool told = reply->text != NULL && reply->text[0] != '\0';
        return error_set(status, "the daemon refused the session: %s", told ? reply->text : status_text((int)status));
    }
    const Icecache__Wire__HelloReply *hello =
        reply->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO ? reply->hello : NULL;
    if (hello == NULL || hello->session_token.len != WIRE_SESSION_TOKEN_BYTES || hello->endpoint == NULL ||
        strncmp(hello->endpoint, "ipc://", 6) != 0 || strlen(hello->endpoint) >= sizeof session->endpoint) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's hello is not complete; install the same release of both");
    }
    session->id = hello->session_id;
    session->boot_token = hello->boot_token;
    session->vectors_bytes_max = hello->vectors_bytes_max > 0 && hello->vectors_bytes_max < WIRE_VECTORS_BYTES_MAX
                                     ? hello->vectors_bytes_max
                                     : WIRE_VECTORS_BYTES_MAX;
    session->ring_bytes = hello->ring_bytes;
    memcpy(session->token, hello->session_token.data, WIRE_SESSION_TOKEN_BYTES);
    memcpy(session->endpoint, hello->endpoint, strlen(hello->endpoint) + 1);
    return ICE_OK;
}

static ice_status hello_exchange(struct session *session, const char *name, const char *name_space, uint64_t until_us)
{
    Icecache__Wire__Hello hello = ICECACHE__WIRE__HELLO__INIT;
    hello.protocol_version = WIRE_PROTOCOL_VERSION;
    // The generated field is not const, but packing only reads it.
    char copy[WIRE_NAME_BYTES_MAX + 1];
    (void)strncpy(copy, name, sizeof copy - 1);
    copy[sizeof copy - 1] = '\0';
    hello.client_name = copy;
    hello.name_space = (char *)(uintptr_t)name_space;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    request.request_id = 1;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO;
    request.hello = &hello;

    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    size_t size = icecache__wire__control_request__get_packed_size(&request);
    if (size > sizeof packet) {
        return error_set(ICE_TOO_LARGE, "the client's name is too long");
    }
    (void)icecache__wire__control_request__pack(&request, packet);
    ice_status status = control_send(session->control_fd, packet, size, -1, clock_left_ms(until_us));
    // A daemon that takes no more sessions says why and closes, without reading. Its answer is still to be had then,
    // behind the news of the closing, of which the send and the first receive may each have a part.
    if (status != ICE_OK && status != ICE_DISCONNECTED) {
        return error_set(status, "hello could not be sent: %s", status_text((int)status));
    }
    int fd = -1;
    status = control_receive(session->control_fd, packet, sizeof packet, &size, &fd, clock_left_ms(until_us));
    if (status == ICE_DISCONNECTED) {
        status = control_receive(session->control_fd, packet, sizeof packet, &size, &fd, 0);
    }
    if (status != ICE_OK) {
        return error_set(status, "the daemon did not answer the hello: %s", status_text((int)status));
    }
    if (fd >= 0) {
        (void)close(fd);
    }
    Icecache__Wire__ControlReply *reply = NULL;
    status = wire_control_reply_decode(packet, size, &reply);
    if (status != ICE_OK) {
        return error_set(status, "the daemon's hello cannot be decoded: %s", status_text((int)status));
    }
    status = hello_accept(session, reply);
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

static bool socket_option(void *socket, int option, int value)
{
    return zmq_setsockopt(socket, option, &value, sizeof value) == 0;
}

// Until the data socket takes messages. With ZMQ_IMMEDIATE that is when the connection is made.
static ice_status data_wait(struct session *session, uint64_t until_us)
{
    for (;;) {
        zmq_pollitem_t items[] = {
            {.socket = session->socket, .events = ZMQ_POLLOUT},
            {.fd = session->control_fd, .events = ZMQ_POLLIN},
        };
        int left_ms = clock_left_ms(until_us);
        int ready = zmq_poll(items, 2, left_ms);
        if (ready < 0 && errno != EINTR) {
            return error_set(ICE_SYSTEM, "zmq_poll: %s", zmq_strerror(errno));
        }
        if (ready > 0 && (items[0].revents & ZMQ_POLLOUT) != 0) {
            return ICE_OK;
        }
        if (ready > 0 && items[1].revents != 0) {
            return error_set(ICE_DISCONNECTED, "the daemon closed the control socket during the hello");
        }
        if (left_ms == 0) {
            return error_set(ICE_TIMEOUT, "no connection to %s within the deadline", session->endpoint);
        }
    }
}

static ice_status data_connect(struct session *session, void *context, uint64_t until_us)
{
    session->socket = zmq_socket(context, ZMQ_DEALER);
    if (session->socket == NULL) {
        return error_set(ICE_SYSTEM, "zmq_socket: %s", zmq_strerror(errno));
    }
    int64_t message_bytes_max = WIRE_REPLY_BYTES_MAX;
    size_t size = sizeof session->socket_fd;
    // The marks leave room for every request of the table twice, so that only a lost connection stops a send.
    if (!socket_option(session->socket, ZMQ_LINGER, 0) || !socket_option(session->socket, ZMQ_IMMEDIATE, 1) ||
        !socket_option(session->socket, ZMQ_SNDHWM, (int)(2 * EXCHANGE_REQUESTS_MAX)) ||
        !socket_option(session->socket, ZMQ_RCVHWM, (int)(2 * EXCHANGE_REQUESTS_MAX)) ||
        !socket_option(session->socket, ZMQ_RECONNECT_IVL_MAX, 1000) ||
        zmq_setsockopt(session->socket, ZMQ_MAXMSGSIZE, &message_bytes_max, sizeof message_bytes_max) != 0 ||
        zmq_getsockopt(session->socket, ZMQ_FD, &session->socket_fd, &size) != 0) {
        return error_set(ICE_SYSTEM, "an option of the data socket: %s", zmq_strerror(errno));
    }
    if (zmq_connect(session->socket, session->endpoint) != 0) {
        return error_set(ICE_NO_DAEMON, "zmq_connect %s: %s", session->endpoint, zmq_strerror(errno));
    }
    return data_wait(session, until_us);
}

// Rings where they are wanted and to be had, else ZeroMQ.
static ice_status transport_connect(struct session *session, const struct session_options *options, uint64_t until_us)
{
    if (options->transport == ICE_TRANSPORT_RING && session->ring_bytes == 0) {
        return error_set(ICE_NOT_SUPPORTED, "the daemon offers no rings (--ring-bytes 0); use another transport");
    }
    if (options->transport != ICE_TRANSPORT_ZMQ && session->ring_bytes > 0) {
        const ice_status status = ring_connect(session, options->wake_fd, until_us, &session->ring);
        if (status == ICE_OK || options->transport == ICE_TRANSPORT_RING ||
            status_scope((int)status) != ICE_SCOPE_REQUEST) {
            return status;
        }
        error_clear(); // the daemon has no memory for them, or we: the session itself is sound
    }
    return data_connect(session, options->context, until_us);
}

ice_status session_connect(struct session *session, const struct session_options *options, uint64_t until_us)
{
    const char *directory = options->directory;
    char path[108];
    ice_status status = control_path(path, sizeof path, directory, CONTROL_SOCKET_NAME);
    if (status != ICE_OK) {
        return error_set(status, "the socket directory %s is too long", directory);
    }
    struct session fresh;
    session_init(&fresh);
    status = control_connect(path, &fresh.control_fd);
    if (status != ICE_OK) {
        fresh.control_fd = -1;
        return error_set(status, "%s: %s", path, status_text((int)status));
    }
    status = hello_exchange(&fresh, options->name, options->name_space, until_us);
    if (status == ICE_OK) {
        status = transport_connect(&fresh, options, until_us);
    }
    if (status != ICE_OK) {
        session_close(&fresh);
        return status;
    }
    *session = fresh;
    return ICE_OK;
}
