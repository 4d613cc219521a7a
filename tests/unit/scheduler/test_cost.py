"""The online cost model finds the machine behind the steps it sees."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.replicas.scheduler.cost import CostModel


def observe(
    cost: CostModel,
    terms: tuple[float, float, float],
    steps: int = 300,
    *,
    noise: float = 0.0,
    seed: int = 1,
) -> None:
    """Steps of a machine with these terms: mixed batches of mixed contexts."""
    rng = random.Random(seed)
    for _ in range(steps):
        n = rng.randint(1, 64)
        context = sum(rng.randint(10, 3000) for _ in range(n))
        seconds = terms[0] + terms[1] * n + terms[2] * context
        cost.observe_step(n, context, 0, seconds * math.exp(rng.gauss(0, noise)))


def test_unknown_costs_are_optimistic():
    cost = CostModel()
    assert cost.capacity(8, 1000) == math.inf
    assert cost.step_s(8, 100) == 0
    assert cost.load_s(10) == cost.offload_s(10) == cost.prefill_s(10) == 0
    assert cost.step_terms() == (0, 0, 0)


@pytest.mark.parametrize(
    "terms", [(4e-3, 1e-4, 2e-7), (4e-3, 0.0, 2e-7), (4e-3, 1e-4, 0.0), (0.0, 1e-4, 2e-7)]
)
def test_it_recovers_the_three_terms(terms):
    cost = CostModel()
    observe(cost, terms)
    # In seconds of a typical step, where a term that is not there shows as next to nothing.
    typical = (1, 32, 48_000)
    found = [term * x for term, x in zip(cost.step_terms(), typical, strict=True)]
    expected = [term * x for term, x in zip(terms, typical, strict=True)]
    assert found == pytest.approx(expected, rel=3e-3, abs=1e-5)
    assert cost.step_s(20, 30_000) == pytest.approx(
        terms[0] + 20 * terms[1] + 30_000 * terms[2], rel=1e-3
    )


def test_noise_averages_out():
    cost = CostModel()
    observe(cost, (4e-3, 1e-4, 2e-7), noise=0.1)
    assert cost.step_s(32, 48_000) == pytest.approx(4e-3 + 3.2e-3 + 9.6e-3, rel=0.05)


def test_capacity_falls_with_the_context():
    cost = CostModel()
    observe(cost, (4e-3, 1e-4, 2e-7))
    assert cost.capacity(32, 100) == pytest.approx(32 / (4e-3 + 3.2e-3 + 32 * 2e-5), rel=0.01)
    assert cost.capacity(32, 3000) < cost.capacity(32, 100)


def test_collinear_data_still_predicts_what_was_seen():
    cost = CostModel()
    for i in range(200):
        # One context length only: sequences and context cannot be told apart.
        n = 1 + i % 16
        cost.observe_step(n, 500 * n, 0, 2e-3 + 3e-4 * n)
    for n in (1, 8, 16):
        assert cost.step_s(n, 500 * n) == pytest.approx(2e-3 + 3e-4 * n, rel=0.01)
    assert min(cost.step_terms()) >= 0


def test_one_batch_size_falls_to_the_fixed_part():
    cost = CostModel()
    for _ in range(10):
        cost.observe_step(8, 800, 0, 0.01)
    assert cost.step_s(8, 800) == pytest.approx(0.01)
    # What one situation costs says nothing of another one: the estimate stays finite and positive.
    assert 0 < cost.step_s(64, 6400) < 1


@pytest.mark.parametrize("steps", [4, 8, 16, 40, 200])
def test_noisy_steps_of_one_stream_say_nothing_against_a_full_device(steps):
    wrong = 0
    for seed in range(100):
        rng = random.Random(seed)
        cost = CostModel()
        spent_s = 0.0
        for i in range(steps):
            disturbed = rng.uniform(2, 10) if rng.random() < 0.02 else 1.0
            seconds = (2.3e-3 + 2e-7 * i) * rng.uniform(1, 1.5) * disturbed
            cost.observe_step(1, 111 + i, 0, seconds)
            spent_s += seconds
        wrong += cost.capacity(32, 400) < 1e3
        # And what was seen is predicted as it was.
        assert cost.step_s(1, 111 + steps / 2) == pytest.approx(spent_s / steps, rel=0.1)
    assert wrong <= 3


def test_the_first_step_counts_at_once():
    cost = CostModel()
    cost.observe_step(4, 100, 0, 0.02)
    assert cost.step_s(4, 100) == pytest.approx(0.02)


steps = st.tuples(st.integers(1, 512), st.integers(0, 500_000), st.floats(0, 10))


@given(st.lists(steps, min_size=1, max_size=60))
def test_no_price_is_ever_negative_or_undefined(observed):
    cost = CostModel()
    for n, context, seconds in observed:
        cost.observe_step(n, context, 0, seconds)
        assert all(0 <= term < math.inf for term in cost.step_terms())


def test_a_batch_that_gets_cheaper_gives_no_negative_price():
    cost = CostModel()
    for n, seconds in [(1, 0.01), (32, 0.002)] * 20:
        cost.observe_step(n, 100 * n, 0, seconds)
    assert min(cost.step_terms()) >= 0
    assert 0.002 < cost.step_s(64, 6400) < 0.01


def test_prefill_is_what_a_mixed_step_adds():
    cost = CostModel()
    observe(cost, (2e-3, 5e-4, 1e-7))
    base = cost.step_s(4, 4000)
    for _ in range(50):
        cost.observe_step(4, 4000, 100, base + 0.01)
    assert cost.prefill_s(100) == pytest.approx(0.01, rel=0.02)
    assert cost.step_s(4, 4000, 100) == pytest.approx(base + 0.01, rel=0.02)
    # And the mixed steps say nothing of decoding.
    assert cost.step_s(4, 4000) == base


def test_a_prefill_faster_than_its_decodes_costs_nothing():
    cost = CostModel()
    observe(cost, (2e-3, 5e-4, 1e-7))
    cost.observe_step(32, 32_000, 100, 1e-3)
    assert cost.prefill_s(100) == 0


def test_copies_cost_by_the_block_and_by_direction():
    cost = CostModel()
    cost.observe_load(10, 0.1)
    cost.observe_load(30, 0.7)
    cost.observe_offload(4, 2.0)
    # The many blocks of the second job weigh more than the few of the first.
    assert cost.load_s(40) == pytest.approx(0.8, rel=0.01)
    assert cost.offload_s(2) == pytest.approx(1.0)


def test_a_copy_of_nothing_is_no_division_by_zero():
    cost = CostModel()
    cost.observe_load(0, 0.5)
    assert cost.load_s(1) == 0.5


def test_it_forgets_an_old_machine():
    cost = CostModel()
    observe(cost, (0.1, 1e-3, 1e-6), 300)
    observe(cost, (4e-3, 1e-4, 2e-7), 2000)
    assert cost.step_s(20, 30_000) == pytest.approx(0.012, rel=0.05)
    for seconds in [1.0] * 100 + [0.1] * 1000:
        cost.observe_load(10, seconds)
    assert cost.load_s(10) == pytest.approx(0.1, rel=0.05)


def test_it_remembers_more_than_a_few_steps():
    cost = CostModel()
    observe(cost, (4e-3, 1e-4, 2e-7), 300)
    before = cost.step_s(32, 48_000)
    for _ in range(16):
        cost.observe_step(1, 100, 0, 4.1e-3)
    assert cost.step_s(32, 48_000) == pytest.approx(before, rel=0.02)
