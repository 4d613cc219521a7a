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
    )

    def __init__(self) -> None:
        # Exponentially weighted normal equations over (1, sequences, context tokens).
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
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
            self._observed += 1
            if self._observed <= _REFIT or self._observed % _REFIT == 0:
                self._coefficients = _fit(self._gram, self._moment)
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


def _fit(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> tuple[float, float, float]:
    """Least squares with no coefficient below 0: the worst offender is dropped until none is.

    What the observations do not tell apart (one batch size only, say) falls to the fixed part.
    """
    result = [0.0, 0.0, 0.0]
    kept = [0, 1, 2]
    weight = gram[0, 0]
    if weight == 0:
        return (0.0, 0.0, 0.0)
    scale = np.sqrt(np.maximum(np.diag(gram) / weight, 1e-300))
    while kept:
        index = np.ix_(kept, kept)
        a = gram[index] / np.outer(scale[kept], scale[kept]) / weight
        # A ridge on all but the fixed part keeps near-constant features from exploding.
        a += np.diag([0.0 if k == 0 else 1e-7 for k in kept])
        solution = np.linalg.solve(a, moment[kept] / scale[kept] / weight) / scale[kept]
        if solution.min() >= 0:
            for k, value in zip(kept, solution.tolist(), strict=True):
                result[k] = value
            break
        kept.pop(int(np.argmin(solution * scale[kept])))
    return (result[0], result[1], result[2])
