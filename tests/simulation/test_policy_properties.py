"""What must hold of whole runs, whatever the numbers: on a small machine of round figures.

A step takes 30 ms, 1 ms for each sequence and 4 us for each token of context; a prompt token takes
0.2 ms, a block 2 ms to copy. With memory full of 20 sequences it makes about 300 tokens a second.
"""

from __future__ import annotations

import math
import random
from dataclasses import fields

import pytest

from tests.support.machines import Linear, machine
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator.run import Outcome, simulate
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

PROMPT, OUTPUT, RATE = 96, 160, 6.0
TOGETHER = 20
"""Sequences of about 200 tokens that memory holds."""


CAPACITY = TOGETHER / Linear().step_s([PROMPT + OUTPUT // 2] * TOGETHER, [])


def workload(
    seed: int, times: list[float], rates: list[tuple[float, float]] | None = None
) -> list[Arrival]:
    return requests(times, PROMPT, OUTPUT, rates or [(RATE, 1)], random.Random(seed))


def run(policy: str, arrivals: list[Arrival], **params: float) -> Outcome:
    return simulate(machine(), make_policy(policy, params), arrivals)


def readers(share: float) -> int:
    """How many readers ask for this share of what the machine can make."""
    return int(share * CAPACITY / RATE)


def stalls(outcome: Outcome) -> list[float]:
    """Seconds each reader sat dry after its first token."""
    return [record.playback().stall_s for record in outcome.records if record.reads]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_gives_the_same_run(policy):
    mixed = workload(1, burst(40), [(RATE, 3), (20.0, 1), (math.inf, 1)])
    one, two = run(policy, mixed), run(policy, mixed)
    assert one.records == two.records
    assert one.samples == two.samples
    other = run(policy, workload(2, burst(40), [(RATE, 3), (20.0, 1), (math.inf, 1)]))
    assert other.records != one.records


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slower", [2.0, 0.25])
def test_decisions_have_no_scale_of_their_own(policy, slower):
    # A slower world with slower readers and more patience is the same world. Powers of two, so that
    # nothing is rounded differently.
    arrivals = workload(3, burst(60), [(RATE, 1), (20.0, 1)])
    params = {
        field.name: field.default * slower
        for field in fields(POLICIES[policy][1])
        if field.name.endswith("_s")
    }
    slow_arrivals = [
        Arrival(a.at_s * slower, a.prompt_tokens, a.output_tokens, a.token_rate / slower)
        for a in arrivals
    ]
    usual = run(policy, arrivals)
    slow = simulate(machine(slower), make_policy(policy, params), slow_arrivals)
    assert [r.token_times() for r in slow.records] == [
        [slower * at for at in r.token_times()] for r in usual.records
    ]
    assert slow.stats.preempted_offload == usual.stats.preempted_offload


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_names_and_order_of_submission_at_one_moment_change_little(policy):
    # Who comes first among equals is a matter of order; how all of them fare together is not.
    arrivals = workload(4, burst(60))
    one, two = run(policy, arrivals).summary, run(policy, arrivals[::-1]).summary
    assert two.ttft_mean_s == pytest.approx(one.ttft_mean_s, rel=0.25, abs=0.5)
    assert two.effective_tok_s == pytest.approx(one.effective_tok_s, rel=0.1)
    assert two.tokens == one.tokens


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arrivals", ["burst", "poisson"])
def test_under_schedulable_load_no_reader_stalls(seed, arrivals):
    if arrivals == "burst":
        times = burst(readers(0.6))
        assert len(times) > TOGETHER, "or there would be nothing to schedule"
    else:
        # As many at a time on average; a reader stays for as long as it reads.
        times = poisson(readers(0.5) * RATE / OUTPUT, 90.0, random.Random(seed))
    outcome = run("slack", workload(seed, times))
    if arrivals == "burst":
        assert outcome.stats.resumes > 0
    assert max(stalls(outcome)) < 0.05
    assert outcome.summary.ttft_max_s < 1.5


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_overload_starves_nobody(policy):
    arrivals = workload(5, burst(readers(2.0)))
    outcome = run(policy, arrivals)
    for record, arrival in zip(outcome.records, arrivals, strict=True):
        assert record.ok and record.tokens == arrival.output_tokens
    # No time is lost either: nobody needs twice as long as the work itself takes.
    tokens = sum(a.output_tokens for a in arrivals)
    assert outcome.summary.duration_s < 2 * tokens / CAPACITY


@pytest.mark.parametrize("seed", range(3))
def test_overload_starts_readers_no_later_than_first_come_first_served(seed):
    arrivals = workload(seed, burst(readers(2.0)))
    ours, baseline = run("slack", arrivals).summary, run("fcfs", arrivals).summary
    assert ours.ttft_mean_s <= baseline.ttft_mean_s
    assert ours.ttft_max_s <= baseline.ttft_max_s
    assert ours.effective_tok_s > 2 * baseline.effective_tok_s
    assert ours.raw_tok_s > 0.97 * baseline.raw_tok_s


@pytest.mark.parametrize("seed", range(3))
def test_consumers_that_are_no_readers_yield_to_readers_and_still_progress(seed):
    people = workload(seed, burst(readers(0.85)))
    agents = workload(seed + 50, burst(12), [(math.inf, 1)])
    alone, together = run("slack", people), run("slack", [*people, *agents])
    # All readers together lose less than a second to work that is half as much again.
    assert sum(stalls(together)) < sum(stalls(alone)) + 1.0
    theirs = [r for r in together.records if r.reads]
    first = [r.first_token_s for r in theirs]
    assert max(first) < 1.5 * max(r.first_token_s for r in alone.records)
    # While the readers read, every agent gets on.
    half = max(r.finished_s for r in theirs) / 2
    for record in together.records:
        if not record.reads:
            assert sum(at < half for at in record.token_times()) > 0.05 * record.tokens
            assert record.ok


def test_a_consumer_that_is_no_reader_is_served_at_full_speed_when_alone():
    agent = [Arrival(0.0, PROMPT, OUTPUT, math.inf)]
    outcome = run("slack", agent)
    steps = sum(Linear().step_s([PROMPT + i], []) for i in range(1, OUTPUT))
    assert outcome.summary.duration_s == pytest.approx(
        Linear().step_s([], [(PROMPT, 0)]) + steps, rel=0.01
    )
