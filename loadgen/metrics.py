"""What a client sees of a stream, and the figures of a run. Pure; all times monotonic seconds.

The reader's side is `Playback`, the same definition that the scheduler works with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field

from tokenflow.replicas.scheduler.playback import Playback, buffers_at_generation, effective_tokens


@dataclass(slots=True)
class StreamRecord:
    """One request as its client saw it."""

    token_rate: float
    """Declared, tokens/s; infinite = as fast as it can be had, by no reader."""
    intended_s: float
    """When it was due to be sent; delays of the generator itself count against the server."""
    sent_s: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, tokens) of each message that carried tokens, ascending."""
    finished_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_token_s(self) -> float | None:
        return self.arrivals[0][0] if self.arrivals else None

    @property
    def ok(self) -> bool:
        return self.error is None and self.finish_reason is not None

    def token_times(self) -> list[float]:
        """Arrival of every token; those of one message share a time."""
        return [at for at, count in self.arrivals for _ in range(count)]

    @property
    def reads(self) -> bool:
        """Whether a reader consumes it, who can run dry and get ahead of."""
        return math.isfinite(self.token_rate)

    @property
    def effective_tokens(self) -> float:
        """Tokens weighted by the reader's buffer on arrival. [TokenFlow §7.1.3]"""
        if not self.reads:
            return float(self.tokens)
        return effective_tokens(buffers_at_generation(self.token_times(), self.token_rate))

    def playback(self, until_s: float = math.inf) -> Playback:
        """The reader's state after what had arrived at `until_s`. Raises ValueError without a
        reader."""
        playback = Playback(self.token_rate)
        for at, count in self.arrivals:
            if at > until_s:
                break
            playback.generate(at, count)
        return playback


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a run. Failed requests count: in the TTFT as waiting until the end."""

    requests: int
    failed: int
    duration_s: float
    """From the first intended send to the end of the last stream."""
    tokens: int
    raw_tok_s: float
    """Tokens received per second."""
    effective_tok_s: float
    """Tokens weighted by the reader's buffer on arrival; all of those nobody reads."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float
    stalled_readers: int
    """Readers that ran dry at least once after their first token."""
    stalls: int
    stall_s: float
    """Seconds all readers together sat dry."""
    dispatch_lag_max_s: float
    """How late the generator itself sent a request."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def summarize(records: Iterable[StreamRecord]) -> Summary:
    """The figures of a finished run. Raises ValueError without records."""
    records = list(records)
    if not records:
        raise ValueError("a run without requests has no figures")
    begun = min(r.intended_s for r in records)
    ends = [r.arrivals[-1][0] for r in records if r.arrivals]
    ends += [r.finished_s for r in records if r.finished_s is not None]
    end = max(ends, default=begun)
    duration = max(end - begun, 1e-9)
    ttfts = [
        (r.first_token_s if r.first_token_s is not None else end) - r.intended_s for r in records
    ]
    playbacks = [r.playback() for r in records if r.reads]
    tokens = sum(r.tokens for r in records)
    effective = sum(r.effective_tokens for r in records)
    lags = [r.sent_s - r.intended_s for r in records if r.sent_s is not None]
    return Summary(
        requests=len(records),
        failed=sum(not r.ok for r in records),
        duration_s=duration,
        tokens=tokens,
        raw_tok_s=tokens / duration,
        effective_tok_s=effective / duration,
        ttft_mean_s=sum(ttfts) / len(ttfts),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        ttft_max_s=max(ttfts),
        stalled_readers=sum(p.stalls > 0 for p in playbacks),
        stalls=sum(p.stalls for p in playbacks),
        stall_s=sum(p.stall_s for p in playbacks),
        dispatch_lag_max_s=max(lags, default=0.0),
    )


def percentile(values: Seq[float], q: float) -> float:
    """The q-th percentile, linear between ranks as numpy's default. Raises ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
