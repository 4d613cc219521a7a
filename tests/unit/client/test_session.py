"""What a stream does about failures, without a connection."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.client.errors import (
    ENDED_EARLY,
    Cancelled,
    ClientError,
    DeadlineExceeded,
    Failure,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from tokenflow.client.session import Retries, Session
from tokenflow.cluster.rpc import inference_pb2 as pb

Code = grpc.StatusCode
GONE = Failure(Code.UNAVAILABLE, "gone")
UNKNOWN_ID = Failure(Code.NOT_FOUND, "no such request")


def session(resumable: bool = True, targets: int = 1, **retries) -> Session:
    request = pb.GenerateRequest(text="x", request_id="r", resumable=resumable)
    return Session(
        request, request_id="r", targets=targets, retries=Retries(**retries), jitter=lambda: 0.0
    )


def message(offset: int, count: int = 1, finish: str = "") -> pb.GenerateResponse:
    ids = list(range(offset, offset + count))
    return pb.GenerateResponse(
        offset=offset, token_ids=ids, text="".join(f"<{i}>" for i in ids), finish_reason=finish
    )


def test_a_lost_stream_goes_on_after_its_last_token():
    s = session(targets=2)
    assert isinstance(s.next_call(), pb.GenerateRequest)
    s.take(message(0, 3))
    assert s.failed(GONE, 10.0) == pytest.approx(0.1)
    assert s.next_call() == pb.ResumeRequest(request_id="r", offset=3)
    assert s.target == 1
    assert s.take(message(3, 2, "stop")).token_ids == (3, 4)
    assert s.finished and s.over and s.finish_reason == "stop"
    assert (s.received, s.reconnects) == (5, 1)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, ""),
        (Code.INTERNAL, ""),
        (Code.UNKNOWN, ""),
        (None, ""),
        (Code.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
    ],
)
def test_what_counts_as_a_lost_connection(code, details):
    s = session()
    s.take(message(0))
    s.failed(Failure(code, details), 0.0)
    assert isinstance(s.next_call(), pb.ResumeRequest)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, InvalidRequest),
        (Code.OUT_OF_RANGE, InvalidRequest),
        (Code.NOT_FOUND, NotFound),
        (Code.DEADLINE_EXCEEDED, DeadlineExceeded),
        (Code.CANCELLED, Cancelled),
        (Code.UNAUTHENTICATED, ClientError),
        (Code.RESOURCE_EXHAUSTED, Overloaded),
    ],
)
def test_a_refusal_is_final(code, kind):
    s = session()
    with pytest.raises(kind, match="because") as caught:
        s.failed(Failure(code, "because"), 0.0)
    assert caught.value.code is code and s.over


def test_an_overloaded_server_is_asked_again_when_it_said():
    s = session(attempts=2)
    busy = Failure(Code.RESOURCE_EXHAUSTED, "busy", retry_after_s=4.0)
    assert s.failed(busy, 0.0) == 4.0
    assert isinstance(s.next_call(), pb.GenerateRequest)
    assert s.failed(busy, 5.0) == 4.0
    with pytest.raises(Overloaded) as caught:
        s.failed(busy, 10.0)
    assert caught.value.retry_after_s == 4.0


def test_too_much_patience_is_not_had():
    with pytest.raises(Overloaded):
        session(max_retry_after_s=5.0).failed(
            Failure(Code.RESOURCE_EXHAUSTED, "busy", retry_after_s=6.0), 0.0
        )


def test_a_request_that_may_have_arrived_is_looked_for_before_it_is_sent_again():
    s = session()
    s.failed(GONE, 0.0)
    assert s.next_call() == pb.ResumeRequest(request_id="r", offset=0)
    assert s.failed(UNKNOWN_ID, 0.1) == 0.0
    assert isinstance(s.next_call(), pb.GenerateRequest)
    s.take(message(0, finish="stop"))
    assert s.reconnects == 0


def test_a_server_without_resume_gets_the_request_again():
    s = session()
    s.failed(GONE, 0.0)
    s.failed(Failure(Code.UNIMPLEMENTED, ""), 0.0)
    assert isinstance(s.next_call(), pb.GenerateRequest)


def test_the_tries_of_a_request_that_never_arrives_are_counted():
    s = session(attempts=2)
    calls = 0
    with pytest.raises(Unavailable, match="gone"):
        while True:
            calls += 1
            s.failed(GONE, 0.0)
    assert calls == 3


def test_what_is_not_resumable_is_tried_again_only_before_its_first_token():
    s = session(resumable=False)
    s.failed(GONE, 0.0)
    assert isinstance(s.next_call(), pb.GenerateRequest)
    s.take(message(0, 2))
    with pytest.raises(Unavailable, match="after 2 tokens and is not resumable"):
        s.failed(GONE, 0.0)


def test_reconnecting_ends_with_its_time_which_starts_anew_with_each_message():
    s = session(reconnect_s=10.0, max_backoff_s=1.0)
    s.take(message(0))
    s.failed(GONE, 100.0)
    s.failed(GONE, 108.0)
    s.take(message(1))
    s.failed(GONE, 200.0)
    with pytest.raises(Unavailable, match="within 10 s"):
        s.failed(GONE, 209.9)


def test_a_stream_the_server_has_not_kept_is_lost():
    s = session()
    s.take(message(0))
    s.failed(Failure(Code.INTERNAL, "the actor died"), 0.0)
    with pytest.raises(Unavailable, match="has not kept it: the actor died"):
        s.failed(UNKNOWN_ID, 0.1)


def test_resuming_what_somebody_else_began():
    s = Session(None, request_id="r", offset=7)
    assert s.next_call() == pb.ResumeRequest(request_id="r", offset=7)
    s.take(message(7))
    assert (s.received, s.reconnects) == (8, 0)
    with pytest.raises(NotFound):
        Session(None, request_id="r").failed(UNKNOWN_ID, 0.0)


def test_pauses_double_up_to_their_limit_and_are_spread():
    s = session(backoff_s=0.1, max_backoff_s=0.5, attempts=9)
    pauses = [s.failed(GONE, 0.0) for _ in range(5)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    spread = Session(pb.GenerateRequest(request_id="r"), request_id="r", jitter=lambda: 1.0).failed(
        GONE, 0.0
    )
    assert spread == pytest.approx(0.05)


def test_a_message_that_is_here_already_is_dropped():
    s = session()
    s.take(message(0, 4))
    assert s.take(message(1, 2)) is None
    assert s.received == 4


@pytest.mark.parametrize("offset", [2, 5])
def test_an_overlap_or_a_gap_is_an_error_and_never_text(offset):
    s = session()
    s.take(message(0, 4))
    with pytest.raises(ProtocolError, match="4 was next"):
        s.take(message(offset, 3))


def test_an_end_without_tokens_is_an_end():
    s = session()
    s.take(message(0, 2))
    s.failed(ENDED_EARLY, 0.0)
    chunk = s.take(pb.GenerateResponse(offset=2, text="!", finish_reason="stop"))
    assert [token.text for token in chunk.tokens()] == ["!"]
    assert s.finished and s.received == 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=30), st.integers(1, 40))
def test_whatever_breaks_every_token_comes_exactly_once(breaks, total):
    """A server that resumes where it is asked to; each call makes so many messages, of so many
    tokens, and breaks."""
    s = session(attempts=100)
    text = ""
    script = iter(breaks)
    kept = False
    while not s.finished:
        call = s.next_call()
        messages, size = next(script, (1000, 3))
        if isinstance(call, pb.ResumeRequest) and not kept:
            s.failed(UNKNOWN_ID, 0.0)
            continue
        kept = True
        at = getattr(call, "offset", 0)
        for _ in range(messages):
            count = min(size, total - at)
            chunk = s.take(message(at, count, "length" if at + count == total else ""))
            text += chunk.text
            at += count
            if s.finished:
                break
        else:
            s.failed(GONE, 0.0)
    assert text == "".join(f"<{i}>" for i in range(total))
