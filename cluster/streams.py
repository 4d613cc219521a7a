"""The streams of one ingress process: every token a client was promised, exactly once, in order.

The ingress owns a stream. It remembers each token that arrived; when the replica that made them is
lost, it resubmits prompt + tokens so far and goes on at the next one. Per replica there is one
frame subscription (the pump), whatever the number of streams.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from tokenflow.cluster.coalescer import StreamCoalescer
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.wire import Submission, take_news, unpack
from tokenflow.replicas.errors import EngineDeadError, RequestCancelledError, TokenFlowError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams

logger = logging.getLogger("ray.serve")

_Result = TypeVar("_Result")

MAX_ATTEMPTS = 8
_RETRY_PAUSE_S = 0.25
_STATS_TIMEOUT_S = 2.0


class Stream:
    """One sequence on its way to one client. `StreamManager.open` starts it."""

    def __init__(
        self,
        manager: StreamManager,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        token_rate: float,
        cache_salt: str | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.request_id = request_id
        """The client's request; several streams may answer it, and clients may repeat ids."""
        self.prompt_ids = prompt_ids
        self.params = params
        self.token_rate = token_rate
        """tokens/s; infinite = no reader."""
        self.cache_salt = cache_salt
        """Only requests with the same salt share cached prefixes."""
        self.token_ids: list[int] = []
        """All tokens received so far."""
        self.cached_tokens = 0
        """Prompt tokens that a cache spared it, as told with the first token."""
        self.finish_reason: str | None = None
        self.arrived_s = time.monotonic()
        self.attempt = 0
        self.replica_id: str | None = None
        self.kv_source: str | None = None
        """The node of the replica that it was on before."""
        self._manager = manager
        self._pending: list[TokenEvent] = []
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    @property
    def attempt_id(self) -> str:
        """The request id on the replica; new for each attempt."""
        return f"{self.id}#{self.attempt}"

    def deliver(self, event: TokenEvent) -> None:
        """Take an event of the present attempt."""
        if event.finish_reason == "error":
            self.fail(TokenFlowError(event.error or "the replica failed this request"))
            return
        if event.token_id >= 0:
            if event.offset != len(self.token_ids):
                # Cannot happen on one ordered subscription; if it does, say so instead of lying.
                self.fail(
                    TokenFlowError(
                        f"token {event.offset} arrived when {len(self.token_ids)} was expected"
                    )
                )
                return
            self.token_ids.append(event.token_id)
            if event.offset == 0:
                self.cached_tokens = event.cached_tokens
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
        self._pending.append(event)
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """No more tokens will come."""
        if self.finish_reason is None:
            self.finish_reason = "error"
            self._error = error
            self._ready.set()

    async def batches(
        self, max_delay_s: float, heartbeat_s: float | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Events in batches as the reader needs them: the first at once, later ones together while
        its buffer is comfortable, never held longer than `max_delay_s`, and never without a reader.
        Ends after the last event.

        With `heartbeat_s`, an empty batch comes whenever there was nothing for that long.

        Raises TokenFlowError when the stream cannot be finished. Closing it early cancels the
        request.
        """
        coalescer = StreamCoalescer(self.token_rate, max_delay_s=max_delay_s)
        seen = 0
        silence_s = heartbeat_s or math.inf
        beat_at = time.monotonic() + silence_s
        try:
            while True:
                now = time.monotonic()
                if len(self._pending) > seen:
                    coalescer.add(len(self._pending) - seen, now)
                    seen = len(self._pending)
                done = self.finish_reason is not None
                if self._pending and (done or coalescer.due(now)):
                    batch, self._pending = self._pending, []
                    seen = 0
                    coalescer.sent(now)
                    yield batch
                    beat_at = time.monotonic() + silence_s
                    continue
                if done:
                    if self._error is not None:
                        raise self._error
                    return
                if now >= beat_at:
                    yield []
                    beat_at = time.monotonic() + silence_s
                    continue
                self._ready.clear()
                due = coalescer.next_due(now)
                await self._wait(beat_at if due is None else min(due, beat_at), now)
        finally:
            self._manager.close(self)

    async def _wait(self, until: float, now: float) -> None:
        if until == math.inf:
            await self._ready.wait()
            return
        try:
            async with asyncio.timeout(max(0.0, until - now)):
                await self._ready.wait()
        except TimeoutError:
            pass


class StreamManager:
    """Opens streams on replicas, demultiplexes their frames, moves streams off lost replicas."""

    def __init__(self, handle: Any, *, failover_timeout_s: float) -> None:
        self.ingress_id = uuid.uuid4().hex
        self.failovers = 0
        """Streams moved to another replica, total."""
        self._handle = handle
        self._failover_timeout_s = failover_timeout_s
        self._streams: dict[str, Stream] = {}
        """By attempt id."""
        self._pumps: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def active(self) -> int:
        return len(self._streams)

    def find(self, request_id: str) -> list[Stream]:
        """Live streams of a client's request."""
        return [s for s in self._streams.values() if s.request_id == request_id]

    async def open(self, stream: Stream) -> None:
        """Submit a new stream; returns once a replica has taken it.

        Raises what the replica refuses it with: InvalidRequestError, CapacityError. When this call
        is cancelled the submission still runs to its end, so that `close` can undo it.
        """
        await asyncio.shield(self._spawn(self._place(stream)))

    def close(self, stream: Stream) -> None:
        """The client is served or gone: forget the stream, and end it on its replica. Idempotent,
        and valid in every state, also while the stream is being opened or moved."""
        self._release(stream)
        if stream.finish_reason is None:
            stream.finish_reason = "cancelled"

    def cancel(self, stream: Stream) -> None:
        """End a stream on someone else's word; its reader gets RequestCancelledError."""
        self._release(stream)
        stream.fail(RequestCancelledError("The request was cancelled."))

    def _release(self, stream: Stream) -> None:
        known = self._streams.pop(stream.attempt_id, None)
        REGISTRY.finish(stream.attempt_id)
        if known is not None and stream.finish_reason is None and stream.replica_id is not None:
            self._spawn(self._cancel(stream.attempt_id, stream.replica_id))

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """What a replica says about the model. Raises EngineDeadError when none answers in time."""
        return await self._spawn(self._info(timeout_s))

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of every replica that answers."""
        results = await asyncio.gather(
            *(self._spawn(self._stats(replica_id)) for replica_id in REGISTRY.replicas),
            return_exceptions=True,
        )
        return [r for r in results if isinstance(r, dict)]

    async def _info(self, timeout_s: float) -> dict[str, Any]:
        from ray.exceptions import RayActorError

        response = self._handle.info.remote()
        try:
            async with asyncio.timeout(timeout_s):
                info: dict[str, Any] = await response
                return info
        except (TimeoutError, RayActorError) as error:
            response.cancel()
            raise EngineDeadError("no replica answers") from error

    async def _stats(self, replica_id: str) -> Any:
        response = self._handle.stats.remote(target=replica_id)
        try:
            async with asyncio.timeout(_STATS_TIMEOUT_S):
                return await response
        except TimeoutError:
            response.cancel()
            raise

    # -- placing and moving ---------------------------------------------------------------------

    async def _place(self, stream: Stream) -> None:
        """Hand the stream to a replica; waits for one, at most `failover_timeout_s`."""
        from ray.exceptions import RayActorError

        deadline = time.monotonic() + self._failover_timeout_s
        while True:
            stream.attempt += 1
            attempt_id = stream.attempt_id
            submission = Submission(
                request_id=attempt_id,
                ingress_id=self.ingress_id,
                prompt_ids=stream.prompt_ids,
                params=stream.params,
                token_rate=stream.token_rate,
                resumed_ids=tuple(stream.token_ids),
                waited_s=time.monotonic() - stream.arrived_s,
                cache_salt=stream.cache_salt,
                kv_source=stream.kv_source,
            )
            self._streams[attempt_id] = stream
            try:
                replica_id = await self._submit(submission, deadline)
            except BaseException as error:
                self._streams.pop(attempt_id, None)
                REGISTRY.finish(attempt_id)
                lost = isinstance(error, RayActorError | EngineDeadError)
                if not lost or time.monotonic() > deadline or stream.attempt >= MAX_ATTEMPTS:
                    raise
                await asyncio.sleep(_RETRY_PAUSE_S)
                if stream.finish_reason is not None:
                    return
                continue
            if stream.finish_reason is not None:
                # The client left while the request was on its way.
                self._streams.pop(attempt_id, None)
                REGISTRY.finish(attempt_id)
                self._spawn(self._cancel(attempt_id, replica_id))
                return
            stream.replica_id = replica_id
            if replica_id not in self._pumps:
                self._pumps[replica_id] = self._spawn(self._pump(replica_id))
            return

    async def _submit(self, submission: Submission, deadline: float) -> str:
        """The id of the replica that took it. Raises EngineDeadError when none is there in time."""
        response = self._handle.submit.remote(submission)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                replica_id: str = await response
                return replica_id
        except TimeoutError:
            response.cancel()
            raise EngineDeadError("no replica took the request in time") from None

    async def _pump(self, replica_id: str) -> None:
        """Fetch the frames of one replica until it is lost."""
        frames = self._handle.options(stream=True, method_name="frames").remote(
            self.ingress_id, target=replica_id
        )
        try:
            async for frame in frames:
                news = take_news(frame)
                if news is not None:
                    REGISTRY.report(replica_id, news.report, news.request_ids)
                for event in unpack(frame):
                    stream = self._streams.get(event.request_id)
                    if stream is None:
                        continue
                    stream.deliver(event)
                    if stream.finish_reason is not None:
                        del self._streams[event.request_id]
                        REGISTRY.finish(event.request_id)
        except asyncio.CancelledError:
            frames.cancel()
            raise
        except Exception as error:
            logger.warning("lost replica %s: %s", replica_id, type(error).__name__)
        finally:
            self._pumps.pop(replica_id, None)
            for stream in list(self._streams.values()):
                if stream.replica_id == replica_id:
                    self._spawn(self._move(stream))

    async def _move(self, stream: Stream) -> None:
        """Resubmit a stream whose replica is lost."""
        self._streams.pop(stream.attempt_id, None)
        REGISTRY.finish(stream.attempt_id)
        stream.kv_source = REGISTRY.node_of(stream.replica_id or "") or None
        stream.replica_id = None
        if stream.finish_reason is not None:
            return
        self.failovers += 1
        try:
            await self._place(stream)
        except Exception as error:
            stream.fail(TokenFlowError(f"the stream lost its replica and found no other: {error}"))

    async def _cancel(self, attempt_id: str, replica_id: str) -> None:
        try:
            await self._handle.cancel.remote([attempt_id], target=replica_id)
        except Exception as error:
            logger.info("cancel of %s not delivered: %s", attempt_id, type(error).__name__)

    def _spawn(self, coroutine: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        """Run in the background, outside the request that happens to be current.

        Every call to a replica is made this way: Serve cancels a request's own calls together with
        it, and two that are made at once would share one id, upon which its router spins for ever.
        """
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
