"""Whether a process is alive, told from /proc so that a reused pid is not mistaken for it.

A pid alone does not name a process: the kernel hands it out again. The pair (pid, start time) does,
for one boot of one machine. Reads Linux's /proc only; both processes must share a pid namespace.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_STATE, _NUM_THREADS, _START_TIME = 0, 17, 19  # fields 3, 20, 22 of stat(5), counted from field 3


def start_ticks(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; None if it is known to be dead.

    A zombie without threads counts as dead: it has closed its files and dropped its memory, and
    only its parent's `wait` is missing. A zombie leader whose other threads run on is alive.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name (field 2) may hold spaces and brackets; the last ")" ends it.
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[_STATE] in "ZX" and int(fields[_NUM_THREADS]) <= 1:
        return None
    return int(fields[_START_TIME])


def is_alive(pid: int, started: int) -> bool:
    """True unless the process `pid` that began at tick `started` is known to be gone."""
    return start_ticks(pid) == started


def kill(pid: int, started: int) -> bool:
    """SIGKILL the process `pid` that began at tick `started`, and no other; False if it is gone, is
    this one, or belongs to another user. A stopped process dies of it too."""
    if pid == os.getpid():
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # The descriptor names one process, whatever becomes of the pid.
        if not is_alive(pid, started):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(process)
