"""Measures of a reader's experience that others have defined, beside TokenFlow's own in `metrics`.

Pure. `times` are the arrivals of a stream's tokens, ascending, seconds; `asked_s` is when it was
asked for, `rate` the reading speed in tokens/s, `ttft_s` the first token's time limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

_ROUNDING_S = 1e-9


def andes_qoe(times: Seq[float], asked_s: float, rate: float, ttft_s: float) -> float:
    """Andes' quality of experience, 0 to 1: 1 when no token is read later than by an ideal server,
    which delivers the first after `ttft_s` and the rest at the reading speed. [Andes v2]

    With the reading time of token i as `d_i = max(a_i, d_{i-1} + 1/rate)`, `d_1` not before its
    ideal: one less the delays against the ideal over the times since asking. 0 without tokens.
    """
    delays = waited = 0.0
    read_at = -math.inf
    for i, at in enumerate(times):
        ideal = asked_s + ttft_s + i / rate
        read_at = max(at, ideal if i == 0 else read_at + 1 / rate)
        delays += read_at - ideal
        waited += read_at - asked_s
    if not times:
        return 0.0
    return 1.0 - delays / waited if waited > 0 else 1.0


def on_time_share(times: Seq[float], asked_s: float, rate: float, ttft_s: float) -> float:
    """Share of the tokens that came before an ideal reader wanted them. 0 without tokens."""
    if not times:
        return 0.0
    due = asked_s + ttft_s + _ROUNDING_S
    return sum(at <= due + i / rate for i, at in enumerate(times)) / len(times)


def fluidity_index(times: Seq[float], asked_s: float, rate: float, ttft_s: float) -> float:
    """Share of token deadlines that were met, 0 to 1. [Etalon, fluidity-index]

    The first token has `ttft_s`, each further one `1 / rate` after the one before; what comes early
    leaves its slack to the next. A gap that is `x` longer than that misses
    `floor(x * rate) + 1` deadlines and leaves no slack. 0 without tokens.
    """
    met = missed = 0
    slack = 0.0
    before, allowed = asked_s, ttft_s
    for at in times:
        late = (at - before) - slack - allowed
        if late <= _ROUNDING_S:
            met += 1
            slack = max(0.0, -late)
        else:
            missed += math.floor(late * rate + _ROUNDING_S) + 1
            slack = 0.0
        before, allowed = at, 1 / rate
    return met / (met + missed) if met + missed else 0.0
