"""Far more requests than a cluster can serve, for minutes: memory, accepted streams, refusals.

First the capacity is measured with a backlog that keeps all replicas busy, then requests come at
`--times` that, at random times. Reported: anonymous memory of every replica and ingress over time,
stalls of the streams that were accepted, and how long a refusal takes. With --share every replica
has that much of a processor and no more, so that those who send and those who refuse do not take
from the capacity that was measured.

Run: python benchmarks/cluster/overload.py [--duration S] [--times X] [--share X] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from pathlib import Path
from statistics import mean
from typing import Any

from bursts import asks, pids, send, warm_up, write
from shares import processor_shares

from tokenflow.cluster.config import load_config
from tokenflow.cluster.local import LocalCluster, free_port
from tokenflow.loadgen.metrics import StreamRecord, percentile

REFUSED = "RESOURCE_EXHAUSTED"


def memory_mib() -> dict[str, float]:
    """Anonymous memory of the processes of this machine's cluster, by role and pid."""
    found = {}
    for role in ("replica", "ingress"):
        for pid in pids(role):
            with contextlib.suppress(OSError):  # it has just ended
                status = Path(f"/proc/{pid}/status").read_text()
                line = next(x for x in status.splitlines() if x.startswith("RssAnon"))
                found[f"{role} {pid}"] = int(line.split()[1]) / 1024
    return found


async def watch(every_s: float, samples: list[dict[str, Any]]) -> None:
    begun = time.monotonic()
    while True:
        samples.append({"at_s": time.monotonic() - begun, **memory_mib()})
        await asyncio.sleep(every_s)


def growth(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of each process: its memory in the last fifth over that in the second fifth of the time."""
    fifth = max(1, len(samples) // 5)
    names = [name for name in samples[-1] if name != "at_s" and name in samples[fifth]]
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return {name: mean(s[name] for s in late) / mean(s[name] for s in early) for name in names}


def capacity_tok_s(address: str, seed: int, count: int, rate: float) -> float:
    """Tokens per second while a backlog keeps everything busy: between the first and the last
    tenth of the tokens."""
    records = asyncio.run(send(address, asks([0.0] * count, seed=seed, token_rate=rate)))
    times = sorted(at for r in records for at in r.token_times())
    low, high = len(times) // 10, len(times) * 9 // 10
    return (high - low) / (times[high] - times[low])


def summary(records: list[StreamRecord]) -> dict[str, float]:
    taken = [r for r in records if r.ok]
    refused = [r for r in records if r.error is not None and r.error.startswith(REFUSED)]
    ttfts = [r.first_token_s - r.intended_s for r in taken if r.first_token_s is not None]
    refusals = [r.finished_s - r.sent_s for r in refused if r.finished_s and r.sent_s]
    playbacks = [r.playback() for r in taken]
    return {
        "requests": len(records),
        "served": len(taken),
        "refused": len(refused),
        "failed": len(records) - len(taken) - len(refused),
        "ttft_p50_s": percentile(ttfts or [0.0], 50),
        "ttft_p99_s": percentile(ttfts or [0.0], 99),
        "stall_p99_s": percentile([p.stall_s for p in playbacks] or [0.0], 99),
        "stall_max_s": max((p.stall_s for p in playbacks), default=0.0),
        "refusal_p50_s": percentile(refusals or [0.0], 50),
        "refusal_p99_s": percentile(refusals or [0.0], 99),
        "tokens": sum(r.tokens for r in taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=300.0)
    parser.add_argument("--times", type=float, default=5.0, help="offered load over the capacity")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rate", type=float, default=10.0, help="tokens/s of every reader")
    parser.add_argument("--max-ttft", type=float, default=10.0, help="the bound of admission, s")
    parser.add_argument("--max-stall", type=float, default=0.1, help="the same for pauses, s")
    parser.add_argument("--share", type=float, help="processors of each replica")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    overrides = {
        "ingress.port": free_port(),
        "ingress.grpc_port": free_port(),
        "replicas.count": args.replicas,
        "engine.cpu_threads": 1,
        "engine.kv_tokens": 8192,
        "engine.max_num_seqs": 32,
        "kvstore.host_kv_gib": 0.5,
        "limits.max_predicted_ttft_s": args.max_ttft,
        "limits.max_predicted_stall_s": args.max_stall,
    }
    unbounded = dict.fromkeys(("limits.max_predicted_ttft_s", "limits.max_predicted_stall_s"))
    with LocalCluster(load_config(None, {**overrides, **unbounded})) as own:
        stack = contextlib.ExitStack()
        own.serve()
        if args.share:
            stack.enter_context(processor_shares(pids("replica"), args.share))
        warm_up(own.grpc_target, args.replicas, token_rate=args.rate, seed=args.seed + 1000)
        capacity = capacity_tok_s(own.grpc_target, args.seed, 100 * args.replicas, args.rate)
        print(f"capacity {capacity:.0f} tok/s", flush=True)
        stack.close()
        own.serve(load_config(None, overrides))
        if args.share:
            stack.enter_context(processor_shares(pids("replica"), args.share))
        warm_up(own.grpc_target, args.replicas, token_rate=args.rate, seed=args.seed + 1000)
        rng = random.Random(args.seed)
        sample = asks([0.0] * 1000, seed=args.seed, token_rate=args.rate)
        per_s = args.times * capacity / mean(ask.output_tokens for ask in sample)
        times: list[float] = []
        at = rng.expovariate(per_s)
        while at < args.duration:
            times.append(at)
            at += rng.expovariate(per_s)
        samples: list[dict[str, Any]] = []

        async def run() -> list[StreamRecord]:
            watcher = asyncio.create_task(watch(args.duration / 60, samples))
            try:
                requests = asks(times, seed=args.seed, token_rate=args.rate)
                return await send(own.grpc_target, requests)
            finally:
                watcher.cancel()

        with stack:
            figures = summary(asyncio.run(run()))
    grown = growth(samples)
    print(f"offered {per_s:.1f} requests/s, {args.times:g} times the capacity")
    for name, value in figures.items():
        print(f"{name:16} {value:.3f}" if isinstance(value, float) else f"{name:16} {value}")
    for name, ratio in grown.items():
        print(f"memory of {name}: {samples[-1][name]:.0f} MiB at the end, {ratio:.3f} of before")
    write(
        args.json,
        {
            "arguments": vars(args),
            "capacity_tok_s": capacity,
            "offered_requests_s": per_s,
            "figures": figures,
            "memory_growth": grown,
            "memory_mib": samples,
        },
    )


if __name__ == "__main__":
    main()
