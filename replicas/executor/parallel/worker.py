"""One rank besides the first: a process that repeats the first rank's steps and copies on its own
device.

`RankProcess` runs this module with a file descriptor, one end of a socket. What comes over it is
pickled, from the parent process alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor.base import CopyDone
from tokenflow.replicas.executor.block_copies import Reports
from tokenflow.replicas.executor.parallel.messages import (
    ANSWER_TIMEOUT,
    Clear,
    Command,
    Load,
    Offload,
    RankSettings,
    Step,
)
from tokenflow.replicas.executor.torch_executor import TorchExecutor

_PARENT_CHECK_S = 1.0


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
        timeout=ANSWER_TIMEOUT,
    )


def make_executor(
    settings: RankSettings, host: Segment | None, reports: Reports | None = None
) -> TorchExecutor:
    """This rank's part of the model and of the KV, and of each slot of `host`. Raises
    CheckpointError or KVStoreError."""
    return TorchExecutor(
        settings.spec,
        device=settings.device,
        shard=settings.shard,
        host_memory=None if host is None else host.tensor(),
        reports=reports,
        **settings.options,
    )


def serve(pipe: Connection) -> None:
    """Repeat steps and copies until the parent closes its end.

    The first message is `RankSettings`, every other one a `Command`. The answers are None once,
    when the model is loaded; a `CopyDone` for each copy, whose job has the same number on all
    ranks, since all begin the same ones in the same order; or at any time the text of an error, and
    then nothing more.
    """
    answering = threading.Lock()

    def answer(message: CopyDone | str | None) -> None:
        with answering:
            pipe.send(message)

    try:
        settings: RankSettings = pipe.recv()
        join_group(settings)
        host = None
        if settings.segment is not None:
            # Where it is to be page-locked, that enters the pages.
            host = Segment.attach(settings.segment, prefault=settings.device == "cpu")
        executor = make_executor(settings, host)
        answer(None)
        threading.Thread(
            target=_report, args=(executor, settings.shard.rank, answer), daemon=True
        ).start()
        while True:
            command: Command = pipe.recv()
            match command:
                case Step(ahead, batch):
                    (executor.launch if ahead else executor.execute)(batch)
                case Offload(pairs):
                    executor.offload(pairs)
                case Load(pairs):
                    executor.load(pairs)
                case Clear(block_ids):
                    executor.clear(block_ids)
    except EOFError:
        return
    except Exception as error:
        answer(f"{type(error).__name__}: {error}")
        raise


def _report(executor: TorchExecutor, rank: int, answer: Callable[[CopyDone], None]) -> None:
    """Tell of copies as they end, whatever the rank itself is at."""
    try:
        while True:
            for done in executor.poll_transfers(_PARENT_CHECK_S):
                answer(done if done.error is None else done._replace(error=_failure(rank, done)))
    except OSError:
        return  # nobody is there any more


def _failure(rank: int, done: CopyDone) -> KVStoreError:
    """Other exceptions may not survive the way."""
    return KVStoreError(f"on rank {rank}: {type(done.error).__name__}: {done.error}")


def _die_with(parent: int) -> None:
    """A rank that waits for others on its device does not see the end of the socket."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
