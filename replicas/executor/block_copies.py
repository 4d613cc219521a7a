"""Copies of KV blocks between the device pool and host slots, beside the forward pass.

Both sides are uint8 `[blocks, block_bytes]`: one block is one contiguous copy, and neighbours go
in one. On a CPU one worker thread copies, or the caller if it is little; on a GPU two side streams
do, one per direction, and a thread each waits for them. What went to the host is reported as soon
as it is there; its checksums are computed when nothing waits to be copied, and reported after it.

A rank of a divided model (parallel/) copies its part of every slot, and computes no checksums of
what it writes: they are of whole slots.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import torch

from tokenflow.replicas.executor.base import CopyDone
from tokenflow.replicas.executor.host_memory import HostMemory, pin, unpin
from tokenflow.replicas.executor.parallel.sharding import Shard

Pairs = Seq[tuple[int, int]]


class Copies(Protocol):
    """Jobs in both directions; ids ascend. Finished jobs are reported once, by `poll`."""

    def to_host(self, pairs: Pairs) -> int:
        """Copy `(device block, host slot)` pairs; the checksums come with the report."""
        ...

    def to_device(self, pairs: Pairs, expected: Seq[int | None]) -> int:
        """Copy `(host slot, device block)` pairs, checking those with an expected checksum."""
        ...

    def poll(self, timeout_s: float) -> list[CopyDone]: ...

    def close(self) -> None: ...


def runs(pairs: Pairs) -> Iterator[tuple[int, int, int]]:
    """Neighbours on both sides joined: (first source, first target, blocks)."""
    first = length = 0
    for i, (source, target) in enumerate(pairs):
        if length and source == pairs[first][0] + length and target == pairs[first][1] + length:
            length += 1
            continue
        if length:
            yield (*pairs[first], length)
        first, length = i, 1
    if length:
        yield (*pairs[first], length)


def _pieces(
    source: torch.Tensor, target: torch.Tensor, pairs: Pairs
) -> Iterator[tuple[int, int, int]]:
    """As `runs`; block by block where those of one side do not lie end to end."""
    if source.is_contiguous() and target.is_contiguous():
        return runs(pairs)
    return ((first, to, 1) for first, to in pairs)


class Reports:
    """Finished jobs, from the threads that see them end to the engine."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()

    def put(self, done: CopyDone) -> None:
        self._done.put(done)

    def poll(self, timeout_s: float) -> list[CopyDone]:
        done = []
        try:
            if timeout_s > 0:
                done.append(self._done.get(timeout=timeout_s))
            while True:
                done.append(self._done.get_nowait())
        except queue.Empty:
            return done


_MOST_UNSUMMED = 256
"""Jobs whose checksums may be put off; their slots cannot be shared until then."""


class _Worker:
    """A thread that ends jobs in order, and computes checksums while it has nothing else to do, a
    block at a time: a copy that ends meanwhile is not reported much later for it."""

    def __init__(
        self, memory: HostMemory, reports: Reports, end: Callable[[Any], CopyDone]
    ) -> None:
        """`end` waits for a job, or does it, and says what came of it."""
        self._given = self._ended = 0  # each has one thread that counts
        self._memory = memory
        self._reports = reports
        self._end = end
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unsummed: deque[tuple[_Job, list[int]]] = deque()
        """Copied jobs, and the checksums of their first blocks."""
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        self._given += 1
        self._todo.put(job)

    @property
    def busy(self) -> bool:
        """Whether the end of a job is still to be reported; for the thread that gives them."""
        return self._given > self._ended

    def _run(self) -> None:
        while True:
            try:
                job = self._todo.get(block=not self._unsummed)
            except queue.Empty:
                self._sum_block()
                continue
            if job is None:
                return
            done = self._end(job)
            self._reports.put(done)
            self._ended += 1
            if done.checksums is None:
                self._unsummed.append((job, []))
            while len(self._unsummed) > _MOST_UNSUMMED:
                self._sum_block()

    def _sum_block(self) -> None:
        """One block of the oldest job."""
        job, sums = self._unsummed[0]
        if len(sums) < len(job.pairs):
            sums += self._memory.checksums([job.pairs[len(sums)][1]])
        if len(sums) == len(job.pairs):
            self._unsummed.popleft()
            self._reports.put(CopyDone(job.job_id, None, 0.0, tuple(sums)))

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()


class _Job(Protocol):
    @property
    def job_id(self) -> int: ...

    @property
    def pairs(self) -> list[tuple[int, int]]: ...


_INLINE_BYTES = 1 << 20


def _clear(target: torch.Tensor, pairs: Pairs, places: Seq[int]) -> None:
    """Of the device blocks that were loaded, those in which is no KV: it may be no number either,
    and what an attention masks counts 0 times, which is not 0 of a NaN."""
    for place in places:
        target[pairs[place][1]].zero_()


class CopyThread:
    """One worker thread, first in first out, so that a load sees the offload before it.

    A job so small that it ends in a tenth of a millisecond is done at once instead: to wake a
    thread, and to hand the GIL over and back for every block, takes the step longer than that.
    """

    def __init__(
        self,
        device: torch.Tensor,
        host: torch.Tensor | None,
        shard: Shard | None = None,
        reports: Reports | None = None,
    ) -> None:
        """`reports`: where finished jobs go, if not to `poll`. Raises as HostMemory."""
        self._device = device
        self._memory = HostMemory(host, shard, device.shape[1])
        self._reports = reports or Reports()
        self._worker = _Worker(self._memory, self._reports, self._copy)
        self._last = 0

    def to_host(self, pairs: Pairs) -> int:
        return self._put(self._device, self._memory.tensor, pairs, None)

    def to_device(self, pairs: Pairs, expected: Seq[int | None]) -> int:
        return self._put(self._memory.tensor, self._device, pairs, expected)

    def _put(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        pairs: Pairs,
        expected: Seq[int | None] | None,
    ) -> int:
        self._last += 1
        job = _CpuJob(self._last, list(pairs), source, target, expected)
        if not self._worker.busy and len(pairs) * source.shape[1] <= _INLINE_BYTES:
            done = self._copy(job)
            if done.checksums is None:
                done = done._replace(checksums=self._memory.checksums([s for _, s in job.pairs]))
            self._reports.put(done)
        else:
            self._worker.put(job)
        return self._last

    def _copy(self, job: _CpuJob) -> CopyDone:
        begun = time.perf_counter()
        corrupt: tuple[int, ...] = ()
        try:
            _copy(job.source, job.target, job.pairs)
            seconds = time.perf_counter() - begun
            if job.expected is not None:
                corrupt = self._memory.corrupt([slot for slot, _ in job.pairs], job.expected)
                _clear(job.target, job.pairs, corrupt)
        except Exception as failure:  # reported, and the next job still runs
            return CopyDone(job.job_id, failure, 0.0)
        sums = self._memory.to_come(job.expected)
        return CopyDone(job.job_id, None, seconds, sums, corrupt)

    def poll(self, timeout_s: float) -> list[CopyDone]:
        return self._reports.poll(timeout_s)

    def close(self) -> None:
        self._worker.close()


class _CpuJob(NamedTuple):
    job_id: int
    pairs: list[tuple[int, int]]
    source: torch.Tensor
    target: torch.Tensor
    expected: Seq[int | None] | None
    """None on the way to the host."""


def _copy(source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    """Copy blocks by memmove, without the GIL: torch would take its own threads to a copy of this
    size, and they are busy with the forward pass. Raises IndexError for a block that is not there.
    """
    (sources, size), targets = source.shape, target.shape[0]
    from_step, to_step = source.stride(0), target.stride(0)
    from_address, to_address, memmove = source.data_ptr(), target.data_ptr(), ctypes.memmove
    for first, to, blocks in _pieces(source, target, pairs):
        if first < 0 or to < 0 or first + blocks > sources or to + blocks > targets:
            raise IndexError(f"no copy of {blocks} from {first} of {sources} to {to} of {targets}")
        memmove(to_address + to * to_step, from_address + first * from_step, blocks * size)


class CudaCopies:
    """A stream per direction, each ordered after the steps launched before.

    The directions are not ordered against each other, so that a victim leaves while another comes
    back: who loads a slot has had the report of the copy that filled it (`Executor.offload`).
    """

    def __init__(
        self,
        device: torch.Tensor,
        host: torch.Tensor | None,
        shard: Shard | None = None,
        reports: Reports | None = None,
    ) -> None:
        """As of CopyThread."""
        self._device = device
        self._memory = HostMemory(host, shard, device.shape[1])
        # A rank's parts share pages with those of others, so each locks all of them.
        self._pinned = None if host is None else pin(host)
        self._reports = reports or Reports()
        self._last = 0
        self._out = _Direction(device.device, self._memory, self._reports)
        self._in = _Direction(device.device, self._memory, self._reports)

    def to_host(self, pairs: Pairs) -> int:
        return self._start(self._out, self._device, self._memory.tensor, pairs, None)

    def to_device(self, pairs: Pairs, expected: Seq[int | None]) -> int:
        return self._start(self._in, self._memory.tensor, self._device, pairs, expected)

    def _start(
        self,
        way: _Direction,
        source: torch.Tensor,
        target: torch.Tensor,
        pairs: Pairs,
        expected: Seq[int | None] | None,
    ) -> int:
        way.stream.wait_stream(torch.cuda.current_stream(self._device.device))
        # Whoever waits sleeps: a copy may have a step to wait for, and a core is worth more.
        begun, ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with torch.cuda.stream(way.stream):
            begun.record(way.stream)
            for first, to, blocks in _pieces(source, target, pairs):
                target[to : to + blocks].copy_(source[first : first + blocks], non_blocking=True)
            ended.record(way.stream)
        self._last += 1
        way.worker.put(_CudaJob(self._last, list(pairs), target, begun, ended, expected))
        return self._last

    def poll(self, timeout_s: float) -> list[CopyDone]:
        return self._reports.poll(timeout_s)

    def close(self) -> None:
        self._out.worker.close()
        self._in.worker.close()
        if self._pinned is not None:
            unpin(self._pinned)


class _CudaJob(NamedTuple):
    job_id: int
    pairs: list[tuple[int, int]]
    target: torch.Tensor
    begun: Any
    ended: Any
    """Events with timing."""
    expected: Seq[int | None] | None
    """None on the way to the host."""


class _Direction:
    """A stream, and the thread that waits for what was put on it."""

    def __init__(self, device: torch.device, memory: HostMemory, reports: Reports) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.worker = _Worker(memory, reports, self._wait)
        self._memory = memory

    def _wait(self, job: _CudaJob) -> CopyDone:
        corrupt: tuple[int, ...] = ()
        try:
            if job.expected is not None:
                # Beside the copy, which only reads the same bytes.
                corrupt = self._memory.corrupt([slot for slot, _ in job.pairs], job.expected)
            # A thread begins on the first device, where another's rank must make no context.
            with torch.cuda.device(self.stream.device):
                job.ended.synchronize()
                seconds = job.begun.elapsed_time(job.ended) / 1e3
                if corrupt:
                    with torch.cuda.stream(self.stream):
                        _clear(job.target, job.pairs, corrupt)
                    self.stream.synchronize()
        except Exception as failure:  # reported, and the next job is still waited for
            return CopyDone(job.job_id, failure, 0.0)
        sums = self._memory.to_come(job.expected)
        return CopyDone(job.job_id, None, seconds, sums, corrupt)
