"""The Andes baseline, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.views import BLOCK, NOW, RUNNING, batch, names, taught, victims, view
from tests.support.views import sequence as any_sequence
from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.andes import AndesParams, AndesPolicy
from tokenflow.replicas.scheduler.policy import Preempt

ALL = np.array([0])


def sequence(
    name: str, *, waited_s: float, output: int = 0, prompt: int = 8, rate: float = 10.0, **more
) -> Sequence:
    """A request that came `waited_s` ago; with output it is running."""
    state = {"state": RUNNING} if output else {}
    return any_sequence(
        name,
        prompt=prompt,
        output=output,
        rate=rate,
        arrival_s=NOW - waited_s,
        **state,
        **more,
    )


def situation(*sequences: Sequence, total: int = 40, **more):
    held = sum(seq.num_blocks for seq in sequences)
    return view(*sequences, free=total - held, total=total, **more)


def settled(**changes: float) -> AndesPolicy:
    """A policy that plans at every step and has admitted enough to preempt."""
    policy = AndesPolicy(AndesParams(period=1, **changes))  # type: ignore[arg-type]
    policy._admitted = 100
    return policy


def test_without_pressure_requests_come_in_order():
    first, second = sequence("a", waited_s=2), sequence("b", waited_s=1)
    plan = settled().plan(situation(second, first), NOW)
    assert names(plan.admit) == ["a", "b"]
    assert not plan.preempt


def test_without_pressure_nobody_overtakes():
    big = sequence("big", waited_s=2, prompt=100)
    small = sequence("small", waited_s=1)
    running = sequence("r", waited_s=1, output=10)
    assert settled().plan(situation(running, small, big, total=25), NOW).admit == []


def test_a_reader_with_a_long_buffer_makes_room_for_one_without_a_token():
    rich = sequence("rich", waited_s=3, output=125)
    poor = sequence("poor", waited_s=2)
    plan = settled().plan(situation(rich, poor, total=35), NOW)
    assert plan.preempt == [(rich, Preempt.RECOMPUTE)]
    assert plan.admit == [poor]
    assert batch(plan) == {"poor": 8}


def test_a_reader_who_keeps_pace_only_just_stays():
    tight = sequence("tight", waited_s=3.5, output=20)
    late = sequence("late", waited_s=0.1, prompt=60)
    plan = settled().plan(situation(tight, late, total=20), NOW)
    assert not plan.preempt and not plan.admit


def test_places_are_made_as_memory_is():
    rich = sequence("rich", waited_s=3, output=125)
    poor = sequence("poor", waited_s=2)
    plan = settled().plan(situation(rich, poor, total=100, max_num_seqs=1), NOW)
    assert victims(plan) == ["rich"] and names(plan.admit) == ["poor"]


def test_a_swap_that_stalls_everybody_else_is_refused():
    def swapped(prefill_s: float) -> list[str]:
        rich = sequence("rich", waited_s=3, output=125)
        others = [sequence(f"s{i}", waited_s=10, output=86) for i in range(8)]
        poor = sequence("poor", waited_s=2)
        total = sum(s.num_blocks for s in [rich, *others]) + 1
        made = situation(rich, *others, poor, total=total, cost=taught(prefill=prefill_s))
        return victims(settled().plan(made, NOW))

    assert swapped(0.0001) == ["rich"]
    assert swapped(0.2) == []


def test_preemptions_are_rationed():
    def preempted(policy: AndesPolicy) -> int:
        rich = [sequence(f"r{i}", waited_s=3, output=125) for i in range(6)]
        poor = [sequence(f"p{i}", waited_s=2, prompt=120) for i in range(6)]
        total = sum(s.num_blocks for s in rich) + 1
        return len(policy.plan(situation(*rich, *poor, total=total), NOW).preempt)

    assert preempted(settled()) == 2
    assert preempted(settled(victims_per_plan=4)) == 4
    spent = settled()
    spent._admitted = 0
    assert preempted(spent) == 0
    half = settled(preemptions_per_request=0.5, victims_per_plan=4)
    half._admitted = 2
    assert preempted(half) == 1
    assert preempted(half) == 0, "the one is used up"


def test_only_first_admissions_earn_preemptions():
    policy = AndesPolicy()
    again = sequence("again", waited_s=1)
    again.preemptions = 1
    policy.plan(situation(sequence("new", waited_s=2), again), NOW)
    assert policy._admitted == 1


@pytest.mark.parametrize(("period", "expected"), [(3, [0, 0, 1, 0, 0, 1]), (1, [1] * 6)])
def test_it_plans_only_every_so_many_steps(period, expected):
    policy = AndesPolicy(AndesParams(period=period))
    policy._admitted = 100
    counts = []
    for _ in range(6):
        rich = sequence("rich", waited_s=3, output=125)
        poor = sequence("poor", waited_s=2)
        counts.append(len(policy.plan(situation(rich, poor, total=35), NOW).preempt))
    assert counts == expected


def test_a_period_of_none_means_every_step():
    policy = settled()
    policy.params = AndesParams(period=0)
    made = situation(
        sequence("rich", waited_s=3, output=125), sequence("poor", waited_s=2), total=35
    )
    assert victims(policy.plan(made, NOW)) == ["rich"]


def test_when_the_running_outgrow_memory_the_least_deserving_leaves():
    # 132 tokens fill 33 blocks; the 133rd of each needs another.
    rich = sequence("rich", waited_s=3, output=125, blocks=33)
    needy = sequence("needy", waited_s=14, output=125, blocks=33)
    plan = settled().plan(situation(rich, needy, total=67), NOW)
    assert plan.preempt == [(rich, Preempt.RECOMPUTE)]
    assert batch(plan) == {"needy": 1}


def test_a_slow_device_is_pressure_too():
    def admitted(step_s: float) -> list[str]:
        running = sequence("r", waited_s=10, output=20)
        made = situation(running, sequence("new", waited_s=0.1), cost=taught(fixed=step_s))
        # Not its turn to swap: under pressure nobody is admitted in between.
        return names(AndesPolicy(AndesParams(period=100)).plan(made, NOW).admit)

    assert admitted(0.09) == ["new"]
    assert admitted(0.11) == []


def test_a_reader_beyond_help_is_the_first_to_leave():
    # What serving could still gain is less than what waiting leaves: the closed form gives up.
    lost = situation(sequence("lost", waited_s=30, output=124))
    assert settled().gain(lost, ALL, NOW, runs=True).tolist() == [0.0]


def test_qualities_by_hand():
    policy = AndesPolicy(AndesParams(target_ttft_s=1.0, horizon_s=10.0))
    new = situation(sequence("new", waited_s=0.5))
    assert policy.wait_quality(new, ALL, NOW, 0.5).tolist() == [1.0]
    assert policy.wait_quality(new, ALL, NOW, 0.6).tolist() == [0.0]
    ahead = situation(sequence("ahead", waited_s=5, output=150))
    assert policy.serve_quality(ahead, ALL, NOW).tolist() == [1.0]
    assert policy.wait_quality(ahead, ALL, NOW, 10.0).tolist() == [1.0]
    behind = situation(sequence("behind", waited_s=10, output=50))
    assert policy.wait_quality(behind, ALL, NOW, 0.0) == pytest.approx(1 - 0.5**2)
    assert policy.serve_quality(behind, ALL, NOW) == pytest.approx((150 / 200) ** 2)


def test_a_slow_step_lowers_the_quality_of_being_served():
    policy = AndesPolicy(AndesParams(target_ttft_s=1.0, horizon_s=10.0))
    behind = sequence("behind", waited_s=10, output=50)
    # A token every 0.2 s is 50 in ten seconds instead of 100.
    slow = situation(behind, cost=taught(fixed=0.2))
    assert policy.serve_quality(slow, ALL, NOW) == pytest.approx((100 / 200) ** 2, rel=1e-3)


@given(
    st.lists(
        st.tuples(st.floats(0, 500), st.integers(0, 400), st.floats(0.1, 100)),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_qualities_and_gains_stay_in_range(specs, running):
    policy = AndesPolicy()
    made = situation(
        *[
            sequence(f"{i}", waited_s=waited_s, output=output, rate=rate)
            for i, (waited_s, output, rate) in enumerate(specs)
        ],
        total=100 * BLOCK * len(specs),
    )
    rows = np.arange(len(specs))
    for quality in (
        policy.serve_quality(made, rows, NOW),
        policy.wait_quality(made, rows, NOW, 10.0),
    ):
        assert ((quality >= 0) & (quality <= 1)).all()
    gain = policy.gain(made, rows, NOW, running)
    assert ((gain >= 0) & (gain <= 1.1)).all()
