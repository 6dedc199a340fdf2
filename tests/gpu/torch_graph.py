"""A CUDA graph over a landing, on a real GPU: captured once, replayed behind each selection, compared with eager results.

    torch_graph.py --library PATH --daemon PATH [--tokens N] [--steps N]

Queries come from the GPU, the stream waits for the selection, the graph is launched behind it; the CPU looks at nothing
before the end of a step. Exit status 0, 1 a check failed, 77 there is no PyTorch with a GPU.
"""

import argparse
import os
import sys

import torch_landing  # exits with 77 where there is no PyTorch
from torch_landing import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, torch

import icecache

BUDGET = 64


def attend(data, counts, query):
    """Attention of one row and layer over the slots that are filled: what a kernel of an engine reads, with its shapes."""
    keys, values = data[:, 0].float(), data[:, 1].float()  # [KV head, slot, head_dim]
    grouped = query.float().view(KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM)
    scores = grouped @ keys.transpose(1, 2) / HEAD_DIM**0.5
    filled = torch.arange(keys.shape[1], device="cuda")[None, None, :] < counts[:, None, None]
    weights = torch.softmax(scores.masked_fill(~filled, float("-inf")), dim=-1)
    return weights @ torch.where(filled.transpose(1, 2), values, 0.0)  # empty slots may hold anything


class Graph:
    """attend() of one (row, layer) of a landing, captured once."""

    def __init__(self, landing, row, layer):
        self.data = torch.as_tensor(landing.data, device="cuda").view(torch.bfloat16)[row, layer]
        self.counts = torch.as_tensor(landing.counts, device="cuda")[row, layer]
        self.query = torch.zeros(QUERY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up, as torch.cuda.graph wants it
            for _ in range(3):
                attend(self.data, self.counts, self.query)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = attend(self.data, self.counts, self.query)

    def launch(self, query):
        self.query.copy_(query)
        self.graph.replay()


def submit(worker, landing, layer, query, stream):
    return worker.client.submit(
        landing,
        layer=layer,
        sequences=[worker.sequence],
        rows=[0],
        first_queries=[worker.tokens - 1],
        queries=query,
        query_dtype="bf16",
        budget=BUDGET,
        stream=stream.cuda_stream,
    )


def check_mode(worker, mode, steps):
    landing = worker.client.open_landing(**torch_landing.shape_of(BUDGET), gpu=0, mode=mode)
    graphs = [Graph(landing, 0, layer) for layer in range(LAYERS)]
    queries = [torch.from_numpy(query).view(torch.bfloat16).cuda() for query in worker.queries[:32]]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for step in range(steps):
            layer, query = step % LAYERS, queries[step % len(queries)]
            with submit(worker, landing, layer, query, stream) as ticket:
                ticket.stream_wait(stream.cuda_stream)
                graphs[layer].launch(query)
                found = ticket.wait()
            replayed = graphs[layer].result.clone()
            torch_landing.check_cells(worker, landing, layer, found.counts)
            eager = attend(graphs[layer].data, graphs[layer].counts, query)
            if not torch.allclose(replayed, eager, rtol=1e-4, atol=1e-5) or not bool(torch.isfinite(eager).all()):
                sys.exit(f"{mode}, step {step}: the graph's result is not the eager one")
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            with submit(worker, landing, 0, queries[0], torch.cuda.current_stream()):
                pass
        sys.exit("a submit within a capture was not refused")
    except icecache.Error as error:
        if error.status != icecache.Status.NOT_SUPPORTED:
            raise
    torch.cuda.synchronize()
    del graphs
    landing.close()
    print(f"{mode}: {steps} replays are the eager results")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=200)
    known = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU")
        return 77
    os.environ["ICECACHE_LIBRARY"] = known.library
    daemon = torch_landing.start_daemon(known.daemon, known.tokens)
    try:
        worker = torch_landing.Worker(daemon.sockets, known.tokens)
        for mode in ("push", "pull"):
            check_mode(worker, mode, known.steps)
        worker.client.close()
    finally:
        clean = daemon.stop()
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
