"""The paper's eight settings. [TokenFlow §7.2, table 1]

Llama3-8B; prompts and outputs normal. Outputs on the H200 are twice as long as on the RTX 4090, and
the H200 gives about 26 GB to KV (memory fraction 0.3).
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenflow.replicas.simulator.hardware import GPUS, MODELS, Roofline
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

BLOCK_SIZE = 16
HOST_KV_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. Either `burst` or `poisson_per_s` is set."""

    name: str
    gpu: str
    kv_tokens: int
    prompt_mean: int
    output_mean: int
    burst: int = 0
    poisson_per_s: float = 0.0
    model: str = "llama3-8b"

    def machine(self) -> Machine:
        gpu, model = GPUS[self.gpu], MODELS[self.model]
        return Machine(
            cost=Roofline(gpu, model),
            layout=model.kv_layout(BLOCK_SIZE),
            kv_tokens=self.kv_tokens,
            host_kv_tokens=HOST_KV_TOKENS,
            link_gb_s=gpu.link_gb_s,
        )

    def arrivals(
        self, seed: int, rates: Seq[tuple[float, float]], duration_s: float
    ) -> list[Arrival]:
        """The requests of one seed; `rates` lists (tokens/s, weight). Poisson arrivals come for
        `duration_s`, of which the paper says nothing."""
        rng = random.Random(seed)
        process = self.poisson_per_s
        times = burst(self.burst) if self.burst else poisson(process, duration_s, rng)
        return requests(times, self.prompt_mean, self.output_mean, rates, rng)


# KV tokens: 26 GB and 4.5 GB (0.9 of the card less weights and 1 GB) at 128 KiB a token.
_H200 = 198_000
_RTX4090 = 34_000

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("rtx4090-a", "rtx4090", _RTX4090, 512, 2048, burst=60),
        Setting("rtx4090-b", "rtx4090", _RTX4090, 1024, 2048, burst=80),
        Setting("rtx4090-c", "rtx4090", _RTX4090, 512, 2048, poisson_per_s=2),
        Setting("rtx4090-d", "rtx4090", _RTX4090, 512, 2048, poisson_per_s=4),
        Setting("h200-a", "h200", _H200, 512, 4096, burst=400),
        Setting("h200-b", "h200", _H200, 1024, 4096, burst=200),
        Setting("h200-c", "h200", _H200, 512, 4096, poisson_per_s=5),
        Setting("h200-d", "h200", _H200, 512, 4096, poisson_per_s=10),
    )
}
