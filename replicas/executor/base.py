"""The interface between the engine and whatever runs the forward pass.

The engine decides *what* runs (which sequences, how many tokens, which blocks); an executor runs
it. The torch executor and the simulated one are interchangeable behind `Executor`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.sampling.params import SamplingParams

UNKNOWN = -1
"""In place of a token that the step launched before has drawn, and the host has not seen yet."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one block of KV: `[layers, 2, kv_heads, block_size, head_dim]`, contiguous.

    Blocks are block-major on both sides, so that one block is one contiguous copy. Divided over
    ranks, a block on the host is `[ranks, layers, 2, kv_heads / ranks, block_size, head_dim]`.
    """

    layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    """torch dtype name, e.g. "float32", "bfloat16"."""
    ranks: int = 1
    """Devices over which the heads are divided."""

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.block_size * self.kv_heads * self.head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size


@dataclass(slots=True)
class ScheduledSequence:
    """One sequence's share of a step: tokens `[start, start + len(token_ids))` of its text.

    KV of tokens before `start` is already in the blocks of `block_ids`; this step writes the KV of
    its own tokens. When `sample` is true the next token is drawn from the last position's logits.
    """

    slot: int
    """Stable index in [0, max_num_seqs) while the sequence is resident on the device."""
    token_ids: Seq[int]
    """The last one may be UNKNOWN: what the step launched before has drawn for this slot."""
    start: int
    block_ids: NDArray[np.int32]
    """The first ceil((start + len(token_ids)) / block_size) entries are valid."""
    sample: bool
    params: SamplingParams
    prompt_ids: Seq[int]
    """For penalties; not modified."""
    output_ids: Seq[int]
    """Tokens generated so far (before this step), the last one perhaps UNKNOWN; its length is the
    sampler's RNG position."""
    suppress_ids: Seq[int] = ()
    """Token ids that must not be drawn now (end-of-sequence while below min_tokens)."""


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities of one drawn token, from the model's unmodified distribution."""

    chosen: float
    top: list[tuple[int, float]]
    """(token id, logprob), likeliest first; at most `SamplingParams.logprobs` entries."""


@dataclass(slots=True)
class StepResult:
    """Result of one step, aligned with the batch."""

    token_ids: list[int]
    """One per scheduled sequence; -1 where `sample` was false."""
    logprobs: list[TokenLogprobs | None]


class CopyDone(NamedTuple):
    """The end of a copy job. Where checksums take time of their own, they follow in a second
    report of the same job."""

    job_id: int
    error: Exception | None
    seconds: float
    """How long the copy itself took, without waiting in a queue."""
    checksums: tuple[int, ...] | None = ()
    """Of each block copied to the host, xxh3 of 64 bits; empty where no bytes are moved, None when
    they follow."""
    corrupt: tuple[int, ...] = ()
    """Places in the job of loaded blocks whose checksum was not the expected one."""


class Executor(Protocol):
    """Runs steps over a device block pool of `num_blocks` blocks of `layout`."""

    layout: KVLayout
    num_blocks: int
    vocab_size: int

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        """Run one forward pass over the packed batch and sample. Blocks the calling thread.

        Raises StepMemoryError when the step needs more memory than there is; nothing has changed
        then, except KV beyond what the sequences have.
        """
        ...

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        """Start copying device blocks to host slots: `(block id, host slot)`; returns a job id.

        The device blocks must not be written or freed, and the slots not reused, until the job
        is reported by `poll_transfers`.
        """
        ...

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        """Start copying host slots into device blocks: `(host slot, block id)`; a job id.

        Slots must not be loaded before the copy that fills them was reported: the directions are
        not ordered against each other. `expected` are checksums to verify, None (or nothing at
        all) for blocks that are not to be.
        """
        ...

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        """Jobs finished since the last call. Waits at most `timeout_s` for the first one."""
        ...

    def close(self) -> None:
        """Release the model and stop the transfer threads."""
        ...


class PendingStep(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for its end."""
        ...


@runtime_checkable
class AsyncExecutor(Executor, Protocol):
    """An executor of which the next step may be launched before the result of the last is known."""

    overlaps: bool
    """Whether the host is free while a step runs, so that launching ahead gains anything."""

    def launch(self, batch: Seq[ScheduledSequence]) -> PendingStep:
        """Begin a step, after all that was launched before. Raises as `execute`."""
        ...
