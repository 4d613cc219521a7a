"""The folder of a run: the workload, each request as it ends, and at last the report.

A disk that is full does not end a run: what could be written stays, and `check` says so at the end.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.report import Report
from tokenflow.loadgen.workload import Workload
from tokenflow.replicas.errors import ConfigError, TokenFlowError

_NUMBERS = re.compile(r"\[\n[-+.,\s\deE]+\]")
"""A list of numbers over several lines; within a string no line ends."""


class SaveError(TokenFlowError):
    """A run went well, or not, but could not be written down completely."""


class RunFolder:
    """Writes `workload-SEED.jsonl`, `requests-SEED.jsonl`, `report.json` and `report.html`."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder. Raises ConfigError where there cannot be one, or a run is in it."""
        self.path = Path(path)
        self._file: IO[str] | None = None
        self._problem: str | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: cannot make {path}: {error.strerror}.") from None
        if (self.path / "report.json").exists():
            raise ConfigError(f"--out: {path} holds a run already; choose another folder.")

    def begin(self, seed: int, workload: Workload) -> None:
        """A repeat begins."""
        self._write(f"workload-{seed}.jsonl", workload.to_jsonl())
        self.end()
        try:
            self._file = open(self._at(f"requests-{seed}.jsonl"), "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            self._failed(f"requests-{seed}.jsonl", error)

    def add(self, record: StreamRecord) -> None:
        """A request has ended."""
        if self._file is None:
            return
        try:
            self._file.write(record_line(record) + "\n")
            self._file.flush()
        except OSError as error:
            name = Path(self._file.name).name
            self._failed(name, error)
            self.end()

    def end(self) -> None:
        """The repeat is over."""
        if self._file is not None:
            # What could not be flushed is tried again here; that it fails is known by then.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def finish(self, report: Report, html: str) -> None:
        """Write the report; the last thing there is."""
        self._write("report.json", indented(report) + "\n")
        self._write("report.html", html)

    def check(self) -> None:
        """Raises SaveError when something could not be written."""
        if self._problem is not None:
            raise SaveError(
                f"not everything could be saved in {self.path}: {self._problem}. Make room and run "
                "again, or give another --out; the figures above are complete."
            )

    def _at(self, name: str) -> Path:
        return self.path / name

    def _write(self, name: str, text: str) -> None:
        try:
            self._at(name).write_text(text, encoding="utf-8")
        except OSError as error:
            self._failed(name, error)

    def _failed(self, name: str, error: OSError) -> None:
        self._problem = self._problem or f"{name}: {error.strerror}"


def indented(report: Report) -> str:
    """A report as JSON of many lines, but each list of numbers on one."""
    return _NUMBERS.sub(
        lambda found: "".join(found.group().split()), report.model_dump_json(indent=1)
    )


def record_line(record: StreamRecord) -> str:
    """A record as a line of JSON, all but its text; the speed of those who do not read is "max"."""
    data: dict[str, Any] = asdict(record)
    del data["text"]
    if not record.reads:
        data["token_rate"] = "max"
    return json.dumps(data, separators=(",", ":"))
