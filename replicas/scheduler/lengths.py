"""How long outputs are, learned from those that ended: most end long before their limit; and how
much there was to prefill for them.

The survival estimate of Kaplan and Meier: what was cut off, by its limit or its client, and what is
still running has been at least so long. Where outputs are only ever cut off by their limit, the
estimate is the limit. [Kaplan and Meier 1958, with actuarial intervals]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray

_EDGES = np.unique(np.round(2 ** (np.arange(8 * 21) / 8)).astype(np.int64) - 1).astype(np.float64)
"""Ends of the intervals, tokens: eight to an octave, up to two million."""
_FORGET = 0.995
"""Weight of an output one output later: about the last two hundred count."""
_ENDLESS = 0.25
"""Outputs that go on for ever, beside the known ones: beyond all experience the limit counts."""


class OutputLengths:
    """The lengths of one engine's outputs; fed by the engine, read by policies."""

    def __init__(self) -> None:
        self._ended = np.zeros(len(_EDGES))
        self._cut = np.zeros(len(_EDGES))
        self._any = self._stale = False
        self._prompt_tokens = self._output_tokens = 0.0
        self._survival: FloatArray = np.ones(len(_EDGES))
        """Share of outputs that are longer than each edge."""
        self._tokens: FloatArray = _EDGES.copy()
        """Its integral: the mean length of outputs, those beyond the edge cut off there."""

    def observe(self, tokens: int, *, ended: bool, prompt_tokens: int = 0) -> None:
        """An output has had that many tokens, and `ended` or was cut off; `prompt_tokens` had to be
        prefilled for it, those found in a cache not among them."""
        self._prompt_tokens = self._prompt_tokens * _FORGET + prompt_tokens
        self._output_tokens = self._output_tokens * _FORGET + tokens
        self._any |= ended
        self._stale = True
        self._ended *= _FORGET
        self._cut *= _FORGET
        where = self._ended if ended else self._cut
        where[_interval(np.array([tokens]))[0]] += 1.0

    @property
    def prompts_per_output(self) -> float:
        """Prompt tokens that were prefilled for each output token; 0 while nothing has ended."""
        return self._prompt_tokens / self._output_tokens if self._output_tokens else 0.0

    def expected(self, limit: IntArray, generated: IntArray) -> IntArray | FloatArray:
        """Mean final length, tokens, of unfinished outputs that have `generated` tokens and may
        have `limit`; shapes [n]. The limit itself while no output has ended before its own."""
        if not self._any:
            return limit
        if self._stale:
            self._learn(generated)
        most = np.interp(limit, _EDGES, self._tokens)
        had = np.interp(generated, _EDGES, self._tokens)
        alive = np.interp(generated, _EDGES, self._survival)
        expected: FloatArray = generated + (most - had) / alive
        return np.minimum(np.maximum(expected, generated + 1), limit)

    def _learn(self, running: IntArray) -> None:
        self._stale = False
        cut = self._cut + np.bincount(_interval(running), minlength=len(_EDGES))
        reached = np.cumsum((self._ended + cut)[::-1])[::-1]
        at_risk = _ENDLESS + reached - cut / 2
        self._survival[1:] = np.cumprod(1.0 - self._ended / at_risk)[:-1]
        middle = (self._survival[1:] + self._survival[:-1]) / 2
        self._tokens[1:] = np.cumsum(middle * np.diff(_EDGES))


def _interval(tokens: IntArray) -> NDArray[np.intp]:
    """The interval that each length falls into: after its edge, up to the next."""
    found = np.searchsorted(_EDGES, tokens, side="left") - 1
    return np.clip(found, 0, len(_EDGES) - 1)
