"""Client of icecached, the node's service for long KV caches. See icecache.h, whose names and meanings these are."""

import array
import contextlib
import ctypes
import weakref
from ctypes import byref, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from . import _library
from ._answers import Hint, Seal, Selection, SequenceInfo, selection
from ._buffers import Buffer, kv_layout
from ._gpu import gpu_layout, gpu_memory, is_on_gpu
from ._library import SESSION_LOST, Status, library

__all__ = [
    "ALL_LAYERS",
    "ALL_TOKENS",
    "Client",
    "DEFAULT_SINKS",
    "DEFAULT_WINDOW",
    "Error",
    "GpuLanding",
    "HASH_BYTES",
    "Hint",
    "Landing",
    "Seal",
    "Selection",
    "Sequence",
    "SequenceInfo",
    "SessionLost",
    "Status",
    "Ticket",
    "Timeout",
    "View",
    "block_hashes",
    "landing_bytes",
    "version",
]

ALL_LAYERS = 0xFFFFFFFF
ALL_TOKENS = 0xFFFFFFFFFFFFFFFF
DEFAULT_SINKS = 16
DEFAULT_WINDOW = 64
HASH_BYTES = 16

_DTYPES = {"bf16": (1, 2), "fp16": (2, 2), "fp32": (3, 4)}


class Error(Exception):
    """A call failed; `status` says how, the text why. `length`: what a failed append has reached, else None."""

    def __init__(self, status, text, length=None):
        super().__init__(f"{status.name}: {text}")
        self.status = status
        self.text = text
        self.length = length


class Timeout(Error, TimeoutError):
    """The deadline passed before the reply; the request may still be carried out."""


class SessionLost(Error, ConnectionError):
    """The daemon or the session is gone: Client.reconnect, then open landings and sequences again."""


def _check(status, length=None):
    if status == 0:
        return
    try:
        known = Status(status)
    except ValueError:
        known = Status.INTERNAL
    text = library().ice_last_error().decode("utf-8", "replace")
    kind = Timeout if known == Status.TIMEOUT else SessionLost if known in SESSION_LOST else Error
    raise kind(known, text, length)


def _dtype(name):
    try:
        return _DTYPES[name]
    except KeyError:
        raise ValueError(f"dtype {name!r} is none of {', '.join(_DTYPES)}") from None


def version():
    return library().ice_version().decode()


def landing_bytes(*, rows, layers, kv_heads, slots, head_dim, dtype):
    """What a landing of this shape takes, in host or GPU memory."""
    shape = _library.LandingShape(rows, layers, kv_heads, slots, head_dim, _dtype(dtype)[0])
    found = c_uint64()
    _check(library().ice_landing_bytes(byref(shape), byref(found)))
    return found.value


def block_hashes(token_ids, block_tokens=0, salt=b""):
    """HASH_BYTES bytes for each whole block of token_ids (integers, or an array of them), one behind the other.

    A block's hash stands for it and all before it; salt is whatever else makes K and V differ that the sequence's
    options do not name (an adapter, an image's digest). block_tokens 0: 16.
    """
    ids = _token_ids(token_ids)
    found = (ctypes.c_ubyte * (len(ids) // (block_tokens or 16) * HASH_BYTES))()
    _check(library().ice_block_hashes(ids, len(ids), block_tokens, salt, len(salt), found))
    return bytes(found)


def _token_ids(token_ids):
    """As an array of c_uint32."""
    view = None
    with contextlib.suppress(TypeError):
        view = memoryview(token_ids)
    if view is not None and view.format in ("I", "i") and view.ndim == 1 and view.contiguous:
        return (c_uint32 * len(view)).from_buffer_copy(view)
    packed = array.array("I", iter(token_ids))  # refuses what is no token id
    return (c_uint32 * len(packed)).from_buffer_copy(packed)


@contextlib.contextmanager
def _hashes(hashes):
    """(address, count) of packed hashes, or of a list of them."""
    if isinstance(hashes, (list, tuple)):
        if any(len(one) != HASH_BYTES for one in hashes):
            raise ValueError(f"a hash has {HASH_BYTES} bytes")
        hashes = b"".join(hashes)
    with Buffer(hashes) as packed:
        if not packed.is_packed() or packed.nbytes % HASH_BYTES != 0:
            raise ValueError(f"hashes must be packed and have {HASH_BYTES} bytes each")
        yield packed.address, packed.nbytes // HASH_BYTES


def _sequence_options(
    *,
    model_digest,
    layers,
    kv_heads,
    query_heads,
    head_dim,
    dtype,
    name_space=None,
    tp_rank=0,
    tp_size=1,
    softmax_scale=0.0,
    block_tokens=0,
    anchor_layers=None,
    max_tokens=0,
):
    if anchor_layers is not None and len(anchor_layers) != layers:
        raise ValueError(f"anchor_layers has {len(anchor_layers)} entries for {layers} layers")
    anchors = None if anchor_layers is None else (c_uint32 * layers)(*anchor_layers)
    return _library.SequenceOptions(
        None if name_space is None else name_space.encode(),
        model_digest,
        len(model_digest),
        tp_rank,
        tp_size,
        layers,
        kv_heads,
        query_heads,
        head_dim,
        _dtype(dtype)[0],
        softmax_scale,
        block_tokens,
        anchors,
        max_tokens,
    )


class _Handle:
    """A C handle that is closed once: by close(), by its client's close(), or by the garbage collector."""

    _closer = ""

    def __init__(self, client, handle):
        self._client = client
        self._handle = handle
        client._children.add(self)

    def _open(self):
        if self._handle is None:
            raise ValueError(f"the {type(self).__name__.lower()} is closed")
        return self._handle

    def close(self):
        handle, self._handle = self._handle, None
        # A closed client has closed its handles, also those that the garbage collector had hidden from it.
        if handle is not None and self._client._handle is not None:
            self._client._children.discard(self)
            getattr(library(), self._closer)(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            self.close()


@dataclass(frozen=True)
class View:
    """What a retrieve left for one (row, layer, KV head), not copied: valid until the row's next submit.

    keys and values are read-only memoryviews [count, head_dim]: format "f" for fp32, "H" (the 16-bit patterns) for
    bf16 and fp16. positions is one of "I".
    """

    keys: memoryview
    values: memoryview
    positions: memoryview
    count: int


class Landing(_Handle):
    """A buffer that selections are written to. It cannot be closed while memory of a view is in use (BufferError)."""

    _closer = "ice_landing_close"

    def __init__(self, client, handle, head_dim, dtype):
        self._exports = {}  # memory that views have handed out and that is still in use, by id
        self.head_dim = head_dim
        self.dtype = dtype
        super().__init__(client, handle)

    def view(self, row, layer, kv_head):
        found = _library.LandingView()
        _check(library().ice_landing_view(self._open(), row, layer, kv_head, byref(found)))
        element_bytes = _DTYPES[self.dtype][1]
        shape = (found.count, self.head_dim)
        rows = [
            self._export(address, found.count * self.head_dim * element_bytes, "f" if element_bytes == 4 else "H", shape)
            for address in (found.keys, found.values)
        ]
        positions = self._export(found.positions, 4 * found.count, "I", (found.count,))
        return View(rows[0], rows[1], positions, found.count)

    def _export(self, address, nbytes, format_code, shape):
        if nbytes == 0:
            return memoryview(b"").cast(format_code)
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        memory.landing = self  # whoever holds the memory holds the landing
        key, exports = id(memory), self._exports
        exports[key] = weakref.ref(memory, lambda _: exports.pop(key, None))
        return memoryview(memory).cast("B").cast(format_code, shape).toreadonly()

    def _check_exports(self):
        if self._handle is not None and len(self._exports) > 0:
            raise BufferError("memory of a view is still in use; delete the views before closing the landing")

    def close(self):
        self._check_exports()
        super().close()


_MODES = {"any": 0, "push": 1, "pull": 2}
_COPIES = {"any": 0, "blocks": 1, "changed": 2, "loop": 3, "batch": 4}


class GpuArray:
    """A part of a landing in GPU memory, for whatever takes __cuda_array_interface__: torch.as_tensor(array, device="cuda")."""

    def __init__(self, landing, address, shape, typestr, layer_bytes):
        strides = [int(typestr[2:])]
        for count in reversed(shape[3:]):
            strides.insert(0, strides[0] * count)
        strides[:0] = [shape[1] * layer_bytes, layer_bytes]
        self.landing = landing  # whoever holds the array holds the landing
        self.shape = shape
        self.strides = tuple(strides)  # in bytes: not contiguous, a layer's positions and counts follow its data
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": typestr,
            "strides": tuple(strides),
        }


def _vectors_on_gpu(queries, keys):
    """Where a retrieve's vectors are; a layer that follows an anchor has no queries."""
    first = keys if queries is None else queries
    return first is not None and is_on_gpu(first)


class GpuLanding(_Handle):
    """A landing in GPU memory. mode: "push" or "pull", pull_reason: why it is not push; copy_way: how
    several rows are copied.

    copies_changed: a pull that can leave what is there where it is, copy_reason: why it cannot; block_us,
    changed_none_us, changed_all_us: what one row takes until it has landed.

    data is [row, layer, KV head, 2, slot, head_dim] (int16, the bit patterns, for bf16: torch.as_tensor(...) and
    .view(torch.bfloat16)); counts is int32 [row, layer, KV head], positions int32 [row, layer, KV head, slot]. What a
    retrieve left is there once it has been waited for. Do not use them after close().
    """

    _closer = "ice_landing_close"

    def __init__(self, client, handle, shape, dtype, memory):
        found = _library.GpuLanding()
        self.memory = memory  # the caller's, which must live as long as the landing
        self.head_dim = shape.head_dim
        self.dtype = dtype
        super().__init__(client, handle)
        _check(library().ice_landing_gpu(handle, byref(found)))
        self.address, self.nbytes = found.address, found.bytes
        self.mode = "push" if found.mode == _MODES["push"] else "pull"
        self.pull_reason = found.pull_reason.decode("utf-8", "replace")
        self.device_name = found.device_name.decode("utf-8", "replace")
        self.copies_changed = found.copies_changed
        self.copy_reason = found.copy_reason.decode("utf-8", "replace")
        self.block_us, self.changed_none_us = found.block_us, found.changed_none_us
        self.changed_all_us = found.changed_all_us
        self.copy_way = found.copy_way.decode("utf-8", "replace")
        cells = (shape.rows, shape.layers, shape.kv_heads)
        element = {"bf16": "<i2", "fp16": "<f2", "fp32": "<f4"}[dtype]
        step = found.layer_bytes
        self.data = GpuArray(self, found.address, (*cells, 2, shape.slots, shape.head_dim), element, step)
        self.counts = GpuArray(self, found.address + found.counts_offset, cells, "<i4", step)
        self.positions = GpuArray(self, found.address + found.positions_offset, (*cells, shape.slots), "<i4", step)

    def close(self):
        super().close()
        self.data = self.counts = self.positions = None  # they hold the landing


class Sequence(_Handle):
    """The KV history of one request. prefix_tokens: with how many it began, where it was attached or forked, else 0."""

    _closer = "ice_sequence_close"

    def __init__(self, client, handle, layers, kv_heads, query_heads, head_dim, dtype, prefix_tokens=0):
        self.prefix_tokens = prefix_tokens
        self.layers = layers
        self.kv_heads = kv_heads
        self.query_heads = query_heads
        self.head_dim = head_dim
        self.dtype = dtype
        super().__init__(client, handle)

    def info(self, deadline_us=0):
        found = _library.SequenceInfo()
        _check(library().ice_sequence_info(self._open(), deadline_us, byref(found)))
        return SequenceInfo(*(getattr(found, name) for name, _ in found._fields_))

    def fork(self, tokens=ALL_TOKENS, deadline_us=0):
        """A Sequence that begins with the first tokens of this one (or all that every layer has) and shares them.

        Nothing is copied; each of the two goes on for itself. Error with CONFLICT: the layers are not equally long.
        """
        handle, child = self._open(), c_void_p()
        _check(library().ice_sequence_fork(handle, tokens, deadline_us, byref(child)))
        shape = (self.layers, self.kv_heads, self.query_heads, self.head_dim, self.dtype)
        forked = Sequence(self._client, child, *shape)
        forked.prefix_tokens = forked.info().length_min
        return forked

    def truncate(self, tokens, deadline_us=0):
        """Forgets what lies behind the first tokens; layers that are shorter stay as they are."""
        _check(library().ice_sequence_truncate(self._open(), tokens, deadline_us))

    def append(self, keys, values, first, layer=ALL_LAYERS, deadline_us=0):
        """Appends K and V, [layer, token, KV head, head_dim] each; returns the length that was reached."""
        handle = self._open()
        length = c_uint64()
        with Buffer(keys) as k, Buffer(values) as v:
            tokens, memory = self._memory(k, v, layer)
            status = library().ice_append(handle, layer, first, tokens, byref(memory), deadline_us, byref(length))
        _check(status, length.value)
        return length.value

    def append_gpu(self, keys, values, first, layer=ALL_LAYERS, stream=0, deadline_us=0):
        """As append, from arrays in GPU memory, for example torch tensors: [layer, token, KV head, head_dim] each.

        A token's heads must lie side by side. stream is the handle of the stream that made them, such as
        torch.cuda.current_stream().cuda_stream (0: the default stream): the copies go there.
        """
        handle = self._open()
        length = c_uint64()
        layouts = [gpu_layout(array, self.dtype) for array in (keys, values)]
        if layouts[0][1:] != layouts[1][1:]:
            raise ValueError("keys and values must have the same shape and strides")
        _, shape, strides = layouts[0]
        layers = self.layers if layer == ALL_LAYERS else 1
        element_bytes = _DTYPES[self.dtype][1]
        if len(shape) != 4 or shape[0] != layers or shape[2:] != (self.kv_heads, self.head_dim):
            raise ValueError(f"keys and values must be [{layers}, tokens, {self.kv_heads}, {self.head_dim}]")
        if strides[3] != element_bytes:
            raise ValueError("the elements of a head must be contiguous")
        extent = sum((count - 1) * stride for count, stride in zip(shape, strides)) + element_bytes
        memory = _library.KvMemory(layouts[0][0], layouts[1][0], extent, extent, *strides[:3])
        status = library().ice_append_gpu(
            handle, layer, first, shape[1], byref(memory), stream or None, deadline_us, byref(length)
        )
        _check(status, length.value)
        return length.value

    def read_into(self, keys, values, first, layer=ALL_LAYERS, deadline_us=0):
        """Fills K and V, laid out as in append, with the positions from first on."""
        handle = self._open()
        with Buffer(keys, writable=True) as k, Buffer(values, writable=True) as v:
            tokens, memory = self._memory(k, v, layer)
            status = library().ice_read(handle, layer, first, tokens, byref(memory), deadline_us)
        _check(status)

    def seal(self, hashes, deadline_us=0):
        """Puts the first blocks, one for each hash, on the daemon's disk; returns when they are safe there.

        hashes are those of block_hashes, or others of HASH_BYTES bytes: packed, or a list of bytes. Error with
        POSITION_GAP: a layer has fewer tokens. deadline_us 0 is at least 10 minutes.
        """
        handle = self._open()
        found = _library.SealResult()
        with _hashes(hashes) as (address, count):
            status = library().ice_sequence_seal(handle, address, count, deadline_us, byref(found))
        _check(status)
        return Seal(found.prefix_id, found.tokens, found.known)

    def _memory(self, keys, values, layer):
        layers = self.layers if layer == ALL_LAYERS else 1
        layouts = [
            kv_layout(buffer, layers, self.kv_heads, self.head_dim, _DTYPES[self.dtype][1]) for buffer in (keys, values)
        ]
        if layouts[0] != layouts[1]:
            raise ValueError("keys and values must have the same shape and strides")
        tokens, layer_stride, token_stride, head_stride = layouts[0]
        return tokens, _library.KvMemory(
            keys.address, values.address, keys.extent(), values.extent(), layer_stride, token_stride, head_stride
        )


def _packed(stack, name, array, nbytes, on_gpu):
    """The address of a packed array of this size; in host memory it is borrowed until the stack's end."""
    if is_on_gpu(array) != on_gpu:
        raise ValueError("queries, keys and values must all be in host memory or all in GPU memory")
    if on_gpu:
        address, found = gpu_memory(array, name)
    else:
        buffer = stack.enter_context(Buffer(array))
        address, found = buffer.address, buffer.nbytes if buffer.is_packed() else None
    if found != nbytes:
        raise ValueError(f"{name} must be packed and have {nbytes} bytes")
    return address


class Ticket(_Handle):
    """A retrieve in flight."""

    _closer = "ice_ticket_close"

    def wait(self, deadline_us=0):
        """The Selection. Timeout leaves the ticket open: wait again or close it."""
        result = _library.RetrieveResult()
        _check(library().ice_retrieve_wait(self._open(), deadline_us, byref(result)))
        return selection(result)

    def stream_wait(self, stream=0):
        """Lets a stream wait for the selection instead of the CPU: what is issued in it from now on sees the selection.

        stream is a handle such as torch.cuda.current_stream().cuda_stream (0: the default stream). For landings in GPU
        memory, once for a ticket, outside of a capture. Call wait before you trust what that work made: it raises where
        the stream went on without the selection (the request failed, its deadline passed, the daemon died).
        """
        _check(library().ice_ticket_stream_wait(self._open(), stream))


class Client:
    """One session with the daemon. Its calls may come from any thread, except close.

    name_space: the only namespace that it may use, and that of all sequences that name none.
    transport: "auto", "zmq" or "ring" (ice_transport). ring_spin_us: how long a wait looks before it sleeps.
    """

    def __init__(
        self,
        socket_directory=None,
        name=None,
        deadline_us=0,
        staging_bytes=0,
        name_space=None,
        transport="auto",
        ring_spin_us=0,
    ):
        if transport not in _library.TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(_library.TRANSPORTS)}")
        self._handle = None
        self._children = weakref.WeakSet()
        options = _library.ClientOptions(
            None if socket_directory is None else str(socket_directory).encode(),
            None if name is None else name.encode(),
            deadline_us,
            staging_bytes,
            None if name_space is None else name_space.encode(),
            _library.TRANSPORTS.index(transport),
            ring_spin_us,
        )
        handle = c_void_p()
        _check(library().ice_client_connect(byref(options), byref(handle)))
        self._handle = handle

    def _open(self):
        if self._handle is None:
            raise ValueError("the client is closed")
        return self._handle

    @property
    def boot_token(self):
        """Random per daemon start; 0 while the session is lost."""
        return library().ice_client_boot_token(self._open())

    def reconnect(self):
        _check(library().ice_client_reconnect(self._open()))

    def close(self):
        """Ends the session and closes its landings, sequences and tickets."""
        if self._handle is None:
            return
        children = list(self._children)
        for child in children:
            if isinstance(child, Landing):
                child._check_exports()
        for child in children:
            child._handle = None  # the library frees them with the client
        handle, self._handle = self._handle, None
        library().ice_client_close(handle)

    def __enter__(self):
        return self

    def __exit__(self, exc_type, *_):
        try:
            self.close()
        except BufferError:
            # Views that the exception's frames hold keep a landing in use: its cause must not be hidden by that.
            if exc_type is None:
                raise

    def __del__(self):
        if getattr(self, "_handle", None) is not None:
            self.close()

    def open_landing(
        self, *, rows, layers, kv_heads, slots, head_dim, dtype, gpu=None, mode="any", copy="any", deadline_us=0
    ):
        """A Landing in host memory; a GpuLanding where gpu is the number of a GPU or an array in GPU memory.

        The array (a torch tensor, or anything with __cuda_array_interface__) must have at least landing_bytes(...)
        bytes and lie contiguous. mode is "push", "pull" or "any"; copy, of a pull, "changed" (only what is not on the
        GPU already), "blocks", or "any" (what is faster); "loop" and "batch" are blocks, a call of the driver for each
        row of a retrieve or one for all.
        """
        shape = _library.LandingShape(rows, layers, kv_heads, slots, head_dim, _dtype(dtype)[0])
        handle = c_void_p()
        if gpu is not None:
            if mode not in _MODES:
                raise ValueError(f"mode {mode!r} is none of {', '.join(_MODES)}")
            if copy not in _COPIES:
                raise ValueError(f"copy {copy!r} is none of {', '.join(_COPIES)}")
            number = isinstance(gpu, int)
            address, nbytes = (0, 0) if number else gpu_memory(gpu)
            options = _library.GpuOptions(address, nbytes, gpu if number else 0, _MODES[mode], _COPIES[copy])
            _check(library().ice_landing_open_gpu(self._open(), byref(shape), byref(options), deadline_us, byref(handle)))
            return GpuLanding(self, handle, shape, dtype, None if number else gpu)
        _check(library().ice_landing_open(self._open(), byref(shape), deadline_us, byref(handle)))
        return Landing(self, handle, head_dim, dtype)

    def open_sequence(self, *, deadline_us=0, **options):
        """An empty Sequence.

        Keyword arguments: model_digest (bytes), layers, kv_heads, query_heads, head_dim, dtype, and optionally
        name_space, tp_rank, tp_size, softmax_scale, block_tokens, anchor_layers, max_tokens.
        """
        filled = _sequence_options(**options)
        handle = c_void_p()
        _check(library().ice_sequence_open(self._open(), byref(filled), deadline_us, byref(handle)))
        return self._sequence(handle, options, 0)

    def lookup(self, hashes, *, all_ranks=False, deadline_us=0, **options):
        """How many tokens a sequence of these options (those of open_sequence) could be attached to; 0: none.

        all_ranks: that every rank below tp_size could; attach with it as tokens_max.
        """
        filled = _sequence_options(**options)
        tokens = c_uint64()
        look = library().ice_prefix_lookup_group if all_ranks else library().ice_prefix_lookup
        with _hashes(hashes) as (address, count):
            status = look(self._open(), byref(filled), address, count, deadline_us, byref(tokens))
        _check(status)
        return tokens.value

    def attach(self, hashes, *, tokens_max=0, deadline_us=0, **options):
        """A Sequence that begins with the longest sealed prefix that matches: append the rest at its prefix_tokens.

        options are those of open_sequence; no more than tokens_max tokens are taken (0: no limit). Error with
        UNKNOWN_PREFIX: none matches.
        """
        filled = _sequence_options(**options)
        handle, tokens = c_void_p(), c_uint64()
        with _hashes(hashes) as (address, count):
            status = library().ice_sequence_attach(
                self._open(), byref(filled), address, count, tokens_max, deadline_us, byref(handle), byref(tokens)
            )
        _check(status)
        return self._sequence(handle, options, tokens.value)

    def remove_prefix(self, prefix_id, deadline_us=0, name_space=None):
        """Forgets a sealed prefix of the namespace (None: the client's); sequences attached to it live on."""
        given = None if name_space is None else name_space.encode()
        _check(library().ice_prefix_remove_from(self._open(), given, prefix_id, deadline_us))

    def _sequence(self, handle, options, prefix_tokens):
        shape = (options[name] for name in ("layers", "kv_heads", "query_heads", "head_dim", "dtype"))
        return Sequence(self, handle, *shape, prefix_tokens)

    def retrieve(self, landing, *, stream=0, **options):
        """Submit and wait: the arguments of submit; returns the Selection."""
        result = _library.RetrieveResult()
        with self._options(landing, **options) as filled:
            if _vectors_on_gpu(options["queries"], options.get("keys")):
                status = library().ice_retrieve_gpu(self._open(), byref(filled), stream, byref(result))
            else:
                status = library().ice_retrieve(self._open(), byref(filled), byref(result))
        _check(status)
        return selection(result)

    def submit(self, landing, *, stream=0, **options):
        """Sends a retrieve for one layer of one or several sequences and returns a Ticket.

        Keyword arguments: layer, sequences, rows, first_queries (one entry per sequence), queries (the vectors,
        packed [sequence, query, query head, head_dim]; None for a layer that follows an anchor), query_dtype, query_count (query positions per sequence, 1),
        budget, keep (of the budget, so many tokens of the last selection stay), sinks, window, worker_holds_ends, resend, coverage, page_wise, deadline_us, and keys and values
        ([sequence, query, KV head, head_dim], packed), which are appended first.

        queries, keys and values may be in GPU memory, all on the landing's GPU (torch tensors, or anything with
        __cuda_array_interface__). stream is the handle of the stream that makes them, such as
        torch.cuda.current_stream().cuda_stream (0: the default stream): they are copied there before this returns.
        """
        handle = c_void_p()
        with self._options(landing, **options) as filled:
            if _vectors_on_gpu(options["queries"], options.get("keys")):
                status = library().ice_retrieve_submit_gpu(self._open(), byref(filled), stream, byref(handle))
            else:
                status = library().ice_retrieve_submit(self._open(), byref(filled), byref(handle))
        _check(status)
        return Ticket(self, handle)

    def hint(
        self,
        *,
        layer,
        sequences,
        queries,
        query_dtype,
        budget,
        query_count=1,
        sinks=DEFAULT_SINKS,
        window=DEFAULT_WINDOW,
        wait=False,
        deadline_us=0,
    ):
        """Predicted queries: brings what a retrieve with them would select from the daemon's disk into its memory.

        queries are packed [sequence, query, query head, head_dim] in host memory; the other arguments are those of the
        retrieve to come. Returns None when the hint is sent, or with wait=True a Hint when the reads are asked for.
        """
        count = len(sequences)
        if count == 0 or query_count < 1:
            raise ValueError("a hint needs at least one sequence and one query position")
        code, element_bytes = _dtype(query_dtype)
        wanted = count * query_count * sequences[0].query_heads * sequences[0].head_dim * element_bytes
        result = _library.HintResult()
        with contextlib.ExitStack() as stack:
            filled = _library.HintOptions(
                layer,
                count,
                (c_void_p * count)(*(sequence._open().value for sequence in sequences)),
                query_count,
                _packed(stack, "queries", queries, wanted, False),
                code,
                budget,
                sinks,
                window,
                deadline_us,
            )
            _check(library().ice_hint(self._open(), byref(filled), byref(result) if wait else None))
        return Hint(result.pages, result.lanes) if wait else None

    @contextlib.contextmanager
    def _options(
        self,
        landing,
        *,
        layer,
        sequences,
        rows,
        first_queries,
        queries,
        query_dtype,
        budget,
        keep=0,
        query_count=1,
        sinks=DEFAULT_SINKS,
        window=DEFAULT_WINDOW,
        keys=None,
        values=None,
        worker_holds_ends=False,
        resend=False,
        coverage=0.0,
        page_wise=False,
        deadline_us=0,
    ):
        count = len(sequences)
        if len(rows) != count or len(first_queries) != count:
            raise ValueError("sequences, rows and first_queries must have the same length")
        if count == 0 or query_count < 1:
            raise ValueError("a retrieve needs at least one sequence and one query position")
        if (keys is None) != (values is None):
            raise ValueError("give both keys and values, or none")
        code, element_bytes = _dtype(query_dtype)
        with contextlib.ExitStack() as stack:
            # The library reads what the shapes say, so the sizes are checked here, where they are known.
            shape = sequences[0]
            on_gpu = _vectors_on_gpu(queries, keys)
            wanted = count * query_count * shape.query_heads * shape.head_dim * element_bytes
            vectors = None if queries is None else _packed(stack, "queries", queries, wanted, on_gpu)
            sides = [None, None]
            if keys is not None:
                wanted = count * query_count * shape.kv_heads * shape.head_dim * _DTYPES[shape.dtype][1]
                sides = [
                    _packed(stack, name, array, wanted, on_gpu) for name, array in (("keys", keys), ("values", values))
                ]
            yield _library.RetrieveOptions(
                landing._open(),
                layer,
                count,
                (c_void_p * count)(*(sequence._open().value for sequence in sequences)),
                (c_uint32 * count)(*rows),
                (c_uint64 * count)(*first_queries),
                query_count,
                vectors,
                code,
                sides[0],
                sides[1],
                budget,
                keep,
                sinks,
                window,
                worker_holds_ends,
                resend,
                coverage,
                1 if page_wise else 0,
                deadline_us,
            )
