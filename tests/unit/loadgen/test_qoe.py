"""Others' measures of experience, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.loadgen.qoe import andes_qoe, fluidity_index, on_time_share

RATE, PERIOD, TTFT = 20.0, 0.05, 1.3
MEASURES = (andes_qoe, on_time_share, fluidity_index)


def paced(start: float, count: int = 100) -> list[float]:
    return [start + i * PERIOD for i in range(count)]


def test_the_hand_cases():
    stalled = paced(0.5, 50) + paced(0.5 + 50 * PERIOD + 2.0, 50)
    assert andes_qoe(paced(0.5), 0.0, RATE, TTFT) == pytest.approx(1.0)
    assert andes_qoe([0.5] * 100, 0.0, RATE, TTFT) == pytest.approx(1.0)
    # 1.2 of the 2 s are felt, by 50 tokens: 60 of 437.5 s.
    assert andes_qoe(stalled, 0.0, RATE, TTFT) == pytest.approx(1 - 60 / 437.5)
    # 3.7 s late, all of them: 370 of 747.5 s.
    assert andes_qoe(paced(5.0), 0.0, RATE, TTFT) == pytest.approx(1 - 370 / 747.5)


def test_times_count_from_the_asking():
    for measure in MEASURES:
        assert measure(paced(15.0), 10.0, RATE, TTFT) == pytest.approx(
            measure(paced(5.0), 0.0, RATE, TTFT)
        )


def test_tokens_on_time():
    assert on_time_share(paced(1.3), 0.0, RATE, TTFT) == 1.0
    assert on_time_share(paced(1.31), 0.0, RATE, TTFT) == 0.0
    assert on_time_share([0.1, 0.1, 1.5, 1.5], 0.0, RATE, TTFT) == 0.5


def test_deadlines_met_and_missed():
    assert fluidity_index(paced(1.3), 0.0, RATE, TTFT) == 1.0
    # The gap of 0.22 s is 0.17 s too long: 4 deadlines missed, 3 met by the other tokens.
    assert fluidity_index([1.3, 1.35, 1.57, 1.62], 0.0, RATE, TTFT) == pytest.approx(3 / 7)
    # What came early leaves slack.
    assert fluidity_index([0.5, 1.35, 1.4], 0.0, RATE, TTFT) == 1.0
    # A first token 0.1 s late has missed 3 deadlines: those at 0, 0.05 and 0.1 s after the limit.
    assert fluidity_index([1.4], 0.0, RATE, TTFT) == 0.0


def test_nothing_is_no_experience():
    for measure in MEASURES:
        assert measure([], 0.0, RATE, TTFT) == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=40).map(sorted), st.floats(0.0, 5.0))
def test_later_is_never_better(times, delay):
    for measure in (andes_qoe, on_time_share):
        now = measure(times, 0.0, RATE, TTFT)
        later = measure([at + delay for at in times], 0.0, RATE, TTFT)
        assert 0 <= later <= now + 1e-9 <= 1 + 2e-9
    assert 0 <= fluidity_index(times, 0.0, RATE, TTFT) <= 1
