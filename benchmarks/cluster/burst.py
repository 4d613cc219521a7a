"""A burst on several CPU replicas: time to first token by router, side by side.

Every repeat serves the cluster once per router, in turns, warms it up and sends the same burst at
one moment: short questions, and one request in twenty with a document, so that most prompt tokens
come with few requests. `power-of-two` is Ray Serve's default rule, here with exact counts of
unfinished streams, which Serve itself does not have for streams that are carried in frames. With
--share every replica has that much of a processor and no more, as on a machine of its own; without,
one that has nothing to do leaves its time to the others, whatever the router did.

Run: python benchmarks/cluster/burst.py [--repeats N] [--routers NAMES] [--share X] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
from dataclasses import replace
from statistics import mean
from typing import Any

from bursts import asks, pids, send, warm_up, write
from shares import processor_shares

from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port
from tokenflow.loadgen.metrics import StreamRecord, percentile, summarize
from tokenflow.loadgen.workload import Ask

_DOCUMENTS = 0.05
"""Share of the requests that bring one."""


def questions(count: int, *, seed: int, token_rate: float) -> list[Ask]:
    """All at once: 8 to 24 prompt tokens, with a document 700 to 900."""
    rng = random.Random(seed)
    return [
        replace(
            ask,
            prompt_tokens=rng.randint(700, 900)
            if rng.random() < _DOCUMENTS
            else rng.randint(8, 24),
        )
        for ask in asks([0.0] * count, seed=seed, token_rate=token_rate)
    ]


def figures(records: list[StreamRecord]) -> dict[str, float]:
    ttfts = [r.first_token_s - r.intended_s for r in records if r.first_token_s is not None]
    summary = summarize(records)
    return {
        "failed": summary.failed,
        "ttft_mean_s": mean(ttfts),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "ttft_max_s": max(ttfts),
        "raw_tok_s": summary.raw_tok_s,
        "effective_tok_s": summary.effective_tok_s,
        "stall_s": summary.stall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--routers", default="burst,power-of-two")
    parser.add_argument("--rate", type=float, default=10.0, help="tokens/s of every reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, help="processors of each replica")
    parser.add_argument("--json")
    args = parser.parse_args()
    routers = args.routers.split(",")
    overrides = {
        "ingress.port": free_port(),
        "ingress.grpc_port": free_port(),
        "replicas.count": args.replicas,
        "engine.cpu_threads": 1,
        "engine.kv_tokens": 16_384,
        "engine.prefix_cache": False,
        "kvstore.host_kv_gib": 0.5,
        "limits.max_predicted_ttft_s": None,
    }
    runs: list[dict[str, Any]] = []
    with LocalCluster(load_config(None, overrides)) as cluster:
        for repeat in range(args.repeats):
            # Whoever is first in one repeat is last in the next.
            order = routers if repeat % 2 == 0 else routers[::-1]
            for router in order:
                cluster.serve(load_config(None, {**overrides, "replicas.router": router}))
                seed = args.seed + repeat
                target = cluster.grpc_target
                with contextlib.ExitStack() as stack:
                    if args.share:
                        stack.enter_context(processor_shares(pids("replica"), args.share))
                    warm_up(target, args.replicas, token_rate=args.rate, seed=seed + 1000)
                    burst = questions(args.requests, seed=seed, token_rate=args.rate)
                    run = figures(asyncio.run(send(target, burst)))
                runs.append({"repeat": repeat, "router": router, **run})
                print(
                    f"{repeat} {router:15} TTFT mean {run['ttft_mean_s']:.2f} s, P50 "
                    f"{run['ttft_p50_s']:.2f} s, P99 {run['ttft_p99_s']:.2f} s, effective "
                    f"{run['effective_tok_s']:.0f} tok/s, failed {run['failed']}",
                    flush=True,
                )
    ratios: dict[str, list[float]] = {}
    for router in routers[1:]:
        ratios[router] = [
            mine["ttft_p99_s"] / other["ttft_p99_s"]
            for mine in runs
            for other in runs
            if mine["router"] == routers[0]
            and other["router"] == router
            and mine["repeat"] == other["repeat"]
        ]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios[router])
        print(f"P99 TTFT, {routers[0]} / {router}: {mean(ratios[router]):.2f} ({shown})")
    write(args.json, {"arguments": vars(args), "runs": runs, "p99_ratios": ratios})


if __name__ == "__main__":
    main()
