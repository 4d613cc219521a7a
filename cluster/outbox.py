"""What a replica owes to its ingresses: events on their way, and requests that wait for a new one.

One outbox per ingress feeds its frame subscription. A request with a context outlives its ingress:
its events are kept, its reader counts as paused, and for a grace period another ingress may take it
over. No Ray in here, and no engine but the two calls it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from tokenflow.cluster.wire import (
    Frame,
    Holding,
    LoadNews,
    Notice,
    PackedEvent,
    Submission,
    pack,
)
from tokenflow.replicas.errors import InvalidRequestError, RequestCancelledError
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange

_FRAME_INTERVAL_S = 0.005
"""Least time between two frames for one ingress: each costs both sides more than its events do, and
steps may be shorter."""


class EngineDoor(Protocol):
    """What is needed of an EngineLoop."""

    def cancel(self, request_id: str) -> None: ...

    def change_reader(self, request_id: str, change: ReaderChange) -> None: ...


class _Outbox:
    """What one ingress has not fetched yet."""

    __slots__ = (
        "connection", "events", "notices", "ready", "requests", "told", "unreported",
    )  # fmt: skip

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.notices: list[Notice] = []
        self.ready = asyncio.Event()
        self.requests: dict[str, _Request] = {}
        self.connection: object | None = None
        """The subscription that stands; None = none yet."""
        self.unreported: dict[str, int] = {}
        """Its requests that no load it was sent knew of: the how-manieth each was of all."""
        self.told = 0
        """The number of the load report it was sent last."""

    def news(self, report: LoadReport) -> LoadNews | None:
        """The load, when it has not been sent yet."""
        if report.number <= self.told:
            return None
        self.told = report.number
        known = tuple(r for r, nth in self.unreported.items() if nth <= report.requests)
        for request_id in known:
            del self.unreported[request_id]
        return LoadNews(report, known)


class _Request:
    """A request of this replica, and which ingress has it."""

    __slots__ = ("ended", "events", "left", "made", "owner", "submission", "taken_s")

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.owner: str | None = submission.ingress_id
        """None: its ingress is gone."""
        self.events: list[PackedEvent] = list(submission.past)
        """Kept only with a context."""
        self.made = len(submission.resumed_ids)
        self.ended = False
        self.left = 0
        """How often its ingress was gone."""
        self.taken_s = time.monotonic()

    @property
    def id(self) -> str:
        return self.submission.request_id

    @property
    def kept(self) -> bool:
        return bool(self.submission.context)


class Outboxes:
    """All of them. Lives on one event loop.

    `load` is the engine's latest report, which goes along with frames. `healthy` says whether the
    engine gets on: without it no heartbeat is sent, and ingresses move their streams elsewhere.
    """

    def __init__(
        self,
        engine: EngineDoor,
        *,
        grace_s: float,
        heartbeat_s: float,
        load: Callable[[], LoadReport],
        healthy: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._grace_s = grace_s
        self._heartbeat_s = heartbeat_s
        self._load = load
        self._healthy = healthy
        self._taken = 0
        self._expected: dict[str, bool] = {}
        """Requests that are not taken yet; whether they still are wanted."""
        self._outboxes: dict[str, _Outbox] = {}
        self._requests: dict[str, _Request] = {}

    # -- from the engine ------------------------------------------------------------------------

    def dispatch(self, events: Iterable[TokenEvent]) -> None:
        """Put each event into the outbox of its request's ingress."""
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue
            request.made += event.token_id >= 0
            if request.kept:
                request.events.append(tuple(event))
            outbox = self._outboxes.get(request.owner) if request.owner else None
            if outbox is not None:
                outbox.events.append(event)
                outbox.ready.set()
            if event.finish_reason is not None:
                request.ended = True
                if request.kept:
                    self._later(self._drop, request)
                else:
                    self._drop(request)

    def wake(self) -> None:
        """Let every subscription look at the engine's state."""
        for outbox in self._outboxes.values():
            outbox.ready.set()

    # -- from ingresses -------------------------------------------------------------------------

    @contextlib.contextmanager
    def expecting(self, request_id: str) -> Iterator[None]:
        """While the body runs a request may be cancelled that is yet to be taken. Raises
        RequestCancelledError after it when that has happened."""
        self._expected[request_id] = True
        try:
            yield
        finally:
            wanted = self._expected.pop(request_id)
        if not wanted:
            raise RequestCancelledError("The request was cancelled before it began.")

    def take(self, submission: Submission) -> None:
        """A request that the engine has accepted."""
        request = self._requests[submission.request_id] = _Request(submission)
        outbox = self._outbox(submission.ingress_id)
        outbox.requests[request.id] = request
        self._taken += 1
        outbox.unreported[request.id] = self._taken

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests and forget them; unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._expected:
                self._expected[request_id] = False
            self._engine.cancel(request_id)
            if (request := self._requests.get(request_id)) is not None:
                self._drop(request)

    async def frames(
        self, ingress_id: str, check: Callable[[], None]
    ) -> AsyncGenerator[Frame, None]:
        """The events of one ingress, for as long as it listens; a frame without events at first and
        whenever there was nothing for `heartbeat_s`. `check` is called before each wait and may
        raise. When it ends, the ingress is taken for dead, unless it listens again."""
        outbox = self._outbox(ingress_id)
        connection = outbox.connection = object()
        sent_s = -math.inf
        try:
            yield pack([], news=outbox.news(self._load()))
            while True:
                check()
                try:
                    async with asyncio.timeout(self._heartbeat_s):
                        await outbox.ready.wait()
                except TimeoutError:
                    if self._healthy():
                        yield pack([], news=outbox.news(self._load()))
                    continue
                if (early_s := sent_s + _FRAME_INTERVAL_S - time.monotonic()) > 0:
                    await asyncio.sleep(early_s)
                outbox.ready.clear()
                events, outbox.events = outbox.events, []
                notices, outbox.notices = outbox.notices, []
                if events or notices:
                    sent_s = time.monotonic()
                    yield pack(events, notices, outbox.news(self._load()))
        finally:
            if outbox.connection is connection:
                self._abandon(ingress_id, outbox)

    def adopt(self, client_id: str, ingress_id: str) -> list[Holding]:
        """Hand what there is of a client's request over to another ingress, which gets its events
        from now on. Empty when there is nothing, or nothing that may be handed over."""
        holdings = []
        for request in self._of_client(client_id):
            if not request.kept:
                continue
            if request.owner != ingress_id:
                self._tell_owner(Notice(request.id, "taken"), request)
                self._leave_owner(request)
                request.owner = ingress_id
                self._outbox(ingress_id).requests[request.id] = request
            submission = request.submission
            age_s = submission.waited_s + time.monotonic() - request.taken_s
            holdings.append(Holding(submission, tuple(request.events), age_s))
        return holdings

    def change(self, request_id: str, change: ReaderChange) -> None:
        """What the owner of a request says about its reader."""
        self._engine.change_reader(request_id, change)

    def control(self, client_id: str, change: ReaderChange | None) -> bool:
        """What some other ingress was asked: to change a client's request, or (None) to end it. Its
        owner is told, and without one it is done here. False when there is no such request.

        Raises InvalidRequestError for more consumed tokens than there are.
        """
        requests = [request for request in self._of_client(client_id) if not request.ended]
        for request in requests:
            if (
                change is not None
                and change.consumed is not None
                and change.consumed > request.made
            ):
                raise InvalidRequestError(
                    f"consumed is {change.consumed}, but only {request.made} tokens were made.",
                    param="consumed",
                )
        for request in requests:
            notice = Notice(request.id, "cancel" if change is None else "change", change)
            if self._tell_owner(notice, request):
                continue
            if change is None:
                self.cancel([request.id])
                continue
            # Nobody reads it now; its pause is for the time when somebody does again.
            self._engine.change_reader(request.id, replace(change, paused=None))
            request.submission = replace(
                request.submission,
                **{
                    name: value
                    for name in ("token_rate", "paused")
                    if (value := getattr(change, name)) is not None
                },
            )
        return bool(requests)

    # -- the pieces -----------------------------------------------------------------------------

    def _of_client(self, client_id: str) -> list[_Request]:
        return [r for r in self._requests.values() if r.submission.client_id == client_id]

    def _outbox(self, ingress_id: str) -> _Outbox:
        outbox = self._outboxes.get(ingress_id)
        if outbox is None:
            outbox = self._outboxes[ingress_id] = _Outbox()
            # An ingress that died before it could listen must not leave its requests here.
            self._later(self._abandon_unheard, ingress_id, outbox)
        return outbox

    def _abandon_unheard(self, ingress_id: str, outbox: _Outbox) -> None:
        if outbox.connection is None and self._outboxes.get(ingress_id) is outbox:
            self._abandon(ingress_id, outbox)

    def _abandon(self, ingress_id: str, outbox: _Outbox) -> None:
        """The ingress is gone: end what ends with it, keep the rest for the next one."""
        if self._outboxes.get(ingress_id) is outbox:
            del self._outboxes[ingress_id]
        for request in list(outbox.requests.values()):
            if not request.kept:
                self.cancel([request.id])
                continue
            request.owner = None
            request.left += 1
            if not request.ended:
                self._engine.change_reader(request.id, ReaderChange(paused=True))
                self._later(self._expire, request, request.left)

    def _expire(self, request: _Request, left: int) -> None:
        waits = request.owner is None and request.left == left and not request.ended
        if waits and self._requests.get(request.id) is request:
            self.cancel([request.id])

    def _tell_owner(self, notice: Notice, request: _Request) -> bool:
        outbox = self._outboxes.get(request.owner) if request.owner else None
        if outbox is None:
            return False
        outbox.notices.append(notice)
        outbox.ready.set()
        return True

    def _leave_owner(self, request: _Request) -> None:
        outbox = self._outboxes.get(request.owner) if request.owner else None
        if outbox is not None:
            outbox.requests.pop(request.id, None)

    def _drop(self, request: _Request) -> None:
        if self._requests.get(request.id) is request:
            del self._requests[request.id]
            self._leave_owner(request)

    def _later(self, what: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_later(self._grace_s, what, *args)
