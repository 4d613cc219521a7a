"""The life of one traced request, as its engine notes it: what happened to it, and when.

Notes are plain data. They travel with the request's tokens, and who reads them makes a trace of
them (cluster/spans.py); a request that is not traced has none.
"""

from __future__ import annotations

import time
from typing import NamedTuple

MOST_NOTES = 1000
"""Of one request on one engine; further ones are only counted."""


class Note(NamedTuple):
    """Something that happened to a request. A tuple, so that it pickles cheaply."""

    what: str
    """A state it came into (State's values), or preempt, offload, load, prefill, first_token,
    stalled."""
    at_s: float
    """Unix time, seconds."""
    values: dict[str, float | str]


class Life:
    """Collects the notes of one request."""

    __slots__ = ("_kept", "_notes", "left_out")

    def __init__(self) -> None:
        self._notes: list[Note] = []
        self._kept = 0
        self.left_out = 0
        """Notes that were one too many."""

    def note(self, what: str, **values: float | str) -> None:
        """Something happens now."""
        if self._kept >= MOST_NOTES:
            self.left_out += 1
            return
        self._kept += 1
        self._notes.append(Note(what, time.time(), values))

    def take(self) -> tuple[Note, ...]:
        """Notes since the last call, in order."""
        notes, self._notes = tuple(self._notes), []
        return notes
