"""What one scheduling pass costs, by the number of active requests.

Bursts through the simulator on a memory for about half of them; timed are the passes of a
policy once every request has begun, on the states that the run itself makes.

Run: python benchmarks/scheduler/pass_cost.py [--policy NAMES] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import time
from dataclasses import replace
from statistics import median

from tokenflow.replicas.scheduler.policy import Plan, Policy, View
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.scheduler.slack import SlackPolicy
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import burst, requests

ACTIVE = (50, 100, 200, 400, 1000, 2000, 5000, 10_000)
PASSES = 100
_PATIENCE = 500
"""Passes after which timing begins whatever has begun."""


class Enough(Exception):
    """All passes are timed."""


class Timed:
    """Times passes from the moment everybody has begun, but does not wait for ever."""

    def __init__(self, policy: Policy, active: int) -> None:
        self.name, self.write_through = policy.name, policy.write_through
        self.seconds: list[float] = []
        self._policy, self._active, self._passes = policy, active, 0

    def plan(self, view: View, now: float) -> Plan:
        begun = time.perf_counter()
        plan = self._policy.plan(view, now)
        took = time.perf_counter() - begun
        self._passes += 1
        tracker = view.tracker
        ready = len(tracker) and bool((tracker.generated > 0).all())
        if (ready or self._passes > _PATIENCE) and len(tracker) >= 0.9 * self._active:
            self.seconds.append(took)
        if len(self.seconds) >= PASSES:
            raise Enough
        return plan


def pass_ms(name: str, active: int) -> dict[str, float]:
    """Median and P90 of a pass, milliseconds."""
    machine = replace(
        SETTINGS["h200-a"].machine(),
        kv_tokens=active * 160,
        host_kv_tokens=active * 4096,
        max_num_seqs=min(4096, max(32, active // 2)),
    )
    arrivals = requests(burst(active), 64, 2048, [(20.0, 1.0)], random.Random(1))
    timed = Timed(make_policy(name), active)
    with contextlib.suppress(Enough):
        simulate(machine, timed, arrivals)
    ordered = sorted(timed.seconds)
    return {
        "passes": len(ordered),
        "median_ms": 1e3 * median(ordered),
        "p90_ms": 1e3 * ordered[int(0.9 * len(ordered))],
    }


def plot(path: str, figures: dict[str, dict[int, dict[str, float]]]) -> None:
    """Log-log, with a line of slope 1 for comparison."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "pass-cost"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in figures.items():
        axes.loglog(list(points), [p["median_ms"] for p in points.values()], "o-", label=name)
    own = figures.get("slack")
    if own:
        last = max(own)
        slope = own[last]["median_ms"] / last
        axes.loglog(list(own), [n * slope for n in own], ":", color="grey", label="linear")
    axes.set_xlabel("active requests")
    axes.set_ylabel("median scheduling pass, ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default=SlackPolicy.name)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for name in args.policy.split(","):
        for active in ACTIVE:
            figures.setdefault(name, {})[active] = own = pass_ms(name, active)
            print(
                f"{name:10} {active:6} active: median {own['median_ms']:.3f} ms, "
                f"P90 {own['p90_ms']:.3f} ms of {own['passes']:.0f} passes",
                flush=True,
            )
    if args.json:
        report = {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "pass": figures,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    if args.plot:
        plot(args.plot, figures)


if __name__ == "__main__":
    main()
