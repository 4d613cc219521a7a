"""Who is taken when it is too much, and what the others are told."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tokenflow.cluster.admission import admitted, judge
from tokenflow.cluster.api.errors import error_body
from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.routing import Ask, Outlook
from tokenflow.cluster.rpc.servicer import rpc_failure
from tokenflow.replicas.errors import CapacityError, DeadlineExceededError
from tokenflow.replicas.load import LoadReport

ASK = Ask(prompt_tokens=100, output_tokens=50, rate=20.0)
FULL = LoadReport(
    number=1,
    capacity=100.0,
    prefill_s=1e-3,
    rate=2000.0,
    remaining_tokens=10_000,
    memory_tokens=100_000,
    expected_output=50,
)


def registry(report: LoadReport | None) -> ReplicaRegistry:
    made = ReplicaRegistry(rng=random.Random(1))
    made.update({"a": ""})
    if report is not None:
        made.report("a", report)
    return made


def test_whoever_starts_in_time_is_taken():
    judge(Outlook(1.0, 59.9, 3.0), max_ttft_s=60.0)
    judge(Outlook(1e9, 1e9, 3.0), max_ttft_s=None)
    judge(Outlook(5.0, 5.0, 1.1, short_s=0.4), max_ttft_s=60.0, max_stall_s=0.5)
    judge(Outlook(5.0, 50.0, 3.0), max_ttft_s=60.0, time_left_s=5.1)


def test_what_nobody_has_measured_refuses_nobody():
    judge(None, max_ttft_s=1.0)
    judge(Outlook(100.0, 100.0, 3.0, measured=False), max_ttft_s=1.0)


@pytest.mark.parametrize(
    ("ttft_s", "bound", "left", "after"),
    [
        (95.0, 60.0, None, 35.0),
        (60.1, 60.0, None, 1.0),
        (9.0, 60.0, 4.0, 5.0),
        (3.0, 60.0, -1, 3.0),
    ],
)
def test_the_others_hear_after_what_time_it_is_worth_a_try(ttft_s, bound, left, after):
    with pytest.raises(CapacityError, match="you would be served in") as refused:
        judge(Outlook(ttft_s, ttft_s, 3.0), max_ttft_s=bound, time_left_s=left)
    assert refused.value.retry_after_s == pytest.approx(after)


def test_whoever_would_begin_and_then_pause_is_refused_where_that_is_asked_for():
    with pytest.raises(CapacityError, match=r"pause for 2\.0 s, the limit is 0\.5 s") as refused:
        judge(Outlook(1.0, 2.0, 2.0, short_s=2.0), max_ttft_s=60.0, max_stall_s=0.5)
    assert refused.value.retry_after_s == pytest.approx(1.5)
    judge(Outlook(1.0, 2.0, 2.0, short_s=2.0), max_ttft_s=60.0)


def test_a_full_cluster_refuses_and_an_idle_or_unknown_one_does_not():
    with pytest.raises(CapacityError), admitted([ASK], max_ttft_s=60.0, registry=registry(FULL)):
        pytest.fail("taken")
    for report in (replace(FULL, rate=0.0, remaining_tokens=0), None):
        with admitted([ASK], max_ttft_s=60.0, registry=registry(report)):
            pass


def test_a_thousand_at_one_moment_are_not_all_taken_because_the_first_would_be():
    made = registry(replace(FULL, rate=0.0, remaining_tokens=0, number=2))
    contexts = [admitted([ASK], max_ttft_s=20.0, registry=made) for _ in range(1000)]
    taken = []
    for context in contexts:
        try:
            context.__enter__()
        except CapacityError:
            continue
        taken.append(context)
    # 50 tokens each at 100 tokens/s: about 40 of them take 20 s.
    assert 30 <= len(taken) <= 60
    for context in taken:
        context.__exit__(None, None, None)
    seen = made.foresee(ASK)
    assert seen is not None and seen.ttft_s == pytest.approx(0.1)


def test_choices_of_one_request_count_together():
    made = registry(replace(FULL, rate=0.0, remaining_tokens=0))
    with admitted([ASK], max_ttft_s=10.0, registry=made):
        pass
    with pytest.raises(CapacityError), admitted([ASK] * 100, max_ttft_s=10.0, registry=made):
        pytest.fail("taken")
    seen = made.foresee(ASK)
    assert seen is not None and seen.ttft_s < 1.0


def test_http_tells_the_client_when_to_come_back():
    status, body, headers = error_body(CapacityError("too much", retry_after_s=4.2))
    assert (status, headers) == (429, {"Retry-After": "5"})
    assert body["error"]["code"] == "overloaded"
    status, body, _ = error_body(DeadlineExceededError("too late"))
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


class Context:
    code = details = None
    metadata: tuple = ()

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def set_trailing_metadata(self, metadata):
        self.metadata = metadata


def test_grpc_tells_it_as_rich_errors_do_and_in_plain_words():
    context = Context()
    rpc_failure(context, CapacityError("too much", retry_after_s=4.2))
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(context.metadata)
    assert metadata["retry-after"] == "5"
    status = Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert status.message == context.details
    info = RetryInfo()
    assert status.details[0].Unpack(info)
    assert math.isclose(info.retry_delay.ToTimedelta().total_seconds(), 4.2)


def test_a_deadline_that_has_passed_is_no_refusal():
    context = Context()
    rpc_failure(context, DeadlineExceededError("too late"))
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED and not context.metadata
