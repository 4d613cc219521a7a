"""Synthetic workloads: who asks when, for how much, and reads how fast. Seeded."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come. Lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    token_rate: float
    """Infinite = no reader."""
    max_tokens: int | None = None
    """Declared limit; the output itself when None."""
    tenant: str = ""


def burst(count: int) -> list[float]:
    """Arrival times: all at once."""
    return [0.0] * count


def poisson(rate: float, duration_s: float, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process with `rate` per second, for `duration_s`."""
    times = []
    at = rng.expovariate(rate)
    while at < duration_s:
        times.append(at)
        at += rng.expovariate(rate)
    return times


def normal_length(mean: float, rng: random.Random, spread: float = 0.25) -> int:
    """A length around `mean` with that relative deviation, never under an eighth of it."""
    return max(1, round(max(mean / 8, rng.gauss(mean, mean * spread))))


def requests(
    times: Seq[float],
    prompt_mean: float,
    output_mean: float,
    rates: Seq[tuple[float, float]],
    rng: random.Random,
) -> list[Arrival]:
    """Requests at the given times; `rates` lists (tokens/s, weight)."""
    values = [rate for rate, _ in rates]
    weights = [weight for _, weight in rates]
    return [
        Arrival(
            at,
            normal_length(prompt_mean, rng),
            normal_length(output_mean, rng),
            rng.choices(values, weights)[0],
        )
        for at in times
    ]
