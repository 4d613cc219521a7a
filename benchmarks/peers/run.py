"""The same requests against our cluster, a vLLM CPU server and transformers' continuous batching:
one after the other, in turns, on the same checkpoint, KV memory and cores; and their ratios.

Run (see the README beside this for the peers' environments):

    python benchmarks/peers/make_checkpoint.py CKPT
    python benchmarks/peers/run.py --checkpoint CKPT --vllm-venv VENV --transformers-venv VENV \\
        --workload burst --repeats 5 --out benchmarks/results/peers-burst
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from servers import MODEL, PEERS, Server, Setup, running, versions

from tokenflow.loadgen import compare as comparing
from tokenflow.loadgen.arrivals import parse_arrivals
from tokenflow.loadgen.description import Description, load_description
from tokenflow.loadgen.page import page
from tokenflow.loadgen.report import (
    Repeat,
    Report,
    command_line,
    load_report,
    make_report,
    without_folders,
)
from tokenflow.loadgen.session import Session
from tokenflow.loadgen.tables import number, unit
from tokenflow.loadgen.targets.base import Opened
from tokenflow.replicas.errors import ConfigError, TokenFlowError

FIXED = {"prompt": {"kind": "fixed", "tokens": 128}, "output": {"kind": "fixed", "tokens": 320}}
WORKLOADS: dict[str, dict[str, Any]] = {
    "burst": {"arrivals": {"kind": "burst", "count": 40}, **FIXED},
    "poisson": {"arrivals": {"kind": "poisson", "per_s": 1.5, "duration_s": 40}, **FIXED},
}
"""Reading at 10 tokens/s; KV memory is for about 9 requests of 448 tokens."""
COMPARED = (
    "effective_tok_s", "raw_tok_s", "ttft_mean_s", "ttft_p99_s", "stall_mean_s", "stall_p99_s",
    "andes_qoe_mean", "goodput_share", "effective_ratio", "failed",
)  # fmt: skip
GOALS = (
    (
        "effective throughput at least 2.5 x",
        "effective_tok_s",
        lambda ours, peer: ours >= 2.5 * peer,
    ),
    ("P99 TTFT at most a quarter", "ttft_p99_s", lambda ours, peer: ours <= peer / 4),
    ("mean stall below 0.2 s", "stall_mean_s", lambda ours, peer: ours < 0.2),
    ("raw throughput at least 0.9 x", "raw_tok_s", lambda ours, peer: ours >= 0.9 * peer),
)
WARM_UP = {
    "arrivals": {"kind": "burst", "count": 16},
    "prompt": {"kind": "fixed", "tokens": 128},
    "output": {"kind": "fixed", "tokens": 96},
}
"""Fills most of the KV memory: what a server learns of its speed there holds for the workload."""
NOWHERE = Server("nowhere", "http://127.0.0.1:1/v1", MODEL, exact_output=True)
"""Stands in for a server where only the workload matters."""
SAME = ("arrivals", "prompt", "output", "readers")
"""What of two descriptions must be equal for their repeats to be of one comparison."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR")
    add("--vllm-venv", type=Path, metavar="DIR")
    add("--transformers-venv", type=Path, metavar="DIR")
    add("--peers", default=",".join(PEERS), metavar="NAMES", help=f"({','.join(PEERS)})")
    add("--workload", default="burst", help="burst, poisson, or a trace as in --arrivals (burst)")
    add("--requests", type=int, metavar="N", help="of the burst (40)")
    add("--rate", type=float, default=10.0, metavar="R", help="reading speed, tokens/s (10)")
    add("--kv-tokens", type=int, default=4096, metavar="N", help="(4096)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(bfloat16)")
    add("--cores", metavar="0,1", help="of the servers; the generator runs on all (all)")
    add("--threads", type=int, metavar="N", help="of each server (its own choice: a core less)")
    add("--engine", action="append", default=[], metavar="NAME=X", help="option of our engine")
    add("--repeats", type=int, default=5, metavar="N", help="(5)")
    add("--seed", type=int, default=1, metavar="N", help="of the first repeat (1)")
    add("--resume", action="store_true", help="add the repeats to those that --out holds")
    add("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    console = Console(highlight=False)
    names = args.peers.split(",")
    unknown = set(names) - set(PEERS)
    if unknown:
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        checkpoint=args.checkpoint.resolve(),
        kv_tokens=args.kv_tokens,
        dtype=args.dtype,
        cores=frozenset(map(int, args.cores.split(","))) if args.cores else os.sched_getaffinity(0),
        venvs={"vllm": args.vllm_venv, "transformers": args.transformers_venv},
        logs=logs.resolve(),
        threads=args.threads,
        engine=dict(_option(text) for text in args.engine),
    )
    repeats: dict[str, list[Repeat]] = {name: [] for name in names}
    if args.resume:
        repeats = earlier(args.out, names, setup, describe(NOWHERE, args, args.seed))
    done = len(repeats[names[0]])
    seed = repeats[names[0]][-1].seed + 1 if done else args.seed
    descriptions: dict[str, Description] = {}
    opened: dict[str, Opened] = {}
    for i in range(done, done + args.repeats):
        # In turns, and each time another one first, so that nobody always has the warm machine.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            console.print(f"\nrepeat {i + 1} of {done + args.repeats}: {name}")
            with running(name, setup) as server:
                session = serve(server, args, seed + i - done, console)
            repeats[name] += session.repeats
            opened[name] = session.opened
            descriptions[name] = session.description
    reports = [
        make_report(descriptions[n], opened[n], repeats[n], command=command_line()) for n in names
    ]
    console.print()
    if names[0] == "tokenflow":
        for report in reports[1:]:
            console.print(ratios(reports[0], report))
    save(args.out, reports, setup, console)
    return 0


def earlier(
    out: Path, names: list[str], setup: Setup, wanted: Description
) -> dict[str, list[Repeat]]:
    """The repeats of each peer that `out` holds. Raises ConfigError where there are none, or not
    of the same comparison."""
    reports = {name: load_report(out / f"{name}.json") for name in names}
    if len({len(report.repeats) for report in reports.values()}) > 1:
        raise ConfigError(f"--resume: {out} has not the same number of repeats of each peer.")
    asked = without_folders(wanted.model_dump(mode="json"))
    for name, report in reports.items():
        for part in SAME:
            if report.description[part] != asked[part]:
                raise ConfigError(
                    f"--resume: the {part} of {out / name}.json are {report.description[part]}, "
                    f"but {asked[part]} are asked for; choose another --out."
                )
    had = json.loads((out / "summary.json").read_text())["setup"]
    if had != of_setup(setup):
        raise ConfigError(f"--resume: {out} was measured with {had}, not {of_setup(setup)}.")
    return {name: report.repeats for name, report in reports.items()}


def describe(server: Server, args: argparse.Namespace, seed: int) -> Description:
    workload = WORKLOADS.get(args.workload)
    if workload is None:
        workload = {
            "arrivals": parse_arrivals(args.workload).model_dump(),
            "prompt": {"kind": "trace"},
            "output": {"kind": "trace"},
        }
    if args.requests is not None and workload["arrivals"]["kind"] == "burst":
        workload = workload | {"arrivals": {"kind": "burst", "count": args.requests}}
    return load_description(None, common(server, args) | workload | {"seed": seed})


def common(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Of workload and warm-up."""
    return {
        "name": server.name,
        "target": {
            "kind": "openai",
            "url": server.url,
            "model": server.model,
            "endpoint": "completions",
            "tokenizer": str(args.checkpoint),
            "exact_output": server.exact_output,
            "extra_body": {"temperature": 0.0},
        },
        "readers": [{"token_rate": args.rate}],
        "timeout_s": 3600,
    }


def serve(server: Server, args: argparse.Namespace, seed: int, console: Console) -> Session:
    """Warm up, and one repeat."""
    asyncio.run(Session(load_description(None, common(server, args) | WARM_UP)).run())
    session = Session(describe(server, args, seed), console=console)
    asyncio.run(session.run())
    return session


def ratios(ours: Report, peer: Report) -> Table:
    """Ours over theirs, with the interval of the difference, and the goals of the comparison."""
    table = Table(title=f"{ours.name} beside {peer.name}", title_justify="left")
    for heading in ("", ours.name, peer.name, "ratio", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right")
    changes = {change.name: change for change in comparing.compare(peer, ours)}
    for name in COMPARED:
        change = changes[name]
        table.add_row(
            f"{comparing.titled(name)}",
            number(name, change.after),
            number(name, change.before),
            f"{change.after / change.before:.2f}" if change.before else "",
            change.verdict,
        )
    table.add_section()
    for text, name, met in GOALS:
        good = met(changes[name].after, changes[name].before)
        table.add_row(text, "", "", "", "[green]met[/green]" if good else "[red]not met[/red]")
    return table


def save(out: Path, reports: list[Report], setup: Setup, console: Console) -> None:
    """The reports of all, their page, and the ratios."""
    for report in reports:
        (out / f"{report.name}.json").write_text(report.model_dump_json(indent=1) + "\n")
    (out / "report.html").write_text(page(reports))
    summary = {
        "command": command_line(),
        "machine": {"platform": platform.platform(), "cores": sorted(setup.cores)},
        "versions": {"python": platform.python_version(), **versions(setup)},
        "setup": of_setup(setup),
        "figures": {r.name: {n: figure(r, n) for n in COMPARED} for r in reports},
        "ratios": {
            f"{reports[0].name}/{r.name}": {n: ratio(reports[0], r, n) for n in COMPARED}
            for r in reports[1:]
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(f"Saved in {out}; open {out / 'report.html'}", soft_wrap=True)


def of_setup(setup: Setup) -> dict[str, Any]:
    """What all repeats have in common."""
    return {
        "kv_tokens": setup.kv_tokens,
        "dtype": setup.dtype,
        "threads": setup.threads,
        "engine": dict(setup.engine),
    }


def figure(report: Report, name: str) -> Mapping[str, Any] | None:
    found = report.summary.get(name)
    return None if found is None else {"unit": unit(name), **found.model_dump()}


def ratio(ours: Report, peer: Report, name: str) -> float | None:
    one, two = ours.summary.get(name), peer.summary.get(name)
    return one.value / two.value if one and two and two.value else None


def _option(text: str) -> tuple[str, Any]:
    import yaml

    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, TokenFlowError) as error:
        sys.exit(f"{error}")
