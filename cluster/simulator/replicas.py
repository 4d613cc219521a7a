"""Simulated replicas: the shipped engine on its own virtual clock, and a reduced model of one for
clusters that are too large for that. What both tell the router is the same `LoadReport`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.scheduler.capacity import LOAD_FACTOR
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.executor import VirtualClock
from tokenflow.replicas.simulator.run import Machine, build, request_of
from tokenflow.replicas.simulator.workload import Arrival

_NAP_S = 0.005
"""Longest wait for copies before an engine looks up again, as in the engine's own loop."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Tokens of a request, or its end."""

    number: int
    """Which arrival it was."""
    tokens: int
    finished: bool


class SimReplica(Protocol):
    """A replica that lives by itself between two moments at which something can be seen of it."""

    counts_tokens: bool
    """Whether every token is seen when it is made, and so its reader's buffer is known."""

    @property
    def load(self) -> LoadReport:
        """Its latest report."""
        ...

    @property
    def next_s(self) -> float:
        """When something can be seen of it next; infinite while it is idle."""
        ...

    def add(self, number: int, arrival: Arrival, now: float) -> None:
        """A request arrives."""
        ...

    def advance(self) -> list[Happening]:
        """What is seen at `next_s`, and on to the next moment."""
        ...


class EngineReplica:
    """The shipped engine: every step and every copy."""

    counts_tokens = True

    def __init__(self, machine: Machine, policy: str, lengths: Seq[int]) -> None:
        self._clock = VirtualClock()
        self._engine, _ = build(machine, make_policy(policy, {}), self._clock, lengths, {})
        self._seen: list[Happening] = []
        self._load = self._engine.load

    @property
    def load(self) -> LoadReport:
        return self._load

    @property
    def next_s(self) -> float:
        return self._clock.now if self._seen or self._engine.has_work else math.inf

    def add(self, number: int, arrival: Arrival, now: float) -> None:
        if self.next_s == math.inf:
            self._clock.advance_to(now)
        self._engine.add(request_of(number, arrival))

    def advance(self) -> list[Happening]:
        # A step's tokens exist at its end, which is now; then comes the next step.
        seen, self._load = self._seen, self._engine.load
        self._seen = []
        engine = self._engine
        if engine.has_work and not engine.step():
            engine.wait_for_transfers(_NAP_S)
        for event in engine.take_events():
            self._seen.append(
                Happening(
                    int(event.request_id), int(event.token_id >= 0), event.finish_reason is not None
                )
            )
        return seen


@dataclass(slots=True)
class _Task:
    number: int
    arrival: Arrival
    prefill_left: float
    ends_at: float = 0.0
    """When it ends, in tokens that each decoding stream has got."""


class ReducedReplica:
    """A queue of prompts before streams that share the device equally; a few events per request.

    It keeps what decides about the time to first token: prompts one after the other, readers' rates
    promised in order of arrival up to the capacity, memory. It has no steps, no copies and no
    readers' buffers, and so nothing to say on stalls and effective tokens. How far it is from the
    engine is in benchmarks/results/README.md.
    """

    counts_tokens = False

    def __init__(self, machine: Machine, expected_output: int) -> None:
        self._machine = machine
        self._expected = expected_output
        chunk = machine.max_batch_tokens
        empty = machine.cost.step_s([], [(1, 0)])
        self._prefill_s = (machine.cost.step_s([], [(chunk, 0)]) - empty) / chunk
        self._memory = machine.kv_tokens + machine.host_kv_tokens
        self._now = 0.0
        self._each = 0.0
        """Tokens that a stream decoding since the beginning would have got."""
        self._parked: deque[_Task] = deque()
        self._queue: deque[_Task] = deque()
        self._decoding: list[tuple[float, int, _Task]] = []
        self._rate = self._prompts = self._context = self._remaining = 0.0
        self._kv = self._parked_rate = 0.0
        self._requests = 0
        self._speed = 0.0
        """Tokens/s of each decoding stream."""
        self._full = 0.0
        self._seen: list[Happening] = []
        self._next = math.inf
        self._events = 0

    @property
    def next_s(self) -> float:
        return self._now if self._seen else self._next

    def add(self, number: int, arrival: Arrival, now: float) -> None:
        self._move(now)
        self._requests += 1
        task = _Task(number, arrival, arrival.prompt_tokens)
        self._prompts += arrival.prompt_tokens
        self._remaining += arrival.output_tokens
        self._kv += arrival.prompt_tokens + arrival.output_tokens
        self._parked.append(task)
        self._parked_rate += arrival.token_rate
        self._settle()

    def advance(self) -> list[Happening]:
        self._move(self.next_s)
        self._settle()
        seen, self._seen = self._seen, []
        return seen

    def _move(self, now: float) -> None:
        """Let the time pass until `now`, at most up to the next event."""
        passed = now - self._now
        self._now = now
        self._each += passed * self._speed
        self._remaining -= passed * self._speed * len(self._decoding)
        if self._queue:
            done = passed / self._prefill_s
            self._prompts -= min(done, self._queue[0].prefill_left)
            self._queue[0].prefill_left -= done

    def _settle(self) -> None:
        """Carry out what is due now, and find out when the next is."""
        while self._queue and self._queue[0].prefill_left < 1e-6:
            task = self._queue.popleft()
            task.ends_at = self._each + task.arrival.output_tokens - 1
            heappush(self._decoding, (task.ends_at, task.number, task))
            self._context += task.arrival.prompt_tokens + task.arrival.output_tokens / 2
            self._remaining -= 1
            self._seen.append(Happening(task.number, 1, False))
        while self._decoding and self._decoding[0][0] <= self._each + 1e-6:
            task = heappop(self._decoding)[2]
            arrival = task.arrival
            self._context -= arrival.prompt_tokens + arrival.output_tokens / 2
            self._rate -= arrival.token_rate
            self._kv -= arrival.prompt_tokens + arrival.output_tokens
            self._seen.append(Happening(task.number, arrival.output_tokens - 1, True))
        self._pace()
        busy = len(self._decoding) + len(self._queue)
        while self._parked:
            rate = self._parked[0].arrival.token_rate
            if busy and self._full and self._rate + rate > LOAD_FACTOR * self._full:
                break
            self._rate += rate
            self._parked_rate -= rate
            self._queue.append(self._parked.popleft())
            busy += 1
        self._pace()
        self._events += 1
        self._next = math.inf
        if self._queue:
            self._next = min(self._next, self._now + self._queue[0].prefill_left * self._prefill_s)
        if self._decoding and self._speed:
            left = max(0.0, self._decoding[0][0] - self._each)
            self._next = min(self._next, self._now + left / self._speed)

    def _pace(self) -> None:
        """How fast streams decode: those that fit, in turns; slowly beside a prompt."""
        n = len(self._decoding)
        if not n:
            self._speed = 0.0
            return
        machine = self._machine
        context = self._context / n
        fit = max(1.0, min(machine.kv_tokens / context, machine.max_num_seqs))
        together = min(float(n), fit)
        step_s = self._step_s(together, context)
        if self._queue:
            # A step carries a chunk of prompts as well.
            step_s += min(machine.max_batch_tokens, self._prompts) * self._prefill_s
        self._speed = together / n / step_s
        self._full = fit / self._step_s(fit, context)

    def _step_s(self, sequences: float, context: float) -> float:
        return max(
            f.step_s + f.decode_s * sequences + f.context_s * sequences * context
            for f in self._machine.cost.floors()
        )

    @property
    def load(self) -> LoadReport:
        return LoadReport(
            number=self._events,
            requests=self._requests,
            active=len(self._decoding) + len(self._queue) + len(self._parked),
            queued_tokens=round(self._prompts),
            remaining_tokens=max(0, round(self._remaining)),
            expected_output=self._expected,
            kv_tokens=round(self._kv),
            device_tokens=self._machine.kv_tokens,
            memory_tokens=self._memory,
            rate=self._rate + self._parked_rate,
            capacity=self._full,
            prefill_s=self._prefill_s,
        )
