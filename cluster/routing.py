"""Choosing a replica for a request: a pure function, apart from Ray.

For now the replica with the least declared rate in flight, then the fewest streams. A request
without a reader asks for all it can get, which is no rate to be added up: it goes where the fewest
streams are, and counts little against those who read. [ours]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_RATE_WITHOUT_READER = 1.0
"""tokens/s: what an engine grants such a request under any load."""


def counted_rate(rate: float) -> float:
    """What a request adds to its replica's load, tokens/s: a finite number."""
    return _RATE_WITHOUT_READER if math.isinf(rate) else rate


@dataclass(slots=True)
class Load:
    """What this process has put on a replica and not seen end."""

    streams: int = 0
    rate: float = 0.0
    """Sum of counted rates, tokens/s."""


def rank(candidates: Iterable[str], loads: Mapping[str, Load], rate: float) -> list[str]:
    """Candidate replica ids, best first, for a request of that rate (infinite = no reader). Ties
    go by id, so that the order is deterministic."""
    idle = Load()

    def key(replica_id: str) -> tuple[float, float, str]:
        load = loads.get(replica_id, idle)
        # Rates alone would pile those without a reader up wherever nobody reads.
        if math.isinf(rate):
            return (load.streams, load.rate, replica_id)
        return (load.rate, load.streams, replica_id)

    return sorted(candidates, key=key)
