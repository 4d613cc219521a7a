"""Rebalancing: only from who is short to who has room, never to and fro, and it comes to rest."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.cluster.rebalancing import Limits, Rebalancer, ReplicaState, stream_of
from tokenflow.replicas.overload import Movable, OverloadReport

LIMITS = Limits()


def movable(name, wait_s=20.0, buffer_s=0.0, rate=10.0, kv_tokens=500, need_tokens=800):
    return Movable(name, rate, kv_tokens, need_tokens, buffer_s, wait_s)


def state(name, *waiting, rate=0.0, capacity=100.0, room=10_000, node=None, prefill_s=1e-3):
    report = OverloadReport(capacity, rate, room, prefill_s, tuple(waiting))
    return ReplicaState(name, node or f"node of {name}", report)


def planned(replicas, limits=LIMITS):
    """The moves of a round after the first, with nothing else changed."""
    policy = Rebalancer(limits)
    assert policy.plan(replicas, 0.0) == [], "a moment's shortage moves nobody"
    return policy.plan(replicas, limits.patience_s)


def test_who_waits_for_the_longest_goes_where_there_is_room():
    full = state("a", movable("x#1", 5), movable("y#1", 30), rate=120)
    moves = planned([full, state("b", rate=65)])
    assert [(m.request_id, m.source, m.target) for m in moves] == [("y#1", "a", "b")]


def test_nobody_moves_for_nothing():
    idle = state("b")
    for waiting in (
        movable("x", wait_s=1.0),
        movable("x", wait_s=30.0, buffer_s=40.0),
        movable("x", wait_s=5.0, kv_tokens=50_000),
        movable("x", rate=90.0),
        movable("x", need_tokens=20_000),
    ):
        assert planned([state("a", waiting), idle]) == []


def test_all_full_or_unknown_moves_nobody():
    a = state("a", movable("x"), rate=120)
    assert planned([a, state("b", movable("y"), rate=110)]) == []
    assert planned([a, state("b", rate=79)]) == []
    unknown = replace(a, report=replace(a.report, capacity=0.0))
    assert planned([unknown, state("b", capacity=0.0)]) == []


def test_one_that_has_served_nobody_is_taken_to_be_like_the_others():
    assert len(planned([state("a", movable("x"), rate=120), state("b", capacity=0.0)])) == 1


def test_the_same_node_is_nearer():
    a = state("a", movable("x"), rate=120, node="n1")
    moves = planned([a, state("b", node="n2"), state("c", rate=50, node="n1")])
    assert [m.target for m in moves] == ["c"]


def test_a_stream_stays_where_it_was_moved_under_its_next_id():
    policy = Rebalancer()
    a, b = state("a", movable("x#3"), rate=120), state("b")
    policy.plan([a, b], 0.0)
    assert len(policy.plan([a, b], 1.0)) == 1
    back = [state("a"), state("b", movable("x#4"), rate=120)]
    for now in (2.0, 12.0, 30.9):
        assert policy.plan(back, now) == []
    assert len(policy.plan(back, 31.1)) == 1


rates = st.sampled_from([1.0, 5.0, 20.0])
fleets = st.lists(
    st.tuples(
        st.sampled_from(["n1", "n2", "n3"]),
        st.floats(20, 400),
        st.integers(2_000, 30_000),
        st.lists(st.tuples(rates, st.integers(10, 2000), st.floats(0, 20)), max_size=60),
    ),
    min_size=2,
    max_size=6,
)


class Fleet:
    """Replicas that serve whoever came first, as far as rate and memory go; the others wait."""

    def __init__(self, drawn):
        self.nodes = [node for node, *_ in drawn]
        self.capacity = [capacity for _, capacity, *_ in drawn]
        self.memory = [memory for _, _, memory, _ in drawn]
        self.streams = {}
        self.on = [[] for _ in drawn]
        for i, (*_, streams) in enumerate(drawn):
            for rate, tokens, buffer_s in streams:
                name = f"s{len(self.streams)}"
                self.streams[name] = (rate, tokens, buffer_s)
                self.on[i].append(name)
        self.attempts = dict.fromkeys(self.streams, 1)

    def load(self, i):
        held = [self.streams[name] for name in self.on[i]]
        return sum(rate for rate, *_ in held), sum(tokens for _, tokens, _ in held)

    def waiting(self, i):
        rate = tokens = 0
        late = []
        for name in self.on[i]:
            rate += self.streams[name][0]
            tokens += self.streams[name][1]
            if rate > 0.92 * self.capacity[i] or tokens > self.memory[i]:
                late.append(name)
        return late

    def states(self):
        found = []
        for i, node in enumerate(self.nodes):
            rate, tokens = self.load(i)
            late = tuple(
                Movable(
                    f"{name}#{self.attempts[name]}",
                    self.streams[name][0],
                    self.streams[name][1] // 2,
                    self.streams[name][1],
                    self.streams[name][2],
                    10.0 * (place + 1),
                )
                for place, name in enumerate(self.waiting(i))
            )
            report = OverloadReport(self.capacity[i], rate, self.memory[i] - tokens, 1e-3, late)
            found.append(ReplicaState(str(i), node, report))
        return found

    def apply(self, move):
        name = stream_of(move.request_id)
        self.on[int(move.source)].remove(name)
        self.on[int(move.target)].append(name)
        self.attempts[name] += 1


@settings(max_examples=150)
@given(fleets, st.integers(1, 3))
def test_it_moves_the_right_ones_overloads_nobody_and_comes_to_rest(drawn, ingresses):
    fleet = Fleet(drawn)
    everybody = sorted(fleet.streams)
    policies = [Rebalancer() for _ in range(ingresses)]
    short_before = sum(len(fleet.waiting(i)) for i in range(len(drawn)))
    moved: list[str] = []
    quiet = 0
    for now in range(400):
        states = fleet.states()
        plans = [policy.plan(states, float(now)) for policy in policies]
        assert all(plan == plans[0] for plan in plans), "who sees the same plans the same"
        full = {s.replica_id for s in states if s.report.movable}
        moves = plans[0]
        assert len(moves) <= LIMITS.in_all
        for move in moves:
            assert move.source in full and move.target not in full
            moved.append(stream_of(move.request_id))
            fleet.apply(move)
        for target in {move.target for move in moves}:
            i = int(target)
            rate, tokens = fleet.load(i)
            assert rate <= LIMITS.target_load * fleet.capacity[i] + 1e-6
            assert tokens <= fleet.memory[i]
            assert sum(move.target == target for move in moves) <= LIMITS.per_target
            assert not fleet.waiting(i)
        assert sorted(name for names in fleet.on for name in names) == everybody
        quiet = 0 if moves else quiet + 1
    assert quiet > LIMITS.stay_s, "it goes on and on"
    assert sum(len(fleet.waiting(i)) for i in range(len(drawn))) <= short_before
    assert len(set(moved)) == len(moved), "where it went it had room: nobody moves twice"


@settings(max_examples=60)
@given(st.integers(1, 40), st.sampled_from([5.0, 10.0]))
def test_an_idle_replica_takes_what_it_can_and_no_more(streams, rate):
    fleet = Fleet([("n1", 50.0, 100_000, [(rate, 100, 0.0)] * streams), ("n2", 100.0, 100_000, [])])
    policy = Rebalancer()
    for now in range(200):
        for move in policy.plan(fleet.states(), float(now)):
            fleet.apply(move)
    late = max(0, streams - int(0.92 * 50 / rate))
    assert len(fleet.on[1]) == min(late, int(0.8 * 100 / rate))
