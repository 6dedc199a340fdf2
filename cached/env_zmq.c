// The data bus over ZeroMQ: a ROUTER bound to ipc://path. Routing ids are ZeroMQ's own (clients set none), sends are
// mandatory and never wait, so that a slow or dead peer is an error code and never a stall. Used by the reactor only.
#include "cached/env_linux.h"

#include "proto/limits.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zmq.h>

struct env_bus {
    void *context, *socket;
};

struct frames {
    zmq_msg_t header, vectors;
};

static int set_int(void *socket, int option, int value)
{
    return zmq_setsockopt(socket, option, &value, sizeof value);
}

static int configure(void *socket)
{
    int64_t frame_bytes_max = WIRE_VECTORS_BYTES_MAX;
    return set_int(socket, ZMQ_LINGER, 0) || set_int(socket, ZMQ_ROUTER_MANDATORY, 1) ||
           set_int(socket, ZMQ_SNDHWM, 1024) || set_int(socket, ZMQ_RCVHWM, 1024) ||
           zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &frame_bytes_max, sizeof frame_bytes_max);
}

static void bus_close(struct env *env, struct env_bus *bus)
{
    (void)env;
    if (!bus)
        return;
    if (bus->socket)
        zmq_close(bus->socket);
    if (bus->context)
        zmq_ctx_term(bus->context); // LINGER is 0: returns at once
    free(bus);
}

static int bus_open(struct env *env, const char *path, mode_t mode, struct env_bus **out)
{
    struct env_bus *bus = calloc(1, sizeof *bus);
    char endpoint[128];
    if (!bus)
        return -ENOMEM;
    int error = 0;
    snprintf(endpoint, sizeof endpoint, "ipc://%s", path);
    bus->context = zmq_ctx_new();
    bus->socket = bus->context ? zmq_socket(bus->context, ZMQ_ROUTER) : NULL;
    if (!bus->socket || configure(bus->socket) || zmq_bind(bus->socket, endpoint) || chmod(path, mode))
        error = errno ? errno : EIO;
    if (error) {
        bus_close(env, bus);
        return -error;
    }
    *out = bus;
    return 0;
}

static int bus_fd(struct env *env, struct env_bus *bus)
{
    (void)env;
    int fd = -1;
    size_t size = sizeof fd;
    return zmq_getsockopt(bus->socket, ZMQ_FD, &fd, &size) ? -1 : fd;
}

static bool more(struct env_bus *bus)
{
    int value = 0;
    size_t size = sizeof value;
    return zmq_getsockopt(bus->socket, ZMQ_RCVMORE, &value, &size) == 0 && value;
}

// "localhost:uid:gid:pid", from the kernel's credentials of the connection.
static void read_peer(zmq_msg_t *message, struct env_message *out)
{
    out->peer_pid = 0;
    out->peer_uid = (uid_t)-1;
    const char *address = zmq_msg_gets(message, "Peer-Address");
    long uid, gid, pid;
    const char *numbers = address ? strchr(address, ':') : NULL;
    if (numbers && sscanf(numbers, ":%ld:%ld:%ld", &uid, &gid, &pid) == 3) {
        out->peer_uid = (uid_t)uid;
        out->peer_pid = (pid_t)pid;
    }
}

// Takes the frames behind the routing id; surplus ones are read and dropped, so that the next message starts clean.
static void receive_frames(struct env_bus *bus, struct frames *frames, struct env_message *out)
{
    for (uint32_t i = 0; more(bus); i++) {
        zmq_msg_t surplus, *target = i == 0 ? &frames->header : i == 1 ? &frames->vectors : &surplus;
        zmq_msg_init(&surplus);
        if (zmq_msg_recv(target, bus->socket, 0) < 0)
            break;
        if (i == 0)
            read_peer(target, out);
        out->surplus_frames += i >= WIRE_FRAMES_MAX;
        zmq_msg_close(&surplus);
    }
}

static int bus_receive(struct env *env, struct env_bus *bus, struct env_message *out)
{
    (void)env;
    zmq_msg_t route;
    zmq_msg_init(&route);
    int received;
    do // -EAGAIN must mean empty: after it the reactor waits for the descriptor, which may have said all it has to say
        received = zmq_msg_recv(&route, bus->socket, ZMQ_DONTWAIT);
    while (received < 0 && errno == EINTR);
    if (received < 0)
        return -errno;
    *out = (struct env_message){0};
    out->route_bytes = zmq_msg_size(&route); // at most 255 by ZeroMQ's own rule
    memcpy(out->route, zmq_msg_data(&route), out->route_bytes);
    zmq_msg_close(&route);

    struct frames *frames = malloc(sizeof *frames);
    struct frames dropped;
    struct frames *target = frames ? frames : &dropped;
    zmq_msg_init(&target->header);
    zmq_msg_init(&target->vectors);
    receive_frames(bus, target, out);
    if (!frames) { // no memory for the handle: the sender's deadline tells it
        zmq_msg_close(&dropped.header);
        zmq_msg_close(&dropped.vectors);
        return -ENOMEM;
    }
    out->handle = frames;
    out->header = zmq_msg_data(&frames->header);
    out->header_bytes = zmq_msg_size(&frames->header);
    out->vectors = zmq_msg_data(&frames->vectors);
    out->vectors_bytes = zmq_msg_size(&frames->vectors);
    return 0;
}

static void bus_release(struct env *env, struct env_message *message)
{
    (void)env;
    struct frames *frames = message->handle;
    if (!frames)
        return;
    zmq_msg_close(&frames->header);
    zmq_msg_close(&frames->vectors);
    free(frames);
    message->handle = NULL;
}

// One frame; a signal is no reason to lose it.
static int send_frame(struct env_bus *bus, zmq_msg_t *frame, int flags)
{
    int sent;
    do
        sent = zmq_msg_send(frame, bus->socket, flags | ZMQ_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

// Both frames are made before the first is sent: a message left open behind its route would take the next message's
// frames, which are another worker's.
static int bus_send(struct env *env, struct env_bus *bus, const uint8_t *route, size_t route_bytes, const void *bytes,
                    size_t size)
{
    (void)env;
    zmq_msg_t address, body;
    if (zmq_msg_init_size(&address, route_bytes))
        return -ENOMEM;
    if (zmq_msg_init_size(&body, size)) {
        zmq_msg_close(&address);
        return -ENOMEM;
    }
    memcpy(zmq_msg_data(&address), route, route_bytes);
    memcpy(zmq_msg_data(&body), bytes, size);
    int error = send_frame(bus, &address, ZMQ_SNDMORE);
    if (!error)
        error = send_frame(bus, &body, 0);
    zmq_msg_close(&address);
    zmq_msg_close(&body);
    return error;
}

void env_zmq_init(struct env *env)
{
    env->bus_open = bus_open;
    env->bus_close = bus_close;
    env->bus_fd = bus_fd;
    env->bus_receive = bus_receive;
    env->bus_release = bus_release;
    env->bus_send = bus_send;
}
