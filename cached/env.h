// The one table of outside effects: clock, random, memory, shared memory, files, control sockets and the data bus. Real
// in production (env_linux.c); tests wrap it to fail the n-th call or to simulate the world. Nothing else in cached/
// asks the system for anything that a test would want to fail.
//
// All functions are thread-safe unless said otherwise. Functions that return int answer 0 or -errno.
#ifndef ICECACHE_CACHED_ENV_H
#define ICECACHE_CACHED_ENV_H

#include "proto/control.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

// The rungs of the ladder on which a region's memory is sought, best first: pages reserved by the operator (hugetlb),
// transparent huge pages when it is touched, or by collapsing afterwards, pages of 4 KiB.
enum env_huge { ENV_HUGE_HUGETLB_1G, ENV_HUGE_HUGETLB_2M, ENV_HUGE_TRANSPARENT, ENV_HUGE_COLLAPSED, ENV_HUGE_NONE };
#define ENV_RUNG(kind)     (1u << (kind))
#define ENV_RUNGS_RESERVED (ENV_RUNG(ENV_HUGE_HUGETLB_1G) | ENV_RUNG(ENV_HUGE_HUGETLB_2M))
#define ENV_RUNGS_ALL      (ENV_RUNG(ENV_HUGE_NONE + 1) - 1)
#define ENV_REASONS_BYTES  384u
#define ENV_NODES_MAX      16u // on larger machines memory is not placed
#define ENV_NODE_ANY       (-1)

// Asked at the beginning and some ten times a second while memory is populated, by the thread that asked for it.
struct env_watch {
    bool (*go_on)(void *owner, uint64_t done_bytes); // false: give up
    void *owner;
};

struct env_region_request {
    uint64_t bytes;                // a multiple of 2 MiB
    uint32_t rungs;                // that may be taken, as bits ENV_RUNG(kind)
    int node;                      // NUMA node that it should lie on, or ENV_NODE_ANY
    const struct env_watch *watch; // may be NULL
};

struct env_region {
    void *base; // a multiple of 2 MiB
    uint64_t bytes;
    enum env_huge kind;              // the rung that gave what huge pages there are
    uint64_t huge_bytes;             // as the kernel counts them after populating
    int node;                        // as it was asked for
    uint64_t node_bytes;             // that lie there, counted likewise
    char reasons[ENV_REASONS_BYTES]; // why better rungs gave nothing or less; empty where there is nothing to say
};

// A data file, as it was opened.
struct env_file {
    int fd;
    bool direct;           // transfers pass the page cache by
    uint32_t memory_align; // of the memory of transfers: 512 to 4096, 1 where they are not direct
    uint32_t place_align;  // of their places in the file and of their bytes: up to 4096, 1 where they are not direct
};

#define ENV_TEMPORARY ".tmp" // behind the name of a small file that is being written

// One file in a listing. False ends the listing. The file may be unlinked here.
typedef bool env_file_visitor(void *context, const char *name);

struct env_bus;

#define ENV_ROUTE_RING                                                                                                 \
    256u // instead of a route's bytes: the message came over its session's ring, and so goes the reply

// A wake-up for another process that nothing it does can make wait. What is passed is not the eventfd itself, of which
// the other could fill the count and change the flags, but an epoll that watches it for edges.
struct env_bell {
    int raised_fd; // ours alone
    int heard_fd;  // to be passed; -1 after bell_passed
};

// One message on the bus, received: frame 1 and, where there is one, frame 2. Owned by the receiver until bus_release.
struct env_message {
    uint8_t route[256]; // opaque address of the sender
    size_t route_bytes; // at most 255, or ENV_ROUTE_RING
    const void *header;
    size_t header_bytes;
    const void *vectors;
    size_t vectors_bytes;
    pid_t peer_pid; // as the kernel knows it, 0: unknown
    uid_t peer_uid;
    int surplus_frames;   // frames beyond the protocol's number, dropped
    uint64_t received_ns; // written by the receiver
    void *handle;
};

struct env {
    void *owner;
    const char *system_root; // before the paths of read_system: "", or a folder in which a test has its own

    uint64_t (*now_ns)(struct env *env); // monotonic
    int (*random)(struct env *env, void *bytes, size_t size);

    // 64-byte aligned, not zeroed; NULL when there is none. release accepts NULL.
    void *(*acquire)(struct env *env, size_t bytes);
    void (*release)(struct env *env, void *memory, size_t bytes);

    // A piece of private memory, a power of two from 2 MiB, aligned to its size, in large pages where the system gives
    // them when it is touched; not inherited by children, not in core dumps. NULL when there is none.
    // The functions are NULL where every block is to come from acquire: tests fail or check each of them.
    void *(*acquire_chunk)(struct env *env, size_t bytes);
    void (*release_chunk)(struct env *env, void *memory, size_t bytes);

    // NUMA nodes with cores and memory that we may use. 0 or 1: there is nothing to choose from.
    uint32_t (*nodes)(struct env *env, int *ids, uint32_t capacity);

    // Private memory on the best rung that there is, populated, not inherited by children, not in core dumps.
    // -ECANCELED: the watch said so. The reasons are written whatever the outcome, the rest on success.
    int (*map_region)(struct env *env, const struct env_region_request *request, struct env_region *out);
    void (*unmap_region)(struct env *env, struct env_region *region);

    // A small file below /proc or /sys, with a 0 at its end, cut at the capacity.
    int (*read_system)(struct env *env, const char *path, char *text, size_t capacity);

    // Shared memory that cannot be resized by anyone.
    int (*memfd_create)(struct env *env, const char *name, uint64_t bytes, int *fd_out);
    int (*map_shared)(struct env *env, int fd, uint64_t bytes, void **out); // populated
    void (*unmap_shared)(struct env *env, void *memory, uint64_t bytes);
    void (*close_fd)(struct env *env, int fd);

    // Files of the socket directory.
    int (*make_directory)(struct env *env, const char *path); // or finds it; -EPERM: another user's
    int (*lock_file)(struct env *env, const char *path, int *fd_out, pid_t *holder); // -EWOULDBLOCK: held by *holder
    int (*unlink)(struct env *env, const char *path);

    // Files of the spill folder (env_file.c). `directory` is a descriptor, names are relative to it. A name whose last
    // part is a link is refused. close_fd closes.
    int (*open_directory)(struct env *env, const char *path, int *fd_out);
    // Opens or makes a file for direct transfers, or for buffered ones where the file system has no others. -EBUSY:
    // another process has it open through this function.
    int (*open_data_file)(struct env *env, int directory, const char *name, struct env_file *out);
    void (*close_data_file)(struct env *env, struct env_file *file); // another may open it at once
    int (*file_bytes)(struct env *env, int fd, uint64_t *out);
    // -ESTALE: the file has no name any more, so that it ends with its last descriptor.
    int (*check_file)(struct env *env, int fd);
    int (*resize_file)(struct env *env, int fd, uint64_t bytes);
    // Takes the room for all of a file of `bytes`, which may make it longer, never shorter; what is in it stays.
    // -ENOSPC leaves it as long as it was.
    int (*preallocate)(struct env *env, int fd, uint64_t bytes);
    // Bytes transferred, which may be fewer than asked for (0 from pread: the end), or -errno. Never -EINTR.
    ssize_t (*pread)(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset);
    ssize_t (*pwrite)(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset);
    int (*sync_file)(struct env *env, int fd); // fdatasync
    // NULL in the real table. Replaces the result (bytes, or -errno) of a transfer that the kernel's ring has answered,
    // or of a sync (bytes 0). On an I/O thread.
    int (*ring_result)(struct env *env, bool is_write, uint64_t offset, uint32_t bytes, int result);

    // Small whole files. After a crash there is the old file or the new one: the pieces are written to name.tmp, which
    // is synced, renamed, and the directory synced. On failure name.tmp is unlinked and the old file is what it was,
    // but where the last step fails it may be either.
    int (*write_file)(struct env *env, int directory, const char *name, const struct iovec *pieces, int count);
    // *bytes_out is the file's size, also with -EFBIG: it is larger than the capacity.
    int (*read_file)(struct env *env, int directory, const char *name, void *memory, size_t capacity,
                     size_t *bytes_out);
    // Every name that ends in the suffix, in no order.
    int (*list_files)(struct env *env, int directory, const char *suffix, env_file_visitor *visit, void *context);
    // And syncs the directory, also where the file is not there: 0 means that it is gone for good.
    int (*unlink_file)(struct env *env, int directory, const char *name);

    // Control sockets, non-blocking.
    int (*listen)(struct env *env, const char *path, mode_t mode, int *fd_out);
    int (*accept)(struct env *env, int listener, int *fd_out); // -EAGAIN: none waiting
    ice_status (*control_send)(struct env *env, int socket, const void *bytes, size_t size, const int *fds,
                               uint32_t count);
    ice_status (*control_receive)(struct env *env, int socket, void *bytes, size_t capacity, size_t *size_out,
                                  struct control_descriptors *descriptors); // the caller's on ICE_OK, else none

    // Wake-ups between processes. An eventfd for the other to write, non-blocking, to be watched for edges and never
    // read; and the way back, of which only the opening can fail: bell_ring never waits.
    int (*event_open)(struct env *env, int *fd_out);
    int (*bell_open)(struct env *env, struct env_bell *out);
    void (*bell_ring)(struct env *env, const struct env_bell *bell);
    void (*bell_passed)(struct env *env, struct env_bell *bell); // closes what has been passed
    void (*bell_close)(struct env *env, struct env_bell *bell);

    // The data bus. One thread only (the reactor).
    int (*bus_open)(struct env *env, const char *path, mode_t mode, struct env_bus **out);
    void (*bus_close)(struct env *env, struct env_bus *bus);
    int (*bus_fd)(struct env *env, struct env_bus *bus); // readable: look at the bus again, until it says -EAGAIN
    int (*bus_receive)(struct env *env, struct env_bus *bus, struct env_message *out); // -EAGAIN: nothing there
    void (*bus_release)(struct env *env, struct env_message *message);
    // Never waits: -EAGAIN the peer does not read, -EHOSTUNREACH the peer is gone. bytes are copied.
    int (*bus_send)(struct env *env, struct env_bus *bus, const uint8_t *route, size_t route_bytes, const void *bytes,
                    size_t size);
};

// The real table. owner is unused.
void env_linux_init(struct env *env);

// Shorthands.
static inline uint64_t env_now_ns(struct env *env)
{
    return env->now_ns(env);
}
void *env_acquire_zeroed(struct env *env, size_t bytes);
// Of a part of one allocation for several arrays: so many bytes that the next part may hold anything.
static inline size_t env_align(size_t bytes)
{
    return (bytes + 7) & ~(size_t)7;
}
// The number that such a file begins with, or `otherwise`.
uint64_t env_system_number(struct env *env, const char *path, uint64_t otherwise);

#endif
