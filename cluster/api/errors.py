"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from typing import Any

from tokenflow.replicas.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    QuotaError,
    ReaderReplacedError,
    RequestCancelledError,
)

logger = logging.getLogger("ray.serve")

INTERNAL_MESSAGE = "The server had an error while processing your request."


def error_body(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(HTTP status, JSON body, headers) for any exception; internals are logged, never shown."""
    if isinstance(error, InvalidRequestError):
        return (
            error.status,
            _body(error.message, "invalid_request_error", error.param, error.code),
            {"WWW-Authenticate": "Bearer"} if error.status == 401 else {},
        )
    if isinstance(error, CapacityError):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        code = "rate_limit_exceeded" if isinstance(error, QuotaError) else "overloaded"
        return (
            429,
            _body(str(error), "rate_limit_error", None, code),
            {"Retry-After": seconds},
        )
    if isinstance(error, DeadlineExceededError):
        return 504, _body(str(error), "server_error", None, "deadline_exceeded"), {}
    if isinstance(error, RequestCancelledError):
        return 499, _body(str(error), "invalid_request_error", None, "cancelled"), {}
    if isinstance(error, ReaderReplacedError):
        return 409, _body(str(error), "invalid_request_error", None, "replaced"), {}
    if isinstance(error, EngineDeadError):
        message = "No replica can serve this request right now; try again shortly."
        return 503, _body(message, "server_error", None, "unavailable"), {"Retry-After": "1"}
    logger.error("request failed: %r", error, exc_info=error)
    return 500, _body(INTERNAL_MESSAGE, "server_error", None, "internal_error"), {}


def http_error(status: int, message: str) -> dict[str, Any]:
    """The body for an error of the HTTP layer itself (unknown path, wrong method)."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return _body(message, "invalid_request_error", None, code)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
