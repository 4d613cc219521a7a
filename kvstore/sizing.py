"""How much host memory the store may take: what is free, and a default that leaves room.

Shared memory is memory: what the store allocates is missing for model loading, for Ray's object
store and for the page cache, and in a container it counts against the container's limit.
"""

from __future__ import annotations

import os
from pathlib import Path

AVAILABLE_SHARE = 0.25
SHM_SHARE = 0.5
_CGROUP_V2 = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def default_host_bytes(available_bytes: int, shm_free_bytes: int) -> int:
    """Bytes for the host tier when nobody said: 25 % of free memory, at most 50 % of /dev/shm.

    `available_bytes` is memory that can be had without swapping (`available_memory_bytes`),
    `shm_free_bytes` what the file system of the segment has left (`free_bytes`). The rest is for
    the replicas themselves, and Ray puts its object store on the same /dev/shm.
    """
    return max(0, min(int(available_bytes * AVAILABLE_SHARE), int(shm_free_bytes * SHM_SHARE)))


def available_memory_bytes(cgroup: Path = _CGROUP_V2, meminfo: Path = _MEMINFO) -> int:
    """Memory this process can still get: the machine's, or its container's if that is less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # no cgroup v2 limit visible from here
    if limit == "max":
        return available
    return max(0, min(available, int(limit) - used))


def free_bytes(directory: str) -> int:
    """Bytes an unprivileged process can still allocate on the file system of `directory`."""
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def default_owner_fraction(replicas_per_node: int) -> float:
    """Most of a store one of `replicas_per_node` replicas may hold, as a fraction.

    Twice the even share, so that a loaded replica can use what idle ones leave; never all of it
    unless it is alone.
    """
    return 1.0 if replicas_per_node <= 1 else min(0.75, 2 / replicas_per_node)
