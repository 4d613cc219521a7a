"""What GPUs and models are made of, as data, and the time a step takes on them (roofline).

A step takes the longer of its memory traffic and its arithmetic, at the fraction of the peak that
good kernels reach, plus a fixed overhead for launches and scheduling. [Williams et al., 2009]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tokenflow.replicas.executor.base import KVLayout


@dataclass(frozen=True, slots=True)
class GPU:
    """Peak figures of the maker's data sheet, dense, without sparsity."""

    name: str
    memory_gb: float
    hbm_gb_s: float
    bf16_tflops: float
    link_gb_s: float
    """Host link, each direction: what pinned copies of whole blocks reach."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA Ada GPU architecture white paper 2.1, table 2; PCIe 4.0 x16.
        GPU("rtx4090", 24, 1008, 165.2, 25),
        # NVIDIA RTX A6000 data sheet; bf16 with fp32 accumulation; PCIe 4.0 x16.
        GPU("a6000", 48, 768, 154.8, 25),
        # NVIDIA H200 data sheet (SXM); PCIe 5.0 x16, 50 to 55 GB/s in pinned block copies.
        GPU("h200", 141, 4800, 989, 52),
    )
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder; from its published config.json."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def weight_bytes(self) -> float:
        """In bfloat16."""
        return 2 * self.parameters

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(self.layers, block_size, self.kv_heads, self.head_dim, "bfloat16")


MODELS = {
    model.name: model
    for model in (
        ModelShape("llama3-8b", 8.03e9, 32, 32, 8, 128),
        ModelShape("qwen2-7b", 7.62e9, 28, 28, 4, 128),
        ModelShape("qwen2.5-32b", 32.8e9, 64, 40, 8, 128),
    )
}


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that a step takes at least, whatever is in it."""

    step_s: float
    decode_s: float
    """Per decoding sequence."""
    context_s: float
    """Per token of context that decoding reads."""
    prompt_s: float
    """Per prompt token."""


class StepCost(Protocol):
    """Seconds of a step."""

    def floors(self) -> tuple[Floor, ...]:
        """What every step takes at least: as long as each of them says."""
        ...

    def step_s(self, decode_contexts: Iterable[int], prefills: Iterable[tuple[int, int]]) -> float:
        """`decode_contexts`: tokens each decoding sequence attends to; `prefills`: (tokens of the
        chunk, tokens before it)."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """The cost of a step of one model on one GPU."""

    gpu: GPU
    model: ModelShape
    memory_efficiency: float = 0.75
    compute_efficiency: float = 0.6
    overhead_s: float = 0.002

    def step_s(self, decode_contexts: Iterable[int], prefills: Iterable[tuple[int, int]]) -> float:
        model = self.model
        tokens = read = 0
        scores = 0.0
        """Query-key pairs."""
        for context in decode_contexts:
            tokens += 1
            read += context
            scores += context
        for chunk, before in prefills:
            tokens += chunk
            read += before + chunk
            scores += chunk * (before + chunk / 2)
        kv_bytes = model.kv_layout(1).token_bytes
        bytes_moved = model.weight_bytes + kv_bytes * read
        flops = 2 * model.parameters * tokens
        flops += 4 * model.layers * model.heads * model.head_dim * scores
        memory_s = bytes_moved / (self.gpu.hbm_gb_s * 1e9 * self.memory_efficiency)
        compute_s = flops / (self.gpu.bf16_tflops * 1e12 * self.compute_efficiency)
        return self.overhead_s + max(memory_s, compute_s)

    def floors(self) -> tuple[Floor, ...]:
        """Its memory traffic alone, and its arithmetic alone."""
        model = self.model
        bandwidth = self.gpu.hbm_gb_s * 1e9 * self.memory_efficiency
        flops = self.gpu.bf16_tflops * 1e12 * self.compute_efficiency
        read_s = model.kv_layout(1).token_bytes / bandwidth
        token_s = 2 * model.parameters / flops
        pair_s = 4 * model.layers * model.heads * model.head_dim / flops
        return (
            Floor(self.overhead_s + model.weight_bytes / bandwidth, 0.0, read_s, read_s),
            Floor(self.overhead_s, token_s, pair_s, token_s),
        )

    def kv_tokens(self, memory_fraction: float, reserve_gb: float = 1.0) -> int:
        """KV tokens that fit into that fraction of the card beside weights and activations.

        Raises ValueError when nothing fits.
        """
        free = self.gpu.memory_gb * 1e9 * memory_fraction - self.model.weight_bytes
        tokens = int((free - reserve_gb * 1e9) // self.model.kv_layout(1).token_bytes)
        if tokens < 1:
            raise ValueError(f"{self.model.name} does not fit into {self.gpu.name}")
        return tokens
