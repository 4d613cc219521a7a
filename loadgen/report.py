"""The report of a run: what is written as `report.json`, compared and drawn. Data only; its JSON
schema is `schemas/report.schema.json`."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenflow.loadgen.catalogue import METRICS
from tokenflow.loadgen.description import Description
from tokenflow.loadgen.figures import (
    Figures,
    Objectives,
    by_length,
    by_rate,
    figures,
    stream_figures,
    timeline,
)
from tokenflow.loadgen.intervals import mean
from tokenflow.loadgen.metrics import StreamRecord, span
from tokenflow.loadgen.targets.base import Opened
from tokenflow.loadgen.workload import Workload
from tokenflow.replicas.errors import ConfigError

_CURVES = 60
_CURVE_POINTS = 100
_LATE_S = 0.010
_LATE_OF_GAP = 0.01
_FEW_FOR_P99 = 100
_SHORT = "under 32"
_MOST_ERRORS = 20
_FOLDERS = re.compile(r"(?:^|(?<=[:=,]))(?:/[^/,=:]+)*/(?=[^/])")
"""The folders of an absolute path, at the start of a word or of a part of it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RequestRow(_Part):
    """One request. Times in seconds, `intended_s` after the begin of the run."""

    index: int
    token_rate: float | Literal["max"]
    intended_s: float
    lag_s: float | None = Field(description="Actual less intended send; null = never sent.")
    ttft_s: float = Field(description="Until the end of the run where no token came.")
    tpot_s: float | None
    e2e_s: float
    tokens: int
    effective_tokens: float
    generated_effective_tokens: float | None
    stalls: int
    stall_s: float
    andes_qoe: float | None
    finish_reason: str | None
    error: str | None


class Curve(_Part):
    """How the tokens of one request came: (seconds after the begin of the run, tokens so far)."""

    index: int
    token_rate: float | Literal["max"]
    intended_s: float
    andes_qoe: float | None
    points: list[tuple[float, int]]


class ErrorCount(_Part):
    message: str
    count: int
    first_s: float = Field(description="Seconds after the begin of the run.")


class Repeat(_Part):
    """One pass over one workload."""

    seed: int
    workload_sha256: str
    planned: int = Field(description="Requests of the workload; turns after a failure are not due.")
    begun_at: str = Field(description="ISO 8601, UTC.")
    figures: dict[str, float | None]
    by_length: dict[str, dict[str, float | None]]
    by_rate: dict[str, dict[str, float | None]]
    errors: list[ErrorCount]
    requests: list[RequestRow]
    timeline: dict[str, list[float]]
    curves: list[Curve]
    server: dict[str, list[float]] = Field(
        default={}, description="Its own gauges once a second: at_s, waiting, running, preempted."
    )


class Estimate(_Part):
    """Mean over the repeats, with its 95 % confidence interval (t) where there are several."""

    value: float
    low: float | None
    high: float | None
    samples: int


class Report(_Part):
    """A benchmark run."""

    version: Literal[1] = 1
    name: str
    created_at: str = Field(description="ISO 8601, UTC.")
    command: list[str]
    target: str
    model: str
    notes: list[str]
    complete: bool = Field(description="False when the run was broken off.")
    machine: dict[str, Any]
    versions: dict[str, str]
    description: dict[str, Any]
    summary: dict[str, Estimate]
    warnings: list[str]
    repeats: list[Repeat]


def make_repeat(
    records: Seq[StreamRecord],
    workload: Workload,
    seed: int,
    goals: Objectives,
    begun_at: str,
    server: dict[str, list[float]] | None = None,
) -> Repeat:
    """`server` are its gauges. Raises ValueError without records."""
    begun, end = span(records)
    rows = []
    for record in records:
        own = stream_figures(record, begun, end, goals)
        rows.append(
            RequestRow(
                index=record.index,
                token_rate=_rate(record.token_rate),
                intended_s=record.intended_s - begun,
                lag_s=None if record.sent_s is None else record.sent_s - record.intended_s,
                ttft_s=own.ttft_s,
                tpot_s=own.tpot_s,
                e2e_s=own.e2e_s,
                tokens=own.tokens,
                effective_tokens=own.effective,
                generated_effective_tokens=own.generated_effective,
                stalls=own.stalls,
                stall_s=own.stall_s,
                andes_qoe=own.andes_qoe,
                finish_reason=record.finish_reason,
                error=record.error,
            )
        )
    return Repeat(
        seed=seed,
        workload_sha256=workload.sha256,
        planned=len(workload.asks),
        begun_at=begun_at,
        figures=figures(records, goals),
        by_length=by_length(records, goals),
        by_rate=by_rate(records, goals),
        errors=_errors(records, begun),
        requests=rows,
        timeline=timeline(records),
        curves=_curves(records, rows, begun),
        server=server or {},
    )


def make_report(
    description: Description,
    opened: Opened,
    repeats: list[Repeat],
    *,
    complete: bool = True,
    command: Seq[str] = (),
) -> Report:
    """Raises ValueError without repeats."""
    if not repeats:
        raise ValueError("a report needs a repeat")
    return Report(
        name=description.name,
        created_at=utc_now(),
        command=list(command),
        target=opened.name,
        model=without_folders(opened.model),
        notes=opened.notes,
        complete=complete,
        machine={
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "clock": "monotonic",
        },
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenflow-serve", "aiohttp", "numpy")},
        },
        description=without_folders(description.model_dump(mode="json")),
        summary=summary_of([repeat.figures for repeat in repeats]),
        warnings=warnings_of(repeats, description),
        repeats=repeats,
    )


def load_report(path: str | Path) -> Report:
    """A report from its file or its folder. Raises ConfigError."""
    file = Path(path)
    if file.is_dir():
        file /= "report.json"
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the report {file}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{file} is no report of this version: {where or 'JSON'}: {first['msg']}."
        ) from None


def summary_of(runs: Seq[Figures]) -> dict[str, Estimate]:
    """Means over the repeats of every figure that has a value in all of them."""
    found = {}
    for name in METRICS:
        values = [value for run in runs if (value := run.get(name)) is not None]
        if values and len(values) == len(runs):
            interval = mean(values)
            found[name] = Estimate(
                value=interval.value, low=interval.low, high=interval.high, samples=len(values)
            )
    return found


def warnings_of(repeats: Seq[Repeat], description: Description) -> list[str]:
    """What a reader of the figures must know before believing them."""
    found = []
    count = sum(len(repeat.requests) for repeat in repeats)
    failed = sum(row.error is not None for repeat in repeats for row in repeat.requests)
    if failed:
        found.append(
            f"{failed} of {count} requests failed. They count: their TTFT as the time to the end "
            "of the run, their missing tokens as missing."
        )
    never = sum(repeat.planned - len(repeat.requests) for repeat in repeats)
    if never:
        found.append(f"{never} planned requests were never sent.")
    lag = max((r.figures["lag_p99_s"] or 0.0 for r in repeats), default=0.0)
    offered = [o for r in repeats if (o := r.figures["offered_req_s"]) is not None]
    limit = max(_LATE_S, _LATE_OF_GAP / min(offered)) if offered else _LATE_S
    if lag > limit:
        found.append(
            f"The generator itself was late: P99 {lag * 1e3:.0f} ms. That is part of the TTFT; "
            "give it a core of its own, or less to do."
        )
    least = min(len(repeat.requests) for repeat in repeats)
    if least < _FEW_FOR_P99:
        found.append(f"P99 of {least} requests is little less than the slowest one.")
    if any(_SHORT in repeat.by_length for repeat in repeats):
        found.append(
            "Some outputs are shorter than 32 tokens, where effective throughput says little; see "
            "the figures by length."
        )
    if description.closed_loop is not None:
        found.append(
            f"Closed loop of {description.closed_loop.users} users: who would have come meanwhile "
            "is not asked, so waiting is understated."
        )
    if any(b.kind == "change_speed" for b in description.behaviours):
        found.append(
            "Changes of reading speed are modelled in the reader; the server was not told of them."
        )
    return found


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> list[str]:
    """As it was typed, but for folders."""
    return [without_folders(word) for word in sys.argv]


def without_folders(value: Any) -> Any:
    """The same with every absolute path cut to its last part, since reports travel and folders do
    not. Goes into lists and mappings."""
    match value:
        case str() if "://" not in value:
            return _FOLDERS.sub("", value)
        case dict():
            return {key: without_folders(own) for key, own in value.items()}
        case list():
            return [without_folders(own) for own in value]
    return value


def _rate(rate: float) -> float | Literal["max"]:
    return "max" if rate == math.inf else rate


def _errors(records: Iterable[StreamRecord], begun: float) -> list[ErrorCount]:
    counts: Counter[str] = Counter()
    first: dict[str, float] = {}
    for record in records:
        if record.error is None:
            continue
        counts[record.error] += 1
        at = (record.finished_s if record.finished_s is not None else begun) - begun
        first[record.error] = min(first.get(record.error, math.inf), at)
    return [
        ErrorCount(message=message, count=count, first_s=first[message])
        for message, count in counts.most_common(_MOST_ERRORS)
    ]


def _curves(records: Seq[StreamRecord], rows: Seq[RequestRow], begun: float) -> list[Curve]:
    """Of the worst, the best and some between, by their quality of experience; without readers by
    their TTFT."""
    order = sorted(
        range(len(records)),
        key=lambda i: (-1.0 if (q := rows[i].andes_qoe) is None else q, -rows[i].ttft_s),
    )
    step = max(1.0, (len(order) - 1) / (_CURVES - 1))
    chosen = sorted({order[min(len(order) - 1, round(i * step))] for i in range(_CURVES)})
    return [
        Curve(
            index=records[i].index,
            token_rate=rows[i].token_rate,
            intended_s=rows[i].intended_s,
            andes_qoe=rows[i].andes_qoe,
            points=_thinned(records[i].arrivals, begun),
        )
        for i in chosen
    ]


def _thinned(arrivals: Seq[tuple[float, int]], begun: float) -> list[tuple[float, int]]:
    points = []
    done = 0
    for at, count in arrivals:
        done += count
        points.append((round(at - begun, 4), done))
    if len(points) <= _CURVE_POINTS:
        return points
    step = (len(points) - 1) / (_CURVE_POINTS - 1)
    return [points[round(i * step)] for i in range(_CURVE_POINTS)]
