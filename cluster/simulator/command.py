"""`tokenflow simulate-cluster`: routers before many replicas, on a virtual clock."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence as Seq
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tokenflow.cluster.routing import ROUTERS
from tokenflow.cluster.simulator.run import Setup, simulate_cluster
from tokenflow.cluster.simulator.workload import BURST_AT_S, burst, scaled
from tokenflow.loadgen.traces import load_trace
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator import plots
from tokenflow.replicas.simulator.replay import parse_machine, replay_machine
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.workload import Arrival

_COLUMNS = {
    "TTFT\nmean, s": "ttft_mean_s",
    "TTFT\nP50, s": "ttft_p50_s",
    "TTFT\nP99, s": "ttft_p99_s",
    "raw\ntok/s": "raw_tok_s",
    "effective\ntok/s": "effective_tok_s",
    "stall\nP99, s": "stall_p99_s",
    "refused": "refused",
    "choice,\nus": "choice_us",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow simulate-cluster`."""
    add = parser.add_argument
    add("--replicas", default="8", metavar="N,...", help="replicas, one or several sizes (8)")
    add(
        "--router",
        default="all",
        metavar="NAMES",
        help=f"comma-separated, or all: {', '.join(ROUTERS)} (all)",
    )
    add("--ingresses", type=int, default=1, metavar="K", help="each with its own view (1)")
    add(
        "--model",
        choices=("engine", "reduced"),
        default="engine",
        help="engine: every step of the shipped engine; reduced: prompts, rates and memory only, "
        "for thousands of replicas (engine)",
    )
    add("--trace", metavar="FILE", help="replay this CSV file, scaled to --requests")
    add("--time-scale", type=float, default=1.0, metavar="X", help="its times times X (1)")
    add("--duration", type=float, metavar="S", help="seconds of the trace, before scaling (all)")
    add(
        "--requests",
        type=float,
        default=25.0,
        metavar="X",
        help="per replica: of the trace or, without one, of a burst of skewed requests (25)",
    )
    add("--rate", type=float, default=20.0, metavar="R", help="tokens/s of every reader (20)")
    add("--machine", default="h200:qwen2.5-32b", metavar="GPU:MODEL", help="(h200:qwen2.5-32b)")
    add("--memory-fraction", type=float, default=0.9, metavar="X", help="of the GPU (0.9)")
    add("--max-ttft", type=float, metavar="S", help="refuse beyond this predicted TTFT (never)")
    add("--max-stall", type=float, metavar="S", help="refuse where readers would pause longer")
    add(
        "--no-frames",
        action="store_true",
        help="reports only by Serve's statistics, 0.1 to 0.5 s late",
    )
    add("--seeds", type=int, default=1, metavar="N", help="how many seeds (1)")
    add("--plot", metavar="FILE", help="draw the TTFT of the first size and seed to FILE (SVG)")
    add("--json", metavar="FILE", help="also write all figures to FILE")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Raises ConfigError for unknown names and values that make no run."""
    console = console or Console(highlight=False)
    sizes = _sizes(args.replicas)
    routers = list(ROUTERS) if args.router == "all" else args.router.split(",")
    for name in routers:
        if name not in ROUTERS:
            raise ConfigError(
                f"--router: unknown name {name!r}; known are {', '.join(ROUTERS)}, all."
            )
    for flag, least, most in (
        ("ingresses", 1, 1024),
        ("seeds", 1, 1000),
        ("requests", 0.01, 1e6),
        ("rate", 0.01, 1000),
        ("memory_fraction", 0.01, 1),
    ):
        name, value = flag.replace("_", "-"), getattr(args, flag)
        if not least <= value <= most:
            raise ConfigError(f"--{name} must be from {least} to {most}, got {value}.")
    gpu, model = parse_machine(args.machine)
    machine = replay_machine(gpu, model, args.memory_fraction)
    if args.plot:
        plots.check()
    runs: list[dict[str, Any]] = []
    drawn: dict[str, list[float]] = {}
    for replicas in sizes:
        own: list[dict[str, Any]] = []
        for seed in range(1, args.seeds + 1):
            arrivals = _arrivals(args, replicas, seed, machine)
            for router in routers:
                setup = Setup(
                    machine=machine,
                    replicas=replicas,
                    router=router,
                    ingresses=args.ingresses,
                    model=args.model,
                    frames=not args.no_frames,
                    max_ttft_s=args.max_ttft,
                    max_stall_s=args.max_stall,
                    seed=seed,
                )
                begun = time.perf_counter()
                outcome = simulate_cluster(setup, arrivals)
                took = time.perf_counter() - begun
                since_s = BURST_AT_S if args.trace is None else 0.0
                figures = outcome.figures(since_s)
                if seed == 1 and replicas == sizes[0]:
                    drawn[router] = outcome.ttfts(since_s)
                case = {"replicas": replicas, "router": router, "seed": seed, "real_s": took}
                own.append(case | figures)
        console.print(_table(replicas, args.ingresses, own))
        runs += own
    if args.plot:
        count = f"{runs[0]['requests']} requests on {sizes[0]} replicas"
        plots.distribution(Path(args.plot), count, drawn, "router")
    if args.json:
        _write(args, runs)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if not all(1 <= n <= 10_000 for n in sizes):
        raise ConfigError(f"--replicas: {text!r} is not a list of numbers from 1 to 10000.")
    return sizes


def _arrivals(
    args: argparse.Namespace, replicas: int, seed: int, machine: Machine
) -> list[Arrival]:
    requests = round(args.requests * replicas)
    if args.trace is None:
        arrivals = burst(requests, replicas, args.rate, seed)
    else:
        trace = load_trace(
            args.trace,
            duration_s=math.inf if args.duration is None else args.duration,
            time_scale=args.time_scale,
        )
        arrivals = scaled(trace.rows, requests, args.rate, seed)
    longest = max((a.prompt_tokens + a.output_tokens for a in arrivals), default=0)
    if not longest:
        raise ConfigError("--requests: too few of the trace are left; ask for more.")
    if longest > machine.kv_tokens:
        raise ConfigError(
            f"a request of {longest} tokens does not fit into the {machine.kv_tokens} KV tokens of "
            f"{args.machine}; choose another --machine or --memory-fraction."
        )
    return arrivals


def _table(replicas: int, ingresses: int, runs: Seq[dict[str, Any]]) -> Table:
    """One row per router, means over the seeds."""
    shown = Table(
        title=f"{replicas} replicas, {ingresses} ingress(es), {runs[0]['requests']} requests",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    shown.add_column("")
    for heading in _COLUMNS:
        shown.add_column(heading, justify="right")
    for router in dict.fromkeys(r["router"] for r in runs):
        own = [r for r in runs if r["router"] == router]
        cells = []
        for key in _COLUMNS.values():
            values = [r[key] for r in own if key in r]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "")
        shown.add_row(router, *cells)
    return shown


def _write(args: argparse.Namespace, runs: Seq[dict[str, Any]]) -> None:
    arguments = {k: v for k, v in vars(args).items() if k not in ("run", "command", "json")}
    if args.trace is not None:
        arguments["trace"] = Path(args.trace).name
    report = {
        "arguments": arguments,
        "machine": {
            "system": platform.system(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "numpy")},
        },
        "runs": list(runs),
    }
    try:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {args.json}: {error.strerror}.") from None
