"""What a call can fail with, and how a gRPC status becomes one of these. Not: whether to retry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from tokenflow.replicas.errors import TokenFlowError

_IN_DETAILS = re.compile(r"retry after ([0-9.]+(?:e[-+]?\d+)?) s")


class ClientError(TokenFlowError):
    """Root of what the client library raises. `code` is the gRPC status, None where there was no
    answer at all."""

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class InvalidRequest(ClientError):
    """The request can never succeed as it is; the message names the field."""


class NotFound(ClientError):
    """No such model or running request."""


class Overloaded(ClientError):
    """The cluster takes no more now; try again after `retry_after_s` seconds (None: not told)."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class Unavailable(ClientError):
    """The cluster cannot be reached, or a stream was lost and could not be continued."""


class DeadlineExceeded(ClientError):
    """The time the caller gave is over."""


class Cancelled(ClientError):
    """The request was cancelled, here or by someone else."""


class ProtocolError(ClientError):
    """The server broke the order of the tokens: a gap, or a repetition that cannot be undone."""


LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
"""Statuses of a connection that broke, or of a server process that died behind it."""

_CLASSES: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ended that did not end well."""

    code: grpc.StatusCode | None
    """None: the server closed the stream in good order, but before its last message."""
    details: str
    retry_after_s: float | None = None

    @property
    def lost(self) -> bool:
        """Whether the connection broke, rather than the server having refused. A proxy that drops
        a stream makes it look cancelled; only the details tell that no server said so."""
        dropped = self.code is grpc.StatusCode.CANCELLED and "RST_STREAM" in self.details
        return self.code is None or self.code in LOST or dropped

    def error(self) -> ClientError:
        if self.code is None:
            return Unavailable(self.details)
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(self.details, code=self.code, retry_after_s=self.retry_after_s)
        kind = _CLASSES.get(self.code)
        if kind is not None:
            return kind(self.details, code=self.code)
        return ClientError(f"{self.code.name}: {self.details}", code=self.code)


ENDED_EARLY = Failure(None, "The server closed the stream before its end.")


def failure_of(error: Any) -> Failure:
    """From a `grpc.RpcError` that is also a call, or a `grpc.aio.AioRpcError`."""
    details = error.details() or ""
    return Failure(error.code(), details, _retry_after_s(error.trailing_metadata() or (), details))


def _retry_after_s(metadata: Iterable[tuple[str, str | bytes]], details: str) -> float | None:
    """Seconds to wait, from google.rpc.RetryInfo, the metadata `retry-after`, or the text; a
    proxy may have dropped the former."""
    found: float | None = None
    for key, value in metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            told = _retry_info_s(value)
            if told is not None:
                return told
        elif key == "retry-after":
            try:
                found = float(value)
            except ValueError:
                continue
    if found is None and (match := _IN_DETAILS.search(details)):
        found = float(match[1])
    return found


def _retry_info_s(status: bytes) -> float | None:
    """google.rpc.Status.details (3) holds Any of RetryInfo, whose retry_delay (1) is a Duration.
    Read by field number, as the package with these messages is not among our requirements."""
    try:
        for detail in _fields(status, 3):
            packed = AnyMessage.FromString(detail)
            if packed.type_url.endswith("/google.rpc.RetryInfo"):
                for delay in _fields(packed.value, 1):
                    duration = Duration.FromString(delay)
                    return float(duration.seconds + duration.nanos / 1e9)
    except DecodeError:
        pass
    return None


def _fields(message: bytes, number: int) -> list[bytes]:
    fields = UnknownFieldSet(Empty.FromString(message))
    return [field.data for field in fields if field.field_number == number]
