"""The client for asyncio. Decisions are made in `session.py` and `pacing.py`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tokenflow.client.base import UNARY_TIMEOUT_S, BaseClient, BaseStream, reading_rate
from tokenflow.client.errors import (
    ENDED_EARLY,
    Cancelled,
    ClientError,
    NotFound,
    failure_of,
)
from tokenflow.client.pacing import Pacer
from tokenflow.client.requests import Options, Prompt, Rate, checked_rate, update_request
from tokenflow.client.session import Session
from tokenflow.client.types import Chunk, ModelInfo, Token, model_info_of
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub


class AsyncClient(BaseClient):
    """A cluster, from asyncio. A context manager; one per process is enough."""

    _channels: dict[int, tuple[grpc.aio.Channel, InferenceStub]]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._channels = {}
        self._info: ModelInfo | None = None

    __init__.__doc__ = BaseClient.__init__.__doc__

    def generate(
        self,
        prompt: Prompt,
        *,
        token_rate: Rate | None = None,
        resumable: bool = True,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """A stream of text for a prompt: text, token ids, or messages. Sent when it is first read.

        Args:
            prompt: What to continue or to answer.
            token_rate: Tokens/s at which it will be read, "max" = no reader; None = the client's.
            resumable: The cluster keeps the request for a while when the connection is lost.
            timeout_s: For all of it; then the stream raises DeadlineExceeded.
            options: See `Options`.

        Raises:
            InvalidRequest: something is wrong that needs no server to be seen.
        """
        rate = self._rate if token_rate is None else token_rate
        return AsyncStream(
            self, self._new_session(prompt, rate, resumable, options), rate, timeout_s
        )

    def resume(
        self, request_id: str, *, received: int = 0, token_rate: Rate | None = None
    ) -> AsyncStream:
        """Go on with a resumable request, perhaps of another process, that has `received` tokens
        already. `token_rate` is for `paced` only."""
        rate = self._rate if token_rate is None else token_rate
        return AsyncStream(self, self._session(None, request_id, received), rate, None)

    async def cancel(self, request_id: str) -> bool:
        """End a request early; False when none of that id was running. Raises ClientError."""
        answer = await self._unary("Cancel", pb.CancelRequest(request_id=request_id))
        return bool(answer.found)

    async def update(
        self,
        request_id: str,
        *,
        token_rate: Rate | None = None,
        paused: bool | None = None,
        consumed: int | None = None,
    ) -> None:
        """Change a running request of any process. Raises ClientError."""
        await self._unary(
            "UpdateStream",
            update_request(request_id, token_rate=token_rate, paused=paused, consumed=consumed),
        )

    async def model_info(self) -> ModelInfo:
        """What is served; asked once. Raises ClientError."""
        if self._info is None:
            answer = await self._unary("GetModelInfo", pb.GetModelInfoRequest())
            self._info = model_info_of(answer)
        return self._info

    async def close(self) -> None:
        """Close the connections; streams that still run end with Cancelled."""
        channels, self._channels = self._channels, {}
        for channel, _ in channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _stub(self, target: int) -> InferenceStub:
        if target not in self._channels:
            address = self._addresses[target]
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(address, options=self._options)
            else:
                channel = grpc.aio.secure_channel(address, self._credentials, options=self._options)
            self._channels[target] = channel, InferenceStub(channel)
        return self._channels[target][1]

    def _open(self, session: Session, timeout_s: float | None) -> Any:
        request = session.next_call()
        stub = self._stub(session.target)
        method = stub.Resume if isinstance(request, pb.ResumeRequest) else stub.Generate
        return method(request, metadata=self._metadata, timeout=timeout_s)

    async def _unary(self, method: str, request: Any) -> Any:
        """At the address that answered last, then at the others."""
        for tried in range(len(self._addresses)):
            target = (self._target + tried) % len(self._addresses)
            call = getattr(self._stub(target), method)
            try:
                return await call(request, metadata=self._metadata, timeout=UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error)
                if not failure.lost or tried == len(self._addresses) - 1:
                    raise failure.error() from None


class AsyncStream(BaseStream):
    """The answer to one request: `async for chunk in stream`, or `stream.paced()`, or `text()`;
    one of them, once. As a context manager it cancels what was not read to its end.

    Iteration raises ClientError; a broken connection is not an error as long as it can be made up
    for.
    """

    def __init__(
        self, client: AsyncClient, session: Session, rate: Rate | None, timeout_s: float | None
    ) -> None:
        super().__init__(session, rate, timeout_s)
        self._client = client
        self._cancelled = False
        self._changed = asyncio.Event()
        """News for the pacer."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        session = self._session
        while not session.over:
            if self._cancelled:
                raise Cancelled("The stream was cancelled.")
            left_s = self._time_left_s()
            if self._call is None:
                self._asked = True
                self._call = self._client._open(session, left_s)
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error)
            except asyncio.CancelledError:
                # gRPC ends a call that was cancelled here as if the task had been.
                task = asyncio.current_task()
                if self._cancelled and task is not None and not task.cancelling():
                    raise Cancelled("The stream was cancelled.") from None
                raise
            else:
                if message is not grpc.aio.EOF:
                    chunk = self._take(message)
                    if chunk is not None:
                        return chunk
                    continue
                failure = ENDED_EARLY
            self._call = None
            pause_s = session.failed(failure, time.monotonic())
            await asyncio.sleep(min(pause_s, self._time_left_s() or pause_s))
        if self._call is not None:
            call, self._call = self._call, None
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.read()  # a call that is read to its end leaves nothing to cancel
        raise StopAsyncIteration

    def _take(self, message: pb.GenerateResponse) -> Chunk | None:
        try:
            chunk = self._session.take(message)
        except ClientError:
            self._call.cancel()
            raise
        self._client._target = self._session.target
        return chunk

    async def text(self) -> str:
        """All of it."""
        return "".join([chunk.text async for chunk in self])

    async def paced(
        self, rate: Rate | None = None, *, report_every_s: float | None = None
    ) -> AsyncGenerator[Token, None]:
        """Token by token at the reader's speed: `rate` tokens/s, else what the request declared,
        else the server's default. What arrives earlier waits here.

        With `report_every_s` the server is told now and then how far the reader is. Leaving it
        early cancels the request.
        """
        wanted = self._rate if rate is None else rate
        default = (
            0.0 if wanted is not None else (await self._client.model_info()).default_token_rate
        )
        pacer = self._pacer = Pacer(reading_rate(wanted, default))
        pump = asyncio.create_task(self._pump(pacer))
        reports = asyncio.create_task(self._report(pacer, report_every_s))
        try:
            while True:
                self._changed.clear()
                now = time.monotonic()
                at = pacer.next_at()
                if at is not None and at <= now:
                    yield pacer.take()
                    continue
                if not pacer.waiting and pump.done():
                    await pump
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if at is None else at - now):
                        await self._changed.wait()
        finally:
            reports.cancel()
            pump.cancel()
            await asyncio.gather(pump, reports, return_exceptions=True)
            await self._end()

    async def _pump(self, pacer: Pacer) -> None:
        try:
            async for chunk in self:
                pacer.add(chunk, time.monotonic())
                self._changed.set()
        finally:
            self._changed.set()

    async def _report(self, pacer: Pacer, every_s: float | None) -> None:
        told = 0
        while every_s is not None and not self._session.finished:
            await asyncio.sleep(every_s)
            if pacer.taken > told:
                told = pacer.taken
                with contextlib.suppress(ClientError):
                    await self.report_consumed(told)

    async def set_rate(self, rate: Rate) -> None:
        """Another speed from now on, here and at the server. Raises ClientError."""
        value = checked_rate(rate)
        self._rate = rate
        if self._pacer is not None:
            self._pacer.set_rate(value, time.monotonic())
            self._changed.set()
        await self._update(token_rate=rate)

    async def pause(self) -> None:
        """The reader takes nothing until `resume`. Raises ClientError."""
        if self._pacer is not None:
            self._pacer.pause()
            self._changed.set()
        await self._update(paused=True)

    async def resume(self) -> None:
        """The reader goes on. Raises ClientError."""
        if self._pacer is not None:
            self._pacer.resume(time.monotonic())
            self._changed.set()
        await self._update(paused=False)

    async def report_consumed(self, tokens: int) -> None:
        """Tell the server how many tokens the reader has consumed. Raises ClientError."""
        await self._update(consumed=tokens)

    async def _update(self, **change: Any) -> None:
        if not self._session.finished:
            with contextlib.suppress(NotFound):  # it has just ended: there is nothing to change
                await self._client.update(self.request_id, **change)

    async def cancel(self) -> None:
        """End the request early, if it still runs; whoever reads it gets Cancelled."""
        await self._end()

    async def _end(self) -> None:
        if self._session.over or self._cancelled:
            return
        self._cancelled = True
        if self._asked and self._session.resumable:
            # Losing its connection would not end it.
            with contextlib.suppress(ClientError):
                await self._client.cancel(self.request_id)
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()
