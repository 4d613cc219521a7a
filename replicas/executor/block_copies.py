"""Copies of KV blocks between the device pool and host slots, beside the forward pass.

Both sides are uint8 `[blocks, block_bytes]`: one block is one contiguous copy. On a CPU one worker
thread copies (torch releases the GIL while it does); on a GPU two side streams do.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch

from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor.base import CopyDone

_POLL_S = 0.0002


class Copies(Protocol):
    """Jobs in both directions; ids ascend. Finished jobs are reported once, by `poll`."""

    def to_host(self, pairs: Seq[tuple[int, int]]) -> int:
        """Copy `(device block, host slot)` pairs."""
        ...

    def to_device(self, pairs: Seq[tuple[int, int]]) -> int:
        """Copy `(host slot, device block)` pairs."""
        ...

    def poll(self, timeout_s: float) -> list[CopyDone]: ...

    def close(self) -> None: ...


def _need(host: torch.Tensor | None) -> torch.Tensor:
    if host is None:
        raise KVStoreError("this executor has no host memory to copy to")
    return host


class CopyThread:
    """One worker thread, first in first out, so that a load sees the offload before it."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._host = host
        self._todo: queue.SimpleQueue[tuple[int, list[Any], list[Any]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
        self._last = 0
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

    def to_host(self, pairs: Seq[tuple[int, int]]) -> int:
        host = _need(self._host)
        return self._put([host[slot] for _, slot in pairs], [self._device[b] for b, _ in pairs])

    def to_device(self, pairs: Seq[tuple[int, int]]) -> int:
        host = _need(self._host)
        return self._put([self._device[b] for _, b in pairs], [host[slot] for slot, _ in pairs])

    def _put(self, targets: list[Any], sources: list[Any]) -> int:
        self._last += 1
        self._todo.put((self._last, targets, sources))
        return self._last

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            job_id, targets, sources = job
            begun = time.perf_counter()
            error: Exception | None = None
            try:
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)
            except Exception as failure:  # reported, and the next job still runs
                error = failure
            self._done.put(CopyDone(job_id, error, time.perf_counter() - begun))

    def poll(self, timeout_s: float) -> list[CopyDone]:
        done = []
        try:
            if timeout_s > 0:
                done.append(self._done.get(timeout=timeout_s))
            while True:
                done.append(self._done.get_nowait())
        except queue.Empty:
            return done

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()


class CudaCopies:
    """A stream per direction, ordered against compute and each other by events."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor | None) -> None:
        self._device = device
        self._host = host
        self._out: Any = torch.cuda.Stream(device.device)
        self._in: Any = torch.cuda.Stream(device.device)
        self._jobs: list[tuple[int, Any, Any]] = []
        self._last = 0

    def to_host(self, pairs: Seq[tuple[int, int]]) -> int:
        host = _need(self._host)
        return self._start(self._out, [(host[s], self._device[b]) for b, s in pairs])

    def to_device(self, pairs: Seq[tuple[int, int]]) -> int:
        host = _need(self._host)
        # A slot is loaded only after its offload was reported, but a resumed request may be
        # loaded while its blocks' former copies drain: keep the directions in order.
        self._in.wait_stream(self._out)
        return self._start(self._in, [(self._device[b], host[s]) for s, b in pairs])

    def _start(self, stream: Any, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
        stream.wait_stream(torch.cuda.current_stream(self._device.device))
        begun, event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begun.record(stream)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            event.record(stream)
        self._last += 1
        self._jobs.append((self._last, begun, event))
        return self._last

    def poll(self, timeout_s: float) -> list[CopyDone]:
        deadline = time.monotonic() + timeout_s
        while True:
            done = [
                CopyDone(job_id, None, begun.elapsed_time(event) / 1e3)
                for job_id, begun, event in self._jobs
                if event.query()
            ]
            if done or time.monotonic() >= deadline:
                finished = {copy.job_id for copy in done}
                self._jobs = [job for job in self._jobs if job[0] not in finished]
                return done
            time.sleep(_POLL_S)

    def close(self) -> None:
        self._out.synchronize()
        self._in.synchronize()
