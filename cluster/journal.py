"""What became of each client request: one log line, its metrics, and, if it is traced, its spans.

The ingress tells a `Record` what happens; it is idempotent at its end, because a request can end in
many places and the first of them knows why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tokenflow.cluster.attempts import Attempts
from tokenflow.cluster.ingress_metrics import IngressMetrics
from tokenflow.cluster.logs import REQUEST_ID, about

if TYPE_CHECKING:
    from tokenflow.cluster.api.protocol import Call
    from tokenflow.cluster.generation import Generation
    from tokenflow.cluster.tracing import RequestTrace, Tracing

logger = logging.getLogger("tokenflow.requests")

_LONGEST_ID = 256
_FAULTS = {"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
"""gRPC codes that are not the client's doing; over HTTP that is 500 and above."""
LEFT = {"grpc": "CANCELLED", "grpc-resume": "CANCELLED"}
"""Status of a request whose client has gone away; over HTTP that is 499."""


class Record:
    """One client request, from its arrival to its end."""

    def __init__(
        self, metrics: IngressMetrics, api: str, model: str, trace: RequestTrace | None
    ) -> None:
        self.api = api
        self.status: str | None = None
        """How it ended; None = it has not."""
        self._metrics = metrics
        self._model = model
        self._trace = trace
        self._begun_s = time.monotonic()
        self._ttft_s: float | None = None
        self._tokens = 0
        self._generation: Generation | None = None
        self._call: Call | None = None

    @property
    def traced(self) -> bool:
        return self._trace is not None

    def started(self, generation: Generation, call: Call) -> None:
        """Replicas have taken it."""
        self._generation, self._call = generation, call
        REQUEST_ID.set(generation.id)

    def sent(self, tokens: int) -> None:
        """So many tokens go to the client now."""
        if tokens and self._ttft_s is None:
            self._ttft_s = time.monotonic() - self._begun_s
            self._metrics.first_token(self.api, self._ttft_s)
        self._tokens += tokens

    def end(self, status: int | str, error: str | None = None) -> None:
        """It is over: an HTTP status or the name of a gRPC code. Only the first call counts."""
        if self.status is not None:
            return
        self.status = str(status)
        seconds = time.monotonic() - self._begun_s
        self._metrics.ended(self.api, self.status, seconds)
        fields = self._fields(seconds, error)
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        # Streams end in tasks that are not the request's own.
        request_id = self._generation.id if self._generation else REQUEST_ID.get()
        fault = self.status >= "500" if self.status.isdigit() else self.status in _FAULTS
        level = logging.WARNING if fault else logging.INFO
        logger.log(level, "request %s", shown, extra={**fields, **about(request_id)})
        if self._trace is not None:
            attributes = self._attributes(fields, request_id)
            self._trace.end(attributes, self._attempts(), error if fault else None)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """While the body runs the client may leave."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.left()
            raise

    def left(self) -> None:
        """The client has gone away."""
        self.end(LEFT.get(self.api, "499"))

    def _fields(self, seconds: float, error: str | None) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "api": self.api,
            "status": self.status,
            "duration_s": round(seconds, 4),
        }
        if self._ttft_s is not None:
            fields["ttft_s"] = round(self._ttft_s, 4)
        if (generation := self._generation) is not None and (call := self._call) is not None:
            used = generation.usage
            fields |= {
                "prompt_tokens": used.prompt_tokens,
                "completion_tokens": self._tokens,
                "cached_tokens": used.cached_tokens,
                "choices": len(generation.streams),
                "token_rate": call.token_rate if call.token_rate < math.inf else "max",
                "attempts": sum(stream.attempt for stream in generation.streams),
                "finish_reasons": ",".join(s.finish_reason or "none" for s in generation.streams),
            }
        if error is not None:
            fields["error"] = error
        if self._trace is not None:
            fields["trace_id"] = self._trace.trace_id
        return fields

    def _attributes(self, fields: dict[str, Any], request_id: str) -> dict[str, Any]:
        """Of the request's span; names of OpenTelemetry's conventions for generative AI, as far as
        they go."""
        attributes = {
            "gen_ai.operation.name": "chat" if self.api == "chat" else "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": request_id,
            "tokenflow.api": self.api,
            "tokenflow.status": fields["status"],
        }
        if "error" in fields:
            attributes["error.type"] = fields["error"]
        for name, field in {
            "gen_ai.usage.input_tokens": "prompt_tokens",
            "gen_ai.usage.output_tokens": "completion_tokens",
            "tokenflow.cached_tokens": "cached_tokens",
            "tokenflow.token_rate": "token_rate",
            "tokenflow.ttft_s": "ttft_s",
        }.items():
            if field in fields:
                attributes[name] = fields[field]
        if "finish_reasons" in fields:
            attributes["gen_ai.response.finish_reasons"] = fields["finish_reasons"].split(",")
        return attributes

    def _attempts(self) -> list[Attempts]:
        streams = self._generation.streams if self._generation is not None else []
        return [stream.attempts for stream in streams if stream.attempts is not None]


class Journal:
    """Opens the records of one ingress."""

    def __init__(self, ingress_id: str, model: str, tracing: Tracing | None = None) -> None:
        self.metrics = IngressMetrics(ingress_id)
        self._model = model
        self._tracing = tracing

    def open(self, api: str, headers: Mapping[str, str]) -> Record:
        """A request arrives; `headers` are its HTTP headers or gRPC metadata, names in lower
        case."""
        REQUEST_ID.set(headers.get("x-request-id", "")[:_LONGEST_ID])
        trace = self._tracing.begin(api, headers) if self._tracing is not None else None
        return Record(self.metrics, api, self._model, trace)
