"""`tokenflow demo`: one burst, served by `fcfs` and by `slack`, watched reader by reader."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tokenflow.cluster.demo_server import DemoServer
from tokenflow.cluster.limits import Limits
from tokenflow.loadgen.description import OpenAIServer
from tokenflow.loadgen.live import Watcher, watch
from tokenflow.loadgen.metrics import Summary, summarize
from tokenflow.loadgen.prompts import story_prompt
from tokenflow.loadgen.runner import Run
from tokenflow.loadgen.targets.openai import OpenAITarget
from tokenflow.loadgen.workload import Ask, Workload
from tokenflow.replicas.errors import TokenFlowError

POLICIES = ("fcfs", "slack")
_WARM_UP_REQUESTS = 8
_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    requests: int
    """Readers of the burst."""
    max_tokens: int
    """Output tokens of each."""
    rate: float
    """Reading speed, tokens/s."""
    kv_tokens: int
    """Device KV memory, tokens."""
    seed: int
    json_path: str | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """One policy's run."""

    policy: str
    summary: Summary
    generated_effective_tok_s: float
    """By the engine's own clock: weight 1 for a token that its reader needs soon, 0 for one far
    ahead of its eyes, at the moment of generation. [TokenFlow §7.1.3]"""
    preemptions: int
    resumes: int
    recomputed_tokens: int
    sample: str
    """The text of one stream."""


Factory = Callable[[str], AbstractContextManager[DemoServer]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow demo`."""
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="readers (64)")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="tokens each reader gets (256)"
    )
    parser.add_argument(
        "--rate", type=float, default=10.0, metavar="R", help="reading speed, tokens/s (10)"
    )
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="device KV memory in tokens (4096, about 14 of the 64 readers)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of requests and text (1)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to FILE")


def options_from(args: argparse.Namespace) -> DemoOptions:
    """Raises TokenFlowError for values that make no demo."""
    for name, low in (("requests", 1), ("max_tokens", 1), ("rate", 0.1), ("kv_tokens", 64)):
        if not getattr(args, name) >= low:
            flag = "--" + name.replace("_", "-")
            raise TokenFlowError(f"{flag} must be at least {low}, got {getattr(args, name)}.")
    highest = Limits().max_token_rate
    if not args.rate <= highest:
        raise TokenFlowError(f"--rate must be at most {highest:g} tokens/s, got {args.rate}.")
    _check_writable(args.json)
    return DemoOptions(
        requests=args.requests,
        max_tokens=args.max_tokens,
        rate=args.rate,
        kv_tokens=args.kv_tokens,
        seed=args.seed,
        json_path=args.json,
        timeout_s=600.0,
    )


def _check_writable(path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise TokenFlowError(f"--json: cannot write {path}: {error.strerror}.") from None


def run_demo(factory: Factory, options: DemoOptions, console: Console | None = None) -> None:
    """Serve the burst under each policy, show it live, print the figures side by side.

    Raises TokenFlowError when a request fails.
    """
    _check_writable(options.json_path)
    console = console or Console(highlight=False)
    console.print(
        f"A burst of {options.requests} readers at {options.rate:g} tokens/s, "
        f"{options.max_tokens} tokens each, on device memory for {options.kv_tokens} tokens of KV."
    )
    results = []
    for policy in POLICIES:
        console.print(f"\n[bold]{policy}[/bold]: starting the server...")
        with factory(policy) as server:
            results.append(asyncio.run(_run_policy(policy, server, options, console)))
    console.print()
    console.print(comparison(results))
    console.print(
        "Effective: tokens weighted at generation by how soon their reader needs them "
        "(TokenFlow, section 7.1.3). TTFT: time to first token, as the client sees it."
    )
    asked = story_prompt(burst_of(options).asks[0].seed)
    console.print(f"\nOne reader's text ({asked}):\n", markup=False)
    console.print(results[-1].sample, markup=False)
    if options.json_path:
        _write_json(options, results)


async def _run_policy(
    policy: str, server: DemoServer, options: DemoOptions, console: Console
) -> Result:
    target = OpenAITarget(
        OpenAIServer(
            url=server.url, model=server.model, extra_body={"temperature": 0.8, "top_p": 0.95}
        ),
        content="stories",
        probe=False,
    )
    await target.open()
    try:
        warm_up = make_burst(_WARM_UP_REQUESTS, max_tokens=16, token_rate=options.rate, seed=0)
        await Run(target, warm_up, timeout_s=options.timeout_s).run()
        await asyncio.sleep(_SETTLE_S)
        before = await read_metrics(server.url)
        run = Run(target, burst_of(options), timeout_s=options.timeout_s)
        running = asyncio.create_task(run.run())
        watcher = Watcher(policy, options.requests, options.max_tokens)
        await watch(run, running, watcher, console, time.monotonic)
        records = await running
    finally:
        await target.close()
    failed = [record for record in records if not record.ok]
    if failed:
        raise TokenFlowError(f"{len(failed)} of {len(records)} requests failed: {failed[0].error}")
    # The engine counts a request's effective tokens when it ends, which may be a moment later.
    await asyncio.sleep(_SETTLE_S)
    after = await read_metrics(server.url)
    summary = summarize(records)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    return Result(
        policy=policy,
        summary=summary,
        generated_effective_tok_s=grown("tokenflow_effective_tokens_total") / summary.duration_s,
        preemptions=round(grown("tokenflow_preemptions_total")),
        resumes=round(grown("tokenflow_resumes_total")),
        recomputed_tokens=round(grown("tokenflow_recomputed_tokens_total")),
        sample=records[0].text.strip(),
    )


def make_burst(count: int, *, max_tokens: int, token_rate: float, seed: int) -> Workload:
    """`count` readers at once, the same ones for the same arguments."""
    rng = random.Random(seed)
    return Workload(
        tuple(
            # What a story's prompt has is known only to the server.
            Ask(i, 0.0, 1, max_tokens, token_rate, rng.getrandbits(31), i)
            for i in range(count)
        )
    )


def burst_of(options: DemoOptions) -> Workload:
    return make_burst(
        options.requests, max_tokens=options.max_tokens, token_rate=options.rate, seed=options.seed
    )


async def read_metrics(url: str) -> dict[str, float]:
    """The server's metrics, summed over their labels. Raises TokenFlowError."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        try:
            answer = await client.get(f"{url}/metrics")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise TokenFlowError(f"{url}/metrics does not answer ({error}).") from None
        text = answer.text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


# -- what is shown ----------------------------------------------------------------------------


def comparison(results: list[Result]) -> Table:
    """The figures side by side."""
    table = Table(title="The same burst, side by side", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.policy, justify="right")
    if len(results) == 2:
        table.add_column("ratio", justify="right")

    def row(name: str, value: Callable[[Result], float], form: str, ratio: bool = False) -> None:
        values = [value(result) for result in results]
        cells = [form.format(v) for v in values]
        if len(results) == 2:
            cells.append(f"{values[1] / values[0]:.2f}" if ratio and values[0] else "")
        table.add_row(name, *cells)

    row("TTFT mean, s", lambda r: r.summary.ttft_mean_s, "{:.2f}", ratio=True)
    row("TTFT P99, s", lambda r: r.summary.ttft_p99_s, "{:.2f}", ratio=True)
    row("effective throughput, tok/s", lambda r: r.generated_effective_tok_s, "{:.0f}", ratio=True)
    row("raw throughput, tok/s", lambda r: r.summary.raw_tok_s, "{:.0f}", ratio=True)
    row("readers that ran dry", lambda r: r.summary.stalled_readers, "{:.0f}")
    row("seconds dry, all readers", lambda r: r.summary.stall_s, "{:.1f}")
    row("preemptions", lambda r: r.preemptions, "{:.0f}")
    row("resumed from host memory", lambda r: r.resumes, "{:.0f}")
    row("tokens computed again", lambda r: r.recomputed_tokens, "{:.0f}")
    row("duration, s", lambda r: r.summary.duration_s, "{:.1f}")
    return table


def _write_json(options: DemoOptions, results: list[Result]) -> None:
    report: dict[str, Any] = {
        "options": asdict(options),
        "machine": {"platform": platform.platform(), "cpus": len(os.sched_getaffinity(0))},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "ray", "torch", "transformers")},
        },
        "results": {r.policy: asdict(r) for r in results},
    }
    assert options.json_path is not None
    with open(options.json_path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
