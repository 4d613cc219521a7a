"""What every plan of every policy must keep to, checked against the view it was made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.policy import Plan, Policy, Preempt, View
from tokenflow.replicas.scheduler.tracker import CODES, Tracker


def check_tracker(tracker: Tracker) -> None:
    """Every column equals what its sequences say."""
    tracker.refresh()
    expected = {
        "arrival_s": [s.arrival_s for s in tracker.sequences],
        "rate": [s.playback.rate for s in tracker.sequences],
        "due_s": [s.playback.due_s for s in tracker.sequences],
        "paused": [s.playback.paused for s in tracker.sequences],
        "elastic": [s.elastic for s in tracker.sequences],
        "limit": [s.params.max_tokens for s in tracker.sequences],
        "generated": [len(s.output_ids) for s in tracker.sequences],
        "context": [len(s.tokens) for s in tracker.sequences],
        "computed": [s.num_computed for s in tracker.sequences],
        "held": [s.num_blocks for s in tracker.sequences],
        "shared": [s.shared_blocks for s in tracker.sequences],
        "blocks": [max(s.num_blocks - s.shared_blocks, 0) for s in tracker.sequences],
        "synced": [s.synced_blocks for s in tracker.sequences],
        "slots": [len(s.host_slots) for s in tracker.sequences],
        "resident": [s.resident_tokens for s in tracker.sequences],
        "entered": [s.entered for s in tracker.sequences],
        "state": [CODES[s.state] for s in tracker.sequences],
    }
    assert len(tracker) == len(tracker.sequences)
    for name, values in expected.items():
        assert getattr(tracker, name).tolist() == values, name
    assert [s.row for s in tracker.sequences] == list(range(len(tracker)))
    order = tracker.order.tolist()
    assert len(set(order)) == len(order)
    for state in State:
        assert tracker.rows(state).tolist() == [
            row for row, seq in enumerate(tracker.sequences) if seq.state is state
        ]
        assert tracker.count(state) == len(tracker.rows(state))
    assert tracker.take(list(range(len(tracker)))) == tracker.sequences
    rows, claimed = tracker.claims()
    read_on = [row for row, seq in enumerate(tracker.sequences) if not seq.playback.paused]
    assert sorted(rows.tolist()) == read_on
    asked = [0.0 if seq.elastic else seq.playback.rate for seq in tracker.take(rows)]
    assert claimed.tolist() == np.cumsum(asked).tolist()


def check_plan(view: View, plan: Plan) -> None:
    """The plan asks for nothing that the engine could not do."""
    _once([seq for seq, _ in plan.preempt], "preempted")
    _once(plan.drop, "dropped")
    _once(plan.resume, "resumed")
    _once(plan.admit, "admitted")
    _once([seq for seq, _ in plan.batch], "in the batch")
    victims = {seq.row for seq, _ in plan.preempt}
    dropped = {seq.row for seq in plan.drop}
    admitted = {seq.row for seq in plan.admit}
    for seq, _ in plan.preempt:
        assert seq.state is State.RUNNING, f"preempts {seq.request_id}, {seq.state}"
    for seq in plan.drop:
        assert seq.state is State.PREEMPTED, f"drops {seq.request_id}, {seq.state}"
    for seq in plan.resume:
        assert seq.state is State.PREEMPTED, f"resumes {seq.request_id}, {seq.state}"
        assert seq.row not in dropped, f"drops and resumes {seq.request_id}"
    for seq in plan.admit:
        waits = seq.state is State.WAITING or seq.row in dropped
        assert waits, f"admits {seq.request_id}, {seq.state}"
    for seq, n in plan.batch:
        runs = seq.state is State.RUNNING and seq.row not in victims
        assert runs or seq.row in admitted, f"runs {seq.request_id}, {seq.state}"
        assert 1 <= n <= len(seq.tokens) - _computed(seq, dropped), f"{n} of {seq.request_id}"
    assert sum(n for _, n in plan.batch) <= view.max_batch_tokens, "too many tokens"
    entering = len(plan.resume) + len(plan.admit)
    places = view.on_device() - len(plan.preempt) + entering
    # A device that was full before cannot be blamed on a plan that brings nobody onto it.
    assert not entering or places <= view.max_num_seqs, "too many sequences"
    now, later = _blocks_released(view, plan)
    resumed = _blocks_to_enter(view, plan.resume)
    others = _blocks_to_enter(view, plan.admit) + _blocks_to_run(view, plan)
    free = view.free_blocks + now
    assert others <= free, "more blocks than are free"
    # Loads may begin in some of their blocks while the others are on their way.
    coming = view.releasing_blocks + later if view.overlap else 0
    assert others + resumed <= free + coming, "more blocks than will be free"


def _once(seqs: list[Sequence], what: str) -> None:
    names = [seq.request_id for seq in seqs]
    assert len(set(names)) == len(names), f"{what} twice: {names}"


def _computed(seq: Sequence, dropped: set[int]) -> int:
    return 0 if seq.row in dropped else seq.num_computed


def _blocks_to_enter(view: View, seqs: list[Sequence]) -> int:
    """By those that come onto the device."""
    return int(view.blocks_needed(np.array([seq.row for seq in seqs], np.int64)).sum())


def _blocks_to_run(view: View, plan: Plan) -> int:
    """By the batch, beyond what it holds."""
    return sum(
        max(view.blocks_for(seq.num_computed + n) - seq.num_blocks, 0)
        for seq, n in plan.batch
        if seq.state is State.RUNNING
    )


def _blocks_released(view: View, plan: Plan) -> tuple[int, int]:
    """By the victims: (at once, when their copies end); the host takes them in order while it has
    slots, and without a slot for its rest a victim drops that."""
    slots = view.free_host_slots
    now = later = 0
    for seq, how in plan.preempt:
        row = np.array([seq.row])
        wanted = int(view.slots_to_offload(row)[0])
        alone = int(view.tracker.blocks[seq.row])
        released = alone
        if how is Preempt.OFFLOAD and wanted <= slots:
            slots -= wanted
            released = int(view.released_now(row)[0])
        now += released
        later += alone - released
    return now, later


class Checked:
    """A policy whose plans are all checked."""

    def __init__(self, policy: Policy) -> None:
        self.inner = policy
        self.name = policy.name
        self.write_through = policy.write_through

    def plan(self, view: View, now: float) -> Plan:
        check_tracker(view.tracker)
        # Policies keep a ledger of their own; the view stays as it was.
        before = replace(view)
        # An undefined number decides nothing, it only looks as if it did.
        with np.errstate(divide="raise", invalid="raise"):
            plan = self.inner.plan(view, now)
        assert view == before
        check_plan(view, plan)
        return plan
