"""The backend on flash-attn 2: variable-length prefill and decoding over block tables.

Its kernels read the pool by its strides, but only pages of a multiple of 256 tokens
(`choice.FLASH_PAGE_TOKENS`; csrc/flash_attn/flash_api.cpp). KV is written by our own Triton kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

from tokenflow.replicas.executor.attention.base import PackedStep
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.attention.triton_backend import write_kv
from tokenflow.replicas.executor.transfer import upload


class FlashAttention:
    """`AttentionBackend` in float16 and bfloat16."""

    name = "flash_attn"

    def __init__(self, pool: KVPool, window: int | None) -> None:
        self._pool = pool
        # (to the left, to the right) of a query; -1: all.
        self._window = (-1, -1) if window is None else (window - 1, 0)

    def prepare(self, step: PackedStep) -> FlashBatch:
        n = step.num_prefills
        seen = step.starts + step.lengths
        places, tables, seen32, query_starts, key_starts = upload(
            [
                step.places,
                step.block_tables,
                seen.astype(np.int32),
                np.concatenate([[0], step.lengths[:n].cumsum()]).astype(np.int32),
                np.concatenate([[0], seen[:n].cumsum()]).astype(np.int32),
            ],
            self._pool.device,
        )
        prefill: dict[str, Any] | None = None
        if n:
            prefill = {
                "cu_seqlens_q": query_starts,
                "cu_seqlens_k": key_starts,
                "max_seqlen_q": int(step.lengths[:n].max()),
                "max_seqlen_k": int(seen[:n].max()),
                "block_table": tables[:n],
            }
        return FlashBatch(
            self._pool, self._window, places, step.prefill_tokens, prefill, seen32[n:], tables[n:]
        )

    def prepare_decode(self, positions: torch.Tensor, tables: torch.Tensor) -> FlashBatch:
        places = self._pool.places(positions, tables)
        seen = (positions + 1).to(torch.int32)
        return FlashBatch(self._pool, self._window, places, 0, None, seen, tables)


@dataclass(slots=True)
class FlashBatch:
    """`AttentionBatch` of this backend."""

    pool: KVPool
    window: tuple[int, int]
    places: torch.Tensor
    prefill_tokens: int
    prefill: dict[str, Any] | None
    """What `flash_attn_varlen_func` must know of the chunks."""
    decode_seen: torch.Tensor
    """int32 `[decoding sequences]`."""
    decode_tables: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        write_kv(self.pool, self.places, layer, key, value)
        keys, values = self.pool.of_layer(layer)
        shared = {"softmax_scale": scale, "causal": True, "window_size": self.window}
        parts = []
        if self.prefill is not None:
            chunks = query[: self.prefill_tokens]
            parts.append(flash_attn_varlen_func(chunks, keys, values, **self.prefill, **shared))
        if len(self.decode_seen):
            out = flash_attn_with_kvcache(
                query[self.prefill_tokens :, None],
                keys,
                values,
                cache_seqlens=self.decode_seen,
                block_table=self.decode_tables,
                **shared,
            )
            parts.append(out[:, 0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
