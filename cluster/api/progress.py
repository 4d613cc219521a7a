"""How far the client of a stream is: what stands in the `id` of each server-sent event.

`<request id>:<count>` for one choice: events are counted as if there were one for the choice's
opening, one per token and one for its end. Several choices have a count each, joined by ".", and
after the ends of all follows ".1" with the usage and ".2" with [DONE]. So an id says all that a
server needs to go on after that event, whatever the chunks were.
"""

from __future__ import annotations

import re
from typing import NoReturn

from tokenflow.replicas.errors import InvalidRequestError

USAGE_SENT = 1
ALL_SENT = 2
_COUNTS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})*")
_SHOWN_CHARS = 100


class Progress:
    """Counts per choice; `str` gives the part of the id after the colon."""

    def __init__(self, counts: list[int] | None = None, closing: int = 0) -> None:
        self.counts = counts or []
        """0: nothing yet, 1: opened, 1 + tokens, one more: ended."""
        self.closing = closing

    def __str__(self) -> str:
        parts = [*self.counts, self.closing] if self.closing else self.counts
        return ".".join(map(str, parts))

    def begin(self, choices: int) -> None:
        """There are so many choices; no effect when that is known."""
        self.counts = self.counts or [0] * choices

    def open(self, choice: int) -> bool:
        """Count the opening of a choice; False when the client has it."""
        if self.counts[choice]:
            return False
        self.counts[choice] = 1
        return True

    def add(self, choice: int, events: int) -> None:
        self.counts[choice] += events

    def close(self, stage: int) -> bool:
        """Reach a stage of the end; False when the client has it."""
        if self.closing >= stage:
            return False
        self.closing = stage
        return True

    def tokens(self, choice: int) -> int:
        """Tokens that the client has of a choice, its end counted as one."""
        return max(self.counts[choice] - 1, 0)


def parse_progress(event_id: str | None, request_id: str, choices: int) -> Progress:
    """Where a client is that has seen the event of that id last (None = none). Raises
    InvalidRequestError for what is no id of the request's events."""
    if not event_id:
        return Progress([0] * choices)
    head, _, text = event_id.rpartition(":")
    if head != request_id or not _COUNTS.fullmatch(text):
        _refuse(event_id, request_id)
    counts = [int(part) for part in text.split(".")]
    if len(counts) == choices:
        return Progress(counts)
    if len(counts) != choices + 1 or counts[-1] not in (USAGE_SENT, ALL_SENT):
        _refuse(event_id, request_id)
    return Progress(counts[:-1], counts[-1])


def _refuse(event_id: str, request_id: str) -> NoReturn:
    raise InvalidRequestError(
        f"Last-Event-ID {event_id[:_SHOWN_CHARS]!r} is no event of request "
        f"{request_id[:_SHOWN_CHARS]!r}; send the id of the last event as it was received.",
        param="Last-Event-ID",
    )
