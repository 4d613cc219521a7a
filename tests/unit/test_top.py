"""What `tokenflow top` makes of two pages of metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from tokenflow.cluster import top
from tokenflow.cluster.cli import build_parser
from tokenflow.cluster.ingress_metrics import IngressMetrics
from tokenflow.cluster.metrics import render
from tokenflow.replicas.errors import TokenFlowError
from tokenflow.replicas.stats import EngineStats


def page(*replicas: tuple[str, EngineStats], own: CollectorRegistry | None = None) -> str:
    slots = {"free": 10, "leased": 2, "pinned": 30, "cached": 58}
    store = {"slots": slots, "calls": 0, "lost": False}
    dicts = [s.to_dict() | {"replica_id": r, "node_id": "n", "store": store} for r, s in replicas]
    return render(
        dicts, ingress="front", streams=3, failovers=0, moves=0, own=own or CollectorRegistry()
    ).decode()


def busy(generated: int, preempted: int = 0, loaded: int = 0) -> EngineStats:
    stats = EngineStats(
        generated_tokens=generated, preempted_offload=preempted, loaded_bytes=loaded
    )
    stats.now_running, stats.now_waiting, stats.now_preempted, stats.now_parked = 4, 3, 2, 1
    stats.now_free_blocks, stats.now_total_blocks = 25, 100
    stats.now_rate, stats.now_capacity, stats.now_overloaded = 80.0, 60.0, True
    stats.now_readers, stats.now_dry_readers = 6, 1
    stats.now_buffer_quantiles_s = (0.0, 1.5, 4.0)
    return stats


def two() -> tuple[top.Reading, top.Reading]:
    own = IngressMetrics("front")
    own.ended("chat", "200", 1.0)
    own.first_token("chat", 30.0)
    first = top.read(page(("one", busy(100)), own=own.registry), 10.0)
    for _ in range(4):
        own.ended("chat", "200", 1.0)
        own.first_token("chat", 0.2)
    own.ended("grpc", "INTERNAL", 1.0)
    second = page(("one", busy(300, 4, 2_000_000)), ("two", EngineStats()), own=own.registry)
    return first, top.read(second, 12.0)


def test_rates_are_of_the_time_between_two_readings():
    frame = top.frame(*two())
    one, idle = frame.replicas
    assert (one.replica, one.running, one.waiting, one.preempted, one.parked) == ("one", 4, 3, 2, 1)
    assert one.overloaded and (one.declared_rate, one.capacity) == (80, 60)
    assert (one.readers, one.dry_readers) == (6, 1)
    assert one.buffer_s == {"0.1": 0.0, "0.5": 1.5, "0.9": 4.0}
    assert one.kv_used == 0.75
    assert (one.tokens_per_s, one.preemptions_per_s, one.load_bytes_per_s) == (100, 2, 1e6)
    assert idle.replica == "two" and idle.tokens_per_s == 0 and idle.buffer_s == {}
    assert frame.streams == 3
    assert frame.requests_per_s == {"200": 2.0, "INTERNAL": 0.5}
    assert frame.nodes == [top.NodeRow("n", 100, pytest.approx(0.32))]


def test_the_time_to_first_token_is_of_the_requests_in_between_or_of_all():
    first, second = two()
    assert 0.1 < top.frame(first, second).ttft_s["p99"] <= 0.25
    assert top.frame(second, second).ttft_s["p99"] > 10
    nothing = top.read(page(), 0.0)
    assert top.frame(nothing, nothing).ttft_s == {}


def test_quantiles_are_those_of_prometheus():
    buckets = [(1.0, 10.0), (2.0, 30.0), (4.0, 40.0), (math.inf, 50.0)]
    assert top.quantile(0.1, buckets) == 0.5
    assert top.quantile(0.4, buckets) == 1.5
    assert top.quantile(0.7, buckets) == 3.0
    assert top.quantile(0.99, buckets) == 4.0


@pytest.mark.parametrize("text", ["# nothing\n", "up 1\n", "tokenflow_x{ 1\n", "<html></html>"])
def test_a_page_of_something_else_is_said_to_be_one(text):
    with pytest.raises(TokenFlowError):
        top.read(text, 0.0)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def pages(monkeypatch) -> Iterator[list[httpx.Response]]:
    """What the server answers, in order; the requests it got are in `pages.seen`."""
    answers: list[httpx.Response] = []
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answers.pop(0)

    real = httpx.Client

    def client(**options):
        return real(transport=httpx.MockTransport(answer), **options)

    monkeypatch.setattr(top.httpx, "Client", client)
    monkeypatch.setattr(top.time, "sleep", lambda _: None)
    yield answers
    assert all(request.url.path == "/metrics" for request in seen)
    assert all(request.headers.get("authorization") == "Bearer k" for request in seen)


def run(*flags: str) -> int:
    return top.run(build_parser().parse_args(["top", "--once", "--api-key", "k", *flags]))


def test_one_frame_as_text_and_as_json(pages, capsys):
    text = page(("replica-one", busy(100)))
    pages += [httpx.Response(200, text=text) for _ in range(4)]
    assert run() == 0
    shown = capsys.readouterr().out
    for wanted in ("replica-", "80/60", "0.0/1.5/4.0", "75%", "streams 3", "32% of 100"):
        assert wanted in shown
    assert "replica-one" not in shown, "ids are cut"
    assert run("--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["replicas"][0]["kv_used"] == 0.75


def test_no_replica_is_no_crash(pages, capsys):
    pages += [httpx.Response(200, text=page()) for _ in range(2)]
    assert run() == 0
    shown = capsys.readouterr().out
    assert "none answers" in shown and "no host KV" in shown


def test_who_does_not_serve_is_named(pages):
    pages.append(httpx.Response(401))
    with pytest.raises(TokenFlowError, match="8000/metrics answers with status 401"):
        run()


def test_nobody_there_is_one_sentence():
    with pytest.raises(TokenFlowError, match=r"cannot read http://127.0.0.1:1/metrics.*serve\?"):
        run("--url", "http://127.0.0.1:1")
    with pytest.raises(TokenFlowError, match="--interval must be at least"):
        run("--interval", "nan")
