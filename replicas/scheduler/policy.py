"""The interface between a scheduling policy and the engine: a View in, a Plan out.

A policy is plain Python over plain data: no torch, no Ray, no clock, no I/O. `plan` is called once
before every step with `now` passed in. The same object runs in the engine and in a simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import repeat
from typing import Protocol

import numpy as np

from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.capacity import Load
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray, Tracker


class Preempt(Enum):
    """What happens to a victim's KV."""

    OFFLOAD = "offload"
    """Kept on the host; the part written through already leaves the device at once."""
    RECOMPUTE = "recompute"
    """Dropped; prefilled again on resume."""


@dataclass(slots=True)
class View:
    """What a policy may look at. Rows are indices into the tracker, valid during this plan."""

    tracker: Tracker
    free_blocks: int
    releasing_blocks: int
    """Blocks of earlier victims, free as soon as their copy to the host ends."""
    total_blocks: int
    free_host_slots: int
    offload_queue: int
    """Blocks on their way to the host."""
    load_queue: int
    """Blocks on their way to the device."""
    block_size: int
    max_num_seqs: int
    """Most sequences that may be running or loading at once."""
    max_batch_tokens: int
    """Token budget of one step."""
    cost: CostModel
    lengths: OutputLengths = field(default_factory=OutputLengths)
    overlap: bool = True
    """Whether the copied blocks of a victim are free while the others are still being copied."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that the device holds."""
        return self.total_blocks * self.block_size

    def waiting(self) -> IntArray:
        """Rows without KV anywhere, in order of arrival; those whose reader pauses come last."""
        return self.tracker.waiting()

    def running(self) -> IntArray:
        """Rows on the device, in the order they came onto it."""
        return self.tracker.running()

    def on_device(self) -> int:
        """Sequences that hold a place on the device."""
        return self.tracker.count(State.RUNNING) + self.tracker.count(State.LOADING)

    def slack_s(self, rows: IntArray, now: float) -> FloatArray:
        """Seconds until each reader needs a token that does not exist; -inf before the first, inf
        while it pauses."""
        slack: FloatArray = self.tracker.due_s[rows] - now
        return slack

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def blocks_needed(self, rows: IntArray | slice = slice(None)) -> IntArray:
        """Blocks each of `rows`, or of all, takes to come onto the device: all its tokens and the
        next one, less what others hold of its text."""
        tracker = self.tracker
        blocks: IntArray = tracker.context[rows] // self.block_size + 1 - tracker.shared[rows]
        return blocks

    def growth(self, rows: IntArray) -> IntArray:
        """Blocks each running one lacks for its next step."""
        tracker = self.tracker
        filled = (tracker.context[rows] - 1) // self.block_size + 1
        growth: IntArray = np.maximum(filled - tracker.held[rows], 0)
        return growth

    def released_now(self, rows: IntArray) -> IntArray:
        """Blocks that are free as soon as each is preempted for offload."""
        tracker = self.tracker
        synced = np.maximum(tracker.synced[rows] - tracker.shared[rows], 0)
        released: IntArray = np.minimum(synced, tracker.blocks[rows])
        if not self.overlap:
            released = np.where(tracker.synced[rows] < self._filled(rows), 0, released)
        return released

    def slots_to_offload(self, rows: IntArray) -> IntArray:
        """Host slots the offload of each still needs."""
        missing: IntArray = np.maximum(self._filled(rows) - self.tracker.slots[rows], 0)
        return missing

    def _filled(self, rows: IntArray) -> IntArray:
        filled: IntArray = (self.tracker.computed[rows] + self.block_size - 1) // self.block_size
        return filled


@dataclass(slots=True)
class Plan:
    """What the engine is to do, in this order: preempt, drop, resume, admit, run the batch."""

    preempt: list[tuple[Sequence, Preempt]] = field(default_factory=list)
    drop: list[Sequence] = field(default_factory=list)
    """Preempted sequences whose copy on the host is given up: they are recomputed."""
    resume: list[Sequence] = field(default_factory=list)
    """Preempted sequences to load back; each gets blocks for all its tokens."""
    admit: list[Sequence] = field(default_factory=list)
    """Waiting or dropped sequences to bring onto the device, with blocks for all their tokens."""
    batch: list[tuple[Sequence, int]] = field(default_factory=list)
    """(running sequence, tokens of it in this step)."""
    load: Load | None = None
    """What the policy knows of the load, for the metrics; None when it does not look at it."""


class Policy(Protocol):
    """A scheduling policy."""

    name: str
    write_through: bool
    """Whether filled blocks are copied to the host in the background."""

    def plan(self, view: View, now: float) -> Plan:
        """Decide the next step. `now` in seconds of the engine's monotonic clock."""
        ...


def decode_batch(view: View, rows: IntArray) -> list[tuple[Sequence, int]]:
    """A step of `rows`, which all decode."""
    sequences = view.tracker.sequences
    chosen = map(sequences.__getitem__, rows[: view.max_batch_tokens].tolist())
    return list(zip(chosen, repeat(1)))


def compose_batch(
    view: View,
    rows: IntArray,
    *,
    prefill_first: bool = False,
    prefill_tokens: int | None = None,
) -> list[tuple[Sequence, int]]:
    """Pack a step from `rows`, on the device or admitted by this plan.

    Every decoding sequence gets one token, prefills share what is left of the budget in order. With
    `prefill_first`, a step with any prefill in it carries prefills only; `prefill_tokens` limits
    their tokens further.
    """
    tracker = view.tracker
    # Whoever this plan drops still has its KV on the host: it is counted out already.
    kept = tracker.state[rows] != tracker.code(State.PREEMPTED)
    pending = tracker.context[rows] - tracker.computed[rows] * kept
    decoding = pending == 1
    if decoding.all():
        return decode_batch(view, rows)
    decodes = tracker.take(rows[decoding])
    if prefill_first:
        decodes = []
    budget = view.max_batch_tokens - len(decodes)
    if prefill_tokens is not None:
        budget = min(budget, prefill_tokens)
    batch: list[tuple[Sequence, int]] = []
    prefilling = ~decoding
    for row, left in zip(rows[prefilling].tolist(), pending[prefilling].tolist(), strict=True):
        if budget <= 0:
            break
        n = min(left, budget)
        batch.append((tracker.sequences[row], n))
        budget -= n
    return batch + [(seq, 1) for seq in decodes[: view.max_batch_tokens]]
