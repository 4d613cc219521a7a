"""The Andes baseline, by hand."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engines import make_request
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.andes import AndesParams, AndesPolicy
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.policy import Preempt, View

NOW = 1000.0
BLOCK = 4


def sequence(
    name: str, *, waited_s: float, output: int = 0, prompt: int = 8, rate: float = 10.0
) -> Sequence:
    """A request that came `waited_s` ago; with output it is running."""
    request = make_request(name, [1] * prompt, 1000, rate=rate, arrival_s=NOW - waited_s)
    seq = Sequence(request, max_blocks=512)
    seq.output_ids = [1] * output
    seq.tokens = [1] * (prompt + output)
    if output:
        seq.state = State.RUNNING
        seq.num_computed = len(seq.tokens) - 1
        seq.add_blocks(list(range(-(-(len(seq.tokens) + 1) // BLOCK))))
    return seq


def view(
    running: Seq[Sequence],
    waiting: Seq[Sequence],
    *,
    total: int = 40,
    cost: CostModel | None = None,
    max_num_seqs: int = 64,
) -> View:
    held = sum(seq.num_blocks for seq in running)
    return View(
        waiting=waiting,
        running=running,
        preempted=(),
        offloading=(),
        loading=(),
        free_blocks=total - held,
        releasing_blocks=0,
        total_blocks=total,
        free_host_slots=0,
        block_size=BLOCK,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=64,
        cost=cost or CostModel(),
    )


def settled(**changes: float) -> AndesPolicy:
    """A policy that plans at every step and has admitted enough to preempt."""
    policy = AndesPolicy(AndesParams(period=1, **changes))  # type: ignore[arg-type]
    policy._admitted = 100
    return policy


def test_without_pressure_requests_come_in_order():
    first, second = sequence("a", waited_s=2), sequence("b", waited_s=1)
    plan = settled().plan(view([], [first, second]), NOW)
    assert plan.admit == [first, second]
    assert not plan.preempt


def test_a_reader_with_a_long_buffer_makes_room_for_one_without_a_token():
    rich = sequence("rich", waited_s=3, output=125)
    poor = sequence("poor", waited_s=2)
    plan = settled().plan(view([rich], [poor], total=35), NOW)
    assert plan.preempt == [(rich, Preempt.RECOMPUTE)]
    assert plan.admit == [poor]


def test_a_reader_who_keeps_pace_only_just_stays():
    tight = sequence("tight", waited_s=3.5, output=20)
    late = sequence("late", waited_s=0.1, prompt=60)
    plan = settled().plan(view([tight], [late], total=20), NOW)
    assert not plan.preempt and not plan.admit


def test_a_swap_that_stalls_everybody_else_is_refused():
    def plan_with(prefill_s: float) -> list[tuple[Sequence, Preempt]]:
        cost = CostModel()
        cost.observe_step(0, 100, 100 * prefill_s)
        rich = sequence("rich", waited_s=3, output=125)
        others = [sequence(f"s{i}", waited_s=10, output=86) for i in range(8)]
        poor = sequence("poor", waited_s=2)
        total = sum(s.num_blocks for s in [rich, *others]) + 1
        return settled().plan(view([rich, *others], [poor], total=total, cost=cost), NOW).preempt

    assert [victim.request_id for victim, _ in plan_with(0.0001)] == ["rich"]
    assert plan_with(0.2) == []


def test_preemptions_are_rationed():
    def preempted(policy: AndesPolicy) -> int:
        rich = [sequence(f"r{i}", waited_s=3, output=125) for i in range(6)]
        poor = [sequence(f"p{i}", waited_s=2, prompt=120) for i in range(6)]
        total = sum(s.num_blocks for s in rich) + 1
        return len(policy.plan(view(rich, poor, total=total), NOW).preempt)

    assert preempted(settled()) == 2
    assert preempted(settled(victims_per_plan=4)) == 4
    spent = settled()
    spent._admitted = 0
    assert preempted(spent) == 0


def test_it_plans_only_every_so_many_steps():
    policy = AndesPolicy(AndesParams(period=3))
    policy._admitted = 100
    counts = []
    for _ in range(6):
        rich = sequence("rich", waited_s=3, output=125)
        poor = sequence("poor", waited_s=2)
        counts.append(len(policy.plan(view([rich], [poor], total=35), NOW).preempt))
    assert counts == [0, 0, 1, 0, 0, 1]


def test_when_the_running_outgrow_memory_the_least_deserving_leaves():
    rich = sequence("rich", waited_s=3, output=124)
    needy = sequence("needy", waited_s=14, output=124)
    for seq in (rich, needy):
        seq.tokens = [1] * (seq.num_blocks * BLOCK + 1)
    held = rich.num_blocks + needy.num_blocks
    plan = settled().plan(view([rich, needy], [], total=held + 1), NOW)
    assert plan.preempt == [(rich, Preempt.RECOMPUTE)]
    assert [seq for seq, _ in plan.batch] == [needy]


def test_a_reader_beyond_help_is_the_first_to_leave():
    # What serving could still gain is less than what waiting leaves: the closed form gives up.
    lost = sequence("lost", waited_s=30, output=124)
    assert settled().gain(lost, view([lost], []), NOW, running=True) == 0.0


def test_qualities_by_hand():
    policy = AndesPolicy(AndesParams(target_ttft_s=1.0, horizon_s=10.0))
    empty = view([], [])
    new = sequence("new", waited_s=0.5)
    assert policy.wait_quality(new, NOW, 0.5) == 1.0
    assert policy.wait_quality(new, NOW, 0.6) == 0.0
    ahead = sequence("ahead", waited_s=5, output=150)
    assert policy.serve_quality(ahead, empty, NOW) == 1.0
    assert policy.wait_quality(ahead, NOW, 10.0) == 1.0
    behind = sequence("behind", waited_s=10, output=50)
    assert policy.wait_quality(behind, NOW, 0.0) == pytest.approx(1 - 0.5**2)
    assert policy.serve_quality(behind, empty, NOW) == pytest.approx((150 / 200) ** 2)


@given(st.floats(0, 500), st.integers(0, 400), st.floats(0.1, 100), st.booleans())
def test_qualities_and_gains_stay_in_range(waited_s, output, rate, running):
    policy = AndesPolicy()
    seq = sequence("s", waited_s=waited_s, output=output, rate=rate)
    empty = view([], [])
    for quality in (
        policy.serve_quality(seq, empty, NOW),
        policy.wait_quality(seq, NOW, 10.0),
    ):
        assert 0.0 <= quality <= 1.0
    assert 0.0 <= policy.gain(seq, empty, NOW, running) <= 1.1
