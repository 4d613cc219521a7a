"""The backend that needs nothing but torch and Triton, which torch brings along on Linux.

Here is decided which programs run; the kernels are in `triton_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton

from tokenflow.replicas.executor.attention import triton_kernels as kernels
from tokenflow.replicas.executor.attention.base import PackedStep
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.transfer import upload

_PREFILL_ROWS = {2: 128, 4: 32}
"""Rows of a prefill program by bytes of a number: what a warpgroup's matrix instructions take
twice; in float32, which has none, few enough for the registers."""
_KEYS = 64
"""Keys per iteration."""
_SHARED_BYTES = 96 << 10
"""For the keys and values on their way; queries and weights take as much again."""
_LEAST_SPLIT_KEYS = 256
_MOST_SPLITS = 32
_PROGRAMS_PER_PROCESSOR = 2


def decode_splits(sequences: int, kv_heads: int, keys: int, processors: int) -> int:
    """Into how many pieces the context of each decoding sequence is cut, a power of two: as many as
    keep all `processors` busy, none of fewer than `_LEAST_SPLIT_KEYS` keys."""
    wanted = _PROGRAMS_PER_PROCESSOR * processors / (sequences * kv_heads)
    most = min(wanted, keys / _LEAST_SPLIT_KEYS, _MOST_SPLITS)
    return 1 << max(0, int(most).bit_length() - 1)


def query_tiles(lengths: list[int], queries: int) -> tuple[list[int], list[int]]:
    """(sequence, offset of its first query) of each program over chunks of these lengths; the end
    of a chunk first, which has the most keys to look at, so that no program begins it late."""
    tiles = [
        (k, at) for k, length in enumerate(lengths) for at in reversed(range(0, length, queries))
    ]
    return [k for k, _ in tiles], [at for _, at in tiles]


def launch_options(queries: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Warps, and stages of the pipeline of loads, of `attend` for `queries` per program: as many
    as the shared memory of a multiprocessor holds beside the rest."""
    stage_bytes = 2 * _KEYS * head_dim * itemsize
    return {
        "num_warps": 8 if queries > 1 else 4,
        "num_stages": max(1, min(3, _SHARED_BYTES // stage_bytes)),
    }


class TritonAttention:
    """`AttentionBackend`. head_dim must be a power of two, from 16 to 256."""

    name = "triton"

    def __init__(
        self, pool: KVPool, window: int | None, group: int, processors: int | None = None
    ) -> None:
        """`group` query heads share a KV head. `processors`: the device's multiprocessors, None =
        ask it."""
        self._pool = pool
        self._window = window or 0
        self._queries = max(1, _PREFILL_ROWS[pool.data.element_size()] // group)
        if processors is None:
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._processors = processors

    def prepare(self, step: PackedStep) -> TritonBatch:
        lengths = step.lengths.tolist()
        first = step.num_prefills
        seen = step.starts + step.lengths
        owners, offsets = query_tiles(lengths[:first], self._queries)
        decodes = len(lengths) - first
        owners += range(first, len(lengths))
        offsets += [0] * decodes
        places, tables, starts, seen32, sequences, offsets32 = upload(
            [
                step.places,
                step.block_tables,
                np.concatenate([[0], step.lengths.cumsum()]).astype(np.int32),
                seen.astype(np.int32),
                np.array(owners, np.int32),
                np.array(offsets, np.int32),
            ],
            self._pool.device,
        )
        longest = int(seen[first:].max(initial=0))
        return TritonBatch(
            self._pool,
            self._window,
            places,
            tables,
            starts,
            seen32,
            sequences,
            offsets32,
            queries=self._queries,
            prefill_programs=len(owners) - decodes,
            prefill_tokens=step.prefill_tokens,
            decodes=decodes,
            splits=self._splits(decodes, longest),
        )

    def prepare_decode(self, positions: torch.Tensor, tables: torch.Tensor) -> TritonBatch:
        n = len(positions)
        starts = torch.arange(n + 1, dtype=torch.int32, device=positions.device)
        return TritonBatch(
            self._pool,
            self._window,
            self._pool.places(positions, tables),
            tables,
            starts,
            (positions + 1).to(torch.int32),
            starts,
            torch.zeros_like(starts),
            queries=1,
            prefill_programs=0,
            prefill_tokens=0,
            decodes=n,
            # What the tables can hold: the true lengths are known on the device only.
            splits=self._splits(n, tables.shape[1] * self._pool.layout.block_size),
        )

    def _splits(self, decodes: int, longest: int) -> int:
        if not decodes:
            return 1
        keys = min(longest, self._window) if self._window else longest
        return decode_splits(decodes, self._pool.layout.kv_heads, keys, self._processors)


@dataclass(slots=True)
class TritonBatch:
    """`AttentionBatch` of this backend; the arrays as the kernels take them."""

    pool: KVPool
    window: int
    places: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    seen: torch.Tensor
    sequences: torch.Tensor
    """Of the prefill programs, then of the decoding ones."""
    offsets: torch.Tensor
    queries: int
    """Per prefill program."""
    prefill_programs: int
    prefill_tokens: int
    decodes: int
    splits: int

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scale: float,
    ) -> torch.Tensor:
        write_kv(self.pool, self.places, layer, key, value)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self.prefill_programs:
            self._launch(query, out, layer, scale, 0, self.prefill_programs, self.queries, 1)
        if self.decodes:
            first = self.prefill_programs
            self._launch(query, out, layer, scale, first, self.decodes, 1, self.splits)
        return out

    def _launch(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        layer: int,
        scale: float,
        first_program: int,
        programs: int,
        queries: int,
        splits: int,
    ) -> None:
        heads, head_dim = query.shape[1:]
        kv_heads = self.pool.layout.kv_heads
        keys, values = self.pool.of_layer(layer)
        group = heads // kv_heads
        tokens, first_token = self.decodes, self.prefill_tokens
        partial_out = partial_max = partial_sum = out
        if splits > 1:
            shape = (splits, tokens, heads)
            partial_max, partial_sum = torch.empty(
                (2, *shape), dtype=torch.float32, device=out.device
            )
            partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device)
        kernels.attend[(programs, kv_heads, splits)](
            query,
            keys,
            values,
            out,
            partial_out,
            partial_max,
            partial_sum,
            self.tables,
            self.starts,
            self.seen,
            self.sequences,
            self.offsets,
            scale,
            first_program,
            first_token,
            *query.stride()[:2],
            *keys.stride()[:3],
            *out.stride()[:2],
            self.tables.stride(0),
            tokens,
            heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=self.pool.layout.block_size,
            QUERIES=queries,
            ROWS=max(16, triton.next_power_of_2(queries * group)),
            KEYS=_KEYS,
            SPLIT=splits > 1,
            WINDOW=self.window,
            **launch_options(queries, head_dim, query.element_size()),
        )
        if splits > 1:
            kernels.merge_splits[(tokens, heads)](
                out,
                partial_out,
                partial_max,
                partial_sum,
                first_token,
                *out.stride()[:2],
                tokens,
                heads,
                splits,
                HEAD_DIM=head_dim,
                MOST_SPLITS=_MOST_SPLITS,
            )


def write_kv(
    pool: KVPool, places: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor
) -> None:
    """K and V of a step, `[tokens, kv_heads, head_dim]`, to `PackedStep.places`, in one kernel."""
    keys, values = pool.of_layer(layer)
    heads = pool.layout.kv_heads
    kernels.store_kv[(len(places),)](
        key,
        value,
        keys,
        values,
        places,
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:3],
        HEADS=heads,
        HEAD_ROWS=triton.next_power_of_2(heads),
        HEAD_DIM=pool.layout.head_dim,
        BLOCK_SIZE=pool.layout.block_size,
    )
