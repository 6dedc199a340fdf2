"""Writes the first inputs of the fuzz corpus: valid messages of every kind, and the refusals that bit once.

Usage: seeds.py [folder], by default the corpus folder beside this file. Numbers are the fields of proto/icecache.proto.
"""
import pathlib
import struct
import sys


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def u(field, value):
    return varint(field << 3) + varint(value)


def f64(field, value):
    return varint(field << 3 | 1) + struct.pack("<Q", value)


def f32(field, value):
    return varint(field << 3 | 5) + struct.pack("<f", value)


def b(field, value):
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def packed(field, values):
    return b(field, b"".join(varint(v) for v in values))


TOKEN = bytes(range(16))


def request(field, body, version=1, token=TOKEN):
    return u(1, version) + u(2, 42) + f64(3, 7) + b(4, token) + b(field, body)


OPEN = (b(1, "tenant") + b(2, b"\x5a" * 32) + u(3, 1) + u(4, 2) + u(5, 4) + u(6, 8) + u(7, 32) + u(8, 128) + u(9, 1)
        + f32(10, 0.125) + u(11, 32) + packed(12, range(4)) + u(13, 131072))
RETRIEVE = (u(1, 1) + u(2, 3) + b(3, struct.pack("<3Q", 11, 12, 13)) + packed(4, [0, 2, 1]) + packed(5, [100, 200, 300])
            + u(6, 2) + u(7, 3) + u(8, 256) + u(9, 16) + u(10, 64) + u(12, 1) + f32(13, 0.9) + u(15, 20000) + u(16, 1))
HINT = u(1, 3) + b(2, struct.pack("<3Q", 11, 12, 13)) + u(3, 2) + u(4, 3) + u(5, 256) + u(6, 16) + u(7, 64) + u(8, 20000)
COUNTS = packed(1, [2, 0, 3]) + b(2, struct.pack("<3f", .5, .25, 1)) + packed(3, [9, 8, 300]) + packed(4, [1, 2, 3])
STATS = b(1, "0.1.0") + u(2, 1000) + b(22, b(1, "queue") + u(2, 3) + varint(3 << 3 | 1) + struct.pack("<d", 1.5)) + b(
    23, f64(1, 5) + f64(2, 6) + u(3, 100) + b(4, "tenant") + b(12, "idle"))

SPILL = b(1, "threads") + b(2, "refused") + u(3, 1) + u(4, 1) + u(5, 1 << 20) + u(7, 3) + u(14, 2) + u(15, 2**64 - 1)
PREFIX = f64(1, 7) + b(2, "tenant") + u(3, 4096) + u(4, 32) + u(5, 8) + u(6, 128) + u(7, 1 << 30) + u(8, 2)

LEASE = b(1, "prefix") + u(2, 7) + f64(3, 9) + u(4, 4711) + b(5, "engine") + b(6, "tenant") + u(7, 1000) + u(10, 1)


def edits(kind, *changes):
    """Of fuzz_index_image: the number of an image and edits of six bytes (what, where, with what)."""
    return bytes([kind]) + b"".join(struct.pack("<BHBH", what, at, value, other) for what, at, value, other in changes)


def reply(field, body):
    return u(1, 42) + f64(2, 99) + b(field, body)


LANDING = u(1, 4) + u(2, 32) + u(3, 8) + u(4, 336) + u(5, 128) + u(6, 2)
GPU = b(1, TOKEN) + b(5, bytes(range(128)))

SEEDS = {
    "request": {
        "open": request(5, OPEN),
        "open_small": request(5, b(2, b"d") + u(5, 1) + u(6, 1) + u(7, 1) + u(8, 16) + u(9, 3)),
        "open_twice": request(5, OPEN) + b(5, packed(12, [0]) + b(1, "other")),
        "close": request(6, f64(1, 5)),
        "append": request(7, f64(1, 5) + u(2, 3) + u(3, 2) + u(4, 4096) + u(5, 512) + u(6, 65536) + u(7, 1024)),
        "append_token_major": request(7, f64(1, 5) + u(2, 3) + u(3, 2) + u(4, 4096) + u(5, 512) + u(8, 1)),
        "append_wraps": request(7, f64(1, 5) + u(2, 2**32 - 1) + u(3, 2) + u(4, 2**64 - 1) + u(5, 1) + u(6, 2**64 - 1)),
        "retrieve": request(8, RETRIEVE),
        "retrieve_unpacked": request(8, f64(3, 11) + f64(3, 12) + u(4, 1) + u(4, 2) + u(5, 1) + u(5, 2) + u(6, 1)
                                     + u(7, 1) + u(8, 64)),
        "retrieve_row_twice": request(8, RETRIEVE + packed(4, [0, 2, 1]) + packed(5, [1]) + f64(3, 11)),
        "retrieve_keep": request(8, RETRIEVE + u(20, 1)),
        "retrieve_keep_over": request(8, RETRIEVE + u(20, 2**31)),
        "retrieve_nan": request(8, RETRIEVE + f32(13, float("nan"))),
        "retrieve_then_open": request(8, RETRIEVE) + b(5, OPEN),
        "read": request(9, f64(1, 5) + u(3, 1) + u(4, 10) + u(5, 90)),
        "info": request(10, f64(1, 5)),
        "stats": request(11, u(1, 256)),
        "seal": request(12, f64(1, 5)),
        "lookup": request(13, b(1, OPEN)),
        "lookup_group": request(13, b(1, OPEN) + u(2, 1)),
        "lookup_group_over": request(13, b(1, OPEN + u(4, 1025)) + u(2, 1)),
        "lookup_of_nothing": request(13, b""),
        "lookup_twice": request(13, b(1, OPEN) + b(1, packed(12, [0]) + b(1, "other"))),
        "attach": request(14, b(1, OPEN) + u(2, 65536)),
        "attach_to_nothing": request(14, u(2, 2**64 - 1)),
        "attach_then_lookup": request(14, b(1, OPEN)) + b(13, b""),
        "prefix_remove": request(15, f64(1, 7)),
        "prefix_remove_named": request(15, f64(1, 7) + b(2, "tenant")),
        "prefix_list": request(16, u(1, 256)),
        "sequence_fork": request(17, f64(1, 5) + u(2, 2**64 - 1)),
        "sequence_truncate": request(18, f64(1, 5) + u(2, 100)),
        "prefix_list_named": request(16, u(1, 256) + b(2, "tenant")),
        "lease_list": request(19, u(1, 256)),
        "namespace_list": request(20, u(1, 256)),
        "hint": request(21, HINT),
        "hint_twice": request(21, HINT) + b(21, f64(2, 11) + u(3, 2**31)),
        "version": request(11, b"", version=2),
        "version_garbled": u(1, 9) + u(2, 42) + b"\x1f\xff",
        "token": request(11, b"", token=b"short"),
        "unknown_fields": u(99, 1) + b(98, b"later") + request(11, u(50, 3)),
        "empty_messages": b(11, b"") * 600,
        "length_over": u(1, 1) + b"\x22\xff\xff\xff\xff\x0f",
    },
    "control_request": {
        "hello": u(1, 1) + b(2, u(1, 1) + b(2, "engine") + u(3, 1)),
        "hello_name_space": u(1, 1) + b(2, u(1, 1) + b(2, "engine") + b(4, "tenant")),
        "hello_version": u(1, 1) + b(2, u(1, 2)),
        "hello_escape": u(1, 1) + b(2, u(1, 1) + b(2, b"\x1b[2J\xff")),
        "staging": u(1, 2) + b(3, u(1, 1 << 26)),
        "landing": u(1, 3) + b(4, LANDING),
        "landing_pull": u(1, 3) + b(4, LANDING + u(7, 1)),
        "landing_push": u(1, 3) + b(4, LANDING + u(7, 2) + b(8, GPU + b(2, bytes(64)) + u(4, 4096))),
        "landing_pieces": u(1, 3) + b(4, LANDING + u(7, 2) + b(8, GPU + packed(3, [2 << 20] * 128) + u(4, 1 << 20))),
        "landing_gpu_twice": u(1, 3) + b(4, LANDING + u(7, 2) + b(8, GPU + packed(3, [1])) + b(8, b(2, bytes(64)))),
        "landing_huge": u(1, 3) + b(4, u(1, 4096) + u(2, 512) + u(3, 32) + u(4, 1 << 24) + u(5, 256) + u(6, 3)),
        "landing_close": u(1, 4) + b(5, u(1, 8)),
        "ring_open": u(1, 5) + b(6, b""),
        "no_body": u(1, 5),
    },
    "reply": {
        "error": u(1, 42) + u(3, 14) + b(4, "the pool is full"),
        "open": reply(5, f64(1, 9)),
        "append": reply(6, u(1, 1000)),
        "retrieve": reply(7, COUNTS + packed(6, [1, 2, 3, 4, 5]) + u(7, 10) + u(10, 4096)),
        "retrieve_short": reply(7, COUNTS),
        "retrieve_uneven": reply(7, COUNTS + packed(4, [7])),
        "retrieve_wraps": reply(7, packed(1, [2**32 - 1, 5, 1]) + COUNTS[5:] + packed(6, range(5))),
        "read": reply(8, u(1, 90)),
        "info": reply(9, packed(1, [5, 6]) + packed(2, [1, 2]) + u(7, 1)),
        "stats": reply(10, STATS),
        "stats_twice": reply(10, STATS) + b(10, STATS),
        "stats_spill": reply(10, STATS + b(27, SPILL)),
        "seal": reply(11, f64(1, 7) + u(2, 4096) + u(3, 1)),
        "lookup": reply(12, u(1, 4096)),
        "attach": reply(13, f64(1, 9) + u(2, 4096)),
        "attach_endless": reply(13, f64(1, 9) + u(2, 2**64 - 1)),
        "sequence_fork": reply(15, f64(1, 9) + u(2, 4096)),
        "sequence_fork_endless": reply(15, f64(1, 9) + u(2, 2**64 - 1)),
        "prefix_list": reply(14, b(1, PREFIX) + b(1, b"") + u(2, 2)),
        "lease_list": reply(16, b(1, LEASE) + b(1, b"") + u(2, 2)),
        "hint": reply(18, u(1, 200) + u(2, 8)),
        "namespace_list": reply(17, b(1, b(1, "tenant") + u(2, 3) + u(7, 1 << 30)) + b(1, b"") + u(2, 2)),
        "prefix_list_then_seal": reply(14, b(1, PREFIX)) + b(11, u(2, 16)),
    },
    "control_reply": {
        "hello": u(1, 1) + b(4, f64(1, 5) + f64(2, 6) + b(3, TOKEN) + b(4, "ipc:///run/icecache/data.sock")
                             + b(5, "0.1.0") + u(6, 64) + u(7, 1 << 24)),
        "hello_token": u(1, 1) + b(4, b(3, b"short")),
        "hello_then_staging": u(1, 1) + b(4, b(3, TOKEN)) + b(5, u(1, 4096)),
        "staging": u(1, 2) + b(5, u(1, 4096)),
        "landing": u(1, 3) + b(6, u(1, 1) + u(2, 12288)),
        "ring": u(1, 2) + b(7, u(1, 1 << 18)),
        "error": u(1, 4) + u(2, 16) + b(3, "the memory for landings is used up"),
    },
    # Scripts of what is written into a ring: a record (below 64), its indices on (below 128, 160), a reply (below 192), a
    # look (from 192).
    "ring": {
        "message": bytes([0]) + struct.pack("<II", 40, 100) + bytes([64, 13, 200, 1, 64, 20, 200, 1]),
        "no_header": bytes([0]) + struct.pack("<II", 0, 100) + bytes([64, 13, 200, 1]),
        "huge": bytes([0]) + struct.pack("<II", 2**32 - 1, 2**32 - 1) + bytes([64, 13, 200, 1]),
        "head_anywhere": bytes([64, 255]) + struct.pack("<Q", 2**63 + 5) + bytes([200, 1]),
        "replies": bytes([170, 255, 0, 128, 13, 170, 255, 15, 128, 200, 170, 3, 0]),
        "tail_anywhere": bytes([170, 9, 0, 128, 255]) + struct.pack("<Q", 2**64 - 1) + bytes([170, 9, 0]),
    },
    # Each image as it is; in its header, in its places and in its last bytes a word that is another one.
    "index_image": {
        **{f"image_{kind}": edits(kind) for kind in range(12)},
        **{f"header_{word}": edits(6 + word % 6, (0x82, word, word, 0)) for word in range(30)},
        **{f"word_{at}": edits(6 + at % 6, (at % 6, at, 2, 60 + at)) for at in range(50, 6000, 350)},
        "cut": edits(7, (6, 0, 0, 4)),
        "cut_unsaid": edits(7, (6, 0, 1, 4)),
        "longer": edits(8, (7, 0, 0, 96)),
    },
}


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "corpus"
    for target, inputs in SEEDS.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
