"""Both bounds on effective throughput in every setting, means over seeds, without running anything.

Run: python benchmarks/scheduler/bounds.py [--seeds N] [--seed-base N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from statistics import mean

from tokenflow.replicas.simulator.bounds import bounds
from tokenflow.replicas.simulator.settings import SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-base", type=int, default=101)
    parser.add_argument("--json")
    args = parser.parse_args()
    seeds = range(args.seed_base, args.seed_base + args.seeds)
    found: dict[str, list[dict[str, float]]] = {}
    for name, setting in SETTINGS.items():
        machine = setting.machine()
        limits = [bounds(machine, setting.arrivals(s, [(20.0, 1.0)], 60.0)) for s in seeds]
        found[name] = [asdict(limit) for limit in limits]
        effective = mean(limit.effective_tok_s for limit in limits)
        paced = mean(limit.paced_effective_tok_s for limit in limits)
        print(f"{name:10} bound {effective:5.0f}, paced {paced:5.0f} effective tok/s", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"seeds": list(seeds), "bounds": found}, file, indent=1)


if __name__ == "__main__":
    main()
