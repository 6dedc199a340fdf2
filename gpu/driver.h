// The CUDA driver, found at run time: no toolkit is needed to build, no driver to run.
//
// The types below are our own and as the driver's ABI has them; tests/gpu/abi.c holds them against cuda.h where a
// toolkit is installed. Names are those of the driver's manual without their prefix.
#ifndef ICECACHE_GPU_DRIVER_H
#define ICECACHE_GPU_DRIVER_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

#define CUDA_LIBRARY_DEFAULT "libcuda.so.1"
#define CUDA_TEXT_BYTES      256u // error texts, their end included
#define CUDA_UUID_BYTES      16u
#define CUDA_HANDLE_BYTES    64u

enum {
    CUDA_OK = 0,
    CUDA_INVALID_VALUE = 1,
    CUDA_OUT_OF_MEMORY = 2,
    CUDA_NO_DEVICE = 100,
    CUDA_INVALID_CONTEXT = 201,
    CUDA_NOT_READY = 600,
    // Attributes of a pointer.
    CUDA_POINTER_CONTEXT = 1,
    CUDA_POINTER_MEMORY_TYPE = 2,
    CUDA_POINTER_IS_MANAGED = 8,
    CUDA_POINTER_DEVICE_ORDINAL = 9,
    CUDA_POINTER_LEGACY_IPC = 10,
    CUDA_POINTER_HANDLE_TYPES = 14,
    CUDA_MEMORY_HOST = 1,
    CUDA_MEMORY_DEVICE = 2, // what CUDA_POINTER_MEMORY_TYPE says of memory on a GPU
    // Flags and kinds.
    CUDA_PROC_ADDRESS_DEFAULT = 0,
    CUDA_IPC_LAZY_PEER = 1,
    CUDA_STREAM_NON_BLOCKING = 1,
    CUDA_EVENT_DISABLE_TIMING = 2,
    CUDA_HOST_DEVICE_MAPPED = 2,
    CUDA_WAIT_AT_LEAST = 0,
    CUDA_DEVICE_CAN_WAIT_FOR_64_BITS = 122, // an attribute of a device
    CUDA_CAPTURE_NONE = 0,                  // of a stream that is not being captured into a graph
    CUDA_HANDLE_POSIX_FD = 1,
    CUDA_LOCATION_DEVICE = 1,
    CUDA_ACCESS_READ_WRITE = 3,
    CUDA_SOURCE_IN_STREAM_ORDER = 1,
    // Versions that entry points changed with.
    CUDA_BATCH_12 = 12080,
    CUDA_BATCH_13 = 13000,
};

typedef int cuda_result;
typedef int cuda_device;
typedef unsigned long long cuda_address; // of GPU memory; 0: none
typedef unsigned long long cuda_allocation;
typedef struct cuda_context *cuda_context;
typedef struct cuda_stream *cuda_stream;
typedef struct cuda_event *cuda_event;
typedef struct cuda_module *cuda_module;
typedef struct cuda_function *cuda_function;

struct cuda_uuid {
    char bytes[CUDA_UUID_BYTES];
};

struct cuda_handle {
    char bytes[CUDA_HANDLE_BYTES];
};

struct cuda_access {
    struct {
        int type, id;
    } location;
    int flags;
};

// A copy of `height` rows; of the memory types only those of host and device are used.
struct cuda_rows {
    size_t from_x, from_y;
    int from_type;
    const void *from_host;
    cuda_address from_device;
    void *from_array;
    size_t from_pitch;
    size_t to_x, to_y;
    int to_type;
    void *to_host;
    cuda_address to_device;
    void *to_array;
    size_t to_pitch;
    size_t width_bytes, height;
};

// How the copies of a batch read their sources.
struct cuda_batch_attributes {
    int source_order;
    struct {
        int type, id;
    } from, to; // hints, which do not apply to the memory that is used here
    unsigned flags;
};

// Every entry point that is used; of these only cuStreamWaitValue64 may be missing (NULL). Field, symbol, the
// CUDA version whose form of it is meant, parameters.
// clang-format off
#define CUDA_ENTRIES(X) \
    X(init,                   "cuInit",                         2000,  (unsigned flags)) \
    X(error_name,             "cuGetErrorName",                 6000,  (cuda_result error, const char **name)) \
    X(device_count,           "cuDeviceGetCount",               2000,  (int *count)) \
    X(device_get,             "cuDeviceGet",                    2000,  (cuda_device *device, int ordinal)) \
    X(device_name,            "cuDeviceGetName",                2000,  (char *name, int bytes, cuda_device device)) \
    X(device_uuid,            "cuDeviceGetUuid",                11040, (struct cuda_uuid *uuid, cuda_device device)) \
    X(primary_retain,         "cuDevicePrimaryCtxRetain",       7000,  (cuda_context *context, cuda_device device)) \
    X(primary_release,        "cuDevicePrimaryCtxRelease",      11000, (cuda_device device)) \
    X(context_push,           "cuCtxPushCurrent",               4000,  (cuda_context context)) \
    X(context_pop,            "cuCtxPopCurrent",                4000,  (cuda_context *context)) \
    X(pointer_attribute,      "cuPointerGetAttribute",          4000,  (void *value, int attribute, cuda_address address)) \
    X(address_range,          "cuMemGetAddressRange",           3020,  (cuda_address *base, size_t *bytes, cuda_address address)) \
    X(memory_alloc,           "cuMemAlloc",                     3020,  (cuda_address *address, size_t bytes)) \
    X(memory_free,            "cuMemFree",                      3020,  (cuda_address address)) \
    X(ipc_get_handle,         "cuIpcGetMemHandle",              4010,  (struct cuda_handle *handle, cuda_address address)) \
    X(ipc_open_handle,        "cuIpcOpenMemHandle",             11000, (cuda_address *address, struct cuda_handle handle, unsigned flags)) \
    X(ipc_close_handle,       "cuIpcCloseMemHandle",            4010,  (cuda_address address)) \
    X(allocation_retain,      "cuMemRetainAllocationHandle",    11000, (cuda_allocation *allocation, void *address)) \
    X(allocation_export,      "cuMemExportToShareableHandle",   10020, (void *handle, cuda_allocation allocation, int type, unsigned long long flags)) \
    X(allocation_import,      "cuMemImportFromShareableHandle", 10020, (cuda_allocation *allocation, void *handle, int type)) \
    X(allocation_release,     "cuMemRelease",                   10020, (cuda_allocation allocation)) \
    X(address_reserve,        "cuMemAddressReserve",            10020, (cuda_address *address, size_t bytes, size_t alignment, cuda_address wanted, unsigned long long flags)) \
    X(address_free,           "cuMemAddressFree",               10020, (cuda_address address, size_t bytes)) \
    X(memory_map,             "cuMemMap",                       10020, (cuda_address address, size_t bytes, size_t offset, cuda_allocation allocation, unsigned long long flags)) \
    X(memory_unmap,           "cuMemUnmap",                     10020, (cuda_address address, size_t bytes)) \
    X(memory_set_access,      "cuMemSetAccess",                 10020, (cuda_address address, size_t bytes, const struct cuda_access *access, size_t count)) \
    X(host_register,          "cuMemHostRegister",              6050,  (void *memory, size_t bytes, unsigned flags)) \
    X(host_unregister,        "cuMemHostUnregister",            4000,  (void *memory)) \
    X(stream_create,          "cuStreamCreateWithPriority",     5050,  (cuda_stream *stream, unsigned flags, int priority)) \
    X(stream_destroy,         "cuStreamDestroy",                4000,  (cuda_stream stream)) \
    X(event_create,           "cuEventCreate",                  2000,  (cuda_event *event, unsigned flags)) \
    X(event_record,           "cuEventRecord",                  2000,  (cuda_event event, cuda_stream stream)) \
    X(event_query,            "cuEventQuery",                   2000,  (cuda_event event)) \
    X(event_destroy,          "cuEventDestroy",                 4000,  (cuda_event event)) \
    X(stream_capturing,       "cuStreamIsCapturing",            10000, (cuda_stream stream, int *capture)) \
    X(stream_wait_value,      "cuStreamWaitValue64",            11070, (cuda_stream stream, cuda_address word, uint64_t value, unsigned flags)) \
    X(host_address,           "cuMemHostGetDevicePointer",      3020,  (cuda_address *address, void *memory, unsigned flags)) \
    X(device_attribute,       "cuDeviceGetAttribute",           2000,  (int *value, int attribute, cuda_device device)) \
    X(copy_to_device,         "cuMemcpyHtoDAsync",              3020,  (cuda_address to, const void *from, size_t bytes, cuda_stream stream)) \
    X(copy_rows,              "cuMemcpy2DAsync",                3020,  (const struct cuda_rows *rows, cuda_stream stream)) \
    X(fill,                   "cuMemsetD8Async",                3020,  (cuda_address to, unsigned char value, size_t bytes, cuda_stream stream)) \
    X(copy_to_device_waiting, "cuMemcpyHtoD",                   3020,  (cuda_address to, const void *from, size_t bytes)) \
    X(copy_to_host_waiting,   "cuMemcpyDtoH",                   3020,  (void *to, cuda_address from, size_t bytes)) \
    X(fill_waiting,           "cuMemsetD8",                     3020,  (cuda_address to, unsigned char value, size_t bytes)) \
    X(driver_version,         "cuDriverGetVersion",             2020,  (int *version)) \
    X(module_load,            "cuModuleLoadData",               2000,  (cuda_module *module, const void *image)) \
    X(module_unload,          "cuModuleUnload",                 2000,  (cuda_module module)) \
    X(module_function,        "cuModuleGetFunction",            2000,  (cuda_function *function, cuda_module module, const char *name)) \
    X(launch,                 "cuLaunchKernel",                 4000,  (cuda_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, cuda_stream stream, void **parameters, void **extra))
// Those that a driver may lack, NULL then. copy_batch_12 is the form of CUDA 12, with the number of the copy that failed.
#define CUDA_OPTIONAL_ENTRIES(X) \
    X(copy_batch,    "cuMemcpyBatchAsync", CUDA_BATCH_13, (cuda_address *to, cuda_address *from, size_t *bytes, size_t count, struct cuda_batch_attributes *attributes, size_t *firsts, size_t attribute_count, cuda_stream stream)) \
    X(copy_batch_12, "cuMemcpyBatchAsync", CUDA_BATCH_12, (cuda_address *to, cuda_address *from, size_t *bytes, size_t count, struct cuda_batch_attributes *attributes, size_t *firsts, size_t attribute_count, size_t *failed, cuda_stream stream))
// clang-format on

#define CUDA_ENTRY_FIELD(field, symbol, version, parameters) cuda_result(*field) parameters;
struct cuda_driver {
    CUDA_ENTRIES(CUDA_ENTRY_FIELD)
    CUDA_OPTIONAL_ENTRIES(CUDA_ENTRY_FIELD)
};
#undef CUDA_ENTRY_FIELD

// Loads and initialises the driver, which stays loaded until the process ends (its own threads may run). library NULL:
// CUDA_LIBRARY_DEFAULT. ICE_NOT_SUPPORTED with the reason in text[CUDA_TEXT_BYTES]: no driver, one older than CUDA 12,
// no GPU. May be called any number of times, from any thread; *out is written on success only and never needs freeing.
ICE_MUST_CHECK ice_status cuda_driver_open(const char *library, struct cuda_driver *out, char *text);

// Writes "cuIpcOpenMemHandle: CUDA_ERROR_INVALID_CONTEXT (201)" to text[CUDA_TEXT_BYTES]; answers ICE_SYSTEM, or
// ICE_NO_MEMORY where the GPU's memory is used up.
ice_status cuda_failed(const struct cuda_driver *driver, const char *call, cuda_result result, char *text);

// Finds the GPU with this UUID among those that the process sees: ICE_NOT_SUPPORTED with the reason otherwise.
ICE_MUST_CHECK ice_status cuda_device_find(const struct cuda_driver *driver, const uint8_t *uuid, cuda_device *out,
                                           char *text);
// "GPU-" and 32 hexadecimal digits in groups, as nvidia-smi prints it. text[CUDA_TEXT_BYTES].
void cuda_uuid_format(const uint8_t *uuid, char *text);

#endif
