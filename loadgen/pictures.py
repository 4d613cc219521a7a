"""The pictures of a report: which charts there are and what they show. Returns SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from tokenflow.loadgen.charts import WIDTH, Chart, distribution
from tokenflow.loadgen.report import Curve, Repeat, Report

_ROW_CURVES = 60
GAUGE_STYLES = {"waiting": "s1", "running": "s2", "preempted": "s3"}


def style(i: int) -> str:
    """The class of the i-th report's colour."""
    return f"s{i % 6}"


def dry_spans(curve: Curve) -> list[tuple[float, float]]:
    """When the reader of a curve sat dry, in the run's seconds."""
    if curve.token_rate == "max":
        return []
    spans: list[tuple[float, float]] = []
    due, before = math.inf, 0
    for at, done in curve.points:
        if at > due:
            spans.append((due, at))
        due = max(at, due if before else at) + (done - before) / float(curve.token_rate)
        before = done
    return spans


def _visible(spans: Seq[tuple[float, float]], range_s: float) -> list[tuple[float, float]]:
    """Those that are at least a point wide; a thinner mark would say more than is true."""
    return [(start, stop) for start, stop in spans if stop - start >= range_s / WIDTH]


def read_line(curve: Curve) -> list[tuple[float, float]]:
    """What the reader has read, over the run's seconds."""
    if curve.token_rate == "max" or not curve.points:
        return []
    rate = float(curve.token_rate)
    line = [(curve.points[0][0], 0.0)]
    due, before = curve.points[0][0], 0
    for at, done in curve.points:
        if at > due:
            line += [(due, float(before)), (at, float(before))]
        due = max(at, due) + (done - before) / rate
        before = done
    return [*line, (due, float(before))]


def tokens_timeline(curve: Curve, ttft_s: float) -> str:
    """Tokens received and read over time, beside the line of an ideal reader."""
    begun = curve.intended_s
    tokens = curve.points[-1][1] if curve.points else 1
    read = read_line(curve)
    end = max([at for at, _ in curve.points] + [at for at, _ in read] + [begun + 1]) - begun
    chart = Chart(
        (0, end),
        (0, tokens * 1.05),
        x_label="seconds since it was asked",
        y_label="tokens",
        title=f"Tokens of request {curve.index} over time",
    )
    for start, stop in _visible(dry_spans(curve), end):
        chart.box(start - begun, stop - begun, 0, tokens * 1.05, "dry", hint="reader sits dry")
    if curve.token_rate != "max":
        rate = float(curve.token_rate)
        wanted = [(ttft_s, 0.0), (ttft_s + tokens / rate, float(tokens))]
        chart.line(wanted, "wanted", hint=f"wanted: {rate:g} tokens/s from {ttft_s:g} s on")
    received = [(at - begun, float(done)) for at, done in curve.points]
    first = [(received[0][0], 0.0)] if received else []
    chart.line([*first, *received], "received", step=True, hint="received")
    chart.line([(at - begun, done) for at, done in read], "read", hint="read")
    return chart.svg()


def readers_rows(repeat: Repeat) -> str:
    """Every reader a row: waiting, reading, sitting dry; up to the end of the run."""
    curves = sorted(repeat.curves, key=lambda c: c.intended_s)[:_ROW_CURVES]
    end = repeat.figures["duration_s"] or 1.0
    chart = Chart(
        (0, end),
        (0, len(curves)),
        x_label="seconds",
        y_label="one row per reader",
        title="Waiting, reading and dry time of each reader",
        y_ticks=False,
    )
    for i, curve in enumerate(curves):
        low, high = len(curves) - i - 0.85, len(curves) - i - 0.1
        first = curve.points[0][0] if curve.points else end
        chart.box(curve.intended_s, first, low, high, "waits", hint="waits for the first token")
        if not curve.points:
            continue
        line = read_line(curve)
        last = line[-1][0] if line else curve.points[-1][0]
        chart.box(first, last, low, high, "reads", hint=f"request {curve.index}: reads")
        for start, stop in _visible(dry_spans(curve), end):
            chart.box(start, stop, low, high, "dry", hint=f"dry for {stop - start:.2f} s")
    return chart.svg()


def ttft_distribution(reports: Seq[Report], ttft_s: float) -> str:
    """Share of requests with a first token by then; a line a report."""
    waits = [[row.ttft_s for r in report.repeats for row in r.requests] for report in reports]
    least = max(1e-3, min(min(values) for values in waits))
    most = max([max(values) for values in waits] + [ttft_s])
    chart = Chart(
        (least * 0.8, most * 1.25),
        (0, 1),
        x_label="time to first token, seconds (log)",
        y_label="share of requests",
        title="Distribution of the time to first token",
        log_x=True,
    )
    for i, (report, values) in enumerate(zip(reports, waits, strict=True)):
        points = distribution(values)
        chart.line([(points[0][0], 0.0), *points], style(i), step=True, hint=report.name)
    chart.upright(ttft_s, f"limit {ttft_s:g} s")
    return chart.svg()


def stall_distribution(reports: Seq[Report]) -> str:
    """Share of readers that sat dry for no longer than that; a line a report."""
    stalls = [
        [row.stall_s for r in report.repeats for row in r.requests if row.token_rate != "max"]
        for report in reports
    ]
    most = max(0.1, max((max(values) for values in stalls if values), default=0.0) * 1.05)
    chart = Chart(
        (0, most),
        (0, 1),
        x_label="seconds dry in one answer",
        y_label="share of readers",
        title="Distribution of the seconds readers sat dry",
    )
    for i, (report, values) in enumerate(zip(reports, stalls, strict=True)):
        if values:
            points = distribution(values)
            line = [(0.0, 0.0), *points, (most, 1.0)]
            chart.line(line, style(i), step=True, hint=report.name)
    return chart.svg()


def queue(repeat: Repeat) -> str:
    """Requests that wait and that stream, and readers that sit dry, over time."""
    line = repeat.timeline
    at = line["at_s"]
    waiting, streaming = line["waiting"], line["streaming"]
    total = [w + s for w, s in zip(waiting, streaming, strict=True)]
    chart = Chart(
        (0, at[-1]),
        (0, max(total) * 1.1),
        x_label="seconds",
        y_label="requests",
        title="Requests in the system over time",
    )
    zero = [(t, 0.0) for t in at]
    flowing = list(zip(at, streaming, strict=True))
    chart.area(flowing, zero, "reads", hint="streaming")
    chart.area(
        list(zip(at, total, strict=True)), flowing, "waits", hint="waiting for a first token"
    )
    chart.line(list(zip(at, line["dry"], strict=True)), "dry", hint="readers that sit dry")
    return chart.svg()


def gauges(repeat: Repeat) -> str:
    """What the server itself says that waits, runs and is preempted, over time; "" if nothing."""
    at = repeat.server.get("at_s", [])
    lines = {name: own for name, own in repeat.server.items() if name != "at_s"}
    if len(at) < 2 or not lines:
        return ""
    chart = Chart(
        (0, at[-1]),
        (0, max(max(own) for own in lines.values()) * 1.1),
        x_label="seconds",
        y_label="requests",
        title="The server's own gauges over time",
    )
    for name, own in lines.items():
        chart.line(list(zip(at, own, strict=True)), GAUGE_STYLES[name], hint=name)
    return chart.svg()


def speed(repeats: Seq[tuple[str, Repeat]]) -> str:
    """Tokens received per second over time; a line each."""
    lines = [(name, r.timeline) for name, r in repeats]
    chart = Chart(
        (0, max(line["at_s"][-1] for _, line in lines)),
        (0, max(max(line["tokens_per_s"]) for _, line in lines) * 1.1),
        x_label="seconds",
        y_label="tokens/s",
        title="Tokens received per second",
    )
    for i, (name, line) in enumerate(lines):
        points = list(zip(line["at_s"], line["tokens_per_s"], strict=True))
        chart.line(points, style(i), step=True, hint=name)
    return chart.svg()


def throughput_bars(reports: Seq[Report]) -> str:
    """Effective and wasted tokens/s, together the raw ones; where the server says when it
    generates, counted there, else at the client."""
    raws = [report.summary["raw_tok_s"] for report in reports]
    top = max(max(raw.high or 0.0, raw.value) for raw in raws) * 1.18
    chart = Chart(
        (0, len(reports)),
        (0, top),
        x_label="",
        y_label="tokens/s",
        title="Effective and raw throughput",
    )
    for i, (report, raw) in enumerate(zip(reports, raws, strict=True)):
        own = report.summary.get("generated_effective_tok_s", report.summary["effective_tok_s"])
        left, right = i + 0.2, i + 0.8
        chart.box(left, right, 0, own.value, f"{style(i)} fill", hint=f"effective {own.value:.0f}")
        chart.box(left, right, own.value, raw.value, "wasted", hint=f"raw {raw.value:.0f}")
        if own.low is not None and own.high is not None:
            chart.whisker(i + 0.5, own.low, own.high)
        chart.text(i + 0.5, raw.value, f"{own.value:.0f} of {raw.value:.0f}")
        name = report.name if len(report.name) <= 18 else report.name[:17] + "…"
        chart.text(i + 0.5, 0, name, above=False)
    return chart.svg(x_ticks=False)
