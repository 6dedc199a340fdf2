// Parts of the real table of outside effects. Linux only.
#ifndef ICECACHE_CACHED_ENV_LINUX_H
#define ICECACHE_CACHED_ENV_LINUX_H

#include "cached/env.h"

void env_zmq_init(struct env *env);    // fills the bus_ entries
void env_file_init(struct env *env);   // those of the spill folder
void env_memory_init(struct env *env); // regions and chunks
void env_numa_init(struct env *env);   // nodes

// NUMA nodes (env_numa.c).
int numa_place(void *base, uint64_t bytes, int node);            // before its pages are made; 0 or -errno
void numa_bind_thread(int node);                                 // the calling thread, for good; ENV_NODE_ANY leaves it
uint32_t numa_cores(int node);                                   // 0: not known
uint64_t numa_count(const void *base, uint64_t bytes, int node); // bytes that lie there, as the kernel counts them

// Populates a range with several threads (populate.c).
enum populate_mode {
    POPULATE_PLAIN,   // in pages as the mapping has them; what cannot be had is an error
    POPULATE_HUGE,    // the same, but small pages for the rest once large ones are far too slow
    POPULATE_COLLAPSE // what is there already is made huge where the kernel can, until that is far too slow
};
struct populate {
    struct env *env;
    uint8_t *base;
    uint64_t bytes;
    uint64_t page_bytes; // no call gets less than one
    int node;            // whose cores do it, or ENV_NODE_ANY
    enum populate_mode mode;
    const struct env_watch *watch; // may be NULL
};
// 0 or -errno: of the first call that failed, or -ECANCELED by the watch. *slow_out: huge pages were given up.
int populate_run(const struct populate *what, bool *slow_out);

#endif
