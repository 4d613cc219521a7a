"""Finding the processes of one Ray cluster, whatever title they have given themselves."""

from __future__ import annotations

import os
from pathlib import Path


def ray_pids(title: str) -> list[int]:
    """Processes of the cluster this process is connected to whose title begins so."""
    import ray  # not at the top: tests on a GPU machine run without Ray

    session = ray._private.worker.global_worker.node.get_session_dir_path()
    return [pid for pid, command in processes_of(session).items() if command.startswith(title)]


def replica_pids() -> dict[str, int]:
    """The live replicas of this process's cluster: process by replica id, as metrics have it."""
    import ray

    return {
        actor["Name"].rpartition("#")[2]: actor["Pid"]
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE"
        and actor["Name"].startswith("SERVE_REPLICA::tokenflow#replica#")
    }


def processes_of(session_directory: str, marker: str = "") -> dict[int, str]:
    """Command lines by pid of live processes that have a file open below a Ray session's
    directory, or carry `marker` in their environment."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        if int(directory.name) == os.getpid():
            continue
        try:
            # Titles overwrite the environment, so open log files are the surer sign.
            links = [os.readlink(link) for link in (directory / "fd").iterdir()]
            environment = (directory / "environ").read_bytes()
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended meanwhile, or not ours
        if any(link.startswith(session_directory) for link in links) or (
            marker and marker.encode() in environment
        ):
            found[int(directory.name)] = command
    return found
