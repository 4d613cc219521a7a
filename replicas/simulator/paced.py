"""A tighter bound on effective throughput: readers have no use for a token long before its turn.

Not here: the bounds that follow from the device alone (bounds.py), beside which this one is told.

The argument. Let W(b) be the sum of the weights of the tokens that fill a buffer from 0 to b; it
ends at 0.15 of the output, reached at a buffer of 0.2. A token made at buffer b counts at most
W(b) - W(b - 1). So what a stream's tokens count in all is W of its last buffer and, for each token
that was read, at most 1, but nothing for one that was read while the buffer was beyond 0.2.

Take a schedule that ends at T, and a moment t before. All steps begun later last T - t at most, so
the tokens of the earlier ones, m_i of stream i, are the work that T - t has no room for. With c_i
of them read by t, the buffer is b_i = m_i - c_i, and stream i loses at least

    h_i(m_i) = max(0, b_i - W(b_i), E_i + min(b_i - 0.2 N_i, what it reads after t)),

that is, the tokens that did not count by t; or E_i, what its reader cannot use by T whatever
happens (N_i - 0.15 N_i - all it reads), and what it reads while its buffer is too full. The least
sum of h_i over all m_i that are enough work is bounded from below by Lagrange's multiplier: at any
price of work the minimum falls apart into one per stream. It lies at one of a few knots, since h_i
less the price of the work, which is convex in m_i, is concave between them, save for one parabola.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.scheduler.playback import FULL_WEIGHT_SHARE
from tokenflow.replicas.simulator.hardware import Floor
from tokenflow.replicas.simulator.workload import Arrival

Floats = NDArray[np.float64]

_MOMENTS = 40
_MAKESPANS = 100
_PRICES = np.geomspace(0.05, 2.0, 24)[:, None]
"""Of the work of an average token, in tokens."""
_FASTEST = 1e9
"""tokens/s of a consumer that is no reader."""


class _Streams:
    """Columns of shape [requests]; seconds count from the first arrival."""

    def __init__(self, arrivals: Seq[Arrival], floor: Floor, kv_tokens: int) -> None:
        self.at = np.array([a.at_s for a in arrivals])
        self.at -= self.at.min()
        self.prompt = np.array([a.prompt_tokens for a in arrivals], np.float64)
        self.output = np.array([a.output_tokens for a in arrivals], np.float64)
        self.rate = np.minimum([a.token_rate for a in arrivals], _FASTEST)
        self.low = FULL_WEIGHT_SHARE * self.output
        self.floor = floor
        # No step holds more context than memory does, so each token has its share of a step.
        self.per_context = floor.context_s + floor.step_s / kv_tokens
        self.begin_s = self.prompt * (floor.prompt_s + floor.step_s / kv_tokens)

    def work_s(self, made: Floats) -> Floats:
        """Least device seconds of the prompt and the first `made` >= 1 tokens of each."""
        contexts = (made - 1) * self.prompt + made * (made - 1) / 2
        seconds: Floats = self.begin_s + self.floor.decode_s * (made - 1)
        return seconds + self.per_context * contexts

    def read(self, at_s: float) -> Floats:
        """Most tokens read by then; one in the making counts as read."""
        read: Floats = self.rate * np.maximum(at_s - self.at, 0.0) + 2
        return read

    def above(self, buffer: Floats) -> Floats:
        """Tokens of a buffer that do not count: b - W(b)."""
        over = np.maximum(buffer / self.low - 1.0, 0.0)
        tokens: Floats = self.low * np.where(over < 1.0, over**2 / 2, over - 0.5)
        return tokens


def paced_effective_tok_s(
    arrivals: Seq[Arrival], floor: Floor, kv_tokens: int, shortest_s: float
) -> float:
    """Most effective tokens/s of any schedule, none of which is over before `shortest_s`."""
    streams = _Streams(arrivals, floor, kv_tokens)
    tokens = float(streams.output.sum())
    longest_s = float((streams.at + streams.output / streams.rate).max())
    ends = np.geomspace(shortest_s, max(longest_s, 1.2 * shortest_s), _MAKESPANS).tolist()
    # Beyond the last one, all tokens may count.
    best = tokens / ends[-1]
    for earliest, latest in pairwise(ends):
        if tokens / earliest <= best:
            break
        # Later ends never lose more, so the loss of the latest holds for all of the interval.
        best = max(best, (tokens - _loss(streams, latest)) / earliest)
    return best


def _loss(streams: _Streams, end_s: float) -> float:
    """Least tokens that do not count in any schedule that ends then."""
    unusable = streams.output - 1.5 * streams.low - streams.read(end_s)
    worst = float(np.maximum(unusable, 0.0).sum())
    everything = float(streams.work_s(streams.output).sum())
    for at_s in (end_s * np.linspace(0.0, 1.0, _MOMENTS + 1)[1:] ** 2).tolist():
        before_s = everything - (end_s - at_s)
        if before_s > 0:
            worst = max(worst, _loss_by(streams, at_s, end_s, before_s, unusable))
    return worst


def _loss_by(
    streams: _Streams, at_s: float, end_s: float, before_s: float, unusable: Floats
) -> float:
    """The same, when that much of the work is done by `at_s`; see the module."""
    low, read, work_s = streams.low, streams.read(at_s), streams.work_s
    here = streams.at < at_s
    # One token a step, of which each lasts the fixed part at least.
    made = np.maximum(at_s - streams.at, 0.0) / max(streams.floor.step_s, 1e-9) + 1
    most = np.minimum(streams.output, made)
    later = streams.rate * (end_s - np.maximum(at_s, streams.at))

    def lost(made: Floats) -> Floats:
        buffer = made - read
        beyond = unusable + np.minimum(np.maximum(buffer - 2 * low, 0.0), later)
        tokens: Floats = np.maximum(np.maximum(streams.above(buffer), beyond), 0.0)
        return tokens

    price = _PRICES / float(work_s(streams.output).sum() / streams.output.sum())
    # The parabola above a buffer of `low`: its vertex, and where it passes what is lost anyway.
    slope = streams.per_context * (streams.prompt + read + low - 0.5) + streams.floor.decode_s
    bend = 1.0 / low - price * streams.per_context
    vertex = np.where(bend > 0, price * slope / np.maximum(bend, 1e-12), low)
    passing = np.minimum(np.sqrt(2 * low * np.maximum(unusable, 0.0)), low)
    knots = (
        read + low,
        read + low + passing,
        read + low + np.minimum(vertex, low),
        read + 2 * low,
        read + 2 * low + later,
        streams.output,
    )
    least = np.full((len(price), len(low)), np.inf)
    for knot in knots:
        knot = np.minimum(knot, most)
        least = np.minimum(least, lost(knot) - price * work_s(knot))
    # Whoever has not arrived yet has nothing made, and loses what it loses anyway.
    least = np.where(here, least, np.maximum(unusable, 0.0))
    return float((least.sum(axis=1) + price[:, 0] * before_s).max())
