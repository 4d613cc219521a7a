"""What no schedule can beat on a simulated machine: a figure is a fraction of the possible.

Every bound follows from the cost model alone. A schedule whose throughput is above its bound is a
bug of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenflow.loadgen.metrics import percentile
from tokenflow.replicas.simulator.hardware import Floor
from tokenflow.replicas.simulator.paced import paced_effective_tok_s
from tokenflow.replicas.simulator.run import Machine
from tokenflow.replicas.simulator.workload import Arrival

# A buffer of up to 0.1 of the output counts in full and on to 0.2 in falling measure: 0.15 in all.
_USEFUL_AHEAD = 0.15


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds in seconds, upper bounds in tokens/s."""

    ttft_mean_s: float
    """Mean and P99 if the device did nothing but prefill, in order of arrival (shortest first could
    have a lower mean)."""
    ttft_p99_s: float
    duration_s: float
    """The work itself, with memory full in every step."""
    raw_tok_s: float
    effective_tok_s: float
    """Every token useful, and readers no faster than they are."""
    paced_effective_tok_s: float
    """Further, no token made long before its reader has use for it (paced.py)."""


def bounds(machine: Machine, arrivals: Seq[Arrival]) -> Bounds:
    """The bounds of a workload. Raises ValueError without requests."""
    if not arrivals:
        raise ValueError("no requests")
    ttfts = _prefill_alone(machine, sorted(arrivals, key=lambda a: a.at_s))
    begun = min(a.at_s for a in arrivals)
    device_s, floor = max(
        ((_device_time(machine, f, arrivals), f) for f in machine.cost.floors()),
        key=lambda pair: pair[0],
    )
    duration = max(device_s, max(a.at_s for a in arrivals) - begun)
    tokens = sum(a.output_tokens for a in arrivals)
    return Bounds(
        ttft_mean_s=sum(ttfts) / len(ttfts),
        ttft_p99_s=percentile(ttfts, 99),
        duration_s=duration,
        raw_tok_s=tokens / duration,
        effective_tok_s=(effective := _effective(arrivals, begun, duration)),
        paced_effective_tok_s=min(
            effective, paced_effective_tok_s(arrivals, floor, machine.kv_tokens, duration)
        ),
    )


def _prefill_alone(machine: Machine, arrivals: Seq[Arrival]) -> list[float]:
    """TTFT of each request when prompts are all that runs, packed into full steps."""
    now = 0.0
    ttfts: list[float] = []
    left = [a.prompt_tokens for a in arrivals]
    first = 0
    while first < len(arrivals):
        now = max(now, arrivals[first].at_s)
        budget = machine.max_batch_tokens
        chunks, ended = [], []
        at = first
        while at < len(arrivals) and arrivals[at].at_s <= now and budget > 0:
            n = min(left[at], budget)
            chunks.append((n, arrivals[at].prompt_tokens - left[at]))
            left[at] -= n
            budget -= n
            if left[at] == 0:
                ended.append(at)
                at += 1
        now += machine.cost.step_s([], chunks)
        ttfts += [now - arrivals[i].at_s for i in ended]
        first += len(ended)
    return ttfts


def _device_time(machine: Machine, floor: Floor, arrivals: Seq[Arrival]) -> float:
    """Least seconds for all decode steps and prefills.

    The KV a decode reads is fixed by the work; the weights are read once a step, and no step holds
    more context than memory does, nor more sequences than allowed.
    """
    contexts = sum(
        a.output_tokens * a.prompt_tokens + a.output_tokens * (a.output_tokens - 1) / 2
        for a in arrivals
    )
    tokens = sum(a.output_tokens for a in arrivals)
    steps = max(
        contexts / machine.kv_tokens,
        tokens / machine.max_num_seqs,
        float(max(a.output_tokens for a in arrivals)),
    )
    # The first token comes out of the prefill.
    prompts = sum(a.prompt_tokens for a in arrivals)
    seconds = steps * floor.step_s + floor.decode_s * (tokens - len(arrivals))
    return seconds + floor.context_s * (contexts - prompts) + floor.prompt_s * prompts


def _readable(arrival: Arrival, until_s: float) -> float:
    """Most tokens of it that can have counted by then; all where nobody reads."""
    if until_s < arrival.at_s:
        return 0.0
    if math.isinf(arrival.token_rate):
        return float(arrival.output_tokens)
    ahead = _USEFUL_AHEAD * arrival.output_tokens + 1
    return arrival.token_rate * (until_s - arrival.at_s) + ahead


def _effective(arrivals: Seq[Arrival], begun: float, shortest: float) -> float:
    """Most effective tokens per second over all makespans that are possible.

    Until T a reader cannot have consumed more than its rate allows, nor more than it asked for.
    """

    def tokens_by(duration: float) -> float:
        return sum(min(a.output_tokens, _readable(a, begun + duration)) for a in arrivals)

    longest = max(a.at_s - begun + a.output_tokens / a.token_rate for a in arrivals)
    best = tokens_by(shortest) / shortest
    # The count is concave in T, so the ratio has one maximum; a fine grid finds it.
    steps = 400
    for i in range(1, steps + 1):
        duration = shortest * math.exp(math.log(max(longest / shortest, 1.0)) * i / steps)
        best = max(best, tokens_by(duration) / duration)
    return best
