"""Runs a workload through a real engine in real time: what `run.simulate` does on a virtual clock.

One thread, no Ray and no HTTP, so that nothing is measured but the engine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.factory import (
    build_executor,
    cpu_threads,
    free_memory_bytes,
    inspect_model,
    plan_blocks,
    private_host_memory,
    resolve_device,
)
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.policy import Policy
from tokenflow.replicas.simulator.executor import SimHost
from tokenflow.replicas.simulator.recording import RecordingExecutor
from tokenflow.replicas.simulator.workload import Arrival
from tokenflow.replicas.tokenizer import load_tokenizer

_TRANSFER_WAIT_S = 0.005
_LEAD_S = 0.2
"""The first request is due this long after the call, so that none is late for being made."""


class Bench:
    """A loaded model under a recording executor, and as many engines on it as are asked for, one
    after the other."""

    def __init__(self, directory: str | Path, config: EngineConfig, *, host_kv_tokens: int) -> None:
        """Raises CheckpointError or ConfigError for a model that cannot be run here."""
        self.config = config
        self.device = resolve_device(config.device)
        self.spec = inspect_model(directory, config, self.device)
        self.layout = self.spec.kv_layout(config.block_size)
        memory_bytes = free_memory_bytes(self.device, config.tensor_parallel)
        blocks = plan_blocks(self.spec, config, available_bytes=memory_bytes)
        self.host_slots = host_kv_tokens // config.block_size
        memory = private_host_memory(self.host_slots, self.layout, config.tensor_parallel)
        self.executor = RecordingExecutor(
            build_executor(
                self.spec, config, host_memory=memory, device=self.device, num_blocks=blocks
            )
        )
        self.threads = cpu_threads(config, 1)
        self._tokenizer: Any = load_tokenizer(directory)
        for first in range(0, blocks, self.host_slots):
            self._touch(range(first, min(first + self.host_slots, blocks)))

    def _touch(self, blocks: range) -> None:
        self.executor.load([(block - blocks.start, block) for block in blocks])
        while not self.executor.poll_transfers(1.0):
            pass
        self.executor.take()

    def engine(self, policy: Policy) -> Engine:
        """A new engine; the one before must have no work left."""
        return Engine(
            self.executor,
            policy,
            SimHost(self.host_slots),
            self.config,
            tokenizer=self._tokenizer,
            eos_ids=self.spec.eos_token_ids,
            max_model_len=self.spec.max_model_len,
        )

    def close(self) -> None:
        self.executor.close()


def greedy_request(
    request_id: str, arrival: Arrival, vocab_size: int, rng: random.Random, arrival_s: float
) -> Request:
    """A request with a random prompt and an output of exactly the arrival's length."""
    return Request(
        request_id=request_id,
        prompt_ids=tuple(rng.randrange(vocab_size) for _ in range(arrival.prompt_tokens)),
        params=SamplingParams(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True),
        token_rate=arrival.token_rate,
        arrival_s=arrival_s,
    )


def run_live(
    bench: Bench,
    engine: Engine,
    arrivals: Seq[Arrival],
    *,
    seed: int = 1,
    limit_s: float | None = None,
) -> list[StreamRecord]:
    """Submit each request when it is due and run to the end, or cancel what is left after
    `limit_s`. Returns a record per arrival, in order of time.

    Raises InvalidRequestError for a request that can never fit.
    """
    rng = random.Random(seed)
    pending = sorted(arrivals, key=lambda a: a.at_s)
    begun = time.monotonic() + _LEAD_S
    requests = [
        greedy_request(f"{i}", arrival, engine.executor.vocab_size, rng, begun + arrival.at_s)
        for i, arrival in enumerate(pending)
    ]
    for request in requests:
        engine.check(request)
    records = {r.request_id: StreamRecord(r.token_rate, r.arrival_s) for r in requests}
    added = 0
    while added < len(pending) or engine.has_work:
        now = time.monotonic()
        if limit_s is not None and now - begun > limit_s:
            limit_s, added = None, len(pending)
            for request_id in engine.requests:
                engine.cancel(request_id)
        while added < len(pending) and requests[added].arrival_s <= now:
            records[requests[added].request_id].sent_s = now
            engine.add(requests[added])
            added += 1
        if not engine.has_work:
            if added < len(pending):
                bench.executor.pause()
                time.sleep(max(0.0, requests[added].arrival_s - time.monotonic()))
            continue
        if not engine.step():
            engine.wait_for_transfers(_TRANSFER_WAIT_S)
        now = time.monotonic()
        for event in engine.take_events():
            record = records[event.request_id]
            if event.token_id >= 0:
                record.arrivals.append((now, 1))
            if event.finish_reason is not None:
                record.finish_reason = event.finish_reason
                record.finished_s = now
    return [records[r.request_id] for r in requests]
