"""Registers the Inference service with Serve's gRPC server, tolerant of broken requests.

A request that is not a valid message reaches the deployment as `MalformedRequest` instead of an
error inside the gRPC server, so that the client gets INVALID_ARGUMENT and not UNKNOWN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tokenflow.cluster.api.protocol import too_long
from tokenflow.cluster.limits import Limits
from tokenflow.cluster.rpc.mapping import status_of
from tokenflow.cluster.rpc.stub import SERVICE
from tokenflow.replicas.errors import CapacityError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class MalformedRequest:
    """Bytes that are not the request message: bad wire format, or text that is not UTF-8."""

    reason: str


def tolerant(message: Any) -> Callable[[bytes], Any]:
    """A deserializer that returns MalformedRequest instead of raising."""

    def deserialize(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except DecodeError as error:
            return MalformedRequest(str(error))

    return deserialize


def add_inference_to_server(servicer: Any, server: Any) -> None:
    """What Serve's `grpc_servicer_functions` calls."""
    handlers = {}
    for method in SERVICE.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=tolerant(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
    )


class RpcFailed(Exception):
    """Ends a call whose status has been set on its context."""

    told = True
    """See `logs`."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


def rpc_failure(context: Any, error: Exception) -> RpcFailed:
    """Sets the call's status; what is returned is to be raised."""
    code, details = status_of(error)
    context.set_code(code)
    context.set_details(details)
    if isinstance(error, CapacityError):
        context.set_trailing_metadata(retry_metadata(code, details, error.retry_after_s))
    return RpcFailed(code, details)


def retry_metadata(
    code: grpc.StatusCode, details: str, retry_after_s: float
) -> list[tuple[str, str | bytes]]:
    """Trailing metadata of a refusal: `google.rpc.RetryInfo` as gRPC's rich error model has it, and
    the seconds as text for those who do not know it."""
    info = RetryInfo(retry_delay=Duration())
    info.retry_delay.FromMilliseconds(math.ceil(retry_after_s * 1000))
    status = Status(code=code.value[0], message=details)
    status.details.add().Pack(info)
    return [
        ("retry-after", f"{max(1, math.ceil(retry_after_s))}"),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]


def check_message(request: Any, limits: Limits) -> None:
    """Raises InvalidRequestError for bytes that were no message, and for too many of them."""
    if isinstance(request, MalformedRequest):
        raise InvalidRequestError(f"The request is not a valid message: {request.reason}")
    if request.ByteSize() > limits.max_body_bytes:
        too_long(limits)


def metadata_of(context: Any) -> dict[str, str]:
    """The call's metadata; of a key that is given twice the first value."""
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        found.setdefault(name, text)
    return found


def metadata_value(context: Any, key: str) -> str | None:
    """The first value of a key in the call's metadata."""
    return metadata_of(context).get(key)
