"""A tokenflow.v1.Inference server without a cluster: it says the same text to everybody and fails
as it is told to."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.servicer import add_inference_to_server

WORDS = tuple(f" word{i}" for i in range(24))
TEXT = "".join(WORDS)


@dataclass
class Behave:
    """How one call of Generate or Resume goes."""

    fail_after: int | None = None
    """Messages before it fails; None = it does not."""
    code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    """None: the call ends well, but too early."""
    details: str = "gone"
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    tokens_each: int = 1
    """Tokens of a message."""
    pause_s: float = 0.0
    """Between messages."""
    lose: bool = False
    """The request is forgotten with the failure."""
    shift: int = 0
    """Added to the offset that was asked for."""


@dataclass
class FakeInference:
    """Calls follow `script`, one entry each, and when it is empty they succeed."""

    script: deque[Behave] = field(default_factory=deque)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """(method, request) of everything that came."""
    metadata: list[dict[str, Any]] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """Requests that can be resumed."""
    update_code: grpc.StatusCode | None = None
    """Why changes of a stream are refused."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client leaves."""

    def named(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.calls.append(("Generate", request))
        async for message in self._run(request.request_id, 0, context, keep=request.resumable):
            yield message

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.calls.append(("Resume", request))
        if request.request_id not in self.known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such request")
        async for message in self._run(request.request_id, request.offset, context, keep=True):
            yield message

    async def _run(
        self, request_id: str, at: int, context: Any, *, keep: bool
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.metadata.append(dict(context.invocation_metadata()))
        behave = self.script.popleft() if self.script else Behave()
        if keep and not (behave.lose and behave.fail_after is not None):
            self.known.add(request_id)
        sent = 0
        at += behave.shift
        try:
            while True:
                if sent == behave.fail_after:
                    if behave.lose:
                        self.known.discard(request_id)
                    if behave.code is None:
                        return
                    await context.abort(behave.code, behave.details, behave.metadata)
                ids = list(range(at, min(at + behave.tokens_each, len(WORDS))))
                last = at + len(ids) >= len(WORDS)
                message = pb.GenerateResponse(
                    request_id=request_id,
                    offset=at,
                    token_ids=ids,
                    text="".join(WORDS[i] for i in ids),
                    generated_at_unix_s=[float(i) for i in ids],
                    finish_reason="length" if last else "",
                )
                if last:
                    message.usage.prompt_tokens = 3
                    message.usage.completion_tokens = len(WORDS)
                yield message
                sent += 1
                at += len(ids)
                if last:
                    return
                await asyncio.sleep(behave.pause_s)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        self.calls.append(("GetModelInfo", request))
        return pb.GetModelInfoResponse(
            model="fake", max_model_len=64, vocab_size=24, default_token_rate=200
        )

    async def Cancel(self, request: Any, context: Any) -> pb.CancelResponse:
        self.calls.append(("Cancel", request))
        found = request.request_id in self.known
        self.known.discard(request.request_id)
        return pb.CancelResponse(found=found)

    async def UpdateStream(self, request: Any, context: Any) -> pb.UpdateStreamResponse:
        self.calls.append(("UpdateStream", request))
        if self.update_code is not None:
            await context.abort(self.update_code, "no")
        return pb.UpdateStreamResponse()


async def start(inference: FakeInference, port: int = 0) -> tuple[grpc.aio.Server, str]:
    """A listening server and its address."""
    server = grpc.aio.server()
    add_inference_to_server(inference, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, f"127.0.0.1:{port}"
