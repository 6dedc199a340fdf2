"""A Llama-shaped decoder with random weights, as much of it as a step's time is made of: normalisation, projections, MLP
and attention of each layer; no vocabulary. What its attention asks for and stores is given data, because random weights
give queries that find nothing: the projections are computed and thrown away.
"""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 32
    kv_heads: int = 8
    query_heads: int = 32
    head_dim: int = 128
    hidden: int = 4096
    mlp: int = 14336

    @property
    def query_elements(self):
        return self.query_heads * self.head_dim

    @property
    def kv_elements(self):
        return self.kv_heads * self.head_dim

    def token_bytes(self):
        """K and V of a token in all layers."""
        return 4 * self.layers * self.kv_elements

    def weight_bytes(self):
        projections = (2 * self.query_elements + 2 * self.kv_elements) * self.hidden
        return 2 * self.layers * (projections + 3 * self.hidden * self.mlp)


class Decoder:
    """head(layer), then attention elsewhere, then tail(layer, attended); `hidden` runs through all of them."""

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.hidden = torch.zeros(1, shape.hidden, dtype=torch.bfloat16, device=device)
        sizes = dict(
            qkv=(shape.query_elements + 2 * shape.kv_elements, shape.hidden),
            out=(shape.hidden, shape.query_elements),
            gate_up=(2 * shape.mlp, shape.hidden),
            down=(shape.hidden, shape.mlp),
        )
        torch.manual_seed(11)
        self.weights = [{name: self._weight(*size) for name, size in sizes.items()} for _ in range(shape.layers)]

    def _weight(self, rows, columns):
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=self.device).mul_(columns**-0.5)

    def begin(self):
        """A token's embedding."""
        self.hidden.normal_()

    def norm(self, x):
        return F.rms_norm(x, (self.shape.hidden,))

    def head(self, layer):
        """What the layer would ask for and store."""
        return F.linear(self.norm(self.hidden), self.weights[layer]["qkv"])

    def mlp(self, x, layer):
        gate, up = F.linear(self.norm(x), self.weights[layer]["gate_up"]).chunk(2, -1)
        return F.linear(F.silu(gate).mul_(up), self.weights[layer]["down"])

    def tail(self, layer, attended):
        """attended: [1, query heads x head_dim]"""
        self.hidden.add_(F.linear(attended, self.weights[layer]["out"]))
        self.hidden.add_(self.mlp(self.hidden, layer))

    def prefill(self, x, layer):
        """One layer over all tokens of a prompt, x [token, hidden], in place."""
        shape, tokens = self.shape, len(x)
        qkv = F.linear(self.norm(x), self.weights[layer]["qkv"])
        q, k, v = qkv.split((shape.query_elements, shape.kv_elements, shape.kv_elements), -1)
        q, k, v = (side.view(1, tokens, -1, shape.head_dim).transpose(1, 2) for side in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        del qkv, q, k, v
        x += F.linear(attended.transpose(1, 2).reshape(tokens, -1), self.weights[layer]["out"])
        del attended
        for first in range(0, tokens, 8192):
            x[first : first + 8192] += self.mlp(x[first : first + 8192], layer)


# ---- attention of one token: q [KV head, group, head_dim], k and v [KV head, token, head_dim] ----


def attend_sdpa(q, k, v, mask=None):
    mask = None if mask is None else mask[None]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def attend_split(q, k, v):
    """One pass over K and one over V."""
    scores = torch.matmul(q, k.transpose(1, 2)).float().mul_(q.shape[-1] ** -0.5)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


# ---- one part of a step, as it is or recorded once as a CUDA graph ----


class Parts:
    """Runs functions by name; with `graphs` each is recorded at its first run and replayed from then on."""

    def __init__(self, graphs):
        self.graphs, self.pool, self.recorded = graphs, None, {}

    def run(self, name, function):
        if not self.graphs:
            function()
            return
        if name not in self.recorded:
            self.recorded[name] = self._record(function)
        self.recorded[name].replay()

    def _record(self, function):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # libraries allocate at their first use, which must not be recorded
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        self.pool = self.pool or graph.pool()
        return graph


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def wait_issued(device):
    """Until what was issued to the current stream has been carried out."""
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
