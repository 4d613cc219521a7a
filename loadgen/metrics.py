"""What a client sees of a stream, and the figures of a run. Pure; all times monotonic seconds.

The reader's side is `Playback`, the same definition that the scheduler works with. The further
figures of a benchmark, built on these, are in `figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field

from tokenflow.replicas.scheduler.playback import Playback, effective_tokens

LEFT = "left"
"""Finish reason of a stream that its client broke off on purpose."""


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
    generated: list[float] = field(default_factory=list)
    """When the server drew each token, by its own clock; empty where it does not say."""
    prompt_tokens: int | None = None
    """As the server counted them."""
    index: int = 0
    """Which request of the workload it answers."""
    rate_changes: list[tuple[float, float]] = field(default_factory=list)
    """(time, tokens/s): the reader went on at another speed."""
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """(time, seconds): the client itself took nothing from the connection, and nobody read."""

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
        return self._effective(self.token_times())

    @property
    def generated_effective_tokens(self) -> float | None:
        """Tokens weighted by the reader's buffer when the server drew them, None where it does not
        say when. What a server holds back to send it later counts here as what it was: early."""
        if len(self.generated) != self.tokens:
            return None
        times = self.token_times()
        # The clocks differ by at most this; the least delayed token tells it best.
        offset = min((a - g for a, g in zip(times, self.generated, strict=True)), default=0.0)
        return self._effective([g + offset for g in self.generated])

    def _effective(self, times: list[float]) -> float:
        if not self.reads:
            return float(len(times))
        playback = Playback(self.token_rate)
        buffers = []
        changes = self._changes()
        for at in map(self.reading_time, times):
            _follow(playback, changes, at)
            playback.generate(at)
            buffers.append(playback.buffer(at))
        return effective_tokens(buffers)

    def playback(self, until_s: float = math.inf) -> Playback:
        """The reader's state after what had arrived at `until_s`, in reading time. Raises
        ValueError without a reader."""
        playback = Playback(self.token_rate)
        changes = self._changes()
        for at, count in self.arrivals:
            if at > until_s:
                break
            read_at = self.reading_time(at)
            _follow(playback, changes, read_at)
            playback.generate(read_at, count)
        _follow(playback, changes, self.reading_time(until_s))
        return playback

    def reading_time(self, at: float) -> float:
        """`at` on a clock that stands still while the client pauses, so that a pause of its own is
        not held against the server."""
        passed = sum(min(at - start, seconds) for start, seconds in self.pauses if start < at)
        return at - passed

    def _changes(self) -> list[tuple[float, float]]:
        return [(self.reading_time(at), rate) for at, rate in reversed(self.rate_changes)]


def _follow(playback: Playback, changes: list[tuple[float, float]], until_s: float) -> None:
    """Apply the changes of speed before a time; `changes` is latest first and is used up."""
    while changes and changes[-1][0] < until_s:
        at, rate = changes.pop()
        playback.set_rate(rate, at)


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


def span(records: Seq[StreamRecord]) -> tuple[float, float]:
    """(first intended send, end of the last stream) of a run. Raises ValueError without records."""
    if not records:
        raise ValueError("a run without requests has no figures")
    begun = min(r.intended_s for r in records)
    ends = [r.arrivals[-1][0] for r in records if r.arrivals]
    ends += [r.finished_s for r in records if r.finished_s is not None]
    return begun, max(ends, default=begun)


def waits(records: Iterable[StreamRecord], end_s: float) -> list[float]:
    """Seconds from the intended send to the first token; until `end_s` where none came."""
    return [
        (r.first_token_s if r.first_token_s is not None else max(end_s, r.intended_s))
        - r.intended_s
        for r in records
    ]


def summarize(records: Iterable[StreamRecord]) -> Summary:
    """The figures of a finished run. Raises ValueError without records."""
    records = list(records)
    begun, end = span(records)
    duration = max(end - begun, 1e-9)
    ttfts = waits(records, end)
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
