// Holds gpu/driver.h's own declarations against the toolkit's. Compiled where a toolkit is installed, never run.
#include "gpu/driver.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#if __has_include(<nvml.h>)
#include "gpu/nvml.h"

#include <nvml.h>
#endif

#define SAME_SIZE(ours, theirs)  _Static_assert(sizeof(ours) == sizeof(theirs), #ours " and " #theirs " differ in size")
#define SAME_VALUE(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours " and " #theirs " differ")
#define SAME_PLACE(ours, our_field, theirs, their_field)                                                               \
    _Static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field), #theirs "." #their_field " is "         \
                                                                                       "elsewhere")

SAME_SIZE(cuda_result, CUresult);
SAME_SIZE(cuda_device, CUdevice);
SAME_SIZE(cuda_address, CUdeviceptr);
SAME_SIZE(cuda_allocation, CUmemGenericAllocationHandle);
SAME_SIZE(cuda_context, CUcontext);
SAME_SIZE(cuda_stream, CUstream);
SAME_SIZE(cuda_event, CUevent);
SAME_SIZE(cuda_module, CUmodule);
SAME_SIZE(cuda_function, CUfunction);
SAME_SIZE(struct cuda_uuid, CUuuid);
SAME_SIZE(struct cuda_handle, CUipcMemHandle);
SAME_SIZE(struct cuda_access, CUmemAccessDesc);
SAME_PLACE(struct cuda_access, location.type, CUmemAccessDesc, location.type);
SAME_PLACE(struct cuda_access, location.id, CUmemAccessDesc, location.id);
SAME_PLACE(struct cuda_access, flags, CUmemAccessDesc, flags);
SAME_SIZE(struct cuda_rows, CUDA_MEMCPY2D);
SAME_PLACE(struct cuda_rows, from_type, CUDA_MEMCPY2D, srcMemoryType);
SAME_PLACE(struct cuda_rows, from_device, CUDA_MEMCPY2D, srcDevice);
SAME_PLACE(struct cuda_rows, from_pitch, CUDA_MEMCPY2D, srcPitch);
SAME_PLACE(struct cuda_rows, to_type, CUDA_MEMCPY2D, dstMemoryType);
SAME_PLACE(struct cuda_rows, to_host, CUDA_MEMCPY2D, dstHost);
SAME_PLACE(struct cuda_rows, to_pitch, CUDA_MEMCPY2D, dstPitch);
SAME_PLACE(struct cuda_rows, width_bytes, CUDA_MEMCPY2D, WidthInBytes);
SAME_PLACE(struct cuda_rows, height, CUDA_MEMCPY2D, Height);

#if CUDA_VERSION >= 12080
SAME_SIZE(struct cuda_batch_attributes, CUmemcpyAttributes);
SAME_PLACE(struct cuda_batch_attributes, source_order, CUmemcpyAttributes, srcAccessOrder);
SAME_PLACE(struct cuda_batch_attributes, from, CUmemcpyAttributes, srcLocHint);
SAME_PLACE(struct cuda_batch_attributes, to, CUmemcpyAttributes, dstLocHint);
SAME_PLACE(struct cuda_batch_attributes, flags, CUmemcpyAttributes, flags);
SAME_SIZE(((struct cuda_batch_attributes *)0)->from, CUmemLocation);
SAME_VALUE(CUDA_SOURCE_IN_STREAM_ORDER, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
// That a call with our types fits each form's parameters.
#define SAME_PARAMETERS(ours, theirs)                                                                                  \
    _Static_assert(__builtin_types_compatible_p(__typeof__(ours), __typeof__(theirs)), #theirs " takes something "     \
                                                                                               "else")
SAME_PARAMETERS((CUresult(*)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,
                             size_t *, CUstream))0,
                (PFN_cuMemcpyBatchAsync_v12080)0);
#if CUDA_VERSION >= 13000
SAME_PARAMETERS((CUresult(*)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,
                             CUstream))0,
                (PFN_cuMemcpyBatchAsync_v13000)0);
#endif
#endif

SAME_VALUE(CUDA_MEMORY_HOST, CU_MEMORYTYPE_HOST);
SAME_VALUE(CUDA_INVALID_VALUE, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(CUDA_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(CUDA_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(CUDA_INVALID_CONTEXT, CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(CUDA_NOT_READY, CUDA_ERROR_NOT_READY);
SAME_VALUE(CUDA_POINTER_CONTEXT, CU_POINTER_ATTRIBUTE_CONTEXT);
SAME_VALUE(CUDA_POINTER_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
SAME_VALUE(CUDA_POINTER_IS_MANAGED, CU_POINTER_ATTRIBUTE_IS_MANAGED);
SAME_VALUE(CUDA_POINTER_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME_VALUE(CUDA_POINTER_LEGACY_IPC, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
SAME_VALUE(CUDA_POINTER_HANDLE_TYPES, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES);
SAME_VALUE(CUDA_MEMORY_DEVICE, CU_MEMORYTYPE_DEVICE);
SAME_VALUE(CUDA_PROC_ADDRESS_DEFAULT, CU_GET_PROC_ADDRESS_DEFAULT);
SAME_VALUE(CUDA_IPC_LAZY_PEER, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
SAME_VALUE(CUDA_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME_VALUE(CUDA_EVENT_DISABLE_TIMING, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(CUDA_HOST_DEVICE_MAPPED, CU_MEMHOSTREGISTER_DEVICEMAP);
SAME_VALUE(CUDA_WAIT_AT_LEAST, CU_STREAM_WAIT_VALUE_GEQ);
SAME_VALUE(CUDA_DEVICE_CAN_WAIT_FOR_64_BITS, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS);
SAME_SIZE(uint64_t, cuuint64_t);
SAME_VALUE(CUDA_CAPTURE_NONE, CU_STREAM_CAPTURE_STATUS_NONE);
SAME_SIZE(int, CUstreamCaptureStatus);
SAME_VALUE(CUDA_HANDLE_POSIX_FD, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(CUDA_LOCATION_DEVICE, CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(CUDA_ACCESS_READ_WRITE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);

#if __has_include(<nvml.h>)
SAME_SIZE(nvml_result, nvmlReturn_t);
SAME_SIZE(nvml_device, nvmlDevice_t);
SAME_SIZE(struct nvml_process, nvmlProcessInfo_t);
SAME_PLACE(struct nvml_process, pid, nvmlProcessInfo_t, pid);
SAME_PLACE(struct nvml_process, bytes, nvmlProcessInfo_t, usedGpuMemory);
SAME_SIZE(struct nvml_memory, nvmlMemory_t);
SAME_PLACE(struct nvml_memory, used_bytes, nvmlMemory_t, used);
SAME_VALUE(NVML_OK, NVML_SUCCESS);
SAME_VALUE(NVML_INSUFFICIENT_SIZE, NVML_ERROR_INSUFFICIENT_SIZE);
#endif
