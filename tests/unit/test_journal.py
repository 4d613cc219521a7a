"""One line, one count and one trace for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import generate_latest
from ray._common.formatters import JSONFormatter
from ray.serve.exceptions import gRPCStatusError

from tokenflow.cluster.attempts import Attempts
from tokenflow.cluster.config import TracingConfig
from tokenflow.cluster.generation import Usage
from tokenflow.cluster.journal import Journal
from tokenflow.cluster.logs import REQUEST_ID, adopt_engine_logs
from tokenflow.cluster.rpc.servicer import RpcFailed
from tokenflow.cluster.tracing import Tracing
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.life import Note

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def generation(request_id: str, *attempts: Attempts | None) -> Any:
    streams = [
        SimpleNamespace(attempt=1, finish_reason="length", attempts=a) for a in attempts or (None,)
    ]
    return SimpleNamespace(id=request_id, streams=streams, usage=Usage(9, 5, 4))


CALL: Any = SimpleNamespace(token_rate=math.inf)


@dataclass
class Written(logging.Handler):
    """A handler as Serve's: lines as JSON."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(JSONFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    __hash__ = logging.Handler.__hash__


@pytest.fixture
def written():
    """What a deployment's process logs, in a context of its own."""
    handler = Written()
    serve, own = logging.getLogger("ray.serve"), logging.getLogger("tokenflow")
    before = (serve.handlers, serve.level, own.handlers, own.level, own.propagate)
    serve.handlers = [handler]
    serve.setLevel("INFO")
    adopt_engine_logs()
    adopt_engine_logs()
    token = REQUEST_ID.set("")
    yield handler.lines
    REQUEST_ID.reset(token)
    serve.handlers, serve.level, own.handlers, own.level, own.propagate = before


def count(journal: Journal) -> list[str]:
    text = generate_latest(journal.metrics.registry).decode()
    return [line for line in text.splitlines() if line.startswith("tokenflow_ingress_requests_to")]


def test_a_request_is_one_line_and_one_count_however_often_it_ends(written):
    journal = Journal("front", "books")
    record = journal.open("chat", {"x-request-id": "header"})
    record.started(generation("mine"), CALL)
    record.sent(0)
    record.sent(1)
    record.sent(4)
    record.end(200)
    record.left()
    record.end(500, "Boom")
    (line,) = written
    assert line["request_id"] == "mine" and line["status"] == "200" and line["api"] == "chat"
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (9, 5, 4)
    assert line["token_rate"] == "max" and line["finish_reasons"] == "length"
    assert 0 <= line["ttft_s"] <= line["duration_s"]
    assert "trace_id" not in line and "error" not in line
    assert count(journal) == [
        'tokenflow_ingress_requests_total{api="chat",ingress="front",status="200"} 1.0'
    ]


def test_a_call_that_was_refused_is_no_error_of_serve(written):
    """Serve would write the traceback of each, to whoever wants to fill a disk."""
    refused = RpcFailed(grpc.StatusCode.UNAUTHENTICATED, "no")
    serve = logging.getLogger("ray.serve")
    for error in (refused, gRPCStatusError(refused, grpc.StatusCode.UNAUTHENTICATED, "no")):
        serve.error("Request failed.", exc_info=error)
    assert written == []
    serve.error("Request failed.", exc_info=ValueError("ours"))
    assert "ValueError: ours" in written[0]["exc_text"]


def test_a_refused_request_is_known_by_its_header(written):
    journal = Journal("front", "books")
    journal.open("completions", {"x-request-id": "x" * 5000}).end(404, "InvalidRequestError")
    (line,) = written
    assert line["request_id"] == "x" * 256
    assert line["error"] == "InvalidRequestError" and "ttft_s" not in line


@pytest.mark.parametrize(
    ("api", "status"), [("chat", "499"), ("resume", "499"), ("grpc", "CANCELLED")]
)
def test_a_client_that_leaves_is_told_from_one_that_is_served(written, api, status):
    record = Journal("front", "books").open(api, {})
    with pytest.raises(asyncio.CancelledError), record.leaving():
        raise asyncio.CancelledError
    assert record.status == status and written[0]["status"] == status


def test_an_error_is_for_whoever_answers_it(written):
    record = Journal("front", "books").open("chat", {})
    with pytest.raises(ValueError), record.leaving():
        raise ValueError
    assert record.status is None and not written


def test_lines_about_a_request_name_it_and_others_do_not(written):
    logging.getLogger("tokenflow.engine").info("a step")
    REQUEST_ID.set("a")
    logging.getLogger("tokenflow.engine").info("in its task")
    logging.getLogger("ray.serve").info("of another", extra={"client_request_id": "b"})
    assert [line.get("request_id") for line in written] == [None, "a", "b"]
    assert all("client_request_id" not in line for line in written)


# -- traces ---------------------------------------------------------------------------------------


def tracing(ratio: float) -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    config = TracingConfig(sample_ratio=ratio)
    return Tracing(config, SimpleSpanProcessor(exporter)), exporter


def parent(flag: str) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flag}"}


def test_a_trace_has_the_request_its_attempts_and_their_phases(written):
    made, exporter = tracing(0)
    journal = Journal("front", "books", made)
    record = journal.open("chat", parent("01"))
    assert record.traced
    attempts = Attempts()
    attempts.begin("s#1")
    attempts.placed("s#1", "replica-a")
    attempts.note("s#1", [Note("waiting", 2e9, {}), Note("running", 2e9 + 1, {})])
    record.started(generation("mine", None, attempts), CALL)
    record.sent(5)
    record.end(200)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"chat", "attempt", "route", "queue", "decode"}
    root, attempt = spans["chat"], spans["attempt"]
    assert f"{root.context.trace_id:032x}" == TRACE_ID == written[0]["trace_id"]
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    assert attempt.parent.span_id == root.context.span_id
    assert spans["queue"].parent.span_id == attempt.context.span_id
    assert (spans["queue"].end_time - spans["queue"].start_time) == 10**9
    assert root.attributes["gen_ai.request.model"] == "books"
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attempt.attributes["tokenflow.replica"] == "replica-a"
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("status", "fault"),
    [(500, True), (503, True), ("INTERNAL", True), (404, False), ("NOT_FOUND", False)],
)
def test_what_is_not_the_clients_doing_is_a_failed_span_and_a_warning(written, status, fault):
    made, exporter = tracing(1)
    Journal("front", "books", made).open("chat", {}).end(status, "SomeError")
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code is StatusCode.ERROR) == fault
    assert span.attributes["tokenflow.status"] == str(status)
    assert span.attributes["error.type"] == "SomeError"
    assert written[0]["levelname"] == ("WARNING" if fault else "INFO")


@pytest.mark.parametrize(
    ("ratio", "headers", "wanted"),
    [(0, {}, False), (1, {}, True), (1, parent("00"), False), (0, parent("01"), True)],
)
def test_the_client_decides_or_else_chance(written, ratio, headers, wanted):
    made, exporter = tracing(ratio)
    record = Journal("front", "books", made).open("chat", headers)
    assert record.traced is wanted
    record.end(200)
    assert len(exporter.get_finished_spans()) == wanted


def test_a_broken_traceparent_is_none(written):
    made, _ = tracing(0)
    assert not Journal("front", "books", made).open("chat", {"traceparent": "00-zz-01"}).traced


def test_without_the_exporter_the_configuration_is_refused(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None
    )
    with pytest.raises(ConfigError, match=r"pip install 'tokenflow-serve\[otel\]'"):
        Tracing(TracingConfig(endpoint="http://127.0.0.1:1/v1/traces"))
