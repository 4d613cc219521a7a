"""Copies of KV blocks between the device pool and host slots, beside the forward pass.

Both sides are uint8 `[blocks, block_bytes]`: one block is one contiguous copy, and neighbours go
in one. On a CPU one worker thread copies, or the caller if it is little; on a GPU two side streams
do, one per direction, and a thread each waits for them. What went to the host is reported as soon
as it is there; its checksums are computed when nothing waits to be copied, and reported after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash

from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor.base import CopyDone

logger = logging.getLogger("tokenflow.engine")

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


class _Reports:
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


class _HostMemory:
    """The host side. Raises KVStoreError on use when there is none."""

    def __init__(self, host: torch.Tensor | None) -> None:
        self._host = host
        self._bytes: np.ndarray | None = None if host is None else host.numpy()

    @property
    def tensor(self) -> torch.Tensor:
        if self._host is None:
            raise KVStoreError("this executor has no host memory to copy to")
        return self._host

    def checksums(self, slots: Seq[int]) -> tuple[int, ...]:
        assert self._bytes is not None
        return tuple(xxhash.xxh3_64_intdigest(self._bytes[slot]) for slot in slots)

    def corrupt(self, slots: Seq[int], expected: Seq[int | None]) -> tuple[int, ...]:
        """Places in the job whose bytes are not what they were."""
        checked = [i for i, checksum in enumerate(expected) if checksum is not None]
        found = self.checksums([slots[i] for i in checked])
        return tuple(
            i for i, checksum in zip(checked, found, strict=True) if checksum != expected[i]
        )


_MOST_UNSUMMED = 256
"""Jobs whose checksums may be put off; their slots cannot be shared until then."""


class _Worker:
    """A thread that ends jobs in order, and computes checksums while it has nothing else to do, a
    block at a time: a copy that ends meanwhile is not reported much later for it."""

    def __init__(
        self, memory: _HostMemory, reports: _Reports, end: Callable[[Any], CopyDone]
    ) -> None:
        """`end` waits for a job, or does it, and says what came of it."""
        self._memory = memory
        self._reports = reports
        self._end = end
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unsummed: deque[tuple[_Job, list[int]]] = deque()
        """Copied jobs, and the checksums of their first blocks."""
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        self._todo.put(job)

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


class CopyThread:
    """One worker thread, first in first out, so that a load sees the offload before it.

    A job so small that it ends in a tenth of a millisecond is done at once instead: to wake a
    thread, and to hand the GIL over and back for every block, takes the step longer than that.
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._memory = _HostMemory(host)
        self._reports = _Reports()
        self._worker = _Worker(self._memory, self._reports, self._copy)
        self._last = 0
        self._given: set[int] = set()
        """Jobs that the worker has not reported."""

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
        if not self._given and len(pairs) * source.shape[1] <= _INLINE_BYTES:
            done = self._copy(job)
            if done.checksums is None:
                done = done._replace(checksums=self._memory.checksums([s for _, s in job.pairs]))
            self._reports.put(done)
        else:
            self._given.add(job.job_id)
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
        except Exception as failure:  # reported, and the next job still runs
            return CopyDone(job.job_id, failure, 0.0)
        return CopyDone(job.job_id, None, seconds, None if job.expected is None else (), corrupt)

    def poll(self, timeout_s: float) -> list[CopyDone]:
        reports = self._reports.poll(timeout_s)
        self._given.difference_update(done.job_id for done in reports)
        return reports

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
    from_address, to_address, memmove = source.data_ptr(), target.data_ptr(), ctypes.memmove
    for first, to, blocks in runs(pairs):
        if first < 0 or to < 0 or first + blocks > sources or to + blocks > targets:
            raise IndexError(f"no copy of {blocks} from {first} of {sources} to {to} of {targets}")
        memmove(to_address + to * size, from_address + first * size, blocks * size)


class CudaCopies:
    """A stream per direction, each ordered after the steps launched before.

    The directions are not ordered against each other, so that a victim leaves while another comes
    back: who loads a slot has had the report of the copy that filled it (`Executor.offload`).
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._memory = _HostMemory(host)
        self._pinned = None if host is None else _pin(host)
        self._reports = _Reports()
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
            for first, to, blocks in runs(pairs):
                target[to : to + blocks].copy_(source[first : first + blocks], non_blocking=True)
            ended.record(way.stream)
        self._last += 1
        way.worker.put(_CudaJob(self._last, list(pairs), begun, ended, expected))
        return self._last

    def poll(self, timeout_s: float) -> list[CopyDone]:
        return self._reports.poll(timeout_s)

    def close(self) -> None:
        self._out.worker.close()
        self._in.worker.close()
        if self._pinned is not None:
            _unpin(self._pinned)


class _CudaJob(NamedTuple):
    job_id: int
    pairs: list[tuple[int, int]]
    begun: Any
    ended: Any
    """Events with timing."""
    expected: Seq[int | None] | None
    """None on the way to the host."""


class _Direction:
    """A stream, and the thread that waits for what was put on it."""

    def __init__(self, device: torch.device, memory: _HostMemory, reports: _Reports) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.worker = _Worker(memory, reports, self._wait)
        self._memory = memory

    def _wait(self, job: _CudaJob) -> CopyDone:
        corrupt: tuple[int, ...] = ()
        try:
            if job.expected is not None:
                # Beside the copy, which only reads the same bytes.
                corrupt = self._memory.corrupt([slot for slot, _ in job.pairs], job.expected)
            job.ended.synchronize()
            seconds = job.begun.elapsed_time(job.ended) / 1e3
        except Exception as failure:  # reported, and the next job is still waited for
            return CopyDone(job.job_id, failure, 0.0)
        return CopyDone(job.job_id, None, seconds, None if job.expected is None else (), corrupt)


def _pin(host: torch.Tensor) -> torch.Tensor | None:
    """Page-lock the host memory in place, so that the copy engines reach it at full speed.

    None when it is pinned already or cannot be: copies then work, at a fraction of the rate.
    """
    if host.is_pinned():
        return None
    size = host.numel() * host.element_size()
    begun = time.perf_counter()
    error = _code(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0))  # type: ignore[attr-defined]
    if error != 0:
        logger.warning(
            "cannot page-lock %.1f GiB of host KV (CUDA error %d): copies will be slow and hold up "
            "the engine; raise the locked-memory limit (ulimit -l, in a container --ulimit "
            "memlock=-1)",
            size / 2**30,
            error,
        )
        # CUDA keeps the error for whoever asks next, which is the next kernel's launch.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)
        return None
    logger.info(
        "page-locked %.1f GiB of host KV in %.1f s", size / 2**30, time.perf_counter() - begun
    )
    return host


def _unpin(host: torch.Tensor) -> None:
    error = _code(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))  # type: ignore[attr-defined]
    if error != 0:
        logger.warning("cannot unlock the host KV's pages (CUDA error %d)", error)


def _code(error: Any) -> int:
    """The number of a `cudaError`, whichever kind of enumeration torch makes it."""
    return int(getattr(error, "value", error))
