"""A decode loop of Llama-3.1-8B's shape with random weights over icecache: time to the second token and per token, beside
dense attention where K and V fit into the GPU.

    torch_decode.py --library PATH --daemon PATH [--tokens N] [--steps N] [--out FILE] [--seconds N]
    torch_decode.py --device cpu --layers 2 --tokens 4096 --hidden 256 --mlp 512 ...     # that it works

K and V of the prompt are on the device and are appended layer by layer; a token is decoded at once, while clustering has
just begun, which is what the second token has to wait for; the times per token are those of a sequence that is clustered.
Exit status 0, 1 a check or a variant failed, 77 there is no PyTorch, no GPU or not enough memory.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import sys
import time

from service import Daemon, available_bytes, icecache

try:
    import torch
except ImportError:
    print("skipped: there is no PyTorch")
    sys.exit(77)

import decode_data
import decoder
from decode_step import ENDS, Figures, Stepper

# As the paper gives them: its model is the same, its machine is not (64 CPU threads), its second token has a prefill in it.
PAPER = [
    {"method": "IceCache, as published", "tokens": 36000, "second_token_s": 7.7, "token_ms": 110.0, "search_ms": 50.0, "copy_ms": 15.0},
    {"method": "IceCache with layer reuse, as published", "tokens": 36000, "second_token_s": 5.9, "token_ms": 60.0},
]
WARM_TOKENS, WARM_STEPS = 400, 2
CLUSTER_S = 300  # at most
CHECK_EVERY = 4  # steps
ROUNDING = 0.05  # of attention in bfloat16, over the length of its output
FRESH_TOKENS = 65536  # up to here each variant of the first kind appends its own prompt
# Key, digits, and the title on two lines.
COLUMNS = (
    ("append_s", 2, "append", "s"),
    ("first_step_ms", 1, "a step at", "once ms"),
    ("second_token_s", 2, "second", "token s"),
    ("clustered_s", 2, "clustered", "after s"),
    ("token_ms", 2, "a token", "ms"),
    ("token_p90_ms", 2, "", "p90"),
    ("retrieve_ms", 2, "of it", "retrieves"),
    ("search_ms", 2, "", "search"),
    ("copy_ms", 2, "", "copy"),
    ("mb_per_token", 2, "MB a", "token"),
    ("turnover", 3, "new", "slots"),
    ("mass", 3, "", "mass"),
    ("output_error", 3, "output", "error"),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    budget: int
    place: str
    graphs: bool = False
    ends: bool = False  # sinks and window stay on the GPU
    reuse: bool = False  # what is in the landing is not sent again
    gpu_queries: bool = False
    anchors: int = 0  # so many layers follow one; 0: none

    def name(self):
        words = (
            (self.graphs, "graphs"),
            (self.ends, "ends held"),
            (self.reuse, "step reuse"),
            (self.gpu_queries, "GPU queries"),
            (self.anchors, "layer reuse"),
        )
        return ", ".join([f"icecache {self.budget}, {self.place}", *(text for flag, text in words if flag)])


class Data:
    """K, V of the prompt and of the steps, [token, KV head, head_dim] a layer, and the steps' rows of q, k and v."""

    def __init__(self, shape, tokens, steps, device):
        self.tokens, self.keys, self.values, rows = tokens, [], [], []
        for layer in range(shape.layers):
            keys, values, queries = decode_data.make_layer(shape, tokens, steps, layer, device, seed=1)
            self.keys.append(keys)
            self.values.append(values)
            rows.append(torch.cat([side.reshape(steps, -1) for side in (queries, keys[tokens:], values[tokens:])], 1))
        self.steps = torch.stack(rows, 1)  # [step, layer, row]


class Bench:
    def __init__(self, known, shape, device):
        self.known, self.shape, self.device = known, shape, device
        self.begun = time.monotonic()
        self.rows, self.failed, self.prefill, self.sequence = [], False, None, None
        self.client = self.model = self.data = None

    def left(self):
        return self.known.seconds - (time.monotonic() - self.begun)

    def say(self, text):
        print(f"{time.monotonic() - self.begun:6.1f} s  {text}", file=sys.stderr, flush=True)

    # ---- what all variants share ----

    def measure_prefill(self):
        """Seconds for all layers, from some of them: every layer does the same. None: not measured."""
        if self.device.type != "cuda" and self.known.tokens > 1024:
            return None
        x = torch.randn(self.known.tokens, self.shape.hidden, dtype=torch.bfloat16, device=self.device)
        count = min(self.shape.layers - 1, 2)
        if count < 1:
            return None
        self.model.prefill(x[: min(len(x), 4096)], 0)
        decoder.synchronize(self.device)
        begun = time.perf_counter()
        for layer in range(1, 1 + count):
            self.model.prefill(x, layer)
        decoder.synchronize(self.device)
        return (time.perf_counter() - begun) / count * self.shape.layers

    def open_sequence(self, variant=None):
        shape, more = self.shape, {}
        if variant is not None and variant.anchors:
            more["anchor_layers"] = [layer - layer % variant.anchors for layer in range(shape.layers)]
        return self.client.open_sequence(
            model_digest=b"decode", layers=shape.layers, kv_heads=shape.kv_heads, query_heads=shape.query_heads,
            head_dim=shape.head_dim, dtype="bf16", **more,
        )

    def append(self, sequence, tokens):
        for layer in range(self.shape.layers):
            sides = [side[layer][None, :tokens] for side in (self.data.keys, self.data.values)]
            if self.device.type == "cuda":
                sequence.append_gpu(*sides, first=0, layer=layer, stream=torch.cuda.current_stream().cuda_stream)
            else:
                sequence.append(*(side.view(torch.int16).numpy() for side in sides), first=0, layer=layer)

    def wait_clustered(self, sequence):
        end = time.monotonic() + CLUSTER_S
        while not sequence.info().idle:
            if time.monotonic() > end:
                raise RuntimeError(f"clustering takes more than {CLUSTER_S} s")
            time.sleep(0.005)

    # ---- variants ----

    def warm(self, stepper, variant):
        """Everything is allocated and recorded, and the landing is checked while it has fewer tokens than slots."""
        with self.open_sequence(variant) as sequence:
            tokens = min(WARM_TOKENS, self.known.tokens)
            self.append(sequence, tokens)
            stepper.bind(sequence, tokens)
            for _ in range(WARM_STEPS):
                stepper.step(Figures())
            self.check(stepper, variant)

    def check(self, stepper, variant):
        """The error of the last layer's attention for want of the other tokens."""
        wrong = stepper.wrong_rows()
        same, all_of = stepper.output_errors()
        if wrong > 0 or not same < ROUNDING:
            self.failed = True
            print(f"FAILED: {variant.name()}: {wrong} wrong rows in the landing, attention over it is off by {same:.3f}")
        return all_of

    def first_token(self, stepper, variant, row):
        """A prompt of its own: from its first append on."""
        if self.sequence is not None:
            self.sequence.close()
        self.sequence = self.open_sequence(variant)
        decoder.synchronize(self.device)
        begun = time.perf_counter()
        self.append(self.sequence, self.known.tokens)
        row["append_s"] = time.perf_counter() - begun
        stepper.bind(self.sequence, self.known.tokens)
        figures = Figures()
        stepper.step(figures)
        row["first_step_ms"] = figures.steps[0]["step_ms"]
        row["second_token_s"] = row["append_s"] + row["first_step_ms"] / 1000
        self.wait_clustered(self.sequence)
        row["clustered_s"] = time.perf_counter() - begun

    def run_variant(self, variant, fresh):
        row = {"method": variant.name(), **dataclasses.asdict(variant)}
        stepper = Stepper(self.model, self.data, self.client, variant)
        try:
            self.warm(stepper, variant)
            if fresh:
                self.first_token(stepper, variant, row)
            else:
                # Behind the prompt it has the steps of others. What has failed may have left some layers a token longer.
                length = self.sequence.info().length_min
                stepper.bind(self.sequence, self.known.tokens, length - self.known.tokens)
            errors = []
            for _ in range(WARM_STEPS):
                stepper.step(Figures())
            figures = Figures()
            for number in range(self.known.steps):
                stepper.step(figures)
                if number % CHECK_EVERY == 0:
                    errors.append(self.check(stepper, variant))
            row["output_error"] = statistics.mean(errors)
        finally:
            stepper.close()
        middle = {name: statistics.median(step[name] for step in figures.steps) for name in Figures.NAMES}
        ordered = sorted(step["step_ms"] for step in figures.steps)
        row.update(
            token_ms=middle["step_ms"],
            token_p90_ms=ordered[int(0.9 * (len(ordered) - 1))],
            retrieve_ms=middle["retrieve_ms"],
            queue_ms=middle["queue_ms"],
            search_ms=middle["search_ms"],
            copy_ms=middle["copy_ms"],
            mb_per_token=middle["bytes"] / 1e6,
            mass=middle["mass"] / self.shape.layers,
            turnover=middle["turnover"] / self.shape.layers or None,
        )
        return row

    def run_dense(self, graphs):
        """K and V of the steps are there from the beginning and attended to by all of them: the same work each time."""
        row = {"method": "dense attention, in the device's memory" + (", graphs" if graphs else ""), "graphs": graphs}
        model, shape, parts = self.model, self.shape, decoder.Parts(graphs)
        current = self.data.steps[0][:, : shape.query_elements].clone()
        sides = [[side.transpose(0, 1) for side in all_of] for all_of in (self.data.keys, self.data.values)]

        def query(layer):
            return current[layer].view(shape.kv_heads, -1, shape.head_dim)

        def layer_time(attend):
            times = []
            for _ in range(5):
                decoder.synchronize(self.device)
                begun = time.perf_counter()
                attend(query(0), sides[0][0], sides[1][0])
                decoder.synchronize(self.device)
                times.append(time.perf_counter() - begun)
            return min(times)

        attend = min((decoder.attend_sdpa, decoder.attend_split), key=layer_time)
        row["attention"] = attend.__name__

        def whole(layer):
            model.head(layer)
            model.tail(layer, attend(query(layer), sides[0][layer], sides[1][layer]).reshape(1, -1))

        times = []
        for number in range(WARM_STEPS + self.known.steps):
            begun = time.perf_counter()
            current.copy_(self.data.steps[number % self.known.steps][:, : shape.query_elements])
            model.begin()
            for layer in range(shape.layers):
                parts.run(f"layer {layer}", lambda at=layer: whole(at))
            decoder.synchronize(self.device)
            times.append(1000 * (time.perf_counter() - begun))
        times = sorted(times[WARM_STEPS:])
        row.update(token_ms=statistics.median(times), token_p90_ms=times[int(0.9 * (len(times) - 1))])
        row["second_token_s"] = row["token_ms"] / 1000
        return row

    def attempt(self, name, function, kind="decode"):
        """A row, or why there is none; goes on with the next whatever happens here."""
        took = max((row["took_s"] for row in self.rows if row.get("kind") == kind), default=0)
        if self.left() < 1.2 * took:
            self.rows.append({"method": name, "none": "no time left"})
            return
        begun = time.monotonic()
        try:
            row = function()
            row.update(kind=kind, took_s=time.monotonic() - begun)
        except icecache.SessionLost:
            raise
        except (icecache.Error, RuntimeError, TypeError, ValueError) as error:
            row = {"method": name, "none": f"FAILED: {type(error).__name__}: {error}".splitlines()[0]}
            self.failed = True
        self.say(f"{name}: {row.get('none') or 'token %.2f ms' % row['token_ms']}")
        self.rows.append(row)

    def run(self):
        known, places = self.known, ["pull", "push"] if self.device.type == "cuda" else ["host"]
        last, graphs = places[-1], self.device.type == "cuda"
        for budget in known.budget:
            for place in places:
                fresh = self.sequence is None or known.tokens <= FRESH_TOKENS
                variant = Variant(budget, place)
                kind = "prompt and decode" if fresh else "decode"
                self.attempt(variant.name(), lambda v=variant, f=fresh: self.run_variant(v, f), kind)
        self.attempt("dense attention, in the device's memory", lambda: self.run_dense(False))
        if self.sequence is None:
            return
        kinds = [dict(), dict(ends=True)] if graphs else [dict(ends=True)]
        kinds += [dict(reuse=True), dict(reuse=True, ends=True)]
        for variant in (Variant(budget, place, graphs, **kind)
                        for kind in kinds for budget in known.budget for place in places):
            self.attempt(variant.name(), lambda v=variant: self.run_variant(v, False))
        if graphs:
            self.attempt("dense attention, in the device's memory, graphs", lambda: self.run_dense(True))
            variant = Variant(known.budget[0], last, True, gpu_queries=True)
            self.attempt(variant.name(), lambda v=variant: self.run_variant(v, False))
        variant = Variant(known.budget[0], last, anchors=3)
        self.attempt(variant.name(), lambda: self.run_variant(variant, True), "prompt and decode")

    # ---- results ----

    def report(self):
        known = self.known
        for row in self.rows:
            if self.prefill is not None and "second_token_s" in row:
                row["second_token_with_prefill_s"] = row["second_token_s"] + self.prefill
        result = {
            "tokens": known.tokens, "steps": known.steps, "shape": dataclasses.asdict(self.shape), "device": self.name(),
            "shards": known.shards, "prefill_s": self.prefill, "rows": self.rows, "published": PAPER,
        }
        if known.out:
            pathlib.Path(known.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{known.tokens} tokens, {self.shape.layers} layers, {self.shape.kv_heads} KV heads, {known.steps} tokens each "
              f"(medians), sinks and window {ENDS}; {self.name()}, {known.shards} shards")
        print_table(self.rows)
        if self.prefill is not None:
            print(f"second token: without the prefill, which takes {self.prefill:.2f} s here (2 layers, scaled to all)")
        print("as published, on its authors' hardware and with a prefill in the second token:")
        print_table(PAPER, head=False)

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def print_table(rows, head=True):
    widths = [max(8, len(first), len(second)) for _, _, first, second in COLUMNS]
    for line in (2, 3) if head else ():
        print(" " * 45 + " ".join(f"{column[line]:>{width}}" for column, width in zip(COLUMNS, widths)))
    for row in rows:
        cells = [
            f"{row[key]:{width}.{digits}f}" if row.get(key) is not None else f"{'-':>{width}}"
            for (key, digits, _, _), width in zip(COLUMNS, widths)
        ]
        print(f"{row['method']:44}", row["none"] if "none" in row else " ".join(cells))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=36000)
    parser.add_argument("--steps", type=int, default=32, help="tokens of each variant that are timed")
    parser.add_argument("--budget", type=lambda text: [int(part) for part in text.split(",")], default=[64, 256])
    parser.add_argument("--seconds", type=float, default=3600, help="begins no variant that would end later")
    parser.add_argument("--shards", type=int, default=max(1, min(64, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--out")
    for field in dataclasses.fields(decoder.Shape):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    return parser.parse_args()


def daemon_options(known, shape):
    """Shares for one sequence of the context and one of the warm-up; the pool is taken at once, the others as needed."""
    tokens = known.tokens + WARM_TOKENS + 64 * known.steps
    pool = int(tokens * shape.token_bytes() * 1.06) + (512 << 20)
    index = tokens * shape.layers * shape.kv_heads * 200 + (512 << 20)
    shared = 2 << 30
    return pool, index, shared


def lacks(known, shape, device):
    """Why it cannot run here, or None."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    needed, free = sum(daemon_options(known, shape)), available_bytes()
    where = [("RAM", needed, free)]
    kv, weights = (known.tokens + known.steps) * shape.token_bytes(), shape.weight_bytes()
    if device.type == "cuda":
        where.append(("GPU memory", kv + weights + (6 << 30), torch.cuda.mem_get_info(device)[0]))
    else:
        where = [("RAM", needed + kv + weights, free)]
    for name, wanted, there in where:
        if wanted > there:
            return f"{known.tokens} tokens need {wanted >> 20} MiB of {name}, {max(there, 0) >> 20} are there"
    return None


def run(known, shape, device):
    bench = Bench(known, shape, device)
    pool, index, shared = daemon_options(known, shape)
    daemon = Daemon(known.daemon, "--pool-bytes", f"{pool >> 20}m", "--index-bytes", f"{index >> 20}m", "--shared-bytes",
                    f"{shared >> 20}m", "--shards", str(known.shards))
    try:
        bench.say("the daemon is ready")
        bench.model = decoder.Decoder(shape, device)
        try:
            bench.prefill = bench.measure_prefill()
        except (RuntimeError, TypeError) as error:
            bench.say(f"no prefill: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        bench.data = Data(shape, known.tokens, known.steps, device)
        decoder.synchronize(device)
        bench.say("weights and data are made")
        with icecache.Client(daemon.sockets, name="decode", deadline_us=120_000_000, staging_bytes=128 << 20) as client:
            bench.client = client
            bench.run()
    finally:
        try:
            bench.report()
        finally:
            clean = daemon.stop()
    return 0 if clean and not bench.failed else 1


def main():
    known = arguments()
    shape = decoder.Shape(**{field.name: getattr(known, field.name) for field in dataclasses.fields(decoder.Shape)})
    device = torch.device(known.device)
    os.environ["ICECACHE_LIBRARY"] = known.library
    reason = lacks(known, shape, device)
    if reason is not None:
        print(f"skipped: {reason}")
        return 77
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what has been measured is printed, and the daemon ends
    with torch.inference_mode():
        return run(known, shape, device)


if __name__ == "__main__":
    sys.exit(main())
