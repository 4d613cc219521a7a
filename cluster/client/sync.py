"""The client without asyncio. Decisions are made in `session.py` and `pacing.py`."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator
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


class Client(BaseClient):
    """A cluster. A context manager; safe to use from several threads."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._channels: dict[int, tuple[grpc.Channel, InferenceStub]] = {}
        self._lock = threading.Lock()
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
    ) -> Stream:
        """As `AsyncClient.generate`."""
        rate = self._rate if token_rate is None else token_rate
        return Stream(self, self._new_session(prompt, rate, resumable, options), rate, timeout_s)

    def resume(
        self, request_id: str, *, received: int = 0, token_rate: Rate | None = None
    ) -> Stream:
        """As `AsyncClient.resume`."""
        rate = self._rate if token_rate is None else token_rate
        return Stream(self, self._session(None, request_id, received), rate, None)

    def cancel(self, request_id: str) -> bool:
        """End a request early; False when none of that id was running. Raises ClientError."""
        return bool(self._unary("Cancel", pb.CancelRequest(request_id=request_id)).found)

    def update(
        self,
        request_id: str,
        *,
        token_rate: Rate | None = None,
        paused: bool | None = None,
        consumed: int | None = None,
    ) -> None:
        """Change a running request of any process. Raises ClientError."""
        self._unary(
            "UpdateStream",
            update_request(request_id, token_rate=token_rate, paused=paused, consumed=consumed),
        )

    def model_info(self) -> ModelInfo:
        """What is served; asked once. Raises ClientError."""
        if self._info is None:
            self._info = model_info_of(self._unary("GetModelInfo", pb.GetModelInfoRequest()))
        return self._info

    def close(self) -> None:
        """Close the connections; streams that still run end with Cancelled."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel, _ in channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stub(self, target: int) -> InferenceStub:
        with self._lock:
            if target not in self._channels:
                address = self._addresses[target]
                if self._credentials is None:
                    channel = grpc.insecure_channel(address, options=self._options)
                else:
                    channel = grpc.secure_channel(address, self._credentials, options=self._options)
                self._channels[target] = channel, InferenceStub(channel)
            return self._channels[target][1]

    def _open(self, session: Session, timeout_s: float | None) -> Any:
        request = session.next_call()
        stub = self._stub(session.target)
        method = stub.Resume if isinstance(request, pb.ResumeRequest) else stub.Generate
        return method(request, metadata=self._metadata, timeout=timeout_s)

    def _unary(self, method: str, request: Any) -> Any:
        """At the address that answered last, then at the others."""
        for tried in range(len(self._addresses)):
            target = (self._target + tried) % len(self._addresses)
            call = getattr(self._stub(target), method)
            try:
                return call(request, metadata=self._metadata, timeout=UNARY_TIMEOUT_S)
            except grpc.RpcError as error:
                failure = failure_of(error)
                if not failure.lost or tried == len(self._addresses) - 1:
                    raise failure.error() from None


class Stream(BaseStream):
    """The answer to one request: `for chunk in stream`, or `stream.paced()`, or `text()`; one of
    them, once. The other methods may be called from any thread. As a context manager it cancels
    what was not read to its end.

    Iteration raises ClientError; a broken connection is not an error as long as it can be made up
    for.
    """

    def __init__(
        self, client: Client, session: Session, rate: Rate | None, timeout_s: float | None
    ) -> None:
        super().__init__(session, rate, timeout_s)
        self._client = client
        self._cancelled = threading.Event()
        self._changed = threading.Condition()
        """Guards the pacer; news for it."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        session = self._session
        while not session.over:
            if self._cancelled.is_set():
                raise Cancelled("The stream was cancelled.")
            left_s = self._time_left_s()
            if self._call is None:
                self._asked = True
                self._call = self._client._open(session, left_s)
                if self._cancelled.is_set():
                    self._call.cancel()  # another thread did so just now, and saw no call
            try:
                message = next(self._call, None)
            except grpc.RpcError as error:
                failure = failure_of(error)
            else:
                if message is not None:
                    chunk = self._take(message)
                    if chunk is not None:
                        return chunk
                    continue
                failure = ENDED_EARLY
            self._call = None
            pause_s = session.failed(failure, time.monotonic())
            self._cancelled.wait(min(pause_s, self._time_left_s() or pause_s))
        if self._call is not None:
            call, self._call = self._call, None
            with contextlib.suppress(grpc.RpcError):
                next(call, None)  # a call that is read to its end leaves nothing to cancel
        raise StopIteration

    def _take(self, message: pb.GenerateResponse) -> Chunk | None:
        try:
            chunk = self._session.take(message)
        except ClientError:
            self._call.cancel()
            raise
        self._client._target = self._session.target
        return chunk

    def text(self) -> str:
        """All of it."""
        return "".join(chunk.text for chunk in self)

    def paced(
        self, rate: Rate | None = None, *, report_every_s: float | None = None
    ) -> Generator[Token, None, None]:
        """As `AsyncStream.paced`; a thread reads along meanwhile."""
        wanted = self._rate if rate is None else rate
        default = math.inf
        if wanted is None:
            default = self._client.model_info().default_token_rate
        pacer = self._pacer = Pacer(reading_rate(wanted, default))
        pump = _Pump(self._pump, pacer)
        pump.start()
        over = threading.Event()
        if report_every_s is not None:
            reporter = (pacer, report_every_s, over)
            threading.Thread(target=self._report, args=reporter, daemon=True).start()
        try:
            while (token := self._next_token(pacer, pump)) is not None:
                yield token
            if pump.error is not None:
                raise pump.error
        finally:
            over.set()
            self._end()
            pump.join()

    def _next_token(self, pacer: Pacer, pump: _Pump) -> Token | None:
        """Waits for the next token's time; None after the last."""
        with self._changed:
            while True:
                now = time.monotonic()
                at = pacer.next_at()
                if at is not None and at <= now:
                    return pacer.take()
                if not pacer.waiting and pump.over:
                    return None
                self._changed.wait(None if at is None else at - now)

    def _pump(self, pump: _Pump) -> None:
        """On its own thread: everything the server sends into the pacer."""
        try:
            for chunk in self:
                with self._changed:
                    pump.pacer.add(chunk, time.monotonic())
                    self._changed.notify()
        except Exception as error:
            pump.error = error
        with self._changed:
            pump.over = True
            self._changed.notify()

    def _report(self, pacer: Pacer, every_s: float, over: threading.Event) -> None:
        told = 0
        while not over.wait(every_s) and not self._session.finished:
            if pacer.taken > told:
                told = pacer.taken
                with contextlib.suppress(ClientError):
                    self.report_consumed(told)

    def set_rate(self, rate: Rate) -> None:
        """Another speed from now on, here and at the server. Raises ClientError."""
        value = checked_rate(rate)
        self._rate = rate
        with self._changed:
            if self._pacer is not None:
                self._pacer.set_rate(value, time.monotonic())
                self._changed.notify()
        self._update(token_rate=rate)

    def pause(self) -> None:
        """The reader takes nothing until `resume`. Raises ClientError."""
        with self._changed:
            if self._pacer is not None:
                self._pacer.pause()
                self._changed.notify()
        self._update(paused=True)

    def resume(self) -> None:
        """The reader goes on. Raises ClientError."""
        with self._changed:
            if self._pacer is not None:
                self._pacer.resume(time.monotonic())
                self._changed.notify()
        self._update(paused=False)

    def report_consumed(self, tokens: int) -> None:
        """Tell the server how many tokens the reader has consumed. Raises ClientError."""
        self._update(consumed=tokens)

    def _update(self, **change: Any) -> None:
        if not self._session.finished:
            with contextlib.suppress(NotFound):  # it has just ended: there is nothing to change
                self._client.update(self.request_id, **change)

    def cancel(self) -> None:
        """End the request early, if it still runs; whoever reads it gets Cancelled."""
        self._end()

    def _end(self) -> None:
        if self._session.over or self._cancelled.is_set():
            return
        self._cancelled.set()
        if self._asked and self._session.resumable:
            # Losing its connection would not end it.
            with contextlib.suppress(ClientError):
                self._client.cancel(self.request_id)
        if (call := self._call) is not None:
            call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


class _Pump(threading.Thread):
    def __init__(self, run: Callable[[_Pump], None], pacer: Pacer) -> None:
        super().__init__(target=run, args=(self,), name="tokenflow-reader", daemon=True)
        self.pacer = pacer
        self.over = False
        self.error: Exception | None = None
