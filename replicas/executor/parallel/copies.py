"""Copies of which every rank does its part: when one has ended, and what came of it.

Each rank copies its own heads of a block to or from its own place in the slot. The parts are
reported by the threads and processes that do them, in any order; here they become one report. The
checksum of a slot is that of all its bytes, like any other's in the node's store, so that whoever
reads slots need not know of ranks: one thread of the first rank computes it when all parts are
there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from tokenflow.replicas.executor.base import CopyDone
from tokenflow.replicas.executor.block_copies import Reports
from tokenflow.replicas.executor.host_memory import HostMemory


@dataclass(slots=True)
class _Job:
    """A copy that has not ended on all ranks."""

    pairs: list[tuple[int, int]]
    to_host: bool
    begun_s: float
    done: list[CopyDone]
    """Of the ranks that have ended."""


class DividedCopies:
    """The jobs of one executor; all methods are for the thread that starts them."""

    def __init__(self, ranks: int, host: torch.Tensor | None, reports: Reports) -> None:
        """`reports` gets one report of each job from every rank; they have the same numbers there.
        `host` is uint8 `[slots, slot_bytes]`."""
        self._ranks = ranks
        self._memory = HostMemory(host)
        self._reports = reports
        self._jobs: dict[int, _Job] = {}
        self._corrupt: list[int] = []
        self._sums = ThreadPoolExecutor(1, thread_name_prefix="kv-sums")

    def begin(self, job_id: int, pairs: Seq[tuple[int, int]], *, to_host: bool) -> None:
        """A job was started on all ranks; `pairs` as it was given them."""
        self._jobs[job_id] = _Job(list(pairs), to_host, time.monotonic(), [])

    def poll(self, timeout_s: float) -> list[CopyDone]:
        """Jobs that have ended on every rank, and checksums; waits at most `timeout_s` for one."""
        until = time.monotonic() + timeout_s
        while True:
            left = until - time.monotonic()
            parts = self._reports.poll(max(left, 0.0))
            ended = [done for part in parts if (done := self._take(part)) is not None]
            if ended or left <= 0:
                return ended

    def _take(self, part: CopyDone) -> CopyDone | None:
        job = self._jobs.get(part.job_id)
        if job is None:
            return part  # its checksums
        job.done.append(part)
        if len(job.done) < self._ranks:
            return None
        del self._jobs[part.job_id]
        error = next((done.error for done in job.done if done.error is not None), None)
        corrupt = sorted({place for done in job.done for place in done.corrupt})
        self._corrupt += [job.pairs[place][1] for place in corrupt]
        if error is not None:
            return CopyDone(part.job_id, error, 0.0, (), tuple(corrupt))
        seconds = max(done.seconds for done in job.done)
        if not job.to_host:
            return CopyDone(part.job_id, None, seconds, (), tuple(corrupt))
        self._sums.submit(self._sum, part.job_id, [slot for _, slot in job.pairs])
        return CopyDone(part.job_id, None, seconds, None)

    def take_corrupt(self) -> list[int]:
        """Device blocks that were loaded since the last call with what is no KV. The rank that
        found out has cleared them."""
        blocks, self._corrupt = self._corrupt, []
        return blocks

    def _sum(self, job_id: int, slots: list[int]) -> None:
        self._reports.put(CopyDone(job_id, None, 0.0, self._memory.checksums(slots)))

    @property
    def oldest_s(self) -> float:
        """For how long the longest of the jobs has not ended, 0 without any."""
        return time.monotonic() - next(iter(self._jobs.values())).begun_s if self._jobs else 0.0

    def close(self) -> None:
        """What is not summed remains so."""
        self._sums.shutdown(cancel_futures=True)
