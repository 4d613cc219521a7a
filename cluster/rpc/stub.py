"""The Inference service for Python clients, and its descriptor.

Both this and the server's side (`servicer.py`) are built from the descriptor. The module that
protoc would generate is not used: its server half would answer broken messages with UNKNOWN.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message_factory import GetMessageClass

from tokenflow.cluster.rpc import inference_pb2

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


class InferenceStub:
    """The service's methods on a `grpc` or `grpc.aio` channel, as a generated stub has them."""

    Generate: Any
    GetModelInfo: Any
    Cancel: Any
    Resume: Any
    UpdateStream: Any

    def __init__(self, channel: Any) -> None:
        for method in SERVICE.methods:
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = make(
                f"/{SERVICE.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)
