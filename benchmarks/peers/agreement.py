"""Whether aiperf, pointed at the same server with the same workload, measures what we measure.

In turns on one server: our run, whose saved workload aiperf then replays. Both send when the
workload says; the text of the prompts is each one's own.

Run (aiperf's environment: sh benchmarks/peers/setup_aiperf.sh VENV):

    python benchmarks/peers/agreement.py --checkpoint CKPT --aiperf-venv VENV --repeats 5 \\
        --out benchmarks/results/agreement
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from servers import PEERS, Server, Setup, running

from tokenflow.loadgen.arrivals import parse_arrivals
from tokenflow.loadgen.description import load_description
from tokenflow.loadgen.lengths import parse_lengths
from tokenflow.loadgen.report import command_line
from tokenflow.loadgen.selftest import Load, stub_process
from tokenflow.loadgen.session import Session
from tokenflow.loadgen.stub import MODEL as STUB_MODEL
from tokenflow.loadgen.workload import Workload, make_workload
from tokenflow.replicas.errors import TokenFlowError

WITHIN = 0.05
COMPARED = {
    "ttft_mean_s": ("time_to_first_token", "avg", 1e-3),
    "ttft_p50_s": ("time_to_first_token", "p50", 1e-3),
    "ttft_p99_s": ("time_to_first_token", "p99", 1e-3),
    "tpot_mean_s": ("inter_token_latency", "avg", 1e-3),
    "e2e_mean_s": ("request_latency", "avg", 1e-3),
    "raw_tok_s": ("output_token_throughput", "avg", 1.0),
    "tokens": ("total_usage_completion_tokens", "avg", 1.0),
}
"""Our figures, and where aiperf has them: metric, statistic, and its unit in ours."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR")
    add("--aiperf-venv", type=Path, required=True, metavar="DIR")
    add("--vllm-venv", type=Path, metavar="DIR")
    add("--server", default="tokenflow", choices=("stub", *PEERS), help="(tokenflow)")
    add("--arrivals", default="poisson:1,duration_s=60", metavar="A")
    add("--input", default="128", metavar="L")
    add("--output", default="128", metavar="L")
    add("--kv-tokens", type=int, default=4096, metavar="N")
    add("--repeats", type=int, default=5, metavar="N")
    add("--seed", type=int, default=1, metavar="N")
    add("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    console = Console(highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    ours: list[dict[str, float | None]] = []
    theirs: list[dict[str, float]] = []
    with serving(args) as server:
        warm_up = describe(args, server, 0) | {"arrivals": {"kind": "burst", "count": 8}}
        asyncio.run(Session(load_description(None, warm_up)).run())
        for i in range(args.repeats):
            seed = args.seed + i
            description = load_description(None, describe(args, server, seed))
            workload = make_workload(description, seed)
            console.print(f"\nrepeat {i + 1} of {args.repeats}")
            session = Session(description, console=console)
            folder = args.out / f"aiperf-{seed}"
            # Each is first as often, since the second finds a server that has just been busy.
            if i % 2:
                theirs.append(replay(args, server, workload, folder))
            asyncio.run(session.run())
            ours.append(session.repeats[0].figures)
            if not i % 2:
                theirs.append(replay(args, server, workload, folder))
    rows = {name: compare(name, ours, theirs) for name in COMPARED}
    console.print(table(rows))
    agree = all(abs(rows[n]["ratio"] - 1) <= WITHIN for n in ("ttft_mean_s", "raw_tok_s"))
    console.print("They agree." if agree else f"They differ by more than {WITHIN:.0%}.")
    summary = {
        "command": command_line(),
        "machine": {"platform": platform.platform(), "cpus": len(os.sched_getaffinity(0))},
        "versions": {
            "tokenflow-serve": version("tokenflow-serve"),
            "aiperf": aiperf(args, "--version").strip(),
        },
        "server": server.name,
        "agree": agree,
        "figures": rows,
        "repeats": {
            "ours": [{name: own[name] for name in COMPARED} for own in ours],
            "aiperf": theirs,
        },
    }
    (args.out / "agreement.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if agree else 1


@contextmanager
def serving(args: argparse.Namespace) -> Iterator[Server]:
    if args.server == "stub":
        with stub_process(Load(token_rate=50.0, each=1), first_s=0.3) as url:
            yield Server("stub", url, STUB_MODEL, True)
        return
    setup = Setup(
        checkpoint=args.checkpoint.resolve(),
        kv_tokens=args.kv_tokens,
        dtype="bfloat16",
        cores=frozenset(os.sched_getaffinity(0)),
        venvs={"vllm": args.vllm_venv},
        logs=args.out.resolve(),
    )
    with running(args.server, setup) as server:
        yield server


def describe(args: argparse.Namespace, server: Server, seed: int) -> dict[str, Any]:
    return {
        "name": "ours",
        "seed": seed,
        "target": {
            "kind": "openai", "url": server.url, "model": server.model, "endpoint": "completions",
            "tokenizer": str(args.checkpoint), "extra_body": {"temperature": 0.0},
        },
        "arrivals": parse_arrivals(args.arrivals).model_dump(),
        "prompt": parse_lengths("--input", args.input).model_dump(),
        "output": parse_lengths("--output", args.output).model_dump(),
        # aiperf declares no reading speed: neither may we, or ours would be held to it.
        "readers": [{"token_rate": "max"}],
    }  # fmt: skip


def replay(
    args: argparse.Namespace, server: Server, workload: Workload, folder: Path
) -> dict[str, float]:
    """aiperf's figures for a workload. Raises RuntimeError when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in workload.to_jsonl().splitlines()]
    for line in lines:
        # With hash_ids it wants a tokenizer from the hub and refuses a local one.
        del line["hash_ids"]
    file = folder / "workload.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    aiperf(
        args, "profile", "--model", server.model, "--url", server.url.removesuffix("/v1"),
        "--endpoint-type", "completions", "--streaming", "--tokenizer", str(args.checkpoint),
        "--use-server-token-count", "--extra-inputs", "ignore_eos:true",
        "--extra-inputs", "temperature:0", "--extra-inputs", "token_rate:max",
        "--input-file", str(file), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule",
        "--random-seed", folder.name.rpartition("-")[2], "--ui", "none",
        "--artifact-dir", str(folder),
    )  # fmt: skip
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    return {
        name: found[metric][statistic] * factor
        for name, (metric, statistic, factor) in COMPARED.items()
    }


def aiperf(args: argparse.Namespace, *words: str) -> str:
    """What it says. It refuses local tokenizers while HF_HUB_OFFLINE is set."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [str(args.aiperf_venv / "bin" / "aiperf"), *words],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"aiperf {words[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def compare(
    name: str, ours: list[dict[str, float | None]], theirs: list[dict[str, float]]
) -> dict[str, float]:
    """Means over the repeats, and the mean of their ratios."""
    pairs = [(own, other[name]) for mine, other in zip(ours, theirs, strict=True)
             if (own := mine[name]) is not None]  # fmt: skip
    return {
        "ours": fmean(own for own, _ in pairs),
        "aiperf": fmean(other for _, other in pairs),
        "ratio": fmean(own / other for own, other in pairs),
    }


def table(rows: dict[str, dict[str, float]]) -> Table:
    shown = Table(title="The same workload, measured by both", title_justify="left")
    for heading in ("", "ours", "aiperf", "ratio"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        shown.add_row(name, *(f"{row[key]:.4g}" for key in ("ours", "aiperf", "ratio")))
    return shown


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, TokenFlowError) as error:
        sys.exit(f"{error}")
