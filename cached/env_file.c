// Files of the spill folder behind the table in env.h: the data file, and whole small files that are there after a
// crash or not at all. Errors come back as -errno; nothing is logged here. No state of its own, so any thread may call.
#include "cached/env_linux.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define TMPFS        0x01021994
#define BLOCK_BYTES  4096u               // safe for direct transfers where the kernel does not say
#define MEMORY_ALIGN 512u                // what some devices can do below that is of no use
#define FILL_BYTES   ((uint64_t)1 << 20) // at one time, where room must be taken by writing

static int open_directory(struct env *env, const char *path, int *fd_out)
{
    (void)env;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    *fd_out = fd;
    return 0;
}

// ---- the data file ----

// What direct transfers need. Since 6.6 tmpfs takes O_DIRECT and copies all the same.
static void ask_alignment(struct env_file *file)
{
    struct statfs system;
    file->memory_align = file->place_align = BLOCK_BYTES;
    if (fstatfs(file->fd, &system) == 0 && system.f_type == TMPFS)
        file->direct = false;
#ifdef STATX_DIOALIGN
    struct statx status;
    if (file->direct && statx(file->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
        (status.stx_mask & STATX_DIOALIGN)) {
        // 0: this file has no direct transfers.
        file->direct = status.stx_dio_mem_align > 0 && status.stx_dio_mem_align <= BLOCK_BYTES &&
                       status.stx_dio_offset_align <= BLOCK_BYTES;
        file->memory_align = status.stx_dio_mem_align > MEMORY_ALIGN ? status.stx_dio_mem_align : MEMORY_ALIGN;
        file->place_align = status.stx_dio_offset_align;
    }
#endif
    if (!file->direct)
        file->memory_align = file->place_align = 1;
}

static int open_data_file(struct env *env, int directory, const char *name, struct env_file *out)
{
    (void)env;
    const int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
    struct env_file file = {.fd = openat(directory, name, flags | O_DIRECT, 0600), .direct = true};
    if (file.fd < 0 && errno == EINVAL)
        file = (struct env_file){.fd = openat(directory, name, flags, 0600)};
    if (file.fd < 0)
        return -errno;
    struct stat status;
    int error = fstat(file.fd, &status) ? -errno : S_ISREG(status.st_mode) ? 0 : -EINVAL;
    // Two that write into one file would ruin it for both. Where there are no locks there is no help.
    if (!error && flock(file.fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
        error = -EBUSY;
    if (!error) {
        bool opened_direct = file.direct;
        ask_alignment(&file);
        if (fcntl(file.fd, F_SETFL, file.direct ? O_DIRECT : 0) && opened_direct)
            error = -errno;
    }
    if (error) {
        close(file.fd);
        return error;
    }
    *out = file;
    return 0;
}

static void close_data_file(struct env *env, struct env_file *file)
{
    (void)env;
    (void)flock(file->fd, LOCK_UN); // what a ring holds of the file may be let go of later than it is closed
    close(file->fd);
}

static int file_bytes(struct env *env, int fd, uint64_t *out)
{
    (void)env;
    struct stat status;
    if (fstat(fd, &status))
        return -errno;
    *out = (uint64_t)status.st_size;
    return 0;
}

static int check_file(struct env *env, int fd)
{
    (void)env;
    struct stat status;
    if (fstat(fd, &status))
        return -errno;
    return status.st_nlink > 0 ? 0 : -ESTALE;
}

static int resize_file(struct env *env, int fd, uint64_t bytes)
{
    (void)env;
    while (ftruncate(fd, (off_t)bytes))
        if (errno != EINTR)
            return -errno;
    return 0;
}

static ssize_t read_at(struct env *env, int fd, void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    ssize_t got;
    do
        got = pread(fd, memory, bytes, (off_t)offset);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

static ssize_t write_at(struct env *env, int fd, const void *memory, size_t bytes, uint64_t offset)
{
    (void)env;
    ssize_t got;
    do
        got = pwrite(fd, memory, bytes, (off_t)offset);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

static int sync_file(struct env *env, int fd)
{
    (void)env;
    return fdatasync(fd) ? -errno : 0;
}

// Takes room by writing zeros behind the end, in whole blocks.
static int fill(struct env *env, int fd, uint64_t from, uint64_t to)
{
    uint64_t at = (from + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES; // the last block that is there has its room
    int error = at > from && at <= to ? resize_file(env, fd, at) : 0;
    void *zeros = aligned_alloc(BLOCK_BYTES, FILL_BYTES);
    if (!zeros)
        return -ENOMEM;
    memset(zeros, 0, FILL_BYTES);
    while (!error && at < to) {
        ssize_t written = write_at(env, fd, zeros, to - at < FILL_BYTES ? (size_t)(to - at) : FILL_BYTES, at);
        if (written > 0)
            at += (uint64_t)written;
        else
            error = written < 0 ? (int)written : -EIO;
    }
    free(zeros);
    return error;
}

static int preallocate(struct env *env, int fd, uint64_t bytes)
{
    uint64_t before;
    int error = file_bytes(env, fd, &before);
    if (error)
        return error;
    do
        error = fallocate(fd, 0, 0, (off_t)bytes) ? -errno : 0;
    while (error == -EINTR);
    if (error == -EOPNOTSUPP)
        error = fill(env, fd, before, bytes);
    if (error)
        (void)resize_file(env, fd, before); // also gives back room beyond the end; an error is answered already
    return error;
}

// ---- small files ----

static int write_pieces(int fd, const struct iovec *pieces, int count)
{
    for (int i = 0; i < count; i++) {
        const char *at = pieces[i].iov_base;
        for (size_t left = pieces[i].iov_len; left > 0;) {
            ssize_t written = write(fd, at, left);
            if (written < 0 && errno != EINTR)
                return -errno;
            at += written > 0 ? written : 0;
            left -= written > 0 ? (size_t)written : 0;
        }
    }
    return 0;
}

static int sync_directory(int directory)
{
    return fsync(directory) ? -errno : 0;
}

static int write_file(struct env *env, int directory, const char *name, const struct iovec *pieces, int count)
{
    (void)env;
    char temporary[NAME_MAX + 1];
    if (snprintf(temporary, sizeof temporary, "%s" ENV_TEMPORARY, name) >= (int)sizeof temporary)
        return -ENAMETOOLONG;
    int fd = openat(directory, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    int error = write_pieces(fd, pieces, count);
    if (!error && fsync(fd))
        error = -errno;
    if (close(fd) && !error)
        error = -errno;
    if (!error && renameat(directory, temporary, directory, name))
        error = -errno;
    if (error) {
        (void)unlinkat(directory, temporary, 0);
        return error;
    }
    return sync_directory(directory);
}

static int read_file(struct env *env, int directory, const char *name, void *memory, size_t capacity, size_t *bytes_out)
{
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    uint64_t bytes = 0, at = 0;
    struct stat status;
    int error = fstat(fd, &status) ? -errno : S_ISREG(status.st_mode) ? 0 : -EINVAL;
    if (!error) {
        bytes = (uint64_t)status.st_size;
        *bytes_out = bytes;
        error = bytes > capacity ? -EFBIG : 0;
    }
    while (!error && at < bytes) {
        ssize_t got = read_at(env, fd, (char *)memory + at, bytes - at, at);
        if (got > 0)
            at += (uint64_t)got;
        else
            error = got < 0 ? (int)got : -EIO; // cut while it was read
    }
    close(fd);
    return error;
}

static int list_files(struct env *env, int directory, const char *suffix, env_file_visitor *visit, void *context)
{
    (void)env;
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); // its own place in the listing
    DIR *listing = fd < 0 ? NULL : fdopendir(fd);
    if (!listing) {
        int error = errno;
        if (fd >= 0)
            close(fd);
        return -error;
    }
    const size_t tail = strlen(suffix);
    int error = 0;
    for (bool more = true; more;) {
        errno = 0;
        const struct dirent *entry = readdir(listing);
        if (!entry) {
            error = -errno;
            break;
        }
        size_t length = strlen(entry->d_name);
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length >= tail && strcmp(entry->d_name + length - tail, suffix) == 0)
            more = visit(context, entry->d_name);
    }
    closedir(listing);
    return error;
}

static int unlink_file(struct env *env, int directory, const char *name)
{
    (void)env;
    // One that is not there may have gone by a call whose sync failed.
    if (unlinkat(directory, name, 0) == 0 || errno == ENOENT)
        return sync_directory(directory);
    return -errno;
}

void env_file_init(struct env *env)
{
    env->open_directory = open_directory;
    env->open_data_file = open_data_file;
    env->close_data_file = close_data_file;
    env->file_bytes = file_bytes;
    env->check_file = check_file;
    env->resize_file = resize_file;
    env->preallocate = preallocate;
    env->pread = read_at;
    env->pwrite = write_at;
    env->sync_file = sync_file;
    env->write_file = write_file;
    env->read_file = read_file;
    env->list_files = list_files;
    env->unlink_file = unlink_file;
}
