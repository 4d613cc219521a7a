"""The token buffer against its own definition, token by token."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.replicas.scheduler.playback import (
    Playback,
    buffers_at_generation,
    effective_tokens,
    token_weight,
)


def consumption(times: list[float], rate: float) -> list[float]:
    out: list[float] = []
    for at in times:
        out.append(at if not out else max(at, out[-1] + 1 / rate))
    return out


arrivals = st.lists(st.floats(0, 2), min_size=1, max_size=60).map(
    lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
)


@given(arrivals, st.floats(0.5, 50), st.floats(0, 5))
def test_buffer_and_stall_match_the_definition(times, rate, after):
    playback = Playback(rate)
    for at in times:
        playback.generate(at)
    consumed_at = consumption(times, rate)
    now = times[-1] + after
    # A token consumed at exactly `now` may fall on either side of rounding.
    low = sum(c > now + 1e-6 for c in consumed_at)
    high = sum(c > now - 1e-6 for c in consumed_at)
    assert low <= playback.buffer(now) <= high
    stall = sum(max(0.0, a - (c + 1 / rate)) for a, c in zip(times[1:], consumed_at, strict=False))
    assert playback.stall_s == pytest.approx(stall, abs=1e-6)
    assert playback.slack_s(now) == pytest.approx(consumed_at[-1] + 1 / rate - now, abs=1e-6)


def test_before_the_first_token_the_reader_is_infinitely_late():
    assert Playback(10).slack_s(5.0) == -math.inf
    assert Playback(10).buffer(5.0) == 0


def test_changing_the_rate_rereads_the_buffer_at_the_new_speed():
    playback = Playback(10)
    playback.generate(0.0, 21)
    assert playback.buffer(1.0) == 10
    playback.set_rate(20, 1.0)
    assert playback.buffer(1.0) == 10 * 2 // 2
    assert playback.slack_s(1.0) == pytest.approx(0.5 + 1 / 20)


def test_rate_must_be_positive():
    with pytest.raises(ValueError):
        Playback(0)


@pytest.mark.parametrize(
    ("buffer", "weight"), [(0, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (50, 0.0)]
)
def test_token_weight(buffer, weight):
    assert token_weight(buffer, 100) == pytest.approx(weight)


def test_effective_tokens_of_known_streams():
    exact = [i / 20 for i in range(100)]
    assert effective_tokens(buffers_at_generation(exact, 20)) == 100
    at_once = [0.0] * 100
    # Buffers 0..99 just after each token: 11 at full weight, then 0.9 ... 0.1.
    assert effective_tokens(buffers_at_generation(at_once, 20)) == pytest.approx(15.5)
