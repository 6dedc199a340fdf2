"""One decode step through icecache: what an engine does at each layer, and what it costs.

Of a layer nothing but the attention over sinks and window can run before the selection is there, so that is what
overlaps with a retrieve, where the worker holds those ends itself; the submit comes as soon as the queries are on the
host. The step's K and V ride along with the queries.
"""

import time

import decoder
import torch
from service import icecache

RETRIEVE_US = 30_000_000  # no selection is cut short
SINKS, WINDOW = icecache.DEFAULT_SINKS, icecache.DEFAULT_WINDOW
ENDS = SINKS + WINDOW


class Slots:
    """A landing as tensors on the computing device: keys and values [layer, KV head, slot, head_dim], counts and
    positions."""

    def __init__(self, client, shape, slots, place, device):
        options = dict(rows=1, layers=shape.layers, kv_heads=shape.kv_heads, slots=slots, head_dim=shape.head_dim, dtype="bf16")
        self.place = place
        if place == "host":
            self.landing = client.open_landing(**options)
            cells = (shape.layers, shape.kv_heads)
            self.keys = torch.zeros(*cells, slots, shape.head_dim, dtype=torch.bfloat16, device=device)
            self.values = torch.zeros_like(self.keys)
            self.positions = torch.zeros(*cells, slots, dtype=torch.int32, device=device)
            self.counts = torch.zeros(*cells, dtype=torch.int32, device=device)
            return
        memory = torch.empty(icecache.landing_bytes(**options), dtype=torch.uint8, device=device)
        self.landing = client.open_landing(**options, gpu=memory, mode=place)
        data = torch.as_tensor(self.landing.data, device=device)[0].view(torch.bfloat16)
        if data.data_ptr() != self.landing.address:
            raise RuntimeError("PyTorch has copied the landing instead of looking at it")
        self.keys, self.values = data[:, :, 0], data[:, :, 1]
        self.positions = torch.as_tensor(self.landing.positions, device=device)[0]
        self.counts = torch.as_tensor(self.landing.counts, device=device)[0]

    def refresh(self, layer):
        """Of a landing in host memory: its cells go to the tensors."""
        if self.place != "host":
            return
        for head in range(self.keys.shape[1]):
            view = self.landing.view(0, layer, head)
            for tensor, rows, dtype in (
                (self.keys, view.keys, torch.bfloat16),
                (self.values, view.values, torch.bfloat16),
                (self.positions, view.positions, torch.int32),
            ):
                if view.count > 0:
                    copied = torch.frombuffer(bytearray(rows), dtype=dtype)
                    tensor[layer, head, : view.count] = copied.view(tensor[layer, head, : view.count].shape)
            self.counts[layer, head] = view.count

    def mask(self, layer):
        """[KV head, 1, slot]: what a retrieve has filled."""
        slot = torch.arange(self.keys.shape[2], device=self.keys.device)
        return (slot < self.counts[layer, :, None])[:, None]

    def close(self):
        self.keys = self.values = self.positions = self.counts = None
        self.landing.close()


class Figures:
    """What steps took, one entry each."""

    NAMES = ("step_ms", "retrieve_ms", "queue_ms", "search_ms", "copy_ms", "bytes", "mass", "turnover")

    def __init__(self):
        self.steps = []

    def begin(self):
        self.steps.append(dict.fromkeys(self.NAMES, 0.0))

    def add(self, found, seconds):
        last = self.steps[-1]
        last["retrieve_ms"] += 1000 * seconds
        for phase in ("queue", "search", "copy"):
            last[phase + "_ms"] += getattr(found, phase + "_us") / 1000
        last["bytes"] += found.bytes_moved
        last["mass"] += sum(found.masses) / len(found.masses)
        if hasattr(found, "changed"):  # tokens that were not in the landing
            last["turnover"] += sum(found.changed) / sum(found.counts)


class Stepper:
    """Decode steps of one variant: `model`, its attention data, a landing, and a sequence that is set by bind()."""

    def __init__(self, model, data, client, variant):
        self.model, self.data, self.client, self.variant = model, data, client, variant
        self.shape, self.device = model.shape, model.device
        self.parts = decoder.Parts(variant.graphs)
        slots = variant.budget + (0 if variant.ends else ENDS)
        self.slots = Slots(client, self.shape, slots, variant.place, self.device)
        width = self.shape.query_elements + 2 * self.shape.kv_elements
        self.current = torch.zeros(self.shape.layers, width, dtype=torch.bfloat16, device=self.device)
        self.sent = torch.zeros(self.shape.layers, width, dtype=torch.bfloat16, pin_memory=self.device.type == "cuda")
        bounds = (self.shape.query_elements, self.shape.kv_elements, self.shape.kv_elements)
        self.sent_sides = [row.split(bounds) for row in self.sent.view(torch.int16)]
        self.current_sides = [row.split(bounds) for row in self.current]
        if variant.ends:
            cells = (self.shape.layers, self.shape.kv_heads, ENDS, self.shape.head_dim)
            self.end_keys = torch.zeros(cells, dtype=torch.bfloat16, device=self.device)
            self.end_values = torch.zeros_like(self.end_keys)
            self.end_slot = torch.zeros(1, dtype=torch.int64, device=self.device)
            group = self.shape.query_heads // self.shape.kv_heads
            self.end_scores = torch.zeros(self.shape.kv_heads, group, ENDS, device=self.device)

    def bind(self, sequence, prompt, steps=0):
        """Goes on with this sequence, which has the prompt's tokens, at least those of the ends, and so many steps'."""
        self.sequence, self.prompt, self.number = sequence, prompt, steps
        if not self.variant.ends:
            return
        sinks = torch.arange(SINKS)
        window = torch.arange(prompt + steps - WINDOW, prompt + steps)
        slots = torch.cat((sinks, SINKS + window % WINDOW)).to(self.device)
        rows = self.data_rows(torch.cat((sinks, window)))
        for layer in range(self.shape.layers):
            for ends, side in ((self.end_keys, self.data.keys), (self.end_values, self.data.values)):
                ends[layer][:, slots] = side[layer][rows].transpose(0, 1)

    def data_rows(self, positions):
        """Where the data has what was appended there; the steps' rows come again and again."""
        steps = self.data.tokens + (positions - self.prompt) % len(self.data.steps)
        return torch.where(positions < self.prompt, positions, steps).to(self.device)

    # ---- parts of a step ----

    def heads(self, side, layer):
        return self.current_sides[layer][side].view(self.shape.kv_heads, -1, self.shape.head_dim)

    def head(self, layer):
        self.model.head(layer)
        if not self.variant.gpu_queries:
            self.sent[layer].copy_(self.current[layer], non_blocking=True)

    def attend_ends(self, layer):
        q, k, v = (self.heads(side, layer) for side in range(3))
        self.end_keys[layer].index_copy_(1, self.end_slot, k)
        self.end_values[layer].index_copy_(1, self.end_slot, v)
        self.end_scores.copy_(torch.matmul(q, self.end_keys[layer].transpose(1, 2)))

    def attend(self, layer):
        q, slots = self.heads(0, layer), self.slots
        mask = slots.mask(layer)
        if not self.variant.ends:
            return decoder.attend_sdpa(q, slots.keys[layer], slots.values[layer], mask)
        scores = torch.matmul(q, slots.keys[layer].transpose(1, 2)).float().masked_fill_(~mask, float("-inf"))
        shares = (torch.cat((self.end_scores, scores), -1) * self.shape.head_dim**-0.5).softmax(-1).to(q.dtype)
        attended = torch.matmul(shares[..., :ENDS], self.end_values[layer])
        return attended + torch.matmul(shares[..., ENDS:], slots.values[layer])

    def tail(self, layer):
        self.model.tail(layer, self.attend(layer).reshape(1, -1))
        if layer + 1 < self.shape.layers:
            self.head(layer + 1)

    # ---- a step ----

    def submit(self, layer):
        more, sides = dict(resend=not self.variant.reuse), self.sent_sides[layer]
        if self.variant.gpu_queries:
            sides = self.current_sides[layer]
            more["stream"] = torch.cuda.current_stream().cuda_stream
        else:
            decoder.wait_issued(self.device)  # the queries are on the host then
            sides = [side.numpy() for side in sides]
        begun = time.perf_counter()
        return begun, self.client.submit(
            self.slots.landing,
            layer=layer,
            sequences=[self.sequence],
            rows=[0],
            first_queries=[self.prompt + self.number],
            queries=sides[0],
            query_dtype="bf16",
            keys=sides[1],
            values=sides[2],
            budget=self.variant.budget,
            sinks=SINKS,
            window=WINDOW,
            worker_holds_ends=self.variant.ends,
            deadline_us=RETRIEVE_US,
            **more,
        )

    def step(self, figures):
        figures.begin()
        begun = time.perf_counter()
        position, previous = self.prompt + self.number, None
        self.current.copy_(self.data.steps[self.number % len(self.data.steps)])
        if self.variant.ends:
            self.end_slot.fill_(SINKS + position % WINDOW)
        self.model.begin()
        self.parts.run("head", lambda: self.head(0))
        for layer in range(self.shape.layers):
            submitted, ticket = self.submit(layer)
            if previous is not None:
                figures.add(*previous)
            if self.variant.ends:
                self.parts.run(f"ends {layer}", lambda at=layer: self.attend_ends(at))
            found = ticket.wait(RETRIEVE_US)
            previous = found, time.perf_counter() - submitted
            ticket.close()
            self.slots.refresh(layer)
            self.parts.run(f"tail {layer}", lambda at=layer: self.tail(at))
        figures.add(*previous)
        decoder.synchronize(self.device)
        figures.steps[-1]["step_ms"] = 1000 * (time.perf_counter() - begun)
        self.number += 1

    # ---- checks ----

    def wrong_rows(self):
        """Of the first and the last layer, after a step: rows that are not what was appended at their positions, and
        heads without as many as there should be."""
        wrong = 0
        for layer in {0, self.shape.layers - 1}:
            for head, count in enumerate(self.slots.counts[layer].tolist()):
                positions = self.slots.positions[layer, head, :count].cpu().long()
                ends = ENDS if self.variant.ends else 0
                wrong += count != min(self.slots.keys.shape[2], self.prompt + self.number - ends)
                at = self.data_rows(positions)
                for found, appended in ((self.slots.keys, self.data.keys), (self.slots.values, self.data.values)):
                    rows = found[layer, head, :count].reshape(count, -1).view(torch.int16)
                    wanted = appended[layer][at, head].view(torch.int16)
                    wrong += int((rows != wanted).any(-1).sum())
        return wrong

    def output_errors(self):
        """Of the last layer's attention in the last step, over the length of the output: against the same tokens in
        float32, and against all tokens."""
        layer = self.shape.layers - 1
        q, length = self.heads(0, layer).float(), self.prompt + self.number
        found = self.attend(layer).float()
        rows = self.data_rows(torch.arange(length))
        keys, values = (side[layer][rows].transpose(0, 1) for side in (self.data.keys, self.data.values))
        attended = torch.zeros(self.shape.kv_heads, 1, length, dtype=torch.bool, device=self.device)
        if self.variant.ends:
            attended[..., :SINKS] = attended[..., length - WINDOW :] = True
        for head, count in enumerate(self.slots.counts[layer].tolist()):
            attended[head, 0, self.slots.positions[layer, head, :count].long()] = True
        scores = torch.matmul(q, keys.float().transpose(1, 2)) * self.shape.head_dim**-0.5

        def error(scores):
            wanted = torch.matmul(scores.softmax(-1), values.float())
            return float((found - wanted).norm() / wanted.norm())

        return error(scores.masked_fill(~attended, float("-inf"))), error(scores)

    def close(self):
        self.parts = None
        decoder.synchronize(self.device)
        self.slots.close()
