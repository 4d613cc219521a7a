"""What a server says of itself while it is measured: its queue, by its own Prometheus gauges.

Lines are picked by name instead of parsed all: that happens in between the streams, once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from tokenflow.loadgen.targets.base import Clock

GAUGES = {
    "waiting": ("tokenflow_waiting_requests", "vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "running": (
        "tokenflow_running_requests",
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
    ),
    "preempted": ("tokenflow_preempted_requests",),
}
"""Our name, and what it is called by the servers that have it."""
EVERY_S = 1.0

Sample = Callable[[], Awaitable[dict[str, float] | None]]


def read_gauges(text: str) -> dict[str, float]:
    """The known gauges of a page of metrics, each summed over its labels."""
    found: dict[str, float] = {}
    names = {known: own for own, all_known in GAUGES.items() for known in all_known}
    for line in text.splitlines():
        own = names.get(line.partition("{")[0].partition(" ")[0])
        if own is not None:
            with contextlib.suppress(ValueError):
                found[own] = found.get(own, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


class GaugeRecorder:
    """Takes a sample every second until it is cancelled."""

    def __init__(self, sample: Sample, clock: Clock) -> None:
        self._sample = sample
        self._clock = clock
        self._taken: list[tuple[float, dict[str, float]]] = []

    async def run(self) -> None:
        """Ends by itself where the target has nothing to say."""
        while True:
            at = self._clock()
            found = await self._sample()
            if not found:
                return
            self._taken.append((at, found))
            await asyncio.sleep(max(0.0, at + EVERY_S - self._clock()))

    def series(self, begun_s: float) -> dict[str, list[float]]:
        """`at_s` after `begun_s`, and the values of each gauge; empty without samples."""
        taken = [(at, found) for at, found in self._taken if at >= begun_s]
        if not taken:
            return {}
        names = [name for name in GAUGES if name in taken[0][1]]
        return {
            "at_s": [round(at - begun_s, 4) for at, _ in taken],
            **{name: [found.get(name, 0.0) for _, found in taken] for name in names},
        }
