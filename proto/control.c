// The control socket: whole packets with a deadline, descriptors beside them.
//
// Invariants: no call waits longer than its deadline (signals do not extend it); no descriptor that a peer sends stays
// open unless the caller gets it; every descriptor made here is CLOEXEC; SIGPIPE is never raised.
// Threads: stateless; any thread, one at a time per socket.
#include "proto/control.h"

#include "proto/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static ice_status format_status(int length, size_t capacity)
{
    if (length < 0) {
        return ICE_SYSTEM;
    }
    return (size_t)length < capacity ? ICE_OK : ICE_TOO_LARGE;
}

ice_status control_default_directory(char *path, size_t capacity)
{
    const char *directory = getenv("ICECACHE_SOCKET_DIR");
    if (directory && *directory) {
        return format_status(snprintf(path, capacity, "%s", directory), capacity);
    }
    if (geteuid() == 0) {
        return format_status(snprintf(path, capacity, "/run/icecache"), capacity);
    }
    directory = getenv("XDG_RUNTIME_DIR");
    if (directory && *directory) {
        return format_status(snprintf(path, capacity, "%s/icecache", directory), capacity);
    }
    return format_status(snprintf(path, capacity, "/tmp/icecache-%lu", (unsigned long)geteuid()), capacity);
}

ice_status control_path(char *path, size_t capacity, const char *directory, const char *name)
{
    const size_t address_bytes = sizeof(((struct sockaddr_un *)NULL)->sun_path);
    const size_t bound = capacity < address_bytes ? capacity : address_bytes;
    return format_status(snprintf(path, capacity, "%s/%s", directory, name), bound);
}

static ice_status connect_status(int error)
{
    switch (error) {
    case ENOENT:
    case ENOTDIR:
    case ECONNREFUSED:
    case EPROTOTYPE: // somebody else's stream or datagram socket
        return ICE_NO_DAEMON;
    case EACCES:
    case EPERM:
        return ICE_PERMISSION;
    case EAGAIN: // the daemon listens, its backlog is full
        return ICE_TIMEOUT;
    case ENOMEM:
    case ENOBUFS:
        return ICE_NO_MEMORY;
    default:
        return ICE_SYSTEM;
    }
}

ice_status control_connect(const char *path, int *fd_out)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const size_t length = strlen(path);
    if (length >= sizeof(address.sun_path)) {
        return ICE_TOO_LARGE;
    }
    memcpy(address.sun_path, path, length + 1);
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return connect_status(errno);
    }
    int rc;
    do {
        rc = connect(fd, (const struct sockaddr *)&address, sizeof(address));
    } while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        const int error = errno;
        close(fd);
        return connect_status(error);
    }
    *fd_out = fd;
    return ICE_OK;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int64_t deadline_ns(int deadline_ms)
{
    // No clock read where nothing is waited for. Negative counts as 0: there is no endless wait here.
    return deadline_ms > 0 ? now_ns() + (int64_t)deadline_ms * 1000000 : 0;
}

// Waits for the events or the peer's end until the deadline: ICE_OK says try again.
static ice_status wait_ready(int socket, short events, int64_t deadline)
{
    for (;;) {
        const int64_t left_ns = deadline ? deadline - now_ns() : 0;
        if (left_ns <= 0) {
            return ICE_TIMEOUT;
        }
        struct pollfd ready = {.fd = socket, .events = events};
        // Rounded up, so that the last millisecond is not spent spinning.
        const int rc = poll(&ready, 1, (int)((left_ns + 999999) / 1000000));
        if (rc > 0) {
            return ICE_OK;
        }
        if (rc < 0 && errno != EINTR) {
            return ICE_SYSTEM;
        }
    }
}

static ice_status transfer_status(int error)
{
    switch (error) {
    case EPIPE:
    case ECONNRESET:
    case ENOTCONN:
        return ICE_DISCONNECTED;
    case EMSGSIZE:
        return ICE_TOO_LARGE;
    case ENOMEM:
    case ENOBUFS:
        return ICE_NO_MEMORY;
    default:
        return ICE_SYSTEM;
    }
}

// Room for one more than is ever wanted, so that a surplus one is seen and closed here. What is beyond that the kernel
// drops by itself.
union ancillary {
    struct cmsghdr align;
    char bytes[CMSG_SPACE((WIRE_DESCRIPTORS_MAX + 1) * sizeof(int))];
};

static void attach_descriptors(struct msghdr *message, union ancillary *ancillary, const int *fds, uint32_t count)
{
    const size_t bytes = count * sizeof(int);
    memset(ancillary, 0, CMSG_SPACE(bytes));
    message->msg_control = ancillary->bytes;
    message->msg_controllen = CMSG_SPACE(bytes);
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes);
    memcpy(CMSG_DATA(header), fds, bytes);
}

ice_status control_send_all(int socket, const void *bytes, size_t size, const int *fds, uint32_t count, int deadline_ms)
{
    if (size == 0) { // the peer could not tell it from the end of the connection
        return ICE_INVALID_ARGUMENT;
    }
    if (size > WIRE_CONTROL_BYTES_MAX || count > WIRE_DESCRIPTORS_MAX) {
        return ICE_TOO_LARGE;
    }
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    union ancillary ancillary;
    if (count > 0) {
        attach_descriptors(&message, &ancillary, fds, count);
    }
    const int64_t deadline = deadline_ns(deadline_ms);
    for (;;) {
        // A packet goes whole or not at all.
        if (sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) {
            return ICE_OK;
        }
        if (errno == EINTR) {
            continue;
        }
        if (errno != EAGAIN) {
            return transfer_status(errno);
        }
        const ice_status status = wait_ready(socket, POLLOUT, deadline);
        if (status != ICE_OK) {
            return status;
        }
    }
}

ice_status control_send(int socket, const void *bytes, size_t size, int fd, int deadline_ms)
{
    return control_send_all(socket, bytes, size, &fd, fd >= 0 ? 1 : 0, deadline_ms);
}

void control_descriptors_close(struct control_descriptors *descriptors)
{
    for (uint32_t i = 0; i < descriptors->count; i++) {
        close(descriptors->fds[i]);
    }
    descriptors->count = 0;
}

// Takes the descriptors out of the message, as many as there is room for, and closes all others.
static void take_descriptors(struct msghdr *message, struct control_descriptors *out)
{
    out->count = 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(fd));
            if (out->count < WIRE_DESCRIPTORS_MAX) {
                out->fds[out->count++] = fd;
            } else {
                close(fd);
            }
        }
    }
}

// What a received packet is worth; the descriptors are the caller's on ICE_OK, closed otherwise.
static ice_status accept_packet(struct msghdr *message, size_t size, struct control_descriptors *descriptors)
{
    take_descriptors(message, descriptors);
    ice_status status = ICE_OK;
    if (size == 0) { // end of file, or an empty packet, which no valid peer sends
        status = ICE_DISCONNECTED;
    } else if (message->msg_flags & MSG_TRUNC) {
        status = ICE_BAD_MESSAGE;
    } else if ((message->msg_flags & MSG_CTRUNC) && descriptors->count == 0) { // this process's table has no room
        status = ICE_SYSTEM;
    }
    if (status != ICE_OK) {
        control_descriptors_close(descriptors);
    }
    return status;
}

ice_status control_receive_all(int socket, void *bytes, size_t capacity, size_t *size_out,
                               struct control_descriptors *descriptors, int deadline_ms)
{
    *size_out = 0;
    descriptors->count = 0;
    const int64_t deadline = deadline_ns(deadline_ms);
    for (;;) {
        union ancillary ancillary;
        struct iovec part = {.iov_base = bytes, .iov_len = capacity};
        struct msghdr message = {
            .msg_iov = &part,
            .msg_iovlen = 1,
            .msg_control = ancillary.bytes,
            .msg_controllen = sizeof(ancillary.bytes),
        };
        const ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (received >= 0) {
            const ice_status status = accept_packet(&message, (size_t)received, descriptors);
            *size_out = status == ICE_OK ? (size_t)received : 0;
            return status;
        }
        if (errno == EINTR) {
            continue;
        }
        if (errno != EAGAIN) {
            return transfer_status(errno);
        }
        const ice_status status = wait_ready(socket, POLLIN, deadline);
        if (status != ICE_OK) {
            return status;
        }
    }
}

ice_status control_receive(int socket, void *bytes, size_t capacity, size_t *size_out, int *fd_out, int deadline_ms)
{
    struct control_descriptors descriptors;
    const ice_status status = control_receive_all(socket, bytes, capacity, size_out, &descriptors, deadline_ms);
    *fd_out = -1;
    if (descriptors.count > 0) {
        *fd_out = descriptors.fds[0];
        descriptors.fds[0] = descriptors.fds[--descriptors.count];
    }
    control_descriptors_close(&descriptors);
    return status;
}

ice_status control_peer(int socket, pid_t *pid, uid_t *uid, gid_t *gid)
{
    struct ucred credentials;
    socklen_t size = sizeof(credentials);
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) < 0) {
        return ICE_SYSTEM;
    }
    *pid = credentials.pid;
    *uid = credentials.uid;
    *gid = credentials.gid;
    return ICE_OK;
}
