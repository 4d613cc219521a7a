"""Copies of KV blocks between the device pool and host slots, beside the forward pass.

Both sides are uint8 `[blocks, block_bytes]`: one block is one contiguous copy, and neighbours go
in one. On a CPU one worker thread copies; on a GPU two side streams do, one per direction, and a
thread each waits for them. Checksums are computed by those threads, without the GIL.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, Protocol

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
    """The host side as bytes. Raises KVStoreError on use when there is none."""

    def __init__(self, host: torch.Tensor | None) -> None:
        self._host = host
        self._bytes: np.ndarray | None = None if host is None else host.numpy()

    @property
    def tensor(self) -> torch.Tensor:
        if self._host is None:
            raise KVStoreError("this executor has no host memory to copy to")
        return self._host

    def checksum(self, slot: int) -> int:
        assert self._bytes is not None
        return xxhash.xxh3_64_intdigest(self._bytes[slot])

    def corrupt(self, slots: Seq[int], expected: Seq[int | None]) -> tuple[int, ...]:
        """Places in the job whose bytes are not what they were."""
        return tuple(
            i
            for i, checksum in enumerate(expected)
            if checksum is not None and self.checksum(slots[i]) != checksum
        )


class CopyThread:
    """One worker thread, first in first out, so that a load sees the offload before it."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._memory = _HostMemory(host)
        self._reports = _Reports()
        self._todo: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._last = 0
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

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
        self._todo.put((self._last, source, target, list(pairs), expected))
        return self._last

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            job_id, source, target, pairs, expected = job
            begun = time.perf_counter()
            error: Exception | None = None
            sums: tuple[int, ...] = ()
            corrupt: tuple[int, ...] = ()
            seconds = 0.0
            try:
                _check(pairs, source.shape[0], target.shape[0])
                _copy(source, target, pairs)
                seconds = time.perf_counter() - begun
                if expected is None:
                    sums = tuple(self._memory.checksum(slot) for _, slot in pairs)
                else:
                    corrupt = self._memory.corrupt([slot for slot, _ in pairs], expected)
            except Exception as failure:  # reported, and the next job still runs
                error = failure
            self._reports.put(CopyDone(job_id, error, seconds, sums, corrupt))

    def poll(self, timeout_s: float) -> list[CopyDone]:
        return self._reports.poll(timeout_s)

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()


def _check(pairs: Pairs, sources: int, targets: int) -> None:
    """Raise IndexError for a place that does not exist: what follows works on bare addresses."""
    for source, target in pairs:
        if not (0 <= source < sources and 0 <= target < targets):
            raise IndexError(f"no copy from {source} of {sources} to {target} of {targets}")


def _copy(source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    # memmove without the GIL: torch would take its own threads to a copy of this size, and they
    # are busy with the forward pass.
    size = source.shape[1]
    from_address, to_address = source.data_ptr(), target.data_ptr()
    for first, to, blocks in runs(pairs):
        ctypes.memmove(to_address + to * size, from_address + first * size, blocks * size)


class CudaCopies:
    """A stream per direction, ordered against compute and each other by events."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._memory = _HostMemory(host)
        self._pinned = None if host is None else _pin(host)
        self._reports = _Reports()
        self._last = 0
        self._out = _Direction(device.device, self._reports)
        self._in = _Direction(device.device, self._reports)

    def to_host(self, pairs: Pairs) -> int:
        host = self._memory.tensor
        slots = [slot for _, slot in pairs]
        return self._start(
            self._out,
            self._device,
            host,
            pairs,
            lambda: (tuple(self._memory.checksum(slot) for slot in slots), ()),
        )

    def to_device(self, pairs: Pairs, expected: Seq[int | None]) -> int:
        host = self._memory.tensor
        slots = [slot for slot, _ in pairs]
        # A slot is loaded only after its offload was reported, but a resumed request may be
        # loaded while its blocks' former copies drain: keep the directions in order.
        self._in.stream.wait_stream(self._out.stream)
        return self._start(
            self._in,
            host,
            self._device,
            pairs,
            lambda: ((), self._memory.corrupt(slots, expected)),
        )

    def _start(
        self, way: _Direction, source: torch.Tensor, target: torch.Tensor, pairs: Pairs, check: Any
    ) -> int:
        way.stream.wait_stream(torch.cuda.current_stream(self._device.device))
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(way.stream):
            begun.record(way.stream)
            for first, to, blocks in runs(pairs):
                target[to : to + blocks].copy_(source[first : first + blocks], non_blocking=True)
            ended.record(way.stream)
        self._last += 1
        way.todo.put((self._last, begun, ended, check))
        return self._last

    def poll(self, timeout_s: float) -> list[CopyDone]:
        return self._reports.poll(timeout_s)

    def close(self) -> None:
        self._out.close()
        self._in.close()
        if self._pinned is not None:
            _unpin(self._pinned)


class _Direction:
    """A stream, and the thread that waits for what was put on it."""

    def __init__(self, device: torch.device, reports: _Reports) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.todo: queue.SimpleQueue[tuple[int, Any, Any, Any] | None] = queue.SimpleQueue()
        self._reports = reports
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self.todo.get()) is not None:
            job_id, begun, ended, check = job
            try:
                ended.synchronize()
                sums, corrupt = check()
                done = CopyDone(job_id, None, begun.elapsed_time(ended) / 1e3, sums, corrupt)
            except Exception as failure:  # reported, and the next job is still waited for
                done = CopyDone(job_id, failure, 0.0)
            self._reports.put(done)

    def close(self) -> None:
        self.todo.put(None)
        self._thread.join()


def _pin(host: torch.Tensor) -> torch.Tensor | None:
    """Page-lock the host memory in place, so that the copy engines reach it at full speed.

    None when it is pinned already or cannot be: copies then work, at a fraction of the rate.
    """
    if host.is_pinned():
        return None
    size = host.numel() * host.element_size()
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0)  # type: ignore[attr-defined]
    if int(error) != 0:
        logger.warning(
            "cannot page-lock %.1f GiB of host KV (CUDA error %d): copies will be slow; raise the "
            "locked-memory limit (ulimit -l, in a container --ulimit memlock=-1)",
            size / 2**30,
            int(error),
        )
        return None
    return host


def _unpin(host: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())  # type: ignore[attr-defined]
