"""Which replicas an ingress has to move its streams off: those that fell silent, and those that
Serve is about to stop. Pure: what was heard and what there is in, names out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Losses:
    """What came to light at one look."""

    silent: tuple[str, ...] = ()
    """Replicas that have not said anything for too long."""
    leaving: tuple[str, ...] = ()
    """Replicas that take no new requests any more: their streams have to go."""


class ReplicaWatch:
    """All times in seconds of one monotonic clock. Look several times per `silence_s`."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._heard: dict[str, float] = {}
        self._silent: set[str] = set()
        self._leaving: set[str] = set()
        self._looked_s = math.inf

    def heard(self, replica: str, now: float) -> bool:
        """A replica has said something; whether it had been given up."""
        self._heard[replica] = now
        if replica not in self._silent:
            return False
        self._silent.discard(replica)
        return True

    def forget(self, replica: str) -> None:
        """Nobody listens to it any more."""
        self._heard.pop(replica, None)
        self._silent.discard(replica)
        self._leaving.discard(replica)

    def look(self, present: Iterable[str], now: float) -> Losses:
        """Each loss is told once. `present` are the replicas that take requests; none at all says
        nothing, for then nobody could take a stream."""
        if now - self._looked_s > self._silence_s / 2:
            # This process itself was held up: it could not have heard anybody.
            self._heard = dict.fromkeys(self._heard, now)
        self._looked_s = now
        silent = [
            name
            for name, at in self._heard.items()
            if name not in self._silent and now - at > self._silence_s
        ]
        self._silent.update(silent)
        remaining = set(present)
        self._leaving &= self._heard.keys() - remaining
        leaving: list[str] = []
        if remaining:
            gone = self._heard.keys() - remaining - self._leaving
            leaving = sorted(gone)
            self._leaving.update(gone)
        return Losses(tuple(silent), tuple(leaving))
