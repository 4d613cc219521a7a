"""Serve's side of routing: which replicas it is given, whatever happens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.router import BurstRouter
from tokenflow.cluster.wire import Submission
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.sampling.params import SamplingParams


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


CANDIDATES = [replica(name) for name in "abc"]


def pending(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(args=args, kwargs=kwargs)


def submission(name: str) -> Submission:
    return Submission(name, "ingress", (1, 2, 3), SamplingParams(max_tokens=8), 20.0)


@pytest.fixture
def router():
    """Only the choosing of it: the rest needs a running Serve."""
    REGISTRY.update(dict.fromkeys("abc", "node"))
    for name in "abc":
        REGISTRY.report(name, LoadReport(number=1, capacity=100.0, prefill_s=1e-3))
    yield object.__new__(BurstRouter)
    REGISTRY.update({})


async def order(router: BurstRouter, request: Any) -> list[str]:
    ranks = await router.choose_replicas(CANDIDATES, request)
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


def counted() -> dict[str, int]:
    return {name: view.own.streams for name, view in REGISTRY.snapshot().items()}


async def test_a_submission_goes_where_the_registry_says_and_is_counted_there(router):
    placed = [(await order(router, pending(submission(f"r{i}"))))[0] for i in range(6)]
    assert counted() == {name: placed.count(name) for name in "abc"} == dict.fromkeys("abc", 2)
    for i in range(6):
        REGISTRY.finish(f"r{i}")
    assert counted() == dict.fromkeys("abc", 0)


async def test_a_submission_that_is_meant_for_one_replica_is_counted_on_it(router):
    assert await order(router, pending(submission("m"), target="b")) == ["b"]
    assert counted()["b"] == 1
    router.on_request_routed(
        pending(submission("m"), target="b"), SimpleNamespace(unique_id="c"), None
    )
    assert counted() == {"a": 0, "b": 0, "c": 1}
    REGISTRY.finish("m")


async def test_other_calls_go_to_their_target_or_to_anybody(router):
    assert await order(router, pending(["id"], target="c")) == ["c"]
    assert await order(router, pending(["id"], target="gone")) == ["a", "b", "c"]
    assert await order(router, pending()) == ["a", "b", "c"]
    assert await order(router, None) == ["a", "b", "c"]
    assert counted() == dict.fromkeys("abc", 0)


async def test_whatever_fails_a_request_still_gets_an_order(router, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(REGISTRY, "assign", fail)
    assert await order(router, pending(submission("x"))) == ["a", "b", "c"]
