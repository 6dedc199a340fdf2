"""PyTorch's memory as landings of icecache, on a real GPU: checks bit for bit, and what a retrieve costs.

    torch_landing.py --library PATH --daemon PATH [--tokens N] [--steps N] [--out FILE]

Run it once as it is and once with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: the allocator's memory is then mapped
in pieces. Exit status 0, 1 a check failed, 77 there is no PyTorch with a GPU.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

from service import Daemon, gpu_bytes, icecache

try:
    import torch
except ImportError:
    print("skipped: there is no PyTorch")
    sys.exit(77)

# Llama-3.1-8B's heads, fewer layers: a retrieve is one layer's.
LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM = 4, 8, 32, 128
BUDGETS = (64, 256)
ROUNDS = 8  # all landings in turn, so that what drifts is the same for each


def shape_of(budget):
    """With as many slots as a retrieve of this budget fills."""
    slots = icecache.DEFAULT_SINKS + icecache.DEFAULT_WINDOW + budget
    return dict(rows=2, layers=LAYERS, kv_heads=KV_HEADS, slots=slots, head_dim=HEAD_DIM, dtype="bf16")


def start_daemon(path, tokens):
    pool = (tokens * LAYERS * KV_HEADS * HEAD_DIM * 4 * 3 // 2 >> 20) + 1024
    return Daemon(path, "--pool-bytes", f"{pool}m", "--index-bytes", "4g", "--shards", "8")


def make_history(tokens):
    """K in clusters and V at random, [layer, token, KV head, head_dim] as int16 patterns of bf16."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(KV_HEADS, 64, HEAD_DIM, generator=generator) * 2
    which = torch.randint(0, 64, (LAYERS, tokens, KV_HEADS), generator=generator)
    keys = torch.randn(LAYERS, tokens, KV_HEADS, HEAD_DIM, generator=generator)
    for head in range(KV_HEADS):
        keys[:, :, head] += centres[head][which[:, :, head]]
    values = torch.randn(LAYERS, tokens, KV_HEADS, HEAD_DIM, generator=generator)
    return keys.to(torch.bfloat16), values.to(torch.bfloat16), centres


def bits(tensor):
    return tensor.view(torch.int16).numpy()


def bits_of(tensor):
    return tensor.view(torch.int16)


class Worker:
    def __init__(self, folder, tokens):
        self.tokens = tokens
        self.keys, self.values, centres = make_history(tokens)
        self.client = icecache.Client(folder, name="torch", deadline_us=60_000_000)
        self.sequence = self.open_sequence()
        for first in range(0, tokens, 4096):
            until = min(first + 4096, tokens)
            self.sequence.append(bits(self.keys[:, first:until].contiguous()), bits(self.values[:, first:until].contiguous()), first)
        while not self.sequence.info().idle:
            time.sleep(0.02)
        generator = torch.Generator().manual_seed(6)
        picked = torch.randint(0, 64, (256, KV_HEADS), generator=generator)
        near = torch.stack([centres[head][picked[:, head]] for head in range(KV_HEADS)], 1)
        noise = torch.randn(256, KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM, generator=generator)
        queries = (near.unsqueeze(2) + noise).reshape(256, QUERY_HEADS, HEAD_DIM).to(torch.bfloat16)
        self.queries = [bits(query.contiguous()) for query in queries]
        self.gpu_queries = queries.cuda()

    def open_sequence(self):
        return self.client.open_sequence(
            model_digest=b"torch", layers=LAYERS, kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=HEAD_DIM, dtype="bf16"
        )

    def retrieve(self, landing, layer, number, budget, row=0, gpu_queries=False):
        more = dict(stream=torch.cuda.current_stream().cuda_stream) if gpu_queries else {}
        return self.client.retrieve(
            landing,
            layer=layer,
            sequences=[self.sequence],
            rows=[row],
            first_queries=[self.tokens - 1],
            queries=(self.gpu_queries if gpu_queries else self.queries)[number % 256],
            query_dtype="bf16",
            budget=budget,
            **more,
        )


def check_cells(worker, landing, layer, counts, row=0):
    """The landing's slots are the appended rows, bit for bit, read by the GPU at once after the retrieve."""
    data = torch.as_tensor(landing.data, device="cuda")[row, layer]
    positions = torch.as_tensor(landing.positions, device="cuda")[row, layer]
    on_gpu = torch.as_tensor(landing.counts, device="cuda")[row, layer]
    data, positions, on_gpu = (tensor.clone() for tensor in (data, positions, on_gpu))
    if on_gpu.tolist() != list(counts):
        sys.exit(f"counts on the GPU: {on_gpu.tolist()}, in the reply: {counts}")
    for head, count in enumerate(counts):
        where = positions[head, :count].cpu().long()
        for side, appended in ((0, worker.keys), (1, worker.values)):
            wanted = appended[layer, where, head].view(torch.int16)
            if not torch.equal(data[head, side, :count].cpu(), wanted):
                sys.exit(f"layer {layer}, head {head}: the GPU does not hold what was appended")


def percentile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


def append_rates(worker):
    """GB/s of K and V appended to fresh sequences from host and from GPU memory, in turn; what is stored is compared."""
    tokens = min(worker.tokens, 8192)
    keys, values = worker.keys[:, :tokens].contiguous(), worker.values[:, :tokens].contiguous()
    on_gpu = [side.cuda() for side in (keys, values)]
    nbytes = 2 * keys.numel() * keys.element_size()
    stream = torch.cuda.current_stream().cuda_stream
    rates = {"host": [], "gpu": []}
    for _ in range(3):
        for where, found in rates.items():
            with worker.open_sequence() as sequence:
                begun = time.perf_counter()
                if where == "gpu":
                    sequence.append_gpu(*on_gpu, first=0, stream=stream)
                else:
                    sequence.append(bits(keys), bits(values), first=0)
                found.append(nbytes / (time.perf_counter() - begun) / 1e9)
                stored = [torch.empty_like(keys) for _ in range(2)]
                sequence.read_into(bits(stored[0]), bits(stored[1]), first=0)
                if not torch.equal(bits_of(stored[0]), bits_of(keys)) or not torch.equal(bits_of(stored[1]), bits_of(values)):
                    sys.exit(f"what was appended from {where} memory is not what is stored")
    return {where: statistics.median(found) for where, found in rates.items()}


class Kind:
    """One kind of landing at one budget, and what its retrieves took."""

    def __init__(self, worker, name, budget, options, gpu_queries=False):
        self.worker, self.name, self.budget, self.gpu_queries = worker, name, budget, gpu_queries
        self.landing = worker.client.open_landing(**shape_of(budget), **options)
        self.walls, self.searches, self.copies = [], [], []

    def check(self):
        for number in range(32):
            layer, row = number % LAYERS, number // LAYERS % 2
            found = self.worker.retrieve(self.landing, layer, number, self.budget, row, self.gpu_queries)
            if isinstance(self.landing, icecache.GpuLanding):
                check_cells(self.worker, self.landing, layer, found.counts, row)

    def measure(self, steps):
        for number in range(steps):
            begun = time.perf_counter_ns()
            found = self.worker.retrieve(self.landing, number % LAYERS, number, self.budget, 0, self.gpu_queries)
            self.walls.append((time.perf_counter_ns() - begun) / 1000)
            self.searches.append(found.search_us)
            self.copies.append(found.copy_us)

    def row(self):
        return {
            "landing": self.name,
            "budget": self.budget,
            "p50_us": statistics.median(self.walls),
            "p99_us": percentile(self.walls, 0.99),
            "search_p50_us": statistics.median(self.searches),
            "copy_p50_us": statistics.median(self.copies),
        }


def open_kinds(worker, expandable):
    """In an order that begins with pull, so that what the daemon takes of the GPU for push is seen."""
    kinds = []
    for budget in BUDGETS:
        nbytes = icecache.landing_bytes(**shape_of(budget))
        for name in ("host", "pull", "push"):
            options = {}
            if name != "host":
                # Not at the beginning of what the allocator took from the driver, as in a real program.
                worker.others.append(torch.empty(3 << 20, dtype=torch.uint8, device="cuda"))
                options = dict(gpu=torch.empty(nbytes, dtype=torch.uint8, device="cuda"), mode=name)
            kinds.append((name, budget, options))
            if name != "host" and not expandable:
                kinds.append((name + ", own memory", budget, dict(gpu=0, mode=name)))
    return [Kind(worker, *kind) for kind in sorted(kinds, key=lambda kind: kind[0].startswith("push"))]


def open_gpu_query_kinds(worker):
    """The queries are where a model leaves them: what the others leave out is bringing them to the host."""
    return [Kind(worker, mode + ", GPU queries", budget, dict(gpu=0, mode=mode), True)
            for budget in BUDGETS for mode in ("pull", "push")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--tokens", type=int, default=36000)
    parser.add_argument("--steps", type=int, default=800, help="retrieves of each kind that are timed")
    parser.add_argument("--out")
    known = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU")
        return 77
    os.environ["ICECACHE_LIBRARY"] = known.library
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    daemon = start_daemon(known.daemon, known.tokens)
    try:
        worker = Worker(daemon.sockets, known.tokens)
        worker.others = []
        memory = {"before": gpu_bytes(daemon.process.pid)}
        kinds = open_kinds(worker, expandable)
        kinds += open_gpu_query_kinds(worker)
        memory["with push"] = gpu_bytes(daemon.process.pid)
        for kind in kinds:
            kind.check()
        for _ in range(ROUNDS):
            for kind in kinds:
                kind.measure(known.steps // ROUNDS)
        rows = [kind.row() for kind in kinds]
        for kind in kinds:
            kind.check()
            kind.landing.close()
        rates = append_rates(worker)
        worker.client.close()
    finally:
        clean = daemon.stop()
    segments = "expandable segments" if expandable else "cudaMalloc"
    if known.out:
        result = {"segments": segments, "tokens": known.tokens, "daemon_gpu_bytes": memory, "append_gb_per_s": rates, "rows": rows}
        pathlib.Path(known.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{segments}, {known.tokens} tokens; one layer, {KV_HEADS} KV heads; microseconds, {known.steps} retrieves each")
    print(f"{'landing':18} {'budget':>6} {'p50':>6} {'p99':>6} {'search':>7} {'copy':>6}")
    for row in rows:
        figures = [row[key] for key in ("p50_us", "p99_us", "search_p50_us", "copy_p50_us")]
        print(f"{row['landing']:18} {row['budget']:6} {figures[0]:6.0f} {figures[1]:6.0f} {figures[2]:7.0f} {figures[3]:6.0f}")
    print("appends, GB/s of K and V:", *(f"from {where} memory {rate:.2f}" for where, rate in rates.items()))
    print("the daemon's GPU memory, MiB:", *(f"{name} {'?' if found is None else found >> 20}" for name, found in memory.items()))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
