// A CUDA driver without a GPU, for tests: the entry points of gpu/driver.h over shared files. It is stricter than the
// real one where that shows mistakes:
//
// - GPU addresses cannot be read or written by the program, only by copies;
// - handles are given for the beginning of an allocation only, and not opened in the process that made it;
// - calls that need a context answer 201 without one;
// - asynchronous copies read registered memory only, inside one registration, and happen when an event behind them is
//   asked for, not when they are issued: what is overwritten before is copied wrong;
// - an event is not ready when it is first asked for;
// - host memory is registered in whole pages, and unregistered only when no stream needs it; a GPU has it at another
//   address;
// - a stream that waits for a word goes no further, and one that is being captured takes nothing.
//
// FAKE_CUDA_DIR is a folder that all processes share. In it: alloc-PID-N is GPU memory, open-PID-N a mapping of another
// process's memory, context-PID-DEVICE a context, and `fail` what to do wrong (fake_fail.c). FAKE_CUDA_OLD_GPU: no GPU
// waits for 64-bit words. FAKE_CUDA_DEVICES lists the devices that the process sees ("0,1" is the default).
#include "fake_cuda.h"

#include "fake_fail.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    DEVICES_MAX = 4,
    REGIONS_MAX = 4096,
    STACK_MAX = 16,
    PAGE = 2 << 20,
};

enum kind { FREE, ALLOCATED, OPENED, RESERVED, MAPPED };

// A range of GPU addresses.
struct region {
    enum kind kind;
    cuda_address base;
    size_t bytes;
    uint8_t *memory; // where its content is
    int device;
    unsigned opens, handle_types;
    bool accessible, foreign;
    int fd;           // MAPPED: of its allocation
    char path[256];   // ALLOCATED: the file; OPENED: of whose memory
    char marker[256]; // of memory that another process made
};

// A physical allocation, which is a file.
struct allocation {
    int fd; // -1: free
    unsigned handle_types;
    bool foreign;
    size_t bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool initialised;
static int device_ids[DEVICES_MAX], device_count;
static struct cuda_context primaries[DEVICES_MAX];
static struct region regions[REGIONS_MAX];
static struct allocation allocations[REGIONS_MAX];
static cuda_address next_address;
static unsigned next_number;
static _Thread_local struct cuda_context *stack[STACK_MAX];
static _Thread_local int depth;

// ---- what every entry point begins with ----

static int injected(const char *entry)
{
    (void)pthread_mutex_lock(&lock);
    const struct cuda_context *current = fake_current();
    const int device = current ? device_ids[current->device] : -1;
    (void)pthread_mutex_unlock(&lock);
    return fake_injected(entry, device); // which may take long
}

int fake_enter(const char *entry, bool needs_context)
{
    int code = injected(entry);
    if (code != 0) {
        return code;
    }
    (void)pthread_mutex_lock(&lock);
    if (!initialised) {
        code = NOT_INITIALIZED;
    } else if (needs_context && (depth == 0 || !stack[depth - 1] || stack[depth - 1]->retains == 0)) {
        code = CUDA_INVALID_CONTEXT;
    }
    if (code != 0) {
        (void)pthread_mutex_unlock(&lock);
    }
    return code;
}

cuda_result fake_leave(cuda_result result)
{
    (void)pthread_mutex_unlock(&lock);
    return result;
}

struct cuda_context *fake_current(void)
{
    return depth > 0 ? stack[depth - 1] : NULL;
}

// ---- devices and contexts ----

EXPORT cuda_result cuInit(unsigned flags);
EXPORT cuda_result cuInit(unsigned flags)
{
    int code = injected("cuInit");
    if (code != 0 || flags != 0) {
        return code != 0 ? code : CUDA_INVALID_VALUE;
    }
    (void)pthread_mutex_lock(&lock);
    const char *listed = getenv("FAKE_CUDA_DEVICES") ? getenv("FAKE_CUDA_DEVICES") : "0,1";
    device_count = 0;
    for (const char *at = listed; *at && device_count < DEVICES_MAX; at++) {
        if (*at >= '0' && *at <= '9') {
            device_ids[device_count++] = *at - '0';
        }
    }
    if (!initialised) {
        next_address = 0x200000000000ull + ((cuda_address)getpid() % 997u) * 0x1000000000ull;
        for (int i = 0; i < REGIONS_MAX; i++) {
            allocations[i].fd = -1;
        }
    }
    initialised = true;
    return fake_leave(fake_folder() && device_count > 0 ? CUDA_OK : CUDA_NO_DEVICE);
}

EXPORT cuda_result cuGetErrorName(cuda_result error, const char **name);
EXPORT cuda_result cuGetErrorName(cuda_result error, const char **name)
{
    int code = injected("cuGetErrorName");
    *name = error == CUDA_INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
            : error == CUDA_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
            : error == CUDA_OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
                                            : "CUDA_ERROR_OF_A_TEST";
    return code;
}

EXPORT cuda_result cuDeviceGetCount(int *count);
EXPORT cuda_result cuDeviceGetCount(int *count)
{
    ENTER("cuDeviceGetCount", false);
    *count = device_count;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuDeviceGet(cuda_device *device, int ordinal);
EXPORT cuda_result cuDeviceGet(cuda_device *device, int ordinal)
{
    ENTER("cuDeviceGet", false);
    if (ordinal < 0 || ordinal >= device_count) {
        return fake_leave(INVALID_DEVICE);
    }
    *device = ordinal;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuDeviceGetName(char *name, int bytes, cuda_device device);
EXPORT cuda_result cuDeviceGetName(char *name, int bytes, cuda_device device)
{
    ENTER("cuDeviceGetName", false);
    (void)snprintf(name, (size_t)bytes, "Fake GPU %d", device_ids[device]);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuDeviceGetAttribute(int *value, int attribute, cuda_device device);
EXPORT cuda_result cuDeviceGetAttribute(int *value, int attribute, cuda_device device)
{
    ENTER("cuDeviceGetAttribute", false);
    if (attribute != CUDA_DEVICE_CAN_WAIT_FOR_64_BITS || device < 0 || device >= device_count) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *value = !getenv("FAKE_CUDA_OLD_GPU");
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuDeviceGetUuid(struct cuda_uuid *uuid, cuda_device device);
EXPORT cuda_result cuDeviceGetUuid(struct cuda_uuid *uuid, cuda_device device)
{
    ENTER("cuDeviceGetUuid", false);
    memset(uuid->bytes, 0x40 + device_ids[device], sizeof(uuid->bytes));
    return fake_leave(CUDA_OK);
}

// NVML's fake counts them.
static const char *context_path(cuda_device device, char *path, size_t capacity)
{
    (void)snprintf(path, capacity, "%.180s/context-%d-%d", fake_folder(), (int)getpid(), device_ids[device]);
    return path;
}

EXPORT cuda_result cuDevicePrimaryCtxRetain(cuda_context *context, cuda_device device);
EXPORT cuda_result cuDevicePrimaryCtxRetain(cuda_context *context, cuda_device device)
{
    ENTER("cuDevicePrimaryCtxRetain", false);
    primaries[device].device = device;
    if (primaries[device].retains++ == 0) {
        char path[256];
        close(open(context_path(device, path, sizeof(path)), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    }
    *context = &primaries[device];
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuDevicePrimaryCtxRelease(cuda_device device);
EXPORT cuda_result cuDevicePrimaryCtxRelease(cuda_device device)
{
    ENTER("cuDevicePrimaryCtxRelease", false);
    if (primaries[device].retains == 0) {
        return fake_leave(CUDA_INVALID_CONTEXT);
    }
    if (--primaries[device].retains == 0) {
        char path[256];
        (void)unlink(context_path(device, path, sizeof(path)));
    }
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuCtxPushCurrent(cuda_context context);
EXPORT cuda_result cuCtxPushCurrent(cuda_context context)
{
    ENTER("cuCtxPushCurrent", false);
    if (!context || context->retains == 0 || depth == STACK_MAX) {
        return fake_leave(CUDA_INVALID_CONTEXT);
    }
    stack[depth++] = context;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuCtxPopCurrent(cuda_context *context);
EXPORT cuda_result cuCtxPopCurrent(cuda_context *context)
{
    ENTER("cuCtxPopCurrent", false);
    if (depth == 0) {
        return fake_leave(CUDA_INVALID_CONTEXT);
    }
    *context = stack[--depth];
    return fake_leave(CUDA_OK);
}

// ---- regions ----

static struct region *find(cuda_address address)
{
    for (int i = 0; i < REGIONS_MAX; i++) {
        struct region *region = &regions[i];
        if (region->kind != FREE && region->kind != RESERVED && address >= region->base &&
            address < region->base + region->bytes) {
            return region;
        }
    }
    return NULL;
}

static struct region *make(enum kind kind, cuda_address base, size_t bytes)
{
    for (int i = 0; i < REGIONS_MAX; i++) {
        if (regions[i].kind == FREE) {
            if (base == 0) {
                base = next_address;
                next_address += (bytes + 2 * PAGE - 1) / PAGE * PAGE;
            }
            regions[i] = (struct region){.kind = kind, .base = base, .bytes = bytes, .fd = -1};
            return &regions[i];
        }
    }
    abort();
}

static void mark(struct region *region)
{
    (void)snprintf(region->marker, sizeof(region->marker), "%.180s/open-%d-%u", fake_folder(), (int)getpid(),
                   next_number++);
    close(open(region->marker, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    region->foreign = true;
}

static void unmake(struct region *region)
{
    if (region->foreign) {
        (void)unlink(region->marker);
    }
    if (region->memory) {
        (void)munmap(region->memory, region->bytes);
    }
    region->kind = FREE;
}

uint8_t *fake_content(cuda_address address, size_t *bytes)
{
    const struct region *region = find(address);
    if (!region || !region->accessible) {
        return NULL;
    }
    const size_t offset = address - region->base;
    if (*bytes > region->bytes - offset) {
        if (region->kind != MAPPED) {
            return NULL; // an allocation ends where it ends
        }
        *bytes = region->bytes - offset;
    }
    return region->memory + offset;
}

EXPORT cuda_result cuMemAlloc(cuda_address *address, size_t bytes);
EXPORT cuda_result cuMemAlloc(cuda_address *address, size_t bytes)
{
    ENTER("cuMemAlloc", true);
    struct region *region = make(ALLOCATED, 0, bytes);
    (void)snprintf(region->path, sizeof(region->path), "%.180s/alloc-%d-%u", fake_folder(), (int)getpid(),
                   next_number++);
    int fd = open(region->path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        abort();
    }
    region->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    region->device = stack[depth - 1]->device;
    region->accessible = true;
    *address = region->base;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemFree(cuda_address address);
EXPORT cuda_result cuMemFree(cuda_address address)
{
    ENTER("cuMemFree", true);
    struct region *region = find(address);
    if (!region || region->kind != ALLOCATED || region->base != address) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    (void)unlink(region->path);
    unmake(region);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemGetAddressRange(cuda_address *base, size_t *bytes, cuda_address address);
EXPORT cuda_result cuMemGetAddressRange(cuda_address *base, size_t *bytes, cuda_address address)
{
    ENTER("cuMemGetAddressRange", true);
    struct region *region = find(address);
    if (!region) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *base = region->base;
    *bytes = region->bytes;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuPointerGetAttribute(void *value, int attribute, cuda_address address);
EXPORT cuda_result cuPointerGetAttribute(void *value, int attribute, cuda_address address)
{
    ENTER("cuPointerGetAttribute", false);
    struct region *region = find(address);
    if (!region) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    unsigned number = 0;
    unsigned long long types = region->handle_types;
    switch (attribute) {
    case CUDA_POINTER_MEMORY_TYPE:
        number = CUDA_MEMORY_DEVICE;
        break;
    case CUDA_POINTER_IS_MANAGED:
        break;
    case CUDA_POINTER_DEVICE_ORDINAL:
        number = (unsigned)region->device;
        break;
    case CUDA_POINTER_LEGACY_IPC:
        number = region->kind == ALLOCATED;
        break;
    case CUDA_POINTER_HANDLE_TYPES:
        memcpy(value, &types, sizeof(types));
        return fake_leave(CUDA_OK);
    case CUDA_POINTER_CONTEXT:
        if (region->kind != ALLOCATED) {
            return fake_leave(CUDA_INVALID_VALUE);
        }
        memcpy(value, &(struct cuda_context *){&primaries[region->device]}, sizeof(struct cuda_context *));
        return fake_leave(CUDA_OK);
    default:
        return fake_leave(CUDA_INVALID_VALUE);
    }
    memcpy(value, &number, sizeof(number));
    return fake_leave(CUDA_OK);
}

// ---- handles of whole allocations ----

struct handle_content {
    uint32_t magic, device;
    int32_t pid;
    uint64_t bytes;
    char name[40];
};
_Static_assert(sizeof(struct handle_content) == CUDA_HANDLE_BYTES, "a handle's content fills it");

EXPORT cuda_result cuIpcGetMemHandle(struct cuda_handle *handle, cuda_address address);
EXPORT cuda_result cuIpcGetMemHandle(struct cuda_handle *handle, cuda_address address)
{
    ENTER("cuIpcGetMemHandle", true);
    struct region *region = find(address);
    if (!region || region->kind != ALLOCATED || region->base != address) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    struct handle_content out = {.magic = 0x1ce, .device = (uint32_t)device_ids[region->device], .pid = getpid()};
    out.bytes = region->bytes;
    (void)snprintf(out.name, sizeof(out.name), "%.39s", strrchr(region->path, '/') + 1);
    memcpy(handle, &out, sizeof(out));
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuIpcOpenMemHandle(cuda_address *address, struct cuda_handle handle, unsigned flags);
EXPORT cuda_result cuIpcOpenMemHandle(cuda_address *address, struct cuda_handle handle, unsigned flags)
{
    ENTER("cuIpcOpenMemHandle", true);
    struct handle_content in;
    memcpy(&in, &handle, sizeof(in));
    if (in.magic != 0x1ce || flags != CUDA_IPC_LAZY_PEER || memchr(in.name, '\0', sizeof(in.name)) == NULL) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    if (in.pid == getpid() || device_ids[stack[depth - 1]->device] != (int)in.device) {
        return fake_leave(CUDA_INVALID_CONTEXT);
    }
    char path[256];
    (void)snprintf(path, sizeof(path), "%.180s/%s", fake_folder(), in.name);
    for (int i = 0; i < REGIONS_MAX; i++) {
        if (regions[i].kind == OPENED && strcmp(regions[i].path, path) == 0) {
            regions[i].opens++;
            *address = regions[i].base;
            return fake_leave(CUDA_OK);
        }
    }
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return fake_leave(INVALID_HANDLE);
    }
    struct region *region = make(OPENED, 0, in.bytes);
    region->memory = mmap(NULL, in.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    memcpy(region->path, path, sizeof(path));
    region->device = stack[depth - 1]->device;
    region->accessible = true;
    region->opens = 1;
    mark(region);
    *address = region->base;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuIpcCloseMemHandle(cuda_address address);
EXPORT cuda_result cuIpcCloseMemHandle(cuda_address address)
{
    ENTER("cuIpcCloseMemHandle", true);
    struct region *region = find(address);
    if (!region || region->kind != OPENED || region->base != address) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    if (--region->opens == 0) {
        unmake(region);
    }
    return fake_leave(CUDA_OK);
}

// ---- memory that is mapped ----

// As the driver has it; only the first four fields matter here.
struct properties {
    int type, handle_types, location_type, location_id;
    void *unused;
    unsigned char flags[8];
};

static cuda_result hold(int fd, size_t bytes, unsigned handle_types, bool foreign, cuda_allocation *out)
{
    for (int i = 0; i < REGIONS_MAX; i++) {
        if (allocations[i].fd < 0) {
            allocations[i] = (struct allocation){fd, handle_types, foreign, bytes};
            *out = (cuda_allocation)i + 1;
            return CUDA_OK;
        }
    }
    abort();
}

static struct allocation *held(cuda_allocation allocation)
{
    return allocation > 0 && allocation <= REGIONS_MAX && allocations[allocation - 1].fd >= 0
               ? &allocations[allocation - 1]
               : NULL;
}

EXPORT cuda_result cuMemCreate(cuda_allocation *out, size_t bytes, const struct properties *properties,
                               unsigned long long flags);
EXPORT cuda_result cuMemCreate(cuda_allocation *out, size_t bytes, const struct properties *properties,
                               unsigned long long flags)
{
    ENTER("cuMemCreate", false);
    if (bytes == 0 || bytes % PAGE != 0 || flags != 0 || properties->location_type != CUDA_LOCATION_DEVICE) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    int fd = memfd_create("fake-gpu", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        abort();
    }
    return fake_leave(hold(fd, bytes, (unsigned)properties->handle_types, false, out));
}

EXPORT cuda_result cuMemRetainAllocationHandle(cuda_allocation *allocation, void *address);
EXPORT cuda_result cuMemRetainAllocationHandle(cuda_allocation *allocation, void *address)
{
    ENTER("cuMemRetainAllocationHandle", false);
    struct region *region = find((cuda_address)(uintptr_t)address);
    if (!region || region->kind != MAPPED) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    return fake_leave(
        hold(fcntl(region->fd, F_DUPFD_CLOEXEC, 3), region->bytes, region->handle_types, false, allocation));
}

EXPORT cuda_result cuMemExportToShareableHandle(void *handle, cuda_allocation allocation, int type,
                                                unsigned long long flags);
EXPORT cuda_result cuMemExportToShareableHandle(void *handle, cuda_allocation allocation, int type,
                                                unsigned long long flags)
{
    ENTER("cuMemExportToShareableHandle", false);
    struct allocation *found = held(allocation);
    if (!found || type != CUDA_HANDLE_POSIX_FD || flags != 0 || (found->handle_types & CUDA_HANDLE_POSIX_FD) == 0) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    int fd = fcntl(found->fd, F_DUPFD_CLOEXEC, 3);
    memcpy(handle, &fd, sizeof(fd));
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemImportFromShareableHandle(cuda_allocation *allocation, void *handle, int type);
EXPORT cuda_result cuMemImportFromShareableHandle(cuda_allocation *allocation, void *handle, int type)
{
    ENTER("cuMemImportFromShareableHandle", false);
    struct stat stat;
    int fd = fcntl((int)(intptr_t)handle, F_DUPFD_CLOEXEC, 3);
    if (type != CUDA_HANDLE_POSIX_FD || fd < 0 || fstat(fd, &stat) != 0 || !S_ISREG(stat.st_mode)) {
        if (fd >= 0) {
            close(fd);
        }
        return fake_leave(CUDA_INVALID_VALUE);
    }
    return fake_leave(hold(fd, (size_t)stat.st_size, CUDA_HANDLE_POSIX_FD, true, allocation));
}

EXPORT cuda_result cuMemRelease(cuda_allocation allocation);
EXPORT cuda_result cuMemRelease(cuda_allocation allocation)
{
    ENTER("cuMemRelease", false);
    struct allocation *found = held(allocation);
    if (!found) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    close(found->fd);
    found->fd = -1;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemAddressReserve(cuda_address *address, size_t bytes, size_t alignment, cuda_address wanted,
                                       unsigned long long flags);
EXPORT cuda_result cuMemAddressReserve(cuda_address *address, size_t bytes, size_t alignment, cuda_address wanted,
                                       unsigned long long flags)
{
    ENTER("cuMemAddressReserve", false);
    if (bytes == 0 || bytes % PAGE != 0 || alignment != 0 || wanted != 0 || flags != 0) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *address = make(RESERVED, 0, bytes)->base;
    return fake_leave(CUDA_OK);
}

static struct region *find_kind(cuda_address base, size_t bytes, enum kind kind)
{
    for (int i = 0; i < REGIONS_MAX; i++) {
        if (regions[i].kind == kind && regions[i].base <= base && base + bytes <= regions[i].base + regions[i].bytes) {
            return &regions[i];
        }
    }
    return NULL;
}

EXPORT cuda_result cuMemAddressFree(cuda_address address, size_t bytes);
EXPORT cuda_result cuMemAddressFree(cuda_address address, size_t bytes)
{
    ENTER("cuMemAddressFree", false);
    struct region *region = find_kind(address, bytes, RESERVED);
    if (!region || region->base != address || region->bytes != bytes || find(address)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    unmake(region);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemMap(cuda_address address, size_t bytes, size_t offset, cuda_allocation allocation,
                            unsigned long long flags);
EXPORT cuda_result cuMemMap(cuda_address address, size_t bytes, size_t offset, cuda_allocation allocation,
                            unsigned long long flags)
{
    ENTER("cuMemMap", false);
    struct allocation *found = held(allocation);
    if (!found || offset != 0 || flags != 0 || bytes != found->bytes || !find_kind(address, bytes, RESERVED) ||
        find(address)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    struct region *region = make(MAPPED, address, bytes);
    region->fd = fcntl(found->fd, F_DUPFD_CLOEXEC, 3);
    region->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
    region->handle_types = found->handle_types;
    if (found->foreign) {
        mark(region);
    }
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemUnmap(cuda_address address, size_t bytes);
EXPORT cuda_result cuMemUnmap(cuda_address address, size_t bytes)
{
    ENTER("cuMemUnmap", false);
    struct region *region = find(address);
    if (!region || region->kind != MAPPED || region->base != address || region->bytes != bytes) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    close(region->fd);
    unmake(region);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemSetAccess(cuda_address address, size_t bytes, const struct cuda_access *access, size_t count);
EXPORT cuda_result cuMemSetAccess(cuda_address address, size_t bytes, const struct cuda_access *access, size_t count)
{
    ENTER("cuMemSetAccess", false);
    if (count != 1 || access->location.type != CUDA_LOCATION_DEVICE || access->flags != CUDA_ACCESS_READ_WRITE) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    for (cuda_address at = address; at < address + bytes;) {
        struct region *region = find(at);
        if (!region || region->kind != MAPPED) {
            return fake_leave(CUDA_INVALID_VALUE);
        }
        region->accessible = true;
        region->device = access->location.id;
        at = region->base + region->bytes;
    }
    return fake_leave(CUDA_OK);
}
