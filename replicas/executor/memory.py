"""How much of a device's memory is left for KV: measured, after the weights and a worst step.

For devices of their own (GPUs). What a CPU replica may use is planned beforehand, in factory.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.base import ScheduledSequence
from tokenflow.replicas.sampling.params import SamplingParams

logger = logging.getLogger("tokenflow.engine")


class DeviceMemory(Protocol):
    """What an allocator says, bytes."""

    def used(self) -> int: ...

    def peak(self) -> int:
        """The most that was in use since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...


class CudaMemory:
    """`DeviceMemory` of torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What an executor may take of its device."""

    total_bytes: int
    """Weights, temporaries and KV together."""
    most_blocks: int
    """KV blocks beyond these would never be used."""
    least_blocks: int
    max_batch_tokens: int
    memory: DeviceMemory


def worst_step(
    max_batch_tokens: int, max_num_seqs: int, block_size: int
) -> list[ScheduledSequence]:
    """The step with the largest temporaries: all tokens prefilled, as many sequences as there may
    be, and each draws from a filtered distribution. Uses blocks `[0, step_blocks(...))`."""
    sequences = min(max_num_seqs, max_batch_tokens)
    lengths = [max_batch_tokens - (sequences - 1), *[1] * (sequences - 1)]
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50)
    step = []
    first = 0
    for slot, length in enumerate(lengths):
        blocks = -(-length // block_size)
        step.append(
            ScheduledSequence(
                slot=slot,
                token_ids=(0,) * length,
                start=0,
                block_ids=np.arange(first, first + blocks, dtype=np.int32),
                sample=True,
                params=params,
                prompt_ids=(),
                output_ids=(),
            )
        )
        first += blocks
    return step


def step_blocks(step: list[ScheduledSequence]) -> int:
    return sum(len(s.block_ids) for s in step)


def fit_blocks(
    budget: MemoryBudget,
    *,
    name: str,
    weight_bytes: int,
    step_bytes: int,
    graph_bytes: int,
    block_bytes: int,
) -> int:
    """KV blocks that fit beside the weights, the worst step's temporaries and the graphs' own.

    Says in the log what went where. Raises CheckpointError when too few do.
    """
    room = budget.total_bytes - weight_bytes - step_bytes - graph_bytes
    # One block more is the executor's own.
    blocks = min(room // block_bytes - 1, budget.most_blocks)
    shares = (
        f"{weight_bytes / 2**30:.2f} GiB of weights, {step_bytes / 2**30:.2f} GiB of temporaries "
        f"of a step of {budget.max_batch_tokens} tokens, {graph_bytes / 2**30:.2f} GiB for graphs"
    )
    total = f"{budget.total_bytes / 2**30:.2f} GiB"
    if blocks < budget.least_blocks:
        raise CheckpointError(
            f"{name}: {shares} leave no room for KV in the {total} a replica may use; raise "
            "engine.memory_fraction, lower engine.max_batch_tokens, or serve a smaller model."
        )
    logger.info(
        "%s: of %s %s, %.2f GiB for %d KV blocks",
        name,
        total,
        shares,
        blocks * block_bytes / 2**30,
        blocks,
    )
    return int(blocks)
