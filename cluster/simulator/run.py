"""Many simulated replicas behind several ingresses, each with its own registry and router: the
shipped ones, fed with reports that come late, as they do."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from tokenflow.cluster.admission import judge
from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.routing import Ask, Outlook, counted_rate
from tokenflow.cluster.simulator.replicas import EngineReplica, ReducedReplica, SimReplica
from tokenflow.loadgen.metrics import percentile
from tokenflow.replicas.errors import CapacityError
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.scheduler.playback import Playback, effective_tokens
from tokenflow.replicas.simulator.executor import VirtualClock
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.workload import Arrival

_FRAME_PERIOD_S = 0.05
_FRAME_DELAY_S = 0.005
"""Reports on frames: how far apart, and how late."""
_BEAT_S = 2.0
"""Even a replica of which there is nothing new is heard of that often."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A cluster."""

    machine: Machine
    replicas: int
    router: str = "burst"
    ingresses: int = 1
    policy: str = "slack"
    model: Literal["engine", "reduced"] = "engine"
    frames: bool = True
    """Whether reports ride on the frames of those ingresses that have streams on a replica."""
    stats_period_s: float = 0.25
    stats_delay_s: tuple[float, float] = (0.1, 0.5)
    """Serve's statistics: how often, and at least and at most how late."""
    max_ttft_s: float | None = None
    """The bound of admission; None: none. Without any bound everybody is admitted."""
    max_stall_s: float | None = None
    """The bound of admission for pauses of those who read; None: none."""
    seed: int = 1


@dataclass(slots=True)
class Record:
    """One request."""

    arrival: Arrival
    replica: int = -1
    """-1: it was refused."""
    predicted_s: float | None = None
    """Seconds to its first token, as foreseen when it came."""
    retry_after_s: float = 0.0
    ttft_s: float | None = None
    ended_s: float | None = None
    tokens: int = 0
    reader: Playback | None = None
    buffers: list[int] = field(default_factory=list)
    """The reader's buffer just after each token."""


@dataclass(slots=True)
class ClusterOutcome:
    """What came of a run."""

    records: list[Record]
    ended_s: float
    """When the last stream ended."""
    choice_s: float
    """CPU seconds that one choice took on average, the registry's part included."""
    placed: list[int] = field(default_factory=list)
    """Requests by replica."""

    def ttfts(self, since_s: float = 0.0) -> list[float]:
        """Seconds to the first token, ascending, of the requests that came at `since_s` or later
        and were taken."""
        return sorted(
            r.ttft_s for r in self.records if r.ttft_s is not None and r.arrival.at_s >= since_s
        )

    def figures(self, since_s: float = 0.0) -> dict[str, float]:
        """What is reported of the requests that came at `since_s` or later."""
        asked = [r for r in self.records if r.arrival.at_s >= since_s]
        taken = [r for r in asked if r.replica >= 0]
        duration_s = max(self.ended_s - asked[0].arrival.at_s, 1e-9)
        ttfts = self.ttfts(since_s) or [0.0]
        tokens = sum(r.tokens for r in taken)
        figures = {
            "requests": len(asked),
            "refused": len(asked) - len(taken),
            "unfinished": sum(r.ended_s is None for r in taken),
            "duration_s": duration_s,
            "raw_tok_s": tokens / duration_s,
            "ttft_mean_s": sum(ttfts) / len(ttfts),
            "ttft_p50_s": percentile(ttfts, 50),
            "ttft_p99_s": percentile(ttfts, 99),
            "ttft_max_s": max(ttfts),
            "choice_us": 1e6 * self.choice_s,
            "placed_max_over_mean": max(self.placed) * len(self.placed) / max(1, sum(self.placed)),
        }
        readers = [r.reader for r in taken if r.reader is not None]
        if readers:
            effective = sum(effective_tokens(r.buffers) for r in taken)
            figures["effective_tok_s"] = effective / duration_s
            figures["stall_p99_s"] = percentile([p.stall_s for p in readers], 99)
            figures["stalled"] = sum(p.stalls > 0 for p in readers)
        foreseen = [
            abs(r.predicted_s - r.ttft_s)
            for r in taken
            if r.predicted_s is not None and r.ttft_s is not None
        ]
        if foreseen:
            figures["prediction_error_mean_s"] = sum(foreseen) / len(foreseen)
        return figures


class _Cluster:
    def __init__(self, setup: Setup, arrivals: Seq[Arrival]) -> None:
        self._setup = setup
        self._rng = random.Random(setup.seed)
        self._clock = VirtualClock()
        self._records = [Record(a) for a in arrivals]
        lengths = [a.output_tokens for a in arrivals]
        mean_output = round(sum(lengths) / len(lengths))
        self._replicas: list[SimReplica] = [
            EngineReplica(setup.machine, setup.policy, lengths)
            if setup.model == "engine"
            else ReducedReplica(setup.machine, mean_output)
            for _ in range(setup.replicas)
        ]
        self._names = [f"{i}" for i in range(setup.replicas)]
        self._registries = [
            ReplicaRegistry(self._clock, random.Random(self._rng.random()), setup.router)
            for _ in range(setup.ingresses)
        ]
        for registry in self._registries:
            registry.update(dict.fromkeys(self._names, ""))
        self._ingress: list[int] = [-1] * len(arrivals)
        self._submitted = [0] * setup.replicas
        self._untold: list[dict[int, deque[tuple[int, int]]]] = [{} for _ in self._replicas]
        """Of each replica by ingress: (how-manieth of the replica, number) of requests that no
        report which that ingress got knew of."""
        self._next_frame = [0.0] * setup.replicas
        self._next_stats = [0.0] * setup.replicas
        self._latest: list[LoadReport] = [LoadReport()] * setup.replicas
        self._events: list[tuple[float, int, int, int, LoadReport | None, tuple[str, ...]]] = []
        """(time, order, replica, ingress or -1 for the replica's own, report, requests)"""
        self._order = 0
        self._streams: list[dict[int, int]] = [{} for _ in self._replicas]
        """Of each replica by ingress: streams."""
        self._choosing_s = 0.0

    def run(self) -> ClusterOutcome:
        records, clock, events = self._records, self._clock, self._events
        upcoming = 0
        next_beat = 0.0
        ended = 0.0
        while upcoming < len(records) or events:
            event_s = events[0][0] if events else math.inf
            arrival_s = records[upcoming].arrival.at_s if upcoming < len(records) else math.inf
            clock.advance_to(min(event_s, arrival_s))
            if clock.now >= next_beat:
                self._beat()
                next_beat = clock.now + _BEAT_S
            if arrival_s <= event_s:
                self._arrive(upcoming)
                upcoming += 1
                continue
            _, _, index, ingress, report, requests = heappop(events)
            if report is not None:
                self._registries[ingress].report(self._names[index], report, requests)
            elif self._replicas[index].next_s == event_s:
                self._look(index)
                ended = clock.now
        placed = [0] * len(self._replicas)
        for record in records:
            if record.replica >= 0:
                placed[record.replica] += 1
        return ClusterOutcome(records, ended, self._choosing_s / len(records), placed)

    def _beat(self) -> None:
        for name, report in zip(self._names, self._latest, strict=True):
            for registry in self._registries:
                registry.report(name, report)

    def _arrive(self, number: int) -> None:
        record = self._records[number]
        arrival = record.arrival
        ingress = self._ingress[number] = self._rng.randrange(len(self._registries))
        registry = self._registries[ingress]
        ask = Ask(
            arrival.prompt_tokens,
            arrival.max_tokens or arrival.output_tokens,
            counted_rate(arrival.token_rate),
        )
        setup = self._setup
        if setup.max_ttft_s is not None or setup.max_stall_s is not None:
            seen: Outlook | None = registry.foresee(ask)
            try:
                judge(seen, max_ttft_s=setup.max_ttft_s, max_stall_s=setup.max_stall_s)
            except CapacityError as error:
                record.retry_after_s = error.retry_after_s
                return
            record.predicted_s = seen.ttft_s if seen is not None else None
        begun = time.thread_time()
        index = int(registry.assign(f"{number}", ask, self._names)[0])
        self._choosing_s += time.thread_time() - begun
        record.replica = index
        self._submitted[index] += 1
        told = self._untold[index].setdefault(ingress, deque())
        told.append((self._submitted[index], number))
        streams = self._streams[index]
        streams[ingress] = streams.get(ingress, 0) + 1
        self._replicas[index].add(number, arrival, self._clock.now)
        self._wake(index)

    def _wake(self, index: int) -> None:
        at = self._replicas[index].next_s
        if at < math.inf:
            self._push(at, index, -1, None, ())

    def _push(
        self, at: float, index: int, ingress: int, report: LoadReport | None, ids: tuple[str, ...]
    ) -> None:
        self._order += 1
        heappush(self._events, (at, self._order, index, ingress, report, ids))

    def _look(self, index: int) -> None:
        replica, now = self._replicas[index], self._clock.now
        for happening in replica.advance():
            record = self._records[happening.number]
            if happening.tokens:
                if record.ttft_s is None:
                    record.ttft_s = now - record.arrival.at_s
                record.tokens += happening.tokens
                if replica.counts_tokens and record.arrival.token_rate < math.inf:
                    if record.reader is None:
                        record.reader = Playback(record.arrival.token_rate)
                    record.reader.generate(now)
                    record.buffers.append(record.reader.buffer(now))
            if happening.finished:
                record.ended_s = now
                ingress = self._ingress[happening.number]
                self._registries[ingress].finish(f"{happening.number}")
                streams = self._streams[index]
                streams[ingress] -= 1
                if not streams[ingress]:
                    del streams[ingress]
        self._tell(index)
        self._wake(index)

    def _tell(self, index: int) -> None:
        """Send the replica's report to whom it is due."""
        setup, now = self._setup, self._clock.now
        frames_due = setup.frames and now >= self._next_frame[index]
        stats_due = now >= self._next_stats[index]
        report = self._replicas[index].load
        idle = report.active == 0
        if not (frames_due or stats_due or idle) or report.number <= self._latest[index].number:
            return
        self._latest[index] = report
        if frames_due:
            self._next_frame[index] = now + _FRAME_PERIOD_S
        late = now + self._rng.uniform(*setup.stats_delay_s)
        for ingress in range(setup.ingresses):
            subscribed = setup.frames and ingress in self._streams[index]
            if not subscribed and not stats_due and not idle:
                continue
            at = now + _FRAME_DELAY_S if subscribed else late
            untold = self._untold[index].get(ingress)
            known = []
            while untold and untold[0][0] <= report.requests:
                known.append(f"{untold.popleft()[1]}")
            self._push(at, index, ingress, report, tuple(known))
        if stats_due:
            self._next_stats[index] = now + setup.stats_period_s


def simulate_cluster(setup: Setup, arrivals: Seq[Arrival]) -> ClusterOutcome:
    """Run to the end; `arrivals` in order of time. Raises ValueError without any."""
    if not arrivals:
        raise ValueError("a cluster without arrivals has nothing to show")
    return _Cluster(setup, arrivals).run()
