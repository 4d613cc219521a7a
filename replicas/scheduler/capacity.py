"""How many tokens per second the device can make, and who may claim them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.fairness import fair_share
from tokenflow.replicas.scheduler.tracker import BoolArray, FloatArray, IntArray, Tracker

LOAD_FACTOR = 0.92
"""Share of the capacity that may be promised to readers; the rest covers prefills and switches."""
_ALL = 0.97
"""Share of its time that a device can be planned to use when prefills are counted apart."""
_FLOOR = 1.0
"""Least reference rate, tokens/s: under any load, an agent makes progress."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the device, beside what it can give."""

    capacity: float
    """Gamma, tokens/s; infinite while unknown."""
    parked: int = 0
    """Streams that are not promised their rate."""
    overloaded: bool = False
    """Whether readers ask for more than can be promised."""


def capacity(
    tracker: Tracker,
    cost: CostModel,
    kv_tokens: int,
    max_num_seqs: int,
    length: IntArray | FloatArray | None = None,
) -> float:
    """Gamma, tokens/s: the rate at which the requests' remaining tokens can be made.

    Contexts grow until a request ends, and long contexts leave room for fewer sequences at once. So
    it is taken at the context that the average remaining token will be made at. `length`, shape
    [len(tracker)]: tokens each output is expected to have, its limit if not given. Infinite while
    nothing is known. [TokenFlow §4.3]
    """
    expected = tracker.limit if length is None else length
    return full_capacity(tracker, cost, kv_tokens, min(len(tracker), max_num_seqs), expected)


def full_capacity(
    tracker: Tracker,
    cost: CostModel,
    kv_tokens: int,
    max_num_seqs: int,
    length: IntArray | FloatArray,
) -> float:
    """As `capacity`, with as many requests like these as fit: what more of them would find."""
    if not len(tracker):
        return math.inf
    return cost.capacity(*_full_device(tracker, kv_tokens, max_num_seqs, length))


def _full_device(
    tracker: Tracker, kv_tokens: int, max_num_seqs: int, length: IntArray | FloatArray
) -> tuple[float, float]:
    """How many requests like these fit at once, and the context of each, in tokens, that the
    average remaining token will be made at."""
    remaining = np.maximum(length - tracker.generated, 1)
    context = float(remaining @ (tracker.context + remaining / 2)) / float(remaining.sum())
    return max(1.0, min(kv_tokens / context, max_num_seqs)), context


def sustained(gamma: float, cost: CostModel, prompts_per_output: float) -> float:
    """Of `gamma`, tokens/s, what is left when every output token comes with so many prompt tokens
    to prefill, for as long as new requests replace those that end. Little of that is covered by
    LOAD_FACTOR, and then it is `gamma` itself."""
    if math.isinf(gamma):
        return gamma
    prefills = gamma * cost.prefill_s(1) * prompts_per_output
    return gamma * min(1.0, _ALL / (LOAD_FACTOR * (1.0 + prefills)))


def kept_rates(
    tracker: Tracker,
    cost: CostModel,
    kv_tokens: int,
    max_num_seqs: int,
    length: IntArray | FloatArray,
    prompts_per_output: float,
) -> float:
    """The most that readers like these can ask for together, tokens/s, and all be promised it, for
    as long as new requests replace those that end; infinite while nothing is known.

    Where they are fast that is less than LOAD_FACTOR of what a full device makes: only so many can
    be there at their rates, and a step over few sequences makes fewer tokens in a second.
    """
    if not len(tracker):
        return math.inf
    most, context = _full_device(tracker, kv_tokens, max_num_seqs, length)
    rates = tracker.rate[~(tracker.elastic | tracker.paused)]
    if len(rates):
        fixed, per_sequence, per_token = cost.step_terms()
        decode_s = per_sequence + per_token * context
        prefill_s = cost.prefill_s(1) * prompts_per_output
        # Of n such readers each has to get a token in so many seconds, out of steps over all n.
        period_s = 1.0 / float(rates.mean())
        for share, each_s in ((LOAD_FACTOR, decode_s), (_ALL, decode_s + prefill_s)):
            if each_s > 0:
                most = min(most, (share * period_s - fixed) / each_s)
    gamma = cost.capacity(max(most, 1.0), context)
    return LOAD_FACTOR * sustained(gamma, cost, prompts_per_output)


def unpromised(tracker: Tracker, limit: float, first: BoolArray | None = None) -> BoolArray | None:
    """The readers, shape [len(tracker)], whose rates do not fit into `limit` tokens/s when each is
    promised its own in turn (`Tracker.in_turn`); the first one fits whatever it asks for, and who
    is paused asks for nothing. Those that are `first`, readers or not, come before all others. None
    when all fit. [TokenFlow §4.3]"""
    rows, claimed = tracker.claims()
    if first is not None:
        rows = rows[np.argsort(~first[rows], kind="stable")]
        claimed = np.cumsum(tracker.rate[rows] * (first[rows] | ~tracker.elastic[rows]))
    if not len(rows) or claimed[-1] <= limit:
        return None
    beyond = np.zeros(len(tracker), bool)
    beyond[rows] = claimed > limit
    beyond[rows[0]] = False
    return beyond


def assess(
    tracker: Tracker,
    cost: CostModel,
    kv_tokens: int,
    max_num_seqs: int,
    length: IntArray | FloatArray | None = None,
    prompts_per_output: float = 0.0,
) -> Load:
    """The load under a policy that promises nothing itself."""
    gamma = capacity(tracker, cost, kv_tokens, max_num_seqs, length)
    beyond = unpromised(tracker, LOAD_FACTOR * sustained(gamma, cost, prompts_per_output))
    if beyond is None:
        return Load(gamma)
    return Load(gamma, int(np.count_nonzero(beyond)), overloaded=True)


def reference_rates(
    tracker: Tracker,
    cost: CostModel,
    kv_tokens: int,
    max_num_seqs: int,
    length: IntArray | FloatArray | None = None,
) -> FloatArray | None:
    """The rate, tokens/s, shape [len(tracker)], at which each consumer who takes all it can get is
    to be served: an equal share of what its tenant's readers leave of the tenant's fair share of
    the capacity. None while the capacity is unknown, or without such consumers.

    It rises to what one stream can be given when there is headroom; under load it falls to a floor,
    so that what such a stream has already got looks like a long buffer, and it makes room first.
    """
    everything = capacity(tracker, cost, kv_tokens, max_num_seqs, length)
    takers = tracker.elastic & ~tracker.paused
    if math.isinf(everything) or not takers.any():
        return None
    tenants, tenant = np.unique(tracker.tenant, return_inverse=True)
    counts = np.bincount(tenant[takers], minlength=len(tenants))
    readers = tracker.rate * ~(tracker.elastic | tracker.paused)
    read = np.bincount(tenant, weights=readers, minlength=len(tenants))
    share = fair_share(np.where(counts > 0, math.inf, read).tolist(), LOAD_FACTOR * everything)
    alone = cost.step_s(1, 0)
    most = 1.0 / alone if alone > 0 else math.inf
    each = (share - read) / np.maximum(counts, 1)
    rates: FloatArray = np.minimum(np.maximum(each, _FLOOR), most)[tenant]
    return rates
