"""The executor of a model divided over several devices of one machine.

The first rank runs here, on the engine's thread; each other one in a process of its own
(worker.py), which is sent every batch and every copy, in their order, and does the same on its part
of the weights, of the KV and of the host's slots. Their only other meeting is inside the forward
pass (sharding.py). So the engine, its policies and its block tables know one device.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.errors import StepMemoryError
from tokenflow.replicas.executor.base import (
    CopyDone,
    PendingStep,
    ScheduledSequence,
    StepResult,
)
from tokenflow.replicas.executor.block_copies import Reports
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.parallel.copies import DividedCopies
from tokenflow.replicas.executor.parallel.messages import (
    ANSWER_TIMEOUT,
    Clear,
    Command,
    Load,
    Offload,
    RankSettings,
    Step,
)
from tokenflow.replicas.executor.parallel.process import RankLostError, RankProcess
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.executor.parallel.worker import join_group, make_executor

_EXIT_S = 5.0
"""Longest wait for the other ranks to end."""


class ParallelExecutor:
    """See `Executor`. There can be one at a time in a process.

    Every method but `close` may raise RankLostError, when another rank has ended or does not answer
    for ANSWER_TIMEOUT.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ranks: int,
        *,
        num_blocks: int,
        block_size: int,
        device: str = "cpu",
        host: Segment | None = None,
        **options: Any,
    ) -> None:
        """Start the other ranks and load the model on all; on `ranks` GPUs from the first on, or
        `ranks` times on the CPU. `host` has slots of whole blocks; its file must be there until
        this returns. `options` as of TorchExecutor, for each rank.

        Raises CheckpointError, KVStoreError or RankLostError.
        """
        self.layout = replace(spec.kv_layout(block_size), ranks=ranks)
        self.num_blocks = num_blocks
        self.vocab_size = spec.vocab_size
        self._workers: list[RankProcess] = []
        reports = Reports()
        memory = None if host is None else host.tensor()
        self._copies = DividedCopies(ranks, memory, reports)
        self._folder = tempfile.TemporaryDirectory(prefix="tokenflow-ranks-")
        first = RankSettings(
            spec,
            Shard(0, ranks),
            str(Path(self._folder.name) / "store"),
            _rank_device(device, 0),
            None if host is None else host.path,
            {"num_blocks": num_blocks, "block_size": block_size, **options},
        )
        try:
            for rank in range(1, ranks):
                self._workers.append(RankProcess(rank, reports))
                self._workers[-1].send(
                    replace(first, shard=Shard(rank, ranks), device=_rank_device(device, rank))
                )
            join_group(first)
            self._own = make_executor(first, host, reports)
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

    @property
    def processes(self) -> list[int]:
        """Pids of the other ranks, which copy into the host's slots as this process does."""
        return [other.pid for other in self._workers]

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        """Raises RankLostError also when this rank has no memory for the step: the others are in
        the midst of it then."""
        self._tell(Step(False, self._abridged(batch)))
        with self._together():
            return self._own.execute(batch)

    def launch(self, batch: Seq[ScheduledSequence]) -> PendingStep:
        """Raises as `execute`."""
        self._tell(Step(True, self._abridged(batch)))
        with self._together():
            return self._own.launch(batch)

    def _tell(self, command: Command) -> None:
        message = pickle.dumps(command, 5)
        for other in self._workers:
            other.send_bytes(message)

    def _abridged(self, batch: Seq[ScheduledSequence]) -> list[ScheduledSequence]:
        return [_abridged(s, self.layout.block_size) for s in batch]

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
        # Steps and copies reach each rank in this order, so what a step may overwrite here it may
        # overwrite there: the job is reported when no rank reads the blocks any more.
        job_id = self._own.offload(pairs)
        self._tell(Offload(list(pairs)))
        self._copies.begin(job_id, pairs, to_host=True)
        return job_id

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        job_id = self._own.load(pairs, expected)
        self._tell(Load(list(pairs)))
        self._copies.begin(job_id, pairs, to_host=False)
        return job_id

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        done = self._copies.poll(timeout_s)
        if corrupt := self._copies.take_corrupt():
            self._tell(Clear(corrupt))
        for other in self._workers:
            other.raise_if_lost(0.0)
        if self._copies.oldest_s > ANSWER_TIMEOUT.total_seconds():
            raise RankLostError(
                f"a rank of the tensor-parallel model has not ended a copy for {ANSWER_TIMEOUT}"
            )
        return done

    def close(self) -> None:
        self._own.close()
        self._end()

    def _raise_if_lost(self) -> None:
        for other in self._workers:
            other.raise_if_lost()

    def _end(self) -> None:
        for other in self._workers:
            other.hang_up()
        until_s = time.monotonic() + _EXIT_S
        for other in self._workers:
            other.close(until_s)
        self._copies.close()
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
