"""How far halving or doubling each tunable of the default policy moves effective throughput.

Run: python benchmarks/scheduler/sensitivity.py [--setting NAMES] [--seed N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from tokenflow.replicas.scheduler.slack import SlackParams, SlackPolicy
from tokenflow.replicas.simulator.bounds import bounds
from tokenflow.replicas.simulator.jobs import Job, results
from tokenflow.replicas.simulator.settings import SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", default=",".join(SETTINGS))
    parser.add_argument("--seed", type=int, default=201)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    variants: dict[str, dict[str, float]] = {"default": {}}
    for name, value in asdict(SlackParams()).items():
        variants[f"{name} / 2"] = {name: type(value)(value / 2)}
        variants[f"{name} * 2"] = {name: value * 2}
    jobs, labels = [], []
    for setting in args.setting.split(","):
        machine = SETTINGS[setting].machine()
        arrivals = SETTINGS[setting].arrivals(args.seed, [(20.0, 1.0)], 60.0)
        limit = bounds(machine, arrivals)
        for label, params in variants.items():
            job = Job(setting, SlackPolicy.name, args.seed, machine, arrivals, limit, False, params)
            jobs.append(job)
            labels.append((setting, label))
    rows: dict[str, dict[str, float]] = {}
    with results(jobs, args.jobs) as finished:
        for (setting, label), (run, _) in zip(labels, finished, strict=True):
            rows.setdefault(setting, {})[label] = run.figures["effective_tok_s"]
            default = rows[setting]["default"]
            change = rows[setting][label] / default - 1
            print(f"{setting:10} {label:24} {rows[setting][label]:7.0f} {change:+.1%}", flush=True)
    worst = max(abs(v / own["default"] - 1) for own in rows.values() for v in own.values())
    print(f"largest change: {worst:.1%}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"seed": args.seed, "effective_tok_s": rows}, file, indent=1)


if __name__ == "__main__":
    main()
