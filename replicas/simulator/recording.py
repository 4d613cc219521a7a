"""An executor that notes what every step and copy of another executor takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenflow.replicas.executor.base import (
    AsyncExecutor,
    CopyDone,
    Executor,
    PendingStep,
    ScheduledSequence,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step as a cost model sees it, and what it took."""

    decodes: tuple[int, ...]
    """Tokens each decoding sequence attends to."""
    prefills: tuple[tuple[int, int], ...]
    """(tokens of the chunk, tokens before it)."""
    seconds: float
    cpu_s: float
    """CPU time this thread got in it: less than `seconds` where another process took the core."""
    overhead_s: float | None
    """From the end of the step before to the beginning of this one: what the engine does between
    steps. None when it waited for something in that time, and of a step launched ahead, which has
    none: it begins when the one before ends, or when it is launched."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One finished copy job."""

    to_host: bool
    bytes: int
    seconds: float
    """From start to report."""
    alone: bool
    """Nothing else ran and its report was waited for, so that `seconds` is the copy's own. The
    report of another job comes with the end of a step."""


@dataclass(slots=True)
class _Job:
    to_host: bool
    bytes: int
    alone: bool


@dataclass(slots=True)
class _Pending:
    """A launched step, which is recorded when its result is there."""

    executor: RecordingExecutor
    batch: Seq[ScheduledSequence]
    inner: PendingStep
    begun: float
    cpu: float

    def result(self) -> StepResult:
        result = self.inner.result()
        self.executor.record_launched(self.batch, self.begun, self.cpu)
        return result


class RecordingExecutor:
    """See the module; implements `AsyncExecutor` by handing everything on to `inner`."""

    def __init__(self, inner: Executor, clock: Callable[[], float] = time.perf_counter) -> None:
        self.layout = inner.layout
        self.num_blocks = inner.num_blocks
        self.vocab_size = inner.vocab_size
        self.steps: list[Step] = []
        self.copies: list[Copy] = []
        self._inner = inner
        self._clock = clock
        self._jobs: dict[int, _Job] = {}
        self._ended: float | None = None
        """End of the last step, unless the engine has waited since."""
        self._last_end = self._last_cpu = 0.0
        """Of a launched step."""

    def take(self) -> tuple[list[Step], list[Copy]]:
        """What was recorded since the last call."""
        taken = self.steps, self.copies
        self.steps, self.copies = [], []
        self.pause()
        return taken

    def pause(self) -> None:
        """Time from here to the next step is not the engine's own."""
        self._ended = None

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        for job in self._jobs.values():
            job.alone = False
        cpu, begun = time.thread_time(), self._clock()
        result = self._inner.execute(batch)
        ended, cpu = self._clock(), time.thread_time() - cpu
        overhead = None if self._ended is None else begun - self._ended
        self._record(batch, ended - begun, cpu, overhead)
        self._ended = ended
        return result

    @property
    def overlaps(self) -> bool:
        return isinstance(self._inner, AsyncExecutor) and self._inner.overlaps

    def launch(self, batch: Seq[ScheduledSequence]) -> PendingStep:
        """`inner` must be an `AsyncExecutor`."""
        assert isinstance(self._inner, AsyncExecutor)
        for job in self._jobs.values():
            job.alone = False
        begun, cpu = self._clock(), time.thread_time()
        return _Pending(self, batch, self._inner.launch(batch), begun, cpu)

    def record_launched(self, batch: Seq[ScheduledSequence], begun: float, cpu: float) -> None:
        """Its result is there."""
        ended, cpu_ended = self._clock(), time.thread_time()
        seconds = ended - max(begun, self._last_end)
        self._record(batch, seconds, cpu_ended - max(cpu, self._last_cpu), None)
        self._last_end, self._last_cpu = ended, cpu_ended

    def _record(
        self, batch: Seq[ScheduledSequence], seconds: float, cpu_s: float, overhead_s: float | None
    ) -> None:
        decodes = tuple(s.start + 1 for s in batch if len(s.token_ids) == 1)
        prefills = tuple((len(s.token_ids), s.start) for s in batch if len(s.token_ids) > 1)
        self.steps.append(Step(decodes, prefills, seconds, cpu_s, overhead_s))

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        return self._started(self._inner.offload(pairs), True, len(pairs))

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        return self._started(self._inner.load(pairs, expected), False, len(pairs))

    def _started(self, job_id: int, to_host: bool, blocks: int) -> int:
        alone = not self._jobs
        for other in self._jobs.values():
            other.alone = False
        self._jobs[job_id] = _Job(to_host, blocks * self.layout.block_bytes, alone)
        return job_id

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        done = self._inner.poll_transfers(timeout_s)
        for copy in done:
            job = self._jobs.pop(copy.job_id, None)
            if job is None:
                continue  # the checksums of a copy that was recorded before
            if copy.error is None:
                alone = job.alone and timeout_s > 0
                self.copies.append(Copy(job.to_host, job.bytes, copy.seconds, alone))
        if timeout_s > 0:
            self.pause()
        return done

    def close(self) -> None:
        self._inner.close()
