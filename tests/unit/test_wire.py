"""What ingress and replica send each other arrives as it was."""

from __future__ import annotations

import pickle

from tokenflow.cluster.wire import Submission, pack, unpack
from tokenflow.replicas.executor.base import TokenLogprobs
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


def test_events_survive_a_frame():
    events = [
        TokenEvent("a", 0, 5, "x", 1e9, TokenLogprobs(-0.5, [(5, -0.5)]), cached_tokens=32),
        TokenEvent("a", 1, 6, "", 1e9, None, "length"),
        TokenEvent("b", 0, -1, "", 1e9, None, "error", "no"),
    ]
    frame = pack(events)
    assert {type(item) for item in frame} == {tuple}
    arrived, notices, news = unpack(pickle.loads(pickle.dumps(frame)))
    assert notices == [] and news is None
    assert arrived == events
    assert [event.cached_tokens for event in arrived] == [32, 0, 0]


def test_a_submission_survives_the_way():
    params = SamplingParams(max_tokens=8)
    sent = Submission("a#1", "i", (1, 2), params, 20.0, (3,), 0.5, cache_salt="salt")
    assert pickle.loads(pickle.dumps(sent)) == sent
    assert Submission("a#1", "i", (1, 2), params, 20.0).cache_salt is None
