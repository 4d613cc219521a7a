"""Request traces for replay: who asked when, and for how many tokens.

Four formats, told apart by how the file begins. Times must ascend.

- normalised CSV, `arrival_s,input_tokens,output_tokens`: every row is a request.
- BurstGPT's CSV, `Timestamp,...,Request tokens,Response tokens,...`: rows with 0 response tokens
  are requests that failed; they are left out and counted.
- Azure's CSV, `TIMESTAMP,ContextTokens,GeneratedTokens`, with dates; failed ones as above.
- Mooncake's JSONL, `{"timestamp": ms, "input_length": n, "output_length": n}` a line.

CSV columns are found by name, others may stand between them. Reading stops at the end of the
window, so what is wrong behind it is not noticed.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenflow.replicas.errors import ConfigError

_FORMATS: dict[tuple[str, ...], bool] = {
    ("arrival_s", "input_tokens", "output_tokens"): False,
    ("Timestamp", "Request tokens", "Response tokens"): True,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): True,
}
"""Columns of time, input and output tokens; and whether requests with no output failed."""
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
    rows = _read_jsonl(path) if _is_jsonl(path) else _read_csv(path)
    first_s = before_s = math.nan
    for row in rows:
        if row.arrival_s < before_s:
            raise ConfigError(
                f"{path}:{row.line}: the time is {row.arrival_s:.10g}, before the {before_s:.10g} "
                "of the row above; sort the rows by time."
            )
        before_s = row.arrival_s
        if math.isnan(first_s):
            first_s = before_s
        yield TraceRow(before_s - first_s, row.input_tokens, row.output_tokens, row.line)


def _is_jsonl(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}.") from None


def _read_csv(path: Path) -> Iterator[TraceRow]:
    """Rows with their own times. Raises ConfigError."""
    try:
        # Bytes that are no UTF-8 turn into text that no column accepts.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = csv.reader(file)
            header = tuple(name.strip() for name in next(lines, ()))
            columns = next((names for names in _FORMATS if set(names) <= set(header)), None)
            if columns is None:
                raise ConfigError(_unknown(path, header))
            empty = True
            for values in lines:
                if values:
                    empty = False
                    yield _row(f"{path}:{lines.line_num}", header, columns, values, lines.line_num)
            if empty:
                raise ConfigError(f"{path}:1: there are no rows after the header.")
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}.") from None
    except csv.Error as error:
        raise ConfigError(f"{path}:{lines.line_num}: not a line of CSV: {error}.") from None


def _row(
    where: str, header: tuple[str, ...], columns: tuple[str, ...], values: list[str], line: int
) -> TraceRow:
    """One row with its own time. Raises ConfigError that starts with `where`."""
    if len(values) != len(header):
        raise ConfigError(
            f"{where}: {len(values)} columns in {','.join(values)[:80]!r}; "
            f"each row needs {len(header)}: {','.join(header)}."
        )
    at, given, made = (values[header.index(name)] for name in columns)
    arrival_s = _time(at)
    if not 0 <= arrival_s < math.inf:
        raise ConfigError(
            f"{where}: {columns[0]} is {at[:80]!r}; give seconds, a number from 0 on"
            f"{', or a date and time' if columns[0] == 'TIMESTAMP' else ''}."
        )
    output = _tokens(where, columns[2], made, 0 if _FORMATS[columns] else 1)
    # A failed request may have read nothing either.
    return TraceRow(arrival_s, _tokens(where, columns[1], given, 1 if output else 0), output, line)


def _time(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        pass
    try:
        # Without a zone the machine's own would be used, and its summer time would make gaps.
        return datetime.fromisoformat(f"{text.strip()}+00:00").timestamp()
    except ValueError:
        return math.nan


def _tokens(where: str, column: str, text: str, least: int) -> int:
    if not _TOKENS.fullmatch(text.strip()) or int(text) < least:
        raise ConfigError(
            f"{where}: {column} is {text[:80]!r}; give a whole number from {least} on, "
            "or take the row out."
        )
    return int(text)


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, object) of a JSONL file. Raises ConfigError that names the line."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    data = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}:{line}: not a line of JSON: {error}.") from None
                if not isinstance(data, dict):
                    raise ConfigError(f"{path}:{line}: each line must be a JSON object.")
                yield line, data
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}.") from None


def mooncake_row(where: str, data: Mapping[str, Any], line: int) -> TraceRow:
    """A request of Mooncake's format, with its own time. Raises ConfigError."""
    values: list[float] = []
    for name, least in (("timestamp", 0), ("input_length", 1), ("output_length", 0)):
        value = data.get(name)
        number = value if isinstance(value, int | float) and value is not True else math.nan
        if not least <= number <= 1e15 or (least and number != int(number)):
            raise ConfigError(
                f"{where}: {name} is {value!r}; give a number from {least} on"
                f"{', in milliseconds' if name == 'timestamp' else ''}."
            )
        values.append(number)
    return TraceRow(values[0] / 1000, int(values[1]), int(values[2]), line)


def _read_jsonl(path: Path) -> Iterator[TraceRow]:
    for line, data in read_lines(path):
        yield mooncake_row(f"{path}:{line}", data, line)


def _unknown(path: Path, header: tuple[str, ...]) -> str:
    known = " or ".join(",".join(columns) for columns in _FORMATS)
    if not header:
        return f"{path}:1: the file is empty; its first line must have {known}."
    return (
        f"{path}:1: unknown header {','.join(header)[:80]!r}; it must have the columns {known}, or "
        "the file must be Mooncake's JSONL."
    )
