"""The online cost model finds the line behind the steps it sees."""

import math

import pytest

from tokenflow.replicas.scheduler.cost import CostModel


def test_unknown_costs_are_optimistic():
    cost = CostModel()
    assert cost.capacity(8) == math.inf
    assert cost.step_s(8, 100) == 0
    assert cost.load_s(10) == 0


def test_it_learns_the_line_of_decode_steps():
    cost = CostModel()
    for i in range(200):
        n = 1 + i % 32
        cost.observe_step(n, 0, 0.004 + 0.0001 * n)
    assert cost.step_s(20, 0) == pytest.approx(0.006, rel=0.01)
    assert cost.capacity(32) == pytest.approx(32 / 0.0072, rel=0.01)


def test_one_batch_size_does_not_divide_by_zero():
    cost = CostModel()
    for _ in range(10):
        cost.observe_step(8, 0, 0.01)
    assert cost.step_s(8, 0) == pytest.approx(0.01)
    assert cost.step_s(64, 0) == pytest.approx(0.01)


def test_prefill_is_what_a_mixed_step_adds():
    cost = CostModel()
    for i in range(100):
        cost.observe_step(1 + i % 8, 0, 0.002 + 0.0005 * (1 + i % 8))
    for _ in range(50):
        cost.observe_step(4, 100, 0.004 + 0.01)
    assert cost.prefill_s(100) == pytest.approx(0.01, rel=0.02)


def test_it_forgets_an_old_machine():
    cost = CostModel()
    for _ in range(100):
        cost.observe_load(10, 1.0)
    for _ in range(1000):
        cost.observe_load(10, 0.1)
    assert cost.load_s(10) == pytest.approx(0.1, rel=0.05)


def test_noise_never_gives_a_negative_price():
    cost = CostModel()
    for n, t in [(1, 0.01), (32, 0.002)] * 20:
        cost.observe_step(n, 0, t)
    assert cost.step_s(64, 0) > 0
    assert cost.step_s(0, 0) >= 0
