// NVML without a GPU, for tests, beside the fake driver: a process has a context where that one says so (a file
// context-PID-DEVICE in FAKE_CUDA_DIR), and 300 MiB for it. Contexts of pid 1 stand for those of everybody else.
//
// FAKE_NVML_PID_OFFSET is added to every pid, as a container's own numbers differ from the machine's. FAKE_NVML:
// "silent" lists no process, "mute" lists them without their bytes.
#include "gpu/nvml.h"

#include "fake_fail.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { UNINITIALIZED = 1, NOT_FOUND = 6, CONTEXT_MIB = 300, DEVICES = 4 };

struct nvml_device {
    int id;
};

static struct nvml_device devices[DEVICES] = {{0}, {1}, {2}, {3}};
static int inits;

static bool is(const char *what)
{
    const char *wanted = getenv("FAKE_NVML");
    return wanted && strcmp(wanted, what) == 0;
}

// The pids of all contexts on a device.
static unsigned contexts(int device, unsigned *pids, unsigned capacity)
{
    unsigned count = 0;
    DIR *folder = opendir(fake_folder());
    if (!folder) {
        return 0;
    }
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        int pid, on;
        if (sscanf(entry->d_name, "context-%d-%d", &pid, &on) == 2 && on == device) {
            if (count < capacity) {
                pids[count] = (unsigned)pid;
            }
            count++;
        }
    }
    (void)closedir(folder);
    return count;
}

EXPORT nvml_result nvmlInit_v2(void);
EXPORT nvml_result nvmlInit_v2(void)
{
    const int code = fake_injected("nvmlInit_v2", -1);
    inits += code == 0;
    return code;
}

EXPORT nvml_result nvmlShutdown(void);
EXPORT nvml_result nvmlShutdown(void)
{
    const int code = fake_injected("nvmlShutdown", -1);
    if (code == 0 && inits == 0) {
        return UNINITIALIZED;
    }
    inits -= code == 0;
    return code;
}

EXPORT nvml_result nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *device);
EXPORT nvml_result nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *device)
{
    const int code = fake_injected("nvmlDeviceGetHandleByUUID", -1);
    if (code != 0 || inits == 0) {
        return code != 0 ? code : UNINITIALIZED;
    }
    // GPU n of the fake driver has 16 bytes of 0x40 + n.
    if (strlen(uuid) != 40 || strncmp(uuid, "GPU-4", 5) != 0 || uuid[5] < '0' || uuid[5] >= '0' + DEVICES) {
        return NOT_FOUND;
    }
    *device = &devices[uuid[5] - '0'];
    return NVML_OK;
}

EXPORT nvml_result nvmlDeviceGetMemoryInfo(nvml_device device, struct nvml_memory *memory);
EXPORT nvml_result nvmlDeviceGetMemoryInfo(nvml_device device, struct nvml_memory *memory)
{
    const int code = fake_injected("nvmlDeviceGetMemoryInfo", device->id);
    unsigned pids[1];
    if (code == 0) {
        *memory = (struct nvml_memory){.total_bytes = 1ull << 40};
        memory->used_bytes = (unsigned long long)contexts(device->id, pids, 1) * CONTEXT_MIB << 20;
        memory->free_bytes = memory->total_bytes - memory->used_bytes;
    }
    return code;
}

EXPORT nvml_result nvmlDeviceGetComputeRunningProcesses_v3(nvml_device device, unsigned *count,
                                                           struct nvml_process *processes);
EXPORT nvml_result nvmlDeviceGetComputeRunningProcesses_v3(nvml_device device, unsigned *count,
                                                           struct nvml_process *processes)
{
    const int code = fake_injected("nvmlDeviceGetComputeRunningProcesses_v3", device->id);
    if (code != 0) {
        return code;
    }
    const char *offset = getenv("FAKE_NVML_PID_OFFSET");
    unsigned pids[NVML_PROCESSES_MAX];
    const unsigned found = is("silent") ? 0 : contexts(device->id, pids, NVML_PROCESSES_MAX);
    if (found > *count) {
        *count = found;
        return NVML_INSUFFICIENT_SIZE;
    }
    for (unsigned i = 0; i < found; i++) {
        processes[i] = (struct nvml_process){.pid = pids[i], .bytes = (unsigned long long)CONTEXT_MIB << 20};
        processes[i].pid += offset ? (unsigned)strtoul(offset, NULL, 10) : 0;
        processes[i].bytes = is("mute") ? NVML_NOT_AVAILABLE : processes[i].bytes;
    }
    *count = found;
    return NVML_OK;
}
