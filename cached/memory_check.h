// One byte budget: do the shares for pool, index and shared memory fit into what the machine and the cgroups have?
// Asked once at start, because the answer at the cap of a cgroup or of the machine would be the kernel's, by killing.
#ifndef ICECACHE_CACHED_MEMORY_CHECK_H
#define ICECACHE_CACHED_MEMORY_CHECK_H

#include "cached/config.h"
#include "cached/memory_limits.h"

#define MEMORY_FIXED_BYTES ((uint64_t)64 << 20) // of the daemon itself: code, stacks, scratch of the shards, ZeroMQ
#define MEMORY_SPILL_BYTES ((uint64_t)16 << 20) // with a spill file: buffers of the shards, and the disk's own
#define MEMORY_SLAB_BYTES  96u                  // of the book of a slab of the spill file, at pages of 64 KiB and more
#define MEMORY_TEXT_BYTES  800u

enum memory_verdict { MEMORY_FITS, MEMORY_DOUBTFUL, MEMORY_REFUSED };

// Shares that nobody has named are made smaller where they do not fit, down to 16 MiB each; a pool that fits only in
// reserved huge pages is made to require them. `text` says what was changed, doubted or refused, empty where nothing.
enum memory_verdict memory_judge(const struct memory_limits *limits, struct config *config, char *text,
                                 size_t capacity);

// Reads the limits, judges, logs. False where the daemon must not start.
bool memory_fits(struct env *env, struct config *config);

#endif
