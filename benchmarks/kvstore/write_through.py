"""Time that write-through adds to a decode step of the real engine, in one run.

A batch of streams decodes; write-through is switched on and off every few steps, in the order on,
off, off, on, so that both see the same contexts. Before each stretch a few steps are run that do
not count, in which the copies catch up: what is timed is the steady state, as many blocks written
as filled. The same is done with write-through never on: what comes of that is the method's error.

Run: python benchmarks/kvstore/write_through.py [--model DIR] [--streams N] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median
from typing import Any

from node import Node, machine, write

from tokenflow.cluster.config import embedded_model
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.factory import build_engine, cpu_threads, inspect_model
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams

STRETCH = 16
"""Timed steps between two switches: every stream fills one block in that time."""
CATCH_UP = 4
"""Steps before them."""


def measure(model: str, streams: int, tokens: int, seed: int, *, null: bool) -> dict[str, Any]:
    config = EngineConfig(
        kv_tokens=streams * (tokens + 256), max_num_seqs=streams, max_batch_tokens=4096
    )
    spec = inspect_model(model, config, "cpu")
    slot_bytes = spec.kv_layout(config.block_size).block_bytes
    blocks = streams * (tokens + 256) // config.block_size
    steps: dict[bool, list[float]] = {True: [], False: []}
    rng = random.Random(seed)
    with Node(2 * blocks, slot_bytes) as node:
        host, memory = node.attach("bench")
        engine = build_engine(model, config, host, host_memory=memory, num_blocks=blocks)
        for i in range(streams):
            # Lengths differ, so that blocks do not fill all in one step.
            prompt = tuple(rng.randrange(spec.vocab_size) for _ in range(64 + rng.randrange(64)))
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            engine.add(Request(f"{i}", prompt, params, 1000.0, arrival_s=time.monotonic()))
        while engine.stats.generated_tokens < streams:
            engine.step()
        stretches = tokens // (STRETCH + CATCH_UP) - 2
        for stretch in range(stretches // 4 * 4):
            on = stretch % 4 in (0, 3)
            engine.policy.write_through = on and not null
            for _ in range(CATCH_UP):
                engine.step()
            for _ in range(STRETCH):
                begun = time.perf_counter()
                engine.step()
                steps[on].append(time.perf_counter() - begun)
        written = engine.stats.written_through_bytes
        engine.executor.close()
        del memory, engine
    on, off = median(steps[True]), median(steps[False])
    return {
        "streams": streams,
        "never on": null,
        "steps of each kind": len(steps[True]),
        "threads": cpu_threads(config, 1),
        "median step with, ms": on * 1e3,
        "median step without, ms": off * 1e3,
        "added": on / off - 1,
        "MiB written": written / 2**20,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--streams", default="8,32")
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    runs = []
    for streams in map(int, args.streams.split(",")):
        for seed in range(1, args.repeats + 1):
            for null in (False, True):
                run = measure(args.model, streams, args.tokens, seed, null=null)
                runs.append(run)
                print(
                    f"{streams:3} streams: {run['median step without, ms']:.2f} ms a step, "
                    f"{run['median step with, ms']:.2f} "
                    f"{'in the same, never on' if null else 'with write-through'}: "
                    f"{run['added']:+.1%}",
                    flush=True,
                )
    write(args.json, {**machine(), "runs": runs})


if __name__ == "__main__":
    main()
