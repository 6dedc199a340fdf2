#include "faulty.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD_BYTES 64u // keeps the alignment; holds the size, which must come back with the release
#define MAGIC      0x69636563616368u

struct head {
    uint64_t magic;
    size_t bytes;
};

const char *fault_name(enum fault_kind kind)
{
    static const char *const names[] = {
#define FAULT_NAME(name, text) text,
        FAULT_KINDS(FAULT_NAME)
#undef FAULT_NAME
    };
    return names[kind];
}

static struct faulty *faulty_of(struct env *env)
{
    return (struct faulty *)env;
}

static bool fails(struct env *env, enum fault_kind kind)
{
    struct faulty *faulty = faulty_of(env);
    if (atomic_load(&faulty->kind) != (int)kind || atomic_fetch_sub(&faulty->left, 1) != 1)
        return false;
    atomic_fetch_add(&faulty->fired, 1);
    return true;
}

static int error_of(struct env *env)
{
    return atomic_load(&faulty_of(env)->error);
}

static uint64_t now_ns(struct env *env)
{
    struct env *real = &faulty_of(env)->real;
    return real->now_ns(real);
}

static int random_bytes(struct env *env, void *bytes, size_t size)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_RANDOM) ? error_of(env) : real->random(real, bytes, size);
}

static void *acquire(struct env *env, size_t bytes)
{
    struct faulty *faulty = faulty_of(env);
    if (fails(env, FAULT_ACQUIRE))
        return NULL;
    uint8_t *memory = faulty->real.acquire(&faulty->real, bytes + HEAD_BYTES);
    if (!memory)
        return NULL;
    struct head head = {MAGIC, bytes};
    memcpy(memory, &head, sizeof head);
    memset(memory + HEAD_BYTES, 0xa5, bytes); // nobody may count on zeros
    atomic_fetch_add(&faulty->bytes, bytes);
    return memory + HEAD_BYTES;
}

static void release(struct env *env, void *memory, size_t bytes)
{
    struct faulty *faulty = faulty_of(env);
    if (!memory)
        return;
    uint8_t *block = (uint8_t *)memory - HEAD_BYTES;
    struct head head;
    memcpy(&head, block, sizeof head);
    if (head.magic != MAGIC || head.bytes != bytes) {
        fprintf(stderr, "released with %zu bytes, acquired with %zu\n", bytes, head.bytes);
        abort();
    }
    memset(block, 0x5a, bytes + HEAD_BYTES);
    atomic_fetch_sub(&faulty->bytes, bytes);
    faulty->real.release(&faulty->real, block, bytes + HEAD_BYTES);
}

static uint32_t list_nodes(struct env *env, int *ids, uint32_t capacity)
{
    struct faulty *faulty = faulty_of(env);
    if (faulty->nodes == 0)
        return faulty->real.nodes(&faulty->real, ids, capacity);
    for (uint32_t i = 0; i < faulty->nodes; i++)
        ids[i] = (int)i;
    return faulty->nodes;
}

static int map_region(struct env *env, const struct env_region_request *request, struct env_region *out)
{
    struct faulty *faulty = faulty_of(env);
    *out = (struct env_region){0};
    int error = fails(env, FAULT_MAP_REGION) ? error_of(env) : faulty->real.map_region(&faulty->real, request, out);
    if (!error)
        atomic_fetch_add(&faulty->regions, 1);
    return error;
}

static void unmap_region(struct env *env, struct env_region *region)
{
    struct faulty *faulty = faulty_of(env);
    faulty->real.unmap_region(&faulty->real, region);
    atomic_fetch_sub(&faulty->regions, 1);
}

static int read_system(struct env *env, const char *path, char *text, size_t capacity)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_READ_SYSTEM) ? error_of(env) : real->read_system(real, path, text, capacity);
}

static int make_memfd(struct env *env, const char *name, uint64_t bytes, int *fd_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_MEMFD) ? error_of(env) : real->memfd_create(real, name, bytes, fd_out);
}

static int map_shared(struct env *env, int fd, uint64_t bytes, void **out)
{
    struct faulty *faulty = faulty_of(env);
    int error = fails(env, FAULT_MAP_SHARED) ? error_of(env) : faulty->real.map_shared(&faulty->real, fd, bytes, out);
    if (!error)
        atomic_fetch_add(&faulty->regions, 1);
    return error;
}

static void unmap_shared(struct env *env, void *memory, uint64_t bytes)
{
    struct faulty *faulty = faulty_of(env);
    if (memory)
        atomic_fetch_sub(&faulty->regions, 1);
    faulty->real.unmap_shared(&faulty->real, memory, bytes);
}

static void close_fd(struct env *env, int fd)
{
    struct env *real = &faulty_of(env)->real;
    real->close_fd(real, fd);
}

static int make_directory(struct env *env, const char *path)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_DIRECTORY) ? error_of(env) : real->make_directory(real, path);
}

static int lock_file(struct env *env, const char *path, int *fd_out, pid_t *holder)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_LOCK) ? error_of(env) : real->lock_file(real, path, fd_out, holder);
}

static int unlink_path(struct env *env, const char *path)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_UNLINK) ? error_of(env) : real->unlink(real, path);
}

static int listen_path(struct env *env, const char *path, mode_t mode, int *fd_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_LISTEN) ? error_of(env) : real->listen(real, path, mode, fd_out);
}

static int accept_one(struct env *env, int listener, int *fd_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_ACCEPT) ? error_of(env) : real->accept(real, listener, fd_out);
}

static ice_status control_send_one(struct env *env, int socket, const void *bytes, size_t size, const int *fds,
                                   uint32_t count)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_CONTROL_SEND) ? (ice_status)error_of(env)
                                          : real->control_send(real, socket, bytes, size, fds, count);
}

static ice_status control_receive_one(struct env *env, int socket, void *bytes, size_t capacity, size_t *size_out,
                                      struct control_descriptors *descriptors)
{
    struct env *real = &faulty_of(env)->real;
    descriptors->count = 0;
    return fails(env, FAULT_CONTROL_RECEIVE)
               ? (ice_status)error_of(env)
               : real->control_receive(real, socket, bytes, capacity, size_out, descriptors);
}

static int event_open(struct env *env, int *fd_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_EVENT) ? error_of(env) : real->event_open(real, fd_out);
}

static int bell_open(struct env *env, struct env_bell *out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_BELL) ? error_of(env) : real->bell_open(real, out);
}

static void bell_ring(struct env *env, const struct env_bell *bell)
{
    struct env *real = &faulty_of(env)->real;
    real->bell_ring(real, bell);
}

static void bell_passed(struct env *env, struct env_bell *bell)
{
    struct env *real = &faulty_of(env)->real;
    real->bell_passed(real, bell);
}

static void bell_close(struct env *env, struct env_bell *bell)
{
    struct env *real = &faulty_of(env)->real;
    real->bell_close(real, bell);
}

static int bus_open(struct env *env, const char *path, mode_t mode, struct env_bus **out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_BUS_OPEN) ? error_of(env) : real->bus_open(real, path, mode, out);
}

static void bus_close(struct env *env, struct env_bus *bus)
{
    struct env *real = &faulty_of(env)->real;
    real->bus_close(real, bus);
}

static int bus_fd(struct env *env, struct env_bus *bus)
{
    struct env *real = &faulty_of(env)->real;
    return real->bus_fd(real, bus);
}

// Fails as the real one does: the message has been taken from the socket and is lost. An empty bus is not counted.
static int bus_receive(struct env *env, struct env_bus *bus, struct env_message *out)
{
    struct env *real = &faulty_of(env)->real;
    int error = real->bus_receive(real, bus, out);
    if (error || !fails(env, FAULT_BUS_RECEIVE))
        return error;
    real->bus_release(real, out);
    return error_of(env);
}

static void bus_release(struct env *env, struct env_message *message)
{
    struct env *real = &faulty_of(env)->real;
    real->bus_release(real, message);
}

static int bus_send(struct env *env, struct env_bus *bus, const uint8_t *route, size_t route_bytes, const void *bytes,
                    size_t size)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_BUS_SEND) ? error_of(env) : real->bus_send(real, bus, route, route_bytes, bytes, size);
}

static int open_folder(struct env *env, const char *path, int *fd_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_OPEN_FOLDER) ? error_of(env) : real->open_directory(real, path, fd_out);
}

static int open_data_file(struct env *env, int directory, const char *name, struct env_file *out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_OPEN_FILE) ? error_of(env) : real->open_data_file(real, directory, name, out);
}

static void close_data_file(struct env *env, struct env_file *file)
{
    struct env *real = &faulty_of(env)->real;
    real->close_data_file(real, file);
}

static int file_bytes(struct env *env, int fd, uint64_t *out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_FILE_BYTES) ? error_of(env) : real->file_bytes(real, fd, out);
}

static int check_file(struct env *env, int fd)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_CHECK_FILE) ? error_of(env) : real->check_file(real, fd);
}

static int resize_file(struct env *env, int fd, uint64_t bytes)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_RESIZE_FILE) ? error_of(env) : real->resize_file(real, fd, bytes);
}

static int preallocate(struct env *env, int fd, uint64_t bytes)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_PREALLOCATE) ? error_of(env) : real->preallocate(real, fd, bytes);
}

static ssize_t read_at(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_PREAD) ? error_of(env) : real->pread(real, fd, memory, bytes, offset);
}

static ssize_t write_at(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_PWRITE) ? error_of(env) : real->pwrite(real, fd, memory, bytes, offset);
}

static int sync_file(struct env *env, int fd)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_SYNC_FILE) ? error_of(env) : real->sync_file(real, fd);
}

static int ring_result(struct env *env, bool is_write, uint64_t offset, uint32_t bytes, int result)
{
    (void)is_write;
    (void)offset;
    (void)bytes;
    return fails(env, FAULT_RING_RESULT) ? error_of(env) : result;
}

static int write_file(struct env *env, int directory, const char *name, const struct iovec *pieces, int count)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_WRITE_FILE) ? error_of(env) : real->write_file(real, directory, name, pieces, count);
}

static int read_file(struct env *env, int directory, const char *name, void *memory, size_t capacity, size_t *bytes_out)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_READ_FILE) ? error_of(env)
                                       : real->read_file(real, directory, name, memory, capacity, bytes_out);
}

static int list_files(struct env *env, int directory, const char *suffix, env_file_visitor *visit, void *context)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_LIST_FILES) ? error_of(env) : real->list_files(real, directory, suffix, visit, context);
}

static int unlink_file(struct env *env, int directory, const char *name)
{
    struct env *real = &faulty_of(env)->real;
    return fails(env, FAULT_UNLINK_FILE) ? error_of(env) : real->unlink_file(real, directory, name);
}

void faulty_init(struct faulty *faulty)
{
    *faulty = (struct faulty){.kind = FAULT_KIND_COUNT};
    env_linux_init(&faulty->real);
    faulty->env = (struct env){
        .now_ns = now_ns,
        .random = random_bytes,
        .acquire = acquire,
        .release = release,
        .nodes = list_nodes,
        .map_region = map_region,
        .unmap_region = unmap_region,
        .read_system = read_system,
        .memfd_create = make_memfd,
        .map_shared = map_shared,
        .unmap_shared = unmap_shared,
        .close_fd = close_fd,
        .make_directory = make_directory,
        .lock_file = lock_file,
        .unlink = unlink_path,
        .open_directory = open_folder,
        .open_data_file = open_data_file,
        .close_data_file = close_data_file,
        .file_bytes = file_bytes,
        .check_file = check_file,
        .resize_file = resize_file,
        .preallocate = preallocate,
        .pread = read_at,
        .pwrite = write_at,
        .sync_file = sync_file,
        .ring_result = ring_result,
        .write_file = write_file,
        .read_file = read_file,
        .list_files = list_files,
        .unlink_file = unlink_file,
        .listen = listen_path,
        .accept = accept_one,
        .control_send = control_send_one,
        .control_receive = control_receive_one,
        .bus_open = bus_open,
        .bus_close = bus_close,
        .bus_fd = bus_fd,
        .bus_receive = bus_receive,
        .bus_release = bus_release,
        .event_open = event_open,
        .bell_open = bell_open,
        .bell_ring = bell_ring,
        .bell_passed = bell_passed,
        .bell_close = bell_close,
        .bus_send = bus_send,
    };
}

void faulty_arm(struct faulty *faulty, enum fault_kind kind, uint32_t nth, int error)
{
    atomic_store(&faulty->kind, FAULT_KIND_COUNT);
    atomic_store(&faulty->error, error);
    atomic_store(&faulty->fired, 0);
    atomic_store(&faulty->left, nth);
    atomic_store(&faulty->kind, (int)kind);
}

bool faulty_disarm(struct faulty *faulty)
{
    atomic_store(&faulty->kind, FAULT_KIND_COUNT);
    return atomic_load(&faulty->fired) > 0;
}
