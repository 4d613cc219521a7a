"""The device KV memory, block-major: one block of all layers is one contiguous copy.

Within a block heads come before tokens, so that a gather by (head, block) puts each head's keys in
one piece, as batched matrix products on a CPU want them; GPU kernels take it by its strides.
"""

from __future__ import annotations

import torch

from tokenflow.replicas.executor.base import KVLayout


class KVPool:
    """`[blocks, layers, 2, kv_heads, block_size, head_dim]`. Zero-initialised: masked rows take
    part in a product with weight 0, and 0 x NaN would not be 0."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.data = torch.zeros(
            num_blocks,
            layout.layers,
            2,
            layout.kv_heads,
            layout.block_size,
            layout.head_dim,
            dtype=getattr(torch, layout.dtype),
            device=device,
        )
        self._tokens = self.data.view(-1, layout.head_dim)
        """A row for each block, layer, K or V, head and token."""
        self._blocks = self.data.view(-1, layout.block_size * layout.head_dim)
        """A row for each block, layer, K or V, and head."""
        self._heads = torch.arange(layout.kv_heads, device=device)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def bytes_view(self, blocks: int) -> torch.Tensor:
        """uint8 `[blocks, block_bytes]` over the memory of the first `blocks` blocks."""
        return self.data[:blocks].view(blocks, -1).view(torch.uint8)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as `[blocks, block_size, kv_heads, head_dim]`, strided views."""
        data = self.data[:, layer].transpose(2, 3)
        return data[:, 0], data[:, 1]

    def token_rows(self, places: torch.Tensor) -> torch.Tensor:
        """Where `write` puts tokens, int64 `[tokens, kv_heads]`; places int64 `[tokens]` as in
        `PackedStep`."""
        blocks, offsets = places // self.layout.block_size, places % self.layout.block_size
        rows = self._first_rows(blocks)[:, None] + self._heads
        return rows * self.layout.block_size + offsets[:, None]

    def block_rows(self, tables: torch.Tensor) -> torch.Tensor:
        """What `read` gathers, int64 `[sequences, kv_heads, blocks]`, for `[sequences, blocks]`."""
        return self._first_rows(tables.long())[:, None] + self._heads[:, None]

    def _first_rows(self, block_ids: torch.Tensor) -> torch.Tensor:
        return block_ids * (2 * self.layout.layers * self.layout.kv_heads)

    def places(self, positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """`PackedStep.places` of one token per sequence, on the device; positions int64
        `[sequences]`, tables `[sequences, blocks]`."""
        size = self.layout.block_size
        blocks = tables.gather(1, (positions // size)[:, None])[:, 0]
        return blocks.long() * size + positions % size

    def write(self, rows: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """K and V of a step's tokens, `[tokens, kv_heads, head_dim]` each."""
        stride = self.layout.kv_heads * self.layout.block_size
        self._tokens[rows + 2 * layer * stride] = key
        self._tokens[rows + (2 * layer + 1) * stride] = value

    def read(self, rows: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of each sequence and head in order, contiguous `[sequences * kv_heads, blocks *
        block_size, head_dim]` each."""
        flat = rows.flatten()
        kv_heads = self.layout.kv_heads
        shape = (rows.shape[0] * kv_heads, -1, self.layout.head_dim)
        # index_select is 1.6 times faster on a CPU than advanced indexing.
        keys = self._blocks.index_select(0, flat + 2 * layer * kv_heads)
        values = self._blocks.index_select(0, flat + (2 * layer + 1) * kv_heads)
        return keys.view(shape), values.view(shape)
