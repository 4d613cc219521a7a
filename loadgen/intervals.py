"""Intervals for means of repeats and for differences between systems, and what is noise.

Pure. Repeats are whole runs; only they say how much a figure moves by itself. Where there is but
one run of each system, `bootstrap` over its requests at least says how far few requests carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z95 = 1.960
_DRAWS = 2000
_PORTIONS = 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % confidence interval; without one, `low` and `high` are None."""

    value: float
    low: float | None
    high: float | None
    samples: int

    @property
    def excludes_zero(self) -> bool | None:
        """None where nothing can be said."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def t95(degrees: float) -> float:
    """The two-sided 95 % quantile of Student's t; between whole degrees, that of the lower one."""
    if degrees < 1:
        raise ValueError(f"at least 1 degree of freedom is needed, got {degrees}")
    return _T95[math.floor(degrees) - 1] if degrees < len(_T95) + 1 else _Z95


def mean(values: Seq[float]) -> Interval:
    """Mean of repeats with its t interval; no interval from a single one. Raises ValueError if
    empty."""
    if not values:
        raise ValueError("no values")
    middle = fmean(values)
    if len(values) < 2:
        return Interval(middle, None, None, len(values))
    half = t95(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Interval(middle, middle - half, middle + half, len(values))


def difference(before: Seq[float], after: Seq[float], *, paired: bool) -> Interval:
    """Mean of `after` less mean of `before`, over repeats.

    `paired` repeats served the same workload in the same order, so that what the workload does
    cancels out; else Welch's interval. None as bounds when one side has a single repeat. Raises
    ValueError if one is empty, or for pairs of unequal number.
    """
    if paired:
        if len(before) != len(after):
            raise ValueError(f"{len(before)} and {len(after)} repeats do not pair")
        return mean([b - a for a, b in zip(before, after, strict=True)])
    middle = fmean(after) - fmean(before)
    samples = min(len(before), len(after))
    if samples < 2:
        return Interval(middle, None, None, samples)
    parts = [variance(values) / len(values) for values in (before, after)]
    total = sum(parts)
    if total == 0:
        return Interval(middle, middle, middle, samples)
    weights = zip(parts, (before, after), strict=True)
    degrees = total**2 / sum(part**2 / (len(values) - 1) for part, values in weights)
    half = t95(degrees) * math.sqrt(total)
    return Interval(middle, middle - half, middle + half, samples)


def bootstrap(
    before: Seq[float], after: Seq[float], rank: float | None = None, *, seed: int = 0
) -> Interval:
    """The difference of the means, or of the `rank`-th percentiles, over requests, with its
    percentile bootstrap interval. Raises ValueError if one is empty.

    Requests of one run are not independent of each other, so this is narrower than the truth.
    """
    if not before or not after:
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    value = float(_figure(new, rank) - _figure(old, rank))
    samples = min(len(old), len(new))
    if samples < 2:
        return Interval(value, None, None, samples)
    drawn = _redrawn(new, rank, rng) - _redrawn(old, rank, rng)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high), samples)


def _figure(values: NDArray[np.float64], rank: float | None) -> Any:
    """Along the last axis."""
    return values.mean(axis=-1) if rank is None else np.percentile(values, rank, axis=-1)


def _redrawn(
    values: NDArray[np.float64], rank: float | None, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The figure of _DRAWS samples of the same size, drawn with replacement."""
    n = len(values)
    # In portions, for the sake of memory.
    portions = [_DRAWS // _PORTIONS] * _PORTIONS
    found = [_figure(values[rng.integers(n, size=(count, n))], rank) for count in portions]
    return np.concatenate(found)
