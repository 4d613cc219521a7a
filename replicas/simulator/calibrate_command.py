"""`tokenflow calibrate`: measure this machine, and say how well its simulation predicts it."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence as Seq
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.calibration import Accuracy, Calibration, calibrate
from tokenflow.replicas.simulator.live import Bench
from tokenflow.replicas.simulator.probe import probe
from tokenflow.replicas.simulator.validation import Comparison, validate, workload

POLICIES = ("slack", "tokenflow", "fcfs")
"""What is measured, beside the configured policy: the default, the paper's and the baseline."""
_HOST_SHARE = 8
"""Host memory of the probe, as a multiple of the device's."""
_NAMES = {
    "makespan_s": ("makespan, s", "{:.2f}"),
    "raw_tok_s": ("raw tok/s", "{:.0f}"),
    "effective_tok_s": ("effective tok/s", "{:.0f}"),
    "ttft_mean_s": ("TTFT mean, s", "{:.3f}"),
    "ttft_p99_s": ("TTFT P99, s", "{:.3f}"),
    "stall_s": ("dry, s", "{:.2f}"),
    "preemptions": ("preemptions", "{:.0f}"),
    "steps": ("steps", "{:.0f}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow calibrate`."""
    parser.add_argument(
        "--out", default="calibration.json", metavar="FILE", help="(calibration.json)"
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="then run a burst for real under each policy and compare with its simulation "
        "(FILE-validation.json)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration, as of serve")
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="device KV memory in tokens, where the configuration has none (4096)",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="length of the probe (60)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of all requests (1)")


def run(
    args: argparse.Namespace,
    config: EngineConfig,
    model: str | Path,
    console: Console | None = None,
) -> int:
    """Raises ConfigError for values that make no calibration, CheckpointError for a bad model."""
    console = console or Console(highlight=False)
    if not 1 <= args.seconds <= 3600:
        raise ConfigError(f"--seconds must be between 1 and 3600, got {args.seconds}.")
    out = Path(args.out)
    validation_out = out.with_name(f"{out.stem}-validation{out.suffix}")
    for path in (out, validation_out) if args.validate else (out,):
        _check_writable(path)
    if config.kv_tokens is None:
        raise ConfigError("engine.kv_tokens: calibration needs a number.")
    policies = list(dict.fromkeys((config.policy, *POLICIES)))
    bench = Bench(model, config, host_kv_tokens=_HOST_SHARE * config.kv_tokens)
    try:
        console.print(
            f"Running {bench.spec.name} on {bench.device} for about {args.seconds:.0f} s..."
        )
        seen = probe(bench, policies, seconds=args.seconds, seed=args.seed)
        calibration = calibrate(
            seen,
            layout=bench.layout,
            kv_tokens=bench.executor.num_blocks * config.block_size,
            host_kv_tokens=bench.host_slots * config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            about=_about(bench, args),
        )
        calibration.save(out)
        console.print(coefficients(calibration))
        if args.validate:
            # Requests that the probe has not seen.
            arrivals = workload(calibration, bench.spec.max_model_len, args.seed + 1)
            found = [
                validate(bench, calibration, policy, arrivals, seed=args.seed + 1)
                for policy in policies
            ]
            for comparison in found:
                console.print(table(comparison))
            _write(validation_out, _report(calibration, arrivals, found))
    finally:
        bench.close()
    return 0


def coefficients(calibration: Calibration) -> Table:
    """The cost model, in microseconds."""
    accuracy = calibration.accuracy
    shown = Table(
        title=f"What a step takes: {_quality(accuracy)}",
        title_justify="left",
    )
    shown.add_column("")
    shown.add_column("µs", justify="right")
    cost = asdict(calibration.cost)
    for name, text in (
        ("fixed_s", "step"),
        ("decode_s", "decoding sequence"),
        ("context_s", "token of context read"),
        ("padded_s", "token of context, padded"),
        ("prefill_s", "prompt token"),
        ("score_s", "query-key pair"),
        ("chunk_s", "prefill"),
        ("large_s", "square of prompt tokens"),
    ):
        shown.add_row(text, f"{cost[name] * 1e6:.4g}")
    for policy, overhead in calibration.overheads.items():
        shown.add_row(f"engine under {policy}, step", f"{overhead.step_s * 1e6:.4g}")
        shown.add_row(f"engine under {policy}, sequence", f"{overhead.sequence_s * 1e6:.4g}")
    shown.add_row("mean over typical", f"x {calibration.cost.stretch:.3f}")
    shown.add_row("to the host, GB/s", f"{calibration.to_host_gb_s:.2f}")
    shown.add_row("to the device, GB/s", f"{calibration.to_device_gb_s:.2f}")
    return shown


def table(comparison: Comparison) -> Table:
    """Real and predicted figures of one policy."""
    shown = Table(title=f"{comparison.policy}: {_quality(comparison.steps)}", title_justify="left")
    shown.add_column("")
    for heading in ("real", "predicted", "error"):
        shown.add_column(heading, justify="right")
    for name, figure in comparison.figures.items():
        text, form = _NAMES[name]
        error = "" if figure.error is None else f"{figure.error:+.1%}"
        shown.add_row(text, form.format(figure.real), form.format(figure.predicted), error)
    return shown


def _quality(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.steps} steps, error of one: median {accuracy.median:.1%}, P90 "
        f"{accuracy.p90:.1%}; core ours {accuracy.cpu_share:.0%}"
    )


def _report(calibration: Calibration, arrivals: Seq[Any], found: Seq[Comparison]) -> dict[str, Any]:
    return {
        "about": calibration.about,
        "requests": len(arrivals),
        "kv_tokens": calibration.kv_tokens,
        "arrivals": [asdict(a) for a in arrivals],
        "policies": {
            c.policy: {
                "figures": {
                    name: {"real": f.real, "predicted": f.predicted, "error": f.error}
                    for name, f in c.figures.items()
                },
                "single_steps": c.steps.model_dump(),
            }
            for c in found
        },
    }


def _about(bench: Bench, args: argparse.Namespace) -> dict[str, dict[str, str | int | float]]:
    spec = bench.spec
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "device": bench.device,
            "torch_threads": bench.threads,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "torch", "transformers")},
        },
        "model": {
            "name": spec.name,
            "architecture": spec.architecture,
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "heads": spec.num_heads,
            "vocab_size": spec.vocab_size,
            "weight_bytes": spec.weight_bytes,
            "dtype": spec.dtype,
        },
        "probe": {"seconds": args.seconds, "seed": args.seed},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _check_writable(path: Path) -> None:
    """Before a minute of measuring rather than after it."""
    existed = path.exists()
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror}.") from None
    if not existed:
        path.unlink()


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None
