"""The paper's algorithm, decision by decision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.views import NOW, PREEMPTED, RUNNING, batch, names, taught, victims, view
from tests.support.views import sequence as any_sequence
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View
from tokenflow.replicas.scheduler.tokenflow import (
    TokenFlowParams,
    TokenFlowPolicy,
    _greedy,
    _pack,
)

COPIES = {"load": 0.1, "offload": 0.1}
"""Seconds per block."""


def plan(situation: View, **params: float) -> Plan:
    return TokenFlowPolicy(TokenFlowParams(**params)).plan(situation, NOW)


def sequence(name: str, **more) -> Sequence:
    """One that fits into memory even at its longest, as every request does."""
    return any_sequence(name, **{"max_tokens": 100, **more})


def full(name: str = "full", **more) -> Sequence:
    """A running stream whose reader has all it needs for six seconds; 68 tokens in 18 blocks."""
    more = {"output": 60, "slack_s": 6.0, "state": RUNNING, **more}
    return sequence(name, **more)


# -- when it plans ----------------------------------------------------------------------------


def test_without_stress_prefills_simply_go_first():
    prefilling = sequence("p", prompt=8, state=RUNNING, computed=0)
    decided = plan(view(full(), prefilling, free=10))
    assert (decided.preempt, decided.admit) == ([], [])
    assert batch(decided) == {"p": 8}


def test_a_full_buffer_makes_room_for_somebody_who_waits():
    decided = plan(view(full(synced=17), sequence("late"), free=0))
    assert [(s.request_id, how) for s, how in decided.preempt] == [("full", Preempt.OFFLOAD)]
    assert names(decided.admit) == ["late"]
    assert batch(decided) == {"late": 8}


def test_nobody_waiting_and_nobody_about_to_run_dry_is_no_stress():
    calm = sequence("calm", output=20, slack_s=4.0, state=PREEMPTED)
    decided = plan(view(full(), calm, free=0))
    assert decided.preempt == []
    # Memory that is free is used all the same.
    assert names(plan(view(full(), calm, free=20)).resume) == ["calm"]


def test_a_reader_off_the_device_about_to_run_dry_is_stress():
    dry = sequence("dry", output=20, slack_s=0.4, state=PREEMPTED)
    assert victims(plan(view(full(), dry, free=0))) == ["full"]
    # Its load takes time too: 0.8 s for 8 blocks, and 0.5 s until it is thought of again.
    soon = sequence("soon", output=20, slack_s=1.2, state=PREEMPTED)
    args = {"free": 0}
    assert victims(plan(view(full(synced=17), soon, **args))) == []
    assert victims(plan(view(full(synced=17), soon, cost=taught(load=0.1), **args))) == ["full"]


def test_it_reschedules_once_an_interval():
    policy = TokenFlowPolicy(TokenFlowParams(interval_s=0.5))

    def victims_at(at: float) -> list[str]:
        return victims(policy.plan(view(full(), sequence("late"), free=0), at))

    assert victims_at(NOW) == ["full"]
    assert victims_at(NOW + 0.4) == []
    assert victims_at(NOW + 0.5) == ["full"]


def test_in_between_running_streams_go_on():
    policy = TokenFlowPolicy()
    situation = view(full(), sequence("late", prompt=4000), free=0)
    policy.plan(situation, NOW)
    assert batch(policy.plan(situation, NOW + 0.1)) == {"full": 1}


def test_an_idle_device_does_not_wait_for_the_interval():
    policy = TokenFlowPolicy()
    assert names(policy.plan(view(sequence("a"), free=100), NOW).admit) == ["a"]
    assert names(policy.plan(view(sequence("b"), free=100), NOW + 0.1).admit) == ["b"]


# -- the working set --------------------------------------------------------------------------


def test_a_buffer_must_cover_the_switch_mu_times_over():
    # 18 blocks out, as many in again, and the interval: 4.1 s. The reader has 6.
    args = {"free": 0, "cost": taught(**COPIES)}
    assert victims(plan(view(full(), sequence("late"), **args), conservativeness=1.0)) == ["full"]
    assert victims(plan(view(full(), sequence("late"), **args), conservativeness=1.5)) == []


def test_what_is_on_the_host_already_need_not_be_copied():
    args = {"free": 0, "cost": taught(**COPIES)}
    # 1 block out, 18 in again, and the interval: 2.4 s.
    synced = full(synced=17)
    assert victims(plan(view(synced, sequence("late"), **args), conservativeness=2.0)) == ["full"]


def test_queues_before_it_count_as_well():
    args = {"free": 0, "cost": taught(**COPIES)}
    queued = {"offload_queue": 10, "load_queue": 10}
    late = sequence("late")
    assert victims(plan(view(full(synced=17), late, **args))) == ["full"]
    assert victims(plan(view(full(synced=17, slack_s=3.5), late, **args))) == ["full"]
    assert victims(plan(view(full(synced=17, slack_s=3.5), late, **args, **queued))) == []


def test_a_stream_in_prefill_is_not_switched():
    prefilling = sequence("p", prompt=60, output=5, slack_s=9.0, state=RUNNING, computed=10)
    assert victims(plan(view(prefilling, sequence("late"), free=0))) == []


def test_requests_join_in_order_of_arrival_while_the_sum_of_rates_allows():
    # 0.1 s a sequence: ten tokens a second, however many run.
    cost = taught(per_sequence=0.1)
    running = sequence("r", output=60, slack_s=0.1, rate=4.0, state=RUNNING)
    waiting = [sequence(f"w{i}", rate=2.5, arrival_s=5.0 - i) for i in range(4)]
    decided = plan(view(running, *waiting, free=80, cost=cost))
    assert sorted(names(decided.admit)) == ["w2", "w3"]


def test_beyond_the_capacity_it_is_first_come_first_served():
    cost = taught(per_sequence=0.1)
    running = full("r", rate=8.0, arrival_s=3.0)
    off = [
        sequence(f"p{i}", output=20, slack_s=0.1, rate=8.0, state=PREEMPTED, arrival_s=2.0 - i)
        for i in range(2)
    ]
    decided = plan(view(running, *off, sequence("late"), free=10, cost=cost))
    # 28 tokens take 8 blocks, and one is left for the running stream.
    assert (decided.preempt, decided.admit) == ([], [])
    assert names(decided.resume) == ["p1"]
    assert batch(decided) == {"r": 1}


def test_an_empty_device_serves_the_first_one_whatever_it_asks_for():
    decided = plan(view(sequence("a", rate=1e6), free=100, cost=taught(per_sequence=0.1)))
    assert names(decided.admit) == ["a"]


def test_no_more_join_than_memory_can_serve_half_way_through():
    waiting = [sequence(f"w{i}", max_tokens=152) for i in range(9)]
    # 8 tokens now and 84 half-way: 21 blocks, so that four of them are 84 of 100 blocks.
    assert names(plan(view(*waiting, free=100)).admit) == ["w0", "w1", "w2", "w3"]


def test_places_are_limited():
    waiting = [sequence(f"w{i}", max_tokens=8) for i in range(5)]
    assert len(plan(view(*waiting, free=100, max_num_seqs=2)).admit) == 2
    decided = plan(view(full(), sequence("late"), free=50, max_num_seqs=1))
    assert victims(decided) == ["full"] and names(decided.admit) == ["late"]


# -- balancing --------------------------------------------------------------------------------


def test_the_emptiest_buffer_is_served_first():
    rich = sequence("rich", output=40, slack_s=3.0, state=PREEMPTED)
    poor = sequence("poor", output=40, slack_s=0.1, state=PREEMPTED)
    # 48 tokens take 13 blocks and one to go on with.
    assert names(plan(view(rich, poor, free=14)).resume) == ["poor"]


def test_who_is_chosen_but_has_no_blocks_yet_comes_later():
    late = sequence("late")
    decided = plan(view(full(synced=0), late, free=0))
    # Everything of the victim is still to be copied out.
    assert victims(decided) == ["full"]
    assert decided.admit == []
    assert decided.batch == []
    again = plan(view(sequence("full", output=60, state=PREEMPTED, slack_s=6.0), late, free=18))
    assert names(again.admit) == ["late"]


def test_a_stream_alone_is_not_thrown_out_for_lack_of_room_to_grow():
    # It fills memory: what it may need until the next plan is not there.
    alone = full(prompt=40, max_tokens=100)
    waits = sequence("late", prompt=90)
    decided = plan(view(alone, waits, free=0, total=26))
    assert decided.preempt == []
    assert batch(decided) == {"full": 1}


def test_the_next_block_of_a_stream_is_counted_once():
    # It fills its blocks and takes the only free one; the other asks for more than is to be had.
    alone = full(prompt=41, rate=5.0, blocks=25)
    decided = plan(
        view(
            alone,
            sequence("late", rate=8.0),
            free=1,
            total=26,
            cost=taught(per_sequence=0.1),
        )
    )
    assert decided.preempt == []
    assert batch(decided) == {"full": 1}


# -- load or recompute ------------------------------------------------------------------------


@pytest.mark.parametrize(("prefill_s", "recomputed"), [(1.0, False), (0.001, True)])
def test_a_member_comes_back_by_the_quicker_way(prefill_s, recomputed):
    dry = sequence("dry", output=40, slack_s=0.1, state=PREEMPTED)
    running = sequence("r", output=20, slack_s=0.1, state=RUNNING)
    # 13 blocks to load take 1.3 s.
    cost = taught(load=0.1, prefill=prefill_s)
    decided = plan(view(running, dry, free=50, cost=cost))
    if recomputed:
        assert names(decided.drop) == names(decided.admit) == ["dry"]
        assert decided.resume == []
        assert batch(decided) == {"dry": 48}
    else:
        assert names(decided.resume) == ["dry"]
        assert (decided.drop, decided.admit) == ([], [])
        assert batch(decided) == {"r": 1}


def test_queues_make_recompute_the_quicker_way():
    dry = sequence("dry", output=40, slack_s=0.1, state=PREEMPTED)
    running = sequence("r", output=20, slack_s=0.1, state=RUNNING)
    # 2.4 s of prefill against 1.3 s of load, and two more behind 20 blocks.
    cost = taught(load=0.1, offload=0.1, prefill=0.05)
    assert plan(view(running, dry, free=50, cost=cost)).drop == []
    for queue in ("load_queue", "offload_queue"):
        decided = plan(view(running, dry, free=50, cost=cost, **{queue: 20}))
        assert names(decided.drop) == ["dry"], queue


# -- memory -----------------------------------------------------------------------------------


def growing(name: str, slack_s: float, **more) -> Sequence:
    """Its blocks are full: 40 tokens in 10."""
    more = {"synced": 10, **more}
    return sequence(name, output=33, slack_s=slack_s, state=RUNNING, blocks=10, **more)


def test_growth_takes_the_fullest_stream():
    streams = [growing("a", 3.0), growing("b", 9.0), growing("c", 0.2)]
    decided = plan(view(*streams, free=0))
    assert victims(decided) == ["b"]
    assert batch(decided) == {"a": 1, "c": 1}


def test_the_last_one_waits_for_the_blocks_of_the_others():
    streams = [growing("a", 3.0, synced=0), growing("b", 9.0, synced=0)]
    decided = plan(view(*streams, free=0))
    assert victims(decided) == ["b"]
    # It has to be copied out first.
    assert batch(decided) == {}


def test_without_host_memory_victims_are_recomputed():
    decided = plan(view(full(), sequence("late"), free=0, host=3))
    assert decided.preempt[0][1] is Preempt.RECOMPUTE
    assert names(decided.admit) == ["late"]


def test_nobody_comes_onto_a_full_device_that_loads():
    loading = sequence("l", output=20, state=State.LOADING)
    decided = plan(view(loading, sequence("late"), free=50, max_num_seqs=1))
    assert decided.admit == [] and decided.batch == []


# -- the search -------------------------------------------------------------------------------


def total(chosen, utility) -> float:
    return float(utility[chosen].sum())


def packed(needs, utility, room, places):
    needs, utility = np.array(needs), np.array(utility, float)
    ranked = np.argsort(-utility, kind="stable")
    greedy, value, _ = _greedy(ranked, needs, utility, room, places)
    assert total(greedy, utility) == pytest.approx(value)
    return greedy, _pack(ranked, needs, utility, room, places)


def test_swapping_neighbours_beats_greed():
    # The best one leaves no room for the two that are better together.
    needs, utility = [6, 5, 5], [10.0, 9.0, 8.0]
    greedy, best = packed(needs, utility, room=10, places=3)
    assert greedy.tolist() == [True, False, False]
    assert best.tolist() == [False, True, True]


def test_where_everything_fits_nothing_is_swapped():
    greedy, best = packed([1, 2, 3], [3.0, 2.0, 1.0], room=6, places=3)
    assert greedy.all() and best.all()


instances = st.lists(
    st.tuples(st.integers(1, 12), st.floats(0, 100, width=32)), min_size=1, max_size=10
)


@given(instances, st.integers(0, 40), st.integers(0, 10))
def test_the_search_is_feasible_and_never_below_greed(items, room, places):
    needs, utility = np.array([n for n, _ in items]), np.array([u for _, u in items])
    greedy, best = packed(needs, utility, room, places)
    for chosen in (greedy, best):
        assert chosen.sum() <= places and needs[chosen].sum() <= room
    assert total(best, utility) >= total(greedy, utility) - 1e-9
    optimum = max(
        sum(utility[list(some)])
        for size in range(min(places, len(items)) + 1)
        for some in itertools.combinations(range(len(items)), size)
        if sum(needs[list(some)]) <= room
    )
    assert total(best, utility) <= optimum + 1e-6
