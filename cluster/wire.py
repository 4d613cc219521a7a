"""What travels between ingress and replica: one request each way down, frames of events up."""

from __future__ import annotations

from dataclasses import dataclass

from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as the ingress hands it to a replica.

    `request_id` is unique per attempt, so that a stream resubmitted after a failure never meets
    its own past. `resumed_ids` are the tokens the client already has.
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
    kv_source: str | None = None
    """The node whose store has KV of this text, if another replica has served it before."""


Frame = list[tuple[object, ...]]
"""The events of one or more engine steps for one ingress: TokenEvents as plain tuples. A replica's
load may stand before them."""


@dataclass(frozen=True, slots=True)
class LoadNews:
    """A replica's load, and which of the ingress's requests it is the first to know of."""

    report: LoadReport
    request_ids: tuple[str, ...]

    def to_item(self) -> tuple[object, ...]:
        """The item of a frame."""
        return (_LOAD, self.report.to_wire(), self.request_ids)


_LOAD = 0
"""Where an event has its request id, which is text."""


def take_news(frame: Frame) -> LoadNews | None:
    """The load that a frame begins with, if it does; it is taken out of the frame."""
    if not frame or frame[0][0] != _LOAD:
        return None
    _, values, request_ids = frame.pop(0)
    return LoadNews(LoadReport.from_wire(values), request_ids)  # type: ignore[arg-type]


def pack(events: list[TokenEvent], news: LoadNews | None = None) -> Frame:
    head: Frame = [] if news is None else [news.to_item()]
    return head + [tuple(event) for event in events]


def unpack(frame: Frame) -> list[TokenEvent]:
    return [TokenEvent(*item) for item in frame]  # type: ignore[arg-type]
