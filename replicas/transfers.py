"""Copies between device blocks and host slots that are under way, and what they keep alive.

A device block may be reused only when every copy that reads or writes it has ended, a host slot
likewise. Blocks are held through the pool's reference counts; slots through the ledger here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from tokenflow.replicas.block_pool import BlockPool
from tokenflow.replicas.executor.base import CopyDone, Executor
from tokenflow.replicas.request import Sequence


class Commit(NamedTuple):
    """A private host slot that has been filled and is to be shared under its key."""

    slot: int
    key: bytes
    """16 bytes, a digest of the block's content and of all that comes before it."""
    request_id: str
    position: int
    """Index of the block in its sequence."""
    checksum: int
    """u64, of the bytes in the slot."""


class HostSlots(Protocol):
    """The replica's share of the node's KV store. No call blocks."""

    @property
    def capacity(self) -> int: ...

    def available(self) -> int: ...

    def acquire(self, n: int) -> list[int] | None: ...

    def release(self, slots: list[int]) -> None: ...


class Kind(Enum):
    OFFLOAD = "offload"
    WRITE_THROUGH = "write-through"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Job:
    """One copy job. `parts` lists (sequence, index of the block in it) per copied block."""

    kind: Kind
    blocks: tuple[int, ...]
    slots: tuple[int, ...]
    parts: tuple[tuple[Sequence, int], ...]
    kept: tuple[int, ...] = ()
    """Device blocks that are not copied but stay held until the copy ends."""


class Transfers:
    """Starts copies, keeps their blocks and slots alive, gives them back when done."""

    def __init__(self, executor: Executor, pool: BlockPool, host: HostSlots) -> None:
        self._executor = executor
        self._pool = pool
        self._host = host
        self._jobs: dict[int, Job] = {}
        self._busy: dict[int, int] = {}
        """Host slot -> jobs that touch it."""
        self._let_go: set[int] = set()
        """Slots released by their sequence while a job still touched them."""

    @property
    def active(self) -> int:
        return len(self._jobs)

    @property
    def releasing_blocks(self) -> int:
        """Device blocks that no sequence holds any more, only an offload under way."""
        return sum(
            len(job.blocks) + len(job.kept)
            for job in self._jobs.values()
            if job.kind is Kind.OFFLOAD
        )

    def queued(self, *, to_host: bool) -> int:
        """Blocks on their way in that direction."""
        return sum(
            len(job.blocks) for job in self._jobs.values() if (job.kind is not Kind.LOAD) == to_host
        )

    def pending(self, kind: Kind) -> bool:
        return any(job.kind is kind for job in self._jobs.values())

    def start(
        self, kind: Kind, items: list[tuple[Sequence, int, int, int]], kept: Iterable[int] = ()
    ) -> None:
        """Start one job over `(sequence, index, device block, host slot)`; `kept` names further
        device blocks to hold until it ends."""
        blocks = tuple(item[2] for item in items)
        slots = tuple(item[3] for item in items)
        kept = tuple(kept)
        self._pool.share(blocks)
        self._pool.share(kept)
        for slot in slots:
            self._busy[slot] = self._busy.get(slot, 0) + 1
        if kind is Kind.LOAD:
            job_id = self._executor.load(list(zip(slots, blocks, strict=True)))
        else:
            job_id = self._executor.offload(list(zip(blocks, slots, strict=True)))
        parts = tuple((item[0], item[1]) for item in items)
        self._jobs[job_id] = Job(kind, blocks, slots, parts, kept)

    def collect(self, timeout_s: float = 0.0) -> list[tuple[Job, CopyDone]]:
        """Jobs that ended since the last call; waits at most `timeout_s` for the first."""
        if not self._jobs:
            return []
        done = []
        for copy in self._executor.poll_transfers(timeout_s):
            job = self._jobs.pop(copy.job_id)
            self._pool.release(job.blocks)
            self._pool.release(job.kept)
            free = []
            for slot in job.slots:
                self._busy[slot] -= 1
                if self._busy[slot] == 0:
                    del self._busy[slot]
                    if slot in self._let_go:
                        self._let_go.remove(slot)
                        free.append(slot)
            if free:
                self._host.release(free)
            done.append((job, copy))
        return done

    def release_slots(self, slots: Iterable[int]) -> None:
        """A sequence gives up host slots; those still being copied follow when the copy ends."""
        free = []
        for slot in slots:
            if slot in self._busy:
                self._let_go.add(slot)
            else:
                free.append(slot)
        if free:
            self._host.release(free)
