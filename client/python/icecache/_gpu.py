"""Arrays in GPU memory: torch tensors, or whatever has __cuda_array_interface__."""


def is_on_gpu(array):
    """A torch tensor says so itself: not every dtype of it has the interface."""
    is_cuda = getattr(array, "is_cuda", None)
    return is_cuda if isinstance(is_cuda, bool) else hasattr(array, "__cuda_array_interface__")


def gpu_memory(memory, name="the GPU memory of a landing"):
    """(address, bytes) of a contiguous array on a GPU."""
    interface = getattr(memory, "__cuda_array_interface__", None) if not hasattr(memory, "data_ptr") else None
    if interface is not None:
        if interface.get("strides") is not None:
            raise ValueError(f"{name} must be contiguous")
        nbytes = int(interface["typestr"][2:])
        for count in interface["shape"]:
            nbytes *= count
        return interface["data"][0], nbytes
    if not memory.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return memory.data_ptr(), memory.numel() * memory.element_size()


def gpu_layout(array, dtype):
    """(address, shape, strides in bytes) of an array on a GPU, whose elements must be of this dtype.

    Where they have as many bytes and are integers they are taken for bit patterns.
    """
    name = str(array.dtype) if hasattr(array, "data_ptr") else array.__cuda_array_interface__["typestr"]
    names = {
        "bf16": ("torch.bfloat16", "torch.int16", "torch.uint16", "<i2", "<u2", "<V2"),
        "fp16": ("torch.float16", "torch.int16", "torch.uint16", "<f2", "<i2", "<u2"),
        "fp32": ("torch.float32", "torch.int32", "torch.uint32", "<f4", "<i4", "<u4"),
    }
    if name not in names[dtype]:
        raise ValueError(f"elements are {name}, the sequence's are {dtype}")
    if hasattr(array, "data_ptr"):
        size = array.element_size()
        return array.data_ptr(), tuple(array.shape), tuple(stride * size for stride in array.stride())
    interface = array.__cuda_array_interface__
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    if strides is None:
        strides = [int(interface["typestr"][2:])]
        for count in reversed(shape[1:]):
            strides.insert(0, strides[0] * count)
    return interface["data"][0], shape, tuple(strides)
