"""What a traced stream went through: its attempts on replicas, and what their engines noted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tokenflow.replicas.life import Note


@dataclass(slots=True)
class Attempt:
    """One submission of a stream. Unix times, seconds."""

    number: int
    begun_s: float
    replica_id: str | None = None
    placed_s: float | None = None
    """When the replica had taken it."""
    ended_s: float | None = None
    end: str = ""
    """Why it ended before its stream did: refused, lost, moved."""
    notes: list[Note] = field(default_factory=list)


class Attempts:
    """All attempts of one stream, by their ids. Told of ids that it does not know, it ignores
    them."""

    def __init__(self) -> None:
        self._by_id: dict[str, Attempt] = {}

    def begin(self, attempt_id: str) -> None:
        """It is handed to the router. An earlier one that no replica has taken was refused."""
        for earlier_id, earlier in self._by_id.items():
            if earlier.placed_s is None:
                self.end(earlier_id, "refused")
        self._by_id[attempt_id] = Attempt(len(self._by_id) + 1, time.time())

    def placed(self, attempt_id: str, replica_id: str) -> None:
        """A replica has taken it."""
        if (attempt := self._by_id.get(attempt_id)) is not None:
            attempt.replica_id, attempt.placed_s = replica_id, time.time()

    def note(self, attempt_id: str, notes: Iterable[Note]) -> None:
        """Its engine tells what happened."""
        if (attempt := self._by_id.get(attempt_id)) is not None:
            attempt.notes += notes

    def end(self, attempt_id: str, how: str) -> None:
        """It ends, and its stream goes on without it."""
        attempt = self._by_id.get(attempt_id)
        if attempt is not None and attempt.ended_s is None:
            attempt.ended_s, attempt.end = time.time(), how

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._by_id.values())
