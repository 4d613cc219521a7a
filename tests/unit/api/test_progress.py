"""Where the client of a stream is: ids of events, and answers that go on after any of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.unit.api.test_framing import WORDS, call, tokens
from tokenflow.cluster.api.framing import Answer, usage_body
from tokenflow.cluster.api.progress import ALL_SENT, Progress, parse_progress
from tokenflow.cluster.api.protocol import (
    Call,
    Given,
    check_request_id,
    parse_change,
    parse_completion,
)
from tokenflow.cluster.limits import Limits
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.request import ReaderChange

COMPLETION = {"model": "m", "prompt": "p", "stream": True}


def usage() -> dict[str, Any]:
    return usage_body(3, 5)


def whole(asked: Call, progress: Progress | None = None, had: int = 0) -> list[tuple[str, str]]:
    """(id, data) of each event of an answer of five tokens, from a place on."""
    answer = Answer(asked, "the:id", "m", WORDS.__getitem__, created=7, progress=progress)
    events = tokens(1, 2, 3, 4, 5, reason="stop", logprobs=True)
    out = answer.opening(1, ("Say:",))
    answer.skip(0, events[:had])
    for event in events[had:]:
        out += answer.chunk(0, [event], usage)
    if had == len(events) and progress is not None and progress.counts[0] < len(events) + 2:
        last = events[-1]._replace(token_id=-1, text="", logprobs=None, offset=len(events))
        out += answer.chunk(0, [last], usage)
    out += answer.closing(usage())
    pairs = [event.split(b"\n", 1) for event in out.split(b"\n\n")[:-1]]
    return [(first.decode()[4:], data.decode()) for first, data in pairs]


@pytest.mark.parametrize(
    "asked",
    [
        call(include_usage=True),
        call(logprobs=2),
        call(is_chat=False, logprobs=2, echo=True),
        call(is_chat=False, include_usage=True),
    ],
)
def test_an_answer_goes_on_after_any_of_its_events(asked):
    complete = whole(asked)
    assert len({event_id for event_id, _ in complete}) == len(complete)
    for i, (event_id, data) in enumerate(complete):
        progress = parse_progress(event_id, "the:id", 1)
        assert (progress.closing == ALL_SENT) == (data == "data: [DONE]")
        had = min(progress.tokens(0), 5)
        assert whole(asked, progress, had) == complete[i + 1 :]
    assert whole(asked, parse_progress(None, "the:id", 1)) == complete


def test_choices_have_counts_of_their_own():
    assert str(parse_progress("r:3.0.12", "r", 3)) == "3.0.12"
    assert parse_progress("r:3.0.12", "r", 3).tokens(0) == 2
    assert parse_progress("r:3.0.12", "r", 3).tokens(1) == 0
    assert parse_progress("r:3.4.2", "r", 2).closing == ALL_SENT


@pytest.mark.parametrize(
    "wrong", ["r", "r:", "r:x", "r:1.", "r:-1", "r:1.3", "r:1.2.3", "q:1", "r:" + "9" * 30, ":1"]
)
def test_what_is_no_id_is_refused(wrong):
    with pytest.raises(InvalidRequestError, match="is no event of request 'r'"):
        parse_progress(wrong, "r", 1)


def test_an_error_ends_the_stream_where_it_is():
    answer = Answer(call(), "r", "m", WORDS.__getitem__)
    answer.opening(1)
    assert (
        answer.failure({"error": {}}) == b'id: r:1\ndata: {"error":{}}\n\nid: r:1\ndata: [DONE]\n\n'
    )


# -- what else a request may say of its stream ----------------------------------------------------


def parsed(headers: Given | None = None, **fields: Any) -> Call:
    return parse_completion(
        COMPLETION | fields, model_names=["m"], limits=Limits(), headers=headers or Given()
    )


def test_a_request_may_be_made_resumable_and_named_by_headers_or_body():
    assert not parsed().resumable
    assert parsed(Given(resumable="True")).resumable
    assert parsed(resumable=True).resumable
    assert not parsed(Given(resumable="true"), resumable=False).resumable
    assert parsed(Given(request_id="x-1")).request_id == "x-1"
    assert parsed(Given(request_id="x-1"), request_id="mine").request_id == "mine"
    for wrong in (
        dict(headers=Given(resumable="yes")),
        dict(resumable=True, stream=False),
        dict(headers=Given(request_id="two words")),
        dict(request_id="line\nbreak"),
    ):
        with pytest.raises(InvalidRequestError):
            parsed(**wrong)


@pytest.mark.parametrize("wrong", ["", " ", "x" * 257, "é", "a\r", "a b"])
def test_ids_that_cannot_stand_in_a_header_are_refused(wrong):
    with pytest.raises(InvalidRequestError, match="visible ASCII"):
        check_request_id(wrong)


@pytest.mark.parametrize(
    ("body", "change"),
    [
        ({"token_rate": 5}, ReaderChange(token_rate=5.0)),
        ({"token_rate": "max", "paused": True}, ReaderChange(token_rate=math.inf, paused=True)),
        ({"consumed": 0}, ReaderChange(consumed=0)),
        ({"paused": False, "consumed": None}, ReaderChange(paused=False)),
    ],
)
def test_changes(body, change):
    assert parse_change(json.loads(json.dumps(body)), Limits()) == change


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"paused": None},
        {"paused": 1},
        {"consumed": -1},
        {"consumed": 1.5},
        {"token_rate": 0},
        {"token_rate": "fast"},
        {"token_rate": 1e9},
        {"rate": 3},
    ],
)
def test_changes_that_are_none_are_refused(body):
    with pytest.raises(InvalidRequestError):
        parse_change(body, Limits())
