"""Tenants on one simulated device: one is being served when one or two others flood it.

(A tenant that is not there yet when the flood comes may find a longer step under way.)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest

from tokenflow.loadgen.metrics import percentile
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.calibration import CalibratedCost
from tokenflow.replicas.simulator.run import Machine, simulate
from tokenflow.replicas.simulator.settings import SETTINGS
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

OUTPUT = 300
RATE = 20.0
FLOOD_AT_S = 2.0


@dataclass(frozen=True)
class Case:
    """A machine, a tenant that asks for less than its part of it, and others that flood it."""

    setting: str = "rtx4090-a"
    seed: int = 0
    per_second: float = 0.6
    """Of the quiet tenant."""
    seconds: float = 30.0
    prompt: int = 512
    rate: float = RATE
    """Of the quiet tenant's readers."""
    flood: int = 170
    """Requests of each tenant that floods, all at once."""
    floods: int = 1
    flood_prompt: int = 512
    flood_rate: float = RATE

    def quiet(self) -> list[Arrival]:
        rng = random.Random(self.seed)
        times = [0.0, *poisson(self.per_second, self.seconds, rng)]
        arrivals = requests(times, self.prompt, OUTPUT, [(self.rate, 1.0)], rng)
        return [replace(a, tenant="quiet") for a in arrivals]

    def flooding(self) -> list[Arrival]:
        rng = random.Random(99)
        count = self.flood * self.floods
        rates = [(self.flood_rate, 1.0)]
        arrivals = requests(burst(count), self.flood_prompt, OUTPUT, rates, rng)
        return [
            replace(a, at_s=FLOOD_AT_S, tenant=f"flood{i % self.floods}")
            for i, a in enumerate(arrivals)
        ]

    def ttft_p99_s(self, flooding: list[Arrival]) -> float:
        """Of the quiet tenant."""
        quiet = self.quiet()
        arrivals = sorted([*flooding, *quiet], key=lambda a: a.at_s)
        records = simulate(SETTINGS[self.setting].machine(), make_policy("slack"), arrivals).records
        ours = {a.at_s for a in quiet}
        times = [
            r.first_token_s - r.intended_s
            for r, a in zip(records, arrivals, strict=True)
            if a.at_s in ours and r.first_token_s is not None
        ]
        assert len(times) == len(ours)
        return percentile(times, 99)


CASES = {
    "plain": Case(),
    "another seed": Case(seed=1),
    "long prompts": Case(setting="rtx4090-b", prompt=1024, flood_prompt=1024, per_second=0.4),
    "faster": Case(setting="h200-a", per_second=3.0, seconds=6.0, flood=500),
    "flood of long prompts": Case(flood_prompt=3072, flood=40),
    "flood of short prompts": Case(flood_prompt=48, flood=180),
    "no readers": Case(rate=math.inf, flood_rate=math.inf, flood=120),
    "three tenants": Case(floods=2, flood=85, per_second=0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_flood_of_another_tenant_is_hardly_felt(name):
    case = CASES[name]
    alone = case.ttft_p99_s([])
    beside = case.ttft_p99_s(case.flooding())
    print(f"P99 TTFT {alone:.3f} s alone, {beside:.3f} s beside a flood: {beside / alone:.2f}")
    assert beside <= 1.5 * alone


# A CPU: what steps of the replica take under benchmarks/cluster/tenants.py, and its sizes.
CPU = Machine(
    cost=CalibratedCost(
        fixed_s=0.0056,
        decode_s=0.0011,
        context_s=1.2e-6,
        padded_s=0.0,
        prefill_s=0.000185,
        score_s=0.0,
        chunk_s=0.0,
        large_s=0.0,
    ),
    layout=KVLayout(6, 16, 2, 64, "float32"),
    kv_tokens=8192,
    host_kv_tokens=87_000,
    link_gb_s=2.3,
    max_num_seqs=32,
    max_batch_tokens=2048,
)


def skewed(times: list[float], seed: int, tenant: str) -> list[Arrival]:
    """Prompts of 8 to 800 tokens and outputs of 4 to 200, most of them short."""
    rng = random.Random(seed)
    return [
        Arrival(
            at,
            min(800, max(8, round(100 * rng.lognormvariate(0.0, 1.2)))),
            min(200, max(4, round(40 * rng.lognormvariate(0.0, 0.8)))),
            RATE,
            tenant=tenant,
        )
        for at in times
    ]


def test_where_steps_cost_by_the_stream_a_flood_is_hardly_felt_either():
    """Nor where a tenant's share is only just enough for all that it asks for."""
    rng = random.Random(1)
    quiet = skewed([5.0 + at for at in poisson(3.0, 30.0, rng)], 1, "quiet")
    flood = skewed([*burst(64), *poisson(6.0, 35.0, rng)], 2, "flood")

    def ttft_p99_s(arrivals: list[Arrival]) -> float:
        arrivals = sorted(arrivals, key=lambda a: a.at_s)
        records = simulate(CPU, make_policy("slack"), arrivals).records
        return percentile(
            [
                record.first_token_s - record.intended_s
                for record, arrival in zip(records, arrivals, strict=True)
                if arrival.tenant == "quiet"
            ],
            99,
        )

    alone, beside = ttft_p99_s(quiet), ttft_p99_s(quiet + flood)
    print(f"P99 TTFT {alone:.3f} s alone, {beside:.3f} s beside a flood: {beside / alone:.2f}")
    assert beside <= 1.5 * alone


def test_of_the_same_tenant_it_is_felt():
    case = Case(flood=80)
    flood = [replace(a, tenant="quiet") for a in case.flooding()]
    assert case.ttft_p99_s(flood) > 50 * case.ttft_p99_s([])
