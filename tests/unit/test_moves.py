"""Streams between replicas and between ingresses, token for token."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.fake_replicas import FakeHandle, FakeReplica
from tokenflow.cluster.control import StreamControl
from tokenflow.cluster.reconnect import Reconnections
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.streams import StreamManager
from tokenflow.replicas.errors import (
    InvalidRequestError,
    ReaderReplacedError,
    RequestCancelledError,
)
from tokenflow.replicas.life import Note
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import SamplingParams

LIMIT = 12
WHOLE = [100 + n for n in range(LIMIT)]


@pytest.fixture
def handle():
    yield FakeHandle("a", "b")
    REGISTRY.update({})
    assert not REGISTRY._views, "a stream is still counted"


@pytest.fixture
async def manager(handle):
    made = StreamManager(handle, failover_timeout_s=5, replica_silence_s=0.4)
    yield made
    for task in list(made._calls.tasks):
        task.cancel()


async def opened(manager: StreamManager, context: bytes = b"", traced: bool = False) -> Stream:
    params = SamplingParams(max_tokens=LIMIT)
    stream = Stream(manager, "r", (1, 2), params, 20.0, context=context, traced=traced)
    await manager.open(stream)
    return stream


def reading(stream: Stream) -> asyncio.Task[list[int]]:
    async def read() -> list[int]:
        return [e.token_id async for batch in stream.batches(0.01) for e in batch]

    return asyncio.create_task(read())


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what changes is nobody's event
            await asyncio.sleep(0.005)


def home(handle: FakeHandle, stream: Stream) -> tuple[FakeReplica, FakeReplica]:
    """The replica it is on, and the other one."""
    names = ["a", "b"]
    names.remove(stream.replica_id)
    return handle[stream.replica_id], handle[names[0]]


async def step(stream: Stream, replica: FakeReplica, tokens: int) -> None:
    has = len(stream.token_ids)
    replica.step(tokens)
    await until(lambda: len(stream.token_ids) == has + tokens)


async def test_a_planned_move_loses_and_repeats_nothing(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    assert await manager.move_to(stream, new.name)
    assert not await manager.move_to(stream), "it is moving"
    assert new.submissions[0].resumed_ids == (100, 101, 102)
    assert new.submissions[0].kv_source == "node"
    # Both are at it: the old one goes on until the new one speaks.
    await step(stream, old, 2)
    new.step(4)
    await until(lambda: old.cancelled)
    old.step(1)
    new.step(LIMIT)
    assert await read == WHOLE
    assert (manager.moves, manager.failovers, manager.active) == (1, 0, 0)


async def test_a_traced_stream_knows_where_it_was_and_why_it_left(handle, manager):
    stream = await opened(manager, traced=True)
    read = reading(stream)
    first, second = home(handle, stream)
    assert first.submissions[0].traced
    await step(stream, first, 2)
    second.full = True
    assert not await manager.move_to(stream, second.name)
    second.full = False
    assert await manager.move_to(stream, second.name)
    second.step(2)
    await until(lambda: first.cancelled)
    second.hung = True
    await until(lambda: stream.replica_id == first.name)
    # What a replica notes comes with its tokens, also with one that the reader has already.
    notes = (Note("waiting", 1.0, {}),)
    first.outboxes.dispatch([TokenEvent(stream.attempt_id, 0, 100, "t0", 0.0, None, notes=notes)])
    first.step(LIMIT)
    assert await read == WHOLE
    assert [(a.number, a.replica_id, a.end) for a in stream.attempts] == [
        (1, first.name, "moved"),
        (2, None, "refused"),
        (3, second.name, "lost"),
        (4, first.name, ""),
    ]
    assert [len(a.notes) for a in stream.attempts] == [0, 0, 0, 1]
    assert first.submissions[-1].past == ()


async def test_nobody_takes_it_and_it_stays(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    new.full = True
    assert not await manager.move_to(stream, new.name)
    old.step(LIMIT)
    assert await read == WHOLE
    assert not old.cancelled and manager.moves == 0


async def test_a_replica_that_computes_otherwise_goes_on_after_what_the_reader_has(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    assert await manager.move_to(stream, new.name)
    await step(stream, old, 2)
    new.first_token = 500
    new.step(1)
    await until(lambda: sum(len(r.submissions) for r in (old, new)) == 3)
    for replica in (old, new):
        replica.first_token = 100
        replica.step(LIMIT)
    assert await read == WHOLE


@pytest.mark.parametrize("who", ["old", "new"])
async def test_a_replica_dies_in_the_middle_of_a_move(handle, manager, who):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    assert await manager.move_to(stream, new.name)
    await step(stream, old, 1)
    gone, left = (old, new) if who == "old" else (new, old)
    handle.present(left.name)
    gone.dead = True
    await until(lambda: gone.name not in manager._pumps)
    await until(lambda: stream.replica_id == left.name)
    left.step(LIMIT)
    assert await read == WHOLE


async def test_the_streams_of_a_leaving_replica_move_and_it_is_let_go(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    handle.present(new.name)
    await until(lambda: new.submissions)
    assert old.name in manager._pumps, "it goes on until the new one speaks"
    new.step(1)
    await until(lambda: old.name not in manager._pumps)
    new.step(LIMIT)
    assert await read == WHOLE
    assert manager.failovers == 0


async def test_a_silent_replica_is_left_avoided_and_told_later(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    old, new = home(handle, stream)
    await step(stream, old, 3)
    old.hung = True
    await until(lambda: new.submissions)
    assert REGISTRY.avoids(old.name) and not old.cancelled
    assert manager.failovers == 1
    new.step(LIMIT)
    assert await read == WHOLE
    old.hung = False
    await until(lambda: old.cancelled)
    assert not REGISTRY.avoids(old.name)


async def test_a_reader_comes_back_where_it_was(handle, manager):
    stream = await opened(manager, context=b"c")
    old, _ = home(handle, stream)
    first = reading(stream)
    await step(stream, old, 5)
    manager.set_unread(stream)
    await until(lambda: old.changes)
    assert old.changes[-1][1].paused
    manager.read_again(stream, 2)
    with pytest.raises(ReaderReplacedError):
        await first
    await until(lambda: len(old.changes) == 2)
    assert old.changes[-1][1] == ReaderChange(paused=False, consumed=2)
    second = reading(stream)
    old.step(LIMIT)
    assert await second == WHOLE[2:]
    for count, rest in ((0, WHOLE), (LIMIT, [-1]), (LIMIT + 1, [])):
        stream.check_place(count)
        stream.attach(count)
        assert await reading(stream) == rest
    with pytest.raises(InvalidRequestError, match="cannot go on after"):
        stream.check_place(LIMIT + 2)


async def test_another_ingress_takes_over_between_two_tokens(handle, manager):
    stream = await opened(manager, context=b"c")
    old, _ = home(handle, stream)
    first = reading(stream)
    await step(stream, old, 4)
    other = StreamManager(handle, failover_timeout_s=5, replica_silence_s=0.4)
    adopting = asyncio.create_task(other.adopt("r"))
    old.step(1)
    (taken,) = await adopting
    with pytest.raises(ReaderReplacedError):
        await first
    assert stream.taken and not manager.active and not old.cancelled
    other.read_again(taken, 1)
    second = reading(taken)
    old.step(LIMIT)
    assert await second == WHOLE[1:]
    assert await other.adopt("nobody") == []
    for task in list(other._calls.tasks):
        task.cancel()


async def test_an_ingress_that_ends_leaves_its_streams_where_they_are(handle, manager):
    stream = await opened(manager, context=b"c")
    old, new = home(handle, stream)
    await step(stream, old, 3)
    manager.hang_up()
    await until(lambda: not manager._pumps)
    assert stream.replica_id == old.name and not old.cancelled and not new.submissions
    other = StreamManager(handle, failover_timeout_s=5, replica_silence_s=0.4)
    (taken,) = await other.adopt("r")
    other.read_again(taken, 3)
    second = reading(taken)
    old.step(LIMIT)
    assert await second == WHOLE[3:]
    for task in list(other._calls.tasks):
        task.cancel()


async def test_control_reaches_a_stream_through_any_ingress(handle, manager):
    stream = await opened(manager)
    read = reading(stream)
    replica, _ = home(handle, stream)
    await step(stream, replica, 2)
    other = StreamManager(handle, failover_timeout_s=5)
    control = StreamControl(other)
    await control.change("r", ReaderChange(token_rate=5.0, paused=True))
    await until(lambda: replica.changes)
    assert (stream.token_rate, stream.paused) == (5.0, True)
    assert replica.changes[-1][1] == ReaderChange(token_rate=5.0, paused=True)
    with pytest.raises(InvalidRequestError, match="consumed is 9"):
        await control.change("r", ReaderChange(consumed=9))
    with pytest.raises(InvalidRequestError, match="consumed is 9"):
        await StreamControl(manager).change("r", ReaderChange(consumed=9))
    with pytest.raises(InvalidRequestError, match="no request"):
        await control.change("nobody", ReaderChange(paused=True))
    assert await control.cancel("r")
    with pytest.raises(RequestCancelledError):
        await read
    await until(lambda: replica.cancelled)
    assert not await control.cancel("r")


async def test_unknown_ids_are_not_found(handle, manager):
    with pytest.raises(InvalidRequestError, match="time to come back is over") as caught:
        await Reconnections(manager, 1.0).find("nobody")
    assert caught.value.status == 404
