"""Gamma, and the rate that consumers who are no readers are served at."""

from __future__ import annotations

import math

import pytest

from tests.support.views import NO_READER, RUNNING, sequence, taught, view
from tokenflow.replicas.request import FIRST_REFERENCE, Sequence
from tokenflow.replicas.scheduler.capacity import (
    LOAD_FACTOR,
    Load,
    assess,
    capacity,
    full_capacity,
    kept_rates,
    reference_rates,
    sustained,
    unpromised,
)
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.tracker import Tracker

LINEAR = {"fixed": 0.02, "per_sequence": 0.001, "per_token": 1e-5}


def tracker_of(*sequences) -> Tracker:
    return view(*sequences).tracker


def test_nothing_known_and_nobody_there_means_no_limit():
    tracker = tracker_of(sequence("a"))
    assert capacity(tracker, CostModel(), 400, 64) == math.inf
    assert kept_rates(tracker, CostModel(), 400, 64, tracker.limit, 1.0) == math.inf
    empty = tracker_of()
    assert capacity(empty, taught(**LINEAR), 400, 64) == math.inf
    assert kept_rates(empty, taught(**LINEAR), 400, 64, empty.limit, 1.0) == math.inf


def test_prompts_that_keep_coming_take_their_part_of_it():
    cost = taught(**LINEAR, prefill=0.002)
    second = cost.prefill_s(1)
    assert sustained(500.0, cost, 0.0) == 500.0
    assert sustained(500.0, cost, 0.04 / (500.0 * second)) == 500.0, "the load factor covers that"
    # A second of prefilling for each second of decoding.
    halved = sustained(500.0, cost, 1.0 / (500.0 * second))
    assert LOAD_FACTOR * halved == pytest.approx(0.97 * 500.0 / 2)
    assert sustained(math.inf, cost, 1.0) == math.inf


def test_it_is_taken_at_the_context_of_the_average_remaining_token():
    cost = taught(**LINEAR)
    # 100 tokens to come, at contexts of 8 to 108.
    tracker = tracker_of(*[sequence(f"{i}", prompt=8, max_tokens=100) for i in range(4)])
    expected = 4 / (0.02 + 4 * 0.001 + 4 * 58 * 1e-5)
    assert capacity(tracker, cost, 1_000_000, 64) == pytest.approx(expected, rel=1e-3)


def kept(
    rate: float, prompts_per_output: float = 0.0, *, paused: int = 0, others: int = 0
) -> float:
    """Of streams of 8 to 108 tokens, 64 places, a step of 20 ms and 1.6 ms for each."""
    readers = [sequence(f"{i}", prompt=8, max_tokens=100, rate=rate) for i in range(3)]
    more = [sequence(f"p{i}", prompt=8, max_tokens=100, rate=1000.0) for i in range(paused)]
    for seq in more:
        seq.playback.pause(0.0)
    more += [sequence(f"o{i}", prompt=8, max_tokens=100, rate=NO_READER) for i in range(others)]
    tracker = tracker_of(*readers, *more)
    cost = taught(**LINEAR, prefill=0.001)
    return kept_rates(tracker, cost, 1_000_000, 64, tracker.limit, prompts_per_output)


def test_the_rates_that_can_be_kept_are_those_of_as_many_as_fit_into_a_step():
    # n readers at 20 tokens/s: a step over all n takes 0.92 of their 50 ms.
    n = (LOAD_FACTOR / 20 - 0.02) / (0.001 + 58e-5)
    assert kept(20.0) == pytest.approx(20 * n, rel=1e-3)
    # With two prompt tokens for each of an output, n of those are computed beside a step.
    cost = taught(**LINEAR, prefill=0.001)
    n = (0.97 / 20 - 0.02) / (0.001 + 58e-5 + 2 * cost.prefill_s(1))
    assert kept(20.0, 2.0) == pytest.approx(20 * n, rel=1e-3)


def test_of_slow_readers_a_full_device_is_kept_busy():
    cost = taught(**LINEAR)
    tracker = tracker_of(sequence("a", prompt=8, max_tokens=100))
    full = full_capacity(tracker, cost, 1_000_000, 64, tracker.limit)
    assert kept(2.0) == pytest.approx(LOAD_FACTOR * full)


def test_one_who_reads_faster_than_anything_is_promised_what_there_is():
    assert kept(1000.0) == pytest.approx(LOAD_FACTOR / (0.02 + 0.00158), rel=1e-3)


def test_who_pauses_or_does_not_read_is_not_among_the_readers():
    assert kept(20.0, paused=3, others=3) == pytest.approx(kept(20.0))


def test_what_has_few_tokens_to_come_counts_little():
    cost = taught(**LINEAR)
    nearly_done = sequence("done", prompt=8, output=99, max_tokens=100, state=RUNNING)
    long = sequence("long", prompt=2000, max_tokens=1000)
    both = capacity(tracker_of(nearly_done, long), cost, 1_000_000, 64)
    # Two at once, at the long one's context.
    assert both == pytest.approx(2 / (0.02 + 0.002 + 2 * 2500 * 1e-5), rel=0.01)


def test_memory_and_places_limit_how_many_run_at_once():
    cost = taught(fixed=0.02)
    tracker = tracker_of(*[sequence(f"{i}", prompt=8, max_tokens=100) for i in range(10)])
    assert capacity(tracker, cost, 1_000_000, 64) == pytest.approx(10 / 0.02, rel=1e-3)
    assert capacity(tracker, cost, 1_000_000, 3) == pytest.approx(3 / 0.02, rel=1e-3)
    assert capacity(tracker, cost, 58 * 5, 64) == pytest.approx(5 / 0.02, rel=1e-3)
    # Somebody always runs.
    assert capacity(tracker, cost, 10, 64) == pytest.approx(1 / 0.02, rel=1e-3)


def test_a_stream_at_its_limit_does_not_divide_by_zero():
    spent = sequence("a", output=100, max_tokens=100, state=RUNNING)
    assert capacity(tracker_of(spent), taught(fixed=0.02), 400, 64) == pytest.approx(50, rel=1e-3)


def elastic(*names: str) -> list:
    return [sequence(name, rate=NO_READER, max_tokens=100) for name in names]


def reference(cost: CostModel, *sequences: Sequence) -> float:
    """Of the first of them."""
    rates = reference_rates(tracker_of(*sequences), cost, 100_000, 64)
    assert rates is not None
    return float(rates[0])


def test_without_knowledge_or_consumers_there_is_no_reference():
    assert reference_rates(tracker_of(*elastic("a")), CostModel(), 400, 64) is None
    assert reference_rates(tracker_of(sequence("a")), taught(**LINEAR), 400, 64) is None


def test_it_is_an_equal_share_of_what_the_readers_leave():
    cost = taught(fixed=0.001, per_sequence=0.01)
    sequences = [*elastic("a", "b"), sequence("c", rate=20.0, max_tokens=100)]
    # 3 sequences in 0.031 s.
    share = (LOAD_FACTOR * 3 / 0.031 - 20.0) / 2
    got = reference(cost, *sequences)
    assert got == pytest.approx(share, rel=1e-3)
    assert got != FIRST_REFERENCE


def test_of_several_tenants_it_is_of_what_a_tenants_own_readers_leave_of_its_share():
    cost = taught(per_sequence=0.01)
    flood = [sequence(f"{i}", rate=50.0, max_tokens=100, tenant="b") for i in range(8)]
    takers = [sequence(f"t{i}", rate=NO_READER, max_tokens=100, tenant="a") for i in range(2)]
    own = sequence("own", rate=6.0, max_tokens=100, tenant="a")
    half = LOAD_FACTOR * 100 / 2
    assert reference(cost, *takers, own, *flood) == pytest.approx((half - 6.0) / 2, rel=1e-3)
    # What another does not want is there to be taken.
    modest = sequence("m", rate=20.0, max_tokens=100, tenant="b")
    assert reference(cost, *takers, modest) == pytest.approx((2 * half - 20.0) / 2, rel=1e-3)


def test_alone_it_rises_to_what_one_stream_can_be_given_and_no_further():
    cost = taught(fixed=0.01, per_sequence=0.001)
    assert reference(cost, *elastic("a")) == pytest.approx(LOAD_FACTOR / 0.011, rel=1e-3)
    # Batching makes far more than one stream could take; the others are about to end.
    cheap = taught(fixed=0.01)
    done = [sequence(f"{i}", rate=0.001, max_tokens=100) for i in range(20)]
    assert reference(cheap, *elastic("a"), *done) == pytest.approx(1 / 0.01, rel=1e-3)


def test_readers_who_want_everything_leave_a_floor():
    cost = taught(per_sequence=0.01)
    greedy = [sequence(f"{i}", rate=50.0, max_tokens=100) for i in range(8)]
    assert reference(cost, *elastic("a"), *greedy) == 1.0


def readers(count: int, rate: float) -> list:
    return [sequence(f"r{i}", rate=rate, max_tokens=100, arrival_s=float(i)) for i in range(count)]


def test_what_fits_into_the_limit_in_order_of_arrival_is_promised():
    tracker = tracker_of(*readers(5, 10.0)[::-1])
    assert unpromised(tracker, 50.0) is None
    assert unpromised(tracker, 49.0).tolist() == [True, False, False, False, False]
    assert unpromised(tracker, 25.0).tolist() == [True, True, True, False, False]
    # The first one is served whatever it asks for.
    assert unpromised(tracker, 1.0).tolist() == [True, True, True, True, False]


def test_consumers_that_are_no_readers_are_promised_nothing_and_ask_for_nothing():
    tracker = tracker_of(*elastic("a", "b"), *readers(2, 10.0))
    assert unpromised(tracker, 20.0) is None


def test_the_load_is_what_readers_ask_for_beside_what_can_be_made():
    cost = taught(fixed=0.1)
    calm = assess(tracker_of(*readers(4, 9.0)), cost, 100_000, 64)
    # Four in 0.1 s: 40 tokens/s, of which 36.8 may be promised.
    assert calm == Load(pytest.approx(40.0, rel=1e-3))
    crowded = assess(tracker_of(*readers(4, 12.0)), cost, 100_000, 64)
    assert crowded == Load(pytest.approx(40.0, rel=1e-3), parked=1, overloaded=True)
    # One reader who is too fast is overload too, though nobody has to wait for the others.
    assert assess(tracker_of(*readers(1, 20.0)), cost, 100_000, 64) == Load(
        pytest.approx(10.0, rel=1e-3), parked=0, overloaded=True
    )


def test_nothing_known_is_no_overload():
    assert assess(tracker_of(*readers(4, 1e6)), CostModel(), 400, 64) == Load(math.inf)
