// What this process takes of a GPU's memory.
//
// NVML lists the processes with a context on a GPU by their pids as the machine sees them. In a container this process
// does not know that number, so the list is read before and after its context is made: the entry that has come is this
// process. Where none has, or several have, only the growth of the GPU's memory in use is left.
#include "gpu/nvml.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void set_text(struct nvml_watch *watch, const char *call, nvml_result result)
{
    (void)snprintf(watch->text, sizeof(watch->text), "%s answers %d", call, result);
}

static bool find_entries(struct nvml_watch *watch, const char *library)
{
    static const struct {
        const char *symbol;
        size_t offset;
    } entries[] = {
#define NVML_ENTRY_ROW(field, symbol, parameters) {symbol, offsetof(struct nvml_watch, field)},
        NVML_ENTRIES(NVML_ENTRY_ROW)
#undef NVML_ENTRY_ROW
    };
    void *const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL); // stays, as the driver does
    if (!handle) {
        (void)snprintf(watch->text, sizeof(watch->text), "no NVML: %.100s cannot be loaded", library);
        return false;
    }
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        void *const symbol = dlsym(handle, entries[i].symbol);
        if (!symbol) {
            (void)snprintf(watch->text, sizeof(watch->text), "NVML has no %s", entries[i].symbol);
            return false;
        }
        memcpy((char *)watch + entries[i].offset, &symbol, sizeof(symbol)); // POSIX: the bytes are a function's too
    }
    return true;
}

// The processes with a context on the GPU. False: see the text.
static bool list_processes(struct nvml_watch *watch, struct nvml_process *processes, unsigned *count)
{
    *count = NVML_PROCESSES_MAX;
    const nvml_result result = watch->device_processes(watch->device, count, processes);
    if (result == NVML_OK && *count <= NVML_PROCESSES_MAX) {
        return true;
    }
    *count = 0;
    set_text(watch, "nvmlDeviceGetComputeRunningProcesses", result);
    return false;
}

static bool read_used(struct nvml_watch *watch, uint64_t *used_bytes)
{
    struct nvml_memory memory = {0};
    const nvml_result result = watch->device_memory(watch->device, &memory);
    if (result != NVML_OK) {
        set_text(watch, "nvmlDeviceGetMemoryInfo", result);
        return false;
    }
    *used_bytes = memory.used_bytes;
    return true;
}

void nvml_watch_open(struct nvml_watch *watch, const char *library, const char *uuid)
{
    *watch = (struct nvml_watch){0};
    if (!find_entries(watch, library)) {
        return;
    }
    nvml_result result = watch->init();
    if (result != NVML_OK) {
        set_text(watch, "nvmlInit", result);
        return;
    }
    watch->open = true;
    result = watch->device_by_uuid(uuid, &watch->device);
    if (result != NVML_OK) {
        set_text(watch, "nvmlDeviceGetHandleByUUID", result);
        nvml_watch_close(watch);
        return;
    }
    struct nvml_process processes[NVML_PROCESSES_MAX];
    if (!read_used(watch, &watch->used_before_bytes) || !list_processes(watch, processes, &watch->count_before)) {
        nvml_watch_close(watch);
        return;
    }
    for (unsigned i = 0; i < watch->count_before; i++) {
        watch->pids_before[i] = processes[i].pid;
    }
}

static bool was_there(const struct nvml_watch *watch, unsigned pid)
{
    for (unsigned i = 0; i < watch->count_before; i++) {
        if (watch->pids_before[i] == pid) {
            return true;
        }
    }
    return false;
}

void nvml_watch_context(struct nvml_watch *watch)
{
    if (!watch->open) {
        return;
    }
    struct nvml_process processes[NVML_PROCESSES_MAX];
    unsigned count = 0, came = 0;
    if (!list_processes(watch, processes, &count)) {
        return;
    }
    watch->pid = 0;
    for (unsigned i = 0; i < count; i++) {
        if (was_there(watch, processes[i].pid)) {
            continue;
        }
        came++;
        watch->pid = processes[i].pid;
        if (processes[i].pid == (unsigned)getpid()) {
            came = 1; // whoever else has come
            break;
        }
    }
    if (came != 1) {
        watch->pid = 0;
    }
    uint64_t used_bytes = 0;
    if (read_used(watch, &used_bytes) && used_bytes > watch->used_before_bytes) {
        watch->growth_bytes = used_bytes - watch->used_before_bytes;
    }
}

enum nvml_source nvml_watch_read(struct nvml_watch *watch, uint64_t *bytes)
{
    struct nvml_process processes[NVML_PROCESSES_MAX];
    unsigned count = 0;
    *bytes = 0;
    if (watch->open) {
        watch->text[0] = '\0'; // of an earlier look
    }
    if (watch->open && watch->pid != 0 && list_processes(watch, processes, &count)) {
        for (unsigned i = 0; i < count; i++) {
            if (processes[i].pid == watch->pid && processes[i].bytes != NVML_NOT_AVAILABLE) {
                *bytes = processes[i].bytes;
                return NVML_PROCESS;
            }
        }
    }
    if (watch->open && watch->growth_bytes > 0) {
        *bytes = watch->growth_bytes;
        return NVML_GROWTH;
    }
    if (watch->text[0] == '\0') {
        (void)snprintf(watch->text, sizeof(watch->text), "NVML does not list this process");
    }
    return NVML_UNKNOWN;
}

void nvml_watch_close(struct nvml_watch *watch)
{
    if (watch->open) {
        (void)watch->shutdown();
    }
    watch->open = false;
}
