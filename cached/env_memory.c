// Private memory of the real table: regions (the pool) and chunks (the indexes). A region is sought on a ladder of page
// sizes: 1 GiB and 2 MiB reserved by the operator, transparent, collapsed, 4 KiB. What a rung has given is what the
// kernel counts afterwards; madvise's own answer is no proof. No state of its own, so any thread may call.
//
// A region is all there from the start (populate.c), is not copied into forked children, and is not in core dumps,
// because it holds users' data. An ordinary mapping has one page without access on either side: an overrun is
// caught there, and the kernel cannot merge it with a neighbour, whose pages would be counted as its own.
#include "cached/env_linux.h"

#include <errno.h>
#include <linux/mman.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_2M     ((uint64_t)2 << 20)
#define HUGE_1G     ((uint64_t)1 << 30)
#define GUARD_BYTES ((uint64_t)4096)

struct rung {
    enum env_huge kind;
    uint64_t page_bytes;
    int flags;
    const char *name, *folder;
};

static const struct rung reserved[] = {
    {ENV_HUGE_HUGETLB_1G, HUGE_1G, MAP_HUGE_1GB, "1 GiB pages", "hugepages-1048576kB"},
    {ENV_HUGE_HUGETLB_2M, HUGE_2M, MAP_HUGE_2MB, "2 MiB pages", "hugepages-2048kB"},
};

__attribute__((format(printf, 2, 3))) static void add_reason(struct env_region *out, const char *format, ...)
{
    size_t used = strlen(out->reasons);
    if (used > 0 && used + 2 < sizeof out->reasons) {
        strcpy(out->reasons + used, "; ");
        used += 2;
    }
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out->reasons + used, sizeof out->reasons - used, format, arguments);
    va_end(arguments);
}

// ---- what the kernel counts ----

// Bytes of [base, base + bytes) in huge pages; reserved ones count where they are of page_bytes.
static uint64_t count_huge(const void *base, uint64_t bytes, uint64_t page_bytes)
{
    FILE *file = fopen("/proc/self/smaps", "re");
    if (!file)
        return 0;
    char line[256];
    bool inside = false;
    uint64_t huge = 0, page_of_mapping = 0;
    while (fgets(line, sizeof line, file)) {
        unsigned long long from = 0, to = 0, kilobytes = 0;
        if (sscanf(line, "%llx-%llx ", &from, &to) == 2)
            inside = (uintptr_t)from >= (uintptr_t)base && (uintptr_t)to <= (uintptr_t)base + bytes;
        else if (inside && sscanf(line, "KernelPageSize: %llu kB", &kilobytes) == 1)
            page_of_mapping = kilobytes << 10;
        else if (inside && sscanf(line, "AnonHugePages: %llu kB", &kilobytes) == 1)
            huge += kilobytes << 10;
        else if (inside && page_of_mapping == page_bytes && sscanf(line, "Private_Hugetlb: %llu kB", &kilobytes) == 1)
            huge += kilobytes << 10;
    }
    fclose(file);
    return huge;
}

static uint64_t pages_free(struct env *env, const struct rung *rung)
{
    char path[128];
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/%s/free_hugepages", rung->folder);
    const uint64_t free_pages = env_system_number(env, path, 0);
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/%s/resv_hugepages", rung->folder);
    const uint64_t promised = env_system_number(env, path, 0);
    return free_pages > promised ? free_pages - promised : 0;
}

// ---- the rungs ----

static int keep_private(void *base, uint64_t bytes)
{
    return madvise(base, bytes, MADV_DONTFORK) || madvise(base, bytes, MADV_DONTDUMP) ? -errno : 0;
}

// Where it cannot be placed it is used all the same: memory from afar is better than none.
static void place(void *base, const struct env_region_request *request, struct env_region *out)
{
    int error = request->node == ENV_NODE_ANY ? 0 : numa_place(base, request->bytes, request->node);
    if (error)
        add_reason(out, "not placed on node%d: %s", request->node, strerror(-error));
}

static void count_placed(struct env_region *region)
{
    if (region->node != ENV_NODE_ANY)
        region->node_bytes = numa_count(region->base, region->bytes, region->node);
}

static int populate(struct env *env, const struct env_region_request *request, void *base, uint64_t page_bytes,
                    enum populate_mode mode, bool *slow_out)
{
    const struct populate what = {env, base, request->bytes, page_bytes, request->node, mode, request->watch};
    return populate_run(&what, slow_out);
}

static int map_reserved(struct env *env, const struct env_region_request *request, const struct rung *rung,
                        struct env_region *out)
{
    const uint64_t bytes = request->bytes, wanted = bytes / rung->page_bytes;
    if (bytes % rung->page_bytes) {
        add_reason(out, "%s: %llu MiB are no whole number of them", rung->name, (unsigned long long)(bytes >> 20));
        return -EINVAL;
    }
    const uint64_t free_before = pages_free(env, rung);
    // The kernel sets the pages aside here (no MAP_NORESERVE), so that two who ask cannot be promised the same ones.
    void *base =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | rung->flags, -1, 0);
    if (base == MAP_FAILED) {
        add_reason(out, "%llu of %llu %s free", (unsigned long long)free_before, (unsigned long long)wanted,
                   rung->name);
        return -errno;
    }
    bool slow;
    place(base, request, out);
    int error = keep_private(base, bytes);
    if (!error)
        error = populate(env, request, base, rung->page_bytes, POPULATE_PLAIN, &slow);
    const uint64_t huge = error ? 0 : count_huge(base, bytes, rung->page_bytes);
    if (error == 0 && huge == bytes) {
        out->base = base;
        out->bytes = out->huge_bytes = bytes;
        out->kind = rung->kind;
        return 0;
    }
    if (error == 0)
        add_reason(out, "%s: the kernel counts %llu of %llu MiB", rung->name, (unsigned long long)(huge >> 20),
                   (unsigned long long)(bytes >> 20));
    else if (error != -ECANCELED) // a cgroup may refuse them only now
        add_reason(out, "%s: %s when populated (the cgroup's hugetlb limit?)", rung->name, strerror(-error));
    munmap(base, bytes);
    return error ? error : -ENOMEM;
}

// Ordinary memory at a 2 MiB boundary between two guards, which are kept.
static void *map_guarded(uint64_t bytes)
{
    const uint64_t room = bytes + HUGE_2M + 2 * GUARD_BYTES;
    if (room < bytes)
        return NULL;
    uint8_t *raw = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    uint8_t *base = raw + GUARD_BYTES;
    base += (HUGE_2M - (uintptr_t)base % HUGE_2M) % HUGE_2M;
    uint8_t *end = base + bytes + GUARD_BYTES;
    if (base - GUARD_BYTES > raw)
        munmap(raw, (size_t)(base - GUARD_BYTES - raw));
    if (raw + room > end)
        munmap(end, (size_t)(raw + room - end));
    if (mprotect(base, bytes, PROT_READ | PROT_WRITE) == 0)
        return base;
    munmap(base - GUARD_BYTES, bytes + 2 * GUARD_BYTES);
    return NULL;
}

static void unmap_guarded(void *base, uint64_t bytes)
{
    munmap((uint8_t *)base - GUARD_BYTES, bytes + 2 * GUARD_BYTES);
}

// Makes large pages of small ones that are there. Works also where transparent pages are switched off.
static int collapse(struct env *env, const struct env_region_request *request, void *base, struct env_region *out)
{
    bool slow = false;
    int error = populate(env, request, base, HUGE_2M, POPULATE_COLLAPSE, &slow);
    const uint64_t huge = count_huge(base, request->bytes, 0);
    if (slow)
        add_reason(out, "collapsing was given up: the kernel takes far too long to compact memory");
    if (huge > out->huge_bytes)
        out->kind = ENV_HUGE_COLLAPSED;
    out->huge_bytes = huge;
    return error;
}

static int fill_guarded(struct env *env, const struct env_region_request *request, void *base, struct env_region *out)
{
    const bool transparent = request->rungs & ENV_RUNG(ENV_HUGE_TRANSPARENT);
    const bool collapsed = request->rungs & ENV_RUNG(ENV_HUGE_COLLAPSED);
    const uint64_t mib = request->bytes >> 20;
    bool slow = false;
    place(base, request, out);
    int error = keep_private(base, request->bytes);
    if (error)
        return error;
    if (transparent)
        madvise(base, request->bytes, MADV_HUGEPAGE); // refused by kernels without them: the count tells
    else if (!collapsed)
        madvise(base, request->bytes, MADV_NOHUGEPAGE);
    error = populate(env, request, base, HUGE_2M, transparent ? POPULATE_HUGE : POPULATE_PLAIN, &slow);
    if (error)
        return error;
    out->huge_bytes = count_huge(base, request->bytes, 0);
    out->kind = out->huge_bytes > 0 ? ENV_HUGE_TRANSPARENT : ENV_HUGE_NONE;
    if (slow)
        add_reason(out, "transparent pages were given up: the kernel takes far too long to compact memory");
    if (transparent && out->huge_bytes < request->bytes)
        add_reason(out, "%llu of %llu MiB got transparent pages", (unsigned long long)(out->huge_bytes >> 20),
                   (unsigned long long)mib);
    if (collapsed && out->huge_bytes < request->bytes && !slow)
        error = collapse(env, request, base, out);
    if (!error && out->huge_bytes < request->bytes && !(request->rungs & ENV_RUNG(ENV_HUGE_NONE))) {
        add_reason(out, "%llu of %llu MiB were collapsed", (unsigned long long)(out->huge_bytes >> 20),
                   (unsigned long long)mib);
        error = -ENOMEM;
    }
    return error;
}

static int map_ordinary(struct env *env, const struct env_region_request *request, struct env_region *out)
{
    void *base = map_guarded(request->bytes);
    if (!base) {
        add_reason(out, "no address space or memory for %llu MiB", (unsigned long long)(request->bytes >> 20));
        return -ENOMEM;
    }
    int error = fill_guarded(env, request, base, out);
    if (error) {
        unmap_guarded(base, request->bytes);
        return error;
    }
    out->base = base;
    out->bytes = request->bytes;
    return 0;
}

// ---- entries of the table ----

static int map_region(struct env *env, const struct env_region_request *request, struct env_region *out)
{
    *out = (struct env_region){.node = request->node};
    int error = -ENOMEM;
    for (unsigned i = 0; i < sizeof reserved / sizeof *reserved && error && error != -ECANCELED; i++) {
        if (request->rungs & ENV_RUNG(reserved[i].kind))
            error = map_reserved(env, request, &reserved[i], out);
    }
    if (error && error != -ECANCELED && request->rungs & ~ENV_RUNGS_RESERVED)
        error = map_ordinary(env, request, out);
    if (!error)
        count_placed(out);
    return error;
}

static void unmap_region(struct env *env, struct env_region *region)
{
    (void)env;
    if (region->base && ENV_RUNG(region->kind) & ENV_RUNGS_RESERVED)
        munmap(region->base, region->bytes);
    else if (region->base)
        unmap_guarded(region->base, region->bytes);
    *region = (struct env_region){0};
}

#ifndef __SANITIZE_ADDRESS__
// At a boundary of 2 MiB. The kernel may merge chunks with each other: nobody counts their pages.
static void *map_aligned(uint64_t bytes)
{
    uint64_t room = bytes + HUGE_2M;
    uint8_t *raw = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    uint64_t before = (HUGE_2M - (uintptr_t)raw % HUGE_2M) % HUGE_2M;
    if (before)
        munmap(raw, before);
    munmap(raw + before + bytes, room - before - bytes);
    return raw + before;
}

static void *acquire_chunk(struct env *env, size_t bytes)
{
    (void)env;
    void *memory = map_aligned(bytes);
    if (memory && keep_private(memory, bytes)) {
        munmap(memory, bytes);
        return NULL;
    }
    if (memory)
        madvise(memory, bytes, MADV_HUGEPAGE); // refused where huge pages are off: then small ones serve
    return memory;
}

static void release_chunk(struct env *env, void *memory, size_t bytes)
{
    (void)env;
    munmap(memory, bytes);
}
#endif

void env_memory_init(struct env *env)
{
#ifndef __SANITIZE_ADDRESS__ // which can watch over single blocks only
    env->acquire_chunk = acquire_chunk;
    env->release_chunk = release_chunk;
#endif
    env->map_region = map_region;
    env->unmap_region = unmap_region;
}
