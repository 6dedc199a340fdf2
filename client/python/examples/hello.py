#!/usr/bin/env python3
"""The smallest useful worker: append random K and V, retrieve for one layer, print the positions that came."""

import array
import random
import sys

import icecache

LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM, TOKENS = 2, 2, 4, 64, 1024


def numbers(generator, count):
    return array.array("f", (generator.uniform(-1, 1) for _ in range(count)))


def main():
    generator = random.Random(1)
    with icecache.Client(sys.argv[1] if len(sys.argv) > 1 else None, name="hello.py") as client:
        landing = client.open_landing(rows=1, layers=LAYERS, kv_heads=KV_HEADS, slots=44, head_dim=HEAD_DIM, dtype="fp32")
        sequence = client.open_sequence(
            model_digest=b"hello",
            layers=LAYERS,
            kv_heads=KV_HEADS,
            query_heads=QUERY_HEADS,
            head_dim=HEAD_DIM,
            dtype="fp32",
        )
        count = LAYERS * TOKENS * KV_HEADS * HEAD_DIM
        length = sequence.append(numbers(generator, count), numbers(generator, count), first=0)
        print(f"{length} tokens in {LAYERS} layers")
        found = client.retrieve(
            landing,
            layer=1,
            sequences=[sequence],
            rows=[0],
            first_queries=[length - 1],
            queries=numbers(generator, QUERY_HEADS * HEAD_DIM),
            query_dtype="fp32",
            budget=32,
            sinks=4,
            window=8,
        )
        for head in range(KV_HEADS):
            view = landing.view(row=0, layer=1, kv_head=head)
            print(f"KV head {head}: {view.count} tokens, estimated mass {found.masses[head]:.3f}, positions", *view.positions)
            del view


if __name__ == "__main__":
    main()
