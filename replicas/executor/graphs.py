"""Decoding steps as CUDA graphs: one launch in place of some hundred, over buckets of batch sizes.

A graph replays fixed kernels over fixed memory. So a step's inputs are copied into static buffers,
and its batch is padded to the next bucket: rows of padding decode the first token of a block that
belongs to nobody. What is captured, and how, is handed in; on a CPU `replayed` stands in.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("tokenflow.engine")

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""token ids int64 `[rows]`, positions int64 `[rows]`, block tables int32 `[rows, blocks]` to hidden
states `[rows, hidden]`."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes a function that does what the given one did, over the same memory."""


def graph_buckets(most: int) -> list[int]:
    """Batch sizes that have a graph: finer where a row of padding costs a larger share."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Graphs for 1 to `most` decoding sequences."""

    def __init__(
        self,
        run: Run,
        capture: Capture,
        *,
        most: int,
        width: int,
        hidden_size: int,
        dtype: torch.dtype,
        spare_block: int,
        device: torch.device,
    ) -> None:
        """`width` is that of the widest block table; `spare_block` nobody's, for padding."""
        self._spare = spare_block
        self._ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._tables = torch.full((most, width), spare_block, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(most, hidden_size, dtype=dtype, device=device)
        self._buckets = graph_buckets(most)
        begun = time.perf_counter()
        self._replays: dict[int, Callable[[], None]] = {}
        # The largest first: the smaller ones fit into the memory it took.
        for size in reversed(self._buckets):
            self._replays[size] = capture(lambda n=size: self._forward(run, n))  # type: ignore[misc]
        logger.info(
            "decode graphs for %d batch sizes up to %d in %.1f s",
            len(self._buckets),
            most,
            time.perf_counter() - begun,
        )

    def _forward(self, run: Run, n: int) -> None:
        self._hidden[:n] = run(self._ids[:n], self._positions[:n], self._tables[:n])

    def fits(self, sequences: int) -> bool:
        return sequences <= self._buckets[-1]

    def run(self, ids: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Hidden states `[sequences, hidden]`, valid until the next call."""
        n = len(ids)
        size = self._buckets[bisect.bisect_left(self._buckets, n)]
        self._ids[:n] = ids
        self._positions[:n] = positions
        self._tables[:n, : tables.shape[1]] = tables
        if n < size:
            self._positions[n:size] = 0
            self._tables[n:size, 0] = self._spare
        self._replays[size]()
        return self._hidden[:n]


class CudaCapture:
    """`Capture` by CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        # One for all: what the allocator keeps for a stream, no other can use.
        self._beside: Any = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # Libraries set themselves up, and kernels are compiled, on a first run outside.
        beside = self._beside
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                run()
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (the copies' wait for events) is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


def replayed(run: Callable[[], None]) -> Callable[[], None]:
    """`Capture` without graphs: the same function over the same padded buffers, run anew."""
    return run
