"""What a step and a transfer cost, learned online from the steps themselves.

Decode steps are close to `a + b * sequences`; prefill adds a time per token; transfers a time per
block. Nothing is configured: until the first observations the estimates are optimistic.
"""

from __future__ import annotations

import math

_FORGET = 0.99
"""Weight of an observation one step later: about the last hundred steps count."""


class _Mean:
    """Exponentially weighted mean, exact average over the first observations."""

    __slots__ = ("_weight", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 0.0

    def add(self, x: float) -> None:
        self._weight = self._weight * _FORGET + 1.0
        self.value += (x - self.value) / self._weight

    @property
    def known(self) -> bool:
        return self._weight > 0


class CostModel:
    """Estimates for one engine; fed by the engine, read by policies. Seconds throughout."""

    __slots__ = ("_load", "_n", "_offload", "_prefill", "_t", "_x", "_xt", "_xx")

    def __init__(self) -> None:
        # Exponentially weighted sums for the line through (decoding sequences, step seconds).
        self._n = self._x = self._t = self._xx = self._xt = 0.0
        self._prefill = _Mean()
        self._offload = _Mean()
        self._load = _Mean()

    def observe_step(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """A step of `decodes` decoding sequences and `prefill_tokens` prompt tokens took that."""
        if prefill_tokens == 0:
            self._n = self._n * _FORGET + 1.0
            self._x = self._x * _FORGET + decodes
            self._t = self._t * _FORGET + seconds
            self._xx = self._xx * _FORGET + decodes * decodes
            self._xt = self._xt * _FORGET + decodes * seconds
        else:
            base = self.step_s(decodes, 0) if decodes else 0.0
            self._prefill.add(max(seconds - base, 0.0) / prefill_tokens)

    def observe_offload(self, blocks: int, seconds: float) -> None:
        self._offload.add(seconds / max(blocks, 1))

    def observe_load(self, blocks: int, seconds: float) -> None:
        self._load.add(seconds / max(blocks, 1))

    def _line(self) -> tuple[float, float]:
        """(seconds per step, seconds per decoding sequence), both at least 0."""
        if self._n == 0:
            return 0.0, 0.0
        mean_x, mean_t = self._x / self._n, self._t / self._n
        variance = self._xx / self._n - mean_x * mean_x
        if variance < 1e-9:
            # One batch size seen so far: take the whole step as fixed cost.
            return mean_t, 0.0
        slope = (self._xt / self._n - mean_x * mean_t) / variance
        slope = min(max(slope, 0.0), mean_t / max(mean_x, 1.0))
        return mean_t - slope * mean_x, slope

    def step_s(self, decodes: int, prefill_tokens: int) -> float:
        """Predicted duration of a step."""
        fixed, slope = self._line()
        return fixed + slope * decodes + self.prefill_s(prefill_tokens)

    def prefill_s(self, tokens: int) -> float:
        """Predicted time to prefill `tokens` prompt tokens."""
        return self._prefill.value * tokens

    def load_s(self, blocks: int) -> float:
        """Predicted time to load `blocks` blocks from the host, queueing included."""
        return self._load.value * blocks

    def offload_s(self, blocks: int) -> float:
        """Predicted time to copy `blocks` blocks to the host, queueing included."""
        return self._offload.value * blocks

    def capacity(self, sequences: float) -> float:
        """Gamma: tokens/s when `sequences` decode together; infinite while unknown.

        [TokenFlow §4.3]
        """
        seconds = self.step_s(max(1, round(sequences)), 0)
        return sequences / seconds if seconds > 0 else math.inf
