#!/usr/bin/env python3
"""Tests of the Python package against a daemon that this script starts.

    test_icecache.py --library PATH --daemon PATH
"""

import argparse
import array
import ctypes
import gc
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import icecache  # noqa: E402
from icecache import _buffers, _library  # noqa: E402

LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM = 2, 2, 4, 16
ROW = KV_HEADS * HEAD_DIM
MODEL = dict(
    model_digest=b"m", layers=LAYERS, kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=HEAD_DIM, dtype="fp32"
)
daemon_path = None
fake_driver = None


class Daemon:
    """icecached in a folder of its own."""

    def __init__(self, *options):
        self.folder = tempfile.TemporaryDirectory(prefix="icecache-")
        self.options = options
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [daemon_path, "--socket-dir", self.folder.name, "--pool-bytes", "64m", "--index-bytes", "64m", "--shards", "2"]
            + list(self.options),
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                icecache.Client(self.folder.name).close()
                return
            except icecache.Error:
                time.sleep(0.02)
        raise RuntimeError("the daemon does not answer")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(timeout=30)
        self.folder.cleanup()


def numbers(seed, count):
    generator = random.Random(seed)
    return array.array("f", (generator.uniform(-1, 1) for _ in range(count)))


def words(memory):
    """The contents as bytes, whatever the shape."""
    return memory.tobytes()


class HeaderTest(unittest.TestCase):
    """What ctypes cannot check by itself: that the package says what the header says."""

    header = (FOLDER.parent.parent / "icecache.h").read_text()

    def test_statuses(self):
        listed = re.search(r"enum ice_status \{(.*?)\}", self.header, re.S).group(1)
        written = {name: int(value) for name, value in re.findall(r"^    ICE_(\w+) = (\d+),", listed, re.M)}
        self.assertEqual(written, {status.name: status.value for status in icecache.Status})
        for status in icecache.Status:
            self.assertEqual(_library.library().ice_status_name(status), b"ICE_" + status.name.encode())

    def test_structures_have_the_headers_members(self):
        structures = {
            "ice_client_options": _library.ClientOptions,
            "ice_landing_shape": _library.LandingShape,
            "ice_landing_view": _library.LandingView,
            "ice_gpu_options": _library.GpuOptions,
            "ice_gpu_landing": _library.GpuLanding,
            "ice_sequence_options": _library.SequenceOptions,
            "ice_sequence_info": _library.SequenceInfo,
            "ice_seal_result": _library.SealResult,
            "ice_kv_source": _library.KvMemory,
            "ice_kv_target": _library.KvMemory,
            "ice_retrieve_options": _library.RetrieveOptions,
            "ice_retrieve_result": _library.RetrieveResult,
            "ice_hint_options": _library.HintOptions,
            "ice_hint_result": _library.HintResult,
        }
        sizes = {"uint32_t": 4, "float": 4, "bool": 1, "ice_dtype": 4, "ice_transport": 4}
        sizes |= {"uint64_t": 8, "size_t": 8, "int": 4, "char": 1}
        for name, structure in structures.items():
            body = re.search(r"struct %s \{\n(.*?)\n\};" % name, self.header, re.S).group(1)
            body = re.sub(r"//.*", "", body)
            members = []
            for declaration in filter(None, (part.strip() for part in body.split(";"))):
                first, *others = declaration.split(",")
                kind, first = re.match(r"(?:const )?((?:enum )?\w+) (.*)", first).groups()
                for member in [first, *others]:
                    size = 8 if "*" in member else sizes.get(kind, 4 if kind.startswith("enum") else None)
                    members.append((member.replace("const ", "").strip(" *"), size))
            found = [(field, getattr(structure, field).size) for field, _ in structure._fields_]
            self.assertEqual(found, members, name)


class BufferTest(unittest.TestCase):
    def test_layouts(self):
        with _buffers.Buffer(array.array("f", [0.0] * (2 * 3 * ROW))) as flat:
            self.assertEqual(_buffers.kv_layout(flat, 2, KV_HEADS, HEAD_DIM, 4), (3, 3 * ROW * 4, ROW * 4, HEAD_DIM * 4))
            with self.assertRaises(ValueError):
                _buffers.kv_layout(flat, 4, KV_HEADS, HEAD_DIM, 4)
        shaped = memoryview(bytearray(5 * ROW * 2)).cast("H", (5, KV_HEADS, HEAD_DIM))
        with _buffers.Buffer(shaped[1:4]) as part:
            self.assertEqual(_buffers.kv_layout(part, 1, KV_HEADS, HEAD_DIM, 2)[0], 3)
            self.assertEqual(part.extent(), 3 * ROW * 2)
            with self.assertRaises(ValueError):
                _buffers.kv_layout(part, 1, KV_HEADS, HEAD_DIM, 4)
        with _buffers.Buffer(shaped[::-1]) as backwards, self.assertRaises(ValueError):
            backwards.extent()
        with self.assertRaises(TypeError):
            with _buffers.Buffer(7):
                pass
        with self.assertRaises(BufferError):
            with _buffers.Buffer(b"constant", writable=True):
                pass


class HashTest(unittest.TestCase):
    """The hashes of blocks, which need no daemon."""

    def test_hashes(self):
        ids = array.array("I", (i * 2654435761 % 2**32 for i in range(40)))
        found = icecache.block_hashes(ids)
        self.assertEqual(len(found), 2 * icecache.HASH_BYTES)  # 8 tokens are left over
        self.assertEqual(found[:16].hex(), "7a3b20d2e8bbcef66ff5bbb808c3798c")  # as in tests/unit/test_client_hashes.c
        self.assertEqual(icecache.block_hashes(list(ids)), found)
        self.assertEqual(icecache.block_hashes(iter(ids[:16])), found[:16])
        self.assertEqual(icecache.block_hashes(array.array("q", ids)), found)
        self.assertEqual(icecache.block_hashes(memoryview(array.array("I", ids[::-1]))[::-1]), found)
        self.assertEqual(icecache.block_hashes([1] * 15), b"")
        self.assertEqual(len(icecache.block_hashes(ids, block_tokens=4)), 160)
        self.assertNotEqual(icecache.block_hashes(ids, salt=b"adapter"), found)
        for wrong in ([-1] * 16, [2**32] * 16):
            with self.assertRaises(OverflowError):
                icecache.block_hashes(wrong)
        with self.assertRaises(TypeError):
            icecache.block_hashes([0.5] * 16)
        with self.assertRaises(icecache.Error) as caught:
            icecache.block_hashes(ids, block_tokens=5000)
        self.assertIn("block_tokens", caught.exception.text)


class ClientBase(unittest.TestCase):
    daemon_options = ()

    def setUp(self):
        self.daemon = Daemon(*self.daemon_options)
        self.daemon.start()
        self.addCleanup(self.daemon.stop)

    def connect(self, **options):
        client = icecache.Client(self.daemon.folder.name, name="test", **options)
        self.addCleanup(client.close)
        return client

    def open(self, client, rows=4, slots=64):
        landing = client.open_landing(
            rows=rows, layers=LAYERS, kv_heads=KV_HEADS, slots=slots, head_dim=HEAD_DIM, dtype="fp32"
        )
        return landing, client.open_sequence(**MODEL)

    @staticmethod
    def arguments(sequence, row=0, at=0, **changes):
        options = dict(
            layer=1,
            sequences=[sequence],
            rows=[row],
            first_queries=[at],
            queries=numbers(3, QUERY_HEADS * HEAD_DIM),
            query_dtype="fp32",
            budget=8,
            sinks=2,
            window=4,
        )
        options.update(changes)
        return options


class ClientTest(ClientBase):
    def test_append_read_retrieve(self):
        client = self.connect(staging_bytes=1 << 16)  # small: appends and reads go in many parts
        landing, sequence = self.open(client)
        self.assertNotEqual(client.boot_token, 0)
        tokens = 600
        keys, values = numbers(1, LAYERS * tokens * ROW), numbers(2, LAYERS * tokens * ROW)
        self.assertEqual(sequence.append(keys, values, first=0), tokens)
        self.assertEqual(sequence.append(keys, values, first=0), tokens)  # again: no effect
        self.assertEqual(sequence.info().length, tokens)

        got_keys, got_values = array.array("f", bytes(4 * len(keys))), array.array("f", bytes(4 * len(values)))
        sequence.read_into(got_keys, got_values, first=0)
        self.assertEqual(got_keys, keys)
        self.assertEqual(got_values, values)

        found = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1))
        self.assertEqual(found.counts, [14, 14])
        self.assertFalse(found.partial)
        for head in range(KV_HEADS):
            view = landing.view(0, 1, head)
            self.assertEqual(view.count, 14)
            for slot, position in enumerate(view.positions):
                at = (tokens + position) * ROW + head * HEAD_DIM  # layer 1
                self.assertEqual(words(view.keys[slot : slot + 1]), keys[at : at + HEAD_DIM].tobytes())
                self.assertEqual(words(view.values[slot : slot + 1]), values[at : at + HEAD_DIM].tobytes())
            self.assertTrue({0, 1, tokens - 1, tokens - 4} <= set(view.positions))
        with self.assertRaises(BufferError):
            landing.close()
        with self.assertRaises(BufferError):
            client.close()
        with self.assertRaises(TypeError):
            view.keys[0, 0] = 1.0
        del view
        landing.close()
        landing.close()
        with self.assertRaises(ValueError):
            landing.view(0, 1, 0)

    def test_step_with_its_own_keys_and_everything_returned(self):
        client = self.connect()
        landing, sequence = self.open(client)
        keys, values = numbers(4, 20 * ROW), numbers(5, 20 * ROW)
        shaped = memoryview(keys).cast("B").cast("f", (20, KV_HEADS, HEAD_DIM))
        sequence.append(shaped, memoryview(values).cast("B").cast("f", (20, KV_HEADS, HEAD_DIM)), first=0, layer=1)
        step_keys, step_values = numbers(6, ROW), numbers(7, ROW)
        ticket = client.submit(
            landing, **self.arguments(sequence, at=20, keys=step_keys, values=step_values, budget=50, query_count=1)
        )
        self.assertEqual(ticket.wait().counts, [21, 21])
        ticket.close()
        view = landing.view(0, 1, 1)
        self.assertEqual(list(view.positions), list(range(21)))
        self.assertEqual(words(view.keys[20:21]), step_keys[HEAD_DIM:].tobytes())
        self.assertEqual(words(view.values[19:20]), values[19 * ROW + HEAD_DIM : 20 * ROW].tobytes())

    def test_layer_and_step_reuse(self):
        client = self.connect()
        landing, _ = self.open(client)
        sequence = client.open_sequence(**MODEL, anchor_layers=[0] * LAYERS)
        tokens = 200
        sequence.append(numbers(1, LAYERS * tokens * ROW), numbers(2, LAYERS * tokens * ROW), first=0)
        first = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=0))
        self.assertEqual(first.changed, first.counts)
        again = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=0))
        self.assertEqual((again.changed, again.bytes_moved), ([0, 0], 0))
        again = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=0, resend=True))
        self.assertEqual((again.changed, again.bytes_moved), ([0, 0], first.bytes_moved))
        budget = self.arguments(sequence, at=tokens - 1, layer=0)["budget"]
        kept = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=0, keep=budget))
        self.assertEqual((kept.changed, kept.bytes_moved), ([0, 0], 0))
        with self.assertRaises(icecache.Error):
            client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=0, keep=budget + 1))
        followed = client.retrieve(landing, **self.arguments(sequence, at=tokens - 1, layer=1, queries=None))
        self.assertEqual(followed.masses, first.masses)
        for head in range(KV_HEADS):
            own, anchor = landing.view(0, 1, head), landing.view(0, 0, head)
            self.assertEqual(sorted(own.positions), sorted(anchor.positions))
        del own, anchor

    def test_fork_and_truncate(self):
        client = self.connect()
        landing, sequence = self.open(client)
        tokens, kept = 300, 200
        keys, values = numbers(1, LAYERS * tokens * ROW), numbers(2, LAYERS * tokens * ROW)
        sequence.append(keys, values, first=0)
        child = sequence.fork()
        early = sequence.fork(kept)
        self.assertEqual((child.prefix_tokens, early.prefix_tokens), (tokens, kept))
        self.assertEqual(child.info().shared_tokens, tokens)
        with self.assertRaises(icecache.Error) as caught:
            sequence.fork(tokens + 1)
        self.assertEqual(caught.exception.status, icecache.Status.OUT_OF_BOUNDS)
        sequence.close()
        child.truncate(kept)
        child.truncate(kept)
        step = numbers(8, LAYERS * ROW)
        for each in (child, early):
            self.assertEqual(each.append(step, step, first=kept), kept + 1)
            got_keys, got_values = (array.array("f", bytes(4 * LAYERS * (kept + 1) * ROW)) for _ in range(2))
            each.read_into(got_keys, got_values, first=0)
            for layer in range(LAYERS):
                at, end = layer * (kept + 1) * ROW, (layer * (kept + 1) + kept) * ROW
                self.assertEqual(got_keys[at:end], keys[layer * tokens * ROW :][: kept * ROW])
                self.assertEqual(got_values[end : end + ROW], step[layer * ROW :][:ROW])
            found = client.retrieve(landing, **self.arguments(each, at=kept))
            self.assertEqual(found.counts, [14, 14])
            each.close()

    def test_errors_are_told(self):
        client = self.connect()
        landing, sequence = self.open(client)
        keys = numbers(1, LAYERS * ROW)
        with self.assertRaises(icecache.Error) as caught:
            sequence.append(keys, keys, first=5)
        self.assertEqual(caught.exception.status, icecache.Status.POSITION_GAP)
        self.assertEqual(caught.exception.length, 0)
        with self.assertRaises(icecache.Error) as caught:
            client.open_landing(rows=0, layers=1, kv_heads=1, slots=1, head_dim=16, dtype="bf16")
        self.assertIn("rows", caught.exception.text)
        with self.assertRaises(ValueError):
            client.open_landing(rows=1, layers=1, kv_heads=1, slots=1, head_dim=16, dtype="int8")
        with self.assertRaises(ValueError):
            client.retrieve(landing, **self.arguments(sequence, queries=b"short"))
        with self.assertRaises(ValueError):
            client.retrieve(landing, **self.arguments(sequence, rows=[0, 1]))
        with self.assertRaises(ValueError):
            sequence.append(keys, keys[:ROW], first=0)
        with self.assertRaises(icecache.Error) as caught:
            icecache.Client("/nowhere")
        self.assertEqual(caught.exception.status, icecache.Status.NO_DAEMON)

    def test_arguments_of_prefixes(self):
        client = self.connect()
        _, sequence = self.open(client)
        self.assertEqual(sequence.prefix_tokens, 0)
        for wrong in (b"short", [b"short"], array.array("d", [1.0])):
            with self.assertRaises(ValueError):
                sequence.seal(wrong)
        with self.assertRaises(icecache.Error) as caught:
            client.lookup(b"", **MODEL)
        self.assertIn("count is 0", caught.exception.text)
        with self.assertRaises(TypeError):
            client.attach(bytes(16), layers=LAYERS)

    def test_a_client_that_is_garbage_with_its_handles(self):
        for _ in range(20):
            client = icecache.Client(self.daemon.folder.name)
            client.cycle = [client, *self.open(client)]
            del client
            gc.collect()  # finds all of them at once, and ends them in an order of its own
        self.assertEqual(self.connect().open_sequence(**MODEL).info().length, 0)

    def test_threads(self):
        client = self.connect()
        landing, sequence = self.open(client, rows=8)
        tokens = 300
        keys = numbers(1, LAYERS * tokens * ROW)
        sequence.append(keys, keys, first=0)
        failures = []

        def work(row):
            try:
                for _ in range(50):
                    found = client.retrieve(landing, **self.arguments(sequence, row=row, at=tokens - 1))
                    if landing.view(row, 1, 0).count != found.counts[0]:
                        raise AssertionError("count")
            except Exception as error:  # pylint: disable=broad-except
                failures.append(error)

        threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_stopped_daemon_times_out_and_the_row_comes_back(self):
        client = self.connect()
        landing, sequence = self.open(client)
        keys = numbers(1, LAYERS * 50 * ROW)
        sequence.append(keys, keys, first=0)
        self.daemon.process.send_signal(signal.SIGSTOP)
        options = self.arguments(sequence, at=49, deadline_us=100000)
        with self.assertRaises(icecache.Timeout):
            client.retrieve(landing, **options)
        with self.assertRaises(icecache.Error) as caught:
            landing.view(0, 1, 0)
        self.assertEqual(caught.exception.status, icecache.Status.BUSY)
        with self.assertRaises(icecache.Error) as caught:
            client.submit(landing, **options)
        self.assertEqual(caught.exception.status, icecache.Status.BUSY)
        self.daemon.process.send_signal(signal.SIGCONT)
        end = time.monotonic() + 20
        while True:
            try:
                landing.view(0, 1, 0)
                break
            except icecache.Error as error:
                self.assertEqual(error.status, icecache.Status.BUSY)
                self.assertLess(time.monotonic(), end)
        client.retrieve(landing, **self.arguments(sequence, at=49))

    def test_killed_daemon(self):
        client = self.connect(deadline_us=20000000)
        landing, sequence = self.open(client)
        keys = numbers(1, LAYERS * 50 * ROW)
        sequence.append(keys, keys, first=0)
        token = client.boot_token
        self.daemon.process.send_signal(signal.SIGSTOP)
        ticket = client.submit(landing, **self.arguments(sequence, at=49))
        threading.Timer(0.1, self.daemon.kill).start()
        begun = time.monotonic()
        with self.assertRaises(icecache.SessionLost):
            ticket.wait()
        self.assertLess(time.monotonic() - begun, 5)
        self.assertEqual(client.boot_token, 0)
        with self.assertRaises(icecache.SessionLost):
            sequence.info()
        with self.assertRaises(icecache.SessionLost):
            client.reconnect()
        self.daemon.start()
        client.reconnect()
        self.assertNotIn(client.boot_token, (0, token))
        with self.assertRaises(icecache.SessionLost) as caught:
            sequence.info()
        self.assertEqual(caught.exception.status, icecache.Status.UNKNOWN_SESSION)
        new_landing, new_sequence = self.open(client)
        new_sequence.append(keys, keys, first=0)
        client.retrieve(new_landing, **self.arguments(new_sequence, at=49))

    def test_forked_child(self):
        client = self.connect()
        landing, sequence = self.open(client)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sequence.info()
            except icecache.SessionLost as error:
                code = 0 if error.status == icecache.Status.FORKED else 2
            sequence.close()
            client.close()
            os._exit(code)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual(sequence.info().length, 0)
        landing.close()

    def test_example(self):
        environment = dict(os.environ, PYTHONPATH=str(FOLDER.parent))
        done = subprocess.run(
            [sys.executable, "-B", str(FOLDER.parent / "examples" / "hello.py"), self.daemon.folder.name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("44 tokens"), 2, done.stdout)


class HintTest(ClientBase):
    """Hints, with a disk below a pool that is too small."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="icecache-spill-")
        self.addCleanup(folder.cleanup)
        self.daemon_options = ("--pool-bytes", "2m", "--spill-dir", folder.name, "--spill-bytes", "256m")
        super().setUp()

    def test_hint(self):
        client = self.connect()
        tokens = 2048
        shape = dict(MODEL)
        sequences = [client.open_sequence(**shape) for _ in range(8)]
        keys, values = numbers(1, LAYERS * tokens * ROW), numbers(2, LAYERS * tokens * ROW)
        for sequence in sequences:
            sequence.append(keys, values, first=0)
        queries = numbers(3, shape["query_heads"] * shape["head_dim"])
        asked = {"layer": 0, "queries": queries, "query_dtype": "fp32", "budget": 64}
        found = client.hint(sequences=sequences[:1], wait=True, **asked)
        self.assertEqual(found.lanes, shape["kv_heads"])
        self.assertGreater(found.pages, 0)
        self.assertIsNone(client.hint(sequences=sequences[1:2], **asked))
        with self.assertRaises(ValueError):
            client.hint(sequences=sequences[:2], **asked)  # queries for one
        with self.assertRaises(ValueError):
            client.hint(sequences=[], **asked)
        with self.assertRaises(icecache.Error) as caught:
            client.hint(sequences=sequences[:1], **{**asked, "layer": LAYERS})
        self.assertEqual(caught.exception.status, icecache.Status.UNKNOWN_LAYER)


class PrefixTest(ClientBase):
    """Sealed prefixes, with a disk below the daemon."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="icecache-spill-")
        self.addCleanup(folder.cleanup)
        self.daemon_options = ("--spill-dir", folder.name, "--spill-bytes", "256m")
        super().setUp()

    def test_seal_and_attach(self):
        client = self.connect()
        sequence = client.open_sequence(**MODEL)
        tokens, sealed = 100, 96
        ids = list(range(tokens))
        hashes = icecache.block_hashes(ids)
        keys, values = numbers(1, LAYERS * tokens * ROW), numbers(2, LAYERS * tokens * ROW)
        sequence.append(keys, values, first=0)
        first = sequence.seal(hashes)
        self.assertEqual((first.tokens, first.known), (sealed, False))
        blocks = [hashes[at : at + 16] for at in range(0, len(hashes), 16)]
        self.assertEqual(sequence.seal(blocks), icecache.Seal(first.prefix_id, sealed, True))
        with self.assertRaises(icecache.Error) as caught:
            sequence.seal(icecache.block_hashes(ids + [7] * 16))
        self.assertEqual(caught.exception.status, icecache.Status.POSITION_GAP)
        sequence.close()

        self.assertEqual(client.lookup(hashes, **MODEL), sealed)
        self.assertEqual(client.lookup(icecache.block_hashes(ids, salt=b"s"), **MODEL), 0)
        self.assertEqual(client.lookup(hashes, name_space="other", **MODEL), 0)
        attached = client.attach(hashes, tokens_max=sealed - 1, **MODEL)
        self.assertEqual(attached.prefix_tokens, sealed - 16)
        attached.close()
        attached = client.attach(hashes, **MODEL)
        self.assertEqual(attached.prefix_tokens, sealed)
        self.assertEqual(attached.info().length_min, sealed)
        got_keys, got_values = (array.array("f", bytes(4 * LAYERS * sealed * ROW)) for _ in range(2))
        attached.read_into(got_keys, got_values, first=0)
        for got, whole in ((got_keys, keys), (got_values, values)):
            for layer in range(LAYERS):
                at = layer * tokens * ROW
                self.assertEqual(got[layer * sealed * ROW : (layer + 1) * sealed * ROW], whole[at : at + sealed * ROW])

        self.assertEqual(client.lookup(hashes, all_ranks=True, **MODEL), sealed)
        self.assertEqual(client.lookup(hashes, all_ranks=True, tp_size=2, **MODEL), 0)
        with self.assertRaises(icecache.Error) as caught:
            client.remove_prefix(first.prefix_id, name_space="other")
        self.assertEqual(caught.exception.status, icecache.Status.UNKNOWN_PREFIX)
        client.remove_prefix(first.prefix_id)
        self.assertEqual(client.lookup(hashes, **MODEL), 0)
        self.assertEqual(attached.append(numbers(3, LAYERS * ROW), numbers(4, LAYERS * ROW), first=sealed), sealed + 1)
        for call in (lambda: client.attach(hashes, **MODEL), lambda: client.remove_prefix(first.prefix_id)):
            with self.assertRaises(icecache.Error) as caught:
                call()
            self.assertEqual(caught.exception.status, icecache.Status.UNKNOWN_PREFIX)


class FakeMemory:
    """What torch.Tensor has, over memory of the fake driver."""

    def __init__(self, driver, nbytes):
        address = ctypes.c_uint64()
        assert driver.cuMemAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes)) == 0
        self.address, self.nbytes = address.value, nbytes

    def data_ptr(self):
        return self.address

    def is_contiguous(self):
        return True

    def numel(self):
        return self.nbytes // 2

    def element_size(self):
        return 2


class GpuTest(ClientBase):
    """Landings in GPU memory, over the fake driver."""

    shape = dict(rows=2, layers=LAYERS, kv_heads=KV_HEADS, slots=64, head_dim=HEAD_DIM, dtype="fp32")

    def setUp(self):
        if fake_driver is None:
            self.skipTest("no --fake-cuda")
        folder = tempfile.TemporaryDirectory(prefix="icecache-fake-gpu-")
        self.addCleanup(folder.cleanup)
        os.environ["FAKE_CUDA_DIR"] = folder.name
        os.environ["ICECACHE_CUDA_LIBRARY"] = fake_driver
        self.driver = ctypes.CDLL(fake_driver)
        context = ctypes.c_void_p()
        self.assertEqual(self.driver.cuInit(0), 0)
        self.assertEqual(self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), 0)
        self.assertEqual(self.driver.cuCtxPushCurrent(context), 0)
        super().setUp()

    def content(self, array, row, layer):
        """A GpuArray's part of one (row, layer), as bytes."""
        nbytes = array.shape[2] * array.strides[2]
        copied = (ctypes.c_ubyte * nbytes)()
        address = array.__cuda_array_interface__["data"][0] + row * array.strides[0] + layer * array.strides[1]
        self.assertEqual(self.driver.cuMemcpyDtoH(copied, ctypes.c_uint64(address), ctypes.c_size_t(nbytes)), 0)
        return bytes(copied)

    def test_every_kind_holds_what_a_host_landing_holds(self):
        client = self.connect()
        host, sequence = self.open(client, rows=2)
        keys, values = numbers(1, LAYERS * 50 * ROW), numbers(2, LAYERS * 50 * ROW)
        sequence.append(keys, values, first=0)
        client.retrieve(host, **self.arguments(sequence, row=1, at=49))
        for memory in (None, FakeMemory(self.driver, icecache.landing_bytes(**self.shape))):
            for mode in ("any", "push", "pull"):
                gpu = 0 if memory is None else memory
                landing = client.open_landing(**self.shape, gpu=gpu, mode=mode)
                self.assertEqual(landing.mode, "pull" if mode == "pull" else "push")
                self.assertEqual(landing.pull_reason, "")
                self.assertEqual(landing.device_name, "Fake GPU 0")
                found = client.retrieve(landing, **self.arguments(sequence, row=1, at=49))
                self.assertEqual(found.counts, [14] * KV_HEADS)
                counts = memoryview(self.content(landing.counts, 1, 1)).cast("i")
                positions = memoryview(self.content(landing.positions, 1, 1)).cast("i", (KV_HEADS, 64))
                data = self.content(landing.data, 1, 1)
                side = 64 * HEAD_DIM * 4
                for head in range(KV_HEADS):
                    view = host.view(row=1, layer=1, kv_head=head)
                    self.assertEqual(counts[head], 14)
                    self.assertEqual([positions[head, slot] for slot in range(14)], view.positions.tolist())
                    for number, rows in enumerate((view.keys, view.values)):
                        at = (2 * head + number) * side
                        self.assertEqual(data[at : at + 14 * HEAD_DIM * 4], words(rows))
                    rows = None
                    del view
                landing.close()

    def test_append_from_the_gpu(self):
        client = self.connect()
        _, sequence = self.open(client)
        sides = []
        for seed in (1, 2):
            host = numbers(seed, LAYERS * 50 * ROW)
            memory = FakeMemory(self.driver, len(host) * 4)
            self.driver.cuMemcpyHtoD(ctypes.c_uint64(memory.address), bytes(host), ctypes.c_size_t(memory.nbytes))
            interface = {"version": 3, "data": (memory.address, False), "shape": (LAYERS, 50, KV_HEADS, HEAD_DIM)}
            interface["typestr"] = "<f4"
            sides.append((host, type("Array", (), {"__cuda_array_interface__": interface})()))
        self.assertEqual(sequence.append_gpu(sides[0][1], sides[1][1], first=0), 50)
        keys, values = array.array("f", bytes(4 * LAYERS * 50 * ROW)), array.array("f", bytes(4 * LAYERS * 50 * ROW))
        sequence.read_into(keys, values, first=0)
        self.assertEqual([keys, values], [sides[0][0], sides[1][0]])
        sides[0][1].__cuda_array_interface__["shape"] = (LAYERS, 25, 2 * KV_HEADS, HEAD_DIM)
        with self.assertRaises(ValueError):
            sequence.append_gpu(sides[0][1], sides[1][1], first=50)
        interface = dict(sides[1][1].__cuda_array_interface__, typestr="<f2")
        with self.assertRaisesRegex(ValueError, "elements are <f2"):
            half = type("Array", (), {"__cuda_array_interface__": interface})()
            sequence.append_gpu(sides[1][1], half, first=50)

    def test_a_stream_waits(self):
        client = self.connect()
        host, sequence = self.open(client, rows=2)
        sequence.append(numbers(1, LAYERS * 50 * ROW), numbers(2, LAYERS * 50 * ROW), first=0)
        for mode in ("push", "pull"):
            landing = client.open_landing(**self.shape, gpu=0, mode=mode)
            for _ in range(5):
                with client.submit(landing, **self.arguments(sequence, row=1, at=49)) as ticket:
                    ticket.stream_wait(stream=0)
                    self.assertEqual(ticket.wait().counts, [14] * KV_HEADS)
                counts = memoryview(self.content(landing.counts, 1, 1)).cast("i")
                self.assertEqual(counts[0], 14)
            landing.close()
        with client.submit(host, **self.arguments(sequence, row=1, at=49)) as ticket:
            with self.assertRaises(icecache.Error) as caught:
                ticket.stream_wait()
            self.assertEqual(caught.exception.status, icecache.Status.NOT_SUPPORTED)
            ticket.wait()

    def on_gpu(self, host, packed=True):
        """A copy of an array in GPU memory, with the interface that torch tensors have there too."""
        data = bytes(host)
        memory = FakeMemory(self.driver, len(data))
        self.driver.cuMemcpyHtoD(ctypes.c_uint64(memory.address), data, ctypes.c_size_t(len(data)))
        interface = {"version": 3, "data": (memory.address, False), "shape": (len(data) // 4,), "typestr": "<f4"}
        if not packed:
            interface["strides"] = (8,)
        return type("Array", (), {"__cuda_array_interface__": interface, "memory": memory})()

    def test_queries_from_the_gpu(self):
        client = self.connect()
        host, sequence = self.open(client, rows=2)
        sequence.append(numbers(1, LAYERS * 50 * ROW), numbers(2, LAYERS * 50 * ROW), first=0)
        landing = client.open_landing(**self.shape, gpu=0)
        arguments = self.arguments(sequence, row=1, at=49)
        wanted = client.retrieve(host, **arguments)
        queries = arguments.pop("queries")
        for target in (host, landing):
            found = client.retrieve(target, queries=self.on_gpu(queries), **arguments)
            self.assertEqual((found.counts, found.masses), (wanted.counts, wanted.masses))
        ride = dict(arguments, first_queries=[50])
        keys, values = numbers(3, ROW), numbers(4, ROW)
        with client.submit(
            landing, queries=self.on_gpu(queries), keys=self.on_gpu(keys), values=self.on_gpu(values), stream=0, **ride
        ) as ticket:
            ticket.wait()
        stored = [array.array("f", bytes(4 * ROW)) for _ in range(2)]
        sequence.read_into(*stored, first=50, layer=arguments["layer"])
        self.assertEqual(stored, [keys, values])
        with self.assertRaises(ValueError):
            client.retrieve(landing, queries=self.on_gpu(queries), keys=keys, values=values, **ride)
        with self.assertRaises(ValueError):
            client.retrieve(landing, queries=self.on_gpu(queries, packed=False), **arguments)
        with self.assertRaises(ValueError):
            client.retrieve(landing, queries=self.on_gpu(keys), **arguments)

    def test_refusals(self):
        client = self.connect()
        with self.assertRaises(ValueError):
            client.open_landing(**self.shape, gpu=0, mode="shove")
        with self.assertRaises(ValueError):
            client.open_landing(**self.shape, gpu=0, copy="some")
        with self.assertRaises(icecache.Error) as caught:
            client.open_landing(**self.shape, gpu=7)
        self.assertEqual(caught.exception.status, icecache.Status.INVALID_ARGUMENT)
        with self.assertRaises(icecache.Error) as caught:
            client.open_landing(**self.shape, gpu=FakeMemory(self.driver, 4096))
        self.assertEqual(caught.exception.status, icecache.Status.OUT_OF_BOUNDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--fake-cuda")
    known, others = parser.parse_known_args()
    os.environ["ICECACHE_LIBRARY"] = known.library
    daemon_path = known.daemon
    fake_driver = known.fake_cuda
    unittest.main(argv=[sys.argv[0], *others])
