"""What changed from one report to another, whether it is more than noise, and conditions on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenflow.loadgen.catalogue import METRICS
from tokenflow.loadgen.intervals import Interval, bootstrap, difference
from tokenflow.loadgen.report import Report, RequestRow
from tokenflow.loadgen.tables import number, unit
from tokenflow.replicas.errors import ConfigError

COMPARED = (
    "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttft_slo_share", "tpot_mean_s", "e2e_mean_s",
    "e2e_p99_s", "stall_mean_s", "stall_p99_s", "stalled_readers", "andes_qoe_mean", "fairness",
    "raw_tok_s", "effective_tok_s", "generated_effective_tok_s", "effective_ratio", "qos_tok_s",
    "goodput_share", "duration_s", "failed",
)  # fmt: skip
"""The figures that are shown side by side."""
_CONDITION = re.compile(
    r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)\s*(%?)\s*"
)
_SUFFIXES = ("", "_s", "_tok_s")
_PER_REQUEST: dict[str, tuple[Callable[[RequestRow], float | None], float | None]] = {
    "ttft_mean_s": (lambda row: row.ttft_s, None),
    "ttft_p50_s": (lambda row: row.ttft_s, 50),
    "ttft_p99_s": (lambda row: row.ttft_s, 99),
    "tpot_mean_s": (lambda row: row.tpot_s, None),
    "e2e_mean_s": (lambda row: row.e2e_s, None),
    "e2e_p99_s": (lambda row: row.e2e_s, 99),
    "stall_mean_s": (lambda row: row.stall_s if row.token_rate != "max" else None, None),
    "stall_p99_s": (lambda row: row.stall_s if row.token_rate != "max" else None, 99),
    "andes_qoe_mean": (lambda row: row.andes_qoe, None),
}
"""Figures that are a mean (None) or a percentile over requests: what a single run can bootstrap."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in two reports."""

    name: str
    before: float
    after: float
    interval: Interval
    """Of the difference; without bounds where nothing can be said about noise."""
    over: str
    """What the interval is over: "repeats", "requests" or ""."""

    @property
    def relative(self) -> float | None:
        return (self.after - self.before) / abs(self.before) if self.before else None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "changed" (where neither is), "noise" or "unknown"."""
        real = self.interval.excludes_zero
        if self.after == self.before:
            return "same"
        if real is None:
            return "unknown"
        if not real:
            return "noise"
        better = METRICS[self.name].better
        if not better:
            return "changed"
        return "better" if (self.after > self.before) == (better == "high") else "worse"


@dataclass(frozen=True, slots=True)
class Condition:
    """What must not be, as "ttft_p99_s > 1.3" or, against a first report, "ttft_p99_s > +10 %"."""

    name: str
    operator: str
    value: float
    relative: bool
    text: str

    def holds(self, value: float) -> bool:
        match self.operator:
            case "<":
                return value < self.value
            case "<=":
                return value <= self.value
            case ">":
                return value > self.value
        return value >= self.value


def parse_conditions(text: str) -> list[Condition]:
    """ "ttft_p99>1.3,effective_ratio<0.9,raw_tok_s<-5%". A signed percentage is a change from the
    first report. Raises ConfigError."""
    found = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"--fail-if: {part.strip()!r} is not FIGURE<VALUE or FIGURE>+PERCENT%, as "
                "ttft_p99_s>1.3 or raw_tok_s<-5%."
            )
        given, operator, value, percent = match.groups()
        name = next((given + end for end in _SUFFIXES if given + end in METRICS), None)
        if name is None:
            raise ConfigError(
                f"--fail-if: there is no figure {given!r}; there are {', '.join(METRICS)}."
            )
        if percent and value[0] not in "+-":
            raise ConfigError(
                f"--fail-if: {part.strip()!r}: a change needs its sign, as +10% or -5%; a share is "
                "given as 0.9."
            )
        try:
            limit = float(value) / (100 if percent else 1)
        except ValueError:
            raise ConfigError(f"--fail-if: {value!r} is not a number.") from None
        found.append(Condition(name, operator, limit, bool(percent), part.strip()))
    return found


def compare(before: Report, after: Report) -> list[Change]:
    """Every figure that both have."""
    pairs = [r.workload_sha256 for r in before.repeats] == [
        r.workload_sha256 for r in after.repeats
    ]
    single = len(before.repeats) == 1 or len(after.repeats) == 1
    changes = []
    for name in METRICS:
        if name not in before.summary or name not in after.summary:
            continue
        old, new = _values(before, name), _values(after, name)
        if not single:
            interval, over = difference(old, new, paired=pairs), "repeats"
        elif name in _PER_REQUEST:
            interval, over = _over_requests(before, after, name), "requests"
        else:
            interval, over = Interval(new[0] - old[0], None, None, 1), ""
        changes.append(
            Change(name, before.summary[name].value, after.summary[name].value, interval, over)
        )
    return changes


def _values(report: Report, name: str) -> list[float]:
    return [value for r in report.repeats if (value := r.figures[name]) is not None]


def _over_requests(before: Report, after: Report, name: str) -> Interval:
    pick, rank = _PER_REQUEST[name]
    old, new = (
        [value for repeat in report.repeats for row in repeat.requests
         if (value := pick(row)) is not None]
        for report in (before, after)
    )  # fmt: skip
    return bootstrap(old, new, rank)


def failures(conditions: Seq[Condition], report: Report, changes: Seq[Change] = ()) -> list[str]:
    """The conditions that are met, each said in a sentence. A relative one counts only where the
    change is not noise. Raises ConfigError for a figure that the report lacks, and for a relative
    condition without a report to compare to."""
    by_name = {change.name: change for change in changes}
    found = []
    for condition in conditions:
        name = condition.name
        if name not in report.summary:
            raise ConfigError(f"--fail-if: this run has no {name} ({METRICS[name].title}).")
        value = report.summary[name].value
        if not condition.relative:
            if condition.holds(value):
                found.append(f"{condition.text}: {METRICS[name].title} is {number(name, value)}")
            continue
        if name not in by_name:
            raise ConfigError(
                f"--fail-if: {condition.text!r} is a change and needs two reports to compare."
            )
        change = by_name[name]
        if change.relative is not None and condition.holds(change.relative):
            if change.interval.excludes_zero is False:
                continue
            found.append(f"{condition.text}: {METRICS[name].title} changed {percent(change)}")
    return found


def percent(change: Change) -> str:
    return "n/a" if change.relative is None else f"{change.relative * 100:+.1f} %"


def table(before: Report, after: Report, changes: Seq[Change]) -> RenderableType:
    """The two side by side."""
    shown = Table(
        title=Text(f"{before.name} -> {after.name}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    shown.add_column("")
    for heading in (before.name, after.name, "change", "95 % interval"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    styles = {"better": "green", "worse": "bold red", "changed": "yellow"}
    by_name = {change.name: change for change in changes}
    for name in COMPARED:
        change = by_name.get(name)
        if change is None:
            continue
        shown.add_row(
            titled(name),
            number(name, change.before),
            number(name, change.after),
            percent(change),
            bounds(change),
            Text(change.verdict, styles.get(change.verdict, "dim")),
        )
    notes: list[RenderableType] = [Text(note, style="yellow") for note in _notes(before, after)]
    return Group(shown, *notes)


def titled(name: str) -> str:
    """A figure's title with its unit."""
    return f"{METRICS[name].title}, {unit(name)}" if unit(name) else METRICS[name].title


def bounds(change: Change) -> str:
    """The interval of a change, relative to the first value where that is possible."""
    low, high = change.interval.low, change.interval.high
    if low is None or high is None:
        return ""
    if change.before:
        return f"{low / abs(change.before):+.1%} to {high / abs(change.before):+.1%}"
    return f"{low:+.3g} to {high:+.3g}"


def _notes(before: Report, after: Report) -> list[str]:
    notes = []
    hashes = [[r.workload_sha256 for r in report.repeats] for report in (before, after)]
    if hashes[0] == hashes[1]:
        notes.append("Both served the same requests, repeat by repeat; differences are paired.")
    elif set(hashes[0]) & set(hashes[1]):
        notes.append("Only some of the repeats served the same requests.")
    else:
        notes.append("! The workloads differ; what changed may be the workload.")
    if min(len(report.repeats) for report in (before, after)) == 1:
        notes.append(
            "! A single run does not show how much figures move by themselves: intervals are over "
            "its requests and too narrow, and throughput has none. Use --repeats 5."
        )
    for report in (before, after):
        if not report.complete:
            notes.append(f"! {report.name} was broken off.")
    return notes
