"""The tracker's columns are what its sequences say, whatever happened to them."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.engines import make_request
from tests.support.plans import check_tracker
from tests.support.views import NOW, PREEMPTED, RUNNING, sequence
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.tracker import Tracker


def tracked(*sequences: Sequence, capacity: int = 256) -> Tracker:
    tracker = Tracker(capacity)
    for seq in sequences:
        tracker.add(seq)
    tracker.refresh()
    return tracker


def test_a_row_holds_what_the_sequence_is():
    seq = sequence("a", prompt=8, output=5, slack_s=2.0, state=RUNNING, synced=2, arrival_s=7.0)
    tracker = tracked(seq)
    assert len(tracker) == 1 and seq.row == 0
    assert tracker.context.tolist() == [13]
    assert tracker.computed.tolist() == [12]
    assert tracker.blocks.tolist() == [4]
    assert tracker.synced.tolist() == tracker.slots.tolist() == [2]
    assert tracker.arrival_s.tolist() == [7.0]
    assert tracker.due_s[0] == pytest.approx(NOW + 2.0)
    assert tracker.state.tolist() == [Tracker.code(State.RUNNING)]


def test_the_last_row_moves_into_a_gap():
    a, b, c = sequence("a"), sequence("b", output=3, state=RUNNING), sequence("c")
    tracker = tracked(a, b, c)
    tracker.remove(a)
    assert tracker.sequences == [c, b]
    assert (a.row, b.row, c.row) == (-1, 1, 0)
    assert tracker.order.tolist() == [2, 1]
    check_tracker(tracker)
    tracker.remove(b)
    assert tracker.sequences == [c] and c.row == 0
    check_tracker(tracker)


def test_a_sequence_changed_and_removed_before_the_refresh_is_gone():
    a, b = sequence("a"), sequence("b")
    tracker = tracked(a, b)
    a.resident_tokens = 5
    tracker.touch(a)
    tracker.remove(a)
    tracker.refresh()
    check_tracker(tracker)
    assert tracker.resident.tolist() == [0]


def test_changes_show_when_refreshed_and_not_before():
    a = sequence("a")
    tracker = tracked(a)
    assert tracker.rows(State.WAITING).tolist() == [0]
    a.move(State.RUNNING)
    tracker.touch(a)
    assert tracker.rows(State.WAITING).tolist() == [0]
    tracker.refresh()
    assert tracker.rows(State.WAITING).tolist() == []
    assert tracker.rows(State.RUNNING).tolist() == [0]


def test_what_is_derived_follows_additions_and_removals():
    a, b = sequence("a", prompt=3), sequence("b", prompt=5, state=PREEMPTED)
    tracker = tracked(a)
    assert tracker.context.tolist() == [3] and tracker.count(State.PREEMPTED) == 0
    tracker.add(b)
    tracker.refresh()
    assert tracker.context.tolist() == [3, 5] and tracker.count(State.PREEMPTED) == 1
    tracker.remove(a)
    assert tracker.context.tolist() == [5]
    assert tracker.rows(State.PREEMPTED).tolist() == [0]


def test_it_grows():
    sequences = [sequence(f"{i}", prompt=i + 1) for i in range(9)]
    tracker = tracked(*sequences, capacity=2)
    assert tracker.context.tolist() == list(range(1, 10))
    check_tracker(tracker)


@pytest.mark.parametrize("tracked_before", [False, True])
def test_removing_a_stranger_is_an_error(tracked_before):
    tracker = tracked(sequence("a"))
    stranger = sequence("b")
    if tracked_before:
        tracker.add(stranger)
        tracker.remove(stranger)
    else:
        # Its row number alone proves nothing.
        stranger.row = 0
    with pytest.raises(ValueError, match="b is not tracked"):
        tracker.remove(stranger)
    check_tracker(tracker)


class Operations(RuleBasedStateMachine):
    """Everything that the engine does to a tracked sequence, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker(capacity=1)
        self.sequences: list[Sequence] = []
        self.added = 0

    def pick(self, index: int) -> Sequence:
        return self.sequences[index % len(self.sequences)]

    @rule(
        prompt=st.integers(1, 30),
        resumed=st.integers(0, 5),
        rate=st.sampled_from([0.5, 10.0, math.inf]),
    )
    def add(self, prompt: int, resumed: int, rate: float) -> None:
        request = make_request(
            f"{self.added}", [1] * prompt, 50, rate=rate, resumed=[1] * resumed, arrival_s=prompt
        )
        seq = Sequence(request, max_blocks=32)
        self.added += 1
        self.sequences.append(seq)
        self.tracker.add(seq)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99))
    def remove(self, index: int) -> None:
        seq = self.pick(index)
        self.sequences.remove(seq)
        self.tracker.remove(seq)
        assert seq.row == -1

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), state=st.sampled_from(list(State)), n=st.integers(0, 20))
    def change(self, index: int, state: State, n: int) -> None:
        seq = self.pick(index)
        seq.state = state
        seq.num_computed = seq.num_blocks = seq.synced_blocks = n
        seq.host_slots = list(range(n))
        seq.entered = n
        self.tracker.touch(seq)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), now=st.floats(0, 1e4))
    def append(self, index: int, now: float) -> None:
        seq = self.pick(index)
        seq.append(1, now)
        self.tracker.touch(seq)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), rate=st.sampled_from([1.0, 20.0, math.inf]))
    def set_rate(self, index: int, rate: float) -> None:
        seq = self.pick(index)
        seq.set_rate(rate, 10.0)
        self.tracker.touch(seq)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), pauses=st.booleans())
    def pause(self, index: int, pauses: bool) -> None:
        seq = self.pick(index)
        (seq.playback.pause if pauses else seq.playback.resume)(10.0)
        self.tracker.touch(seq)

    @rule()
    def refresh(self) -> None:
        self.tracker.refresh()

    @rule()
    def read(self) -> None:
        """So that there is something cached to go stale."""
        for state in State:
            self.tracker.rows(state)
        assert len(self.tracker.context) == len(self.sequences)
        self.tracker.claims()

    @invariant()
    def columns_say_what_the_sequences_say(self) -> None:
        # By turns, or no step would ever find rows that were not refreshed.
        if self.added % 2:
            check_tracker(self.tracker)
        assert {s.request_id for s in self.tracker.sequences} == {
            s.request_id for s in self.sequences
        }

    def teardown(self) -> None:
        check_tracker(self.tracker)


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
