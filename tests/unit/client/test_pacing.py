"""The pacer hands out tokens when the one definition of a reader's buffer says they are read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.client.pacing import Pacer
from tokenflow.client.types import Chunk
from tokenflow.replicas.scheduler.playback import Playback


def chunk(offset: int, count: int) -> Chunk:
    ids = tuple(range(offset, offset + count))
    return Chunk("ab" * count, ids, offset, tuple(float(i) for i in ids))


def read(arrivals: list[tuple[float, int]], rate: float) -> tuple[list[float], Pacer]:
    """When each token is taken by somebody who always comes in time."""
    pacer = Pacer(rate)
    taken: list[float] = []
    offset = 0
    for i, (at, count) in enumerate(arrivals):
        pacer.add(chunk(offset, count), at)
        offset += count
        until = arrivals[i + 1][0] if i + 1 < len(arrivals) else math.inf
        while (due := pacer.next_at()) is not None and due < until:
            assert pacer.take().offset == len(taken)
            taken.append(max(due, at))
    return taken, pacer


arrivals = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 9)), min_size=1, max_size=30).map(
    lambda gaps: [(sum(g for g, _ in gaps[: i + 1]), n) for i, (_, n) in enumerate(gaps)]
)


@given(arrivals, st.floats(0.5, 60))
def test_tokens_are_taken_when_playback_consumes_them(times, rate):
    taken, pacer = read(times, rate)
    playback = Playback(rate)
    expected: list[float] = []
    for at, count in times:
        for _ in range(count):
            expected.append(max(at, expected[-1] + 1 / rate) if expected else at)
        playback.generate(at, count)
    assert taken == pytest.approx(expected)
    assert pacer.taken == len(expected)
    assert (pacer.stalls, pacer.stall_s) == (playback.stalls, pytest.approx(playback.stall_s))


def test_without_a_reader_nothing_waits():
    taken, _ = read([(0.0, 3), (0.5, 2)], math.inf)
    assert taken == [0.0, 0.0, 0.0, 0.5, 0.5]


def test_another_rate_holds_from_then_on():
    pacer = Pacer(10)
    pacer.add(chunk(0, 5), 100.0)
    pacer.take()
    pacer.take()  # read at 100.1
    pacer.set_rate(1, 100.1)
    assert pacer.next_at() == pytest.approx(101.1)
    pacer.take()
    pacer.set_rate(math.inf, 101.1)
    assert pacer.next_at() == -math.inf
    pacer.set_rate(2, 102.0)
    assert pacer.next_at() == 102.0
    pacer.take()
    assert pacer.next_at() == pytest.approx(102.5)


def test_a_pause_shifts_what_is_left():
    pacer = Pacer(10)
    pacer.add(chunk(0, 3), 0.0)
    pacer.take()
    pacer.pause()
    pacer.add(chunk(3, 1), 0.5)
    pacer.set_rate(5, 0.6)
    assert pacer.next_at() is None and pacer.waiting == 3
    pacer.resume(50.0)
    taken = []
    while (at := pacer.next_at()) is not None:
        taken.append(at)
        pacer.take()
    assert taken == pytest.approx([50.0, 50.2, 50.4])
    assert pacer.stalls == 0


def test_the_text_of_a_message_is_divided_and_nothing_of_it_lost():
    whole = Chunk("abcdefg", (1, 2, 3), 5, (0.1, 0.2, 0.3))
    tokens = list(whole.tokens())
    assert "".join(token.text for token in tokens) == "abcdefg"
    assert [(t.token_id, t.offset, t.generated_at) for t in tokens] == [
        (1, 5, 0.1),
        (2, 6, 0.2),
        (3, 7, 0.3),
    ]
