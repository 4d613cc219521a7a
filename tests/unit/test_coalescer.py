"""Coalescing saves messages and never costs a reader anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.cluster.coalescer import StreamCoalescer
from tokenflow.replicas.scheduler.playback import Playback


def deliver(times: list[float], rate: float, **settings: float) -> list[tuple[float, list[float]]]:
    """(send time, generation times in the message) for tokens generated at `times`."""
    coalescer = StreamCoalescer(rate, **settings)
    messages: list[tuple[float, list[float]]] = []
    held: list[float] = []

    def flush(now: float) -> None:
        messages.append((now, list(held)))
        held.clear()
        coalescer.sent(now)

    for i, at in enumerate(times):
        coalescer.add(1, at)
        held.append(at)
        following = times[i + 1] if i + 1 < len(times) else float("inf")
        while held:
            due = coalescer.next_due(at)
            assert due is not None
            when = max(due, at)
            if when >= following:
                break
            flush(when)
    return messages


arrivals = st.lists(st.one_of(st.floats(0, 0.02), st.floats(0, 2)), min_size=1, max_size=80).map(
    lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
)


@given(arrivals, st.floats(0.5, 60))
def test_no_reader_stalls_because_of_it(times, rate):
    plain, delayed = Playback(rate), Playback(rate)
    for at in times:
        plain.generate(at)
    messages = deliver(times, rate)
    for at, tokens in messages:
        delayed.generate(at, len(tokens))
    assert delayed.generated == len(times)
    assert delayed.stall_s <= plain.stall_s + 1e-6


@given(arrivals, st.floats(0.5, 60), st.floats(0, 1))
def test_no_token_is_held_longer_than_the_limit(times, rate, limit):
    for at, tokens in deliver(times, rate, max_delay_s=limit):
        assert at - min(tokens) <= limit + 1e-9


def test_the_first_token_goes_at_once():
    coalescer = StreamCoalescer(20)
    assert not coalescer.due(5.0)
    coalescer.add(1, 5.0)
    assert coalescer.due(5.0)


def test_far_ahead_of_the_reader_messages_are_few():
    times = [i / 500 for i in range(1000)]  # 500 tokens/s for 2 s
    messages = deliver(times, 20, max_delay_s=0.25)
    assert len(messages) <= 2 / 0.25 + 8


def test_at_the_readers_own_pace_every_token_travels_alone():
    times = [i / 20 for i in range(100)]
    assert len(deliver(times, 20)) == 100


def test_zero_delay_turns_it_off():
    times = [i / 500 for i in range(100)]
    assert len(deliver(times, 20, max_delay_s=0)) == 100


@given(arrivals, st.floats(0, 1))
def test_without_a_reader_a_message_comes_a_moment_after_the_one_before(times, limit):
    last, delay = -math.inf, min(limit, 0.1)
    for at, tokens in deliver(times, math.inf, max_delay_s=limit):
        assert at == pytest.approx(max(tokens[0], last + delay))
        last = at


def test_what_came_meanwhile_travels_together():
    coalescer = StreamCoalescer(math.inf)
    assert coalescer.next_due(1.0) is None
    coalescer.add(3, 1.0)
    coalescer.add(2, 1.5)
    assert coalescer.pending == 5 and coalescer.due(1.5)
    coalescer.sent(1.5)
    assert coalescer.pending == 0 and coalescer.next_due(2.0) is None


@pytest.mark.parametrize("rate", [0, -1, -math.inf, math.nan])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(ValueError):
        StreamCoalescer(rate)


def test_nothing_pending_is_never_due():
    coalescer = StreamCoalescer(20)
    coalescer.add(3, 1.0)
    coalescer.sent(1.0)
    assert coalescer.next_due(9.0) is None
    assert coalescer.pending == 0
