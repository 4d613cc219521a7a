"""The ingress's streams, against replicas of its own making."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import AsyncGenerator, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from tokenflow.cluster.placing import place
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.streams import StreamManager
from tokenflow.cluster.wire import Frame, Submission, pack
from tokenflow.replicas.errors import RequestCancelledError, TokenFlowError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


class Manager:
    """What a stream needs of its manager."""

    def __init__(self) -> None:
        self.closed: list[Stream] = []

    def close(self, stream: Stream) -> None:
        self.closed.append(stream)


def make_stream(rate: float = 20.0) -> Stream:
    return Stream(Manager(), "r", (1, 2), SamplingParams(max_tokens=8), rate)  # type: ignore[arg-type]


def event(offset: int, finish_reason: str | None = None) -> TokenEvent:
    return TokenEvent("r", offset, 100 + offset, f"t{offset}", 0.0, None, finish_reason)


async def test_the_first_token_is_sent_at_once_and_the_last_ends_the_stream():
    stream = make_stream()
    stream.deliver(event(0))
    batches = stream.batches(0.25)
    assert await asyncio.wait_for(anext(batches), 0.1) == [event(0)]
    stream.deliver(event(1))
    stream.deliver(event(2, "stop"))
    assert await anext(batches) == [event(1), event(2, "stop")]
    with pytest.raises(StopAsyncIteration):
        await anext(batches)
    assert stream.token_ids == [100, 101, 102]
    assert stream._manager.closed == [stream]


async def test_tokens_travel_together_while_the_reader_has_text():
    stream = make_stream(rate=2.0)
    for i in range(6):
        stream.deliver(event(i))
    batches = stream.batches(0.05)
    assert len(await anext(batches)) == 6
    stream.deliver(event(6))
    waiting = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stream.deliver(event(7, "length"))
    assert len(await waiting) == 2


async def test_without_a_reader_no_token_waits():
    stream = make_stream(rate=math.inf)
    batches = stream.batches(60.0)
    for i in range(6):
        stream.deliver(event(i))
        assert await asyncio.wait_for(anext(batches), 5) == [event(i)]


async def test_a_silent_stream_gives_heartbeats():
    stream = make_stream()
    batches = stream.batches(0.25, heartbeat_s=0.02)
    assert await anext(batches) == []
    assert await anext(batches) == []
    stream.deliver(event(0, "stop"))
    assert await anext(batches) == [event(0, "stop")]


async def test_a_gap_in_the_tokens_is_an_error_and_not_a_silent_loss():
    stream = make_stream()
    stream.deliver(event(0))
    stream.deliver(event(2))
    batches = stream.batches(0.25)
    assert await anext(batches) == [event(0)]
    with pytest.raises(TokenFlowError, match="token 2 arrived when 1 was expected"):
        await anext(batches)


async def test_an_error_event_fails_the_stream_after_what_came_before_it():
    stream = make_stream()
    stream.deliver(event(0))
    stream.deliver(TokenEvent("r", 1, -1, "", 0.0, None, "error", "out of luck"))
    batches = stream.batches(0.25)
    assert await anext(batches) == [event(0)]
    with pytest.raises(TokenFlowError, match="out of luck"):
        await anext(batches)


async def test_closing_a_reader_closes_the_stream():
    stream = make_stream()
    stream.deliver(event(0))
    batches = stream.batches(0.25)
    await anext(batches)
    await batches.aclose()
    assert stream._manager.closed == [stream]


async def test_a_failed_stream_stays_failed():
    stream = make_stream()
    stream.fail(RequestCancelledError("ended"))
    stream.fail(TokenFlowError("later"))
    with pytest.raises(RequestCancelledError):
        await anext(stream.batches(0.25))


# -- streams and their replicas -------------------------------------------------------------------


class Response:
    """What a call to a deployment's handle gives back."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def __await__(self):
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Frames:
    def __init__(self, frames: AsyncGenerator[Frame, None]) -> None:
        self._frames = frames

    def __aiter__(self) -> AsyncGenerator[Frame, None]:
        return self._frames

    def cancel(self) -> None:
        pass


class Replicas:
    """A handle of two replicas: the first is lost after one token, the second ends the stream."""

    def __init__(self) -> None:
        self.submissions: list[Submission] = []
        self.loads: list[float] = []
        self.submit = SimpleNamespace(remote=lambda *a, **k: Response(self._submit(*a, **k)))

    async def _submit(self, submission: Submission, *, target: str | None = None) -> str:
        submission = pickle.loads(pickle.dumps(submission))
        name = "ab"[len(self.submissions)]
        self.submissions.append(submission)
        place(submission, [name])
        self.loads.append(REGISTRY._views[name].own.rate)
        return name

    def options(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda _, target: Frames(self._frames(target)))

    async def _frames(self, target: str) -> AsyncGenerator[Frame, None]:
        yield []
        submission = self.submissions[-1]
        offset = len(submission.resumed_ids)
        finish = None if target == "a" else "stop"
        news = event(offset, finish)
        yield pack([news._replace(request_id=submission.request_id, cached_tokens=2 - offset)])
        if target == "a":
            raise ConnectionError("gone")
        await asyncio.Event().wait()


@pytest.mark.parametrize(("rate", "counted"), [(12.5, 12.5), (math.inf, 1.0)])
async def test_a_stream_that_moves_keeps_its_rate_its_salt_and_its_cached_tokens(rate, counted):
    replicas = Replicas()
    manager = StreamManager(replicas, failover_timeout_s=5)
    stream = Stream(manager, "r", (1, 2), SamplingParams(max_tokens=8), rate, "salt")
    await manager.open(stream)
    tokens = [e.token_id async for batch in stream.batches(0.01) for e in batch]
    assert tokens == [100, 101] and manager.failovers == 1
    assert [s.token_rate for s in replicas.submissions] == [rate, rate]
    assert [s.resumed_ids for s in replicas.submissions] == [(), (100,)]
    assert [s.cache_salt for s in replicas.submissions] == ["salt", "salt"]
    assert stream.cached_tokens == 2
    assert replicas.loads == [counted, counted]
    assert not any(view.own.streams for view in REGISTRY._views.values())
    for task in manager._calls.tasks:
        task.cancel()


async def test_tokens_that_wait_for_their_time_wake_nobody_and_the_last_one_does(monkeypatch):
    woken = 0
    wait = Stream._wait

    async def counted(self: Stream, until: float, now: float) -> None:
        nonlocal woken
        await wait(self, until, now)
        woken += 1

    monkeypatch.setattr(Stream, "_wait", counted)
    stream = make_stream(rate=1.0)
    for i in range(6):
        stream.deliver(event(i))
    batches = stream.batches(30.0)
    assert len(await anext(batches)) == 6
    following = asyncio.ensure_future(anext(batches))
    for i in range(6, 50):
        await asyncio.sleep(0)
        stream.deliver(event(i))
    assert woken == 1  # by the first of them
    stream.deliver(event(50, "stop"))
    assert len(await asyncio.wait_for(following, 5)) == 45
    assert woken == 2
    await batches.aclose()
