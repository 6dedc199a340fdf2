// The device side of the spill tier: one preallocated data file in the spill folder, read and written in aligned pieces
// by I/O threads, through io_uring where a real probe shows that it works and by a pool of pread/pwrite threads
// elsewhere. Holds no knowledge of pages: extents.h says which pieces are whose, tier.h what is in them.
//
// Thread-safe. A disk that fails is switched off, see disk_is_off; it is never the daemon's end.
#ifndef ICECACHE_CACHED_DISK_H
#define ICECACHE_CACHED_DISK_H

#include "cached/env.h"

#include <stdbool.h>
#include <stdint.h>

#define DISK_ALIGN         4096u // of places in the file and of the bytes of a request
#define DISK_DEPTH_MAX     64u   // requests that the device has at one time; the rest waits in order
#define DISK_DEPTH_DEFAULT 32u
#define DISK_PASSES_MAX    16u        // urgent reads one after the other, while others wait: then one of those goes
#define DISK_FILE          "data"     // in the directory
#define DISK_FAILURES_MAX  8u         // one after the other, at different places, until the disk is off
#define DISK_OPEN_WAIT_NS  2000000000 // for the lock of a process that has just been killed
// What disk_close gives a device from one answer to the next, unless it is told otherwise.
#define DISK_CLOSE_WAIT_NS 10000000000

enum disk_engine { DISK_ENGINE_AUTO, DISK_ENGINE_URING, DISK_ENGINE_THREADS };
enum disk_op { DISK_READ, DISK_WRITE, DISK_SYNC };

struct disk;

struct disk_params {
    const char *directory; // must exist; borrowed until disk_open returns
    uint64_t bytes;        // of the data file, multiple of DISK_ALIGN
    enum disk_engine engine;
    uint32_t depth;                                       // requests in flight, 1 to DISK_DEPTH_MAX; 0: the default
    uint64_t read_bytes_per_s_max, write_bytes_per_s_max; // 0: no cap
    uint64_t close_wait_ns;                               // 0: DISK_CLOSE_WAIT_NS
};

// One transfer. Owned by the caller, who may not touch it or its memory between disk_submit and done.
struct disk_request {
    struct disk_request *next; // chain handed to disk_submit; the disk's until done
    enum disk_op op;
    uint64_t offset; // multiple of DISK_ALIGN; READ and WRITE only, as the next two
    void *memory;    // aligned to disk_memory_align
    uint32_t bytes;  // multiple of DISK_ALIGN, inside the file
    bool urgent;     // a read that a decode step waits for: goes before all others, see DISK_PASSES_MAX
    int result;      // 0, or -errno: short transfers have been completed, or end as -EIO
    // On an I/O thread, once for each request; must not block, may submit. For SYNC: all writes whose done was called
    // before the sync was submitted are on stable storage. After a sync that has failed all later ones do.
    void (*done)(struct disk_request *request);
    uint64_t submitted_ns; // for statistics; written by disk_submit
};

// Opens or makes the data file, takes the room for it, probes the engines with real I/O. On failure answers -errno, and
// `text` says what is wrong and what to do. A file that is there already keeps its contents (grown or cut to `bytes`).
// -EBUSY: another process uses the directory. env is borrowed until disk_close, after -ETIMEDOUT for good.
ICE_MUST_CHECK int disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text,
                             size_t capacity);
// Accepts NULL; nobody may submit any more. Answers all that was submitted, then 0. -ETIMEDOUT: the device hangs. Then
// what it has not answered never will be, and the disk, the requests and their memory must be left alone: the device
// may still write there.
int disk_close(struct disk *disk);
// Takes a chain of requests, answers each by its done, also when the disk is off (-EIO). Never blocks.
void disk_submit(struct disk *disk, struct disk_request *first);

// Memory of requests must be aligned to this: 512 to 4096, 1 where O_DIRECT is not to be had (tmpfs).
uint32_t disk_memory_align(const struct disk *disk);

// The tier is switched off, for good, because DISK_FAILURES_MAX requests of one kind (reads; writes and syncs) failed
// one after the other at different places, or the data file is gone. One bad place, read again and again, does not
// do it. Any thread.
bool disk_is_off(const struct disk *disk);

// Something is on its way, and the device has answered nothing for as long as disk_close would wait for it.
bool disk_hangs(struct disk *disk);

struct disk_usage {
    const char *engine;  // "io_uring" or "threads"
    const char *because; // why not io_uring, "" where it is; lives as long as the disk
    bool direct;         // O_DIRECT
    bool off;
    int off_error;    // the -errno that switched it off, 0
    bool sync_failed; // nothing can be made stable any more
    uint32_t in_flight, waiting;
    // What has been answered; a request that failed counts as an error only.
    uint64_t reads, read_bytes, writes, written_bytes, syncs, errors;
};
void disk_usage(struct disk *disk, struct disk_usage *out);

#endif
