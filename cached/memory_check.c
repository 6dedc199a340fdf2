// The byte budget at start, see memory_check.h. Pure but for memory_fits. Main thread.
//
// The pool is taken at once, so it must be there now. Index and shared memory are the most that may be taken later:
// more than is available at the moment is doubtful, more than there can ever be is refused. Reserved huge pages are
// neither in what is available nor charged to a cgroup's memory limit, so a pool in them counts for nothing here.
#include "cached/memory_check.h"

#include "cached/tier.h"

#include "cached/log.h"

#include <stdio.h>

#define SHARE_MIN_BYTES  ((uint64_t)16 << 20)
#define SHARE_STEP_BYTES ((uint64_t)2 << 20)

static unsigned long long mib(uint64_t bytes)
{
    return bytes >> 20;
}

static uint64_t lesser(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

// What cannot be exceeded, and who says so.
static uint64_t hard_limit(const struct memory_limits *limits, const char **source)
{
    *source = limits->cgroup_bytes <= limits->ram_bytes ? limits->cgroup_file
                                                        : "/proc/meminfo (MemTotal less reserved huge pages)";
    return lesser(limits->cgroup_bytes, limits->ram_bytes);
}

static bool pool_can_be_reserved(const struct memory_limits *limits, const struct config *config)
{
    const bool in_1g = config->pool_bytes % ((uint64_t)1 << 30) == 0 && config->pool_bytes <= limits->reserved_1g_bytes;
    return config->huge_pages != CONFIG_HUGE_OFF && (in_1g || config->pool_bytes <= limits->reserved_bytes);
}

// Of the pool what counts against RAM and cgroup.
// The daemon itself and, with a spill file, its books: an entry for each page of 4 KiB of the pool, one for each slab
// of the file, and the buffers of the shards.
static uint64_t fixed_bytes(const struct config *config)
{
    if (config->spill_directory[0] == '\0')
        return MEMORY_FIXED_BYTES;
    return MEMORY_FIXED_BYTES + MEMORY_SPILL_BYTES + config->pool_bytes / EXTENT_UNIT * sizeof(struct tier_book) +
           config->spill_bytes / EXTENTS_SLAB_BYTES * MEMORY_SLAB_BYTES;
}

static uint64_t pool_charged(const struct memory_limits *limits, const struct config *config)
{
    return config->huge_pages == CONFIG_HUGE_REQUIRE || pool_can_be_reserved(limits, config) ? 0 : config->pool_bytes;
}

// The sizes are at most 2^46 each, so no sum wraps.
static uint64_t sum_charged(const struct memory_limits *limits, const struct config *config)
{
    return pool_charged(limits, config) + config->index_bytes + config->shared_bytes + fixed_bytes(config);
}

static size_t print_shares(const struct memory_limits *limits, const struct config *config, char *text, size_t capacity)
{
    const bool counted = pool_charged(limits, config) > 0;
    return (size_t)snprintf(text, capacity,
                            "--pool-bytes %llu MiB%s, --index-bytes %llu MiB, --shared-bytes %llu MiB and %llu MiB for "
                            "the daemon itself are %llu MiB",
                            mib(config->pool_bytes), counted ? "" : " (in reserved huge pages, not counted)",
                            mib(config->index_bytes), mib(config->shared_bytes), mib(fixed_bytes(config)),
                            mib(sum_charged(limits, config)));
}

// Shares the room evenly among the defaults that count. False where there is too little to share.
static bool shrink_defaults(const struct memory_limits *limits, struct config *config, uint64_t hard)
{
    // Of what is available a quarter is left to others.
    const uint64_t room = lesser(hard, limits->available_bytes / 4 * 3);
    uint64_t taken = fixed_bytes(config), *defaults[3];
    const uint64_t pool = pool_charged(limits, config);
    uint32_t count = 0;
    if (pool > 0 && !config->given.pool_bytes)
        defaults[count++] = &config->pool_bytes;
    else
        taken += pool;
    if (!config->given.index_bytes)
        defaults[count++] = &config->index_bytes;
    else
        taken += config->index_bytes;
    if (!config->given.shared_bytes)
        defaults[count++] = &config->shared_bytes;
    else
        taken += config->shared_bytes;
    if (count == 0 || room <= taken)
        return false;
    const uint64_t share = (room - taken) / count / SHARE_STEP_BYTES * SHARE_STEP_BYTES;
    if (share < SHARE_MIN_BYTES)
        return false;
    for (uint32_t i = 0; i < count; i++)
        *defaults[i] = lesser(*defaults[i], share);
    return true;
}

static enum memory_verdict refuse(const struct memory_limits *limits, const struct config *config, const char *source,
                                  uint64_t limit, char *text, size_t capacity)
{
    size_t used = print_shares(limits, config, text, capacity);
    if (used < capacity)
        snprintf(text + used, capacity - used,
                 "; %s has %llu MiB. Lower one of them, raise the limit%s, or start with --memory-check warn", source,
                 mib(limit), pool_charged(limits, config) > 0 ? ", reserve huge pages for the pool" : "");
    return MEMORY_REFUSED;
}

enum memory_verdict memory_judge(const struct memory_limits *limits, struct config *config, char *text, size_t capacity)
{
    const char *source;
    const uint64_t hard = hard_limit(limits, &source);
    text[0] = '\0';
    if (sum_charged(limits, config) > lesser(hard, limits->available_bytes) && shrink_defaults(limits, config, hard)) {
        size_t used = (size_t)snprintf(text, capacity, "less memory than the defaults take, so they are smaller: ");
        print_shares(limits, config, text + used, capacity - used);
    }
    if (sum_charged(limits, config) > hard)
        return refuse(limits, config, source, hard, text, capacity);
    if (pool_charged(limits, config) > limits->available_bytes)
        return refuse(limits, config, "/proc/meminfo (MemAvailable), out of which the pool is taken at once,",
                      limits->available_bytes, text, capacity);
    if (sum_charged(limits, config) > limits->available_bytes) {
        size_t used = print_shares(limits, config, text, capacity);
        if (used < capacity)
            snprintf(text + used, capacity - used,
                     "; only %llu MiB are available now, so that they may not be there when they are wanted",
                     mib(limits->available_bytes));
        return MEMORY_DOUBTFUL;
    }
    if (config->huge_pages == CONFIG_HUGE_PREFER && pool_charged(limits, config) == 0 &&
        sum_charged(limits, config) + config->pool_bytes > lesser(hard, limits->available_bytes)) {
        config->huge_pages = CONFIG_HUGE_REQUIRE;
        snprintf(text, capacity, "the pool fits in reserved huge pages only: as with --huge-pages require");
    }
    return MEMORY_FITS;
}

bool memory_fits(struct env *env, struct config *config)
{
    struct memory_limits limits;
    char text[MEMORY_TEXT_BYTES];
    memory_limits_read(env, &limits);
    const enum memory_verdict verdict = memory_judge(&limits, config, text, sizeof text);
    const bool refused = verdict == MEMORY_REFUSED && config->memory_check == CONFIG_MEMORY_REFUSE;
    if (refused)
        log_error("%s", text);
    else if (verdict != MEMORY_FITS)
        log_warn("%s", text);
    else if (text[0])
        log_info("%s", text);
    return !refused;
}
