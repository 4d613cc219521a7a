"""Intervals: against tabulated values, and against how often they are right."""

from __future__ import annotations

import random
from statistics import fmean

import numpy as np
import pytest

from tokenflow.loadgen.intervals import Interval, bootstrap, difference, mean, t95


def test_quantiles_are_those_of_the_table():
    assert (t95(1), t95(4), t95(30)) == (12.706, 2.776, 2.042)
    assert t95(4.9) == t95(4) and t95(1e9) == 1.960 and t95(31) == 1.960
    with pytest.raises(ValueError):
        t95(0.5)


def test_the_mean_of_repeats():
    # Deviation 1, five values: 2.776 / sqrt(5) each way.
    values = [9.0, 9.5, 10.0, 10.5, 11.0]
    found = mean(values)
    half = 2.776 * (0.625 / 5) ** 0.5
    assert (found.value, found.samples) == (10.0, 5)
    assert found.low == pytest.approx(10 - half) and found.high == pytest.approx(10 + half)


def test_one_repeat_says_nothing_of_noise():
    for found in (mean([3.0]), difference([1.0], [4.0], paired=True),
                  difference([1.0], [2.0, 6.0], paired=False)):  # fmt: skip
        assert found.value == 3.0 and found.low is found.high is None
        assert found.excludes_zero is None


def test_nothing_has_no_mean():
    with pytest.raises(ValueError):
        mean([])
    with pytest.raises(ValueError):
        difference([1.0], [1.0, 2.0], paired=True)


def test_what_the_workload_does_cancels_in_pairs():
    before, after = [10.0, 20.0, 30.0], [11.0, 21.1, 30.9]
    assert difference(before, after, paired=True).excludes_zero
    assert not difference(before, after, paired=False).excludes_zero


def test_equal_values_leave_no_doubt():
    assert difference([1.0, 1.0], [2.0, 2.0], paired=False) == Interval(1.0, 1.0, 1.0, 2)


@pytest.mark.parametrize("paired", [True, False])
def test_noise_is_called_a_change_in_one_of_twenty_cases(paired):
    rng = random.Random(5)
    wrong = 0
    for _ in range(2000):
        before = [rng.gauss(10, 2) for _ in range(5)]
        after = [rng.gauss(10, 2) for _ in range(5)]
        wrong += bool(difference(before, after, paired=paired).excludes_zero)
    assert 0.03 < wrong / 2000 < 0.07


def test_the_bootstrap_covers_the_difference():
    rng = random.Random(1)
    before = [rng.gauss(10, 2) for _ in range(200)]
    after = [rng.gauss(11, 2) for _ in range(200)]
    found = bootstrap(before, after)
    assert found.value == pytest.approx(fmean(after) - fmean(before))
    half = 1.96 * (4 / 200 + 4 / 200) ** 0.5
    assert found.low == pytest.approx(found.value - half, abs=0.06)
    assert found.high == pytest.approx(found.value + half, abs=0.06)
    assert bootstrap(before, after) == found
    assert bootstrap([1.0], [2.0]).low is None
    median = bootstrap(before, after, 50)
    assert median.value == pytest.approx(np.median(after) - np.median(before))
    assert median.low < median.value < median.high
    with pytest.raises(ValueError):
        bootstrap([], [1.0])
