"""Planned moves: of this ingress's own streams, without a lost or repeated token."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_streams import Frames, Response
from tokenflow.cluster.rebalancing import Limits, Move
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.stream_mover import StreamMover
from tokenflow.cluster.streams import Stream, StreamManager
from tokenflow.cluster.wire import Submission, pack
from tokenflow.replicas.errors import CapacityError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.overload import Movable, OverloadReport
from tokenflow.replicas.sampling.params import SamplingParams

TOKENS = 8


class Replicas:
    """A handle of replicas that say one token when they are told to, to every request they have;
    the n-th token of an output is n."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.queues = {name: asyncio.Queue[Any]() for name in names}
        self.requests: dict[str, dict[str, int]] = {name: {} for name in names}
        self.submissions: list[tuple[str, Submission]] = []
        self.full: set[str] = set()
        self.reports: dict[str, OverloadReport] = {}
        for method in ("submit", "cancel", "stats"):
            call = getattr(self, f"_{method}")
            remote = SimpleNamespace(remote=lambda *a, call=call, **k: Response(call(*a, **k)))
            setattr(self, method, remote)

    async def _submit(self, submission: Submission, *, route: Any, target: str | None) -> str:
        name = target or next(n for n in self.names if n not in self.full)
        if name in self.full:
            raise CapacityError("full")
        self.submissions.append((name, submission))
        self.requests[name][submission.request_id] = len(submission.resumed_ids)
        return name

    async def _cancel(self, request_ids: list[str], *, target: str) -> None:
        for request_id in request_ids:
            self.requests[target].pop(request_id, None)

    async def _stats(self, *, target: str) -> dict[str, Any]:
        return {
            "replica_id": target,
            "node_id": f"node of {target}",
            "overload": self.reports.get(target, OverloadReport()),
        }

    def options(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda _, target: Frames(self._frames(target)))

    async def _frames(self, target: str) -> Any:
        yield []
        while True:
            yield pack(await self.queues[target].get())

    def step(self, name: str) -> None:
        events = []
        for request_id, offset in self.requests[name].items():
            self.requests[name][request_id] = offset + 1
            reason = "length" if offset + 1 == TOKENS else None
            events.append(TokenEvent(request_id, offset, offset, "x", 0.0, None, reason))
        self.queues[name].put_nowait(events)


@pytest.fixture
async def cluster():
    replicas = Replicas("a", "b")
    manager = StreamManager(replicas, failover_timeout_s=5)
    REGISTRY.update({"a": "node of a", "b": "node of b"})
    stream = Stream(manager, "r", (1, 2), SamplingParams(max_tokens=TOKENS), 1000.0)
    await manager.open(stream)
    yield replicas, manager, stream
    for task in [*manager._tasks]:
        task.cancel()
    manager.close(stream)
    REGISTRY.update({})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_stream_goes_on_elsewhere_where_it_was(cluster):
    replicas, manager, stream = cluster
    for _ in range(3):
        replicas.step("a")
    await settle()
    moving = asyncio.create_task(manager.move_to(stream, "b"))
    await asyncio.sleep(0)
    replicas.step("a")  # drawn before the old one heard of it: not listened to
    await moving
    await settle()
    assert stream.token_ids == [0, 1, 2]
    name, submission = replicas.submissions[-1]
    assert (name, submission.resumed_ids, submission.kv_source) == ("b", (0, 1, 2), "node of a")
    assert replicas.requests["a"] == {}
    for _ in range(TOKENS - 3):
        replicas.step("b")
    await settle()
    assert stream.token_ids == list(range(TOKENS)) and stream.finish_reason == "length"
    assert (manager.moves, manager.failovers, manager.active) == (1, 0, 0)


async def test_where_the_target_is_full_it_goes_on_somewhere(cluster):
    replicas, manager, stream = cluster
    replicas.full = {"b"}
    await manager.move_to(stream, "b")
    assert stream.replica_id == "a" and stream.finish_reason is None
    assert replicas.submissions[-1][0] == "a"


async def test_a_stream_that_has_ended_or_is_there_already_is_left_alone(cluster):
    replicas, manager, stream = cluster
    await manager.move_to(stream, "a")
    manager.cancel(stream)
    await manager.move_to(stream, "b")
    await settle()
    assert len(replicas.submissions) == 1 and manager.moves == 0
    assert replicas.requests == {"a": {}, "b": {}}


async def test_a_client_that_leaves_during_a_move_leaves_nothing_behind(cluster):
    replicas, manager, stream = cluster
    moving = asyncio.create_task(manager.move_to(stream, "b"))
    await asyncio.sleep(0)
    manager.close(stream)
    await moving
    await settle()
    assert replicas.requests == {"a": {}, "b": {}}
    assert manager.active == 0


async def test_the_mover_moves_what_is_planned_and_only_its_own(cluster):
    replicas, manager, stream = cluster
    mover = StreamMover(manager, 0.0)
    mover._policy.limits = Limits(patience_s=0.0)
    late = tuple(
        Movable(name, rate=5.0, kv_tokens=10, need_tokens=20, buffer_s=0.0, wait_s=30.0)
        for name in (stream.attempt_id, "of-another-ingress#1")
    )
    replicas.reports = {
        "a": OverloadReport(100.0, 120.0, 0, 1e-3, late),
        "b": OverloadReport(100.0, 0.0, 1000, 1e-3),
    }
    attempt_id = stream.attempt_id
    moves = await mover.round()
    assert moves == [Move(attempt_id, "a", "b")]
    await settle()
    assert stream.replica_id == "b"
    assert await mover.round() == []
