"""A request trace on a simulated machine, in the place of one of the paper's settings."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from tokenflow.loadgen.traces import TraceRow
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.hardware import GPU, GPUS, MODELS, ModelShape, Roofline
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.settings import BLOCK_SIZE
from tokenflow.replicas.simulator.workload import Arrival

_HOST_KV_BYTES = 512e9


def parse_machine(text: str) -> tuple[GPU, ModelShape]:
    """ "h200:qwen2.5-32b" as GPU and model. Raises ConfigError."""
    gpu, _, model = text.partition(":")
    if gpu not in GPUS or model not in MODELS:
        raise ConfigError(
            f"--machine: {text!r} is not GPU:MODEL, nor a calibration (.json); GPUs are "
            f"{', '.join(GPUS)}, models are {', '.join(MODELS)}."
        )
    return GPUS[gpu], MODELS[model]


def replay_machine(gpu: GPU, model: ModelShape, memory_fraction: float) -> Machine:
    """The machine of that fraction of the GPU's memory, for weights, activations and KV. Raises
    ConfigError when the model leaves none."""
    cost = Roofline(gpu, model)
    layout = model.kv_layout(BLOCK_SIZE)
    try:
        kv_tokens = cost.kv_tokens(memory_fraction) // BLOCK_SIZE * BLOCK_SIZE
    except ValueError as error:
        raise ConfigError(
            f"--machine: {error} at a memory fraction of {memory_fraction:g}."
        ) from None
    return Machine(
        cost=cost,
        layout=layout,
        kv_tokens=kv_tokens,
        host_kv_tokens=int(_HOST_KV_BYTES // layout.token_bytes),
        link_gb_s=gpu.link_gb_s,
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """The requests of a trace; a seed only draws the reading speeds."""

    path: str
    rows: tuple[TraceRow, ...]

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def check(self, kv_tokens: int, machine: str) -> None:
        """Raises ConfigError when a request does not fit into the KV of that machine."""
        for row in self.rows:
            if row.input_tokens + row.output_tokens > kv_tokens:
                raise ConfigError(
                    f"{self.path}:{row.line}: a request of {row.input_tokens} + "
                    f"{row.output_tokens} tokens does not fit into the {kv_tokens} KV tokens of "
                    f"{machine}; choose another --machine or --memory-fraction, or take the row "
                    "out."
                )

    def arrivals(
        self, seed: int, rates: Seq[tuple[float, float]], duration_s: float | None
    ) -> list[Arrival]:
        """The trace's requests; `rates` lists (tokens/s, weight). `duration_s` has already chosen
        the rows."""
        rng = random.Random(seed)
        values = [rate for rate, _ in rates]
        weights = [weight for _, weight in rates]
        return [
            Arrival(
                row.arrival_s,
                row.input_tokens,
                row.output_tokens,
                rng.choices(values, weights)[0],
            )
            for row in self.rows
        ]
