// An admin session for icecachectl. Single thread. Every wait ends after timeout_ms.
#include "cached/ctl_connection.h"

#include "proto/control.h"
#include "proto/limits.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

static ice_status fail(struct ctl_connection *connection, ice_status status, const char *text)
{
    snprintf(connection->error, sizeof connection->error, "%s", text && text[0] ? text : status_text((int)status));
    return status;
}

static ice_status take_hello(struct ctl_connection *connection, const Icecache__Wire__ControlReply *reply,
                             char *endpoint, size_t capacity)
{
    if (reply->status != ICE_OK)
        return fail(connection, (ice_status)reply->status, reply->text);
    if (reply->body_case != ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO ||
        reply->hello->session_token.len != sizeof connection->session_token)
        return fail(connection, ICE_BAD_MESSAGE, NULL);
    connection->session_id = reply->hello->session_id;
    memcpy(connection->session_token, reply->hello->session_token.data, sizeof connection->session_token);
    snprintf(connection->daemon_version, sizeof connection->daemon_version, "%s", reply->hello->daemon_version);
    snprintf(endpoint, capacity, "%s", reply->hello->endpoint);
    return ICE_OK;
}

static ice_status greet(struct ctl_connection *connection, char *endpoint, size_t capacity)
{
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__Hello hello = ICECACHE__WIRE__HELLO__INIT;
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    hello.protocol_version = WIRE_PROTOCOL_VERSION;
    hello.client_name = (char *)"icecachectl";
    hello.admin = true;
    request.request_id = 1;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO;
    request.hello = &hello;
    size_t size = icecache__wire__control_request__pack(&request, bytes);
    int fd = -1;
    ice_status status = control_send(connection->control_fd, bytes, size, -1, connection->timeout_ms);
    // A daemon that takes no more sessions says why and closes, without reading: the answer lies behind the closing.
    if (status == ICE_OK || status == ICE_DISCONNECTED)
        status = control_receive(connection->control_fd, bytes, sizeof bytes, &size, &fd, connection->timeout_ms);
    if (status == ICE_DISCONNECTED)
        status = control_receive(connection->control_fd, bytes, sizeof bytes, &size, &fd, 0);
    if (fd >= 0)
        close(fd);
    Icecache__Wire__ControlReply *reply = NULL;
    if (status == ICE_OK)
        status = wire_control_reply_decode(bytes, size, &reply);
    if (status != ICE_OK)
        return fail(connection, status, NULL);
    status = take_hello(connection, reply, endpoint, capacity);
    icecache__wire__control_reply__free_unpacked(reply, NULL);
    return status;
}

ice_status ctl_connect(struct ctl_connection *connection, const char *directory, int timeout_ms)
{
    *connection = (struct ctl_connection){.control_fd = -1, .timeout_ms = timeout_ms};
    char path[128], endpoint[160];
    ice_status status = control_path(path, sizeof path, directory, CONTROL_SOCKET_NAME);
    if (status == ICE_OK)
        status = control_connect(path, &connection->control_fd);
    if (status != ICE_OK) {
        snprintf(connection->error, sizeof connection->error, "%s: %s", directory, status_text((int)status));
        return status;
    }
    status = greet(connection, endpoint, sizeof endpoint);
    if (status != ICE_OK)
        return status;
    int linger = 0;
    connection->context = zmq_ctx_new();
    connection->socket = connection->context ? zmq_socket(connection->context, ZMQ_DEALER) : NULL;
    if (!connection->socket || zmq_setsockopt(connection->socket, ZMQ_LINGER, &linger, sizeof linger) ||
        zmq_setsockopt(connection->socket, ZMQ_RCVTIMEO, &timeout_ms, sizeof timeout_ms) ||
        zmq_setsockopt(connection->socket, ZMQ_SNDTIMEO, &timeout_ms, sizeof timeout_ms) ||
        zmq_connect(connection->socket, endpoint))
        return fail(connection, ICE_SYSTEM, zmq_strerror(zmq_errno()));
    return ICE_OK;
}

static ice_status receive_reply(struct ctl_connection *connection, Icecache__Wire__Reply__BodyCase body,
                                Icecache__Wire__Reply **out)
{
    zmq_msg_t message;
    zmq_msg_init(&message);
    ice_status status = ICE_TIMEOUT;
    if (zmq_msg_recv(&message, connection->socket, 0) >= 0)
        status = wire_reply_decode(zmq_msg_data(&message), zmq_msg_size(&message), out);
    zmq_msg_close(&message);
    if (status != ICE_OK)
        return fail(connection, status, NULL);
    if ((*out)->status != ICE_OK || (*out)->body_case != body) {
        status = (*out)->status != ICE_OK ? (ice_status)(*out)->status : ICE_BAD_MESSAGE;
        status = fail(connection, status, (*out)->text);
        icecache__wire__reply__free_unpacked(*out, NULL);
    }
    return status;
}

// Sends a request with its body set, and waits for a reply with this body.
static ice_status ask(struct ctl_connection *connection, Icecache__Wire__Request *request,
                      Icecache__Wire__Reply__BodyCase body, Icecache__Wire__Reply **out)
{
    uint8_t bytes[256];
    request->protocol_version = WIRE_PROTOCOL_VERSION;
    request->request_id = 1;
    request->session_id = connection->session_id;
    request->session_token.data = connection->session_token;
    request->session_token.len = sizeof connection->session_token;
    size_t size = icecache__wire__request__pack(request, bytes);
    if (zmq_send(connection->socket, bytes, size, 0) < 0)
        return fail(connection, ICE_TIMEOUT, NULL);
    return receive_reply(connection, body, out);
}

ice_status ctl_stats(struct ctl_connection *connection, uint32_t sequences_from, Icecache__Wire__Reply **out)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Stats stats = ICECACHE__WIRE__STATS__INIT;
    stats.sequences_from = sequences_from;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &stats;
    return ask(connection, &request, ICECACHE__WIRE__REPLY__BODY_STATS, out);
}

ice_status ctl_prefixes(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__PrefixList list = ICECACHE__WIRE__PREFIX_LIST__INIT;
    list.from = from;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST;
    request.prefix_list = &list;
    return ask(connection, &request, ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST, out);
}

ice_status ctl_leases(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__LeaseList list = ICECACHE__WIRE__LEASE_LIST__INIT;
    list.from = from;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST;
    request.lease_list = &list;
    return ask(connection, &request, ICECACHE__WIRE__REPLY__BODY_LEASE_LIST, out);
}

ice_status ctl_namespaces(struct ctl_connection *connection, uint32_t from, Icecache__Wire__Reply **out)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__NamespaceList list = ICECACHE__WIRE__NAMESPACE_LIST__INIT;
    list.from = from;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST;
    request.namespace_list = &list;
    return ask(connection, &request, ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST, out);
}

ice_status ctl_remove_prefix(struct ctl_connection *connection, uint64_t prefix_id)
{
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__PrefixRemove removal = ICECACHE__WIRE__PREFIX_REMOVE__INIT;
    Icecache__Wire__Reply *reply;
    removal.prefix_id = prefix_id;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    request.prefix_remove = &removal;
    ice_status status = ask(connection, &request, ICECACHE__WIRE__REPLY__BODY__NOT_SET, &reply);
    if (status == ICE_OK)
        icecache__wire__reply__free_unpacked(reply, NULL);
    return status;
}

void ctl_close(struct ctl_connection *connection)
{
    if (connection->socket)
        zmq_close(connection->socket);
    if (connection->context)
        zmq_ctx_term(connection->context);
    if (connection->control_fd >= 0)
        close(connection->control_fd);
}
