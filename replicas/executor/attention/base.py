"""What attention must know of a step, and the interface of its backends.

A step is one packed batch: prefill chunks first, then decoding sequences with one query each. A
backend turns its description into an `AttentionBatch`, once, and every layer calls that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step, on the host."""

    lengths: IntArray
    """Queries of each sequence."""
    starts: IntArray
    """Tokens of each sequence that are in the pool before the step."""
    num_prefills: int
    """The first so many sequences are prefill chunks, the others decode."""
    block_tables: NDArray[np.int32]
    """`[sequences, blocks]`, padded with any block."""
    places: IntArray
    """Where the KV of each token goes, `[tokens]`: block * block_size + place in the block."""

    @property
    def prefill_tokens(self) -> int:
        return int(self.lengths[: self.num_prefills].sum())


class AttentionBatch(Protocol):
    """One step; shared by all layers."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        """Write K and V of the step into the pool and attend over each sequence's own blocks.

        query `[tokens, heads, head_dim]`, key and value `[tokens, kv_heads, head_dim]`, rotary
        already applied, any strides with contiguous head_dim; returns `[tokens, heads, head_dim]`.
        """
        ...


class AttentionBackend(Protocol):
    """Attention over one pool, of models with one sliding window (or none)."""

    name: str

    def prepare(self, step: PackedStep) -> AttentionBatch:
        """Bring what the kernels need of a step to the device."""
        ...

    def prepare_decode(self, positions: torch.Tensor, tables: torch.Tensor) -> AttentionBatch:
        """A batch of decoding sequences only, from device memory and without a word to the host,
        so that it can be captured in a CUDA graph.

        positions int64 `[sequences]`; tables int32 `[sequences, blocks]`.
        """
        ...
