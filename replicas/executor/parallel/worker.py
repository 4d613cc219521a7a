"""One rank besides the first: a process that repeats the first rank's steps on its own device.

`ParallelExecutor` runs this module with a file descriptor, one end of a socket. What comes over it
is pickled, from the parent process alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tokenflow.replicas.executor.base import ScheduledSequence
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.executor.torch_executor import TorchExecutor

STEP_TIMEOUT = timedelta(seconds=120)
"""Longest wait for another rank: loading, or one step."""
_PARENT_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What a rank is made from."""

    spec: ModelSpec
    shard: Shard
    store: str
    """File by which the ranks find each other."""
    device: str
    options: dict[str, Any]
    """Further arguments of TorchExecutor."""


def join_group(settings: RankSettings) -> None:
    """Meet the other ranks; returns when all are there. Raises RuntimeError after a while."""
    # All ranks are on this machine, whatever other networks it has.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    shard = settings.shard
    if settings.device != "cpu":
        torch.cuda.set_device(settings.device)
    dist.init_process_group(
        "gloo" if settings.device == "cpu" else "nccl",
        store=dist.FileStore(settings.store, shard.size),
        rank=shard.rank,
        world_size=shard.size,
        timeout=STEP_TIMEOUT,
    )


def make_executor(settings: RankSettings) -> TorchExecutor:
    """This rank's part of the model and of the KV. Raises CheckpointError."""
    return TorchExecutor(
        settings.spec, device=settings.device, shard=settings.shard, **settings.options
    )


def serve(pipe: Connection) -> None:
    """Repeat steps until the parent closes its end.

    The first message is `RankSettings`, every other one a batch and whether to launch it ahead. The
    answer is None once, when the model is loaded, or at any time the text of an error, and then
    nothing more.
    """
    try:
        settings: RankSettings = pipe.recv()
        join_group(settings)
        executor = make_executor(settings)
        pipe.send(None)
        while True:
            step: tuple[bool, list[ScheduledSequence]] = pipe.recv()
            ahead, batch = step
            if ahead:
                executor.launch(batch)
            else:
                executor.execute(batch)
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def _die_with(parent: int) -> None:
    """A rank that waits for others on its device does not see the end of the socket."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
