// Which way several rows are copied: a call for each, or one for all, whichever is faster on this GPU for blocks of
// this size. Measured on the landing's own memory before it is handed out, in a stream of its own, so that a copier is
// not in the way. What is copied is the staging, which is empty then, so the landing is as empty afterwards.
//
// Threads: one at a time per path.
#include "gpu/copy.h"

#include <stdatomic.h>
#include <stdio.h>

#define ROUNDS   3u
#define FEWEST   2u // rows of the first measurement
#define STEP     4u // times as many in the next
#define GAIN_PCT 5u // that a batch must win

struct trial {
    struct gpu_device device; // as the path's, with a stream and one fence of its own
    struct gpu_path path;     // the path over that device
    uint64_t until_ns;
};

static void trial_close(const struct trial *trial)
{
    const struct cuda_driver *driver = &trial->device.driver;
    if (trial->device.fences[0]) {
        (void)driver->event_destroy(trial->device.fences[0]);
    }
    if (trial->device.stream) {
        (void)driver->stream_destroy(trial->device.stream);
    }
}

static ice_status trial_open(struct trial *trial, const struct gpu_path *path, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    trial->device = *path->device;
    trial->device.stream = NULL;
    trial->device.fences[0] = NULL;
    trial->path = *path;
    trial->path.device = &trial->device;
    trial->until_ns = gpu_now_ns() + GPU_CHOICE_NS;
    cuda_result result = driver->stream_create(&trial->device.stream, CUDA_STREAM_NON_BLOCKING, -100);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuStreamCreateWithPriority", result, text);
    }
    result = driver->event_create(&trial->device.fences[0], CUDA_EVENT_DISABLE_TIMING);
    if (result != CUDA_OK) {
        trial->device.fences[0] = NULL;
        trial_close(trial);
        return cuda_failed(driver, "cuEventCreate", result, text);
    }
    return ICE_OK;
}

// Until everything that was issued has ended: the memory must not be handed out before.
static ice_status drain(const struct trial *trial, char *text)
{
    bool done = false;
    const ice_status status = gpu_fence_spin(&trial->device, 0, GPU_CHOICE_WAIT_NS, &done, text);
    if (status == ICE_OK && !done) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "copies that were to be timed have not ended");
        return ICE_SYSTEM;
    }
    return status;
}

// How long one way takes for the first `count` rows, from the first call to the end of the copies. *remark: as
// gpu_path_copy_rows leaves it.
static ice_status time_once(struct trial *trial, enum gpu_copy_way way, uint32_t count, uint64_t *ns, char *remark,
                            char *text)
{
    uint32_t rows[GPU_BATCH_MAX];
    for (uint32_t i = 0; i < count; i++) {
        rows[i] = i;
    }
    atomic_store_explicit(&trial->path.batch_from, way == GPU_COPY_BATCH ? 1 : 0, memory_order_relaxed);
    const uint64_t begun_ns = gpu_now_ns();
    const ice_status issued = gpu_path_copy_rows(&trial->path, trial->device.stream, rows, count, 0, text);
    if (issued == ICE_OK && text[0] != '\0') {
        (void)snprintf(remark, CUDA_TEXT_BYTES, "%s", text);
    }
    char ignored[CUDA_TEXT_BYTES];
    const ice_status ended = drain(trial, issued == ICE_OK ? text : ignored);
    *ns = gpu_now_ns() - begun_ns;
    return issued == ICE_OK ? ended : issued;
}

// The best of some rounds each way, in turn. *known: all were made before the time was up.
static ice_status compare(struct trial *trial, uint32_t count, bool *known, bool *batch_wins, char *remark, char *text)
{
    uint64_t best_ns[2] = {UINT64_MAX, UINT64_MAX};
    *known = false;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (uint32_t batch = 0; batch < 2; batch++) {
            uint64_t ns = 0;
            if (gpu_now_ns() >= trial->until_ns) {
                return ICE_OK;
            }
            const ice_status status =
                time_once(trial, batch ? GPU_COPY_BATCH : GPU_COPY_LOOP, count, &ns, remark, text);
            if (status != ICE_OK || remark[0] != '\0') {
                return status;
            }
            best_ns[batch] = ns < best_ns[batch] ? ns : best_ns[batch];
        }
    }
    *known = true;
    *batch_wins = best_ns[1] < best_ns[0] - best_ns[0] * GAIN_PCT / 100;
    return ICE_OK;
}

// From how many rows on a batch wins, and for all measured numbers beyond; 0: never.
static ice_status measure(struct trial *trial, uint32_t *batch_from, char *remark, char *text)
{
    const uint32_t rows = trial->path.shape.rows < GPU_BATCH_MAX ? trial->path.shape.rows : GPU_BATCH_MAX;
    uint64_t ns = 0;
    *batch_from = 0;
    // The first calls of their kind take long, whatever they do.
    ice_status status = time_once(trial, GPU_COPY_LOOP, 1, &ns, remark, text);
    if (status == ICE_OK) {
        status = time_once(trial, GPU_COPY_BATCH, 1, &ns, remark, text);
    }
    bool known = true;
    for (uint32_t count = FEWEST; count <= rows && known && status == ICE_OK && remark[0] == '\0'; count *= STEP) {
        bool wins = false;
        status = compare(trial, count, &known, &wins, remark, text);
        if (known) {
            *batch_from = !wins ? 0 : *batch_from != 0 ? *batch_from : count;
        }
    }
    if (remark[0] != '\0') {
        *batch_from = 0;
    }
    return status;
}

_Static_assert(FEWEST *STEP *STEP *STEP <= GPU_BATCH_MAX && FEWEST * STEP * STEP * STEP * STEP > GPU_BATCH_MAX,
               "gpu_path_way has a text for each measured number of rows");

static ice_status choose(const struct gpu_path *path, uint32_t *batch_from, char *text)
{
    struct trial trial;
    char remark[CUDA_TEXT_BYTES] = "";
    ice_status status = trial_open(&trial, path, text);
    if (status == ICE_OK) {
        status = measure(&trial, batch_from, remark, text);
        trial_close(&trial);
    }
    if (status == ICE_OK) {
        (void)snprintf(text, CUDA_TEXT_BYTES, "%s", remark);
    }
    return status;
}

ice_status gpu_path_choose(struct gpu_path *path, enum gpu_copy_way way, char *text)
{
    const struct cuda_driver *driver = &path->device->driver;
    const bool able = driver->copy_batch || driver->copy_batch_12;
    uint32_t batch_from = able && way == GPU_COPY_BATCH ? 1 : 0;
    ice_status status = ICE_OK;
    text[0] = '\0';
    if (able && way == GPU_COPY_AUTO && path->shape.rows >= FEWEST) {
        status = choose(path, &batch_from, text);
    }
    atomic_store_explicit(&path->batch_from, batch_from, memory_order_relaxed);
    return status;
}

const char *gpu_path_way(const struct gpu_path *path)
{
    switch (atomic_load_explicit(&path->batch_from, memory_order_relaxed)) {
    case 0:
        return "loop";
    case 1:
        return "batch";
    case FEWEST:
        return "batch from 2 rows on";
    case FEWEST *STEP:
        return "batch from 8 rows on";
    case FEWEST *STEP *STEP:
        return "batch from 32 rows on";
    default:
        return "batch from 128 rows on";
    }
}
