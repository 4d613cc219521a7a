"""The decode step against the memory bound: all weights and all KV read once per step.

Wall time of a whole step, from a packed batch to sampled tokens on the host, at batches of 1 to 256
and 1,024 tokens of context each, for every attention backend and with and without CUDA graphs where
this build and machine have them. Asked: at least 0.75 of the bound.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from common import Run, decoding, later, memory_gb_s, parser, weights_read

from tokenflow.replicas.errors import TokenFlowError

BACKENDS = ("auto", "flash_attn", "triton", "sdpa")
ASKED = 0.75
_STEPS = 32


def step_s(run: Run, settings: list[str], batches: list[int], context: int) -> dict[int, Any]:
    """Median seconds of a step, by batch."""
    saved, run.args.set = run.args.set, [*run.args.set, *settings]
    try:
        config = run.config(max_num_seqs=max(batches))
    finally:
        run.args.set = saved
    steps = 2 if run.args.tiny else _STEPS
    longest = context + steps + 5
    blocks = -(-longest // config.block_size)
    executor, spec = run.executor(config, kv_tokens=max(batches) * blocks * config.block_size)
    found: dict[int, Any] = {}
    try:
        for size in batches:
            batch = decoding(size, context, longest, config.block_size, spec.vocab_size)
            seconds = []
            for i in range(steps + 4):
                begun = time.perf_counter()
                executor.execute(batch)
                if i >= 4:
                    seconds.append(time.perf_counter() - begun)
                batch = later(batch)
            read = weights_read(spec) + size * context * executor.layout.token_bytes
            found[size] = (median(seconds), read)
    finally:
        executor.close()
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batches", default="1,32,128,256")
    flags.add_argument("--context", type=int, default=1024)
    flags.add_argument("--backends", default=",".join(BACKENDS))
    flags.add_argument("--graphs", default="true,false", help="values of executor.cuda_graphs")
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
            variants[f"{backend}, graphs {graphs}"] = [
                f"executor.attention_backend={backend}",
                f"executor.cuda_graphs={graphs}",
                *(["block_size=256"] if backend == "flash_attn" else []),
            ]
    for name, settings in variants.items():
        if run.seconds_left < 0:
            run.keep(name, "not run: out of time")
            continue
        try:
            found = step_s(run, settings, batches, context)
        except (TokenFlowError, ImportError) as error:
            run.keep(name, f"missing here: {str(error).splitlines()[0]}")
            continue
        for size, (seconds, read) in found.items():
            bound = read / (bandwidth * 1e9)
            run.keep(
                f"{name}, batch {size}",
                {"ms": seconds * 1e3, "bound_ms": bound * 1e3, "fraction": bound / seconds},
            )


if __name__ == "__main__":
    main()
