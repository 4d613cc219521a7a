"""The executor of a model divided over several devices of one machine.

The first rank runs here, on the engine's thread; each other one in a process of its own
(worker.py), which is sent every batch and runs the same step on its part of the weights and of the
KV. Their only other meeting is inside the forward pass (sharding.py). So the engine, its policies
and its block tables know one device.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tokenflow.replicas.errors import CheckpointError, KVStoreError, StepMemoryError, TokenFlowError
from tokenflow.replicas.executor.base import (
    CopyDone,
    PendingStep,
    ScheduledSequence,
    StepResult,
)
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.parallel import worker
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.executor.parallel.worker import RankSettings, join_group, make_executor

_EXIT_S = 5.0


class RankLostError(TokenFlowError):
    """A process of a tensor-parallel model has ended; the engine cannot go on."""


class ParallelExecutor:
    """See `Executor`. There can be one at a time in a process.

    KV is not copied to the host: `offload` and `load` raise KVStoreError.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ranks: int,
        *,
        num_blocks: int,
        block_size: int,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        """Start the other ranks and load the model on all; on `ranks` GPUs from the first on, or
        `ranks` times on the CPU. `options` as of TorchExecutor, for each rank.

        Raises CheckpointError or RankLostError.
        """
        self.layout = spec.kv_layout(block_size)
        self.num_blocks = num_blocks
        self.vocab_size = spec.vocab_size
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="tokenflow-ranks-")
        first = RankSettings(
            spec,
            Shard(0, ranks),
            str(Path(self._folder.name) / "store"),
            _rank_device(device, 0),
            {"num_blocks": num_blocks, "block_size": block_size, **options},
        )
        try:
            for rank in range(1, ranks):
                self._workers.append(_Worker(rank))
                self._workers[-1].send(
                    replace(first, shard=Shard(rank, ranks), device=_rank_device(device, rank))
                )
            join_group(first)
            self._own = make_executor(first)
            for other in self._workers:
                other.wait_until_loaded()
        except BaseException as error:
            try:
                if isinstance(error, RuntimeError):  # of a rank that others have waited for
                    self._raise_if_lost()
            finally:
                self._end()
            raise

    @property
    def overlaps(self) -> bool:
        return self._own.overlaps

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        """Raises RankLostError when another rank has ended, or this one has no memory for the step:
        the others are in the midst of it then."""
        self._send(batch, ahead=False)
        with self._together():
            return self._own.execute(batch)

    def launch(self, batch: Seq[ScheduledSequence]) -> PendingStep:
        """Raises as `execute`."""
        self._send(batch, ahead=True)
        with self._together():
            return self._own.launch(batch)

    def _send(self, batch: Seq[ScheduledSequence], *, ahead: bool) -> None:
        abridged = [_abridged(s, self.layout.block_size) for s in batch]
        message = pickle.dumps((ahead, abridged), 5)
        for other in self._workers:
            other.send_bytes(message)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except StepMemoryError as error:
            raise RankLostError(
                f"rank 0 of the tensor-parallel model has no memory for a step: {error}"
            ) from error
        except Exception:
            self._raise_if_lost()
            raise

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        raise KVStoreError("KV that is divided over devices cannot be copied to the host")

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        raise KVStoreError("KV that is divided over devices cannot be loaded from the host")

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        return []

    def close(self) -> None:
        self._own.close()
        self._end()

    def _raise_if_lost(self) -> None:
        for other in self._workers:
            other.raise_if_lost()

    def _end(self) -> None:
        for other in self._workers:
            other.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()


def _rank_device(device: str, rank: int) -> str:
    return "cpu" if device == "cpu" else f"cuda:{rank}"


def _abridged(s: ScheduledSequence, block_size: int) -> ScheduledSequence:
    """What another rank needs of a sequence to compute the same logits and draw the same token."""
    blocks = -(-(s.start + len(s.token_ids)) // block_size)
    prompt_ids, output_ids = s.prompt_ids, s.output_ids
    if not s.params.penalizes:
        prompt_ids, output_ids = (), range(len(output_ids))
    return replace(s, block_ids=s.block_ids[:blocks], prompt_ids=prompt_ids, output_ids=output_ids)


class _Worker:
    """The process of another rank, and the socket to it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        own, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, str(other.fileno())],
                pass_fds=[other.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._pipe = Connection(own.detach())

    def send(self, settings: RankSettings) -> None:
        self._pipe.send(settings)

    def send_bytes(self, message: bytes) -> None:
        """Raises RankLostError when nobody is there to take it."""
        try:
            self._pipe.send_bytes(message)
        except OSError:
            self.raise_if_lost()
            raise

    def wait_until_loaded(self) -> None:
        """Raises CheckpointError with what went wrong there."""
        try:
            problem = self._pipe.recv()
        except (EOFError, OSError):
            problem = "its process ended"
        if problem is not None:
            raise CheckpointError(f"the model cannot be loaded on rank {self._rank}: {problem}")

    def raise_if_lost(self) -> None:
        """Raises RankLostError when the process has ended, or is about to."""
        if not self._pipe.poll(1.0):
            return
        try:
            problem = self._pipe.recv()
        except (EOFError, OSError):
            problem = "its process ended"
        raise RankLostError(f"rank {self._rank} of the tensor-parallel model failed: {problem}")

    def close(self) -> None:
        """End the process; one that waits for other ranks is killed."""
        self._pipe.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
