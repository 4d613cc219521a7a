"""The figures of a run, by hand for cases whose answer is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow.loadgen.metrics import StreamRecord, percentile, summarize

RATE = 20.0
PERIOD = 1 / RATE
LENGTH = 100


def record(arrivals, *, intended: float = 0.0, **fields) -> StreamRecord:
    """A finished stream; `arrivals` are times of single tokens or (time, tokens)."""
    pairs = [item if isinstance(item, tuple) else (item, 1) for item in arrivals]
    given = {"sent_s": intended, "finish_reason": "length"} | fields
    return StreamRecord(
        RATE, intended, arrivals=pairs, **({"finished_s": pairs[-1][0]} if pairs else {}) | given
    )


def effective(found) -> float:
    return found.effective_tok_s * found.duration_s


def paced(start: float = 0.0, count: int = LENGTH) -> list[float]:
    return [start + i * PERIOD for i in range(count)]


def test_at_the_readers_pace_every_token_counts_in_full():
    found = summarize([record(paced())])
    assert effective(found) == pytest.approx(100)
    assert (found.requests, found.failed, found.tokens) == (1, 0, 100)
    assert found.duration_s == pytest.approx(99 * PERIOD)
    assert found.raw_tok_s == pytest.approx(100 / (99 * PERIOD))
    assert (found.ttft_mean_s, found.ttft_max_s) == (0.0, 0.0)
    assert found.stall_s == pytest.approx(0, abs=1e-9)
    assert (found.stalls, found.stalled_readers) == (0, 0)


def test_all_at_once_only_what_is_soon_read_counts():
    for arrivals in ([0.0] * LENGTH, [(0.0, LENGTH)], [(0.0, 60), (0.0, 40)]):
        found = summarize([record(arrivals, finished_s=1.0)])
        assert effective(found) == pytest.approx(15.5)
        assert found.stalls == 0


def test_a_stall_costs_the_reader_time_and_no_tokens():
    found = summarize([record(paced(count=50) + paced(start=50 * PERIOD + 2.0, count=50))])
    assert effective(found) == pytest.approx(100)
    assert found.stall_s == pytest.approx(2.0)
    assert (found.stalls, found.stalled_readers) == (1, 1)


def test_a_late_start_is_ttft_and_no_stall():
    found = summarize([record(paced(start=5.0))])
    assert effective(found) == pytest.approx(100)
    assert (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p99_s) == (5.0, 5.0, 5.0)
    assert (found.stall_s, found.stalls) == (pytest.approx(0, abs=1e-9), 0)
    assert found.duration_s == pytest.approx(5 + 99 * PERIOD)


def test_two_stalls_of_one_reader_are_one_stalled_reader():
    times = [*paced(count=3), *paced(start=2.0, count=3), *paced(start=4.0, count=3)]
    found = summarize([record(times), record(paced())])
    assert (found.stalls, found.stalled_readers) == (2, 1)
    assert found.stall_s == pytest.approx(2 * (2.0 - 3 * PERIOD))


def test_delays_of_the_generator_count_against_the_server():
    late = record(paced(start=3.0), sent_s=2.0)
    prompt = record(paced(start=1.0), sent_s=0.25)
    unsent = StreamRecord(RATE, 0.0)
    found = summarize([late, prompt, unsent])
    assert found.ttft_max_s == pytest.approx(3 + 99 * PERIOD)
    assert found.ttft_p50_s == 3.0
    assert found.dispatch_lag_max_s == 2.0
    assert summarize([unsent]).dispatch_lag_max_s == 0.0


def test_failed_and_unfinished_requests_count_in_the_denominator():
    good = record([10.0, 10.1], intended=8.0)
    cut = record([9.0], intended=8.0, finish_reason=None, error="cut", finished_s=9.0)
    refused = record([], intended=8.0, finish_reason=None, error="HTTP 429", finished_s=8.2)
    silent = StreamRecord(RATE, 8.0, sent_s=8.0)
    found = summarize([good, cut, refused, silent])
    assert (found.requests, found.failed) == (4, 3)
    assert found.tokens == 3
    assert found.duration_s == pytest.approx(2.1)
    assert found.ttft_mean_s == pytest.approx((2.0 + 1.0 + 2.1 + 2.1) / 4)
    assert found.ttft_max_s == pytest.approx(2.1)
    assert found.raw_tok_s == pytest.approx(3 / 2.1)


def test_a_request_that_waited_longest_and_failed_waits_until_its_end():
    refused = record([], finish_reason=None, error="timeout", finished_s=60.0)
    found = summarize([record(paced()), refused])
    assert found.ttft_max_s == 60.0
    assert found.duration_s == 60.0


def test_nothing_ever_came():
    found = summarize([StreamRecord(RATE, 5.0)])
    assert (found.tokens, found.failed) == (0, 1)
    assert found.raw_tok_s == found.effective_tok_s == 0.0


def test_no_requests_have_no_figures():
    with pytest.raises(ValueError):
        summarize([])
    with pytest.raises(ValueError):
        percentile([], 50)


def test_a_record_knows_its_state():
    fresh = StreamRecord(RATE, 1.0)
    assert (fresh.tokens, fresh.first_token_s, fresh.ok) == (0, None, False)
    done = record([(2.0, 3), (2.5, 1)], intended=1.0)
    assert (done.tokens, done.first_token_s, done.ok) == (4, 2.0, True)
    assert done.token_times() == [2.0, 2.0, 2.0, 2.5]
    assert not record([2.0], error="cut").ok
    assert not record([2.0], finish_reason=None).ok


def test_playback_up_to_a_moment():
    stream = record([(1.0, 2), (2.0, 5)])
    assert stream.playback(0.5).generated == 0
    assert stream.playback(1.0).generated == 2
    assert stream.playback(1.0).buffer(1.0) == 1
    assert stream.playback().generated == 7


def test_a_summary_is_plain_data():
    found = summarize([record(paced())])
    assert found.to_dict()["requests"] == 1
    assert set(found.to_dict()) == set(type(found).__slots__)


finite = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 3), st.integers(1, 9)), max_size=12).map(sorted),
        min_size=1,
        max_size=5,
    )
)
def test_the_figures_of_any_run_fit_together(streams):
    found = summarize([record(arrivals, sent_s=0.5) for arrivals in streams])
    assert found.tokens == sum(count for arrivals in streams for _, count in arrivals)
    assert 0 <= found.effective_tok_s <= found.raw_tok_s * (1 + 1e-9)
    ttfts = [0, found.ttft_p50_s, found.ttft_p99_s, found.ttft_max_s, found.duration_s]
    assert all(low <= high + 1e-9 for low, high in pairwise(ttfts))
    assert found.stalled_readers <= found.requests
    assert all(math.isfinite(value) and value >= 0 for value in found.to_dict().values())
