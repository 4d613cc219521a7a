"""`tokenflow simulate`: the paper's settings through the shipped engine, beside their bounds."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator.bounds import Bounds, bounds
from tokenflow.replicas.simulator.run import Outcome, simulate
from tokenflow.replicas.simulator.settings import SETTINGS


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one setting with one seed."""

    setting: str
    policy: str
    seed: int
    bounds: Bounds
    figures: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow simulate`."""
    parser.add_argument(
        "--setting",
        default="rtx4090-a",
        metavar="NAMES",
        help=f"comma-separated, or all: {', '.join(SETTINGS)} (rtx4090-a)",
    )
    parser.add_argument(
        "--policy",
        default="all",
        metavar="NAMES",
        help=f"comma-separated, or all: {', '.join(sorted(POLICIES))} (all)",
    )
    parser.add_argument(
        "--rates",
        default="20",
        metavar="R[@SHARE],...",
        help="reading speeds in tokens/s with their shares, as 15@0.4,20@0.6 (20)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs with seeds 1 to N (1)"
    )
    parser.add_argument(
        "--duration", type=float, default=60.0, metavar="S", help="seconds of Poisson arrivals (60)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures to FILE")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Raises ConfigError for unknown names and values that make no run."""
    console = console or Console(highlight=False)
    settings = _names("--setting", args.setting, SETTINGS)
    policies = _names("--policy", args.policy, POLICIES)
    rates = parse_rates(args.rates)
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {args.seeds}.")
    if not 1 <= args.duration <= 86_400:
        raise ConfigError(f"--duration must be between 1 and 86400 s, got {args.duration}.")
    runs: list[Run] = []
    for name in settings:
        setting = SETTINGS[name]
        for seed in range(1, args.seeds + 1):
            arrivals = setting.arrivals(seed, rates, args.duration)
            if not arrivals:
                raise ConfigError(f"{name}: no request arrives in {args.duration:g} s.")
            limit = bounds(setting.machine(), arrivals)
            for policy in policies:
                outcome = simulate(setting.machine(), make_policy(policy), arrivals)
                runs.append(Run(name, policy, seed, limit, figures(outcome)))
        console.print(table(name, [r for r in runs if r.setting == name]))
    if args.json:
        write_json(args.json, args, runs)
    return 0


def figures(outcome: Outcome) -> dict[str, float]:
    """What is reported of a run."""
    stats = outcome.stats
    return {
        **outcome.summary.to_dict(),
        "preemptions": stats.preemptions,
        "resumes": stats.resumes,
        "recomputed_tokens": stats.recomputed_tokens,
        "offloaded_bytes": stats.offloaded_bytes,
        "loaded_bytes": stats.loaded_bytes,
        "device_busy_s": outcome.busy_s,
    }


def table(title: str, runs: Seq[Run]) -> Table:
    """The policies of one setting, means over the seeds, each with its fraction of the bound."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for heading in ("effective tok/s", "raw tok/s", "TTFT mean, s", "TTFT P99, s", "dry, s"):
        shown.add_column(heading, justify="right")
    shown.add_column("preemptions", justify="right")
    limits = [r.bounds for r in runs]
    shown.add_row(
        "bound",
        f"{mean(b.effective_tok_s for b in limits):.0f}",
        f"{mean(b.raw_tok_s for b in limits):.0f}",
        f"{mean(b.ttft_mean_s for b in limits):.2f}",
        f"{mean(b.ttft_p99_s for b in limits):.2f}",
        "0",
        "",
        end_section=True,
    )
    for policy in dict.fromkeys(r.policy for r in runs):
        own = [r for r in runs if r.policy == policy]

        def average(key: str, own: Seq[Run] = own) -> float:
            return mean(r.figures[key] for r in own)

        effective = mean(r.figures["effective_tok_s"] / r.bounds.effective_tok_s for r in own)
        raw = mean(r.figures["raw_tok_s"] / r.bounds.raw_tok_s for r in own)
        shown.add_row(
            policy,
            f"{average('effective_tok_s'):.0f} ({effective:.2f})",
            f"{average('raw_tok_s'):.0f} ({raw:.2f})",
            f"{average('ttft_mean_s'):.2f}",
            f"{average('ttft_p99_s'):.2f}",
            f"{average('stall_s'):.0f}",
            f"{average('preemptions'):.0f}",
        )
    return shown


def parse_rates(text: str) -> list[tuple[float, float]]:
    """ "15@0.4,20@0.6" as (tokens/s, weight). Raises ConfigError."""
    rates = []
    for part in text.split(","):
        rate, _, share = part.partition("@")
        try:
            pair = (float(rate), float(share) if share else 1.0)
        except ValueError:
            raise ConfigError(f"--rates: {part!r} is not RATE or RATE@SHARE.") from None
        if not 0.01 <= pair[0] <= 1000 or not 0 < pair[1] <= 1e6:
            raise ConfigError(f"--rates: {part!r} has a rate outside 0.01 to 1000, or no share.")
        rates.append(pair)
    return rates


def write_json(path: str, args: argparse.Namespace, runs: Seq[Run]) -> None:
    """All runs with what made them. Raises ConfigError when the file cannot be written."""
    report: dict[str, Any] = {
        "arguments": {
            key: getattr(args, key) for key in ("setting", "policy", "rates", "seeds", "duration")
        },
        "python": platform.python_version(),
        "runs": [asdict(r) for r in runs],
    }
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}.") from None


def _names(flag: str, text: str, known: Any) -> list[str]:
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag}: unknown name {name!r}; known are {', '.join(known)}.")
    return names
