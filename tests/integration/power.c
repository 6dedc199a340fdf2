// See power.h. Runs when the daemon is dead: only then is the journal at rest.
#include "power.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ENTRIES_MAX = 1 << 16 };

static int open_file(const char *folder, const char *name, int flags)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    const int fd = open(path, flags | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    return fd;
}

struct sick *sick_open(struct daemon *daemon)
{
    const int fd = open_file(daemon->folder, SICK_FILE, O_RDWR | O_CREAT | O_TRUNC);
    assert_int_equal(ftruncate(fd, sizeof(struct sick)), 0);
    struct sick *sick = mmap(NULL, sizeof *sick, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(sick != MAP_FAILED);
    close(fd);
    close(open_file(daemon->folder, SICK_STABLE_FILE, O_RDWR | O_CREAT | O_TRUNC));
    assert_int_equal(setenv(SICK_FOLDER_VARIABLE, daemon->folder, 1), 0);
    daemon->program = SICK_DAEMON_PATH;
    return sick;
}

void sick_close(struct daemon *daemon, struct sick *sick)
{
    munmap(sick, sizeof *sick);
    unsetenv(SICK_FOLDER_VARIABLE);
    daemon->program = NULL;
}

// ---- what is left ----

static void write_sectors(int fd, const struct sick_entry *entry, bool torn, uint64_t *random)
{
    for (uint64_t at = 0; at < entry->bytes; at += SICK_SECTOR_BYTES) {
        if (torn && random_below(random, 2))
            continue;
        const uint64_t bytes = entry->bytes - at < SICK_SECTOR_BYTES ? entry->bytes - at : SICK_SECTOR_BYTES;
        assert_int_equal(pwrite(fd, entry->data + at, bytes, (off_t)(entry->offset + at)), bytes);
    }
}

// Of those that may be lost a part survives: mostly some, now and then none or all.
static void keep_some(int fd, struct sick_entry **entries, uint32_t count, uint64_t *random)
{
    const uint64_t share = random_below(random, 5); // of 4
    for (uint32_t i = count; i > 1; i--) {
        const uint64_t other = random_below(random, i);
        struct sick_entry *moved = entries[i - 1];
        entries[i - 1] = entries[other];
        entries[other] = moved;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (random_below(random, 4) < share)
            write_sectors(fd, entries[i], random_below(random, 3) == 0, random);
    }
}

static void put_file(const struct daemon *daemon, const char *name, const void *bytes, uint64_t count)
{
    const int fd = open_file(daemon->spill, name, O_WRONLY | O_CREAT | O_TRUNC);
    assert_int_equal(write(fd, bytes, count), count);
    close(fd);
}

// A call that has not returned: its file is there or not, or what it is made from.
static void settle_file(const struct daemon *daemon, const struct sick_entry *entry, uint64_t *random)
{
    char path[512], temporary[SICK_NAME_BYTES + 8];
    if (atomic_load(&entry->state) == SICK_DONE)
        return;
    snprintf(path, sizeof path, "%s/%s", daemon->spill, entry->name);
    snprintf(temporary, sizeof temporary, "%s.tmp", entry->name);
    unlink(path);
    if (random_below(random, 2))
        put_file(daemon, entry->name, entry->data, entry->bytes);
    else if (entry->kind == SICK_FILE_WRITTEN)
        put_file(daemon, temporary, entry->data, random_below(random, entry->bytes + 1));
}

static void copy_file(const char *from_folder, const char *from, const char *to_folder, const char *to)
{
    static uint8_t bytes[1 << 20];
    const int source = open_file(from_folder, from, O_RDONLY);
    const int target = open_file(to_folder, to, O_WRONLY | O_CREAT | O_TRUNC);
    ssize_t got;
    off_t at = 0;
    while ((got = pread(source, bytes, sizeof bytes, at)) > 0) {
        static const uint8_t zeros[sizeof bytes];
        if (memcmp(bytes, zeros, (size_t)got) != 0) // holes stay holes
            assert_int_equal(pwrite(target, bytes, (size_t)got, at), got);
        at += got;
    }
    assert_int_equal(got, 0);
    assert_int_equal(ftruncate(target, at), 0);
    close(source);
    close(target);
}

void power_lose(struct daemon *daemon, struct sick *sick, uint64_t *random)
{
    struct sick_entry **entries = calloc(ENTRIES_MAX, sizeof *entries);
    uint32_t count = 0;
    assert_non_null(entries);
    daemon_kill(daemon);
    const uint64_t used = atomic_load(&sick->journal_used);
    for (uint64_t at = 0; at < used;) {
        struct sick_entry *entry = (struct sick_entry *)(sick->journal + at);
        at += entry->room;
        if (entry->kind != SICK_WRITE) {
            settle_file(daemon, entry, random);
        } else if (atomic_load(&entry->state) != SICK_STABLE) {
            assert_true(count < ENTRIES_MAX);
            entries[count++] = entry;
        }
    }
    const int stable = open_file(daemon->folder, SICK_STABLE_FILE, O_RDWR);
    keep_some(stable, entries, count, random);
    close(stable);
    copy_file(daemon->folder, SICK_STABLE_FILE, daemon->spill, "data");
    atomic_store(&sick->journal_used, 0);
    atomic_store(&sick->sync_error, 0);
    free(entries);
}
