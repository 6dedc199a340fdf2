// How much memory of a GPU this process takes, by NVML, the library behind nvidia-smi. It is found at run time, as the
// CUDA driver is; without it the figure is unknown.
//
// The types are our own and as NVML's ABI has them; tests/gpu/abi.c holds them against nvml.h where that is installed.
// Threads: one at a time per watch. Calls may take long, or hang where the driver does.
#ifndef ICECACHE_GPU_NVML_H
#define ICECACHE_GPU_NVML_H

#include "proto/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NVML_LIBRARY_DEFAULT "libnvidia-ml.so.1"
#define NVML_TEXT_BYTES      256u
#define NVML_PROCESSES_MAX   256u
#define NVML_NOT_AVAILABLE   UINT64_MAX // instead of a process's bytes

enum { NVML_OK = 0, NVML_INSUFFICIENT_SIZE = 7 };

typedef int nvml_result;
typedef struct nvml_device *nvml_device;

struct nvml_process {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
};

struct nvml_memory {
    unsigned long long total_bytes, free_bytes, used_bytes;
};

// clang-format off
#define NVML_ENTRIES(X) \
    X(init,             "nvmlInit_v2",                              (void)) \
    X(shutdown,         "nvmlShutdown",                             (void)) \
    X(device_by_uuid,   "nvmlDeviceGetHandleByUUID",                (const char *uuid, nvml_device *device)) \
    X(device_memory,    "nvmlDeviceGetMemoryInfo",                  (nvml_device device, struct nvml_memory *memory)) \
    X(device_processes, "nvmlDeviceGetComputeRunningProcesses_v3",  (nvml_device device, unsigned *count, struct nvml_process *processes))
// clang-format on

enum nvml_source {
    NVML_UNKNOWN, // see the watch's text
    NVML_PROCESS, // what NVML says of this process
    NVML_GROWTH,  // how much more of the GPU was in use after the context had been made than before
};

// One GPU, from before this process has a context there.
struct nvml_watch {
#define NVML_ENTRY_FIELD(field, symbol, parameters) nvml_result(*field) parameters;
    NVML_ENTRIES(NVML_ENTRY_FIELD)
#undef NVML_ENTRY_FIELD
    bool open;
    nvml_device device;
    unsigned pids_before[NVML_PROCESSES_MAX];
    unsigned count_before;
    unsigned pid; // this process's as NVML has it, which differs where pids are a container's own; 0: not known
    uint64_t used_before_bytes;
    uint64_t growth_bytes;
    char text[NVML_TEXT_BYTES]; // why the figure is unknown
};

// Before the context is made. uuid: as nvidia-smi prints it. What fails is kept in the text.
void nvml_watch_open(struct nvml_watch *watch, const char *library, const char *uuid);
// When it has been made.
void nvml_watch_context(struct nvml_watch *watch);
// The bytes now; 0 where they are unknown.
enum nvml_source nvml_watch_read(struct nvml_watch *watch, uint64_t *bytes);
void nvml_watch_close(struct nvml_watch *watch);

#endif
