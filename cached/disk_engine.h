// What the two engines of the disk share with it: the queue they take requests from and give answers to.
#ifndef ICECACHE_CACHED_DISK_ENGINE_H
#define ICECACHE_CACHED_DISK_ENGINE_H

#include "cached/disk.h"

#include <pthread.h>
#include <stdatomic.h>

#define DISK_THREADS_MAX 16u
#define DISK_TEXT_BYTES  200u
#define DISK_NEVER_NS    UINT64_MAX

struct disk_engine_ops {
    const char *name;
    // Probes by a write and a read of the file `probe` (DISK_ALIGN bytes, its own) and starts the threads. On failure
    // -errno, `because` says which step, and nothing is left behind.
    int (*start)(struct disk *disk, const struct env_file *probe, char because[DISK_TEXT_BYTES]);
    // With the lock: `count` requests have come, or 0: all threads are to look.
    void (*wake)(struct disk *disk, uint32_t count);
    void (*fini)(struct disk *disk); // after the last thread's end; the engine's memory
};
extern const struct disk_engine_ops disk_uring, disk_threads;

// Bytes that may go in a second. Goes below 0, so that a request of any size goes when its turn comes.
struct disk_bucket {
    uint64_t bytes_per_s; // 0: no cap
    double level_bytes;
    uint64_t filled_ns;
};

struct disk_queue {
    struct disk_request *first, *last;
};

struct disk {
    struct env *env; // immutable once open, as what follows until the lock
    struct env_file file;
    int directory;
    uint32_t depth;
    uint64_t bytes, close_wait_ns;
    const struct disk_engine_ops *ops;
    void *engine; // the ops' own
    char because[DISK_TEXT_BYTES];
    pthread_t threads[DISK_THREADS_MAX];
    uint32_t thread_count;

    _Atomic bool off;
    pthread_mutex_t lock;
    pthread_cond_t changed;                          // a thread has started or ended, or answers are given
    struct disk_queue queues[DISK_SYNC + 1], urgent; // of what is not urgent, by op; of what is
    uint32_t passed;                                 // urgent ones that have gone since another has
    struct disk_bucket buckets[DISK_SYNC];           // reads, writes
    uint32_t waiting, in_flight;
    uint32_t running;   // threads
    uint32_t answering; // threads that call done
    bool stopping;
    bool abandoned; // closed while the device hangs: nobody is answered any more
    bool is_left;   // and the last thread frees the disk
    int off_error;
    bool syncing;         // a sync is in flight
    bool sync_failed;     // no later one promises anything
    uint64_t moved_ns;    // when the device answered last, or began to have something to answer
    uint32_t failures[2]; // one after the other, of reads and of the others
    uint64_t last_failed[2];
    uint64_t reads, read_bytes, writes, written_bytes, syncs, errors;
};

// With the lock: the request whose turn it is, which is in flight from here on. NULL: none may go; one may after
// *wait_ns, DISK_NEVER_NS: none waits. A taken request is answered with -EIO at once where the disk is off.
struct disk_request *disk_take(struct disk *disk, uint64_t now_ns, uint64_t *wait_ns);
// Without the lock: counts and answers a chain of requests whose result is set.
void disk_answer(struct disk *disk, struct disk_request *first);

// A request on its way.
struct disk_transfer {
    struct disk_request *request;
    uint32_t bytes; // that have gone
    uint32_t tries; // that moved nothing
};
// Takes in what one call moved (or -errno). False: the request's result is set. True: the rest has to go.
bool disk_transfer_go_on(const struct disk *disk, struct disk_transfer *transfer, int64_t moved);

// A thread of an engine: its first and its last words. Where disk_thread_end is called the disk may be gone afterwards.
int disk_thread_start(struct disk *disk, void *(*run)(void *), void *argument);
void disk_thread_end(struct disk *disk);
void disk_threads_join(struct disk *disk); // of those that have ended or will

void disk_pattern(uint8_t *block, uint64_t seed); // a probe's DISK_ALIGN bytes

#endif
