"""What a step and a transfer cost, learned online from the steps themselves.

A decode step takes a fixed time, a time per sequence and a time per token of context it reads;
prefill adds a time per prompt token; copies take a time per block. Nothing is configured: until the
first observations the estimates are optimistic.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_FORGET = 0.995
"""Weight of an observation one step later: about the last two hundred steps count."""


_REFIT = 8
"""The line is fitted anew after that many steps."""
_ROUGH = 0.6
"""Of its duration, by how much a single step is taken to vary; of more of them less is supposed and
more is known."""
_SURE = 2.0
"""Standard errors that an estimate has to be above 0, and by which it is lowered."""
_LEAST_SPREAD = 1e-9
"""Of a feature's square, the least variance that is not taken for rounding."""


class _Mean:
    """Exponentially weighted mean, exact average over the first observations."""

    __slots__ = ("_weight", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 0.0

    def add(self, x: float, weight: float = 1.0) -> None:
        self._weight = self._weight * _FORGET + weight
        self.value += (x - self.value) * weight / self._weight


class CostModel:
    """Estimates for one engine; fed by the engine, read by policies. Seconds throughout."""

    __slots__ = (
        "_coefficients",
        "_gram",
        "_load",
        "_moment",
        "_observed",
        "_offload",
        "_prefill",
        "_square",
    )

    def __init__(self) -> None:
        # Exponentially weighted normal equations over (1, sequences, context tokens).
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        self._square = 0.0
        self._coefficients = (0.0, 0.0, 0.0)
        self._observed = 0
        self._prefill = _Mean()
        self._offload = _Mean()
        self._load = _Mean()

    def observe_step(
        self, decodes: int, context_tokens: int, prefill_tokens: int, seconds: float
    ) -> None:
        """A step over `decodes` decoding sequences, which read `context_tokens` tokens of KV, and
        `prefill_tokens` prompt tokens took that long."""
        if prefill_tokens == 0:
            x = np.array([1.0, decodes, context_tokens])
            self._gram *= _FORGET
            self._gram += np.outer(x, x)
            self._moment *= _FORGET
            self._moment += x * seconds
            self._square = self._square * _FORGET + seconds * seconds
            self._observed += 1
            if self._observed <= _REFIT or self._observed % _REFIT == 0:
                self._coefficients = _fit(self._gram, self._moment, self._square)
        else:
            base = self.step_s(decodes, context_tokens) if decodes else 0.0
            self._prefill.add(max(seconds - base, 0.0) / prefill_tokens, prefill_tokens)

    def observe_offload(self, blocks: int, seconds: float) -> None:
        """Copying `blocks` blocks to the host took that long, without queueing."""
        self._offload.add(seconds / max(blocks, 1), max(blocks, 1))

    def observe_load(self, blocks: int, seconds: float) -> None:
        """Copying `blocks` blocks to the device took that long, without queueing."""
        self._load.add(seconds / max(blocks, 1), max(blocks, 1))

    def step_terms(self) -> tuple[float, float, float]:
        """(seconds per step, per sequence, per context token), none below 0."""
        return self._coefficients

    def step_s(self, decodes: float, context_tokens: float, prefill_tokens: int = 0) -> float:
        """Predicted duration of a step."""
        fixed, per_sequence, per_token = self.step_terms()
        seconds = fixed + per_sequence * decodes + per_token * context_tokens
        return seconds + self.prefill_s(prefill_tokens)

    def prefill_s(self, tokens: float) -> float:
        """Predicted time to prefill `tokens` prompt tokens."""
        return self._prefill.value * tokens

    def load_s(self, blocks: float) -> float:
        """Predicted time to load `blocks` blocks from the host, without queueing."""
        return self._load.value * blocks

    def offload_s(self, blocks: float) -> float:
        """Predicted time to copy `blocks` blocks to the host, without queueing."""
        return self._offload.value * blocks

    def capacity(self, sequences: float, context: float) -> float:
        """Gamma: tokens/s when `sequences` of `context` tokens each decode together; infinite while
        unknown. [TokenFlow §4.3]"""
        seconds = self.step_s(sequences, sequences * context)
        return sequences / seconds if seconds > 0 else math.inf


class LinkCost:
    """What fetching blocks from one other node costs, learned from the fetches themselves."""

    __slots__ = ("_block", "_overhead")

    def __init__(self) -> None:
        self._overhead = _Mean()
        self._block = _Mean()

    def observe(self, blocks: int, transfer_s: float, total_s: float) -> None:
        """A fetch of `blocks` blocks took `total_s`, of which its bytes moved for `transfer_s`."""
        self._overhead.add(max(total_s - transfer_s, 0.0))
        if blocks:
            self._block.add(transfer_s / blocks, blocks)

    def fetch_s(self, blocks: float) -> float:
        """Predicted time until `blocks` blocks are here; 0 while nothing is known."""
        return self._overhead.value + self._block.value * blocks


def _fit(
    gram: NDArray[np.float64], moment: NDArray[np.float64], square: float
) -> tuple[float, float, float]:
    """Least squares with no coefficient below 0: the worst offender is dropped until none is.

    A slope counts by what is certain of it, the estimate less its error (`_SURE`), and the rest
    falls to the fixed part: what was seen is predicted as it was, and what a few noisy steps, or
    steps that are all alike, seem to say of a full device is not believed.
    """
    weight = gram[0, 0]
    if weight == 0:
        return (0.0, 0.0, 0.0)
    mean, moment = gram[0] / weight, moment / weight
    fixed, kept = True, [1, 2]
    while kept:
        centre = mean[kept] if fixed else np.zeros(len(kept))
        slopes = _certain_slopes(
            gram[np.ix_(kept, kept)] / weight - np.outer(centre, centre),
            moment[kept] - centre * moment[0],
            square / weight - (moment[0] ** 2 if fixed else 0.0),
            np.sqrt(np.maximum(np.diag(gram)[kept] / weight, 1e-300)),
            moment[0],
            weight,
        )
        parts = slopes * mean[kept]
        rest = float(moment[0] - parts.sum()) if fixed else 0.0
        if rest >= 0 and slopes.min() >= 0:
            result = [rest, 0.0, 0.0]
            for k, slope in zip(kept, slopes.tolist(), strict=True):
                result[k] = slope
            return (result[0], result[1], result[2])
        if rest < parts.min():
            fixed = False
        else:
            kept.pop(int(np.argmin(parts)))
    return (float(moment[0]), 0.0, 0.0)


def _certain_slopes(
    variance: NDArray[np.float64],
    covariance: NDArray[np.float64],
    total: float,
    scale: NDArray[np.float64],
    mean: float,
    weight: float,
) -> NDArray[np.float64]:
    """Slopes over features with that `variance`, shape [k, k], and that `covariance` with what is
    explained, shape [k], whose own variance is `total`, less their errors along each of their
    principal axes: features that only come together share what they explain."""
    spread, axes = np.linalg.eigh(variance / np.outer(scale, scale))
    along = axes.T @ (covariance / scale)
    spread = np.maximum(spread, _LEAST_SPREAD)
    slopes = along / spread
    unexplained = max(0.0, total - float(slopes @ along))
    # Few steps that happen to lie on a line are not certain of it.
    noise = unexplained * weight / max(weight - 3.0, 1.0) + (_ROUGH * mean) ** 2 / weight**3
    error = _SURE * np.sqrt(noise / (weight * spread))
    slopes = np.sign(slopes) * np.maximum(np.abs(slopes) - error, 0.0)
    result: NDArray[np.float64] = axes @ slopes / scale
    return result
