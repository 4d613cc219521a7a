"""What the metrics say of readers' buffers."""

from __future__ import annotations

import pytest

from tests.support.engines import make_request
from tokenflow.replicas.buffers import BufferReport, take_buffers
from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.tracker import Tracker


def reading(name: str, tokens: int, rate: float = 10.0) -> Sequence:
    """A reader who got so many tokens at 100 s."""
    seq = Sequence(make_request(name, [1], 100, rate=rate), 16)
    if tokens:
        seq.playback.generate(100.0, tokens)
    return seq


def tracker_of(*seqs: Sequence) -> Tracker:
    tracker = Tracker()
    for seq in seqs:
        tracker.add(seq)
    tracker.refresh()
    return tracker


def test_buffers_are_counted_in_seconds_of_text():
    tracker = tracker_of(reading("a", 10), reading("b", 20), reading("c", 60, rate=20.0))
    report = take_buffers(tracker, 100.5)
    assert (report.readers, report.dry) == (3, 0)
    # 1, 2 and 3 s of text, half a second of it read.
    assert report.quantiles_s == pytest.approx((0.7, 1.5, 2.3))


def test_who_ran_out_is_dry_and_has_nothing():
    report = take_buffers(tracker_of(reading("a", 10), reading("b", 90)), 102.0)
    assert (report.readers, report.dry) == (2, 1)
    assert report.quantiles_s[1] == pytest.approx(3.5)


def test_only_those_who_read_are_counted():
    paused, elastic = reading("a", 10), reading("b", 10, rate=float("inf"))
    paused.playback.pause(100.1)
    assert take_buffers(tracker_of(paused, elastic, reading("c", 0)), 101.0) == BufferReport()
    assert take_buffers(Tracker(), 100.0) == BufferReport()
