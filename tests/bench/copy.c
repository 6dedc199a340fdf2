// What it costs to bring a layer's selection into a landing: gathered by one thread from rows that lie at random in a
// region out of cache, in host memory and on to a GPU, beside one memcpy and beside the GPU link's ceiling, which is
// one copy of as many bytes from registered memory.
//
// The GPU's memory is this process's own here; the daemon reaches a worker's through the driver's mapping, by the same
// copies.
#include "commands.h"
#include "measure.h"
#include "random.h"

#include "gpu/buffer.h"
#include "gpu/store.h"
#include "proto/dtype.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KV_HEADS   8u
#define POOL_BYTES ((size_t)512 << 20)
#define REPEATS    40u // copies in a round, of which the round's figure is the median
#define PLAN_SEED  77u

enum path { PATH_MEMCPY, PATH_HOST, PATH_LINK, PATH_COPY, PATH_PUSH, PATH_KERNEL, PATHS = PATH_KERNEL + 4 };
static const struct {
    const char *name;
    double changed; // share of the slots that move
} paths[PATHS] = {{"memcpy", 1},      {"host", 1},          {"cuda-link", 1},      {"cuda-copy", 1},  {"cuda-push", 1},
                  {"cuda-kernel", 1}, {"cuda-kernel", 0.5}, {"cuda-kernel", 0.25}, {"cuda-kernel", 0}};

// One size: a selection of `tokens` for each of the KV heads.
struct selection {
    uint32_t tokens, head_dim;
    size_t row_bytes, bytes; // of one K or V row; of all
    struct landing_shape shape;
    struct landing_layout layout, held; // held: of the staging
    uint8_t *pool;                      // tokens' K and V rows side by side, POOL_BYTES
    size_t pool_rows;
    uint8_t *landing;       // held.total_bytes of host memory: the landing itself, or a GPU's staging
    struct gpu_buffer *gpu; // NULL: none
    struct random random;   // chooses the rows
};

static void gather(struct selection *selection, void (*store)(void *to, const void *from, size_t bytes))
{
    const size_t bytes = 2 * selection->row_bytes;
    for (uint32_t head = 0; head < KV_HEADS; head++) {
        uint8_t *keys = selection->landing + head * selection->layout.head_bytes;
        uint8_t *values = keys + selection->layout.side_bytes;
        const uint8_t *next[STORE_ROWS_AHEAD]; // asked for
        for (uint32_t i = 0; i < selection->tokens + STORE_ROWS_AHEAD; i++) {
            const uint32_t place = i % STORE_ROWS_AHEAD;
            if (i >= STORE_ROWS_AHEAD) {
                const size_t slot = i - STORE_ROWS_AHEAD;
                store(keys + slot * selection->row_bytes, next[place], selection->row_bytes);
                store(values + slot * selection->row_bytes, next[place] + selection->row_bytes, selection->row_bytes);
            }
            next[place] = selection->pool + random_below(&selection->random, (uint32_t)selection->pool_rows) * bytes;
            store_ask(next[place], bytes);
        }
    }
    store_fence();
}

// As many bytes in one piece, out of cache too.
static void copy_run(struct selection *selection)
{
    const size_t places = POOL_BYTES / selection->bytes;
    const size_t place = places > 1 ? random_below(&selection->random, (uint32_t)places) : 0;
    memcpy(selection->landing, selection->pool + place * selection->bytes, selection->bytes);
}

static ice_status wait_gpu(const struct gpu_buffer *gpu, char *text)
{
    bool done = false;
    ice_status status = ICE_OK;
    while (status == ICE_OK && !done) {
        status = gpu_buffer_poll(gpu, 0, &done, text);
    }
    return status;
}

static ice_status link_copy(const struct selection *selection, char *text)
{
    const struct gpu_device *device = &selection->gpu->device;
    ice_status status = gpu_device_enter(device, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result =
        device->driver.copy_to_device(selection->gpu->address, selection->landing, selection->bytes, device->stream);
    status = result == CUDA_OK ? gpu_fence_set(device, 0, text)
                               : cuda_failed(&device->driver, "cuMemcpyHtoDAsync", result, text);
    gpu_device_leave(device);
    return status == ICE_OK ? wait_gpu(selection->gpu, text) : status;
}

// Names this share of the slots as changed, evenly spread.
static void name_changed(const struct selection *selection, double share)
{
    uint32_t *slots = (void *)(selection->landing + selection->held.changed_offset);
    uint32_t *counts = (void *)(selection->landing + selection->held.changed_counts_offset);
    const uint32_t changed = (uint32_t)(share * selection->tokens);
    for (uint32_t head = 0; head < KV_HEADS; head++) {
        for (uint32_t i = 0; i < changed; i++) {
            slots[head * selection->tokens + i] = (uint32_t)((uint64_t)i * selection->tokens / changed);
        }
        counts[head] = changed;
    }
}

static ice_status kernel_copy(const struct selection *selection, char *text)
{
    const uint32_t row = 0;
    const bool cleared = false;
    ice_status status = gpu_buffer_pull(selection->gpu, &row, &cleared, 1, 0, false, 0, text);
    return status == ICE_OK ? wait_gpu(selection->gpu, text) : status;
}

static ice_status landing_copy(const struct selection *selection, char *text)
{
    const uint32_t row = 0;
    const bool cleared = false;
    ice_status status = gpu_buffer_pull(selection->gpu, &row, &cleared, 1, 0, true, 0, text);
    return status == ICE_OK ? wait_gpu(selection->gpu, text) : status;
}

static ice_status run_path(struct selection *selection, enum path path, char *text)
{
    switch (path) {
    case PATH_MEMCPY:
        copy_run(selection);
        return ICE_OK;
    case PATH_HOST:
        gather(selection, store_cached);
        return ICE_OK;
    case PATH_LINK:
        return link_copy(selection, text);
    case PATH_COPY:
        return landing_copy(selection, text);
    case PATH_PUSH:
        gather(selection, store_streaming);
        return landing_copy(selection, text);
    default:
        return kernel_copy(selection, text);
    }
}

static bool holds(const struct selection *selection)
{
    uint8_t *found = malloc(selection->bytes);
    bool same = false;
    const struct gpu_device *device = &selection->gpu->device;
    char text[CUDA_TEXT_BYTES];
    if (found != NULL && gpu_device_enter(device, text) == ICE_OK) {
        same = device->driver.copy_to_host_waiting(found, selection->gpu->address, selection->bytes) == CUDA_OK &&
               memcmp(found, selection->landing, selection->bytes) == 0;
        gpu_device_leave(device);
    }
    free(found);
    return same;
}

// Has the last copy brought the staging's bytes to the GPU? And does the kernel, over other bytes?
static bool arrived(struct selection *selection, bool has_kernel, char *text)
{
    if (!holds(selection)) {
        return false;
    }
    if (!has_kernel) {
        return true;
    }
    memset(selection->landing, 0x77, selection->bytes);
    name_changed(selection, 1);
    return kernel_copy(selection, text) == ICE_OK && holds(selection);
}

// ---- one size ----

static void add_row(json_t *rows, const struct selection *selection, enum path path, const struct samples *us)
{
    const double gb = (double)selection->bytes * paths[path].changed / 1000.0;
    const json_int_t pieces = path == PATH_HOST || path == PATH_PUSH ? KV_HEADS * (json_int_t)selection->tokens : 1;
    json_t *row = json_pack("{s:s, s:I, s:f, s:I, s:f, s:f, s:f, s:f}", "path", paths[path].name, "bytes",
                            (json_int_t)selection->bytes, "changed", paths[path].changed, "pieces", pieces, "us",
                            samples_median(us), "us_min", samples_min(us), "us_max", samples_max(us), "gb_per_s",
                            gb / samples_median(us));
    (void)json_array_append_new(rows, row);
}

static void add_ratios(json_t *ratios, const struct selection *selection, const struct samples *us)
{
    char key[64];
    json_t *of = json_object();
    (void)json_object_set_new(of, "over_memcpy",
                              json_real(samples_median(&us[PATH_MEMCPY]) / samples_median(&us[PATH_HOST])));
    if (selection->gpu != NULL) {
        const double link = samples_median(&us[PATH_LINK]);
        (void)json_object_set_new(of, "over_link", json_real(link / samples_median(&us[PATH_COPY])));
        if (selection->gpu->pull.staging != 0) {
            (void)json_object_set_new(of, "over_link_kernel", json_real(link / samples_median(&us[PATH_KERNEL])));
        }
        (void)json_object_set_new(of, "over_link_gathered", json_real(link / samples_median(&us[PATH_PUSH])));
    }
    (void)snprintf(key, sizeof key, "bytes=%zu", selection->bytes);
    (void)json_object_set_new(ratios, key, of);
}

static int measure_paths(struct selection *selection, uint32_t rounds, json_t *rows, json_t *ratios)
{
    struct samples us[PATHS] = {{0}};
    char text[CUDA_TEXT_BYTES] = "";
    const enum path last = selection->gpu == NULL              ? PATH_HOST
                           : selection->gpu->pull.staging == 0 ? PATH_PUSH
                                                               : PATHS - 1;
    for (uint32_t round = 0; round < rounds; round++) {
        for (enum path path = PATH_MEMCPY; path <= last; path++) {
            struct samples repeats = {0};
            if (path >= PATH_KERNEL) {
                name_changed(selection, paths[path].changed);
            }
            for (uint32_t i = 0; i < REPEATS; i++) {
                const uint64_t begun = measure_ns();
                if (run_path(selection, path, text) != ICE_OK) {
                    (void)fprintf(stderr, "icecache-bench: copy: %s\n", text);
                    return EXIT_CHECK;
                }
                samples_add(&repeats, (double)(measure_ns() - begun) / 1000.0);
            }
            samples_add(&us[path], samples_median(&repeats));
        }
    }
    if (selection->gpu != NULL && !arrived(selection, last > PATH_PUSH, text)) {
        (void)fprintf(stderr, "icecache-bench: copy: the GPU does not hold what was copied\n");
        return EXIT_CHECK;
    }
    for (enum path path = PATH_MEMCPY; path <= last; path++) {
        add_row(rows, selection, path, &us[path]);
    }
    add_ratios(ratios, selection, us);
    return 0;
}

// A staging must be whole pages of its own to be registered.
static uint8_t *pages(size_t bytes)
{
    uint8_t *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (memory != NULL) {
        memset(memory, 1, bytes);
    }
    return memory;
}

static int run_selection(struct selection *selection, uint32_t rounds, json_t *rows, json_t *ratios)
{
    char text[CUDA_TEXT_BYTES] = "";
    struct gpu_buffer gpu;
    int code = EXIT_MISSING;
    selection->landing = pages(selection->held.total_bytes);
    if (selection->landing == NULL) {
        (void)fputs("icecache-bench: copy: no memory\n", stderr);
        goto out;
    }
    if (gpu_buffer_open(getenv("ICECACHE_CUDA_LIBRARY"), 0, selection->layout.total_bytes, 0, &gpu, text) == ICE_OK) {
        selection->gpu = &gpu;
        if (gpu_buffer_pull_open(&gpu, &selection->shape, selection->landing, GPU_COPY_AUTO, true, text) != ICE_OK) {
            (void)fprintf(stderr, "icecache-bench: copy: %s\n", text);
            goto close_gpu;
        }
        if (gpu.pull.staging == 0) {
            (void)fprintf(stderr, "icecache-bench: copy: without the kernel: %s\n", gpu.pull.reason);
        }
    } else {
        (void)fprintf(stderr, "icecache-bench: copy: without a GPU: %s\n", text);
    }
    code = measure_paths(selection, rounds, rows, ratios);

close_gpu:
    if (selection->gpu != NULL) {
        gpu_buffer_close(&gpu);
        selection->gpu = NULL;
    }
out:
    free(selection->landing);
    return code;
}

int command_copy(const struct options *options, json_t *rows, json_t *ratios)
{
    struct arena arena = {0};
    uint8_t *pool = arena_acquire(&arena, POOL_BYTES);
    if (pool == NULL) {
        (void)fputs("icecache-bench: copy: no memory\n", stderr);
        return EXIT_MISSING;
    }
    memset(pool, 1, POOL_BYTES);
    int code = 0;
    for (uint32_t i = 0; i < options->head_dims.count && code == 0; i++) {
        for (uint32_t j = 0; j < options->budgets.count && code == 0; j++) {
            struct selection selection = {
                .tokens = options->budgets.values[j], .head_dim = options->head_dims.values[i], .pool = pool};
            random_init(&selection.random, options->seed + PLAN_SEED);
            selection.shape = (struct landing_shape){1, 1, KV_HEADS, selection.tokens, selection.head_dim, DTYPE_BF16};
            if (!landing_layout_init(&selection.layout, &selection.shape) ||
                !landing_held_init(&selection.held, &selection.shape, LANDING_PULL)) {
                code = EXIT_USAGE;
                break;
            }
            selection.row_bytes = selection.layout.slot_bytes;
            selection.bytes = KV_HEADS * selection.layout.head_bytes;
            selection.pool_rows = POOL_BYTES / (2 * selection.row_bytes);
            code = run_selection(&selection, options->rounds, rows, ratios);
        }
    }
    arena_fini(&arena);
    return code;
}
