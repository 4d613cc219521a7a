"""`tokenflow demo`: one burst, served by `fcfs` and by `slack`, watched reader by reader."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenflow.cluster.demo_server import DemoServer
from tokenflow.cluster.limits import Limits
from tokenflow.loadgen.burst import Burst, BurstRequest, make_burst
from tokenflow.loadgen.metrics import StreamRecord, Summary, percentile, summarize
from tokenflow.replicas.errors import TokenFlowError

POLICIES = ("fcfs", "slack")
_WARM_UP_REQUESTS = 8
_SETTLE_S = 0.5
_REFRESH_S = 0.25
_LOG_LINE_S = 2.0
_CELLS_PER_LINE = 32


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
    requests = make_burst(
        options.requests, max_tokens=options.max_tokens, token_rate=options.rate, seed=options.seed
    )
    console.print(
        f"A burst of {options.requests} readers at {options.rate:g} tokens/s, "
        f"{options.max_tokens} tokens each, on device memory for {options.kv_tokens} tokens of KV."
    )
    results = []
    for policy in POLICIES:
        console.print(f"\n[bold]{policy}[/bold]: starting the server...")
        with factory(policy) as server:
            results.append(asyncio.run(_run_policy(policy, server, requests, options, console)))
    console.print()
    console.print(comparison(results))
    console.print(
        "Effective: tokens weighted at generation by how soon their reader needs them "
        "(TokenFlow, section 7.1.3). TTFT: time to first token, as the client sees it."
    )
    console.print(f"\nOne reader's text ({requests[0].message}):\n", markup=False)
    console.print(results[-1].sample, markup=False)
    if options.json_path:
        _write_json(options, results)


async def _run_policy(
    policy: str,
    server: DemoServer,
    requests: list[BurstRequest],
    options: DemoOptions,
    console: Console,
) -> Result:
    warm_up = make_burst(_WARM_UP_REQUESTS, max_tokens=16, token_rate=options.rate, seed=0)
    await Burst(server.url, server.model, warm_up).run(options.timeout_s)
    await asyncio.sleep(_SETTLE_S)
    before = await read_metrics(server.url)
    burst = Burst(server.url, server.model, requests)
    running = asyncio.create_task(burst.run(options.timeout_s))
    await _watch(policy, burst, running, options, console)
    records = await running
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


async def _watch(
    policy: str,
    burst: Burst,
    running: asyncio.Task[list[StreamRecord]],
    options: DemoOptions,
    console: Console,
) -> None:
    begun = time.monotonic()
    if not console.is_terminal:
        next_line = 0.0
        while not running.done():
            elapsed = time.monotonic() - begun
            if elapsed >= next_line:
                console.print(status_line(policy, burst.records, time.monotonic(), begun))
                next_line = elapsed + _LOG_LINE_S
            await asyncio.wait({running}, timeout=_REFRESH_S)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            done = running.done()
            now = time.monotonic()
            live.update(live_view(policy, burst.records, now, begun, options.max_tokens))
            live.refresh()
            if done:
                return
            await asyncio.wait({running}, timeout=_REFRESH_S)


def status_line(policy: str, records: list[StreamRecord], now: float, begun: float) -> str:
    """The run so far in one line."""
    started = sum(bool(r.arrivals) for r in records)
    done = sum(r.ok for r in records)
    failed = sum(r.error is not None for r in records)
    dry = sum(_dry(r, now) for r in records)
    tokens = sum(r.tokens for r in records)
    return (
        f"{policy}  {now - begun:5.1f} s  first token {started}/{len(records)}  "
        f"done {done}  dry now {dry}  {tokens} tokens" + (f"  FAILED {failed}" if failed else "")
    )


def live_view(
    policy: str, records: list[StreamRecord], now: float, begun: float, max_tokens: int
) -> RenderableType:
    """One cell per reader: how far the server is ahead of its eyes."""
    grid = Text()
    for i, record in enumerate(records):
        if i and i % _CELLS_PER_LINE == 0:
            grid.append("\n")
        grid.append(*cell(record, now, max_tokens))
    legend = Text.from_markup(
        "[dim]·[/dim] waits  [red]![/red] has run dry  [red]x[/red] failed  "
        "[green]▁▂▃▄▅▆▇█[/green] text ahead  [blue]■[/blue] all delivered"
    )
    lines = status_line(policy, records, now, begun)
    waits = [(r.first_token_s or now) - r.intended_s for r in records]
    if waits:
        lines += (
            f"\nwaited so far: p50 {percentile(waits, 50):.2f} s, p99 {percentile(waits, 99):.2f} s"
        )
    return Group(Text(lines), grid, legend)


def cell(record: StreamRecord, now: float, max_tokens: int) -> tuple[str, str]:
    """(character, style) of one reader."""
    if record.error is not None:
        return "x", "bold red"
    if not record.arrivals:
        return "·", "dim"
    if record.finished_s is not None:
        return "■", "blue"
    if _dry(record, now):
        return "!", "bold red"
    ahead = record.playback(now).buffer(now)
    levels = "▁▂▃▄▅▆▇█"
    return levels[min(len(levels) - 1, ahead * len(levels) // max(1, max_tokens))], "green"


def _dry(record: StreamRecord, now: float) -> bool:
    if not record.arrivals or record.finished_s is not None:
        return False
    return record.playback(now).slack_s(now) < 0


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
