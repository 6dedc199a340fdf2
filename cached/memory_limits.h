// What memory there is for the daemon: the machine's, and the limits of the cgroups that it runs in.
#ifndef ICECACHE_CACHED_MEMORY_LIMITS_H
#define ICECACHE_CACHED_MEMORY_LIMITS_H

#include "cached/env.h"

#define MEMORY_UNKNOWN UINT64_MAX // not to be read, or without limit

struct memory_limits {
    uint64_t ram_bytes;       // MemTotal without what is set aside for reserved huge pages of any size
    uint64_t available_bytes; // MemAvailable; reserved huge pages are not in it
    uint64_t cgroup_bytes;    // the smallest limit on the way up to the root; reserved huge pages do not count there
    char cgroup_file[256];    // that says so
    uint64_t reserved_bytes;  // in free 2 MiB pages, as far as the cgroups' hugetlb limits let us have them
    uint64_t reserved_1g_bytes;
};

// Never fails: what cannot be read is not known. Reads small files only.
void memory_limits_read(struct env *env, struct memory_limits *out);

#endif
