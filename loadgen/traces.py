"""Request traces for replay, from CSV files: who asked when, and for how many tokens.

Two formats, told apart by the header. Times must ascend.

- normalised, `arrival_s,input_tokens,output_tokens`: every row is a request.
- BurstGPT's own, `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`: rows with
  0 response tokens are requests that failed; they are left out and counted.

Reading stops at the end of the window, so what is wrong behind it is not noticed.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenflow.replicas.errors import ConfigError

_NORMALISED = ("arrival_s", "input_tokens", "output_tokens")
_BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
_COLUMNS = {_NORMALISED: (0, 1, 2), _BURSTGPT: (0, 2, 3)}
"""Where time, input and output tokens are."""
_TOKENS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request."""

    arrival_s: float
    """Seconds after the first row of the trace."""
    input_tokens: int
    output_tokens: int
    line: int = field(default=0, compare=False)
    """Where it stands in the file."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file has in a window."""

    rows: tuple[TraceRow, ...]
    """Never empty; the first arrives at 0."""
    failed: int
    """Failed requests left out."""


def load_trace(
    path: str | Path,
    *,
    start_s: float = 0.0,
    duration_s: float = math.inf,
    time_scale: float = 1.0,
    max_rows: int | None = None,
) -> Trace:
    """The requests that arrive from `start_s` until before `start_s + duration_s`, both in seconds
    after the file's first row; the first `max_rows` of them. Their times are then multiplied by
    `time_scale`: 0.5 is twice the load.

    Raises ConfigError for a window without requests and for a file that cannot be read or is not
    as the module says.
    """
    if not 0 <= start_s < math.inf:
        raise ConfigError(f"{path}: the start must be 0 s or later, got {start_s}.")
    if not duration_s > 0:
        raise ConfigError(f"{path}: the duration must be above 0 s, got {duration_s}.")
    if not 0 < time_scale < math.inf:
        raise ConfigError(f"{path}: the time scale must be above 0, got {time_scale}.")
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"{path}: at least 1 row must be kept, got {max_rows}.")
    kept: list[TraceRow] = []
    failed = 0
    last_s = 0.0
    for row in _read(Path(path)):
        last_s = row.arrival_s
        if last_s >= start_s + duration_s or len(kept) == max_rows:
            break
        if last_s < start_s:
            continue
        if row.output_tokens == 0:
            failed += 1
        else:
            kept.append(row)
    if not kept:
        raise ConfigError(
            f"{path}: no request from {start_s:g} s for {duration_s:g} s; rows were read up to "
            f"{last_s:g} s. Choose another window."
        )
    rows = tuple(
        TraceRow(
            (row.arrival_s - kept[0].arrival_s) * time_scale,
            row.input_tokens,
            row.output_tokens,
            row.line,
        )
        for row in kept
    )
    return Trace(rows, failed)


def _read(path: Path) -> Iterator[TraceRow]:
    """Every row, failed requests too; times count from the first."""
    try:
        # Bytes that are no UTF-8 turn into text that no column accepts.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = csv.reader(file)
            header = tuple(name.strip() for name in next(lines, ()))
            if header not in _COLUMNS:
                raise ConfigError(_unknown(path, header))
            first_s, before_s = math.nan, 0.0
            for values in lines:
                if not values:
                    continue
                row = _row(f"{path}:{lines.line_num}", header, values, lines.line_num)
                if row.arrival_s < before_s:
                    raise ConfigError(
                        f"{path}:{lines.line_num}: {header[0]} is {values[0]!r}, before the "
                        f"{before_s:g} of the row above; sort the rows by {header[0]}."
                    )
                before_s = row.arrival_s
                if math.isnan(first_s):
                    first_s = before_s
                yield TraceRow(before_s - first_s, row.input_tokens, row.output_tokens, row.line)
            if math.isnan(first_s):
                raise ConfigError(f"{path}:1: there are no rows after the header.")
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}.") from None
    except csv.Error as error:
        raise ConfigError(f"{path}:{lines.line_num}: not a line of CSV: {error}.") from None


def _row(where: str, header: tuple[str, ...], values: list[str], line: int) -> TraceRow:
    """One row with its own time. Raises ConfigError that starts with `where`."""
    if len(values) != len(header):
        raise ConfigError(
            f"{where}: {len(values)} columns in {','.join(values)[:80]!r}; "
            f"each row needs {len(header)}: {','.join(header)}."
        )
    at, given, made = _COLUMNS[header]
    arrival_s = _time(values[at])
    if not 0 <= arrival_s < math.inf:
        raise ConfigError(
            f"{where}: {header[at]} is {values[at][:80]!r}; give seconds, a number from 0 on."
        )
    raw = header == _BURSTGPT
    output = _tokens(where, header[made], values[made], 0 if raw else 1)
    # A failed request may have read nothing either.
    return TraceRow(
        arrival_s, _tokens(where, header[given], values[given], 1 if output else 0), output, line
    )


def _time(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _tokens(where: str, column: str, text: str, least: int) -> int:
    if not _TOKENS.fullmatch(text.strip()) or int(text) < least:
        raise ConfigError(
            f"{where}: {column} is {text[:80]!r}; give a whole number from {least} on, "
            "or take the row out."
        )
    return int(text)


def _unknown(path: Path, header: tuple[str, ...]) -> str:
    known = " or ".join(",".join(columns) for columns in _COLUMNS)
    if not header:
        return f"{path}:1: the file is empty; its first line must be {known}."
    return f"{path}:1: unknown header {','.join(header)[:80]!r}; it must be {known}."
