"""Addresses, shapes and strides of objects with the buffer protocol, without copying."""

import ctypes

_STRIDES = 0x0018
_FORMAT = 0x0004
_WRITABLE = 0x0001


class _PyBuffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    ]


_get = ctypes.pythonapi.PyObject_GetBuffer
_get.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_get.restype = ctypes.c_int
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = [ctypes.POINTER(_PyBuffer)]
_release.restype = None


class Buffer:
    """A borrowed buffer: holds the object's export until the end of the `with` block."""

    def __init__(self, array, writable=False):
        self._array = array
        self._flags = _STRIDES | _FORMAT | (_WRITABLE if writable else 0)

    def __enter__(self):
        raw = _PyBuffer()
        _get(self._array, ctypes.byref(raw), self._flags)  # raises BufferError or TypeError itself
        self._raw = raw
        self.address = raw.buf
        self.itemsize = raw.itemsize
        self.shape = tuple(raw.shape[i] for i in range(raw.ndim))
        self.strides = tuple(raw.strides[i] for i in range(raw.ndim))
        self.nbytes = raw.len
        return self

    def __exit__(self, *_):
        _release(ctypes.byref(self._raw))

    def is_packed(self):
        expected = self.itemsize
        for count, stride in zip(reversed(self.shape), reversed(self.strides)):
            if count != 1 and stride != expected:
                return False
            expected *= count
        return True

    def extent(self):
        """Bytes from the address to the end of the last element; the strides must not be negative."""
        if any(stride < 0 for stride in self.strides):
            raise ValueError("arrays with negative strides are not supported")
        if 0 in self.shape:
            return 0
        return sum((count - 1) * stride for count, stride in zip(self.shape, self.strides)) + self.itemsize


def kv_layout(buffer, layers, kv_heads, head_dim, element_bytes):
    """(tokens, layer_stride, token_stride, head_stride) of K or V.

    Either four dimensions [layer, token, KV head, head_dim] (or three, for one layer) of elements of the sequence's
    size, or one packed dimension of that content.
    """
    row_bytes = head_dim * element_bytes
    token_bytes = kv_heads * row_bytes
    if len(buffer.shape) == 1:
        if not buffer.is_packed() or buffer.nbytes % (layers * token_bytes) != 0:
            raise ValueError(
                f"a flat array of {buffer.nbytes} bytes is not [{layers} layers, tokens, {kv_heads} KV heads, "
                f"{head_dim}] of {element_bytes}-byte elements"
            )
        tokens = buffer.nbytes // (layers * token_bytes)
        return tokens, tokens * token_bytes, token_bytes, row_bytes
    shape, strides = buffer.shape, buffer.strides
    if len(shape) == 3 and layers == 1:
        shape, strides = (1,) + shape, (0,) + strides
    if len(shape) != 4 or shape[0] != layers or shape[2:] != (kv_heads, head_dim):
        raise ValueError(f"shape {buffer.shape} is not [{layers}, tokens, {kv_heads}, {head_dim}]")
    if buffer.itemsize != element_bytes:
        raise ValueError(f"elements of {buffer.itemsize} bytes, the sequence's have {element_bytes}")
    if head_dim > 1 and strides[3] != element_bytes:
        raise ValueError("head_dim, the last dimension, must be contiguous")
    return shape[1], strides[0], strides[1], strides[2]
