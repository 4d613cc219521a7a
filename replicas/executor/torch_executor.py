"""The executor that runs real models: packs a step, runs it, samples, and moves KV blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import numpy as np
import torch

from tokenflow.replicas.executor.attention import (
    AttentionBatch,
    DecodeBatch,
    KVPool,
    PrefillChunk,
    chunk_mask,
)
from tokenflow.replicas.executor.base import CopyDone, ScheduledSequence, StepResult, TokenLogprobs
from tokenflow.replicas.executor.block_copies import Copies, CopyThread, CudaCopies
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.fusion import fuse_model
from tokenflow.replicas.executor.model import forward, load_model
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.sampling.sampler import sample


class TorchExecutor:
    """Runs one checkpoint on one device. See `Executor` for the contract of each method."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        device: str = "cpu",
        host_memory: torch.Tensor | None = None,
        num_threads: int | None = None,
        fuse: bool = True,
        shard: Shard | None = None,
    ) -> None:
        """Load the model and allocate the pool; of both a rank's part with `shard`, whose process
        group must be there.

        `host_memory` is uint8 `[slots, block_bytes]`, the node's shared segment. `num_threads` sets
        torch's threads for this process. Raises CheckpointError.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if device == "cpu":
            _keep_freed_memory()
        own = spec if shard is None else shard.spec(spec)
        self.layout = own.kv_layout(block_size)
        self.num_blocks = num_blocks
        self.vocab_size = spec.vocab_size
        self._device = torch.device(device)
        self._window = spec.sliding_window
        self._model = load_model(spec, self._device, shard)
        if fuse:
            fuse_model(self._model, spec)
        self._pool = KVPool(self.layout, num_blocks, self._device)
        self._copies: Copies
        if self._device.type == "cuda":
            self._copies = CudaCopies(self._pool.bytes_view(), host_memory)
        else:
            self._copies = CopyThread(self._pool.bytes_view(), host_memory)

    @torch.inference_mode()
    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        prefills = [i for i, s in enumerate(batch) if not self._decodes(s)]
        decodes = [i for i, s in enumerate(batch) if self._decodes(s)]
        order = prefills + decodes
        packed = [batch[i] for i in order]
        token_ids, positions, attention, ends = self._pack(packed, len(prefills))
        sampled = [k for k, s in enumerate(packed) if s.sample]
        rows = torch.as_tensor(ends[sampled], device=self._device)
        logits = forward(self._model, token_ids, positions, attention, rows)
        tokens = [-1] * len(batch)
        logprobs: list[TokenLogprobs | None] = [None] * len(batch)
        if sampled:
            drawn, drawn_logprobs = sample(logits, [packed[k] for k in sampled])
            for k, token, logprob in zip(sampled, drawn, drawn_logprobs, strict=True):
                tokens[order[k]] = token
                logprobs[order[k]] = logprob
        return StepResult(tokens, logprobs)

    @staticmethod
    def _decodes(s: ScheduledSequence) -> bool:
        return len(s.token_ids) == 1 and s.start > 0

    def _pack(
        self, packed: list[ScheduledSequence], num_prefills: int
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch, np.ndarray]:
        """Token ids and positions int64 `[tokens]`, the attention metadata, and the index of each
        sequence's last token."""
        block_size = self.layout.block_size
        lengths = np.fromiter((len(s.token_ids) for s in packed), np.int64, len(packed))
        starts = np.fromiter((s.start for s in packed), np.int64, len(packed))
        ends = lengths.cumsum() - 1
        ids = np.fromiter((t for s in packed for t in s.token_ids), np.int64, int(lengths.sum()))
        # Position of every token: its sequence's start plus its place in the chunk.
        positions = np.arange(len(ids)) - np.repeat(ends + 1 - lengths - starts, lengths)
        last_blocks = (starts + lengths - 1) // block_size + 1
        widest = int(last_blocks.max())
        tables = np.stack(
            [self._row(s, int(n), widest) for s, n in zip(packed, last_blocks, strict=True)]
        )
        owner = np.repeat(np.arange(len(packed)), lengths)
        write_blocks = tables[owner, positions // block_size]
        device, pool = self._device, self._pool
        batch = AttentionBatch(
            pool,
            pool.token_rows(
                torch.from_numpy(write_blocks).to(device),
                torch.from_numpy(positions % block_size).to(device),
            ),
        )
        for k in range(num_prefills):
            end = int(ends[k]) + 1
            length, context = int(lengths[k]), int(starts[k])
            table = torch.from_numpy(tables[k : k + 1, : last_blocks[k]]).to(device)
            batch.prefills.append(
                PrefillChunk(
                    end - length,
                    end,
                    context,
                    pool.block_rows(table),
                    chunk_mask(length, context, self._window, device),
                )
            )
        if num_prefills < len(packed):
            wide = int(last_blocks[num_prefills:].max())
            decode_tables = np.ascontiguousarray(tables[num_prefills:, :wide])
            seen = starts[num_prefills:, None] + 1
            places = np.arange(wide * block_size)[None]
            hidden = places >= seen
            if self._window is not None:
                hidden |= places < seen - self._window
            batch.decodes = DecodeBatch(
                int(lengths[:num_prefills].sum()),
                pool.block_rows(torch.from_numpy(decode_tables).to(device)),
                pool.bias(torch.from_numpy(hidden).to(device)),
            )
        return (
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device),
            batch,
            ends,
        )

    @staticmethod
    def _row(s: ScheduledSequence, blocks: int, width: int) -> np.ndarray:
        """The block table of a sequence, int64 `[width]`, padded with 0."""
        row = np.zeros(width, np.int64)
        row[:blocks] = s.block_ids[:blocks]
        return row

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        return self._copies.to_host(pairs)

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        return self._copies.to_device(pairs, expected)

    def poll_transfers(self, timeout_s: float = 0.0) -> list[CopyDone]:
        return self._copies.poll(timeout_s)

    def close(self) -> None:
        self._copies.close()


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of large temporaries.

    Every step makes the same ones again. Given back to the kernel each time, they cost a page fault
    per 4 KiB.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, _KEPT_BYTES)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
