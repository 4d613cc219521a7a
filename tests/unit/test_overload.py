"""What an engine reports of its load to who moves requests."""

import math

import pytest

from tests.support.engines import fake_engine, make_request
from tokenflow.replicas import overload
from tokenflow.replicas.request import State


def loaded(n, *, rate=10.0, blocks=64, max_tokens=40, **options):
    """An engine that has run for a while with `n` requests of 12 prompt tokens; one step takes
    0.05 s, so about 20 steps/s."""
    engine, executor, _, clock = fake_engine(blocks=blocks, tick=0.0, **options)
    execute = executor.execute

    def slow(batch):
        clock.now += 0.05
        return execute(batch)

    executor.execute = slow
    for i in range(n):
        engine.add(make_request(f"r{i}", [i + 1] * 12, max_tokens, rate=rate, arrival_s=100.0 + i))
    for _ in range(25):
        engine.step()
    return engine, clock


def test_an_engine_with_room_would_keep_everybody():
    engine, _ = loaded(2)
    report = engine.overload
    assert report.movable == ()
    assert report.rate == 20.0
    assert report.prefill_s > 0
    assert report.capacity > 40, "full of them it makes many times what one gets"
    # Each of the two will hold 52 tokens of the 256 that there is memory for.
    assert report.room_tokens == pytest.approx(64 * 4 - 2 * 52, abs=2)


def test_who_is_off_the_device_and_beyond_the_capacity_may_leave():
    engine, _ = loaded(12, rate=20.0)
    report = engine.overload
    assert engine.stats.now_overloaded
    off = {
        seq.request_id
        for seq in engine.tracker.sequences
        if seq.state in (State.WAITING, State.PREEMPTED)
    }
    names = [m.request_id for m in report.movable]
    assert names and set(names) <= off
    assert "r0" not in names, "who came first is promised its rate"
    assert report.room_tokens < 0
    for movable in report.movable:
        assert movable.rate == 20.0
        assert movable.need_tokens >= movable.kv_tokens >= 12
        assert movable.buffer_s >= 0 and movable.wait_s > 0
    short = [m.wait_s - m.buffer_s for m in report.movable]
    assert short == sorted(short, reverse=True)


def test_without_a_reader_one_counts_little_and_waits_for_memory():
    engine, _ = loaded(12, rate=math.inf, max_num_seqs=4)
    report = engine.overload
    assert report.rate == 12 * overload.ELASTIC_RATE
    assert report.movable
    assert {m.buffer_s for m in report.movable} == {0.0}
    assert {m.rate for m in report.movable} == {overload.ELASTIC_RATE}


def test_the_list_is_bounded(monkeypatch):
    monkeypatch.setattr(overload, "MOST_MOVABLE", 3)
    engine, _ = loaded(12, rate=20.0)
    assert len(engine.overload.movable) == 3


def test_an_idle_engine_remembers_what_it_can_do():
    engine, clock = loaded(2)
    capacity = engine.overload.capacity
    for i in range(2):
        engine.cancel(f"r{i}")
    clock.now += 1.0
    engine.refresh_stats()
    report = engine.overload
    assert (report.rate, report.room_tokens, report.movable) == (0.0, 256, ())
    assert report.capacity == pytest.approx(capacity, rel=0.5)
    assert report.capacity > 0
