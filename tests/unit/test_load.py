"""What an engine reports of its load."""

from __future__ import annotations

import math
import pickle

import pytest

from tests.support.engines import fake_engine, make_request
from tokenflow.cluster.placing import ask_of, place
from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.wire import LoadNews, Submission, pack, unpack
from tokenflow.replicas.load import INTERVAL_S, LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


def run(engine) -> None:
    while engine.has_work:
        if not engine.step():
            engine.wait_for_transfers(0.01)


def test_a_report_tells_what_is_queued_asked_for_and_still_to_be_made():
    engine, _, _, _ = fake_engine(blocks=64, block_size=4, max_batch_tokens=16, host_slots=100)
    engine.add(make_request("a", [1] * 20, 30, rate=10.0))
    engine.add(make_request("b", [2] * 20, 30, rate=math.inf))
    engine.step()
    load = engine.load
    assert (load.requests, load.active) == (2, 2)
    assert load.queued_tokens == 40 - engine.stats.prompt_tokens
    assert load.rate == 11.0
    assert load.remaining_tokens == 60 and load.kv_tokens == 100
    assert load.memory_tokens == (64 + 100) * 4
    assert load.free_tokens == engine.stats.now_free_blocks * 4


def test_what_was_measured_is_still_known_when_the_engine_is_idle():
    engine, _, _, _ = fake_engine()
    assert engine.load.capacity == 0.0
    for i in range(8):
        engine.add(make_request(f"{i}", [1 + i] * 40, 20))
    run(engine)
    load = engine.load
    assert (load.active, load.queued_tokens, load.remaining_tokens, load.rate) == (0, 0, 0, 0.0)
    assert load.requests == 8
    assert load.capacity > 0 and load.prefill_s > 0


def test_the_prefill_speed_is_that_of_a_clock_on_the_wall():
    engine, _, _, clock = fake_engine(max_batch_tokens=32, tick=0.0)
    for i in range(6):
        engine.add(make_request(f"{i}", [1 + i] * 60, 40))
    while engine.load.queued_tokens or engine.load.number < 3:
        before = engine.stats.prompt_tokens
        engine.step()
        clock.now += 0.1 if engine.stats.prompt_tokens > before else 0.0
    assert engine.load.prefill_s == pytest.approx(0.1 / 32, rel=0.2)


def test_what_lies_between_two_steps_is_part_of_what_a_token_costs():
    engine, _, _, clock = fake_engine(tick=0.0)
    engine.add(make_request("a", [1] * 8, 40))
    for _ in range(20):
        engine.step()
        clock.now += 0.1  # handing out, what other threads do
    assert engine.cost.step_s(1, 20) == pytest.approx(0.1, rel=0.1)
    engine.cancel("a")
    clock.now += 1000.0  # nothing to do
    engine.add(make_request("b", [1] * 8, 3))
    run(engine)
    assert engine.cost.prefill_s(8) < 1.0


def test_reports_are_some_time_apart():
    engine, _, _, clock = fake_engine(tick=0.0)
    engine.add(make_request("a", [1] * 8, 40))
    engine.step()
    number = engine.load.number
    engine.step()
    assert engine.load.number == number
    clock.now += INTERVAL_S
    engine.step()
    assert engine.load.number == number + 1


def test_a_report_is_small_on_the_wire_and_comes_out_as_it_went_in():
    report = LoadReport(number=123456, requests=99999, rate=1234.5678, capacity=2e4, prefill_s=1e-4)
    again = LoadReport.from_wire(pickle.loads(pickle.dumps(report.to_wire())))
    assert again.number == 123456 and again.requests == 99999
    assert again.rate == 1230.0 and again.prefill_s == 1e-4
    assert LoadReport.from_wire(again.to_wire()) == again
    assert len(pickle.dumps(report.to_wire())) < 150
    with pytest.raises(TypeError, match="16 values, got 3"):
        LoadReport.from_wire((1, 2, 3))


def test_a_frame_carries_the_load_before_its_events():
    events = [TokenEvent("r", 0, 5, "x", 1.0, None, None)]
    news = LoadNews(LoadReport(number=4), ("r",))
    assert unpack(pack(events, news=news)) == (events, [], news)
    assert unpack(pack(events)) == (events, [], None)
    assert unpack([]) == ([], [], None)


def test_what_a_submission_asks_for():
    first = Submission("x#1", "i", (1,) * 200, SamplingParams(max_tokens=50), math.inf)
    ask = ask_of(first)
    assert (ask.prompt_tokens, ask.output_tokens, ask.rate, ask.kv_node) == (200, 50, 1.0, "")
    moved = Submission(
        "x#2",
        "i",
        (1,) * 200,
        SamplingParams(max_tokens=50),
        20.0,
        resumed_ids=(3,) * 10,
        kv_source="n",
    )
    ask = ask_of(moved)
    assert (ask.prompt_tokens, ask.output_tokens, ask.rate) == (210, 40, 20.0)
    assert (ask.kv_node, ask.kv_tokens) == ("n", 210)


def test_a_stream_that_lost_its_replica_goes_where_its_kv_is():
    registry = ReplicaRegistry()
    registry.update({"a": "n1", "b": "n2", "c": "n2"})
    for name in "abc":
        registry.report(name, LoadReport(number=1, prefill_s=1e-3, load_s=1e-5, capacity=100.0))
    for i in range(4):
        moved = Submission(
            f"x{i}", "i", (i,) * 500, SamplingParams(max_tokens=5), 20.0, kv_source="n1"
        )
        assert place(moved, "abc", registry)[0] == "a"
        registry.finish(f"x{i}")
