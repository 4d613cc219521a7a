"""Copies between device blocks and host slots that are under way, and what they keep alive.

A device block may be reused only when every copy that reads or writes it has ended, a host slot
likewise. Blocks are held through the pool's reference counts; slots through the ledger here. A copy
to the host that ends well is published in the node's store under the key of its content.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from tokenflow.replicas.block_pool import BlockPool
from tokenflow.replicas.executor.base import CopyDone, Executor
from tokenflow.replicas.request import Sequence

SAMPLE_EVERY = 64
"""One loaded block in so many is checked when checksums are sampled."""


class Commit(NamedTuple):
    """A filled host slot, as it is made known to the node."""

    slot: int
    key: bytes
    """16 bytes, see prefix.py."""
    request_id: str
    position: int
    """Index of the block in its sequence."""
    checksum: int
    """xxh3 of the block's bytes, 64 bits; 0 where the executor moves no bytes."""


class HostSlots(Protocol):
    """The replica's share of the node's KV store. No call blocks.

    A slot is held as often as it was acquired or matched, and must be released as often.
    """

    @property
    def capacity(self) -> int:
        """Most slots this replica may hold."""
        ...

    def available(self) -> int:
        """Slots `acquire` can hand out at this moment."""
        ...

    def acquire(self, n: int) -> list[int] | None:
        """Exactly `n` empty slots of its own, or None."""
        ...

    def match(self, keys: Seq[bytes]) -> list[int]:
        """Slots of the longest prefix of `keys` that anybody on the node has committed."""
        ...

    def commit(self, blocks: Seq[Commit]) -> None:
        """Publish slots that have been filled; they are not written any more."""
        ...

    def checksums(self, slots: Seq[int]) -> list[int]:
        """Of committed slots."""
        ...

    def report_corrupt(self, slots: Seq[int]) -> None:
        """Nobody shall be given these slots any more."""
        ...

    def release(self, slots: Seq[int]) -> None:
        """One hold less of each; what was committed stays in the store as cache."""
        ...


class Kind(Enum):
    OFFLOAD = "offload"
    WRITE_THROUGH = "write-through"
    LOAD = "load"


class Copy(NamedTuple):
    """One block of a job."""

    seq: Sequence
    position: int
    """Index of the block in the sequence."""
    block: int
    slot: int
    key: bytes | None
    """Of a full block; None for the last, partly filled one, and where nothing is shared."""


@dataclass(frozen=True, slots=True)
class Job:
    """One copy job, in order of its blocks."""

    job_id: int
    kind: Kind
    copies: tuple[Copy, ...]
    kept: tuple[int, ...] = ()
    """Device blocks that are not copied but stay held until the copy ends."""


class Transfers:
    """Starts copies, keeps their blocks and slots alive, gives them back when done."""

    def __init__(
        self,
        executor: Executor,
        pool: BlockPool,
        host: HostSlots,
        verify: Literal["off", "sampled", "full"] = "off",
    ) -> None:
        self._executor = executor
        self._pool = pool
        self._host = host
        self._verify_every = {"off": 0, "sampled": SAMPLE_EVERY, "full": 1}[verify]
        self._until_check = self._verify_every
        self._jobs: dict[int, Job] = {}
        self._busy: dict[int, int] = {}
        """Host slot -> jobs that touch it."""
        self._let_go: list[int] = []
        """Holds given up by their sequence while a job still touched the slot."""
        self._unsummed: dict[int, Job] = {}
        """Copied to the host, but their checksums are still to come."""
        self._private: dict[int, int] = {}
        """Checksums of filled slots that are not published."""

    @property
    def active(self) -> int:
        """Jobs of which a report is still to come."""
        return len(self._jobs) + len(self._unsummed)

    @property
    def releasing_blocks(self) -> int:
        """Device blocks that no sequence holds any more, only an offload under way."""
        return sum(
            len(job.copies) + len(job.kept)
            for job in self._jobs.values()
            if job.kind is Kind.OFFLOAD
        )

    def queued(self, *, to_host: bool) -> int:
        """Blocks on their way in that direction."""
        return sum(
            len(job.copies) for job in self._jobs.values() if (job.kind is not Kind.LOAD) == to_host
        )

    def pending(self, kind: Kind) -> bool:
        return any(job.kind is kind for job in self._jobs.values())

    def start(self, kind: Kind, copies: Seq[Copy], kept: Iterable[int] = ()) -> int:
        """Start one job and return its id; `kept` names further device blocks to hold until it
        ends."""
        kept = tuple(kept)
        self._pool.share(copy.block for copy in copies)
        self._pool.share(kept)
        for copy in copies:
            self._busy[copy.slot] = self._busy.get(copy.slot, 0) + 1
        if kind is Kind.LOAD:
            pairs = [(copy.slot, copy.block) for copy in copies]
            job_id = self._executor.load(pairs, self._expected(copies))
        else:
            job_id = self._executor.offload([(copy.block, copy.slot) for copy in copies])
        self._jobs[job_id] = Job(job_id, kind, tuple(copies), kept)
        return job_id

    def _expected(self, copies: Seq[Copy]) -> list[int | None]:
        """The checksum each block must have, None for those that are not checked."""
        expected: list[int | None] = [None] * len(copies)
        if not self._verify_every:
            return expected
        checked = []
        for i in range(len(copies)):
            self._until_check -= 1
            if self._until_check <= 0:
                self._until_check = self._verify_every
                checked.append(i)
        unsummed = {copy.slot for job in self._unsummed.values() for copy in job.copies}
        checked = [i for i in checked if copies[i].slot not in unsummed]
        published = [i for i in checked if copies[i].slot not in self._private]
        sums = self._host.checksums([copies[i].slot for i in published])
        for i, checksum in zip(published, sums, strict=True):
            expected[i] = checksum or None  # 0: the writer computed none
        for i in set(checked) - set(published):
            expected[i] = self._private[copies[i].slot]
        return expected

    def collect(self, timeout_s: float = 0.0) -> list[tuple[Job, CopyDone]]:
        """Copies that ended since the last call; waits at most `timeout_s` for the first."""
        if not self.active:
            return []
        ended = []
        for done in self._executor.poll_transfers(timeout_s):
            job = self._unsummed.pop(done.job_id, None)
            if job is not None:
                self._publish(job, done.checksums)
                self._free_slots(job)
                continue
            job = self._jobs.pop(done.job_id)
            self._pool.release([copy.block for copy in job.copies])
            self._pool.release(job.kept)
            if job.kind is Kind.LOAD:
                slots = [job.copies[i].slot for i in done.corrupt]
                self._host.report_corrupt([s for s in slots if s not in self._private])
                self._free_slots(job)
            elif done.error is not None:
                self._free_slots(job)
            elif done.checksums is None:
                self._unsummed[job.job_id] = job
            else:
                self._publish(job, done.checksums)
                self._free_slots(job)
            ended.append((job, done))
        return ended

    def _publish(self, job: Job, checksums: tuple[int, ...] | None) -> None:
        filled = []
        sums = checksums or (0,) * len(job.copies)
        for copy, checksum in zip(job.copies, sums, strict=True):
            if copy.key is None:
                self._private[copy.slot] = checksum
            else:
                self._private.pop(copy.slot, None)
                filled.append(
                    Commit(copy.slot, copy.key, copy.seq.request_id, copy.position, checksum)
                )
        if filled:
            self._host.commit(filled)

    def _free_slots(self, job: Job) -> None:
        for copy in job.copies:
            self._busy[copy.slot] -= 1
            if self._busy[copy.slot] == 0:
                del self._busy[copy.slot]
        if self._let_go:
            free = [slot for slot in self._let_go if slot not in self._busy]
            self._let_go = [slot for slot in self._let_go if slot in self._busy]
            self._give_back(free)

    def release_slots(self, slots: Iterable[int]) -> None:
        """A sequence gives up its holds; those of slots being copied follow when that ends."""
        free: list[int] = []
        for slot in slots:
            (self._let_go if slot in self._busy else free).append(slot)
        self._give_back(free)

    def _give_back(self, slots: list[int]) -> None:
        if slots:
            for slot in slots:
                self._private.pop(slot, None)
            self._host.release(slots)
