"""The decode step against the memory bound: all weights and all KV read once per step.

Wall time of a whole step, from a packed batch to sampled tokens on the host, at batches of 1 to 256
and 1,024 tokens of context each, for every attention backend and with and without CUDA graphs where
this build and machine have them; one by one and, "ahead", with the next step launched while one
runs. Asked: at least 0.75 of the bound.
"""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

from common import Run, decoding, later, memory_gb_s, parser, weights_read

from tokenflow.replicas.executor.base import ScheduledSequence

BACKENDS = ("triton", "flash_attn", "sdpa")
ASKED = 0.75
_STEPS = 32
_WARM_UP = 4
UNKNOWN = -1
"""In place of a token that only the device knows yet."""


def step_s(run: Run, settings: list[str], batches: list[int], context: int) -> dict[str, Any]:
    """Median seconds of a step and the bytes it must read, by batch and way of running."""
    saved, run.args.set = run.args.set, [*run.args.set, *settings]
    try:
        config = run.config(max_num_seqs=max(batches))
    finally:
        run.args.set = saved
    steps = 2 if run.args.tiny else _STEPS
    longest = context + steps + _WARM_UP + 1
    blocks = -(-longest // config.block_size)
    executor, spec = run.executor(config, kv_tokens=max(batches) * blocks * config.block_size)
    found: dict[str, Any] = {}
    try:
        for size in batches:
            batch = decoding(size, context, longest, config.block_size, spec.vocab_size)
            read = weights_read(spec) + size * context * executor.layout.token_bytes
            found[f"batch {size}"] = (median(_one_by_one(executor, batch, steps)), read)
            if hasattr(executor, "launch"):
                found[f"batch {size}, ahead"] = (median(_ahead(executor, batch, steps)), read)
    finally:
        executor.close()
    return found


def _one_by_one(executor: Any, batch: list[ScheduledSequence], steps: int) -> list[float]:
    """Each step begins when the tokens of the last are on the host."""
    seconds = []
    for _ in range(_WARM_UP + steps):
        begun = time.perf_counter()
        executor.execute(batch)
        seconds.append(time.perf_counter() - begun)
        batch = later(batch)
    return seconds[_WARM_UP:]


def _ahead(executor: Any, batch: list[ScheduledSequence], steps: int) -> list[float]:
    """Each step is launched before the tokens of the last are on the host."""
    running = executor.launch(batch)
    ended = []
    for _ in range(_WARM_UP + steps):
        batch = later(batch, token=UNKNOWN)
        after = executor.launch(batch)
        running.result()
        ended.append(time.perf_counter())
        running = after
    running.result()
    return [one - before for before, one in pairwise(ended)][_WARM_UP - 1 :]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batches", default="1,32,128,256")
    flags.add_argument("--context", type=int, default=1024)
    flags.add_argument("--backends", default=",".join(BACKENDS))
    flags.add_argument("--graphs", default="true,false", help="values of decode_graphs")
    args = flags.parse_args()
    run = Run.start(args, "decode")
    batches = [1, 3] if args.tiny else [int(n) for n in args.batches.split(",")]
    context = 40 if args.tiny else args.context
    bandwidth = memory_gb_s(run)
    run.keep("memory_gb_s", bandwidth)
    run.keep("asked", ASKED)
    variants: dict[str, list[str]] = {"as configured": []}
    for backend in args.backends.split(","):
        for graphs in args.graphs.split(","):
            if backend == "sdpa" and graphs == "true":
                continue  # it reads all that a table can have
            variants[f"{backend}, graphs {graphs}"] = [
                f"attention_backend={backend}",
                f"decode_graphs={graphs}",
                *(["block_size=256"] if backend == "flash_attn" else []),
            ]
    if "triton" in args.backends:
        variants["triton, blocks of 64"] = ["attention_backend=triton", "block_size=64"]
    for name, settings in variants.items():
        if run.seconds_left < 0:
            run.keep(name, "not run: out of time")
            continue
        try:
            found = step_s(run, settings, batches, context)
        except Exception as error:  # one that is missing or fails must not cost the others
            run.keep(name, f"did not run: {type(error).__name__}: {str(error)[:200]}")
            continue
        finally:
            run.free_memory()
        for way, (seconds, read) in found.items():
            bound = read / (bandwidth * 1e9)
            run.keep(
                f"{name}, {way}",
                {"ms": seconds * 1e3, "bound_ms": bound * 1e3, "fraction": bound / seconds},
            )


if __name__ == "__main__":
    main()
