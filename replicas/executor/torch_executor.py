"""The executor that runs real models: packs a step, runs it, samples, and moves KV blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenflow.replicas.errors import CheckpointError, StepMemoryError
from tokenflow.replicas.executor.attention.base import IntArray, PackedStep
from tokenflow.replicas.executor.attention.choice import BackendName, make_backend
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.base import (
    UNKNOWN,
    CopyDone,
    ScheduledSequence,
    StepResult,
    TokenLogprobs,
)
from tokenflow.replicas.executor.block_copies import Copies, CopyThread, CudaCopies, Reports
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.device import has_triton
from tokenflow.replicas.executor.fusion import fuse_model
from tokenflow.replicas.executor.graphs import CudaCapture, DecodeGraphs, replayed
from tokenflow.replicas.executor.memory import MemoryBudget, fit_blocks, step_blocks, worst_step
from tokenflow.replicas.executor.model import hidden_states, load_model, logits_of
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.executor.transfer import Download, upload
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.sampling.sampler import Drawn, draw

_MOST_IN_GRAPH = 512
"""Decoding sequences; beyond them the kernels last longer than their launches."""
_WARM_CPU = 256
"""Context, in tokens, that a CPU is warmed up with: it compiles nothing for longer ones."""


class _Packed(NamedTuple):
    """A step's arrays on the host."""

    token_ids: IntArray
    """`[tokens]`."""
    positions: IntArray
    """`[tokens]`."""
    ends: IntArray
    """Index of each sequence's last token."""
    step: PackedStep


@dataclass(slots=True)
class _Step:
    """A launched step."""

    size: int
    places: list[int]
    """Of the sequences that draw a token, in the batch."""
    drawn: Drawn | None
    download: Download | None

    def result(self) -> StepResult:
        tokens = [-1] * self.size
        logprobs: list[TokenLogprobs | None] = [None] * self.size
        if self.drawn is not None and self.download is not None:
            read = self.drawn.read(self.download.wait())
            for place, token, logprob in zip(self.places, *read, strict=True):
                tokens[place] = token
                logprobs[place] = logprob
        return StepResult(tokens, logprobs)


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
        attention_backend: BackendName = "auto",
        decode_graphs: bool | None = None,
        memory: MemoryBudget | None = None,
        shard: Shard | None = None,
        reports: Reports | None = None,
    ) -> None:
        """Load the model and allocate the pool; of both a rank's part with `shard`, whose process
        group must be there.

        `host_memory` is uint8 `[slots, slot_bytes]`, the node's shared segment; a slot is a block,
        or the parts that all ranks have of one. Finished copies go to `reports`, if not to
        `poll_transfers`. `num_threads` sets torch's threads for this process. `decode_graphs` None:
        where the device has graphs and the backend does not read all of a table whatever is in it.
        With `memory` as many blocks are made as fit it, by measurement, instead of `num_blocks`.
        Raises CheckpointError, KVStoreError for host memory of another layout, and ConfigError for
        a backend that cannot run here.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if device == "cpu":
            _keep_freed_memory()
        whole = spec
        if shard is not None:
            spec = shard.spec(whole)
        self.layout = spec.kv_layout(block_size)
        self.vocab_size = spec.vocab_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._use_device()
        before = memory.memory.used() if memory is not None else 0
        self._model = load_model(whole, self._device, shard)
        if fuse:
            fuse_model(self._model, spec, kernels=has_triton(self._device))
        self._last = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)
        """The token that was drawn last for each slot."""
        self._graphs: DecodeGraphs | None = None
        cuda = self._device.type == "cuda"
        self.overlaps = cuda
        if memory is not None:
            weights = memory.memory.used() - before
            num_blocks = self._fit(spec, attention_backend, max_num_seqs, memory, weights)
        self.num_blocks = num_blocks
        try:
            self._make_pool(spec, attention_backend, num_blocks)
            self._warm_up(spec.max_model_len if cuda else min(spec.max_model_len, _WARM_CPU))
            if decode_graphs or (decode_graphs is None and cuda and self._attention.name != "sdpa"):
                self._graphs = self._capture(spec, max_num_seqs)
        except (torch.OutOfMemoryError, StepMemoryError) as error:
            raise CheckpointError(
                f"{spec.name}: {num_blocks} KV blocks and the graphs do not fit beside the weights "
                f"({error}); lower engine.kv_tokens, engine.max_num_seqs or engine.memory_fraction."
            ) from error
        blocks = self._pool.bytes_view(num_blocks)
        self._copies: Copies
        if cuda:
            self._copies = CudaCopies(blocks, host_memory, shard, reports)
        else:
            self._copies = CopyThread(blocks, host_memory, shard, reports)

    def _use_device(self) -> None:
        """What a thread launches by Triton goes to its current device, whatever the tensors are on;
        and the engine's thread is another than the one that made it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _warm_up(self, max_len: int) -> None:
        """Have kernels compiled and libraries set up before the first request: a chunk beside a
        long context, and a short one, in the block that is nobody's."""
        params = SamplingParams(max_tokens=1, top_p=0.9)
        table = np.full(-(-max_len // self.layout.block_size), self.num_blocks, np.int32)
        chunk, long, short = (
            ScheduledSequence(0, tokens, start, table, True, params, (), ())
            for tokens, start in (((0,) * 8, 0), ((0,), max_len - 1), ((0,), 1))
        )
        self.execute([chunk, long])
        self.execute([short])

    def _make_pool(self, spec: ModelSpec, backend: BackendName, num_blocks: int) -> None:
        # One block more than the engine knows of, for the padding of graphs.
        self._pool = KVPool(self.layout, num_blocks + 1, self._device)
        self._attention = make_backend(
            backend,
            self._pool,
            group=spec.num_heads // spec.kv_heads,
            window=spec.sliding_window,
        )

    def _fit(
        self,
        spec: ModelSpec,
        backend: BackendName,
        max_num_seqs: int,
        budget: MemoryBudget,
        weight_bytes: int,
    ) -> int:
        """How many blocks there is memory for beside the worst step, which is run to see."""
        tokens = min(budget.max_batch_tokens, spec.max_model_len + max_num_seqs - 1)
        step = worst_step(tokens, max_num_seqs, self.layout.block_size)
        self._make_pool(spec, backend, step_blocks(step))
        memory = budget.memory
        memory.reset_peak()
        before = memory.used()
        self.execute(step)
        step_bytes = memory.peak() - before
        del self._pool, self._attention  # so that the pool to come finds its memory free
        # The graphs' memory is apart from the allocator's; that of the largest serves all. They are
        # captured over the pool, which is not there yet: an estimate from the step's rows.
        rows = min(max_num_seqs, _MOST_IN_GRAPH)
        return fit_blocks(
            budget,
            name=spec.name,
            weight_bytes=weight_bytes,
            step_bytes=step_bytes,
            graph_bytes=step_bytes * min(rows, tokens) // tokens,
            block_bytes=self.layout.block_bytes,
        )

    @torch.inference_mode()
    def _capture(self, spec: ModelSpec, max_num_seqs: int) -> DecodeGraphs:
        capture = CudaCapture(self._device) if self._device.type == "cuda" else replayed
        return DecodeGraphs(
            self._decode,
            capture,
            most=min(max_num_seqs, _MOST_IN_GRAPH),
            width=-(-spec.max_model_len // self.layout.block_size),
            hidden_size=spec.hidden_size,
            dtype=self._pool.data.dtype,
            spare_block=self.num_blocks,
            device=self._device,
        )

    def execute(self, batch: Seq[ScheduledSequence]) -> StepResult:
        return self._step(batch, ahead=False).result()

    def launch(self, batch: Seq[ScheduledSequence]) -> _Step:
        return self._step(batch, ahead=True)

    def _step(self, batch: Seq[ScheduledSequence], *, ahead: bool) -> _Step:
        """With `ahead`, tokens may be UNKNOWN, and those drawn are kept on the device."""
        self._use_device()
        try:
            return self._run(batch, ahead)
        except torch.OutOfMemoryError as error:
            # What other shapes have left in the allocator may be enough for a smaller step.
            torch.cuda.empty_cache()
            raise StepMemoryError(str(error)) from error

    @torch.inference_mode()
    def _run(self, batch: Seq[ScheduledSequence], ahead: bool) -> _Step:
        prefills = [i for i, s in enumerate(batch) if not self._decodes(s)]
        decodes = [i for i, s in enumerate(batch) if self._decodes(s)]
        order = prefills + decodes
        packed = [batch[i] for i in order]
        sampled = [k for k, s in enumerate(packed) if s.sample]
        host = self._pack(packed, len(prefills))
        step, rows = host.step, host.ends[sampled]
        graphs = self._graphs
        if graphs is not None and (prefills or not graphs.fits(len(packed))):
            graphs = None
        arrays: list[np.ndarray[Any, Any]] = [host.token_ids, host.positions, rows]
        # Without a graph the backend brings the tables over in its own form.
        arrays.append(step.block_tables if graphs is not None else step.block_tables[:0])
        unknown = []
        if ahead:
            unknown = [k for k, s in enumerate(packed) if s.token_ids[-1] == UNKNOWN]
            arrays += [
                np.array([packed[k].slot for k in sampled], np.int64),
                host.ends[unknown],
                np.array([packed[k].slot for k in unknown], np.int64),
            ]
        ids, positions, sample_rows, tables, *links = upload(arrays, self._device)
        if unknown:
            ids.index_copy_(0, links[1], self._last.index_select(0, links[2]))
        if graphs is not None:
            hidden = graphs.run(ids, positions, tables)
        else:
            hidden = hidden_states(self._model, ids, positions, self._attention.prepare(step))
        places = [order[k] for k in sampled]
        if not sampled:
            return _Step(len(batch), places, None, None)
        logits = logits_of(self._model, hidden.index_select(0, sample_rows))
        last = self._last.index_select(0, links[0]) if unknown else None
        drawn = draw(logits, [packed[k] for k in sampled], last)
        if ahead:
            self._last.index_copy_(0, links[0], drawn.tokens)
        return _Step(len(batch), places, drawn, Download(drawn.tensors))

    @staticmethod
    def _decodes(s: ScheduledSequence) -> bool:
        return len(s.token_ids) == 1 and s.start > 0

    def _pack(self, packed: list[ScheduledSequence], num_prefills: int) -> _Packed:
        block_size = self.layout.block_size
        lengths = np.fromiter((len(s.token_ids) for s in packed), np.int64, len(packed))
        starts = np.fromiter((s.start for s in packed), np.int64, len(packed))
        ends = lengths.cumsum() - 1
        ids = np.fromiter((t for s in packed for t in s.token_ids), np.int64, int(lengths.sum()))
        # Position of every token: its sequence's start plus its place in the chunk.
        positions = np.arange(len(ids)) - np.repeat(ends + 1 - lengths - starts, lengths)
        last_blocks = (starts + lengths - 1) // block_size + 1
        # What a table lacks is read too, for nothing: never a block into which a copy is under way,
        # since what comes may not be numbers (see `block_copies`).
        spare = len(self._pool.data) - 1
        tables = np.full((len(packed), int(last_blocks.max())), spare, np.int32)
        for row, s, n in zip(tables, packed, last_blocks.tolist(), strict=True):
            row[:n] = s.block_ids[:n]
        owner = np.repeat(np.arange(len(packed)), lengths)
        blocks = tables[owner, positions // block_size].astype(np.int64)
        places = blocks * block_size + positions % block_size
        step = PackedStep(lengths, starts, num_prefills, tables, places)
        return _Packed(ids, positions, ends, step)

    def _decode(
        self, ids: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor
    ) -> torch.Tensor:
        """What a graph captures."""
        batch = self._attention.prepare_decode(positions, tables)
        return hidden_states(self._model, ids, positions, batch)

    def offload(self, pairs: Seq[tuple[int, int]]) -> int:
        return self._copies.to_host(pairs)

    def load(self, pairs: Seq[tuple[int, int]], expected: Seq[int | None] = ()) -> int:
        return self._copies.to_device(pairs, expected)

    def clear(self, block_ids: Seq[int]) -> None:
        """Zero blocks, after all that was launched before."""
        self._pool.data.index_fill_(0, torch.tensor(block_ids, device=self._device), 0)

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
