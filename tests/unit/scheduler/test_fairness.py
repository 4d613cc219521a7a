"""Turns of tenants, as figures and as what an engine does with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engines import fake_engine, make_request
from tests.support.views import RUNNING, sequence, taught, view
from tokenflow.cluster.admission import favoured
from tokenflow.replicas.errors import CapacityError
from tokenflow.replicas.scheduler.capacity import unpromised
from tokenflow.replicas.scheduler.fairness import entitled, fair_share, turns
from tokenflow.replicas.scheduler.slack import SlackPolicy


def test_a_turn_is_what_the_tenant_asks_for_before_it():
    tenant = np.array([0, 0, 1, 0, 1])
    order = np.array([3, 0, 2, 1, 4])
    turn = turns(tenant, order, np.array([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert turn.tolist() == [8.0, 9.0, 0.0, 0.0, 4.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 100)), min_size=1, max_size=40))
def test_served_by_turns_no_tenant_is_more_than_one_request_behind_another(requests):
    tenant = np.array([t for t, _ in requests])
    cost = np.array([c for _, c in requests])
    turn = turns(tenant, np.arange(len(requests)), cost)
    served = dict.fromkeys(range(4), 0.0)
    waiting = dict(zip(*np.unique(tenant, return_counts=True), strict=True))
    for row in np.lexsort((np.arange(len(requests)), turn)):
        served[int(tenant[row])] += cost[row]
        waiting[tenant[row]] -= 1
        behind = [served[int(t)] for t, left in waiting.items() if left]
        if behind:
            assert max(served.values()) - min(behind) <= cost.max() + 1e-6


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10), st.floats(0.1, 300))
def test_a_fair_share_uses_everything_and_leaves_small_ones_alone(demands, total):
    share = fair_share(demands, total)
    given_out = sum(min(demand, share) for demand in demands)
    if math.isinf(share):
        assert given_out <= total + 1e-6
    else:
        assert given_out == pytest.approx(total)


def test_a_share_covers_requests_in_order_of_arrival_but_none_of_who_floods():
    tenant = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    order = np.arange(8)

    def names(total: float) -> list[int]:
        wants = np.array([4.0, 3.0, 3.0, 9.0, 9.0, 9.0, 9.0, 2.0])
        return np.flatnonzero(entitled(tenant, order, wants, total)).tolist()

    assert names(48.0) == [], "there is enough for all"
    # Shares of 10 and more: only the flood asks for more, at first less than twice its share.
    assert names(40.0) == [0, 1, 2, 3, 4, 5, 7]
    assert names(22.0) == [0, 1, 2, 7]
    # 9 each: one of the first tenant's has to wait.
    assert names(20.0) == [0, 1, 7]


def test_of_two_tenants_rates_are_promised_in_turn_and_of_one_by_arrival():
    flood = [sequence(f"b{i}", tenant="b", rate=10, arrival_s=i) for i in range(6)]
    late = [sequence(f"a{i}", tenant="a", rate=10, arrival_s=100 + i) for i in range(2)]
    both = view(*flood, *late).tracker
    beyond = unpromised(both, 40.0)
    assert beyond is not None
    assert [s.request_id for s in both.take(np.flatnonzero(~beyond))] == ["b0", "b1", "a0", "a1"]
    assert [s.request_id for s in both.take(both.waiting()[:4])] == ["b0", "a0", "b1", "a1"]
    for seq in flood + late:
        seq.row = -1
    alone = view(*(sequence(f"b{i}", tenant="b", rate=10, arrival_s=i) for i in range(6))).tracker
    assert alone.in_turn().tolist() == alone.waiting().tolist() == list(range(6))


def crowded(newcomer: str):
    """A device full of one tenant's streams without slack, and one more request."""
    flood = [
        sequence(
            f"b{i}",
            tenant="b",
            arrival_s=i,
            state=RUNNING,
            output=40,
            slack_s=0.1,
            synced=12,
            max_tokens=60,
        )
        for i in range(4)
    ]
    late = sequence("new", tenant=newcomer, arrival_s=50, max_tokens=60)
    # Two readers of 10 tokens/s are promised their rate, not three.
    cost = taught(fixed=0.1, per_sequence=0.01, prefill=1e-4, load=1e-5, offload=1e-5)
    return view(*flood, late, free=0, max_num_seqs=4, total=60, cost=cost)


def test_who_is_beyond_its_tenants_share_makes_room_for_another_tenant():
    plan = SlackPolicy().plan(crowded("a"), 1000.0)
    assert [seq.request_id for seq in plan.admit] == ["new"]
    # Those that came last go first, and never the one that has a promise.
    leaving = [seq.request_id for seq, _ in plan.preempt]
    assert leaving and leaving == ["b3", "b2", "b1"][: len(leaving)]


def test_of_the_same_tenant_nobody_does():
    plan = SlackPolicy().plan(crowded("b"), 1000.0)
    assert not plan.admit and not plan.preempt


@pytest.mark.parametrize("policy", ["slack", "tokenflow", "fcfs", "chunked"])
def test_a_flood_of_one_tenant_moves_only_its_own_back(policy):
    """The other's requests begin before nearly all of the flood that came before them. (Not under
    andes, whose order is all its own.)"""
    engine, *_ = fake_engine(policy=policy, max_num_seqs=4)
    for i in range(60):
        engine.add(make_request(f"b{i}", [1 + i % 7] * 8, 24, tenant="b"))
    for i in range(3):
        engine.add(make_request(f"a{i}", [2 + i] * 8, 24, tenant="a"))
    first = []
    for _ in range(5000):
        engine.step()
        first += [e.request_id for e in engine.take_events() if e.offset == 0 and e.token_id >= 0]
        if not engine.has_work:
            break
    assert len(first) == 63
    assert max(first.index(f"a{i}") for i in range(3)) < 12


def test_however_many_come_another_tenant_finds_a_place():
    engine, *_ = fake_engine(max_waiting=90)
    taken = 0
    for i in range(200):
        request = make_request(f"b{i}", [1] * 4, 4, tenant="b")
        try:
            engine.check(request)
        except CapacityError:
            break
        engine.add(request)
        taken += 1
    assert taken == 80  # eight times what is left
    engine.check(make_request("a", [1] * 4, 4, tenant="a"))
    engine.check(make_request("nobody", [1] * 4, 4))
    with pytest.raises(CapacityError):
        engine.check(make_request("b", [1] * 4, 4, tenant="b"))


def test_whose_tenant_asks_for_no_more_than_its_share_is_taken_however_long_the_queue():
    rates = {"flood": 900.0, "small": 20.0}
    assert favoured("small", 20.0, rates, capacity=100.0)
    assert favoured("new", 20.0, rates, capacity=100.0)
    assert not favoured("small", 60.0, rates, capacity=100.0)
    assert not favoured("flood", 1.0, rates, capacity=100.0)
    assert not favoured("small", 20.0, rates, capacity=10_000.0)  # nobody has to wait
    assert not favoured("flood", 20.0, {"flood": 500.0}, capacity=100.0)  # nobody else
