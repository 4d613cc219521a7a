"""Choosing a replica for a request: a pure function, apart from Ray.

For now the replica with the least declared rate in flight, then the fewest streams. [ours]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Load:
    """What this process has put on a replica and not seen end."""

    streams: int = 0
    rate: float = 0.0
    """Sum of declared rates, tokens/s."""


def rank(candidates: Iterable[str], loads: Mapping[str, Load]) -> list[str]:
    """Candidate replica ids, best first. Ties go by id, so that the order is deterministic."""
    idle = Load()

    def key(replica_id: str) -> tuple[float, int, str]:
        load = loads.get(replica_id, idle)
        return (load.rate, load.streams, replica_id)

    return sorted(candidates, key=key)
