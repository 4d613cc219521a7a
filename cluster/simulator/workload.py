"""What a simulated cluster is asked: a trace scaled to its size, or a burst of skewed requests."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

from tokenflow.loadgen.traces import TraceRow
from tokenflow.replicas.simulator.workload import Arrival

BURST_AT_S = 30.0
"""When the burst comes; what arrives before it only lets the replicas measure their speeds."""
_BURST_WIDTH_S = 0.05
_JITTER_S = 0.5
_WARM_UP = 12
"""Requests per replica before the burst."""


def scaled(rows: Seq[TraceRow], requests: int, token_rate: float, seed: int) -> list[Arrival]:
    """About `requests` arrivals: every row as often as it takes, its copies half a second apart on
    average, so that bursts stay bursts."""
    rng = random.Random(seed)
    copies = requests / len(rows)
    arrivals = []
    for row in rows:
        for _ in range(int(copies) + (rng.random() < copies % 1)):
            at = row.arrival_s + rng.expovariate(1 / _JITTER_S)
            arrivals.append(Arrival(at, row.input_tokens, row.output_tokens, token_rate))
    return sorted(arrivals, key=lambda a: a.at_s)


def burst(requests: int, replicas: int, token_rate: float, seed: int) -> list[Arrival]:
    """A trickle, and at BURST_AT_S all at once; log-normal prompts (median 665 tokens, a tenth
    above 3,100) and outputs (median 245, a tenth above 880)."""
    rng = random.Random(seed)
    trickle = [
        Arrival(i * 0.8 / replicas, 500, 100, token_rate) for i in range(_WARM_UP * replicas)
    ]
    heavy = [
        Arrival(
            BURST_AT_S + rng.random() * _BURST_WIDTH_S,
            min(8000, 8 + round(rng.lognormvariate(6.5, 1.2))),
            min(3000, 4 + round(rng.lognormvariate(5.5, 1.0))),
            token_rate,
        )
        for _ in range(requests)
    ]
    return trickle + sorted(heavy, key=lambda a: a.at_s)
