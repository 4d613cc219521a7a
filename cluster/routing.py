"""Choosing a replica for a request: pure functions over what is known of the replicas, apart from
Ray, clocks and I/O. The cluster's router and the cluster simulator call the same code.

`burst` is ours: the least predicted time to first token, with rate headroom as the tie-breaker. The
others are there to be compared with. [TokenFlow §3, the burst router; predictions: ours; the power
of two choices: Mitzenmacher 1996]
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from statistics import median_high, median_low
from typing import Protocol

from tokenflow.replicas.load import ELASTIC_RATE, LoadReport
from tokenflow.replicas.scheduler.capacity import LOAD_FACTOR

STALE_S = 5.0
"""A report that old says nothing any more."""
SAMPLE = 8
"""Replicas that one choice looks at, where there are more: its cost stays what it is."""
_HEADROOM_S = 0.2
"""Seconds that a full replica is worse than an empty one where the first token is as near."""
_NOISE = 2.0
"""Measured speeds that differ by less than that factor are taken to be equal."""
_FEW = 32
"""After so many requests, what a replica has measured counts for half."""
_CALM = 0.8
"""Of the rates that can be promised, what can be kept although prompts come in at random: at more,
somebody's text pauses now and then."""
_NEAR_S = 0.005
"""Replicas whose scores differ by less are taken by lot: routers that know the same do not all
choose the same."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the choice depends on of a request."""

    prompt_tokens: int
    output_tokens: int
    """Its limit."""
    rate: float
    """tokens/s, finite: see `counted_rate`."""
    cached_on: str = ""
    """The replica that has computed the beginning of this text before."""
    cached_tokens: int = 0
    kv_node: str = ""
    """The node whose store has KV of this text."""
    kv_tokens: int = 0


def counted_rate(rate: float) -> float:
    """What a request adds to its replica's sum of rates, tokens/s: a finite number."""
    return ELASTIC_RATE if math.isinf(rate) else rate


@dataclass(slots=True)
class Work:
    """A sum of requests."""

    streams: int = 0
    rate: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Their limits."""

    def add(self, ask: Ask, sign: int = 1) -> None:
        """Count a request, or with `sign` -1 discount it."""
        self.streams += sign
        # Rates are floats: what is left of a sum after the last one ended is not 0.
        self.rate = self.rate + sign * ask.rate if self.streams else 0.0
        self.prompt_tokens += sign * ask.prompt_tokens
        self.output_tokens += sign * ask.output_tokens

    def __add__(self, other: Work) -> Work:
        return Work(
            self.streams + other.streams,
            self.rate + other.rate,
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
        )

    def share(self, parts: int) -> Work:
        """One of that many equal parts."""
        return Work(
            -(-self.streams // parts),
            self.rate / parts,
            self.prompt_tokens // parts,
            self.output_tokens // parts,
        )


@dataclass(slots=True)
class ReplicaView:
    """What one process knows of a replica."""

    name: str = ""
    node: str = ""
    report: LoadReport = field(default_factory=LoadReport)
    received_s: float = -math.inf
    """When the report came, on the clock that `now` is read from."""
    own: Work = field(default_factory=Work)
    """Requests that this process has put there and not seen end."""
    unreported: Work = field(default_factory=Work)
    """Of those, the ones that the report does not know of."""

    def fresh(self, now: float) -> bool:
        return now - self.received_s <= STALE_S

    @property
    def requests(self) -> int:
        """Unfinished requests, of everybody as far as known."""
        return max(self.report.active + self.unreported.streams, self.own.streams)


Fleet = Mapping[str, ReplicaView]
"""Views by replica id."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What replicas of a cluster are like: for those that have measured nothing themselves, or
    nothing that differs from the others' by more than measurements do."""

    capacity: float
    prefill_s: float
    step_prefill_s: float
    load_s: float
    kept_rates: float


_GUESS = Speeds(1000.0, 1e-4, 1e-4, 1e-5, 1000.0 * LOAD_FACTOR)
"""Where nobody has measured anything: replicas can still be compared."""


def typical_speeds(reports: Iterable[LoadReport]) -> Speeds | None:
    """The medians over those who know their speeds; None when nobody does."""
    known = [r for r in reports if r.capacity > 0 and r.prefill_s > 0]
    if not known:
        return None
    return Speeds(
        median_high(r.capacity for r in known),
        median_low(r.prefill_s for r in known),
        median_low(_step_prefill_s(r) for r in known),
        median_low(r.load_s for r in known),
        median_high(kept_rates(r) for r in known),
    )


def kept_rates(report: LoadReport) -> float:
    """The sum of rates, tokens/s, that a replica may promise; 0 while it has measured nothing."""
    return report.kept_rates or LOAD_FACTOR * report.capacity


def _step_prefill_s(report: LoadReport) -> float:
    return report.step_prefill_s or report.prefill_s


def _told_apart(own: float, typical: float, requests: int) -> float:
    """What a replica measured with so many requests, where it differs from the others by more than
    chance. Otherwise the one that measured a little better would draw all requests, and one that
    was cold or disturbed at its first few would get no more of them to learn better."""
    if own <= 0 or typical <= 0:
        return typical
    own = typical * (own / typical) ** (requests / (requests + _FEW))
    return own if own * _NOISE < typical or own > typical * _NOISE else typical


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request may expect of a replica."""

    ttft_s: float
    """Seconds to its first token."""
    promised_s: float
    """Seconds until its rate can be promised: until then it gets what others leave."""
    utilisation: float
    """Of what may be promised: rates or memory, whichever is nearer its end; above 1, the request
    waits for others to end."""
    measured: bool = True
    """False: nobody has measured any speed yet, and this is only good for comparing."""
    short_s: float = 0.0
    """Seconds until those who read there ask for no more than can be kept at any moment (`_CALM`):
    if it begins before, somebody's text may pause."""

    @property
    def score(self) -> float:
        """Lower is better. Of replicas that are all asked for more than they have, the first token
        decides: there it is prompts that wait for one another."""
        load = self.utilisation
        return self.ttft_s + _HEADROOM_S * (load if load < 1 else 1 + math.log(load))


def outlook(
    view: ReplicaView, ask: Ask, speeds: Speeds | None = None, ahead: Work | None = None
) -> Outlook:
    """The prediction for a request that were sent there now.

    Prompts are prefilled one after the other. Readers beyond the rates that can be promised wait
    for room on the device, and KV beyond all memory waits, until as large a part of the work before
    them has drained. `speeds` stand in for what the replica has not measured, `ahead` are requests
    that are on their way there as well.
    """
    report, more = view.report, view.unreported
    if ahead is not None:
        more = more + ahead
    speeds = speeds or typical_speeds([report])
    measured = speeds is not None
    speeds = speeds or _GUESS
    n = report.requests
    capacity = _told_apart(report.capacity, speeds.capacity, n)
    kept = _told_apart(kept_rates(report), speeds.kept_rates, n)
    # Devices differ by what they take for a prompt token. What passed on the clock depends on what
    # else a replica had to do just then, and of few prompts it says little.
    own = _told_apart(_step_prefill_s(report), speeds.step_prefill_s, n)
    prefill_s = speeds.prefill_s * own / speeds.step_prefill_s
    queued = report.queued_tokens + more.prompt_tokens + ask.prompt_tokens
    prefill = queued * prefill_s - _saved_s(view, ask, prefill_s, report.load_s or speeds.load_s)

    expected = report.expected_output or math.inf
    output = min(more.output_tokens, more.streams * expected) if more.streams else 0
    before = report.remaining_tokens + output
    rate = report.rate + more.rate + ask.rate
    kv = report.kv_tokens + more.prompt_tokens + output
    kv += ask.prompt_tokens + min(ask.output_tokens, expected)
    rates = rate / kept
    memory = kv / report.memory_tokens if report.memory_tokens else 0.0
    device = kv / report.device_tokens if report.device_tokens else memory
    # A reader who is promised nothing begins all the same where the device has room for him.
    waiting = max(_excess(memory), min(_excess(rates), _excess(device)))
    drain_s = before / capacity
    ttft_s = waiting * drain_s + (1.0 - waiting) * prefill
    promised_s = max(ttft_s, _excess(rates) * drain_s)
    short_s = _excess(rates / _CALM) * drain_s
    return Outlook(ttft_s, promised_s, max(rates, memory), measured, short_s)


def _excess(utilisation: float) -> float:
    """The share of all that asks for something which cannot have it now."""
    return 1.0 - 1.0 / max(1.0, utilisation)


def _saved_s(view: ReplicaView, ask: Ask, prefill_s: float, load_s: float) -> float:
    """Seconds of prefilling that KV which lies there already saves."""
    if view.name and view.name == ask.cached_on:
        return prefill_s * min(ask.cached_tokens, ask.prompt_tokens)
    if view.node and view.node == ask.kv_node:
        return max(0.0, prefill_s - load_s) * min(ask.kv_tokens, ask.prompt_tokens)
    return 0.0


def foresee(
    ask: Ask,
    candidates: Seq[str],
    fleet: Fleet,
    now: float,
    rng: random.Random,
    *,
    sample: int = SAMPLE,
    ahead: Work | None = None,
) -> list[tuple[Outlook, str]]:
    """What the request may expect of each of a sample of the candidates, best first; of all where
    they are few, and in any case of those that have its KV. Without those that nothing is known of
    at present; empty where that is so of all."""
    known = [name for name in _sample(ask, candidates, fleet, rng, sample) if name in fleet]
    views = [fleet[name] for name in known if fleet[name].fresh(now)]
    speeds = typical_speeds(view.report for view in views)
    ranked = [(outlook(view, ask, speeds, ahead), view.name) for view in views]
    ranked.sort(key=lambda pair: pair[0].score)
    near = sum(o.score < ranked[0][0].score + _NEAR_S for o, _ in ranked)
    if near > 1:
        chosen = rng.randrange(near)
        ranked[0], ranked[chosen] = ranked[chosen], ranked[0]
    return ranked


def _sample(
    ask: Ask, candidates: Seq[str], fleet: Fleet, rng: random.Random, sample: int
) -> Seq[str]:
    if len(candidates) <= sample:
        return candidates
    names = rng.sample(candidates, sample)
    if ask.cached_on in fleet and ask.cached_on not in names:
        names.append(ask.cached_on)
    return names


class Router(Protocol):
    """A way of choosing. Not thread-safe."""

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        """Some of the candidates, the best first; at least one where there is any. `now` in
        seconds, on the clock of the reports."""
        ...


class Burst:
    """The least predicted time to first token; the power of two choices while nothing is known."""

    def __init__(self, rng: random.Random, sample: int = SAMPLE) -> None:
        self._rng = rng
        self._sample = sample
        self._blind = PowerOfTwo(rng)

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        ranked = foresee(ask, candidates, fleet, now, self._rng, sample=self._sample)
        if not ranked:
            return self._blind.rank(ask, candidates, fleet, now)
        return [name for _, name in ranked]


class PowerOfTwo:
    """Of two taken by lot the one with fewer requests. [Mitzenmacher 1996; Ray Serve's default]"""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        pair = self._rng.sample(candidates, min(2, len(candidates)))
        return sorted(pair, key=lambda name: _requests(fleet, name))


class LeastRequests:
    """The fewest unfinished requests of all; ties by lot."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        if not candidates:
            return []
        counts = [_requests(fleet, name) for name in candidates]
        least = min(counts)
        ties = [name for name, n in zip(candidates, counts, strict=True) if n == least]
        return [self._rng.choice(ties)]


class RoundRobin:
    """One after the other."""

    def __init__(self, rng: random.Random) -> None:
        self._next = rng.randrange(1 << 30)

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        if not candidates:
            return []
        self._next += 1
        return [candidates[self._next % len(candidates)]]


class Random:
    """Any."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def rank(self, ask: Ask, candidates: Seq[str], fleet: Fleet, now: float) -> list[str]:
        return [self._rng.choice(candidates)] if candidates else []


def _requests(fleet: Fleet, name: str) -> int:
    return fleet[name].requests if name in fleet else 0


ROUTERS: dict[str, Callable[[random.Random], Router]] = {
    "burst": Burst,
    "power-of-two": PowerOfTwo,
    "least-requests": LeastRequests,
    "round-robin": RoundRobin,
    "random": Random,
}
