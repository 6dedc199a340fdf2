// Reads /proc/meminfo, /sys/kernel/mm/hugepages and the cgroups of this process, version 2 and version 1 alike. A limit
// may stand at any level up to the root of what is mounted, so all are looked at. Main thread, at start.
#include "cached/memory_limits.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_BYTES_MAX ((size_t)256 << 10) // of mountinfo and cgroup, cut beyond: machines with thousands of mounts
#define PATH_BYTES     512u
#define NO_LIMIT       ((uint64_t)1 << 62) // version 1 writes a number near 2^63

// ---- the machine ----

// "MemTotal:       24684092 kB"
static uint64_t meminfo(const char *text, const char *key)
{
    for (const char *line = text; line; line = strchr(line, '\n'), line += line != NULL) {
        if (strncmp(line, key, strlen(key)) == 0)
            return strtoull(line + strlen(key), NULL, 10) << 10;
    }
    return MEMORY_UNKNOWN;
}

static void read_machine(struct env *env, struct memory_limits *out)
{
    char text[8192];
    if (env->read_system(env, "/proc/meminfo", text, sizeof text) != 0)
        return;
    const uint64_t total = meminfo(text, "MemTotal:"), set_aside = meminfo(text, "Hugetlb:");
    out->ram_bytes = total;
    if (total != MEMORY_UNKNOWN && set_aside != MEMORY_UNKNOWN)
        out->ram_bytes = total > set_aside ? total - set_aside : 0;
    out->available_bytes = meminfo(text, "MemAvailable:");
}

static uint64_t free_reserved(struct env *env, const char *folder, uint64_t page_bytes)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/%s/free_hugepages", folder);
    const uint64_t free_pages = env_system_number(env, path, 0);
    snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/%s/resv_hugepages", folder);
    const uint64_t promised = env_system_number(env, path, 0);
    return free_pages > promised ? (free_pages - promised) * page_bytes : 0;
}

// ---- cgroups ----

// Where a controller's files are: the mount, and our place below it.
struct cgroup {
    char mount[PATH_BYTES], place[PATH_BYTES];
    bool v2;
};

static bool list_has(const char *list, size_t length, const char *word)
{
    for (size_t from = 0; from < length;) {
        const char *comma = memchr(list + from, ',', length - from);
        const size_t size = comma ? (size_t)(comma - list) - from : length - from;
        if (size == strlen(word) && memcmp(list + from, word, size) == 0)
            return true;
        from += size + 1;
    }
    return false;
}

// Our path in the hierarchy of a controller: "4:memory:/path", or "0::/path" for version 2.
static bool find_path(const char *text, const char *controller, bool v2, char *path)
{
    for (const char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        const char *first = strchr(line, ':'), *second = first ? strchr(first + 1, ':') : NULL;
        if (!second)
            return false;
        const size_t length = (size_t)(second - first - 1);
        if (v2 ? length != 0 : !list_has(first + 1, length, controller))
            continue;
        const size_t size = strcspn(second + 1, "\n");
        if (size >= PATH_BYTES)
            return false;
        memcpy(path, second + 1, size);
        path[size] = '\0';
        return true;
    }
    return false;
}

// One line of mountinfo: "36 35 98:0 /root /mount options [tags] - type source options". False where it is not the
// controller's.
static bool parse_mount(const char *line, const char *controller, bool v2, char *root, char *mount)
{
    char options[PATH_BYTES];
    const char *behind = strstr(line, " - ");
    const char *end = line + strcspn(line, "\n");
    if (!behind || behind > end || sscanf(line, "%*s %*s %*s %511s %511s", root, mount) != 2)
        return false;
    char type[32];
    if (sscanf(behind, " - %31s %*s %511s", type, options) != 2)
        return false;
    if (v2)
        return strcmp(type, "cgroup2") == 0;
    return strcmp(type, "cgroup") == 0 && list_has(options, strlen(options), controller);
}

static bool find_cgroup(struct env *env, char *text, const char *controller, bool v2, struct cgroup *out)
{
    char path[PATH_BYTES], root[PATH_BYTES];
    if (env->read_system(env, "/proc/self/cgroup", text, FILE_BYTES_MAX) != 0 ||
        !find_path(text, controller, v2, path) ||
        env->read_system(env, "/proc/self/mountinfo", text, FILE_BYTES_MAX) != 0)
        return false;
    for (const char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        if (!parse_mount(line, controller, v2, root, out->mount))
            continue;
        // In a container the mount's root may be our own cgroup, or one above it; what is outside cannot be seen.
        const size_t length = strcmp(root, "/") == 0 ? 0 : strlen(root);
        const bool below =
            strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == '\0') && !strstr(path, "/..");
        strcpy(out->place, below ? path + length : "");
        if (strcmp(out->place, "/") == 0)
            out->place[0] = '\0';
        out->v2 = v2;
        return true;
    }
    return false;
}

static uint64_t read_limit(struct env *env, const char *path)
{
    const uint64_t limit = env_system_number(env, path, MEMORY_UNKNOWN); // "max" is no number
    return limit < NO_LIMIT ? limit : MEMORY_UNKNOWN;
}

// The smallest limit from our place up to the mount, less what is in use there where `used` names a file.
static uint64_t smallest(struct env *env, const struct cgroup *group, const char *limit, const char *used, char *file,
                         size_t capacity)
{
    char place[PATH_BYTES], path[3 * PATH_BYTES];
    uint64_t least = MEMORY_UNKNOWN;
    strcpy(place, group->place);
    for (;;) {
        snprintf(path, sizeof path, "%s%s/%s", group->mount, place, limit);
        uint64_t here = read_limit(env, path);
        if (here < least && file)
            snprintf(file, capacity, "%.*s", (int)capacity - 1, path);
        if (here != MEMORY_UNKNOWN && used) {
            snprintf(path, sizeof path, "%s%s/%s", group->mount, place, used);
            const uint64_t in_use = env_system_number(env, path, 0);
            here = here > in_use ? here - in_use : 0;
        }
        least = here < least ? here : least;
        char *cut = strrchr(place, '/');
        if (!cut)
            return least;
        *cut = '\0';
    }
}

static void read_memory_limit(struct env *env, char *text, struct memory_limits *out)
{
    for (int v2 = 0; v2 < 2; v2++) {
        struct cgroup group;
        char file[sizeof out->cgroup_file] = "";
        if (!find_cgroup(env, text, "memory", v2, &group))
            continue;
        const char *name = v2 ? "memory.max" : "memory.limit_in_bytes";
        const uint64_t limit = smallest(env, &group, name, NULL, file, sizeof file);
        if (limit < out->cgroup_bytes) {
            out->cgroup_bytes = limit;
            memcpy(out->cgroup_file, file, sizeof file);
        }
    }
}

static uint64_t reserved_limit(struct env *env, char *text, const char *size)
{
    static const char *const names[2][2][2] = {
        {{"limit_in_bytes", "usage_in_bytes"}, {"rsvd.limit_in_bytes", "rsvd.usage_in_bytes"}},
        {{"max", "current"}, {"rsvd.max", "rsvd.current"}},
    };
    uint64_t least = MEMORY_UNKNOWN;
    for (int v2 = 0; v2 < 2; v2++) {
        struct cgroup group;
        if (!find_cgroup(env, text, "hugetlb", v2, &group))
            continue;
        for (int i = 0; i < 2; i++) {
            char limit[64], used[64];
            snprintf(limit, sizeof limit, "hugetlb.%s.%s", size, names[v2][i][0]);
            snprintf(used, sizeof used, "hugetlb.%s.%s", size, names[v2][i][1]);
            const uint64_t here = smallest(env, &group, limit, used, NULL, 0);
            least = here < least ? here : least;
        }
    }
    return least;
}

// ---- all of it ----

static uint64_t lesser(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void memory_limits_read(struct env *env, struct memory_limits *out)
{
    *out = (struct memory_limits){
        .ram_bytes = MEMORY_UNKNOWN, .available_bytes = MEMORY_UNKNOWN, .cgroup_bytes = MEMORY_UNKNOWN};
    read_machine(env, out);
    out->reserved_bytes = free_reserved(env, "hugepages-2048kB", (uint64_t)2 << 20);
    out->reserved_1g_bytes = free_reserved(env, "hugepages-1048576kB", (uint64_t)1 << 30);
    static char text[FILE_BYTES_MAX]; // one start, one thread
    read_memory_limit(env, text, out);
    out->reserved_bytes = lesser(out->reserved_bytes, reserved_limit(env, text, "2MB"));
    out->reserved_1g_bytes = lesser(out->reserved_1g_bytes, reserved_limit(env, text, "1GB"));
}
