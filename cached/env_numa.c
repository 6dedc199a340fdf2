// Memory and threads on a NUMA node, through libnuma where the build has found it; without it there is one node, and
// nothing is placed. Any thread may call.
#include "cached/env_linux.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef ICECACHE_NUMA
#include <numa.h>
#include <numaif.h>

static uint32_t cores_of(int node)
{
    struct bitmask *cores = numa_allocate_cpumask();
    uint32_t count = numa_node_to_cpus(node, cores) == 0 ? numa_bitmask_weight(cores) : 0;
    numa_free_cpumask(cores);
    return count;
}

static uint32_t list_nodes(struct env *env, int *ids, uint32_t capacity)
{
    (void)env;
    uint32_t count = 0;
    if (numa_available() < 0)
        return 0;
    for (int node = 0; node <= numa_max_node(); node++) {
        // Only those whose memory a cpuset lets us have.
        if (!numa_bitmask_isbitset(numa_all_nodes_ptr, (unsigned)node) || cores_of(node) == 0)
            continue;
        if (count == capacity)
            return 0;
        ids[count++] = node;
    }
    return count;
}

int numa_place(void *base, uint64_t bytes, int node)
{
    enum { NODES = 1024, BITS = 8 * sizeof(unsigned long) };
    unsigned long mask[NODES / BITS] = {0};
    if (node < 0 || node >= NODES)
        return -EINVAL;
    mask[(unsigned)node / BITS] = 1ul << (unsigned)node % BITS;
    // Preferred, not bound: the kernel's answer to a bound node that is full is to kill somebody. What lies where is
    // counted afterwards.
    return mbind(base, bytes, MPOL_PREFERRED, mask, NODES, 0) ? -errno : 0;
}

void numa_bind_thread(int node)
{
    if (node >= 0 && numa_available() >= 0)
        numa_run_on_node(node); // where it cannot, it populates from afar
}

uint32_t numa_cores(int node)
{
    return node >= 0 && numa_available() >= 0 && node <= numa_max_node() ? cores_of(node) : 0;
}
#else
static uint32_t list_nodes(struct env *env, int *ids, uint32_t capacity)
{
    (void)env;
    (void)ids;
    (void)capacity;
    return 0;
}

int numa_place(void *base, uint64_t bytes, int node)
{
    (void)base;
    (void)bytes;
    (void)node;
    return -ENOSYS;
}

void numa_bind_thread(int node)
{
    (void)node;
}

uint32_t numa_cores(int node)
{
    (void)node;
    return 0;
}
#endif

uint64_t numa_count(const void *base, uint64_t bytes, int node)
{
    FILE *file = fopen("/proc/self/numa_maps", "re");
    if (!file)
        return 0;
    char *line = NULL, key[16];
    size_t capacity = 0;
    uint64_t sum = 0;
    snprintf(key, sizeof key, " N%d=", node);
    while (getline(&line, &capacity, file) > 0) {
        const uint64_t from = strtoull(line, NULL, 16);
        const char *pages = strstr(line, key), *size = strstr(line, " kernelpagesize_kB=");
        if (from < (uintptr_t)base || from >= (uintptr_t)base + bytes || !pages || !size)
            continue;
        sum += strtoull(pages + strlen(key), NULL, 10) * strtoull(strchr(size, '=') + 1, NULL, 10) << 10;
    }
    free(line);
    fclose(file);
    return sum;
}

void env_numa_init(struct env *env)
{
    env->nodes = list_nodes;
}
