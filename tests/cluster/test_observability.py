"""What a running cluster tells: its metrics and those of the dashboard, traces, logs, `top`."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import promql_parser
import pytest
import yaml

from deploy.observability import dashboard
from tests.support.otlp_collector import Collector
from tests.support.promql import metric_names
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub
from tools.metrics_reference import TARGET as METRICS_PAGE
from tools.metrics_reference import documented, table_of

pytestmark = pytest.mark.cluster

READERS = 24
"""Three times as many as the device memory is for."""
TOKENS = 200
REQUEST_ID = "seen-from-all-sides"
PARENT_SPAN = "00f067aa0ba902b7"


def body(server, **changes: Any) -> dict[str, Any]:
    return {
        "model": server.model,
        "prompt": "Chapter 1. The house stood by the river, and",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "token_rate": 5,
    } | changes


@pytest.fixture(scope="module")
def burst(server) -> dict[str, Any]:
    """A burst beyond the device memory; its first reader is traced. What was seen of it."""
    server.wait_idle()
    trace_id = secrets.token_hex(16)
    seen: dict[str, Any] = {"trace_id": trace_id}
    begun = asyncio.Event()

    async def read(client: httpx.AsyncClient, number: int) -> None:
        headers = {"X-Request-Id": REQUEST_ID if number == 0 else f"burst-{number}"}
        # The sampled flag is the client's word for all that is to be traced.
        flag = "01" if number == 0 else "00"
        headers["traceparent"] = f"00-{trace_id}-{PARENT_SPAN}-{flag}"
        asked = body(server, cache_salt=str(number))
        async with client.stream(
            "POST", f"{server.base_url}/completions", json=asked, headers=headers
        ) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    begun.set()

    async def whole() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            readers = [asyncio.create_task(read(client, number)) for number in range(READERS)]
            await begun.wait()
            await asyncio.sleep(0.7)  # the report of buffers is half a second old at most
            seen["scrape"] = (await client.get(f"{server.url}/metrics")).text
            seen["top"] = await _top(server, "--json")
            await asyncio.gather(*readers)
            # Another one of the same trace, at the other door.
            message = pb.GenerateRequest(model=server.model, text="The old man", token_rate=20)
            message.sampling.max_tokens = 4
            context = [("traceparent", f"00-{trace_id}-{PARENT_SPAN}-01")]
            async with grpc.aio.insecure_channel(server.grpc) as channel:
                async for _ in InferenceStub(channel).Generate(message, metadata=context):
                    pass
            wrong = body(server, model="none")
            refused = await client.post(f"{server.base_url}/completions", json=wrong)
            assert refused.status_code == 404

    with Collector(server.traces_port) as collector:
        asyncio.run(whole())
        server.wait_idle()
        seen["spans"] = collector.wait(lambda spans: any(s.name == "grpc" for s in spans))
        seen["services"] = collector.services
    seen["after"] = httpx.get(f"{server.url}/metrics").text
    return seen


async def _top(server, *flags: str) -> str:
    command = [sys.executable, "-m", "tokenflow.cluster.cli", "top", "--url", server.url, "--once"]
    process = await asyncio.create_subprocess_exec(
        *command, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


# -- metrics --------------------------------------------------------------------------------------


def test_the_reference_has_every_metric_with_its_labels(burst):
    assert documented(METRICS_PAGE.read_text()) == table_of(burst["scrape"], burst["after"])


def test_no_metric_names_a_request(burst):
    assert REQUEST_ID not in burst["after"] and "burst-" not in burst["after"]


def test_every_query_of_dashboard_and_alerts_is_of_metrics_that_are_there(server, burst):
    known = {
        line.partition("{")[0].partition(" ")[0]
        for page in (burst["scrape"], burst["after"])
        for line in page.splitlines()
        if not line.startswith("#")
    }
    queries = dashboard.queries(dashboard.dashboard())
    rules = yaml.safe_load((dashboard.TARGET.parent / "alerts.yaml").read_text())
    queries += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(queries) > 40
    for query in queries:
        names = metric_names(promql_parser.parse(query.replace("$__rate_interval", "5m")))
        assert names and names <= known, f"{names - known} in {query}"


def test_a_burst_is_in_the_metrics(server, burst):
    ended = "tokenflow_ingress_requests_total"
    assert server.metric(ended, api="completions", status="200") >= READERS
    assert server.metric(ended, api="completions", status="404") >= 1
    count = "tokenflow_ingress_time_to_first_token_seconds_count"
    assert server.metric(count, api="completions") >= READERS
    assert server.metric("tokenflow_readers") == 0
    assert server.metric("tokenflow_kv_transfer_queue_bytes") == 0


# -- traces ---------------------------------------------------------------------------------------


def attribute(span, name: str) -> Any:
    for each in span.attributes:
        if each.key == name:
            return getattr(each.value, each.value.WhichOneof("value"))
    return None


def test_the_trace_of_a_preempted_request_shows_its_whole_life(server, burst):
    spans = burst["spans"]
    assert burst["services"] == {"tokenflow"}
    # Nobody else's request was sampled.
    assert {span.trace_id.hex() for span in spans} == {burst["trace_id"]}
    roots = {s.name: s for s in spans if s.parent_span_id.hex() == PARENT_SPAN}
    assert set(roots) == {"completions", "grpc"}
    root = roots["completions"]
    assert attribute(root, "gen_ai.response.id") == REQUEST_ID
    assert attribute(root, "gen_ai.usage.output_tokens") == TOKENS
    assert attribute(root, "tokenflow.status") == "200"
    attempts = [span for span in spans if span.parent_span_id == root.span_id]
    assert attempts and all(span.name == "attempt" for span in attempts)
    last = max(attempts, key=lambda span: span.start_time_unix_nano)
    phases = [span for span in spans if span.parent_span_id == last.span_id]
    phases.sort(key=lambda span: span.start_time_unix_nano)
    names = [span.name for span in phases]
    assert names[:2] == ["route", "queue"] and names[-1] == "decode", names
    assert {"prefill", "decode", "preempted"} <= set(names), names
    # Without a gap from the ingress to the last token.
    for earlier, later in itertools.pairwise(phases):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert root.start_time_unix_nano <= phases[0].start_time_unix_nano
    assert phases[-1].end_time_unix_nano <= root.end_time_unix_nano
    decoded = sum(attribute(s, "tokenflow.tokens") for s in phases if s.name == "decode")
    # Each time it has its blocks again a prefill, if there was one, draws one token as well.
    drawn = sum(s.name == "prefill" for s in phases)
    assert TOKENS - drawn <= decoded <= TOKENS
    events = [event.name for span in phases for event in span.events]
    assert events.count("first_token") == 1 and "forward pass" in events
    for span in phases:
        if span.name == "preempted":
            assert attribute(span, "tokenflow.how") in ("offload", "recompute")


# -- logs -----------------------------------------------------------------------------------------


def log_lines(server) -> list[dict[str, Any]]:
    lines = []
    for path in Path(server.cluster._log_directory()).glob("replica_tokenflow_*.log"):
        for line in path.read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def test_each_request_is_one_json_line_with_its_id(server, burst):
    (line,) = [
        each for each in log_lines(server)
        if each.get("request_id") == REQUEST_ID and each.get("api") == "completions"
    ]  # fmt: skip
    assert line["levelname"] == "INFO" and line["status"] == "200"
    assert line["completion_tokens"] == TOKENS and line["finish_reasons"] == "length"
    assert line["trace_id"] == burst["trace_id"]
    assert 0 < line["ttft_s"] < line["duration_s"]


async def test_a_grpc_call_that_is_cancelled_is_a_line_as_well(server):
    message = pb.GenerateRequest(
        model=server.model, text="The old man", token_rate=20, request_id="left-alone"
    )
    message.sampling.max_tokens = 500
    message.sampling.ignore_eos = True
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        call = InferenceStub(channel).Generate(message)
        await call.read()
        call.cancel()
    await asyncio.to_thread(server.wait_idle)
    (line,) = [each for each in log_lines(server) if each.get("request_id") == "left-alone"]
    assert (line["api"], line["status"]) == ("grpc", "CANCELLED")
    assert server.metric("tokenflow_ingress_requests_total", api="grpc", status="CANCELLED") >= 1


# -- top ------------------------------------------------------------------------------------------


async def test_top_shows_the_replicas_and_their_readers(server, burst):
    during = json.loads(burst["top"])
    assert during["streams"] >= 1 and len(during["replicas"]) == 2
    assert sum(row["running"] + row["waiting"] + row["preempted"] for row in during["replicas"])
    assert sum(row["tokens_per_s"] for row in during["replicas"]) > 0
    assert 0 < during["ttft_s"]["p50"] <= during["ttft_s"]["p99"]
    assert all(0 <= row["kv_used"] <= 1 for row in during["replicas"])
    assert len(during["nodes"]) == 1 and during["nodes"][0]["slots"] > 0
    text = await _top(server)
    for name in server.by_replica("tokenflow_running_requests"):
        assert name[:8] in text
    assert "streams 0" in text and "TTFT P50" in text
