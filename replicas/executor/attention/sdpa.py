"""Paged attention in plain torch: the CPU backend and the reference for every other one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tokenflow.replicas.executor.attention.base import PackedStep
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.transfer import upload

_TILE_SCORES = 1 << 21
"""Scores at once of a prefill chunk: a few MiB, which stay in the cache."""
_GROUP_BLOCKS = 96
"""Blocks of one head that are gathered in the time that one more group of decodes costs a CPU."""


class SdpaAttention:
    """`AttentionBackend` for any device."""

    name = "sdpa"

    def __init__(self, pool: KVPool, window: int | None) -> None:
        self._pool = pool
        self._window = window

    def prepare(self, step: PackedStep) -> SdpaBatch:
        pool, device = self._pool, self._pool.device
        block_size = pool.layout.block_size
        first = step.num_prefills
        seen = step.starts + step.lengths
        blocks = (seen - 1) // block_size + 1
        groups = [np.arange(first, len(seen))]
        if device.type == "cpu" and first < len(seen):
            most = _GROUP_BLOCKS // pool.layout.kv_heads
            groups = [first + group for group in like_lengths(blocks[first:], most)]
        places, order, *rest = upload(
            [
                step.places,
                np.argsort(np.concatenate(groups), kind="stable"),
                *(step.block_tables[k : k + 1, : blocks[k]] for k in range(first)),
                *(step.block_tables[group, : blocks[group].max(initial=0)] for group in groups),
                *(seen[group] for group in groups),
                *(group - first for group in groups),
            ],
            device,
        )
        batch = SdpaBatch(pool, pool.token_rows(places))
        at = 0
        for k, table in enumerate(rest[:first]):
            length, context = int(step.lengths[k]), int(step.starts[k])
            mask = chunk_mask(length, context, self._window, device)
            batch.prefills.append(
                PrefillChunk(at, at + length, context, pool.block_rows(table), mask)
            )
            at += length
        if first < len(seen):
            n = len(groups)
            decodes = rest[first:]
            for tables, lengths, index in zip(
                decodes[:n], decodes[n : 2 * n], decodes[2 * n :], strict=True
            ):
                queries = slice(at, None) if n == 1 else at + index
                batch.decodes.append(self._decodes(queries, lengths, tables))
            batch.order = order if n > 1 else None
        return batch

    def prepare_decode(self, positions: torch.Tensor, tables: torch.Tensor) -> SdpaBatch:
        pool = self._pool
        rows = pool.token_rows(pool.places(positions, tables))
        return SdpaBatch(pool, rows, decodes=[self._decodes(slice(None), positions + 1, tables)])

    def _decodes(
        self, queries: slice | torch.Tensor, seen: torch.Tensor, tables: torch.Tensor
    ) -> DecodeBatch:
        """`seen`: tokens each sequence attends to, its own included, without a window."""
        pool = self._pool
        tokens = tables.shape[1] * pool.layout.block_size
        places = torch.arange(tokens, device=seen.device)[None]
        hidden = places >= seen[:, None]
        if self._window is not None:
            hidden |= places < seen[:, None] - self._window
        bias = torch.zeros(hidden.shape, dtype=pool.data.dtype, device=seen.device)
        bias.masked_fill_(hidden, float("-inf"))
        bias = bias.repeat_interleave(pool.layout.kv_heads, 0)[:, None]
        return DecodeBatch(queries, pool.block_rows(tables), bias)


@dataclass(slots=True)
class PrefillChunk:
    """Queries `[start, end)` of the packed batch, after `context` tokens already in the pool."""

    start: int
    end: int
    context: int
    rows: torch.Tensor
    """`KVPool.block_rows` of the blocks that cover context and chunk."""
    mask: torch.Tensor | None
    """bool `[chunk, context + chunk]`, or None for plain causal (no context, no window)."""
    tiles: list[_Tile] = field(default_factory=list)
    """The chunk cut into pieces for `_by_products`; made by the first layer for all."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries `[start, end)` of a chunk, which see some of the first `seen` tokens."""

    start: int
    end: int
    seen: int
    bias: torch.Tensor
    """`[1, group * queries, seen]`: 0 where a token is seen, else -inf."""


@dataclass(slots=True)
class DecodeBatch:
    """Sequences with one query each."""

    queries: slice | torch.Tensor
    """Theirs in the packed batch, or int64 indices of them."""
    rows: torch.Tensor
    """`KVPool.block_rows` of their block tables, which are padded with any block."""
    bias: torch.Tensor
    """`[sequences * kv_heads, 1, blocks * block_size]` in the pool's dtype: 0 where a token is
    seen, else -inf."""


@dataclass(slots=True)
class SdpaBatch:
    """`AttentionBatch` of this backend."""

    pool: KVPool
    write_rows: torch.Tensor
    """`KVPool.token_rows` of the step's tokens."""
    prefills: list[PrefillChunk] = field(default_factory=list)
    decodes: list[DecodeBatch] = field(default_factory=list)
    """Groups of like lengths: each is padded to its longest."""
    order: torch.Tensor | None = None
    """Where each sequence's answer is among those of all groups; None where that is its place."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        self.pool.write(self.write_rows, layer, key, value)
        parts = [
            _prefill(query, key, value, chunk, self.pool, layer, scale) for chunk in self.prefills
        ]
        decoded = [_decode(query, group, self.pool, layer, scale) for group in self.decodes]
        if self.order is not None:
            decoded = [torch.cat(decoded).index_select(0, self.order)]
        parts += decoded
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: PrefillChunk,
    pool: KVPool,
    layer: int,
    scale: float,
) -> torch.Tensor:
    span = slice(chunk.start, chunk.end)
    q = query[span].transpose(0, 1)
    if chunk.context == 0:
        k, v = key[span].transpose(0, 1), value[span].transpose(0, 1)
    else:
        n = chunk.context + q.shape[1]
        keys, values = pool.read(chunk.rows, layer)
        k, v = keys[:, :n], values[:, :n]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _by_products(q, k, v, chunk, scale)
    out = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0].transpose(0, 1)


def _by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: PrefillChunk, scale: float
) -> torch.Tensor:
    """A chunk as batched products, `[heads or kv_heads, tokens, head_dim]` in: on a CPU and in
    bfloat16 about twice as fast as its fused attention."""
    heads, kv_heads = q.shape[0], k.shape[0]
    if not chunk.tiles:
        chunk.tiles = _cut(chunk, heads, heads // kv_heads, k)
    parts = []
    for tile in chunk.tiles:
        grouped = q[:, tile.start : tile.end].reshape(kv_heads, -1, q.shape[2])
        out = _attend(grouped, k[:, : tile.seen], v[:, : tile.seen], tile.bias, scale)
        parts.append(out.view(heads, -1, q.shape[2]))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole.transpose(0, 1)


def _cut(chunk: PrefillChunk, heads: int, group: int, like: torch.Tensor) -> list[_Tile]:
    """Tiles of at most `_TILE_SCORES` scores."""
    length = chunk.end - chunk.start
    total = chunk.context + length
    mask = chunk.mask
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool).tril_(chunk.context)
    bias = torch.zeros(mask.shape, dtype=like.dtype).masked_fill_(~mask, float("-inf"))
    queries = max(1, _TILE_SCORES // (heads * total))
    tiles = []
    for start in range(0, length, queries):
        end = min(start + queries, length)
        seen = chunk.context + end
        tiles.append(_Tile(start, end, seen, bias[start:end, :seen].repeat(group, 1)[None]))
    return tiles


def _decode(
    query: torch.Tensor, decodes: DecodeBatch, pool: KVPool, layer: int, scale: float
) -> torch.Tensor:
    q = query[decodes.queries]
    k, v = pool.read(decodes.rows, layer)
    # The heads of one KV group become rows of one query: no repeated K and V.
    grouped = q.reshape(k.shape[0], -1, q.shape[2])
    return _attend(grouped, k, v, decodes.bias, scale).view(q.shape)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention as two batched products, `[batch, tokens, head_dim]` in and out; weights are
    float32 in between. For one query on a CPU it takes a third of the time of torch's fused
    attention, which is made for many."""
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, v)


def like_lengths(blocks: NDArray[np.integer], group_blocks: int) -> list[NDArray[np.intp]]:
    """Sequences in groups, the longest first, such that padding each group to its longest gathers
    few blocks for nothing; one more group costs as much as `group_blocks` of them. `blocks` are
    those of each sequence, shape `[sequences]`; in the answer every index is once, and in order
    where all are one group."""
    groups = []
    rest = [np.argsort(-blocks, kind="stable")]
    while rest:
        group = rest.pop()
        lengths = blocks[group]
        saved = (lengths[0] - lengths) * (len(group) - np.arange(len(group)))
        cut = int(saved.argmax())
        if saved[cut] > group_blocks:
            rest += [group[cut:], group[:cut]]
        else:
            groups.append(group)
    return groups if len(groups) > 1 else [np.arange(len(blocks))]


def chunk_mask(
    chunk: int, context: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """The mask of a prefill chunk; None where plain causal attention says the same."""
    total = context + chunk
    if context == 0 and (window is None or total <= window):
        return None
    mask = torch.ones(chunk, total, dtype=torch.bool, device=device).tril_(context)
    if window is not None and total > window:
        mask &= torch.ones_like(mask).triu_(context - window + 1)
    return mask
