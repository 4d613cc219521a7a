"""What one choice costs: microseconds by router and number of replicas, the registry's part
included, in bursts of which nothing new is heard.

Run: python benchmarks/cluster/router_cost.py [--replicas N,...] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

from bursts import write

from tokenflow.cluster.locality import prefix_keys
from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.routing import ROUTERS, Ask
from tokenflow.replicas.load import LoadReport


def cost_us(router: str, replicas: int, choices: int, seed: int) -> float:
    """Median over five rounds of the mean of a choice and the end of its request."""
    registry = ReplicaRegistry(rng=random.Random(seed), router=router)
    names = [f"{i}" for i in range(replicas)]
    registry.update(dict.fromkeys(names, ""))
    rng = random.Random(seed)
    rounds = []
    for number in range(5):
        for name in names:
            load = LoadReport(
                number=number + 1,
                active=rng.randrange(50),
                queued_tokens=rng.randrange(5000),
                remaining_tokens=10_000,
                expected_output=200,
                kv_tokens=50_000,
                memory_tokens=1_000_000,
                rate=rng.uniform(0, 2000),
                capacity=2000.0,
                prefill_s=1e-4,
            )
            registry.report(name, load)
        begun = time.perf_counter()
        for i in range(choices):
            registry.assign(f"{number} {i}", Ask(500, 300, 20.0), names)
        for i in range(choices):
            registry.finish(f"{number} {i}")
        rounds.append((time.perf_counter() - begun) / choices)
    return 1e6 * median(rounds)


def keys_us(tokens: int, rounds: int = 200) -> float:
    """The names of a prompt's prefixes, of which one choice makes as many."""
    text = list(range(tokens))
    begun = time.perf_counter()
    for _ in range(rounds):
        prefix_keys(text)
    return 1e6 * (time.perf_counter() - begun) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", default="8,32,100,320,1000")
    parser.add_argument("--choices", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    counts = [int(n) for n in args.replicas.split(",")]
    costs: dict[str, dict[str, float]] = {}
    print("replicas".ljust(16), *(f"{n:>8}" for n in counts))
    for router in ROUTERS:
        costs[router] = {f"{n}": cost_us(router, n, args.choices, args.seed) for n in counts}
        print(router.ljust(16), *(f"{us:8.1f}" for us in costs[router].values()), flush=True)
    keys = {f"{tokens}": keys_us(tokens) for tokens in (500, 4000, 32_000)}
    print("prefix keys, us by prompt tokens:", {k: round(v) for k, v in keys.items()})
    write(args.json, {"arguments": vars(args), "choice_us": costs, "prefix_keys_us": keys})


if __name__ == "__main__":
    main()
