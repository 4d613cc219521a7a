"""The interface between a scheduling policy and the engine: a View in, a Plan out.

A policy is plain Python over plain data: no torch, no Ray, no clock, no I/O. `plan` is called once
before every step with `now` passed in. The same object runs in the engine and in a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.cost import CostModel


class Preempt(Enum):
    """What happens to a victim's KV."""

    OFFLOAD = "offload"
    """Kept on the host; the part written through already leaves the device at once."""
    RECOMPUTE = "recompute"
    """Dropped; prefilled again on resume."""


@dataclass(slots=True)
class View:
    """What a policy may look at. Sequences are read, never changed."""

    waiting: Seq[Sequence]
    """No KV anywhere, in order of arrival."""
    running: Seq[Sequence]
    """On the device, in the order they came onto it."""
    preempted: Seq[Sequence]
    """All KV on the host."""
    offloading: Seq[Sequence]
    loading: Seq[Sequence]
    free_blocks: int
    releasing_blocks: int
    """Blocks of earlier victims, free as soon as their copy to the host ends."""
    total_blocks: int
    free_host_slots: int
    block_size: int
    max_num_seqs: int
    """Most sequences that may be running or loading at once."""
    max_batch_tokens: int
    """Token budget of one step."""
    cost: CostModel

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def growth(self, seq: Sequence) -> int:
        """Blocks a running sequence lacks for its next step."""
        return max(0, self.blocks_for(len(seq.tokens)) - seq.num_blocks)

    def released_now(self, seq: Sequence, how: Preempt) -> int:
        """Blocks that are free as soon as `seq` is preempted."""
        if how is Preempt.RECOMPUTE:
            return seq.num_blocks
        return min(seq.synced_blocks, seq.num_blocks)

    def slots_to_offload(self, seq: Sequence) -> int:
        """Host slots the offload of `seq` still needs."""
        return max(0, self.blocks_for(seq.num_computed) - len(seq.host_slots))


@dataclass(slots=True)
class Plan:
    """What the engine is to do, in this order: preempt, resume, admit, then run the batch."""

    preempt: list[tuple[Sequence, Preempt]] = field(default_factory=list)
    resume: list[Sequence] = field(default_factory=list)
    """Preempted sequences to load back; each gets blocks for all its tokens."""
    admit: list[Sequence] = field(default_factory=list)
    """Waiting sequences to bring onto the device; each gets blocks for all its tokens."""
    batch: list[tuple[Sequence, int]] = field(default_factory=list)
    """(running sequence, tokens of it in this step)."""


class Policy(Protocol):
    """A scheduling policy."""

    name: str
    write_through: bool
    """Whether filled blocks are copied to the host in the background."""

    def plan(self, view: View, now: float) -> Plan:
        """Decide the next step. `now` in seconds of the engine's monotonic clock."""
        ...


def compose_batch(
    running: Seq[Sequence], max_batch_tokens: int, *, prefill_first: bool = False
) -> list[tuple[Sequence, int]]:
    """Pack a step: every decoding sequence gets one token, prefills share what is left in order.

    With `prefill_first`, a step with any prefill in it carries prefills only.
    """
    decodes = [(seq, 1) for seq in running if seq.pending_tokens == 1]
    prefills = [seq for seq in running if seq.pending_tokens > 1]
    batch: list[tuple[Sequence, int]] = []
    if prefills and prefill_first:
        decodes = []
    budget = max_batch_tokens - len(decodes)
    for seq in prefills:
        if budget <= 0:
            break
        n = min(seq.pending_tokens, budget)
        batch.append((seq, n))
        budget -= n
    return batch + decodes[:max_batch_tokens]
