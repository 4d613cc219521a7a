"""The calibration run: a real engine through a grid of situations, and what each of them took."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.engine import Engine
from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.live import Bench, greedy_request, run_live
from tokenflow.replicas.simulator.recording import Copy, Step
from tokenflow.replicas.simulator.workload import Arrival, burst, requests

_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CHUNKS = (16, 48, 128, 384, 1024, 4096)
_DECODE_STEPS = 8
_GRID_SHARE = 0.6
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Situation:
    """One round of the grid."""

    batch: int
    """Sequences."""
    context: int
    """Longest prompt, tokens."""
    chunk: int
    """Prefill tokens of a step."""
    uneven: bool
    """Prompts from a quarter of `context` on, and prefills that share steps with decodes."""


@dataclass(frozen=True, slots=True)
class Observations:
    """What the probe saw."""

    steps: list[Step]
    """Of the grid."""
    copies: list[Copy]
    under_policies: dict[str, list[Step]]
    """Steps of a burst under each policy, for what the engine itself takes between steps."""


class GridPolicy:
    """Admits everything and prefills in chunks; when `swap` is set, sends one sequence to the host
    and brings it back with nothing else running."""

    name = "probe"
    write_through = False

    def __init__(self) -> None:
        self.chunk = 1
        self.mixed = False
        self.swap = False

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        tracker = view.tracker
        preempted = tracker.rows(State.PREEMPTED)
        if len(preempted):
            plan.resume = tracker.take(preempted)
            return plan
        if tracker.count(State.OFFLOADING) or tracker.count(State.LOADING):
            return plan
        running, waiting = view.running(), view.waiting()
        decoding = [seq for seq in tracker.take(running) if seq.decoding]
        if self.swap and decoding:
            self.swap = False
            plan.preempt = [(decoding[0], Preempt.OFFLOAD)]
            return plan
        plan.admit = tracker.take(waiting)
        plan.batch = compose_batch(
            view,
            np.concatenate([running, waiting]),
            prefill_first=not self.mixed,
            prefill_tokens=self.chunk,
        )
        return plan


def grid(bench: Bench, rng: random.Random) -> list[Situation]:
    """Every batch size and context that fits, in random order, so that a machine that gets slower
    or faster meanwhile does so for small and large ones alike."""
    block = bench.layout.block_size
    longest = min(bench.spec.max_model_len, bench.executor.num_blocks * block) - _DECODE_STEPS - 1
    chunks = [c for c in _CHUNKS if c <= bench.config.max_batch_tokens]
    found = []
    for batch in _BATCHES:
        for context in _CONTEXTS:
            context = min(context, longest)
            blocks = -(-(context + _DECODE_STEPS + 1) // block)
            if batch > bench.config.max_num_seqs or batch * blocks > bench.executor.num_blocks:
                break
            # Small chunks of much text would take all the time.
            fitting = [c for c in chunks if c * 16 >= batch * context] or chunks[-1:]
            found.append(Situation(batch, context, rng.choice(fitting), rng.random() < 0.5))
            if context == longest:
                break
    rng.shuffle(found)
    return found


def probe(bench: Bench, policies: list[str], *, seconds: float, seed: int) -> Observations:
    """Observe for about that long, after a warm-up that is a part of it."""
    rng = random.Random(seed)
    begun = time.monotonic()
    _grid_until(bench, begun + seconds * _WARM_UP_SHARE, rng)
    bench.executor.take()
    _grid_until(bench, begun + seconds * (_WARM_UP_SHARE + _GRID_SHARE), rng)
    steps, copies = bench.executor.take()
    rest = seconds * (1 - _WARM_UP_SHARE - _GRID_SHARE) / len(policies)
    under = {}
    for policy in policies:
        engine = bench.engine(make_policy(policy))
        run_live(bench, engine, _crowd(bench, rng), seed=seed, limit_s=rest)
        under[policy], _ = bench.executor.take()
    return Observations(steps, copies, under)


def _crowd(bench: Bench, rng: random.Random) -> list[Arrival]:
    """A burst for about four times the memory, or for as many sequences as may run."""
    memory = min(bench.executor.num_blocks * bench.layout.block_size, 16 * bench.spec.max_model_len)
    each = max(2, min(memory // 16, bench.spec.max_model_len // 2))
    count = max(2, min(bench.config.max_num_seqs, 4 * memory // each))
    return requests(burst(count), each / 5, each * 4 / 5, [(10.0, 1)], rng)


def _grid_until(bench: Bench, deadline: float, rng: random.Random) -> None:
    policy = GridPolicy()
    engine = bench.engine(policy)
    ids = iter(range(1 << 60))
    while True:
        for situation in grid(bench, rng):
            if time.monotonic() >= deadline:
                return
            _round(engine, policy, situation, ids, rng)


def _round(
    engine: Engine,
    policy: GridPolicy,
    situation: Situation,
    ids: Iterator[int],
    rng: random.Random,
) -> None:
    policy.chunk, policy.mixed = situation.chunk, situation.uneven
    policy.swap = True
    for _ in range(situation.batch):
        low = max(1, situation.context // 4) if situation.uneven else situation.context
        arrival = Arrival(0.0, rng.randint(low, situation.context), _DECODE_STEPS, 10.0)
        request = greedy_request(
            f"{next(ids)}", arrival, engine.executor.vocab_size, rng, time.monotonic()
        )
        engine.add(request)
    while engine.has_work:
        if not engine.step():
            engine.wait_for_transfers(1.0)
        engine.take_events()
