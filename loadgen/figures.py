"""The figures of a benchmark run, by name: what `metrics` and `qoe` define, over all requests, by
output length and by reading speed, and over time.

Pure. A figure that has no value (no reader, no timestamps from the server) is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from tokenflow.loadgen.catalogue import FLUID
from tokenflow.loadgen.metrics import LEFT, StreamRecord, percentile, span, summarize, waits
from tokenflow.loadgen.qoe import andes_qoe, fluidity_index, on_time_share

LENGTH_BUCKETS = ((1, 31, "under 32"), (32, 256, "32-256"), (257, 1 << 40, "over 256"))
"""Output lengths, tokens. In short outputs the buffer's limits of 10 and 20 % are a token or two,
so that their effective throughput says little; they are kept apart."""
Figures = dict[str, float | None]


class Objectives(BaseModel):
    """What counts as good service, and the weights of QoS."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: float = Field(default=1.3, gt=0, description="Longest time to first token, seconds.")
    stall_s: float = Field(
        default=0.5, ge=0, description="Most seconds a reader may sit dry in one answer."
    )
    tpot_s: float | None = Field(
        default=None, gt=0, description="Longest time per output token, seconds; null = any."
    )
    qos_ttft_weight: float = Field(
        default=1.0, ge=0, description="Lambda of QoS: tokens that a second of TTFT costs."
    )
    qos_stall_weight: float = Field(
        default=1.0, ge=0, description="Mu of QoS: tokens that a second of stalling costs."
    )


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """One request's own figures; seconds."""

    ttft_s: float
    """Until the end of the run where no token came."""
    tpot_s: float | None
    e2e_s: float
    tokens: int
    effective: float
    generated_effective: float | None
    stalls: int
    stall_s: float
    andes_qoe: float | None
    """None without a reader, as the next two."""
    fluidity: float | None
    achieved: float | None
    """Tokens over the time from asking to having read the last, over the reading speed; 0 to 1."""
    on_time: float | None
    good: bool
    """Whether it is within all objectives."""


def stream_figures(
    record: StreamRecord, begun_s: float, end_s: float, goals: Objectives
) -> StreamFigures:
    """The figures of one request of a run that lasted from `begun_s` to `end_s`."""
    tokens = record.tokens
    (ttft,) = waits([record], end_s)
    tpot = None
    if tokens > 1:
        tpot = (record.arrivals[-1][0] - record.arrivals[0][0]) / (tokens - 1)
    last = end_s
    if record.ok and record.finished_s is not None:
        last = record.arrivals[-1][0] if record.arrivals else record.finished_s
    stalls, stall_s = 0, 0.0
    qoe = fluidity = achieved = on_time = None
    if record.reads:
        playback = record.playback()
        stalls, stall_s = playback.stalls, playback.stall_s
        times = [record.reading_time(at) for at in record.token_times()]
        asked, rate = record.intended_s, record.token_rate
        qoe = andes_qoe(times, asked, rate, goals.ttft_s) if record.ok else 0.0
        fluidity = fluidity_index(times, asked, rate, goals.ttft_s) if record.ok else 0.0
        on_time = on_time_share(times, asked, rate, goals.ttft_s)
        achieved = 0.0
        if tokens:
            period = 1 / playback.rate
            took = max(playback.due_s, asked + period, -math.inf if record.ok else end_s) - asked
            achieved = min(1.0, tokens * period / took)
    good = (
        record.ok
        and ttft <= goals.ttft_s
        and stall_s <= goals.stall_s
        and (goals.tpot_s is None or tpot is None or tpot <= goals.tpot_s)
    )
    return StreamFigures(
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=max(0.0, last - record.intended_s),
        tokens=tokens,
        effective=record.effective_tokens,
        generated_effective=record.generated_effective_tokens,
        stalls=stalls,
        stall_s=stall_s,
        andes_qoe=qoe,
        fluidity=fluidity,
        achieved=achieved,
        on_time=on_time,
        good=good,
    )


def figures(
    records: Seq[StreamRecord],
    goals: Objectives,
    *,
    within: tuple[float, float] | None = None,
) -> Figures:
    """Every figure of `METRICS` for these requests. `within` is the time of the run they are part
    of, their own by default. Raises ValueError without records."""
    begun, end = within or span(records)
    duration = max(end - begun, 1e-9)
    own = [stream_figures(r, begun, end, goals) for r in records]
    summary = summarize(records)
    readers = [f for f, r in zip(own, records, strict=True) if r.reads]
    tokens = summary.tokens
    effective = sum(f.effective for f in own)
    drawn = [f.generated_effective for f in own]
    generated = sum(d for d in drawn if d is not None) if None not in drawn else None
    ttfts = [f.ttft_s for f in own]
    tpots = [f.tpot_s for f in own if f.tpot_s is not None]
    gaps = [b[0] - a[0] for r in records for a, b in pairwise(r.arrivals)]
    lags = [r.sent_s - r.intended_s for r in records if r.sent_s is not None]
    stalls = [f.stall_s for f in readers]
    achieved = [f.achieved for f in readers if f.achieved is not None]
    good = [f for f in own if f.good]
    due = [r.intended_s for r in records]
    sent = [
        r.first_token_s - r.sent_s
        for r in records
        if r.first_token_s is not None and r.sent_s is not None
    ]
    counted = [r.prompt_tokens for r in records if r.prompt_tokens is not None]
    cost = goals.qos_ttft_weight * sum(ttfts) + goals.qos_stall_weight * sum(stalls)
    return {
        "requests": len(records),
        "failed": summary.failed,
        "left": sum(r.finish_reason == LEFT for r in records),
        "duration_s": duration,
        "offered_req_s": (len(due) - 1) / (max(due) - min(due)) if max(due) > min(due) else None,
        "tokens": tokens,
        "prompt_tokens": sum(counted) if len(counted) == len(records) else None,
        "raw_tok_s": tokens / duration,
        "effective_tok_s": effective / duration,
        "generated_effective_tok_s": None if generated is None else generated / duration,
        "effective_ratio": effective / tokens if tokens else None,
        "generated_effective_ratio": None
        if not tokens or generated is None
        else generated / tokens,
        **_spread("ttft", ttfts, "mean", 50, 90, 95, 99, "max"),
        "ttft_sent_mean_s": _mean(sent),
        "ttft_slo_share": sum(t <= goals.ttft_s for t in ttfts) / len(ttfts),
        **_spread("tpot", tpots, "mean", 50, 99),
        **_spread("chunk_gap", gaps, 50, 99, "max"),
        **_spread("e2e", [f.e2e_s for f in own], "mean", 50, 99),
        "stall_s": sum(stalls) if readers else None,
        "stall_mean_s": _mean(stalls),
        "stall_p99_s": percentile(stalls, 99) if stalls else None,
        "stalls": summary.stalls if readers else None,
        "stalled_readers": summary.stalled_readers if readers else None,
        "smooth_share": _mean([float(f.stalls == 0 and f.tokens > 0) for f in readers]),
        "qos_tok_s": (effective - cost) / duration,
        "andes_qoe_mean": _mean(_known(f.andes_qoe for f in readers)),
        "andes_qoe_p5": percentile(_known(f.andes_qoe for f in readers), 5) if readers else None,
        "on_time_share": _weighted((f.on_time, f.tokens) for f in readers),
        "fluid_share": _mean([float(x >= FLUID) for x in _known(f.fluidity for f in readers)]),
        "goodput_req_s": len(good) / duration,
        "goodput_tok_s": sum(f.tokens for f in good) / duration,
        "goodput_share": len(good) / len(own),
        "fairness": jain(achieved) if achieved else None,
        **_spread("lag", lags, 50, 99, "max"),
    }  # fmt: skip


def by_length(records: Seq[StreamRecord], goals: Objectives) -> dict[str, Figures]:
    """Figures of the output lengths of LENGTH_BUCKETS that occur. Requests without any token are
    of no length and so in none."""
    parts = {
        name: [r for r in records if low <= r.tokens <= high] for low, high, name in LENGTH_BUCKETS
    }
    return _parts(records, goals, parts)


def by_rate(records: Seq[StreamRecord], goals: Objectives) -> dict[str, Figures]:
    """Figures of every reading speed, as "10 tok/s" or "no reader"."""
    rates = sorted({r.token_rate for r in records})
    parts = {rate_name(rate): [r for r in records if r.token_rate == rate] for rate in rates}
    return _parts(records, goals, parts)


def rate_name(rate: float) -> str:
    return "no reader" if rate == math.inf else f"{rate:g} tok/s"


def _parts(
    records: Seq[StreamRecord], goals: Objectives, parts: dict[str, list[StreamRecord]]
) -> dict[str, Figures]:
    whole = span(records)
    return {name: figures(own, goals, within=whole) for name, own in parts.items() if own}


def jain(values: Seq[float]) -> float:
    """Jain's fairness index: 1 when all are alike, 1/n when one has everything. 1 when all are 0.
    Raises ValueError if empty."""
    if not values:
        raise ValueError("no values")
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def timeline(records: Seq[StreamRecord], bins: int = 120) -> dict[str, list[float]]:
    """A run over time, at the ends of equal bins: `at_s` since its beginning, `waiting` for a first
    token, `streaming`, readers that sit `dry`, `arrivals_per_s` and `tokens_per_s` in the bin."""
    begun, end = span(records)
    step = max(end - begun, 1e-9) / bins
    shown: dict[str, list[float]] = {"at_s": [(i + 1) * step for i in range(bins)]}
    for name in ("waiting", "streaming", "dry", "arrivals_per_s", "tokens_per_s"):
        shown[name] = [0.0] * bins

    def place(at: float) -> int:
        return min(bins - 1, max(0, int((at - begun) / step)))

    for record in records:
        shown["arrivals_per_s"][place(record.intended_s)] += 1 / step
        for at, count in record.arrivals:
            shown["tokens_per_s"][place(at)] += count / step
        first = record.first_token_s
        done = record.finished_s if record.finished_s is not None else end
        for i in range(place(record.intended_s), bins):
            at = begun + (i + 1) * step
            if record.intended_s > at or done < at:
                continue
            shown["waiting" if first is None or first > at else "streaming"][i] += 1
        for start, stop in _dry_spans(record):
            for i in range(place(start), place(stop) + 1):
                shown["dry"][i] += start <= begun + (i + 1) * step < stop
    return shown


def _dry_spans(record: StreamRecord) -> list[tuple[float, float]]:
    """When its reader sat dry, by the wall clock."""
    if not record.reads or record.rate_changes or record.pauses:
        return []
    spans = []
    due = record.first_token_s or 0.0
    for at, count in record.arrivals:
        if at > due:
            spans.append((due, at))
        due = max(at, due) + count / record.token_rate
    return spans


def _spread(name: str, values: Seq[float], *which: str | int) -> Figures:
    found: Figures = {}
    for kind in which:
        key = f"{name}_{kind}_s" if isinstance(kind, str) else f"{name}_p{kind}_s"
        if not values:
            found[key] = None
        elif isinstance(kind, int):
            found[key] = percentile(values, kind)
        else:
            found[key] = max(values) if kind == "max" else fmean(values)
    return found


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Seq[float]) -> float | None:
    return fmean(values) if values else None


def _weighted(values: Iterable[tuple[float | None, int]]) -> float | None:
    pairs = [(value, weight) for value, weight in values if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
