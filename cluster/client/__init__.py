"""The client library: streams of text from a cluster's gRPC endpoint.

    from tokenflow.client import Client

    with Client("127.0.0.1:9000") as client, client.generate("Once upon", token_rate=8) as stream:
        for token in stream.paced():
            print(token.text, end="", flush=True)

`AsyncClient` is the same with `async`. A stream that loses its connection goes on where it was, on
any of the given addresses. Needs grpcio and protobuf only: no Ray, no torch.
"""

from tokenflow.client.aio import AsyncClient, AsyncStream
from tokenflow.client.errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from tokenflow.client.session import Retries
from tokenflow.client.sync import Client, Stream
from tokenflow.client.types import Chunk, ModelInfo, Token, TokenLogprobs, Usage

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "InvalidRequest",
    "ModelInfo",
    "NotFound",
    "Overloaded",
    "ProtocolError",
    "Retries",
    "Stream",
    "Token",
    "TokenLogprobs",
    "Unavailable",
    "Usage",
]
