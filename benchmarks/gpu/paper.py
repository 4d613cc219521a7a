"""The paper's settings on the H200, (a) to (d), in real time on the real engine. [TokenFlow §7.2]

Llama3-8B, KV memory of `--memory-fraction 0.3`, readers of 20 tokens/s; the same seed, and so the
same requests, for every policy. A policy takes about as long as its requests need to be read,
minutes each. So a call runs the policies that have no result yet, until `--seconds` would not do
for one more; call again for the rest. What a call cuts off after its time is said, and not kept.

`--scale N` divides outputs and KV memory by N; prompts, arrivals and readers stay, so that memory
and device are short as before, but for about an Nth of the time. It is another load than the
paper's.

The bound is the simulator's for this setting by the data sheet (`bounds.py` in replicas/simulator).
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from common import Run, parser

from tokenflow.loadgen.metrics import percentile, summarize
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.bounds import bounds
from tokenflow.replicas.simulator.live import Bench, run_live
from tokenflow.replicas.simulator.settings import SETTINGS, Setting
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

POLICIES = ("slack", "tokenflow", "fcfs", "chunked", "andes")
READ_TOK_S = 20.0
_MARGIN_S = 20.0
"""Loading, pinning the host memory, and writing results."""


def scaled(letter: str, scale: int) -> Setting:
    setting = SETTINGS[f"h200-{letter}"]
    return replace(
        setting, output_mean=setting.output_mean // scale, kv_tokens=setting.kv_tokens // scale
    )


def arrivals(
    letter: str, seed: int, duration_s: float, *, scale: int = 1, tiny: bool = False
) -> list[Arrival]:
    if not tiny:
        return scaled(letter, scale).arrivals(seed, [(READ_TOK_S, 1.0)], duration_s)
    rng = random.Random(seed)
    times = burst(6) if letter in "ab" else poisson(20, 0.3, rng)
    return requests(times, 24, 32, [(READ_TOK_S, 1.0)], rng)


def figures(records: list[Any], stats: Any) -> dict[str, float]:
    """What is reported of a run; latencies in seconds."""
    return {
        **summarize(records).to_dict(),
        "stall_p99_s": percentile([r.playback().stall_s for r in records] or [0.0], 99),
        "preemptions": float(stats.preemptions),
        "recomputed_tokens": float(stats.recomputed_tokens),
        "offloaded_bytes": float(stats.offloaded_bytes),
        "loaded_bytes": float(stats.loaded_bytes),
        "steps": float(stats.steps),
        "step_seconds": stats.step_seconds,
        "schedule_seconds": stats.schedule_seconds,
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("setting", choices=["a", "b", "c", "d"])
    flags.add_argument("--policy", default=",".join(POLICIES))
    flags.add_argument("--seed", type=int, default=101)
    flags.add_argument("--duration", type=float, default=60.0, help="of Poisson arrivals, s (60)")
    flags.add_argument("--scale", type=int, default=1, help="shorter outputs, less memory (1)")
    flags.add_argument("--host-kv-gib", type=float, default=64.0, help="divided by --scale (64)")
    flags.add_argument("--again", action="store_true", help="also policies that have a result")
    args = flags.parse_args()
    run = Run.start(args, f"paper-{args.setting}")
    key = f"seed {args.seed}, {args.duration:g} s"
    key += (f", 1/{args.scale}" if args.scale > 1 else "") + (", tiny" if args.tiny else "")
    if run.path.exists() and not args.again:
        run.results = json.loads(run.path.read_text())["results"]
    wanted = [p for p in args.policy.split(",") if f"{p}, {key}" not in run.results]
    if not wanted:
        print(f"{run.path} has every policy asked for")
        return
    setting = scaled(args.setting, args.scale)
    load = arrivals(args.setting, args.seed, args.duration, scale=args.scale, tiny=args.tiny)
    config = run.config(
        kv_tokens=384 if args.tiny else setting.kv_tokens,
        max_num_seqs=16 if args.tiny else setting.machine().max_num_seqs,
        max_batch_tokens=64 if args.tiny else setting.machine().max_batch_tokens,
    )
    torch.manual_seed(0)
    begun = time.monotonic()
    bench = Bench(args.model, config, host_kv_tokens=_host_tokens(run, config))
    try:
        limits = bounds(replace(setting.machine(), kv_tokens=config.kv_tokens or 0), load)
        # A run cannot be faster than its requests are computed, and rarely twice as slow.
        expected = limits.duration_s
        run.keep(
            f"setting, {key}",
            {
                "requests": len(load),
                "seed": args.seed,
                "poisson_s": args.duration,
                "scale": args.scale,
                "kv_tokens": config.kv_tokens,
                "host_kv_tokens": bench.host_slots * config.block_size,
                "load_s": time.monotonic() - begun,
                "bounds": asdict(limits),
            },
        )
        for policy in wanted:
            left = run.seconds_left - _MARGIN_S
            if left < expected:
                print(f"{policy}: left for the next call ({left:.0f} s would not do)")
                continue
            engine = bench.engine(make_policy(policy))
            started = time.monotonic()
            records = run_live(bench, engine, load, seed=args.seed, limit_s=left)
            took = time.monotonic() - started
            bench.executor.take()
            if any(r.finish_reason == "cancelled" for r in records):
                print(f"{policy}: cut off after {took:.0f} s; give it a call of its own")
                continue
            expected = max(expected, took)
            found = figures(records, engine.stats)
            found["fraction_of_bound"] = found["effective_tok_s"] / limits.effective_tok_s
            run.keep(f"{policy}, {key}", found)
    finally:
        bench.close()


def _host_tokens(run: Run, config: Any) -> int:
    if run.args.tiny:
        return 2048
    from tokenflow.replicas.factory import inspect_model

    layout = inspect_model(run.args.model, config, run.args.device).kv_layout(config.block_size)
    return int(run.args.host_kv_gib / run.args.scale * 2**30 / layout.token_bytes)


if __name__ == "__main__":
    main()
