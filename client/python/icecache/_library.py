"""libicecache by ctypes: loading it, its structures and the signatures of its functions, as in icecache.h."""

import ctypes
import enum
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p


class Status(enum.IntEnum):
    """ice_status."""

    OK = 0
    INVALID_ARGUMENT = 1
    BAD_MESSAGE = 2
    TOO_LARGE = 3
    VERSION_MISMATCH = 4
    NOT_SUPPORTED = 5
    UNKNOWN_SEQUENCE = 6
    UNKNOWN_LANDING = 7
    UNKNOWN_LAYER = 8
    SHAPE_MISMATCH = 9
    POSITION_GAP = 10
    CONFLICT = 11
    OUT_OF_BOUNDS = 12
    NOT_FINITE = 13
    POOL_FULL = 14
    INDEX_FULL = 15
    SHARED_FULL = 16
    LIMIT = 17
    BUSY = 18
    QUEUE_FULL = 19
    TIMEOUT = 20
    NO_MEMORY = 21
    SHUTTING_DOWN = 22
    UNKNOWN_SESSION = 23
    DISCONNECTED = 24
    NO_DAEMON = 25
    FORKED = 26
    PERMISSION = 27
    SYSTEM = 28
    INTERNAL = 29
    SPILL_FULL = 30
    PAGE_LOST = 31
    UNKNOWN_PREFIX = 32
    DISK_FAILED = 33
    OVERLOADED = 34
    QUOTA = 35


SESSION_LOST = frozenset(
    {
        Status.VERSION_MISMATCH,
        Status.SHUTTING_DOWN,
        Status.UNKNOWN_SESSION,
        Status.DISCONNECTED,
        Status.FORKED,
        Status.PERMISSION,
        Status.NO_DAEMON,
    }
)


TRANSPORTS = ("auto", "zmq", "ring")  # as enum ice_transport


class ClientOptions(ctypes.Structure):
    _fields_ = [
        ("socket_directory", c_char_p),
        ("name", c_char_p),
        ("deadline_us", c_uint64),
        ("staging_bytes", c_uint64),
        ("name_space", c_char_p),
        ("transport", c_int),
        ("ring_spin_us", c_uint32),
    ]


class LandingShape(ctypes.Structure):
    _fields_ = [
        ("rows", c_uint32),
        ("layers", c_uint32),
        ("kv_heads", c_uint32),
        ("slots", c_uint32),
        ("head_dim", c_uint32),
        ("dtype", c_int),
    ]


class LandingView(ctypes.Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("positions", c_void_p),
        ("count", c_uint32),
    ]


class GpuOptions(ctypes.Structure):
    _fields_ = [
        ("address", c_uint64),
        ("bytes", c_uint64),
        ("device", c_int),
        ("mode", c_int),
        ("copy", c_int),
    ]


class GpuLanding(ctypes.Structure):
    _fields_ = [
        ("address", c_uint64),
        ("bytes", c_uint64),
        ("layer_bytes", c_uint64),
        ("positions_offset", c_uint64),
        ("counts_offset", c_uint64),
        ("mode", c_int),
        ("pull_reason", c_char_p),
        ("device_name", c_char_p),
        ("copy_way", c_char_p),
        ("copies_changed", c_bool),
        ("copy_reason", c_char_p),
        ("block_us", c_float),
        ("changed_none_us", c_float),
        ("changed_all_us", c_float),
    ]


class SequenceOptions(ctypes.Structure):
    _fields_ = [
        ("name_space", c_char_p),
        ("model_digest", c_char_p),
        ("model_digest_bytes", c_size_t),
        ("tp_rank", c_uint32),
        ("tp_size", c_uint32),
        ("layers", c_uint32),
        ("kv_heads", c_uint32),
        ("query_heads", c_uint32),
        ("head_dim", c_uint32),
        ("dtype", c_int),
        ("softmax_scale", c_float),
        ("block_tokens", c_uint32),
        ("anchor_layers", POINTER(c_uint32)),
        ("max_tokens", c_uint64),
    ]


class SequenceInfo(ctypes.Structure):
    _fields_ = [
        ("length", c_uint64),
        ("length_min", c_uint64),
        ("indexed_min", c_uint64),
        ("pages", c_uint64),
        ("pool_bytes", c_uint64),
        ("index_bytes", c_uint64),
        ("build_us", c_uint64),
        ("idle", c_bool),
        ("shared_tokens", c_uint64),
    ]


class SealResult(ctypes.Structure):
    _fields_ = [
        ("prefix_id", c_uint64),
        ("tokens", c_uint64),
        ("known", c_bool),
    ]


class KvMemory(ctypes.Structure):
    """ice_kv_source and ice_kv_target, which have the same members."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("keys_bytes", c_size_t),
        ("values_bytes", c_size_t),
        ("layer_stride", c_size_t),
        ("token_stride", c_size_t),
        ("head_stride", c_size_t),
    ]


class RetrieveOptions(ctypes.Structure):
    _fields_ = [
        ("landing", c_void_p),
        ("layer", c_uint32),
        ("sequence_count", c_uint32),
        ("sequences", POINTER(c_void_p)),
        ("rows", POINTER(c_uint32)),
        ("first_queries", POINTER(c_uint64)),
        ("queries", c_uint32),
        ("query_vectors", c_void_p),
        ("query_dtype", c_int),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("budget", c_uint32),
        ("keep", c_uint32),
        ("sinks", c_uint32),
        ("window", c_uint32),
        ("worker_holds_ends", c_bool),
        ("resend", c_bool),
        ("coverage", c_float),
        ("granularity", c_int),
        ("deadline_us", c_uint64),
    ]


class HintOptions(ctypes.Structure):
    _fields_ = [
        ("layer", c_uint32),
        ("sequence_count", c_uint32),
        ("sequences", POINTER(c_void_p)),
        ("queries", c_uint32),
        ("query_vectors", c_void_p),
        ("query_dtype", c_int),
        ("budget", c_uint32),
        ("sinks", c_uint32),
        ("window", c_uint32),
        ("deadline_us", c_uint64),
    ]


class HintResult(ctypes.Structure):
    _fields_ = [("pages", c_uint64), ("lanes", c_uint32)]


class RetrieveResult(ctypes.Structure):
    _fields_ = [
        ("partial", c_bool),
        ("head_count", c_uint32),
        ("counts", POINTER(c_uint32)),
        ("changed", POINTER(c_uint32)),
        ("masses", POINTER(c_float)),
        ("indexed", POINTER(c_uint64)),
        ("versions", POINTER(c_uint64)),
        ("bytes_moved", c_uint64),
        ("queue_us", c_uint32),
        ("search_us", c_uint32),
        ("fetch_us", c_uint32),
        ("copy_us", c_uint32),
    ]


_SIGNATURES = {
    "ice_status_name": (c_char_p, [c_int]),
    "ice_status_text": (c_char_p, [c_int]),
    "ice_last_error": (c_char_p, []),
    "ice_version": (c_char_p, []),
    "ice_client_connect": (c_int, [POINTER(ClientOptions), POINTER(c_void_p)]),
    "ice_client_close": (None, [c_void_p]),
    "ice_client_reconnect": (c_int, [c_void_p]),
    "ice_client_boot_token": (c_uint64, [c_void_p]),
    "ice_landing_open": (c_int, [c_void_p, POINTER(LandingShape), c_uint64, POINTER(c_void_p)]),
    "ice_landing_close": (None, [c_void_p]),
    "ice_landing_view": (c_int, [c_void_p, c_uint32, c_uint32, c_uint32, POINTER(LandingView)]),
    "ice_landing_bytes": (c_int, [POINTER(LandingShape), POINTER(c_uint64)]),
    "ice_landing_open_gpu": (
        c_int,
        [c_void_p, POINTER(LandingShape), POINTER(GpuOptions), c_uint64, POINTER(c_void_p)],
    ),
    "ice_landing_gpu": (c_int, [c_void_p, POINTER(GpuLanding)]),
    "ice_sequence_open": (c_int, [c_void_p, POINTER(SequenceOptions), c_uint64, POINTER(c_void_p)]),
    "ice_sequence_close": (None, [c_void_p]),
    "ice_sequence_fork": (c_int, [c_void_p, c_uint64, c_uint64, POINTER(c_void_p)]),
    "ice_sequence_truncate": (c_int, [c_void_p, c_uint64, c_uint64]),
    "ice_sequence_info": (c_int, [c_void_p, c_uint64, POINTER(SequenceInfo)]),
    "ice_block_hashes": (c_int, [c_void_p, c_size_t, c_uint32, c_void_p, c_size_t, c_void_p]),
    "ice_sequence_seal": (c_int, [c_void_p, c_void_p, c_size_t, c_uint64, POINTER(SealResult)]),
    "ice_prefix_lookup": (
        c_int,
        [c_void_p, POINTER(SequenceOptions), c_void_p, c_size_t, c_uint64, POINTER(c_uint64)],
    ),
    "ice_prefix_lookup_group": (
        c_int,
        [c_void_p, POINTER(SequenceOptions), c_void_p, c_size_t, c_uint64, POINTER(c_uint64)],
    ),
    "ice_sequence_attach": (
        c_int,
        [
            c_void_p,
            POINTER(SequenceOptions),
            c_void_p,
            c_size_t,
            c_uint64,
            c_uint64,
            POINTER(c_void_p),
            POINTER(c_uint64),
        ],
    ),
    "ice_prefix_remove": (c_int, [c_void_p, c_uint64, c_uint64]),
    "ice_prefix_remove_from": (c_int, [c_void_p, c_char_p, c_uint64, c_uint64]),
    "ice_append": (c_int, [c_void_p, c_uint32, c_uint64, c_uint64, POINTER(KvMemory), c_uint64, POINTER(c_uint64)]),
    "ice_append_gpu": (
        c_int,
        [c_void_p, c_uint32, c_uint64, c_uint64, POINTER(KvMemory), c_void_p, c_uint64, POINTER(c_uint64)],
    ),
    "ice_read": (c_int, [c_void_p, c_uint32, c_uint64, c_uint64, POINTER(KvMemory), c_uint64]),
    "ice_retrieve": (c_int, [c_void_p, POINTER(RetrieveOptions), POINTER(RetrieveResult)]),
    "ice_retrieve_submit": (c_int, [c_void_p, POINTER(RetrieveOptions), POINTER(c_void_p)]),
    "ice_retrieve_gpu": (c_int, [c_void_p, POINTER(RetrieveOptions), c_void_p, POINTER(RetrieveResult)]),
    "ice_retrieve_submit_gpu": (c_int, [c_void_p, POINTER(RetrieveOptions), c_void_p, POINTER(c_void_p)]),
    "ice_retrieve_wait": (c_int, [c_void_p, c_uint64, POINTER(RetrieveResult)]),
    "ice_ticket_stream_wait": (c_int, [c_void_p, c_void_p]),
    "ice_ticket_close": (None, [c_void_p]),
    "ice_hint": (c_int, [c_void_p, POINTER(HintOptions), POINTER(HintResult)]),
}


def load(path=None):
    """The library with its signatures set. path None: $ICECACHE_LIBRARY, else libicecache.so.0."""
    library = ctypes.CDLL(path or os.environ.get("ICECACHE_LIBRARY") or "libicecache.so.0")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


_loaded = None


def library():
    """Loaded at first use, so that the package can be imported where the library is not installed."""
    global _loaded
    if _loaded is None:
        _loaded = load()
    return _loaded
