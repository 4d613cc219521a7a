"""What travels between ingress and replica: one request each way down, frames of events up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import SamplingParams

PackedEvent = tuple[object, ...]
"""A TokenEvent as a plain tuple, which pickles cheaply."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as the ingress hands it to a replica.

    `request_id` is unique per attempt, so that a stream resubmitted after a failure never meets
    its own past. `resumed_ids` are the tokens the ingress already has.
    """

    request_id: str
    ingress_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    token_rate: float
    """tokens/s; infinite = no reader."""
    resumed_ids: tuple[int, ...] = ()
    waited_s: float = 0.0
    """Seconds since the client's request arrived, so that order of arrival survives a move."""
    cache_salt: str | None = None
    """Only requests with the same salt share cached prefixes."""
    client_id: str = ""
    """The id of the client's request; its choices share it."""
    choice: int = 0
    context: bytes = b""
    """What another ingress needs to go on with the answer, of no meaning to the replica. Empty: the
    request ends with its ingress."""
    past: tuple[PackedEvent, ...] = ()
    """The events of `resumed_ids`, of a request with a context."""
    consumed: int | None = None
    """How many of `resumed_ids` the reader has consumed; None = all."""
    paused: bool = False
    traced: bool = False
    """Whether its events are to tell what happens to it."""
    kv_source: str | None = None
    """The node whose store has KV of this text, if another replica has served it before."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a replica has of a request that an ingress takes over."""

    submission: Submission
    """As submitted, with the present rate and pause."""
    events: tuple[PackedEvent, ...]
    """All of them, from the first token of the output on."""
    age_s: float
    """Seconds since the client's request arrived."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Word for the ingress that owns a request, of what another one was asked."""

    request_id: str
    """Of the attempt."""
    kind: Literal["taken", "cancel", "change"]
    """Another ingress goes on with it; it is to end; its reader has changed."""
    change: ReaderChange | None = None


@dataclass(frozen=True, slots=True)
class LoadNews:
    """A replica's load, and which of the ingress's requests it is the first to know of."""

    report: LoadReport
    request_ids: tuple[str, ...]


Frame = list[PackedEvent]
"""The events of one or more engine steps for one ingress, before them the replica's load if that is
new, and after them what else the ingress must know. An empty one says that the replica lives."""

_LOAD, _NOTICE = 0, 1
"""Where an event has its request id, which is text."""


def pack(
    events: Iterable[TokenEvent], notices: Iterable[Notice] = (), news: LoadNews | None = None
) -> Frame:
    frame: Frame = [] if news is None else [(_LOAD, news.report.to_wire(), news.request_ids)]
    frame += [tuple(event) for event in events]
    frame += [(_NOTICE, notice) for notice in notices]
    return frame


def unpack(frame: Frame) -> tuple[list[TokenEvent], list[Notice], LoadNews | None]:
    notices: list[Notice] = []
    news = None
    if frame and frame[0][0] == _LOAD:
        _, values, request_ids = frame.pop(0)
        news = LoadNews(LoadReport.from_wire(values), request_ids)  # type: ignore[arg-type]
    while frame and frame[-1][0] == _NOTICE:
        notices.append(frame.pop()[1])  # type: ignore[arg-type]
    return unpack_events(frame), notices[::-1], news


def unpack_events(events: Iterable[PackedEvent]) -> list[TokenEvent]:
    return [TokenEvent(*item) for item in events]  # type: ignore[arg-type]
