"""What offloading, write-through and load-evict overlap are each worth, on the real engine.

A burst on memory for a few of its requests, in real time, with the default policy: the whole, and
each part switched off. Repeats are interleaved. The paper's times to finish on an RTX 4090 (b) are
66.0 s, 127.3 s without offload, 82.8 s without write-through and 74.4 s without overlap.

Run: python benchmarks/kvstore/ablation.py [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median
from typing import Any

from node import Node, machine, write

from tokenflow.cluster.config import embedded_model
from tokenflow.loadgen.metrics import StreamRecord, summarize
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor.base import Executor
from tokenflow.replicas.factory import build_executor, inspect_model
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.tokenizer import load_tokenizer

VARIANTS: dict[str, dict[str, bool]] = {
    "full": {},
    "without offload": {"offload": False},
    "without write-through": {"write_through": False},
    "without overlap": {"overlap_transfers": False},
}


def serve(engine: Engine, requests: list[Request]) -> dict[str, float]:
    """Run a burst to its end in real time."""
    records = {}
    for request in requests:
        engine.add(request)
        records[request.request_id] = StreamRecord(request.token_rate, request.arrival_s)
    while engine.has_work:
        if not engine.step():
            engine.wait_for_transfers(0.005)
        now = time.monotonic()
        for event in engine.take_events():
            record = records[event.request_id]
            if event.token_id >= 0:
                record.arrivals.append((now, 1))
            if event.finish_reason is not None:
                record.finish_reason, record.finished_s = event.finish_reason, now
    summary = summarize(records.values())
    stats = engine.stats
    return {
        "time to finish, s": summary.duration_s,
        "raw tok/s": summary.raw_tok_s,
        "effective tok/s": summary.effective_tok_s,
        "P99 TTFT, s": summary.ttft_p99_s,
        "stalls, s": summary.stall_s,
        "preemptions": stats.preemptions,
        "recomputed tokens": stats.recomputed_tokens,
        "loaded MiB": stats.loaded_bytes / 2**20,
        "offloaded MiB": stats.offloaded_bytes / 2**20,
    }


def run(
    executor: Executor,
    host: Any,
    config: EngineConfig,
    spec: Any,
    tokenizer: Any,
    args: Any,
    seed: int,
) -> dict[str, float]:
    engine = Engine(
        executor,
        make_policy(config.policy),
        host,
        config,
        tokenizer=tokenizer,
        eos_ids=spec.eos_token_ids,
        max_model_len=spec.max_model_len,
        model=seed.to_bytes(8, "little"),
    )
    rng = random.Random(seed)
    now = time.monotonic()
    requests = [
        Request(
            f"{i}",
            tuple(rng.randrange(spec.vocab_size) for _ in range(rng.randint(*args.prompt))),
            SamplingParams(max_tokens=rng.randint(*args.output), temperature=0.0, ignore_eos=True),
            args.rate,
            arrival_s=now,
            # Every run finds the store without its texts.
            cache_salt=f"{seed}-{now}",
        )
        for i in range(args.requests)
    ]
    return serve(engine, requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--kv-tokens", type=int, default=4000)
    parser.add_argument("--prompt", type=int, nargs=2, default=(100, 300))
    parser.add_argument("--output", type=int, nargs=2, default=(200, 400))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    base = EngineConfig(kv_tokens=args.kv_tokens)
    spec = inspect_model(args.model, base, "cpu")
    tokenizer = load_tokenizer(args.model)
    blocks = args.kv_tokens // base.block_size
    slots = args.requests * (args.prompt[1] + args.output[1]) // base.block_size + 1024
    results: dict[str, list[dict[str, float]]] = {}
    with Node(slots, spec.kv_layout(base.block_size).block_bytes) as node:
        host, memory = node.attach("bench")
        executor = build_executor(spec, base, host_memory=memory, num_blocks=blocks)
        for seed in range(args.repeats + 1):
            for name, switched in VARIANTS.items():
                config = base.model_copy(update=switched)
                got = run(executor, host, config, spec, tokenizer, args, seed)
                if seed:  # the first round warms up
                    results.setdefault(name, []).append(got)
                    print(f"{name:24} " + ", ".join(f"{k} {v:.1f}" for k, v in got.items()))
        executor.close()
        del memory, executor
    table = {}
    for name, runs in results.items():
        table[name] = {key: median(r[key] for r in runs) for key in runs[0]}
        ratio = [
            own["time to finish, s"] / full["time to finish, s"]
            for own, full in zip(runs, results["full"], strict=True)
        ]
        effective = [
            own["effective tok/s"] / full["effective tok/s"]
            for own, full in zip(runs, results["full"], strict=True)
        ]
        table[name]["time / full"] = median(ratio)
        table[name]["effective / full"] = median(effective)
        print(f"{name:24} time x{median(ratio):.2f}, effective x{median(effective):.2f}")
    write(
        args.json,
        {
            **machine(),
            "policy": base.policy,
            "requests": args.requests,
            "rate": args.rate,
            "kv_tokens": args.kv_tokens,
            "prompt": args.prompt,
            "output": args.output,
            "medians": table,
            "runs": results,
        },
    )


if __name__ == "__main__":
    main()
