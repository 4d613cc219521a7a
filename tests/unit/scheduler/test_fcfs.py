"""First come, first served: what SGLang would do."""

from __future__ import annotations

import pytest

from tests.support.views import (
    NOW,
    RUNNING,
    batch,
    names,
    sequence,
    victims,
    view,
)
from tokenflow.replicas.scheduler.fcfs import ChunkedPolicy, FCFSParams, FCFSPolicy
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View


def plan(situation: View, policy: FCFSPolicy | None = None) -> Plan:
    return (policy or FCFSPolicy()).plan(situation, NOW)


def test_it_admits_in_order_of_arrival_whatever_the_rows_are():
    last = sequence("last", arrival_s=3.0)
    first = sequence("first", arrival_s=1.0)
    middle = sequence("middle", arrival_s=2.0)
    assert names(plan(view(last, first, middle, free=1000)).admit) == ["first", "middle", "last"]


def test_it_admits_by_what_requests_may_become_and_nobody_overtakes():
    first = sequence("first", prompt=40, max_tokens=40, arrival_s=1.0)
    second = sequence("second", prompt=4, max_tokens=400, arrival_s=2.0)
    third = sequence("third", prompt=4, max_tokens=4, arrival_s=3.0)
    # The second would fit now, but not what it may become; the third waits its turn.
    assert names(plan(view(first, second, third, free=30)).admit) == ["first"]
    assert names(plan(view(first, second, third, free=100)).admit) == ["first", "second", "third"]


def test_what_the_running_ones_may_still_need_is_left_for_them():
    running = sequence("running", output=20, max_tokens=100, state=RUNNING, blocks=8)
    new = sequence("new", prompt=40, max_tokens=8)
    # 28 tokens and 0.7 * 80 to come are 21 blocks, 13 more than it has; the new one needs 12.
    assert names(plan(view(running, new, free=24)).admit) == []
    assert names(plan(view(running, new, free=25)).admit) == ["new"]


def test_alone_a_request_needs_memory_for_its_prompt_only():
    first = sequence("first", prompt=40, max_tokens=400)
    assert names(plan(view(first, free=11)).admit) == ["first"]
    assert names(plan(view(first, free=10)).admit) == []


def test_places_are_limited():
    waiting = [sequence(f"w{i}", max_tokens=4) for i in range(4)]
    running = sequence("r", output=5, max_tokens=8, state=RUNNING)
    assert len(plan(view(running, *waiting, free=1000, max_num_seqs=3)).admit) == 2


def overflow(**outputs: int) -> list:
    """Running streams that hold just the blocks they have filled."""
    return [
        # A whole number of blocks and the token that needs the next one.
        sequence(name, prompt=1, output=n, max_tokens=1000, state=RUNNING, blocks=n // 4)
        for name, n in outputs.items()
    ]


def test_overflow_retracts_those_with_the_fewest_tokens_and_recomputes_them():
    decided = plan(view(*overflow(old=40, new=8, middle=20), free=0))
    assert [(seq.request_id, how) for seq, how in decided.preempt] == [("new", Preempt.RECOMPUTE)]
    assert batch(decided) == {"old": 1, "middle": 1}


def test_overflow_goes_on_until_the_others_fit():
    # 9 streams need a block each; the three with the fewest tokens have 1, 2 and 3.
    streams = overflow(**{f"s{i}": 4 * (i + 1) for i in range(9)})
    decided = plan(view(*streams, free=0))
    assert victims(decided) == ["s0", "s1", "s2"]
    assert len(decided.batch) == 6


def test_of_equal_outputs_the_longer_context_is_retracted():
    short = sequence("short", prompt=5, output=8, state=RUNNING, blocks=3)
    long = sequence("long", prompt=9, output=8, state=RUNNING, blocks=4)
    assert victims(plan(view(short, long, free=0))) == ["long"]


def test_one_stream_is_never_retracted():
    assert victims(plan(view(*overflow(only=40), free=0))) == []


def test_nobody_is_admitted_in_a_step_that_retracts():
    old = sequence("old", prompt=1, output=20, max_tokens=21, state=RUNNING, blocks=5)
    new = sequence("new", prompt=1, output=16, max_tokens=21, state=RUNNING, blocks=4)
    waits = sequence("w", prompt=1, max_tokens=1)
    assert names(plan(view(old, waits, free=3)).admit) == ["w"]
    decided = plan(view(old, new, waits, free=0))
    assert victims(decided) == ["new"] and decided.admit == []


def test_an_overflow_sets_the_expectation_anew_from_what_was_generated():
    policy = FCFSPolicy(FCFSParams(initial_ratio=0.5, retract_tokens=20))
    plan(view(*overflow(a=80, b=40), free=0), policy)
    # (80 + 40 + 2 * 20) of 2 * 1000.
    assert policy._ratio == pytest.approx(160 / 2001)
    greedy = FCFSPolicy(FCFSParams(retract_tokens=5000))
    plan(view(*overflow(a=80, b=40), free=0), greedy)
    assert greedy._ratio == 1.0


def test_without_overflow_the_expectation_falls_to_its_minimum():
    policy = FCFSPolicy(FCFSParams(initial_ratio=0.7, min_ratio=0.1, decay_steps=4))
    seen = []
    for _ in range(6):
        plan(view(), policy)
        seen.append(policy._ratio)
    assert seen == pytest.approx([0.55, 0.4, 0.25, 0.1, 0.1, 0.1])


def test_a_lower_expectation_admits_more():
    def admitted(ratio: float) -> int:
        waiting = [sequence(f"w{i}", max_tokens=100) for i in range(10)]
        return len(plan(view(*waiting, free=60), FCFSPolicy(FCFSParams(ratio, ratio))).admit)

    # 8 tokens of prompt and the share of 100: 27 blocks, or 5.
    assert (admitted(1.0), admitted(0.1)) == (2, 10)


def test_no_output_is_expected_to_be_longer_than_the_limit():
    waiting = [sequence(f"w{i}", max_tokens=100_000) for i in range(3)]
    policy = FCFSPolicy(FCFSParams(longest_output=40))
    # 8 and 0.7 * 40 tokens are 9 blocks each.
    assert len(plan(view(*waiting, free=27), policy).admit) == 3
    assert len(plan(view(*waiting, free=26), policy).admit) == 2


def test_prefills_stop_the_decodes_unless_they_share_the_step():
    running = sequence("r", output=5, max_tokens=8, state=RUNNING)
    new = sequence("new", prompt=8, max_tokens=8)
    assert batch(plan(view(running, new, free=100))) == {"new": 8}
    assert batch(plan(view(running, new, free=100), ChunkedPolicy())) == {"r": 1, "new": 8}
