"""Two tenants on one simulated GPU, one of which floods it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tokenflow.loadgen.metrics import percentile
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

MACHINE = SETTINGS["rtx4090-a"].machine()
RATES = [(20.0, 1.0)]


def quiet(seed: int) -> list[Arrival]:
    """A tenant that asks for less than half of what the device can give."""
    rng = random.Random(seed)
    arrivals = requests(poisson(0.6, 60.0, rng), 512, 300, RATES, rng)
    return [replace(a, at_s=a.at_s + 5.0, tenant="quiet") for a in arrivals]


def flood(tenant: str) -> list[Arrival]:
    rng = random.Random(99)
    arrivals = requests(burst(300), 512, 300, RATES, rng)
    return [replace(a, tenant=tenant) for a in arrivals]


def ttft_p99_s(seed: int, flooding: list[Arrival]) -> float:
    """Of the quiet tenant."""
    arrivals = sorted([*flooding, *quiet(seed)], key=lambda a: a.at_s)
    records = simulate(MACHINE, make_policy("slack"), arrivals).records
    ours = {a.at_s for a in quiet(seed)}
    times = [
        r.first_token_s - r.intended_s
        for r, a in zip(records, arrivals, strict=True)
        if a.at_s in ours and r.first_token_s is not None
    ]
    assert len(times) == len(ours)
    return percentile(times, 99)


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_of_another_tenant_is_hardly_felt(seed):
    alone = ttft_p99_s(seed, [])
    beside = ttft_p99_s(seed, flood("other"))
    behind = ttft_p99_s(seed, flood("quiet"))
    print(f"P99 TTFT {alone:.3f} s alone, {beside:.3f} s beside a flood, {behind:.3f} s behind one")
    assert beside <= 2 * alone
    assert behind > 100 * alone
