"""An executor that only spends time: steps by a cost model, copies by the link's rate.

The clock is virtual and moves in `execute` and while the engine waits for a copy. Copies run beside
steps, one queue per direction, as copy engines do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.replicas.executor.base import CopyDone, KVLayout, ScheduledSequence, StepResult
from tokenflow.replicas.simulator.hardware import StepCost
from tokenflow.replicas.transfers import Commit

TOKEN, END = 1, 0
"""Every simulated token, and the last one of an output that ends before its limit."""


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def advance_to(self, at: float) -> None:
        self.now = max(self.now, at)


class _Channel:
    """One direction of the host link."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._busy_until = 0.0
        self.bytes = 0
        self.queue: deque[tuple[float, CopyDone]] = deque()
        """(end, job), in order of time."""

    def add(self, job_id: int, size: int, now: float) -> None:
        seconds = size / self._rate
        self._busy_until = max(self._busy_until, now) + seconds
        self.bytes += size
        self.queue.append((self._busy_until, CopyDone(job_id, None, seconds)))


class SimExecutor:
    """See the module; implements `Executor`. `link_gb_s` is each direction's rate, `lengths` the
    tokens of the output of each request, which its seed is the index of."""

    vocab_size = 32

    def __init__(
        self,
        clock: VirtualClock,
        cost: StepCost,
        layout: KVLayout,
        num_blocks: int,
        *,
        link_gb_s: float,
        lengths: Seq[int] = (),
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.busy_s = 0.0
        self._clock = clock
        self._cost = cost
        self._lengths = lengths
        self._to_host = _Channel(link_gb_s * 1e9)
        self._to_device = _Channel(link_gb_s * 1e9)
        self._jobs = 0

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        decodes = [s.start + 1 for s in batch if len(s.token_ids) == 1]
        prefills = [(len(s.token_ids), s.start) for s in batch if len(s.token_ids) > 1]
        seconds = self._cost.step_s(decodes, prefills)
        self._clock.advance(seconds)
        self.busy_s += seconds
        return StepResult([self._draw(s) for s in batch], [None] * len(batch))

    def _draw(self, scheduled: ScheduledSequence) -> int:
        if not scheduled.sample:
            return -1
        had, params = len(scheduled.output_ids) + 1, scheduled.params
        # At its limit, an output is cut off.
        ends = had < params.max_tokens and self._lengths and had == self._lengths[params.seed]
        return END if ends else TOKEN

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        return self._start(self._to_host, pairs)

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        return self._start(self._to_device, pairs)

    def _start(self, channel: _Channel, pairs: Seq[tuple[int, int]]) -> int:
        self._jobs += 1
        channel.add(self._jobs, len(pairs) * self.layout.block_bytes, self._clock.now)
        return self._jobs

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        channels = (self._to_host, self._to_device)
        ends = [channel.queue[0][0] for channel in channels if channel.queue]
        if ends and min(ends) > self._clock.now and timeout_s > 0:
            self._clock.advance_to(min(min(ends), self._clock.now + timeout_s))
        done: list[CopyDone] = []
        for channel in channels:
            while channel.queue and channel.queue[0][0] <= self._clock.now:
                done.append(channel.queue.popleft()[1])
        return done

    def close(self) -> None:
        """Nothing to release."""


class SimHost:
    """Host slots of a node store that only counts."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity))

    def available(self) -> int:
        return len(self._free)

    def acquire(self, n: int) -> list[int] | None:
        if n > len(self._free):
            return None
        cut = len(self._free) - n
        taken = self._free[cut:]
        del self._free[cut:]
        return taken

    def match(self, keys: Seq[bytes]) -> list[int]:
        return []

    def commit(self, blocks: Seq[Commit]) -> None:
        """Every slot stays its holder's own."""

    def checksums(self, slots: Seq[int]) -> list[int]:
        return [0] * len(slots)

    def report_corrupt(self, slots: Seq[int]) -> None:
        """No bytes, no faults."""

    def release(self, slots: Seq[int]) -> None:
        self._free.extend(slots)


class SimTokenizer:
    """Simulated text is empty."""

    def decode(self, ids: Any, **_: object) -> str:
        return ""
