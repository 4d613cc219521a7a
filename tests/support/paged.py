"""Sequences over scattered blocks of a pool, for tests of attention, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.replicas.executor.attention.base import AttentionBackend, PackedStep
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.attention.sdpa import SdpaAttention
from tokenflow.replicas.executor.base import KVLayout

CPU = torch.device("cpu")
LAYERS = 2


@dataclass
class Sequence:
    """All queries, keys and values of a sequence `[length, heads, head_dim]`; the step computes
    the last `chunk` positions, the ones before are in the pool."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    chunk: int
    decodes: bool
    blocks: torch.Tensor

    @property
    def context(self) -> int:
        return len(self.key) - self.chunk


class Setup:
    """A pool with blocks handed out in random order, and the sequences that own them."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 4,
        window: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        backend: Callable[[KVPool, int | None], AttentionBackend] = SdpaAttention,
        device: torch.device = CPU,
    ) -> None:
        """`lengths`: (tokens in the pool, tokens of this step) of each sequence, those that decode
        last. One token after a context decodes."""
        self.random = torch.Generator().manual_seed(seed)
        self.window = window
        self.block_size = block_size
        self.scale = head_dim**-0.5
        needed = [-(-(context + chunk) // block_size) for context, chunk in lengths]
        layout = KVLayout(LAYERS, block_size, kv_heads, head_dim, dtype)
        self.device = device
        self.pool = KVPool(layout, sum(needed) + 5, device)
        # What an earlier owner left behind must not be seen.
        self.pool.data.copy_(self.normal(*self.pool.data.shape) * 50)
        self.backend = backend(self.pool, window)
        order = torch.randperm(sum(needed) + 5, generator=self.random)
        self.sequences = []
        for (context, chunk), blocks in zip(lengths, needed, strict=True):
            own, order = order[:blocks], order[blocks:]
            n = context + chunk
            sequence = Sequence(
                self.normal(n, heads, head_dim).to(self.pool.data.dtype),
                self.normal(n, kv_heads, head_dim).to(self.pool.data.dtype),
                self.normal(n, kv_heads, head_dim).to(self.pool.data.dtype),
                chunk,
                chunk == 1 and context > 0,
                own,
            )
            self.sequences.append(sequence)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return int(sequence.blocks[position // self.block_size]), position % self.block_size

    def fill_context(self, layer: int) -> None:
        for s in self.sequences:
            for position in range(s.context):
                block, offset = self.place(s, position)
                self.pool.data[block, layer, 0, :, offset] = s.key[position]
                self.pool.data[block, layer, 1, :, offset] = s.value[position]

    def step(self) -> PackedStep:
        """Of the sequences, which are in order."""
        wide = max(len(s.blocks) for s in self.sequences)
        tables = np.zeros((len(self.sequences), wide), np.int32)
        for row, s in zip(tables, self.sequences, strict=True):
            row[: len(s.blocks)] = s.blocks
        places = [
            self.place(s, position)
            for s in self.sequences
            for position in range(s.context, len(s.key))
        ]
        return PackedStep(
            lengths=np.array([s.chunk for s in self.sequences], np.int64),
            starts=np.array([s.context for s in self.sequences], np.int64),
            num_prefills=sum(not s.decodes for s in self.sequences),
            block_tables=tables,
            places=np.array([block * self.block_size + at for block, at in places], np.int64),
        )

    def run(self, layer: int = 1) -> torch.Tensor:
        self.fill_context(layer)
        query, key, value = (
            torch.cat([getattr(s, name)[s.context :] for s in self.sequences]).to(self.device)
            for name in ("query", "key", "value")
        )
        batch = self.backend.prepare(self.step())
        return batch.attend(query, key, value, layer, self.scale).cpu()

    def decode(self, layer: int = 1) -> torch.Tensor:
        """As `run`, of decoding sequences, from device memory alone as in a graph."""
        self.fill_context(layer)
        query, key, value = (
            torch.stack([getattr(s, name)[-1] for s in self.sequences]).to(self.device)
            for name in ("query", "key", "value")
        )
        positions = torch.tensor([s.context for s in self.sequences]).to(self.device)
        tables = torch.from_numpy(self.step().block_tables).to(self.device)
        batch = self.backend.prepare_decode(positions, tables)
        return batch.attend(query, key, value, layer, self.scale).cpu()

    def expected(self) -> torch.Tensor:
        return torch.cat([plain_attention(s, self.scale, self.window) for s in self.sequences])


def plain_attention(s: Sequence, scale: float, window: int | None) -> torch.Tensor:
    """One query and one head at a time, in float32."""
    query, key, value = s.query.float(), s.key.float(), s.value.float()
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(s.chunk, heads, query.shape[2])
    for i in range(s.chunk):
        position = s.context + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            k = key[first : position + 1, head // group]
            v = value[first : position + 1, head // group]
            weights = torch.exp(k @ query[position, head] * scale)
            out[i, head] = (weights / weights.sum()) @ v
    return out


RAGGED = [(0, 1), (0, 9), (0, 4), (5, 7), (16, 3), (3, 1), (12, 1), (30, 1), (1, 1)]
