"""What is planned is carried out, for the streams of this ingress."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tokenflow.cluster.rebalancing import Limits, Move
from tokenflow.cluster.stream_mover import StreamMover
from tokenflow.replicas.overload import Movable, OverloadReport


class Streams:
    """Of an ingress that has the attempt `mine#1`, on replica a."""

    active = 1

    def __init__(self, reports: dict[str, OverloadReport]) -> None:
        self.reports = reports
        self.mine = SimpleNamespace(name="mine")
        self.moved: list[tuple[Any, str]] = []

    async def stats(self) -> list[dict[str, Any]]:
        return [
            {"replica_id": name, "node_id": f"node of {name}", "overload": report}
            for name, report in self.reports.items()
        ]

    def by_attempt(self, attempt_id: str) -> Any | None:
        return self.mine if attempt_id == "mine#1" else None

    async def move_to(self, stream: Any, replica_id: str) -> None:
        self.moved.append((stream, replica_id))


async def test_the_mover_moves_what_is_planned_and_only_its_own():
    late = tuple(
        Movable(name, rate=5.0, kv_tokens=10, need_tokens=20, buffer_s=0.0, wait_s=30.0)
        for name in ("mine#1", "of-another-ingress#1")
    )
    streams = Streams(
        {
            "a": OverloadReport(100.0, 120.0, 0, 1e-3, late),
            "b": OverloadReport(100.0, 0.0, 1000, 1e-3),
        }
    )
    mover = StreamMover(streams, 0.0)
    mover._policy.limits = Limits(patience_s=0.0)
    assert await mover.round() == [Move("mine#1", "a", "b")]
    await asyncio.sleep(0)
    assert streams.moved == [(streams.mine, "b")]
    assert await mover.round() == []


async def test_an_interval_of_zero_moves_nothing():
    streams = Streams({})
    mover = StreamMover(streams, 0.0)
    mover.start()
    assert mover._task is None
