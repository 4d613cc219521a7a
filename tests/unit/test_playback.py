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


class Reader:
    """The definition, token by token: a reader who takes each token in its turn."""

    def __init__(self, rate: float) -> None:
        self.rate, self.made, self.read, self.paused = rate, 0, 0, False
        self.ready_s: float | None = None
        """When it will have done with the token it is at; None = it has none."""
        self.left_s = 0.0
        """Of the token it is at, while paused."""

    def until(self, now: float) -> None:
        while not self.paused and self.read < self.made:
            if self.ready_s is not None and self.ready_s > now:
                return
            at = now if self.ready_s is None else self.ready_s
            self.read += 1
            self.ready_s = at + 1 / self.rate

    def arrive(self, now: float) -> None:
        self.until(now)
        self.made += 1
        if not self.paused and self.ready_s is not None and self.ready_s < now:
            self.ready_s = None  # it has waited, and takes this one at once
        self.until(now)

    def pause(self, now: float) -> None:
        self.until(now)
        if not self.paused:
            self.left_s = max(0.0, (self.ready_s or 0.0) - now) if self.made else 0.0
            self.paused = True

    def resume(self, now: float) -> None:
        if self.paused:
            self.paused = False
            self.ready_s = now + self.left_s if self.made else None
            self.until(now)

    def report(self, consumed: int, now: float) -> None:
        self.until(now)
        if consumed != self.read:
            self.read, self.left_s, self.ready_s = consumed, 1 / self.rate, now + 1 / self.rate


steps = st.lists(
    st.tuples(
        # Never two things at the same moment as a token's end: either order would be right.
        st.integers(1, 40).map(lambda n: n * 0.0137),
        st.sampled_from(["arrive", "arrive", "arrive", "pause", "resume", "report"]),
        st.integers(0, 100),
    ),
    max_size=40,
)


@given(st.sampled_from([3.0, 7.0, 19.0]), steps)
def test_pauses_and_reports_match_the_definition(rate, steps):
    playback, reader, now = Playback(rate), Reader(rate), 0.0
    for gap, what, share in steps:
        now += gap
        if what == "arrive":
            playback.generate(now)
            reader.arrive(now)
        elif what == "report":
            consumed = reader.made * share // 100
            playback.report(consumed, now)
            reader.report(consumed, now)
        else:
            getattr(playback, what)(now)
            getattr(reader, what)(now)
        reader.until(now)
        assert playback.paused == reader.paused
        assert playback.consumed(now) == reader.read
        assert playback.buffer(now) == reader.made - reader.read
        if reader.paused:
            assert playback.slack_s(now) == math.inf


def test_a_pause_is_no_stall_and_what_was_one_before_it_is_counted():
    playback = Playback(10)
    playback.generate(0.0)
    playback.pause(1.1)
    assert (playback.stalls, playback.stall_s) == (1, pytest.approx(1.0))
    playback.generate(5.0, 3)
    assert playback.buffer(9.0) == 3
    playback.set_rate(20, 9.0)
    playback.resume(10.0)
    playback.resume(10.0)
    assert playback.buffer(10.0) == 2
    assert playback.slack_s(10.0) == pytest.approx(3 / 20)
    assert playback.stalls == 1


def test_a_reader_that_pauses_before_the_first_token_begins_when_it_comes_back():
    playback = Playback(10)
    playback.pause(0.0)
    assert playback.slack_s(0.0) == math.inf
    playback.generate(1.0, 2)
    assert playback.buffer(1.0) == 2
    playback.resume(2.0)
    assert playback.buffer(2.0) == 1
    assert playback.stalls == 0


def test_more_than_there_is_cannot_have_been_consumed():
    playback = Playback(10)
    playback.generate(0.0, 2)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="2 tokens"):
            playback.report(wrong, 0.0)
