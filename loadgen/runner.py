"""Sends a workload to a target and watches the answers.

Open loop: a request goes out when it is due, whatever has become of the ones before; how late the
generator itself was is in each record. Closed loop only when asked for. A conversation's next turn
is due when its reader has read the last answer and thought about it.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenflow.loadgen.description import ClosedLoop
from tokenflow.loadgen.metrics import LEFT, StreamRecord
from tokenflow.loadgen.targets.base import Clock, Target, Turn
from tokenflow.loadgen.workload import Ask, Workload

_LEAD_S = 0.1
"""The first request is due this long after all have been built."""
INTERRUPTED = "the benchmark was interrupted"
_GC_THRESHOLDS = (20_000, 100, 1_000_000)


@contextmanager
def short_collections() -> Iterator[None]:
    """Python's garbage collection without its long pauses, in which all streams would stand still:
    what exists is left alone, and of what comes only the young is looked through."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


class Run:
    """A run under way; `records` may be watched while it runs, in the order of sending."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        *,
        timeout_s: float,
        closed_loop: ClosedLoop | None = None,
        on_finish: Callable[[StreamRecord], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.records: list[StreamRecord] = []
        self.begun_s: float | None = None
        """When the first request was due."""
        self.total = len(workload.asks)
        self._target = target
        self._sessions = workload.sessions
        self._timeout_s = timeout_s
        self._closed_loop = closed_loop
        self._on_finish = on_finish
        self._clock = clock
        self._built: dict[int, Any] = {}

    async def run(self) -> list[StreamRecord]:
        """Returns when every request has ended, one way or the other, in the workload's order.

        When cancelled, what still ran is recorded as interrupted, and then the cancellation goes
        on: `records` are complete in any case.
        """
        self._built = {
            ask.index: self._target.build(ask) for turns in self._sessions for ask in turns
        }
        self.begun_s = self._clock() + _LEAD_S
        try:
            with short_collections():
                async with asyncio.TaskGroup() as group:
                    if self._closed_loop is None:
                        await self._open_loop(group)
                    else:
                        self._start_users(group, self._closed_loop)
        except BaseException:
            now = self._clock()
            for record in self.records:
                if record.finished_s is None:
                    record.finished_s = now
                if record.finish_reason is None and record.error is None:
                    record.error = INTERRUPTED
            raise
        return self.in_order()

    def in_order(self) -> list[StreamRecord]:
        """The records in the workload's order."""
        return sorted(self.records, key=lambda record: record.index)

    async def _open_loop(self, group: asyncio.TaskGroup) -> None:
        assert self.begun_s is not None
        for turns in self._sessions:
            due = self.begun_s + turns[0].at_s
            await self._sleep_until(due)
            group.create_task(self._converse(turns, due))

    def _start_users(self, group: asyncio.TaskGroup, loop: ClosedLoop) -> None:
        waiting = iter(self._sessions)

        async def user() -> None:
            assert self.begun_s is not None
            due = self.begun_s
            for turns in waiting:
                await self._sleep_until(due)
                due = await self._converse(turns, due) + loop.think_s

        for _ in range(min(loop.users, len(self._sessions))):
            group.create_task(user())

    async def _converse(self, turns: list[Ask], due: float) -> float:
        """All turns of a conversation; returns when its last answer had come."""
        history: list[Turn] = []
        for ask in turns:
            if ask.turn:
                due += ask.think_s
                await self._sleep_until(due)
            record = StreamRecord(ask.token_rate, due, index=ask.index)
            self.records.append(record)
            built = self._built.pop(ask.index)
            await self._bounded(self._target.stream(ask, built, history, record), record)
            if record.finished_s is None:
                record.finished_s = self._clock()
            if self._on_finish is not None:
                self._on_finish(record)
            due = record.finished_s
            if len(turns) == 1 or not record.ok or record.finish_reason == LEFT:
                # Who got no answer, or left, asks nothing more: those turns were never due.
                break
            history.append(Turn(self._target.asked(built), record.text))
            if record.reads:
                due = max(due, record.playback().due_s)
        return due

    async def _bounded(self, answer: Awaitable[None], record: StreamRecord) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await answer
        except TimeoutError:
            record.error = f"not finished after {self._timeout_s:g} s"

    async def _sleep_until(self, due: float) -> None:
        wait = due - self._clock()
        if wait > 0 and math.isfinite(wait):
            await asyncio.sleep(wait)
