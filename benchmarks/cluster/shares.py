"""A fixed share of a processor for each replica, by control groups: several replicas on one machine
otherwise lend each other the processor time that they do not need, as replicas on machines of their
own never do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000


@contextmanager
def processor_shares(pids: Iterable[int], share: float) -> Iterator[None]:
    """Let each process, with all its threads, use at most `share` of a processor. Raises OSError
    where control groups of the cpu kind cannot be made."""
    folders = []
    quota_us = round(share * _PERIOD_US)
    first = (_ROOT / "cpu") if (_ROOT / "cpu").is_dir() else _ROOT
    try:
        for pid in pids:
            folder = first / f"tokenflow-{os.getpid()}-{pid}"
            folder.mkdir()
            folders.append(folder)
            if (folder / "cpu.max").exists():
                (folder / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
            (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for folder in folders:
            for pid_text in (folder / "cgroup.procs").read_text().split():
                (first / "cgroup.procs").write_text(pid_text)
            folder.rmdir()
