// The control socket: one protobuf message per SOCK_SEQPACKET packet, with file descriptors beside it.
// Used by the daemon, the client library and icecachectl. All calls are thread-safe on distinct sockets.
#ifndef ICECACHE_PROTO_CONTROL_H
#define ICECACHE_PROTO_CONTROL_H

#include "proto/limits.h"
#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

// Names of the files in a daemon's socket directory.
#define CONTROL_SOCKET_NAME      "control.sock"
#define CONTROL_DATA_SOCKET_NAME "data.sock"
#define CONTROL_LOCK_NAME        "icecached.lock"

// Where a daemon and its clients meet when nobody says otherwise: $ICECACHE_SOCKET_DIR, else /run/icecache for root,
// else $XDG_RUNTIME_DIR/icecache, else /tmp/icecache-<uid>. Writes a NUL-terminated path.
ICE_MUST_CHECK ice_status control_default_directory(char *path, size_t capacity);
// directory + "/" + name; ICE_TOO_LARGE where it does not fit a socket address (107 bytes).
ICE_MUST_CHECK ice_status control_path(char *path, size_t capacity, const char *directory, const char *name);

// Connects (non-blocking, CLOEXEC). ICE_NO_DAEMON where nobody listens, ICE_PERMISSION, ICE_TOO_LARGE (path),
// ICE_TIMEOUT (the daemon's backlog is full: try again a little later), ICE_NO_MEMORY, ICE_SYSTEM.
ICE_MUST_CHECK ice_status control_connect(const char *path, int *fd_out);

// Sends one packet of 1 to WIRE_CONTROL_BYTES_MAX bytes with at most one descriptor (fd -1: none; borrowed). Waits at
// most deadline_ms for room (0 or less: not at all, ICE_TIMEOUT). ICE_DISCONNECTED where the peer is gone,
// ICE_INVALID_ARGUMENT for an empty packet, ICE_TOO_LARGE. Never raises SIGPIPE.
ICE_MUST_CHECK ice_status control_send(int socket, const void *bytes, size_t size, int fd, int deadline_ms);

// Receives one packet of at most capacity bytes; *fd_out is owned by the caller (-1: none, always so on error; any
// further descriptors that a peer sends are closed). ICE_TIMEOUT, ICE_DISCONNECTED (end of file, or an empty packet),
// ICE_BAD_MESSAGE (packet truncated), ICE_SYSTEM (also where there is no free descriptor for one that was sent).
ICE_MUST_CHECK ice_status control_receive(int socket, void *bytes, size_t capacity, size_t *size_out, int *fd_out,
                                          int deadline_ms);

// The same with up to WIRE_DESCRIPTORS_MAX descriptors. Sending borrows them (more: ICE_TOO_LARGE). Received ones are
// the caller's on ICE_OK, none otherwise; a sender may have sent more than fit this process's table, so count them.
struct control_descriptors {
    int fds[WIRE_DESCRIPTORS_MAX];
    uint32_t count;
};
ICE_MUST_CHECK ice_status control_send_all(int socket, const void *bytes, size_t size, const int *fds, uint32_t count,
                                           int deadline_ms);
ICE_MUST_CHECK ice_status control_receive_all(int socket, void *bytes, size_t capacity, size_t *size_out,
                                              struct control_descriptors *descriptors, int deadline_ms);
void control_descriptors_close(struct control_descriptors *descriptors); // and leaves none

// Peer's credentials as the kernel knows them.
ICE_MUST_CHECK ice_status control_peer(int socket, pid_t *pid, uid_t *uid, gid_t *gid);

#endif
