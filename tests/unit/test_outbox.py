"""A replica's outboxes: what reaches which ingress, and what outlives it."""

from __future__ import annotations

import asyncio
import math

import pytest

from tokenflow.cluster.outbox import Outboxes
from tokenflow.cluster.wire import LoadNews, Notice, Submission, unpack, unpack_events
from tokenflow.replicas.errors import InvalidRequestError, RequestCancelledError
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import SamplingParams

GRACE_S = 0.05


class Engine:
    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.changes: list[tuple[str, ReaderChange]] = []

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def change_reader(self, request_id: str, change: ReaderChange) -> None:
        self.changes.append((request_id, change))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def boxes(engine):
    return Outboxes(
        engine, grace_s=GRACE_S, heartbeat_s=10.0, load=LoadReport, healthy=lambda: True
    )


def submission(name="r", ingress="i", *, context=b"", attempt=1, **more) -> Submission:
    params = SamplingParams(max_tokens=8)
    return Submission(
        f"{name}#{attempt}", ingress, (1, 2), params, 20.0, client_id=name, context=context, **more
    )


def event(offset: int, name="r#1", reason=None) -> TokenEvent:
    return TokenEvent(name, offset, 100 + offset, f"t{offset}", 0.0, None, reason)


async def listen(boxes: Outboxes, ingress: str = "i"):
    frames = boxes.frames(ingress, lambda: None)
    assert await anext(frames) == []
    return frames


async def test_each_ingress_gets_its_own_events_in_order(boxes):
    boxes.take(submission("a", "i"))
    boxes.take(submission("b", "j"))
    one, other = await listen(boxes, "i"), await listen(boxes, "j")
    boxes.dispatch([event(0, "a#1"), event(0, "b#1"), event(0, "unknown#1")])
    boxes.dispatch([event(1, "a#1", "stop")])
    assert unpack(await anext(one))[:2] == ([event(0, "a#1"), event(1, "a#1", "stop")], [])
    assert unpack(await anext(other))[:2] == ([event(0, "b#1")], [])


async def test_steps_that_follow_each_other_closely_share_a_frame(boxes):
    boxes.take(submission("a"))
    frames = await listen(boxes)
    boxes.dispatch([event(0, "a#1")])
    assert unpack(await anext(frames))[0] == [event(0, "a#1")]
    following = asyncio.ensure_future(anext(frames))
    boxes.dispatch([event(1, "a#1")])
    await asyncio.sleep(0)
    boxes.dispatch([event(2, "a#1")])
    assert unpack(await following)[0] == [event(1, "a#1"), event(2, "a#1")]


async def test_an_idle_replica_beats_unless_its_engine_is_stuck(engine):
    health = [True]
    boxes = Outboxes(
        engine, grace_s=1, heartbeat_s=0.01, load=LoadReport, healthy=lambda: health[0]
    )
    frames = await listen(boxes)
    assert await asyncio.wait_for(anext(frames), 5) == []
    health[0] = False
    waiting = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    health[0] = True
    assert await asyncio.wait_for(waiting, 5) == []


async def test_each_load_is_told_once_with_the_requests_it_knows_of(engine):
    load = LoadReport()
    boxes = Outboxes(engine, grace_s=1, heartbeat_s=0.01, load=lambda: load, healthy=lambda: True)
    frames = await listen(boxes)
    boxes.take(submission("a"))
    boxes.take(submission("b"))
    load = LoadReport(number=1, requests=1)
    assert unpack(await anext(frames))[2] == LoadNews(load, ("a#1",))
    assert unpack(await anext(frames))[2] is None
    load = LoadReport(number=2, requests=2)
    assert unpack(await anext(frames))[2] == LoadNews(load, ("b#1",))


async def test_a_request_that_is_cancelled_on_its_way_never_begins(boxes, engine):
    with boxes.expecting("a#1"):
        boxes.cancel(["other#1"])
    with pytest.raises(RequestCancelledError), boxes.expecting("a#1"):
        boxes.cancel(["a#1"])
    with boxes.expecting("a#1"):
        pass


async def test_what_cannot_be_resumed_ends_with_its_ingress(boxes, engine):
    boxes.take(submission("a"))
    boxes.take(submission("b", context=b"c"))
    frames = await listen(boxes)
    boxes.dispatch([event(0, "b#1")])
    await frames.aclose()
    assert engine.cancelled == ["a#1"]
    assert engine.changes == [("b#1", ReaderChange(paused=True))]
    boxes.dispatch([event(1, "b#1")])
    (holding,) = boxes.adopt("b", "j")
    assert unpack_events(holding.events) == [event(0, "b#1"), event(1, "b#1")]
    boxes.dispatch([event(2, "b#1", "stop")])
    frames = await listen(boxes, "j")
    assert unpack(await anext(frames))[0] == [event(2, "b#1", "stop")]
    await asyncio.sleep(2 * GRACE_S)
    assert engine.cancelled == ["a#1"]
    assert boxes.adopt("b", "k") == [], "it ended too long ago"


async def test_nobody_comes_back_in_time(boxes, engine):
    boxes.take(submission(context=b"c"))
    frames = await listen(boxes)
    await frames.aclose()
    await asyncio.sleep(2 * GRACE_S)
    assert engine.cancelled == ["r#1"]
    assert boxes.adopt("r", "j") == []


async def test_an_ingress_that_never_listened_leaves_nothing(boxes, engine):
    boxes.take(submission())
    await asyncio.sleep(2 * GRACE_S)
    assert engine.cancelled == ["r#1"]


async def test_a_request_is_taken_from_a_living_ingress(boxes, engine):
    past = (tuple(event(0)),)
    boxes.take(submission(context=b"c", resumed_ids=(100,), past=past))
    frames = await listen(boxes)
    (holding,) = boxes.adopt("r", "j")
    assert unpack_events(holding.events) == [event(0)]
    assert unpack(await anext(frames))[:2] == ([], [Notice("r#1", "taken")])
    await frames.aclose()
    assert engine.cancelled == engine.changes == []
    assert boxes.adopt("nobody", "j") == []


async def test_an_owner_hears_what_others_were_asked(boxes, engine):
    boxes.take(submission())
    frames = await listen(boxes)
    boxes.dispatch([event(0)])
    await anext(frames)
    change = ReaderChange(token_rate=3.0, consumed=1)
    assert boxes.control("r", change)
    assert boxes.control("r", None)
    assert unpack(await anext(frames))[1] == [
        Notice("r#1", "change", change),
        Notice("r#1", "cancel"),
    ]
    assert engine.cancelled == engine.changes == []
    assert not boxes.control("nobody", None)
    with pytest.raises(InvalidRequestError, match="only 1 tokens were made"):
        boxes.control("r", ReaderChange(consumed=2))


async def test_without_an_owner_it_is_done_here(boxes, engine):
    boxes.take(submission(context=b"c"))
    await (await listen(boxes)).aclose()
    engine.changes.clear()
    assert boxes.control("r", ReaderChange(token_rate=math.inf, paused=True))
    assert engine.changes == [("r#1", ReaderChange(token_rate=math.inf))]
    (holding,) = boxes.adopt("r", "j")
    assert holding.submission.paused and holding.submission.token_rate == math.inf
    await (await listen(boxes, "j")).aclose()
    assert boxes.control("r", None)
    assert engine.cancelled == ["r#1"]
    assert not boxes.control("r", None)


async def test_a_second_subscription_of_an_ingress_replaces_the_first(boxes, engine):
    boxes.take(submission())
    first = await listen(boxes)
    second = await listen(boxes)
    await first.aclose()
    assert engine.cancelled == []
    boxes.dispatch([event(0)])
    assert unpack(await anext(second))[0] == [event(0)]
    await second.aclose()
    assert engine.cancelled == ["r#1"]
