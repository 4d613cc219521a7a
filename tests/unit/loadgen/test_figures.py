"""The figures of a run, each by hand."""

from __future__ import annotations

import json
import math

import pytest

from tokenflow.loadgen.catalogue import METRICS
from tokenflow.loadgen.figures import (
    Objectives,
    by_length,
    by_rate,
    figures,
    jain,
    stream_figures,
    timeline,
)
from tokenflow.loadgen.metrics import LEFT, StreamRecord

RATE, PERIOD = 20.0, 0.05
GOALS = Objectives()


def record(times, *, rate: float = RATE, intended: float = 0.0, **fields) -> StreamRecord:
    pairs = [item if isinstance(item, tuple) else (item, 1) for item in times]
    given = {"sent_s": intended, "finish_reason": "length"} | fields
    ends = {"finished_s": pairs[-1][0]} if pairs else {}
    return StreamRecord(rate, intended, arrivals=pairs, **ends | given)


def paced(start: float = 0.0, count: int = 100, period: float = PERIOD) -> list[float]:
    return [start + i * period for i in range(count)]


def failed(times=(), at: float = 9.0, **fields) -> StreamRecord:
    return record(times, finish_reason=None, error="cut", finished_s=at, **fields)


def test_every_figure_is_described_and_every_description_is_a_figure():
    assert list(figures([record(paced())], GOALS)) == list(METRICS)
    assert all(m.better in ("high", "low", "") and m.title for m in METRICS.values())


def test_a_stream_at_its_readers_pace():
    found = figures([record(paced(0.5))], GOALS)
    assert found["ttft_mean_s"] == found["ttft_p99_s"] == found["ttft_max_s"] == 0.5
    assert found["tpot_mean_s"] == pytest.approx(PERIOD)
    assert found["e2e_mean_s"] == pytest.approx(0.5 + 99 * PERIOD)
    assert found["effective_ratio"] == found["smooth_share"] == found["goodput_share"] == 1.0
    assert found["goodput_req_s"] == pytest.approx(1 / (0.5 + 99 * PERIOD))
    assert found["goodput_tok_s"] == pytest.approx(found["raw_tok_s"])
    assert found["qos_tok_s"] == pytest.approx((100 - 0.5) / (0.5 + 99 * PERIOD))
    assert found["generated_effective_tok_s"] is None and found["offered_req_s"] is None


def test_messages_are_no_tokens():
    found = figures([record([(0.5, 4), (0.7, 4), (1.2, 2)])], GOALS)
    assert found["tokens"] == 10
    assert found["tpot_mean_s"] == pytest.approx(0.7 / 9)
    assert found["chunk_gap_max_s"] == pytest.approx(0.5)
    assert found["chunk_gap_p50_s"] == pytest.approx(0.35)


def test_the_weights_of_qos_are_ones_own():
    goals = Objectives(qos_ttft_weight=2, qos_stall_weight=3)
    stalled = record(paced(0.5, 50) + paced(0.5 + 50 * PERIOD + 2, 50))
    found = figures([stalled], goals)
    assert found["stall_s"] == pytest.approx(2.0)
    assert found["qos_tok_s"] == pytest.approx((100 - 2 * 0.5 - 3 * 2) / (0.5 + 99 * PERIOD + 2))


def test_goodput_needs_all_objectives():
    late, dry, slow = record(paced(2.0)), record([0.5, 2.0]), record([0.5, 0.9], rate=2.0)
    goals = Objectives(ttft_s=1.3, stall_s=0.5, tpot_s=0.3)
    assert [stream_figures(r, 0, 9, goals).good for r in (late, dry, slow)] == [False] * 3
    easy = Objectives(ttft_s=2.0, stall_s=2.0, tpot_s=2.0)
    assert all(stream_figures(r, 0, 9, easy).good for r in (late, dry, slow))
    assert not stream_figures(failed(paced()), 0, 9, easy).good
    assert figures([late, record(paced())], goals)["goodput_share"] == 0.5


def test_errors_and_unfinished_requests_stay_in_the_denominators():
    runs = [record(paced(0.5)), failed(at=1.0), failed(paced(0.5, 10), at=8.0),
            StreamRecord(RATE, 0.0)]  # fmt: skip
    found = figures(runs, GOALS)
    assert (found["requests"], found["failed"], found["tokens"]) == (4, 3, 110)
    assert found["duration_s"] == 8.0
    assert found["ttft_mean_s"] == pytest.approx((0.5 + 8 + 0.5 + 8) / 4)
    assert found["ttft_slo_share"] == 0.5
    assert found["e2e_mean_s"] == pytest.approx((0.5 + 99 * PERIOD + 3 * 8) / 4)
    assert found["goodput_share"] == found["smooth_share"] - 0.25 == 0.25
    assert found["andes_qoe_mean"] == pytest.approx(0.25) and found["fluid_share"] == 0.25
    assert found["andes_qoe_p5"] == 0.0
    # Achieved over wanted: 5 s of reading in 5.5 s; 0; half a second in 8; 0.
    a, b = 5 / 5.5, 0.5 / 8
    assert found["fairness"] == pytest.approx((a + b) ** 2 / (4 * (a * a + b * b)))


def test_who_left_on_purpose_is_no_failure():
    found = figures([record(paced(0.5, 10), finish_reason=LEFT)], GOALS)
    assert (found["failed"], found["left"], found["goodput_share"]) == (0, 1, 1.0)


def test_a_server_that_holds_tokens_back_gains_at_the_client_only():
    held = record(paced(0.5), generated=[1000.0] * 100)
    found = figures([held], GOALS)
    assert found["effective_ratio"] == 1.0
    assert found["generated_effective_ratio"] == pytest.approx(0.155)
    assert found["generated_effective_tok_s"] == pytest.approx(15.5 / (0.5 + 99 * PERIOD))


def test_one_stream_without_times_leaves_no_figure_of_the_server():
    told = record(paced(0.5), generated=paced(3.0))
    assert figures([told], GOALS)["generated_effective_ratio"] == 1.0
    assert figures([told, record(paced(0.5))], GOALS)["generated_effective_tok_s"] is None


def test_the_servers_clock_may_be_any():
    """The least delayed token tells how far the clocks are apart."""
    early = record([0.6, 0.9, 0.9, 1.0], generated=[5000.5, 5000.55, 5000.6, 5000.9])
    assert early.generated_effective_tokens == pytest.approx(
        record([0.6, 0.65, 0.7, 1.0]).effective_tokens
    )


def test_without_readers_there_is_nothing_to_run_dry():
    agent = record([(0.5, 50), (3.0, 50)], rate=math.inf)
    found = figures([agent], GOALS)
    for name in ("stall_s", "stall_mean_s", "stalls", "andes_qoe_mean", "andes_qoe_p5",
                 "fairness", "smooth_share", "fluid_share", "on_time_share"):  # fmt: skip
        assert found[name] is None, name
    assert found["effective_ratio"] == 1.0
    mixed = figures([agent, record([0.5, 2.55])], GOALS)
    assert mixed["stall_s"] == pytest.approx(2.0) and mixed["stalled_readers"] == 1


def test_a_pause_of_the_client_is_not_the_servers_fault():
    slept = record([*paced(0.5, 10), (4.0, 80), *paced(4.05, 10)], pauses=[(0.5 + 9 * PERIOD, 3.0)])
    found = figures([slept], GOALS)
    assert found["stall_s"] == pytest.approx(0.0, abs=1e-9)
    awake = record([*paced(0.5, 10), (4.0, 80), *paced(4.05, 10)])
    assert figures([awake], GOALS)["stall_s"] == pytest.approx(3.0)


def test_a_reader_who_speeds_up_needs_more():
    times = paced(0.5, 40)
    assert figures([record(times)], GOALS)["stall_s"] == pytest.approx(0, abs=1e-9)
    # From 1.01 s on it wants a token every 0.04 s and gets one every 0.05 s.
    faster = record(times, rate_changes=[(1.01, 25.0)])
    assert figures([faster], GOALS)["stall_s"] == pytest.approx(29 * 0.01)
    slower = record([0.5] * 40, rate_changes=[(0.5, 10.0)])
    assert slower.playback().due_s == pytest.approx(0.5 + 40 * 0.1)


def test_the_generators_own_delay_is_part_of_the_wait():
    late = record(paced(1.0), sent_s=0.25)
    found = figures([late], GOALS)
    assert found["ttft_mean_s"] == 1.0 and found["ttft_sent_mean_s"] == 0.75
    assert found["lag_p50_s"] == found["lag_max_s"] == 0.25


def test_parts_are_of_the_same_run():
    runs = [record(paced(count=10)), record(paced()), record(paced(count=400, period=0.02)),
            record(paced(count=31), rate=math.inf), failed()]  # fmt: skip
    lengths = by_length(runs, GOALS)
    assert list(lengths) == ["under 32", "32-256", "over 256"]
    assert [part["requests"] for part in lengths.values()] == [2, 1, 1]
    whole = figures(runs, GOALS)
    assert {part["duration_s"] for part in lengths.values()} == {whole["duration_s"]}
    assert sum(part["raw_tok_s"] for part in lengths.values()) == pytest.approx(whole["raw_tok_s"])
    rates = by_rate(runs, GOALS)
    assert {name: part["requests"] for name, part in rates.items()} == {
        "20 tok/s": 4, "no reader": 1
    }  # fmt: skip


def test_fairness():
    assert jain([0.5, 0.5, 0.5]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError):
        jain([])


def test_a_run_over_time():
    runs = [record([1.0, 2.0, 9.95], intended=0.0), record([(6.0, 5)], intended=4.9),
            record([10.0], intended=8.9)]  # fmt: skip
    line = timeline(runs, bins=10)
    assert line["at_s"] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    # At 5 s the second has just come; at 9 s the third.
    assert line["waiting"] == [0, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert line["streaming"] == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert line["dry"][4] == 1 and line["dry"][9] == 0
    assert sum(line["arrivals_per_s"]) == 3 and sum(line["tokens_per_s"]) == 9


def test_figures_are_plain_numbers():
    text = json.dumps(figures([record(paced())], GOALS), allow_nan=False)
    assert json.loads(text)["tokens"] == 100
    with pytest.raises(ValueError):
        figures([], GOALS)
