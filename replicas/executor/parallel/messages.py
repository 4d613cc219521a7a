"""What the first rank sends to the others; pickled, so it is not defined in the module they run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from tokenflow.replicas.executor.base import ScheduledSequence
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.parallel.sharding import Shard

ANSWER_TIMEOUT = timedelta(seconds=120)
"""Longest wait for another rank: loading, one step, or a copy."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What a rank is made from."""

    spec: ModelSpec
    shard: Shard
    store: str
    """File by which the ranks find each other."""
    device: str
    segment: str | None
    """File of the host memory."""
    options: dict[str, Any]
    """Further arguments of TorchExecutor."""


class Step(NamedTuple):
    """A batch to run, or to launch `ahead`."""

    ahead: bool
    batch: list[ScheduledSequence]


class Offload(NamedTuple):
    """`Executor.offload`, of this rank's part of the blocks."""

    pairs: list[tuple[int, int]]


class Load(NamedTuple):
    """`Executor.load`; the first rank verifies."""

    pairs: list[tuple[int, int]]


class Clear(NamedTuple):
    """`TorchExecutor.clear`: the first rank has found that what was loaded is no KV."""

    block_ids: list[int]


Command = Step | Offload | Load | Clear
