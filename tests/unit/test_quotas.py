"""What one key may use, on a clock of our own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tokenflow.cluster.quotas import Demand, KeyLimits, Quota, TokenBucket
from tokenflow.replicas.errors import InvalidRequestError, QuotaError


@dataclass
class Answer:
    """A request under way."""

    running: int
    rate: float
    tokens: int


def quota(share: float = 1.0, **limits: float) -> Quota:
    return Quota(KeyLimits(**limits), share, now=0.0)


def take(quota: Quota, demand: Demand, now: float, use: Answer | None = None) -> None:
    with quota.reserve(demand, now) as grant:
        grant.use = use or Answer(demand.streams, demand.rate, demand.tokens)


def test_a_bucket_gives_what_it_has_and_says_how_long_until_more():
    bucket = TokenBucket(60.0, now=0.0)
    bucket.take(60.0, 0.0)
    assert bucket.wait_s(1.0, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(30.0, 10.0) == pytest.approx(20.0)
    assert bucket.wait_s(60.0, 60.0) == 0.0
    bucket.take(60.0, 1000.0)  # never more than a minute's worth
    assert bucket.wait_s(60.0, 1000.0) == pytest.approx(60.0)


def test_another_limit_does_not_forget_what_was_used():
    bucket = TokenBucket(60.0, now=0.0)
    bucket.take(50.0, 0.0)
    bucket.resize(40.0, 0.0)
    assert bucket.wait_s(1.0, 0.0) == pytest.approx(11 * 60 / 40)


def test_requests_per_minute():
    q = quota(requests_per_minute=2)
    q.count_request(0.0)
    q.count_request(0.0)
    with pytest.raises(QuotaError) as refused:
        q.count_request(0.0)
    assert refused.value.retry_after_s == pytest.approx(30.0)
    q.count_request(30.1)


def test_one_of_many_processes_still_takes_a_request():
    q = quota(share=1 / 8, requests_per_minute=2)
    q.count_request(0.0)
    with pytest.raises(QuotaError):
        q.count_request(0.0)


def test_tokens_are_set_aside_and_what_was_not_used_is_given_back():
    q = quota(tokens_per_minute=100)
    answer = Answer(running=1, rate=10, tokens=30)
    take(q, Demand(1, 10, 90), 0.0, answer)
    with pytest.raises(QuotaError) as refused:
        take(q, Demand(1, 10, 40), 0.0)
    assert refused.value.retry_after_s == pytest.approx(18.0)
    answer.running = 0
    take(q, Demand(1, 10, 70), 0.0)
    with pytest.raises(QuotaError):
        take(q, Demand(1, 10, 1), 0.0)


def test_a_request_that_came_to_nothing_costs_no_tokens():
    q = quota(tokens_per_minute=100, streams=1)
    with pytest.raises(RuntimeError), q.reserve(Demand(1, 10, 100), 0.0):
        raise RuntimeError("the cluster is overloaded")
    take(q, Demand(1, 10, 100), 0.0)


def test_streams_at_once_count_from_the_moment_they_are_granted():
    q = quota(streams=2)
    with q.reserve(Demand(2, 10, 1), 0.0), pytest.raises(QuotaError):
        take(q, Demand(1, 10, 1), 0.0)


def test_streams_and_rates_follow_what_runs():
    q = quota(streams=3, rate=100)
    answer = Answer(running=2, rate=80, tokens=1)
    take(q, Demand(2, 80, 1), 0.0, answer)
    with pytest.raises(QuotaError):
        take(q, Demand(1, 30, 1), 0.0)
    with pytest.raises(QuotaError):
        take(q, Demand(2, 2, 1), 0.0)
    with pytest.raises(QuotaError):
        q.check_rate(40.0, 90.0)
    q.check_rate(40.0, 10.0)
    answer.rate, answer.running = 20, 1
    q.check_rate(20.0, 90.0)
    take(q, Demand(2, 60, 1), 0.0)


def test_a_request_that_came_over_from_another_process_counts_once():
    q = quota(streams=1, tokens_per_minute=100)
    answer = Answer(running=1, rate=1, tokens=40)
    q.hold(answer)
    q.hold(answer)
    with pytest.raises(QuotaError):
        take(q, Demand(1, 1, 1), 0.0)
    answer.running, answer.tokens = 0, 60
    take(q, Demand(1, 1, 80), 0.0)  # 20 tokens of it were made here
    with pytest.raises(QuotaError):
        take(q, Demand(1, 1, 1), 0.0)


@pytest.mark.parametrize(
    ("limits", "demand"),
    [
        ({"streams": 2}, Demand(3, 1, 1)),
        ({"tokens_per_minute": 100}, Demand(1, 1, 101)),
        ({"rate": 50}, Demand(1, 60, 1)),
    ],
)
def test_more_than_the_key_may_ever_have_is_not_worth_a_retry(limits, demand):
    with pytest.raises(InvalidRequestError) as refused:
        take(quota(**limits), demand, 0.0)
    assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")


def test_without_limits_everything_goes():
    q = quota()
    for _ in range(100):
        q.count_request(0.0)
        take(q, Demand(100, 1e9, 10**9), 0.0)
