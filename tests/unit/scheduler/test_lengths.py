"""How long outputs are expected to be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tokenflow.replicas.scheduler.lengths import OutputLengths


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def told(lengths, *, ended: bool = True) -> OutputLengths:
    made = OutputLengths()
    for length in lengths:
        made.observe(length, ended=ended)
    return made


def test_without_experience_the_limit_is_what_is_known():
    limit = ints(100, 4096)
    assert OutputLengths().expected(limit, ints(0, 7)) is limit


def test_outputs_that_are_cut_off_say_nothing_of_their_length():
    # All ran into their limits, or their clients left: they would have been longer.
    limit = ints(100, 4096)
    assert told([100] * 50, ended=False).expected(limit, ints(0, 7)) is limit


def test_the_mean_of_what_ended_is_expected():
    rng = random.Random(1)
    lengths = told([max(1, round(rng.gauss(500, 100))) for _ in range(400)])
    assert lengths.expected(ints(8192), ints(0))[0] == pytest.approx(500, rel=0.15)


def test_who_has_outlived_the_others_has_little_left_and_never_less_than_a_token():
    lengths = told([100, 200, 300, 400] * 25)
    had = ints(0, 150, 250, 350)
    expected = lengths.expected(np.full(4, 4096), had)
    assert (np.diff(expected) > 0).all()
    assert (expected >= had + 1).all()
    assert expected[2] - 250 < 150


def test_beyond_all_experience_the_limit_is_expected_again():
    lengths = told([100] * 100)
    assert lengths.expected(ints(4096), ints(200))[0] == pytest.approx(4096, rel=0.01)


def test_nobody_is_expected_to_pass_the_limit():
    lengths = told([1000] * 100)
    assert lengths.expected(ints(10, 400), ints(9, 399)).tolist() == [10, 400]


def test_those_that_still_run_count_as_at_least_so_long():
    # Of a burst the shortest end first; the others have already had more.
    short = [100] * 20
    alone = told(short).expected(ints(4096), ints(0))[0]
    beside = told(short).expected(np.full(81, 4096), np.array([0] + [900] * 80))[0]
    assert beside > 5 * alone


def test_old_outputs_are_forgotten():
    lengths = told([1000] * 500 + [100] * 2000)
    assert lengths.expected(ints(8192), ints(0))[0] == pytest.approx(100, rel=0.2)


def test_cut_off_outputs_weigh_by_how_long_they_were():
    # Half are cut off at 50 of what would have been 100.
    half = OutputLengths()
    for _ in range(100):
        half.observe(100, ended=True)
        half.observe(50, ended=False)
    assert half.expected(ints(4096), ints(0))[0] == pytest.approx(100, rel=0.25)


def test_prompts_count_for_each_output_token():
    lengths = OutputLengths()
    assert lengths.prompts_per_output == 0.0
    lengths.observe(10, ended=True, prompt_tokens=40)
    lengths.observe(30, ended=False)
    assert lengths.prompts_per_output == pytest.approx(1.0, rel=0.02)
