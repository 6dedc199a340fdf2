// The real outside: Linux system calls behind the table in env.h. Errors come back as -errno; nothing is logged here.
// No state of its own, so any thread may call. Private memory is in env_memory.c, nodes are in env_numa.c, the data bus
// in env_zmq.c.
#include "cached/env_linux.h"

#include "proto/control.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(struct env *env)
{
    (void)env;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int random_fill(struct env *env, void *bytes, size_t size)
{
    (void)env;
    return getrandom(bytes, size, 0) == (ssize_t)size ? 0 : -EIO;
}

static void *acquire(struct env *env, size_t bytes)
{
    (void)env;
    return aligned_alloc(64, (bytes + 63) & ~(size_t)63);
}

static void release(struct env *env, void *memory, size_t bytes)
{
    (void)env;
    (void)bytes;
    free(memory);
}

static int read_system(struct env *env, const char *path, char *text, size_t capacity)
{
    char whole[512];
    if ((size_t)snprintf(whole, sizeof whole, "%s%s", env->system_root, path) >= sizeof whole)
        return -ENAMETOOLONG;
    int fd = open(whole, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t used = 0;
    ssize_t got = 0;
    while (used + 1 < capacity && (got = read(fd, text + used, capacity - 1 - used)) > 0)
        used += (size_t)got;
    int error = got < 0 ? -errno : 0;
    close(fd);
    text[used] = '\0';
    return error;
}

static int make_memfd(struct env *env, const char *name, uint64_t bytes, int *fd_out)
{
    (void)env;
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)bytes) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        int error = errno;
        close(fd);
        return -error;
    }
    *fd_out = fd;
    return 0;
}

static int map_shared(struct env *env, int fd, uint64_t bytes, void **out)
{
    (void)env;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    // Populated now, because a page that cannot be had later would be a SIGBUS in the middle of a copy.
    if (madvise(memory, bytes, MADV_POPULATE_WRITE)) {
        int error = errno;
        munmap(memory, bytes);
        return -error;
    }
    madvise(memory, bytes, MADV_DONTDUMP);
    *out = memory;
    return 0;
}

static void unmap_shared(struct env *env, void *memory, uint64_t bytes)
{
    (void)env;
    if (memory)
        munmap(memory, bytes);
}

static void close_fd(struct env *env, int fd)
{
    (void)env;
    if (fd >= 0)
        close(fd);
}

static int make_directory(struct env *env, const char *path)
{
    (void)env;
    if (mkdir(path, 0700) == 0)
        return 0;
    struct stat folder;
    if (errno != EEXIST)
        return -errno;
    if (stat(path, &folder))
        return -errno;
    if (!S_ISDIR(folder.st_mode))
        return -ENOTDIR;
    // Who owns the folder can put other sockets in the place of ours, for example under /tmp.
    uid_t user = geteuid();
    return user == 0 || folder.st_uid == 0 || folder.st_uid == user ? 0 : -EPERM;
}

static int lock_file(struct env *env, const char *path, int *fd_out, pid_t *holder)
{
    (void)env;
    *holder = 0;
    // Emptied and written below, so never somebody else's file behind a link.
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    char text[32] = "";
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        int error = errno;
        if (read(fd, text, sizeof text - 1) > 0)
            *holder = (pid_t)strtol(text, NULL, 10);
        close(fd);
        return -error;
    }
    int size = snprintf(text, sizeof text, "%d\n", (int)getpid());
    if (ftruncate(fd, 0) || pwrite(fd, text, (size_t)size, 0) != size) {
        int error = errno ? errno : EIO;
        close(fd);
        return -error;
    }
    *fd_out = fd;
    return 0;
}

static int unlink_file(struct env *env, const char *path)
{
    (void)env;
    return unlink(path) && errno != ENOENT ? -errno : 0;
}

static int listen_control(struct env *env, const char *path, mode_t mode, int *fd_out)
{
    (void)env;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || chmod(path, mode) || listen(fd, 64)) {
        int error = errno;
        close(fd);
        return -error;
    }
    *fd_out = fd;
    return 0;
}

static int accept_control(struct env *env, int listener, int *fd_out)
{
    (void)env;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return -errno;
    *fd_out = fd;
    return 0;
}

static ice_status send_control(struct env *env, int socket, const void *bytes, size_t size, const int *fds,
                               uint32_t count)
{
    (void)env;
    return control_send_all(socket, bytes, size, fds, count, 0);
}

static ice_status receive_control(struct env *env, int socket, void *bytes, size_t capacity, size_t *size_out,
                                  struct control_descriptors *descriptors)
{
    (void)env;
    return control_receive_all(socket, bytes, capacity, size_out, descriptors, 0);
}

static int open_event(struct env *env, int *fd_out)
{
    (void)env;
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    *fd_out = fd;
    return 0;
}

static void pass_bell(struct env *env, struct env_bell *bell)
{
    close_fd(env, bell->heard_fd);
    bell->heard_fd = -1;
}

static void close_bell(struct env *env, struct env_bell *bell)
{
    pass_bell(env, bell);
    close_fd(env, bell->raised_fd);
    bell->raised_fd = -1;
}

static int open_bell(struct env *env, struct env_bell *out)
{
    struct env_bell bell = {.raised_fd = -1, .heard_fd = epoll_create1(EPOLL_CLOEXEC)};
    struct epoll_event edges = {.events = EPOLLIN | EPOLLET};
    int error = bell.heard_fd < 0 ? -errno : open_event(env, &bell.raised_fd);
    if (!error && epoll_ctl(bell.heard_fd, EPOLL_CTL_ADD, bell.raised_fd, &edges))
        error = -errno;
    if (error) {
        close_bell(env, &bell);
        return error;
    }
    *out = bell;
    return 0;
}

static void ring_bell(struct env *env, const struct env_bell *bell)
{
    (void)env;
    const uint64_t one = 1; // 2^64 of them do not happen, so there is room for each
    ssize_t written = write(bell->raised_fd, &one, sizeof one);
    (void)written;
}

void *env_acquire_zeroed(struct env *env, size_t bytes)
{
    void *memory = env->acquire(env, bytes);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

uint64_t env_system_number(struct env *env, const char *path, uint64_t otherwise)
{
    char text[32], *end;
    if (env->read_system(env, path, text, sizeof text) != 0)
        return otherwise;
    const unsigned long long number = strtoull(text, &end, 10);
    return end == text ? otherwise : number;
}

void env_linux_init(struct env *env)
{
    *env = (struct env){
        .system_root = "",
        .now_ns = now_ns,
        .random = random_fill,
        .acquire = acquire,
        .release = release,
        .read_system = read_system,
        .memfd_create = make_memfd,
        .map_shared = map_shared,
        .unmap_shared = unmap_shared,
        .close_fd = close_fd,
        .make_directory = make_directory,
        .lock_file = lock_file,
        .unlink = unlink_file,
        .listen = listen_control,
        .accept = accept_control,
        .control_send = send_control,
        .control_receive = receive_control,
        .event_open = open_event,
        .bell_open = open_bell,
        .bell_ring = ring_bell,
        .bell_passed = pass_bell,
        .bell_close = close_bell,
    };
    env_memory_init(env);
    env_numa_init(env);
    env_zmq_init(env);
    env_file_init(env);
}
