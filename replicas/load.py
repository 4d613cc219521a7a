"""What a replica tells routers of its load: a few numbers, taken from the engine between steps.

Measuring is here, judging is not: what a request may expect of such a replica is the router's
business. Fed by the engine on its own thread and clock; a report is immutable and may be read from
any thread.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import numpy as np

from tokenflow.replicas.scheduler.capacity import full_capacity, kept_rates, sustained
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.tracker import Tracker

INTERVAL_S = 0.05
"""Reports are at least that far apart, except the one that says that the engine is idle."""
ELASTIC_RATE = 1.0
"""tokens/s that a request without a reader counts with: what it is granted under any load."""
_REMEMBERED_S = 10.0
"""Seconds of prefilling that the measured speed goes back."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The state of one engine. Tokens, seconds, tokens/s."""

    number: int = 0
    """Ascending; of two reports of a replica the one with the higher number is newer."""
    requests: int = 0
    """Requests taken since the start; the report knows of all of them."""
    active: int = 0
    """Of those, unfinished ones."""
    queued_tokens: int = 0
    """Prompt tokens, and tokens to be computed again, that wait to be prefilled."""
    remaining_tokens: int = 0
    """Tokens that the unfinished requests are still expected to get."""
    expected_output: int = 0
    """Tokens that a new request without a limit would be expected to get."""
    kv_tokens: int = 0
    """KV that the unfinished requests are expected to need at their longest."""
    device_tokens: int = 0
    """KV that fits on the device."""
    memory_tokens: int = 0
    """KV that fits on the device and, where the KV of preempted requests is kept, on the host."""
    free_tokens: int = 0
    """KV of the device that nobody holds."""
    rate: float = 0.0
    """Sum of the rates of those who read, and ELASTIC_RATE for each request without a reader."""
    capacity: float = 0.0
    """Gamma: what the device makes when it is full of requests like these, and goes on making while
    others with prompts like theirs replace them; 0 while unknown."""
    prefill_s: float = 0.0
    """Seconds per prompt token, as measured on a wall clock beside all other work."""
    load_s: float = 0.0
    """Seconds to load one token's KV from the host."""
    kept_rates: float = 0.0
    """The most that readers like these can ask for together, and all be promised it; 0 while
    unknown."""
    step_prefill_s: float = 0.0
    """Seconds per prompt token within steps: what the device takes, whatever else it does."""

    def to_wire(self) -> tuple[float, ...]:
        """The fields in order, floats to three digits: small, and equal while little changes."""
        return tuple(
            value if isinstance(value, int) else float(f"{value:.3g}")
            for value in asdict(self).values()
        )

    @classmethod
    def from_wire(cls, values: tuple[float, ...]) -> LoadReport:
        """Raises TypeError when it is not what `to_wire` makes."""
        if len(values) != len(fields(cls)):
            raise TypeError(f"a load report has {len(fields(cls))} values, got {len(values)}")
        return cls(*values)  # type: ignore[arg-type]


class LoadMeter:
    """Takes the reports of one engine, and measures its prefill speed from one to the next."""

    def __init__(self) -> None:
        self.report = LoadReport()
        self._next_s = -math.inf
        self._since_s: float | None = None
        """When the window began that the speed is measured over; None while nothing was queued."""
        self._prefilled = 0
        self._spent_s = self._done = 0.0

    def due(self, tracker: Tracker, requests: int, now: float) -> bool:
        """Whether it is time for a report."""
        if now >= self._next_s:
            return True
        return not len(tracker) and (self.report.active > 0 or requests > self.report.requests)

    def take(
        self,
        tracker: Tracker,
        cost: CostModel,
        lengths: OutputLengths,
        *,
        requests: int,
        prefilled: int,
        device_tokens: int,
        free_tokens: int,
        host_tokens: int,
        block_size: int,
        max_num_seqs: int,
        longest: int,
        now: float,
    ) -> None:
        """A new report. `prefilled` counts all tokens prefilled since the start, `longest` is the
        most an output may have, `host_tokens` is 0 where preempted KV is not kept."""
        self._next_s = now + INTERVAL_S
        context, generated = tracker.context, tracker.generated
        expected = lengths.expected(tracker.limit, generated)
        remaining = np.maximum(expected - generated, 1)
        pending = context - tracker.computed
        queued = int(pending[(pending > 1) | (generated == 0)].sum())
        self._measure(queued, prefilled, now)
        last = self.report
        capacity = (
            sustained(
                full_capacity(tracker, cost, device_tokens, max_num_seqs, expected),
                cost,
                lengths.prompts_per_output,
            )
            if len(tracker)
            else last.capacity
        )
        kept = last.kept_rates
        if len(tracker):
            kept = kept_rates(
                tracker, cost, device_tokens, max_num_seqs, expected, lengths.prompts_per_output
            )
        elastic = tracker.elastic & ~tracker.paused
        reads = ~(tracker.elastic | tracker.paused)
        self.report = LoadReport(
            number=last.number + 1,
            requests=requests,
            active=len(tracker),
            queued_tokens=queued,
            remaining_tokens=int(remaining.sum()),
            expected_output=_fresh(lengths, longest),
            kv_tokens=int((context + remaining).sum()),
            device_tokens=device_tokens,
            memory_tokens=device_tokens + host_tokens,
            free_tokens=free_tokens,
            rate=float(tracker.rate[reads].sum()) + ELASTIC_RATE * int(elastic.sum()),
            capacity=capacity if capacity < math.inf else 0.0,
            prefill_s=self._spent_s / self._done if self._done else cost.prefill_s(1),
            load_s=cost.load_s(1) / block_size,
            kept_rates=kept if kept < math.inf else 0.0,
            step_prefill_s=cost.prefill_s(1),
        )

    def _measure(self, queued: int, prefilled: int, now: float) -> None:
        """Time counts while something was queued all along."""
        if self._since_s is not None and prefilled > self._prefilled:
            passed = now - self._since_s
            kept = math.exp(-passed / _REMEMBERED_S)
            self._spent_s = self._spent_s * kept + passed
            self._done = self._done * kept + prefilled - self._prefilled
        if self._since_s is None or prefilled > self._prefilled or not queued:
            self._since_s = now if queued else None
            self._prefilled = prefilled


def _fresh(lengths: OutputLengths, longest: int) -> int:
    nothing = np.zeros(1, np.int64)
    return int(lengths.expected(np.array([longest], np.int64), nothing)[0])
