"""OpenTelemetry traces of requests, sent by OTLP over HTTP.

A request is traced when its client says so in the W3C header `traceparent`, or else by chance
(`sample_ratio`). What its spans are is in `spans.py`; the engine knows nothing of this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tokenflow.cluster.attempts import Attempts
from tokenflow.cluster.config import TracingConfig
from tokenflow.cluster.spans import Span, attempt_span
from tokenflow.replicas.errors import ConfigError

_EXPORT_EVERY_MS = 1000


def otlp_exporter(endpoint: str) -> Any:
    """Sends spans there. Raises ConfigError when the package for it is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "tracing.endpoint needs the OTLP exporter: pip install 'tokenflow-serve[otel]'."
        ) from None
    return OTLPSpanExporter(endpoint=endpoint)


class RequestTrace:
    """The span of one client request, while it runs."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, begun_s: float) -> None:
        self._tracer = tracer
        self._span = span
        self._begun_s = begun_s

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def end(
        self, attributes: Mapping[str, Any], choices: list[Attempts], error: str | None
    ) -> None:
        """The request is over: its attributes, the attempts of each of its streams, and what it
        failed of, unless that was its client's doing."""
        ended_s = time.time()
        self._span.set_attributes(dict(attributes))
        if error is not None:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        for choice, attempts in enumerate(choices):
            for attempt in attempts:
                span = attempt_span(attempt, ended_s)
                span.attributes["choice"] = choice
                self._add(span, self._span)
        self._span.end(_ns(ended_s))

    def _add(self, span: Span, parent: trace.Span) -> None:
        if span.ended_s < self._begun_s:
            return  # of an earlier reader of the same request
        context = trace.set_span_in_context(parent)
        attributes = {f"tokenflow.{name}": value for name, value in span.attributes.items()}
        made = self._tracer.start_span(
            span.name, context, attributes=attributes, start_time=_ns(span.begun_s)
        )
        for event in span.events:
            made.add_event(event.name, event.attributes, _ns(event.at_s))
        for child in span.children:
            self._add(child, made)
        made.end(_ns(span.ended_s))


class Tracing:
    """Begins the traces of one ingress. `processor` takes the ended spans; by default they are
    sent to the configured endpoint, in batches, by a thread."""

    def __init__(self, config: TracingConfig, processor: SpanProcessor | None = None) -> None:
        if processor is None:
            assert config.endpoint is not None
            processor = BatchSpanProcessor(
                otlp_exporter(config.endpoint), schedule_delay_millis=_EXPORT_EVERY_MS
            )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create({"service.name": config.service_name}),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tokenflow")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str]) -> RequestTrace | None:
        """A request arrives now; None when it is not to be traced. `headers` are its HTTP headers
        or gRPC metadata, names in lower case."""
        begun_s = time.time()
        span = self._tracer.start_span(
            name,
            self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=_ns(begun_s),
        )
        return RequestTrace(self._tracer, span, begun_s) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
