"""How the readers of one engine fare at this moment: their token buffers, in seconds of text.

For metrics only; what a policy goes by is in the tracker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.scheduler.tracker import Tracker

BUFFER_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class BufferReport:
    """Of readers who have had their first token and do not pause."""

    readers: int = 0
    dry: int = 0
    """Readers whose buffer is empty: they wait for the next token."""
    quantiles_s: tuple[float, ...] = ()
    """Seconds of text at BUFFER_QUANTILES; empty without readers."""


def take_buffers(tracker: Tracker, now: float) -> BufferReport:
    """`now` on the engine's clock."""
    reading = np.isfinite(tracker.due_s) & ~tracker.elastic
    slack = tracker.due_s[reading] - now
    if not len(slack):
        return BufferReport()
    quantiles = np.quantile(np.maximum(slack, 0.0), BUFFER_QUANTILES)
    return BufferReport(len(slack), int((slack < 0).sum()), tuple(quantiles.tolist()))
