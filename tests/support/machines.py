"""A small simulated machine of round figures.

A step takes 30 ms, 1 ms for each sequence and 4 us for each token of context; a prompt token takes
0.2 ms, a block 2 ms to copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.simulator.hardware import Floor
from tokenflow.replicas.simulator.run import Machine

LAYOUT = KVLayout(2, 16, 2, 16, "float32")


@dataclass(frozen=True)
class Linear:
    """`slower` times as slow as the machine above."""

    slower: float = 1.0

    def step_s(self, decodes: Iterable[int], prefills: Iterable[tuple[int, int]]) -> float:
        decodes = list(decodes)
        prompt = sum(tokens for tokens, _ in prefills)
        seconds = 0.03 + 0.001 * len(decodes) + 4e-6 * sum(decodes) + 2e-4 * prompt
        return self.slower * seconds

    def floors(self) -> tuple[Floor, ...]:
        return (Floor(*(self.slower * part for part in (0.03, 0.001, 4e-6, 2e-4))),)


def machine(slower: float = 1.0) -> Machine:
    return Machine(
        cost=Linear(slower),
        layout=LAYOUT,
        kv_tokens=4096,
        host_kv_tokens=100_000,
        link_gb_s=LAYOUT.block_bytes / 0.002 / 1e9 / slower,
        max_num_seqs=64,
        max_batch_tokens=512,
    )
