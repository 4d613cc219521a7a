"""`tokenflow simulate`: the paper's settings, or a trace, through the shipped engine, beside their
bounds."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenflow.loadgen.traces import load_trace
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator import plots
from tokenflow.replicas.simulator.bounds import Bounds, bounds
from tokenflow.replicas.simulator.calibration import Calibration
from tokenflow.replicas.simulator.jobs import Job, Run, results
from tokenflow.replicas.simulator.replay import Replay, parse_machine, replay_machine
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.settings import SETTINGS, Setting

_SETTING: dict[str, Any] = {"setting": "rtx4090-a", "duration": 60.0}
_TRACE: dict[str, Any] = {
    "trace_start": 0.0,
    "time_scale": 1.0,
    "machine": "h200:qwen2.5-32b",
    "memory_fraction": 0.9,
}
"""What flags are when they are not given: without a trace, and with one."""


@dataclass(frozen=True, slots=True)
class Case:
    """A workload and the machine it runs on under each policy."""

    workload: Setting | Replay
    machine: Callable[[str], Machine]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow simulate`."""
    add = parser.add_argument
    add(
        "--setting",
        metavar="NAMES",
        help=f"comma-separated, or all: {', '.join(SETTINGS)} ({_SETTING['setting']})",
    )
    add(
        "--policy",
        default="all",
        metavar="NAMES",
        help=f"comma-separated, or all: {', '.join(sorted(POLICIES))} (all)",
    )
    add(
        "--rates",
        default="20",
        metavar="R[@SHARE],...",
        help="reading speeds in tokens/s with their shares, as 15@0.4,20@0.6; max = no reader (20)",
    )
    add(
        "--limit-factor",
        type=float,
        default=1.0,
        metavar="X",
        help="requests may have X times the tokens that they end with (1)",
    )
    add("--seeds", type=int, default=1, metavar="N", help="how many seeds (1)")
    add("--seed-base", type=int, default=1, metavar="N", help="the first of them (1)")
    add(
        "--duration",
        type=float,
        metavar="S",
        help=f"seconds of Poisson arrivals ({_SETTING['duration']:g}) or of the trace (all)",
    )
    add("--trace", metavar="FILE", help="replay the requests of this CSV file instead")
    add(
        "--trace-start",
        type=float,
        metavar="S",
        help="from this second after its first row on (0)",
    )
    add(
        "--time-scale",
        type=float,
        metavar="X",
        help="arrival times times X; 0.5 is twice the load (1)",
    )
    add(
        "--machine",
        metavar="GPU:MODEL|FILE",
        help=f"what the trace is replayed on ({_TRACE['machine']}); or, for settings too, what "
        "`tokenflow calibrate` wrote to FILE",
    )
    add(
        "--memory-fraction",
        type=float,
        metavar="X",
        help=f"of the GPU, for weights and KV ({_TRACE['memory_fraction']})",
    )
    add(
        "--param",
        action="append",
        default=[],
        metavar="POLICY.NAME=X",
        help="a parameter of a policy; may be repeated",
    )
    add(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=X",
        help="an option of the engine, as offload=false; may be repeated",
    )
    add("--jobs", type=int, default=1, metavar="N", help="worker processes (1)")
    add("--plots", metavar="DIR", help="also write plots of the first seed to DIR, as SVG")
    add("--json", metavar="FILE", help="also write all figures to FILE")


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Raises ConfigError for unknown names and values that make no run."""
    console = console or Console(highlight=False)
    policies = _names("--policy", args.policy, POLICIES)
    rates = parse_rates(args.rates)
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {args.seeds}.")
    if args.seed_base < 0:
        raise ConfigError(f"--seed-base must be at least 0, got {args.seed_base}.")
    if not 1 <= args.limit_factor <= 1000:
        raise ConfigError(f"--limit-factor must be between 1 and 1000, got {args.limit_factor}.")
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {args.jobs}.")
    if args.duration is not None and not 1 <= args.duration <= 86_400:
        raise ConfigError(f"--duration must be between 1 and 86400 s, got {args.duration}.")
    params, engine = parse_params(args.param, policies), parse_engine(args.engine)
    cases = _cases(args, console)
    folder = _plot_folder(args.plots) if args.plots else None
    jobs = [
        job
        for case in cases
        for seed in range(args.seed_base, args.seed_base + args.seeds)
        for job in _jobs(case, policies, seed, rates, args, folder is not None)
    ]
    for job in jobs:
        job.params.update(params.get(job.policy, {}))
        job.engine.update(engine)
    runs: list[Run] = []
    with results(jobs, args.jobs) as finished:
        for case in cases:
            own: list[Run] = []
            drawn: dict[str, plots.PlotData] = {}
            for _ in range(args.seeds * len(policies)):
                done, data = next(finished)
                own.append(done)
                if data is not None:
                    drawn[done.policy] = data
            name = case.workload.name
            console.print(table(name, own))
            if folder is not None:
                write_plots(folder, name, drawn, own[0].bounds)
            runs += own
    if folder is not None:
        write_effective(folder / "effective.svg", runs)
    if args.json:
        write_json(args.json, args, runs)
    return 0


def _cases(args: argparse.Namespace, console: Console) -> list[Case]:
    """What is to be run. Fills in the flags that were not given."""
    calibration = None
    if args.machine is not None and Path(args.machine).suffix == ".json":
        calibration = Calibration.load(args.machine)
        if args.memory_fraction is not None:
            raise ConfigError("--memory-fraction is part of the calibration; leave it out.")
    if args.trace is None:
        for name in _TRACE:
            if getattr(args, name) is not None and not (name == "machine" and calibration):
                raise ConfigError(f"--{name.replace('_', '-')} needs --trace.")
    elif args.setting is not None:
        raise ConfigError("--setting and --trace exclude each other; leave one out.")
    for name, default in (_SETTING if args.trace is None else _TRACE).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.trace is None:
        settings = [SETTINGS[name] for name in _names("--setting", args.setting, SETTINGS)]
        if calibration is not None:
            return [Case(setting, calibration.machine) for setting in settings]
        return [_fixed(setting, setting.machine()) for setting in settings]
    if not 0 < args.memory_fraction <= 1:
        raise ConfigError(
            f"--memory-fraction must be above 0 and at most 1, got {args.memory_fraction}."
        )
    trace = load_trace(
        args.trace,
        start_s=args.trace_start,
        duration_s=math.inf if args.duration is None else args.duration,
        time_scale=args.time_scale,
    )
    replay = Replay(args.trace, trace.rows)
    if calibration is not None:
        case = Case(replay, calibration.machine)
        where, kv_tokens = args.machine, calibration.kv_tokens
    else:
        gpu, model = parse_machine(args.machine)
        machine = replay_machine(gpu, model, args.memory_fraction)
        case = _fixed(replay, machine)
        where, kv_tokens = f"{gpu.name} with {model.name}", machine.kv_tokens
    replay.check(kv_tokens, where)
    console.print(
        f"{len(trace.rows)} requests of {args.trace} ({trace.failed} that failed are left out) "
        f"on {where}: {kv_tokens} KV tokens",
        markup=False,
    )
    return [case]


def _fixed(workload: Setting | Replay, machine: Machine) -> Case:
    """The same machine whatever the policy."""
    return Case(workload, lambda _: machine)


def _jobs(
    case: Case,
    policies: Seq[str],
    seed: int,
    rates: Seq[tuple[float, float]],
    args: argparse.Namespace,
    plotted: bool,
) -> list[Job]:
    """The runs of a case with one seed; those of the first are plotted."""
    name = case.workload.name
    arrivals = case.workload.arrivals(seed, rates, args.duration)
    if not arrivals:
        raise ConfigError(f"{name}: no request arrives in {args.duration:g} s.")
    longest = max(a.prompt_tokens + a.output_tokens for a in arrivals)
    machines = [case.machine(policy) for policy in policies]
    if longest > machines[0].kv_tokens:
        raise ConfigError(
            f"{name}: a request of {longest} tokens does not fit into the "
            f"{machines[0].kv_tokens} KV tokens of {args.machine}."
        )
    arrivals = [
        replace(
            a,
            max_tokens=min(
                round(args.limit_factor * a.output_tokens),
                machines[0].kv_tokens - a.prompt_tokens,
            ),
        )
        for a in arrivals
    ]
    limits = {machine: bounds(machine, arrivals) for machine in machines}
    first = seed == args.seed_base
    return [
        Job(name, policy, seed, machine, arrivals, limits[machine], plotted and first)
        for policy, machine in zip(policies, machines, strict=True)
    ]


def table(title: str, runs: Seq[Run]) -> Table:
    """The policies of one setting, means over the seeds, each with its fraction of the bounds."""
    shown = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    spread = len({r.seed for r in runs}) > 1
    headings = ["effective\ntok/s", "raw\ntok/s", "TTFT\nmean, s", "TTFT\nP99, s"]
    headings += ["dry,\nall, s", "dry,\nP99, s", "preemp-\ntions"]
    if spread:
        headings.insert(1, "effective\nmin-max")
    for heading in ("", *headings):
        shown.add_column(heading, justify="right" if heading else "left")
    limits = [r.bounds for r in runs]
    shown.add_row(
        "bound",
        f"{mean(b.effective_tok_s for b in limits):.0f}",
        *([""] if spread else []),
        f"{mean(b.raw_tok_s for b in limits):.0f}",
        f"{mean(b.ttft_mean_s for b in limits):.2f}",
        f"{mean(b.ttft_p99_s for b in limits):.2f}",
        "0",
        "0",
    )
    shown.add_row(
        "paced bound", f"{mean(b.paced_effective_tok_s for b in limits):.0f}", end_section=True
    )
    for policy in dict.fromkeys(r.policy for r in runs):
        own = [r for r in runs if r.policy == policy]

        def average(key: str, own: Seq[Run] = own) -> float:
            return mean(r.figures[key] for r in own)

        effective = mean(r.figures["effective_tok_s"] / r.bounds.effective_tok_s for r in own)
        paced = mean(r.figures["effective_tok_s"] / r.bounds.paced_effective_tok_s for r in own)
        raw = mean(r.figures["raw_tok_s"] / r.bounds.raw_tok_s for r in own)
        seen = [r.figures["effective_tok_s"] for r in own]
        shown.add_row(
            policy,
            f"{average('effective_tok_s'):.0f} ({effective:.2f}, {paced:.2f})",
            *([f"{min(seen):.0f}-{max(seen):.0f}"] if spread else []),
            f"{average('raw_tok_s'):.0f} ({raw:.2f})",
            f"{average('ttft_mean_s'):.2f}",
            f"{average('ttft_p99_s'):.2f}",
            f"{average('stall_s'):.0f}",
            f"{average('stall_p99_s'):.1f}",
            f"{average('preemptions'):.0f}",
        )
    return shown


def _plot_folder(name: str) -> Path:
    """The folder, made when missing, before anything is run. Raises ConfigError."""
    plots.check()
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots: cannot make {name}: {error.strerror}.") from None
    return folder


def write_plots(folder: Path, name: str, runs: dict[str, plots.PlotData], limit: Bounds) -> None:
    """The plots of one setting. Raises ConfigError when they cannot be written."""
    plots.ttft(folder / f"{name}-ttft.svg", name, runs, limit.ttft_p99_s)
    plots.queue(folder / f"{name}-queue.svg", name, runs)
    plots.timelines(folder / f"{name}-timelines.svg", name, runs)


def write_effective(path: Path, runs: Seq[Run]) -> None:
    """The effective throughput of all settings, means over the seeds. Raises ConfigError when it
    cannot be written."""
    groups: dict[str, dict[str, plots.Bar]] = {}
    limits = {}
    for setting in dict.fromkeys(r.setting for r in runs):
        own = [r for r in runs if r.setting == setting]
        limits[setting] = mean(r.bounds.effective_tok_s for r in own)
        groups[setting] = {}
        for policy in dict.fromkeys(r.policy for r in own):
            seen = [r.figures["effective_tok_s"] for r in own if r.policy == policy]
            raw = mean(r.figures["raw_tok_s"] for r in own if r.policy == policy)
            groups[setting][policy] = plots.Bar(mean(seen), min(seen), max(seen), raw)
    plots.effective(path, groups, limits)


def parse_rates(text: str) -> list[tuple[float, float]]:
    """ "15@0.4,20@0.6" as (tokens/s, weight). Raises ConfigError."""
    rates = []
    for part in text.split(","):
        rate, _, share = part.partition("@")
        try:
            weight = float(share) if share else 1.0
            pair = (math.inf if rate == "max" else float(rate), weight)
        except ValueError:
            raise ConfigError(f"--rates: {part!r} is not RATE or RATE@SHARE.") from None
        allowed = rate == "max" or 0.01 <= pair[0] <= 1000
        if not allowed or not 0 < pair[1] <= 1e6:
            raise ConfigError(f"--rates: {part!r} has a rate outside 0.01 to 1000, or no share.")
        rates.append(pair)
    return rates


def parse_params(texts: Seq[str], policies: Seq[str]) -> dict[str, dict[str, float]]:
    """ "slack.margin_s=2" as parameters by policy. Raises ConfigError."""
    params: dict[str, dict[str, float]] = {}
    for text in texts:
        name, _, value = text.partition("=")
        policy, _, key = name.partition(".")
        if policy not in policies:
            raise ConfigError(f"--param: {text!r} names no policy of this run.")
        try:
            params.setdefault(policy, {})[key] = float(value)
        except ValueError:
            raise ConfigError(f"--param: {text!r} is not POLICY.NAME=NUMBER.") from None
    for policy, values in params.items():
        make_policy(policy, values)
    return params


def parse_engine(texts: Seq[str]) -> dict[str, Any]:
    """ "offload=false" as fields of EngineConfig. Raises ConfigError."""
    values = {name: value for name, _, value in (text.partition("=") for text in texts)}
    try:
        checked = EngineConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--engine: {where}: {first['msg']}.") from None
    return {name: getattr(checked, name) for name in values}


def write_json(path: str, args: argparse.Namespace, runs: Seq[Run]) -> None:
    """All runs with what made them. Raises ConfigError when the file cannot be written."""
    arguments = {
        key: getattr(args, key)
        for key in (
            "setting",
            "trace",
            "policy",
            "rates",
            "limit_factor",
            "param",
            "engine",
            "duration",
            *_TRACE,
        )
    }
    if args.trace is not None:
        arguments["trace"] = Path(args.trace).name
    if args.machine is not None:
        arguments["machine"] = Path(args.machine).name
    report: dict[str, Any] = {
        "arguments": arguments,
        "seeds": sorted({r.seed for r in runs}),
        "machine": {
            "system": platform.system(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "numpy")},
        },
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
