// The daemon's GPUs: the driver, one copier thread for each GPU that a worker pushes to, and one thread that opens and
// closes workers' GPU memory.
#ifndef ICECACHE_CACHED_GPUS_H
#define ICECACHE_CACHED_GPUS_H

#include "cached/task_queue.h"
#include "gpu/device.h"

#define GPUS_MAX              16u
#define GPUS_COPY_DEADLINE_NS (10ull * 1000000000u) // a copy that takes longer never ends
#define GPUS_STOP_DEADLINE_S  5                     // for each thread at the end
#define GPUS_SPIN_NS          200000u               // how long a copier asks for the end of a copy without a pause
#define GPUS_PAUSE_NS         20000u

struct copier;
struct op;
struct server;

struct gpus {
    struct task_queue queue; // work for the opener, which the driver may keep waiting for ever
    pthread_t opener;
    bool opener_runs; // main thread
    bool used;        // reactor: the opener has had work, so the driver may keep something for ever

    // The opener only, from start to stop.
    bool driver_sought;
    ice_status driver_status;
    struct cuda_driver driver;
    char driver_text[CUDA_TEXT_BYTES];
    struct copier *copiers[GPUS_MAX];
    uint32_t copier_count;
};

void gpus_init(struct gpus *gpus);
void gpus_fini(struct gpus *gpus);
int gpus_start(struct gpus *gpus, struct server *server); // 0 or -errno
// Stops the threads. false: the driver keeps one of them, and nothing that it may use can be freed.
ICE_MUST_CHECK bool gpus_stop(struct gpus *gpus, struct server *server);

// Opener: the copier of the GPU with this UUID, started where it is the first landing there. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpus_copier(struct server *server, const uint8_t *uuid, struct copier **out, char *text);
struct gpu_device *copier_device(struct copier *copier);
// Any thread: the copies of a retrieve whose selections are staged. The op is completed when they have ended.
void copier_push(struct copier *copier, struct op *op);

#endif
