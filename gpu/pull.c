// Pulling, and the measurement that chooses how.
//
// The kernel reads the staging over the link, slot by slot; a copy engine reads a block as one piece. Which is faster
// depends on the link, on the block's size and on how much of it has changed, so both are timed on this very landing.
#include "gpu/pull.h"

#include <stdio.h>
#include <string.h>

#define ROUNDS      8u            // of each way, the fastest counts: what disturbs only makes slower
#define MEASURE_NS  20000000ull   // after which no further round begins
#define DEADLINE_NS 1000000000ull // of one round

// ---- what the GPU sees ----

// The staging is registered in pieces: only where they are one range to the GPU can a kernel walk through it.
static ice_status find_staging(struct gpu_pull *pull, char *text)
{
    const struct gpu_path *path = &pull->path;
    const struct cuda_driver *driver = &path->device->driver;
    for (uint64_t offset = 0; offset < path->registered_bytes; offset += GPU_REGISTER_BYTES) {
        cuda_address address = 0;
        const cuda_result result = driver->host_address(&address, path->from + offset, 0);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuMemHostGetDevicePointer", result, text);
        }
        if (offset == 0) {
            pull->staging = address;
        } else if (address != pull->staging + offset) {
            (void)snprintf(text, CUDA_TEXT_BYTES, "the staging lies in several places for the GPU; use fewer rows");
            return ICE_NOT_SUPPORTED;
        }
    }
    return ICE_OK;
}

static void give_up_kernel(struct gpu_pull *pull, const char *text)
{
    gpu_scatter_close(pull->path.device, &pull->scatter);
    pull->staging = 0;
    (void)snprintf(pull->reason, sizeof(pull->reason), "%s", text);
}

// ---- issuing ----

static ice_status issue_kernel(const struct gpu_pull *pull, cuda_stream stream, const uint32_t *rows, uint32_t count,
                               uint32_t layer, char *text)
{
    const struct gpu_path *path = &pull->path;
    const struct landing_layout *held = &path->held;
    struct scatter_job job = {
        .from = pull->staging,
        .to = path->to + landing_block(&path->layout, &path->shape, 0, layer),
        .from_stride = held->block_bytes,
        .to_stride = path->shape.layers * path->layout.block_bytes,
        .side_bytes = held->side_bytes,
        .positions_offset = held->positions_offset,
        .counts_offset = held->counts_offset,
        .changed_offset = held->changed_offset,
        .changed_counts_offset = held->changed_counts_offset,
        .kv_heads = path->shape.kv_heads,
        .slots = path->shape.slots,
        .slot_bytes = (uint32_t)held->slot_bytes,
        .row_count = count,
    };
    memcpy(job.rows, rows, count * sizeof(*rows));
    return gpu_scatter_launch(path->device, &pull->scatter, &job, stream, text);
}

ice_status gpu_pull_issue(struct gpu_pull *pull, cuda_stream stream, const uint32_t *rows, uint32_t count,
                          uint32_t layer, bool whole, char *text)
{
    return whole ? gpu_path_copy_rows(&pull->path, stream, rows, count, layer, text)
                 : issue_kernel(pull, stream, rows, count, layer, text);
}

// ---- measuring ----

// Names the first `count` slots of each head of row 0 as changed.
static void name_changed(const struct gpu_pull *pull, uint32_t count)
{
    const struct gpu_path *path = &pull->path;
    uint32_t *const changed = (void *)(path->from + path->held.changed_offset);
    uint32_t *const counts = (void *)(path->from + path->held.changed_counts_offset);
    for (uint32_t head = 0; head < path->shape.kv_heads; head++) {
        for (uint32_t i = 0; i < count; i++) {
            changed[(uint64_t)head * path->shape.slots + i] = i;
        }
        counts[head] = count;
    }
}

static ice_status time_once(struct gpu_pull *pull, bool whole, uint64_t *best_ns, char *text)
{
    const uint32_t row = 0;
    const uint64_t begun = gpu_now_ns();
    ice_status status = gpu_pull_issue(pull, pull->path.device->stream, &row, 1, 0, whole, text);
    bool done = true;
    if (status == ICE_OK) {
        status = gpu_fence_spin(pull->path.device, 0, DEADLINE_NS, &done, text);
    }
    if (status == ICE_OK && !done) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "a copy to the GPU has not ended within a second");
        status = ICE_TIMEOUT;
    }
    const uint64_t spent = gpu_now_ns() - begun;
    *best_ns = spent < *best_ns ? spent : *best_ns;
    return status;
}

// The first round warms up: what it takes does not count, unless there is time for no other.
static ice_status time_way(struct gpu_pull *pull, bool whole, float *us, char *text)
{
    const uint64_t until = gpu_now_ns() + MEASURE_NS / 3;
    uint64_t warm_ns = UINT64_MAX, best_ns = UINT64_MAX;
    ice_status status = time_once(pull, whole, &warm_ns, text);
    for (uint32_t round = 0; round < ROUNDS && status == ICE_OK && gpu_now_ns() < until; round++) {
        status = time_once(pull, whole, &best_ns, text);
    }
    *us = (float)(best_ns < warm_ns ? best_ns : warm_ns) / 1000.0f;
    return status;
}

// The staging and the landing hold nothing yet, so what is copied is zeros.
static ice_status measure_kernel(struct gpu_pull *pull, char *text)
{
    name_changed(pull, pull->path.shape.slots);
    ice_status status = time_way(pull, false, &pull->costs.changed_all, text);
    name_changed(pull, 0);
    return status == ICE_OK ? time_way(pull, false, &pull->costs.changed_none, text) : status;
}

bool gpu_pull_prefers_kernel(const struct gpu_pull *pull, uint32_t rows, float share)
{
    const struct gpu_pull_costs *costs = &pull->costs;
    const float each = costs->changed_all > costs->changed_none ? costs->changed_all - costs->changed_none : 0;
    return pull->staging && costs->changed_none + (float)rows * share * each < (float)rows * costs->block;
}

// ---- open and close ----

ice_status gpu_pull_open(struct gpu_pull *pull, const struct gpu_device *device, cuda_address to,
                         const struct landing_shape *shape, uint8_t *staging, enum gpu_copy_way way, bool wants_kernel,
                         char *text)
{
    *pull = (struct gpu_pull){0};
    ice_status status = gpu_path_open(&pull->path, device, to, shape, LANDING_PULL, staging, text);
    if (status == ICE_OK) {
        status = gpu_path_choose(&pull->path, way, text);
    }
    if (status == ICE_OK) {
        status = time_way(pull, true, &pull->costs.block, text);
    }
    if (status != ICE_OK) {
        return status; // copies may be under way: what is registered stays so until the close
    }
    char reason[CUDA_TEXT_BYTES] = "it was not asked for";
    status = wants_kernel ? find_staging(pull, reason) : ICE_NOT_SUPPORTED;
    if (status == ICE_OK) {
        status = gpu_scatter_open(device, &pull->scatter, reason);
    }
    if (status == ICE_OK) {
        status = measure_kernel(pull, reason);
    }
    if (status != ICE_OK) {
        give_up_kernel(pull, reason);
    }
    return ICE_OK;
}

void gpu_pull_close(struct gpu_pull *pull)
{
    gpu_scatter_close(pull->path.device, &pull->scatter);
    gpu_path_close(&pull->path);
}
