// The daemon's GPUs: one thread that finds the driver and its GPUs, and for each GPU that a worker pushes to a thread
// that opens and closes workers' memory there and one that copies (copier.h).
#ifndef ICECACHE_CACHED_GPUS_H
#define ICECACHE_CACHED_GPUS_H

#include "cached/copier.h"
#include "cached/task_queue.h"
#include "gpu/nvml.h"
#include "proto/limits.h"

#define GPUS_MAX              WIRE_STATS_GPUS_MAX
#define GPUS_LOOK_NS          (500ull * 1000000u)   // between two looks at what the driver keeps
#define GPUS_OPEN_DEADLINE_NS (15ull * 1000000000u) // an opener that is at one thing for longer is avoided
#define GPUS_STOP_DEADLINE_S  5                     // for each thread at the end
#define GPUS_VRAM_NS          (1000000000ull)       // between two looks at the daemon's memory on a GPU

// One GPU, from the first landing there until the end.
struct gpu {
    // Immutable once it is listed.
    struct server *server;
    uint8_t uuid[CUDA_UUID_BYTES];
    uint32_t number; // in the list
    cuda_device id;
    pthread_t opener;

    struct task_queue queue;  // work for the opener, which the driver may keep waiting for ever
    _Atomic uint64_t busy_ns; // since when the opener is at what it does; 0: it waits for work

    // Written by the opener, once; the others find it through the copier.
    struct gpu_device device;
    _Atomic(struct copier *) copier; // NULL: the GPU is not open
    struct nvml_watch watch;         // the opener's alone

    // Reactor only.
    uint32_t landings; // open

    // What the daemon takes of the GPU's memory, as the opener has last seen it.
    struct task vram_task;
    _Atomic bool vram_asked; // the task is queued
    pthread_mutex_t lock;    // guards what follows
    uint64_t vram_ns;        // when; 0: never
    uint64_t vram_bytes;
    enum nvml_source vram_source;
    char vram_text[NVML_TEXT_BYTES]; // why it is unknown
};

struct gpu_vram {
    uint64_t bytes;
    enum nvml_source source;
    char text[NVML_TEXT_BYTES]; // where the figure comes from, or why it is unknown
};

struct gpus {
    struct task_queue queue; // work for the finder, which the driver may keep waiting for ever
    pthread_t finder;
    bool finder_runs;   // main thread
    bool used;          // reactor: there has been work, so the driver may keep something for ever
    uint64_t looked_ns; // reactor

    // The finder only, from start to stop.
    bool driver_sought;
    ice_status driver_status;
    struct cuda_driver driver;
    char driver_text[CUDA_TEXT_BYTES];

    // The finder adds; entries below the count stay as they are.
    struct gpu *list[GPUS_MAX];
    _Atomic uint32_t count;
};

void gpus_init(struct gpus *gpus);
void gpus_fini(struct gpus *gpus);
int gpus_start(struct gpus *gpus, struct server *server); // 0 or -errno
// Stops the threads. false: the driver keeps one of them, and nothing that it may use can be freed.
ICE_MUST_CHECK bool gpus_stop(struct gpus *gpus, struct server *server);

// Any thread: the GPU, where a landing has been opened there before; else NULL, and the finder knows.
struct gpu *gpus_known(struct gpus *gpus, const uint8_t *uuid);
// Finder: the GPU with this UUID, whose opener is started where it is the first landing there. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpus_find(struct server *server, const uint8_t *uuid, struct gpu **out, char *text);
// Any thread: whether landings can be opened there, as far as one can tell without the driver.
ICE_MUST_CHECK ice_status gpu_check(const struct gpu *gpu, char *text);
// The GPU's opener: opens the GPU and starts its copier where that has not been done. text[CUDA_TEXT_BYTES].
ICE_MUST_CHECK ice_status gpu_ready(struct gpu *gpu, char *text);
// Reactor: what was seen last, and has the opener look again where that is GPUS_VRAM_NS ago.
void gpu_vram(struct gpu *gpu, struct gpu_vram *out);
// Reactor, each round: notices what the driver keeps.
void gpus_look(struct gpus *gpus, uint64_t now_ns);

#endif
