"""Runs a workload through the real engine on a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from tokenflow.loadgen.metrics import StreamRecord, Summary, summarize
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.policy import Policy
from tokenflow.replicas.simulator.executor import (
    END,
    SimExecutor,
    SimHost,
    SimTokenizer,
    VirtualClock,
)
from tokenflow.replicas.simulator.hardware import StepCost
from tokenflow.replicas.simulator.workload import Arrival
from tokenflow.replicas.stats import EngineStats

_IDLE_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The simulated device and its host link."""

    cost: StepCost
    layout: KVLayout
    kv_tokens: int
    host_kv_tokens: int
    link_gb_s: float
    max_num_seqs: int = 512
    max_batch_tokens: int = 8192

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.layout.block_size


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    summary: Summary
    stats: EngineStats
    records: list[StreamRecord]
    busy_s: float
    """Seconds the device ran steps."""
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    """(time, waiting, running, preempted), once per simulated second."""


def simulate(
    machine: Machine,
    policy: Policy,
    arrivals: Seq[Arrival],
    *,
    engine: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run to the end. `engine` sets further fields of EngineConfig.

    Raises ValueError for a request that can never fit.
    """
    pending = sorted(arrivals, key=lambda a: a.at_s)
    clock = VirtualClock()
    lengths = [a.output_tokens for a in pending]
    served, executor = build(machine, policy, clock, lengths, engine or {})
    longest = max((a.prompt_tokens + a.output_tokens for a in pending), default=0)
    if longest > served.max_model_len:
        raise ValueError(
            f"a request of {longest} tokens does not fit into {served.max_model_len} KV tokens"
        )
    records: dict[str, StreamRecord] = {}
    samples: list[tuple[float, int, int, int]] = []
    next_sample = 0.0
    added = 0
    while added < len(pending) or served.has_work:
        while added < len(pending) and pending[added].at_s <= clock.now:
            request = request_of(added, pending[added])
            records[request.request_id] = StreamRecord(request.token_rate, request.arrival_s)
            served.add(request)
            added += 1
        if not served.has_work:
            clock.advance_to(pending[added].at_s)
            continue
        if not served.step():
            wait = _IDLE_WAIT_S
            if added < len(pending):
                wait = min(wait, max(pending[added].at_s - clock.now, 1e-6))
            served.wait_for_transfers(wait)
        for event in served.take_events():
            record = records[event.request_id]
            if event.token_id >= 0:
                record.arrivals.append((clock.now, 1))
            if event.finish_reason is not None:
                record.finish_reason = event.finish_reason
                record.finished_s = clock.now
        if clock.now >= next_sample:
            stats = served.stats
            samples.append((clock.now, stats.now_waiting, stats.now_running, stats.now_preempted))
            next_sample = clock.now + 1.0
    ordered = [records[f"{i}"] for i in range(len(pending))]
    return Outcome(summarize(ordered), served.stats, ordered, executor.busy_s, samples)


def build(
    machine: Machine,
    policy: Policy,
    clock: VirtualClock,
    lengths: Seq[int],
    engine: Mapping[str, Any],
) -> tuple[Engine, SimExecutor]:
    """The shipped engine on a simulated device; `lengths` are those of the outputs, which the
    numbers of `request_of` index. `engine` sets further fields of EngineConfig."""
    block = machine.layout.block_size
    executor = SimExecutor(
        clock,
        machine.cost,
        machine.layout,
        machine.num_blocks,
        link_gb_s=machine.link_gb_s,
        lengths=lengths,
    )
    served = Engine(
        executor,
        policy,
        SimHost(machine.host_kv_tokens // block),
        EngineConfig(
            block_size=block,
            max_num_seqs=machine.max_num_seqs,
            max_batch_tokens=machine.max_batch_tokens,
            max_waiting=1 << 30,
            **engine,
        ),
        tokenizer=SimTokenizer(),
        eos_ids=(END,),
        max_model_len=machine.num_blocks * block,
        clock=clock,
    )
    return served, executor


def request_of(number: int, arrival: Arrival) -> Request:
    """The engine's request for the `number`-th arrival."""
    return Request(
        request_id=f"{number}",
        prompt_ids=(2,) * arrival.prompt_tokens,
        params=SamplingParams(
            max_tokens=arrival.max_tokens or arrival.output_tokens,
            temperature=0.0,
            # By which the executor knows when the output ends.
            seed=number,
        ),
        token_rate=arrival.token_rate,
        arrival_s=arrival.at_s,
        # All prompts look alike here; as texts they would have nothing in common.
        cache_salt=f"{number}",
        tenant=arrival.tenant,
    )
