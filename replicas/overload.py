"""Which requests an engine would rather see elsewhere: measured here, decided by who knows other
engines (cluster/rebalancing.py).

Taken on the engine's thread now and then; a report is immutable and may be read from any thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.load import ELASTIC_RATE
from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.capacity import LOAD_FACTOR, capacity, full_capacity, unpromised
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray, Tracker

MOST_MOVABLE = 32


@dataclass(frozen=True, slots=True)
class Movable:
    """A request that is off the device, and not promised to come back in time."""

    request_id: str
    rate: float
    """tokens/s; ELASTIC_RATE without a reader."""
    kv_tokens: int
    """Tokens whose KV another replica has to fetch or compute."""
    need_tokens: int
    """KV that it is expected to hold at its longest."""
    buffer_s: float
    """Seconds its reader can go on without a new token; 0 without a reader."""
    wait_s: float
    """Predicted seconds until it is promised its rate here."""


@dataclass(frozen=True, slots=True)
class OverloadReport:
    """The state of one engine, for who moves requests. Tokens, seconds, tokens/s."""

    capacity: float = 0.0
    """Gamma, full of requests like these; 0 while unknown."""
    rate: float = 0.0
    """Sum of the unfinished requests' rates; ELASTIC_RATE for one without a reader."""
    room_tokens: int = 0
    """KV of the device that the unfinished requests are not expected to need; may be negative."""
    prefill_s: float = 0.0
    """Seconds per prompt token; 0 while unknown."""
    movable: tuple[Movable, ...] = ()
    """At most MOST_MOVABLE, who would be short of text for the longest first."""


def take_report(
    tracker: Tracker,
    cost: CostModel,
    *,
    kv_tokens: int,
    max_num_seqs: int,
    expected: IntArray | FloatArray,
    last: OverloadReport,
    now: float,
) -> OverloadReport:
    """`kv_tokens` is what the device holds, `expected` the tokens each output is expected to have,
    shape [len(tracker)]; of an idle engine the capacity is what it was in `last`."""
    prefill_s = cost.prefill_s(1)
    if not len(tracker):
        return OverloadReport(last.capacity, 0.0, kv_tokens, prefill_s)
    remaining = np.maximum(expected - tracker.generated, 1)
    full = full_capacity(tracker, cost, kv_tokens, max_num_seqs, expected)
    rates = np.where(tracker.elastic, ELASTIC_RATE, tracker.rate)
    gamma = capacity(tracker, cost, kv_tokens, max_num_seqs, expected)
    return OverloadReport(
        capacity=full if full < math.inf else 0.0,
        rate=float(rates.sum()),
        room_tokens=kv_tokens - int((tracker.context + remaining).sum()),
        prefill_s=prefill_s,
        movable=_movable(tracker, gamma, remaining, rates, now),
    )


def _movable(
    tracker: Tracker, gamma: float, remaining: FloatArray, rates: FloatArray, now: float
) -> tuple[Movable, ...]:
    """Who is off the device and beyond the capacity in their turn, or has no reader."""
    beyond = unpromised(tracker, LOAD_FACTOR * gamma)
    wishes = tracker.elastic if beyond is None else tracker.elastic | beyond
    off = np.zeros(len(tracker), bool)
    for state in (State.WAITING, State.PREEMPTED):
        off[tracker.rows(state)] = True
    order = tracker.in_turn()
    rows = order[(wishes & off)[order]]
    if not len(rows):
        return ()
    # The first of them comes on when the first of the others ends, and so on.
    ends = np.sort((remaining / tracker.rate)[~(wishes & off)])
    if not len(ends):
        return ()
    place = np.arange(len(rows))
    waits = ends[place % len(ends)] + ends[-1] * (place // len(ends))
    # Before its first token a reader has nothing, and without a reader there is no buffer.
    due = np.where(np.isfinite(tracker.due_s) & ~tracker.elastic, tracker.due_s, now)[rows]
    buffers = np.maximum(due - now, 0.0)
    shortest = np.argsort(buffers - waits, kind="stable")[:MOST_MOVABLE].tolist()
    needs = (tracker.context + remaining)[rows]
    return tuple(
        Movable(
            request_id=seq.request_id,
            rate=float(rates[rows[i]]),
            kv_tokens=int(tracker.context[rows[i]]),
            need_tokens=int(needs[i]),
            buffer_s=float(buffers[i]),
            wait_s=float(waits[i]),
        )
        for i, seq in zip(shortest, tracker.take(rows[shortest]), strict=True)
    )
