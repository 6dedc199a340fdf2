"""Keys, values and queries of a decode loop: the distribution of `icecache-bench`'s attention data, made by PyTorch on
whatever device it computes on, one layer at a time, the same for the same seed and device.

Keys are Zipf-weighted clusters inside super-clusters under a power-law spectrum, with a few massive mean channels and
log-normal norms; clusters stick for some tokens. The query heads of a KV head share one to three target clusters, half
of the time focused; the next step's queries resemble this one's, as a real model's do.
"""

import torch

MASSIVE = 6  # channels
STEP_STAYS, STEP_KEEPS = 0.25, 0.5  # a step's target stays; share of a head's own direction that stays
CHUNK = 65536  # tokens at a time: float32 takes four times what is kept


class Lane:
    """One KV head's clusters."""

    def __init__(self, tokens, head_dim, generator):
        self.generator, self.device, self.dim = generator, generator.device, head_dim
        self.clusters = max(64, tokens // 40)
        scale = torch.arange(1, head_dim + 1, device=self.device, dtype=torch.float32).rsqrt()
        self.scale = scale / scale.square().mean().sqrt()
        self.rotation = torch.linalg.qr(self.normal(head_dim, head_dim))[0]
        supers = max(8, self.clusters // 20)
        self.centres = 0.72 * self.draw(self.clusters) + 0.68 * self.draw(supers)[self.below(supers, self.clusters)]
        rank = torch.randperm(self.clusters, generator=generator, device=self.device) + 1
        self.weights = rank.float().pow(-0.85)
        self.mean = torch.zeros(head_dim, device=self.device)
        self.bias = torch.zeros(head_dim, device=self.device)
        massive = self.channels()
        self.mean[massive] = self.signs() * (4 + 5 * self.uniform(MASSIVE))
        self.bias[massive] = 2 * self.normal(MASSIVE)
        self.bias[self.channels()] += 3 * self.signs()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniform(self, count):
        return torch.rand(count, generator=self.generator, device=self.device)

    def below(self, most, count):
        return torch.randint(0, most, (count,), generator=self.generator, device=self.device)

    def channels(self):
        return torch.randperm(self.dim, generator=self.generator, device=self.device)[:MASSIVE]

    def signs(self):
        return self.below(2, MASSIVE) * 2.0 - 1

    def draw(self, count):
        return (self.normal(count, self.dim) * self.scale) @ self.rotation

    def choose(self, count):
        return torch.multinomial(self.weights, count, replacement=True, generator=self.generator)

    def keys(self, count, out):
        """Fills out[count, head_dim]."""
        jump = self.uniform(count) < 0.3
        jump[0] = True
        since = torch.where(jump, torch.arange(count, device=self.device), 0).cummax(0).values
        which = self.choose(count)[since]
        spread = (0.3 * self.normal(self.clusters)).exp()
        for first in range(0, count, CHUNK):
            part = which[first : first + CHUNK]
            rows = self.centres[part] + 0.58 * spread[part, None] * self.draw(len(part)) + self.mean
            out[first : first + CHUNK] = rows * (0.12 * self.normal(len(part), 1)).exp()

    def queries(self, steps, group):
        """[step, query head, head_dim]"""
        gains = torch.where(self.uniform(steps) < 0.5, 1.45, 0.45)
        chosen = self.centres[self.choose(3 * steps)].view(steps, 3, self.dim)
        count = self.below(3, steps) + 1
        taken = torch.arange(3, device=self.device) < count[:, None]
        targets = (chosen * taken[..., None]).sum(1) / count[:, None]
        fresh = self.uniform(steps) >= STEP_STAYS
        fresh[0] = True
        since = torch.where(fresh, torch.arange(steps, device=self.device), 0).cummax(0).values
        pushed = gains[since, None] * (0.2 * self.normal(steps, group)).exp()
        own = self.draw(steps * group).view(steps, group, self.dim) * 0.55 + 0.35 * self.normal(steps, group, self.dim)
        for step in range(1, steps):
            own[step] = STEP_KEEPS * own[step - 1] + (1 - STEP_KEEPS**2) ** 0.5 * own[step]
        return self.bias + pushed[..., None] * targets[since, None] + own


def make_layer(shape, tokens, steps, layer, device, seed):
    """(keys, values [token, KV head, head_dim] of tokens + steps, queries [step, query head, head_dim]), bfloat16."""
    group = shape.query_heads // shape.kv_heads
    generator = torch.Generator(device)
    keys = torch.empty(tokens + steps, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    values = torch.empty_like(keys)
    queries = torch.empty(steps, shape.kv_heads, group, shape.head_dim, dtype=torch.bfloat16, device=device)
    for head in range(shape.kv_heads):
        generator.manual_seed(seed * 1000003 + layer * shape.kv_heads + head)
        lane = Lane(tokens, shape.head_dim, generator)
        lane.keys(tokens + steps, keys[:, head])
        queries[:, head] = lane.queries(steps, group)
        for first in range(0, tokens + steps, CHUNK):
            part = values[first : first + CHUNK, head]
            part.copy_(lane.normal(len(part), shape.head_dim))
    return keys, values, queries.view(steps, shape.query_heads, shape.head_dim)
