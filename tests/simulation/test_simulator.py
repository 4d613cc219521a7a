"""The shipped engine and policies on a virtual clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tokenflow.replicas.executor.base import CopyDone
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.policy import Plan, Policy, View
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator.executor import SimExecutor, VirtualClock
from tokenflow.replicas.simulator.hardware import GPUS, MODELS, Roofline
from tokenflow.replicas.simulator.run import Machine, Outcome, simulate
from tokenflow.replicas.simulator.workload import Arrival, burst, poisson, requests

MODEL = MODELS["llama3-8b"]
COST = Roofline(GPUS["rtx4090"], MODEL)
MACHINE = Machine(
    cost=COST,
    layout=MODEL.kv_layout(16),
    kv_tokens=COST.kv_tokens(0.9),
    host_kv_tokens=500_000,
    link_gb_s=GPUS["rtx4090"].link_gb_s,
)


def small_burst(seed: int = 1) -> list[Arrival]:
    rng = random.Random(seed)
    return requests(burst(80), 512, 512, [(8.0, 1)], rng)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {name: simulate(MACHINE, make_policy(name), small_burst()) for name in POLICIES}


def test_every_policy_delivers_every_token_in_order(outcomes):
    for outcome in outcomes.values():
        for record, arrival in zip(outcome.records, small_burst(), strict=True):
            assert record.ok and record.finish_reason == "length"
            assert record.tokens == arrival.output_tokens
            times = record.token_times()
            assert times == sorted(times)


def test_the_engine_and_the_client_count_alike(outcomes):
    for outcome in outcomes.values():
        effective = outcome.summary.effective_tok_s * outcome.summary.duration_s
        assert outcome.stats.effective_tokens == pytest.approx(effective)
        assert outcome.stats.reader_stall_seconds == pytest.approx(outcome.summary.stall_s)
        assert outcome.stats.generated_tokens == outcome.summary.tokens


def test_the_same_seed_gives_the_same_schedule(outcomes):
    again = simulate(MACHINE, make_policy("tokenflow"), small_burst())
    assert again.summary == outcomes["tokenflow"].summary
    assert again.records == outcomes["tokenflow"].records


def test_preemption_pays_under_a_burst(outcomes):
    ours, baseline = outcomes["tokenflow"].summary, outcomes["fcfs"].summary
    assert ours.ttft_p99_s < 0.5 * baseline.ttft_p99_s
    assert ours.effective_tok_s > 1.2 * baseline.effective_tok_s
    assert ours.raw_tok_s > 0.95 * baseline.raw_tok_s
    assert outcomes["tokenflow"].stats.resumes > 0


def test_the_device_is_never_faster_than_its_cost_model(outcomes):
    for outcome in outcomes.values():
        assert outcome.busy_s <= outcome.summary.duration_s + 1e-6


def test_a_request_that_can_never_fit_is_refused():
    huge = [Arrival(0.0, MACHINE.kv_tokens, 10, 20.0)]
    with pytest.raises(ValueError, match="does not fit"):
        simulate(MACHINE, make_policy("fcfs"), huge)


def test_an_output_may_end_before_its_limit():
    arrivals = [Arrival(0.0, 100, 30 + i, 20.0, max_tokens=30 + 3 * i) for i in range(4)]
    outcome = simulate(MACHINE, make_policy("slack"), arrivals)
    assert [r.tokens for r in outcome.records] == [30, 31, 32, 33]
    assert [r.finish_reason for r in outcome.records] == ["length", "stop", "stop", "stop"]


def test_outputs_that_end_long_before_their_limits_are_learned():
    rng = random.Random(1)
    arrivals = requests(poisson(2.0, 60.0, rng), 512, 600, [(20.0, 1.0)], rng)
    generous = [replace(a, max_tokens=4 * a.output_tokens) for a in arrivals]
    known, learned = (
        simulate(MACHINE, make_policy("slack"), each).summary for each in (arrivals, generous)
    )
    unaware = simulate(MACHINE, Unaware(make_policy("slack")), generous).summary
    assert unaware.effective_tok_s < learned.effective_tok_s <= known.effective_tok_s


class Unaware:
    """A policy that is told nothing of how long outputs were."""

    def __init__(self, policy: Policy) -> None:
        self.name, self.write_through, self._policy = policy.name, policy.write_through, policy

    def plan(self, view: View, now: float) -> Plan:
        return self._policy.plan(replace(view, lengths=OutputLengths()), now)


def test_copies_take_their_time_on_their_own_direction():
    clock = VirtualClock()
    executor = SimExecutor(clock, COST, MODEL.kv_layout(16), 64, link_gb_s=25)
    block_s = MODEL.kv_layout(16).block_bytes / 25e9
    out = executor.offload([(i, i) for i in range(10)])
    back = executor.load([(i, i) for i in range(5)])
    assert executor.poll_transfers() == []
    assert executor.poll_transfers(timeout_s=1.0) == [
        CopyDone(back, None, pytest.approx(5 * block_s))
    ]
    assert clock() == pytest.approx(5 * block_s)
    assert executor.poll_transfers(timeout_s=1.0) == [
        CopyDone(out, None, pytest.approx(10 * block_s))
    ]
    assert clock() == pytest.approx(10 * block_s)


def test_a_step_costs_what_the_roofline_says():
    one = COST.step_s([1000], [])
    weights = MODEL.weight_bytes / (1008e9 * 0.75)
    kv = 1000 * MODEL.kv_layout(1).token_bytes / (1008e9 * 0.75)
    assert one == pytest.approx(0.002 + weights + kv)
    prefill = COST.step_s([], [(4096, 0)])
    assert prefill > 2 * MODEL.parameters * 4096 / (165.2e12 * 0.6)
    assert COST.kv_tokens(0.9) == pytest.approx(34_000, rel=0.1)


def test_poisson_arrivals_have_their_rate():
    times = poisson(5.0, 2000.0, random.Random(3))
    assert times == sorted(times)
    assert len(times) == pytest.approx(10_000, rel=0.05)
