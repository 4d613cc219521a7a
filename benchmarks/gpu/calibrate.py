"""The simulator's cost model of this machine from the real engine, and its error on the paper's
settings as `paper.py` ran them.

`calibrate.py` runs the probe (minutes, on the device) and writes `gpu-calibration.json`.
`calibrate.py --compare` needs no device: it simulates every run found in `gpu-paper-*.json` with
that calibration and reports the error of each figure.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Run, machine, parser, versions
from paper import POLICIES, arrivals, figures

from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.calibration import Calibration, calibrate
from tokenflow.replicas.simulator.live import Bench
from tokenflow.replicas.simulator.probe import probe
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS

_HOST_KV_TOKENS = 1 << 16
"""Enough for the probe; the runs that are compared say what they had."""
_MARGIN_S = 15.0
"""Rounds of the grid are not cut off."""

COMPARED = ("duration_s", "raw_tok_s", "effective_tok_s", "ttft_mean_s", "ttft_p99_s", "stall_s")


def measure(run: Run, path: Path) -> None:
    setting = SETTINGS["h200-a"]
    tiny = run.args.tiny
    config = run.config(
        kv_tokens=1024 if tiny else setting.kv_tokens,
        max_num_seqs=16 if tiny else setting.machine().max_num_seqs,
        max_batch_tokens=64 if tiny else setting.machine().max_batch_tokens,
    )
    bench = Bench(run.args.model, config, host_kv_tokens=4096 if tiny else _HOST_KV_TOKENS)
    try:
        seen = probe(
            bench,
            POLICIES[:2] if tiny else POLICIES,
            seconds=5.0 if tiny else max(20.0, run.seconds_left - _MARGIN_S),
            seed=1,
        )
        found = calibrate(
            seen,
            layout=bench.layout,
            kv_tokens=bench.executor.num_blocks * config.block_size,
            host_kv_tokens=bench.host_slots * config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            about={"machine": machine(), "versions": versions(), "model": {"name": run.args.model}},
        )
    finally:
        bench.close()
    found.save(path)
    run.keep("cost", found.model_dump()["cost"])
    run.keep("accuracy", found.accuracy.model_dump())
    run.keep("link, GB/s", {"to host": found.to_host_gb_s, "to device": found.to_device_gb_s})


def compare(run: Run, path: Path) -> None:
    calibration = Calibration.load(path)
    for letter in "abcd":
        file = Path(run.args.out) / f"gpu-paper-{letter}.json"
        if not file.exists():
            run.keep(f"{letter}", "no runs to compare with")
            continue
        report = json.loads(file.read_text())["results"]
        for key, real in report.items():
            policy, _, rest = key.partition(", ")
            if policy == "setting" or policy not in calibration.overheads:
                continue
            settings = report[f"setting, {rest}"]
            seed, duration = settings["seed"], settings["poisson_s"]
            machine_of = replace(
                calibration.machine(policy),
                kv_tokens=settings["kv_tokens"],
                host_kv_tokens=settings["host_kv_tokens"],
            )
            load = arrivals(letter, seed, duration, scale=settings["scale"], tiny="tiny" in rest)
            outcome = simulate(machine_of, make_policy(policy), load)
            predicted = figures(outcome.records, outcome.stats)
            run.keep(f"{letter}, {policy}", _errors(real, predicted))


def _errors(real: dict[str, float], predicted: dict[str, float]) -> dict[str, Any]:
    """Relative to the real figure, signed; None where that is zero."""
    return {name: (predicted[name] / real[name] - 1 if real[name] else None) for name in COMPARED}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--compare", action="store_true", help="with the runs of paper.py")
    args = flags.parse_args()
    path = Path(args.out) / "gpu-calibration.json"
    if args.compare:
        # Nothing is run on a device.
        args.device = "cpu"
        compare(Run.start(args, "simulated"), path)
    else:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        measure(Run.start(args, "calibrate"), path)


if __name__ == "__main__":
    main()
