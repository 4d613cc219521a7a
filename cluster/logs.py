"""Log lines of ingresses and replicas: one format, and the client's request id on each line about a
request.

Serve writes the files and rotates them; here is only what it is told, and what it cannot know.
"""

from __future__ import annotations

import contextvars
import logging
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SERVE_LOGGER = "ray.serve"
OWN_LOGGER = "tokenflow"

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("tokenflow_request_id", default="")
"""The client's request that the current task is about; empty = none."""


class LogConfig(BaseModel):
    """How logs are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["text", "json"] = Field(
        default="text", description="json: one object per line, for log collectors."
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO",
        description="INFO has one line for each request that ended; WARNING for those that failed.",
    )


class _OwnRequestId(logging.Filter):
    """Serve's id of a call stands for one hop; the client's is the same on all of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        # A line that names its request knows better than the task that writes it.
        request_id = getattr(record, "client_request_id", None) or REQUEST_ID.get()
        record.__dict__.pop("client_request_id", None)
        if request_id:
            record.request_id = request_id
        return True


class _NoRefusals(logging.Filter):
    """Serve writes two errors with tracebacks for each gRPC call that ends with a status of ours, a
    wrong key included. Its client was told, and the call has a line of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not getattr(getattr(error, "original_exception", error), "told", False)


def about(request_id: str) -> dict[str, str]:
    """`extra` of a log line about a client's request, written outside of its task."""
    return {"client_request_id": request_id}


def adopt_engine_logs() -> None:
    """In a deployment's process, once Serve has set its logger up: this package's own lines go
    where Serve's go, and all lines about a request name it."""
    serve, own = logging.getLogger(SERVE_LOGGER), logging.getLogger(OWN_LOGGER)
    for handler in serve.handlers:
        if not any(isinstance(each, _OwnRequestId) for each in handler.filters):
            handler.addFilter(_OwnRequestId())
            handler.addFilter(_NoRefusals())
    own.handlers = list(serve.handlers)
    own.setLevel(serve.level)
    own.propagate = False
