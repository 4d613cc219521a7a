"""The streams of one ingress process: every token a client was promised, exactly once, in order.

The ingress owns a stream. It remembers each token that arrived; when the replica that made them is
lost, it resubmits prompt + tokens so far and goes on at the next one. Per replica there is one
frame subscription (the pump), whatever the number of streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenflow.cluster.logs import about
from tokenflow.cluster.replica_calls import ReplicaCalls
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.routing import counted_rate
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.takeover import sort_out
from tokenflow.cluster.tenancy import tenant_of
from tokenflow.cluster.watch import ReplicaWatch
from tokenflow.cluster.wire import Notice, Submission, unpack
from tokenflow.replicas.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    ReaderReplacedError,
    RequestCancelledError,
    TokenFlowError,
)
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange

logger = logging.getLogger("ray.serve")

_Result = TypeVar("_Result")

_RETRY_PAUSE_S = 0.25
_MOVES_AT_ONCE = 8
"""Streams that are moved off a leaving replica at the same time."""
_LOOKS_PER_SILENCE = 8
_LONGEST_LOOK_S = 0.1


@dataclass(slots=True)
class _Move:
    """A stream between two replicas: the old one goes on until the new one speaks."""

    stream: Stream
    attempt_id: str
    """On the old one."""
    replica_id: str
    lost: bool = False
    """Whether the old one was lost meanwhile."""


class StreamManager:
    """Opens streams on replicas, demultiplexes their frames, moves streams off lost replicas."""

    def __init__(
        self, handle: Any, *, failover_timeout_s: float, replica_silence_s: float = 3.0
    ) -> None:
        self.ingress_id = uuid.uuid4().hex
        self.failovers = 0
        """Streams moved off a lost replica, total."""
        self.moves = 0
        """Streams moved off a living one, total."""
        self._failover_timeout_s = failover_timeout_s
        self._open: dict[str, Stream] = {}
        """Streams that have not ended, by id."""
        self._streams: dict[str, Stream] = {}
        """Those on a replica, or on their way to one, by attempt id."""
        self._moves: dict[str, _Move] = {}
        """By the attempt id on the old replica."""
        self._changes: dict[str, ReaderChange] = {}
        """What the replicas have not been told of readers, by stream id."""
        self._telling: set[str] = set()
        self._stale: defaultdict[str, list[str]] = defaultdict(list)
        """Attempts to be cancelled on replicas that do not listen now."""
        self._adoptions = 0
        self._early: defaultdict[str, list[TokenEvent]] = defaultdict(list)
        """Events of requests that are being adopted, by attempt id."""
        self._pumps: dict[str, asyncio.Task[None]] = {}
        self._ends = False
        """Whether this process ends, and listens no more."""
        self._watch = ReplicaWatch(replica_silence_s)
        self._look_s = min(replica_silence_s / _LOOKS_PER_SILENCE, _LONGEST_LOOK_S)
        self._calls = ReplicaCalls(handle, look_s=self._look_s)
        self._watcher: asyncio.Task[None] | None = None
        self._moving = asyncio.Semaphore(_MOVES_AT_ONCE)

    @property
    def active(self) -> int:
        return len(self._open)

    def find(self, request_id: str) -> list[Stream]:
        """Live streams of a client's request."""
        return [s for s in self._open.values() if s.request_id == request_id]

    def rates(self) -> dict[str, float]:
        """The sums of the token rates of each tenant's live streams, tokens/s."""
        rates: defaultdict[str, float] = defaultdict(float)
        for stream in self._open.values():
            rates[tenant_of(stream.request_id)] += counted_rate(stream.token_rate)
        return rates

    def by_attempt(self, attempt_id: str) -> Stream | None:
        """The live stream that a replica knows under this id."""
        return self._streams.get(attempt_id)

    def on_replica(self, replica_id: str) -> list[Stream]:
        """Live streams that a replica serves."""
        return [s for s in self._open.values() if s.replica_id == replica_id]

    async def open(self, stream: Stream) -> None:
        """Submit a new stream; returns once a replica has taken it.

        Raises what the replica refuses it with: InvalidRequestError, CapacityError. When this call
        is cancelled the submission still runs to its end, so that `close` can undo it.
        """
        self._open[stream.id] = stream
        try:
            await asyncio.shield(self._spawn(self._place(stream)))
        except Exception:
            self._open.pop(stream.id, None)
            raise

    def close(self, stream: Stream) -> None:
        """The client is served or gone: forget the stream, and end it on its replica. Idempotent,
        and valid in every state, also while the stream is being opened or moved."""
        self._release(stream)
        if stream.finish_reason is None:
            stream.finish_reason = "cancelled"

    def cancel(self, stream: Stream, why: TokenFlowError | None = None) -> None:
        """End a stream on someone else's word; its reader gets RequestCancelledError, or `why`."""
        self._release(stream)
        stream.fail(why or RequestCancelledError("The request was cancelled."))

    def _release(self, stream: Stream) -> None:
        self._open.pop(stream.id, None)
        known = self._streams.pop(stream.attempt_id, None)
        REGISTRY.finish(stream.attempt_id)
        self._end_moves(stream)
        if known is not None and stream.finish_reason is None:
            self._cancel_on(stream.replica_id, stream.attempt_id)

    def change(self, stream: Stream, change: ReaderChange) -> None:
        """What the stream's reader does from now on. Raises InvalidRequestError when it has
        consumed more than it was sent."""
        stream.change(change)
        self._tell(stream, change)

    def set_unread(self, stream: Stream) -> None:
        """Its reader is gone for now; see `read_again`."""
        stream.unread = True
        self._tell(stream, ReaderChange())

    def read_again(self, stream: Stream, count: int) -> None:
        """A reader comes who has so many tokens; see `Stream.attach`."""
        stream.attach(count)
        self._tell(stream, ReaderChange(consumed=min(count, len(stream.token_ids))))

    def _tell(self, stream: Stream, change: ReaderChange) -> None:
        """Let the stream's replica know, in order and one call at a time; what comes meanwhile
        goes together."""
        if stream.finish_reason is not None:
            return
        before = self._changes.get(stream.id, ReaderChange())
        self._changes[stream.id] = ReaderChange(
            token_rate=before.token_rate if change.token_rate is None else change.token_rate,
            paused=stream.stands_still,
            consumed=before.consumed if change.consumed is None else change.consumed,
        )
        if stream.id not in self._telling:
            self._telling.add(stream.id)
            self._spawn(self._send_changes(stream))

    async def _send_changes(self, stream: Stream) -> None:
        # While it is between replicas nobody is told: whoever takes it hears of it then.
        while stream.replica_id is not None and not self._is_moving(stream):
            change = self._changes.pop(stream.id, None)
            if change is None:
                break
            try:
                await self._calls.ask(stream.replica_id, "change", stream.attempt_id, change)
            except Exception as error:
                logger.info(
                    "change not delivered: %s",
                    type(error).__name__,
                    extra=about(stream.request_id),
                )
        self._telling.discard(stream.id)

    def _is_moving(self, stream: Stream) -> bool:
        return any(move.stream is stream for move in self._moves.values())

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """See `ReplicaCalls.info`."""
        return await self._calls.info(timeout_s)

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of every replica that answers."""
        answers = await self._calls.ask_all("stats")
        return [answer for _, answer in answers if isinstance(answer, dict)]

    # -- requests of other ingresses ------------------------------------------------------------

    async def control(self, request_id: str, change: ReaderChange | None) -> bool:
        """Have a client's request changed, or (None) ended, whichever ingress it belongs to. False
        when no replica knows it. Raises InvalidRequestError."""
        answers = await self._calls.ask_all("control", request_id, change)
        for _, answer in answers:
            if isinstance(answer, InvalidRequestError):
                raise answer
        return any(answer is True for _, answer in answers)

    async def adopt(self, request_id: str) -> list[Stream]:
        """Take a client's request over from an ingress that is gone, or that its client left: the
        streams of the choices that replicas still have. They have no reader yet."""
        self._adoptions += 1
        try:
            answers = await self._calls.ask_all("adopt", request_id, self.ingress_id)
            streams, old = sort_out(
                self,
                (
                    (holding, name)
                    for name, answer in answers
                    if not isinstance(answer, BaseException)
                    for holding in answer
                ),
            )
            for stream in old:
                self._cancel_on(stream.replica_id, stream.attempt_id)
            for stream in streams:
                if stream.finish_reason is None and stream.replica_id is not None:
                    self._open[stream.id] = self._streams[stream.attempt_id] = stream
                    self._listen(stream.replica_id)
                    for event in self._early.pop(stream.attempt_id, []):
                        self._take(event)
            return streams
        finally:
            self._adoptions -= 1
            if not self._adoptions:
                self._early.clear()

    # -- placing and moving ---------------------------------------------------------------------

    def _submission(self, stream: Stream) -> Submission:
        """The stream as it is now, as a new attempt."""
        self._changes.pop(stream.id, None)
        return Submission(
            request_id=stream.next_attempt(),
            ingress_id=self.ingress_id,
            prompt_ids=stream.prompt_ids,
            params=stream.params,
            token_rate=stream.token_rate,
            resumed_ids=tuple(stream.token_ids),
            waited_s=time.monotonic() - stream.arrived_s,
            cache_salt=stream.cache_salt,
            client_id=stream.request_id,
            choice=stream.choice,
            context=stream.context,
            traced=stream.attempts is not None,
            past=tuple(tuple(event) for event in stream.history),
            consumed=stream.consumed(),
            paused=stream.stands_still,
            kv_source=stream.kv_source,
        )

    async def _place(self, stream: Stream) -> None:
        """Hand the stream to a replica; waits for one, at most `failover_timeout_s`."""
        from ray.exceptions import RayActorError

        deadline = time.monotonic() + self._failover_timeout_s
        while True:
            submission = self._submission(stream)
            attempt_id = submission.request_id
            self._streams[attempt_id] = stream
            try:
                replica_id = await self._submit(submission, deadline)
            except BaseException as error:
                self._streams.pop(attempt_id, None)
                REGISTRY.finish(attempt_id)
                # A stream that has begun waits for a place; a new one is refused.
                lost = isinstance(error, RayActorError | EngineDeadError) or (
                    isinstance(error, CapacityError) and bool(stream.token_ids)
                )
                if not lost or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_PAUSE_S)
                if stream.finish_reason is not None:
                    return
                continue
            self._placed(stream, attempt_id, replica_id)
            return

    def _placed(self, stream: Stream, attempt_id: str, replica_id: str) -> None:
        if stream.finish_reason is not None or stream.attempt_id != attempt_id:
            # It ended, or the client left, or it was lost, while the request was on its way.
            self._streams.pop(attempt_id, None)
            REGISTRY.finish(attempt_id)
            self._cancel_on(replica_id, attempt_id)
            return
        stream.replica_id = replica_id
        if stream.attempts is not None:
            stream.attempts.placed(attempt_id, replica_id)
        self._listen(replica_id)
        if stream.id in self._changes:
            self._tell(stream, ReaderChange())

    async def _submit(
        self, submission: Submission, deadline: float, target: str | None = None
    ) -> str:
        """See `ReplicaCalls.submit`; what was given up is ended wherever it may have got."""
        try:
            return await self._calls.submit(submission, deadline, target)
        except EngineDeadError:
            self._cancel_on(REGISTRY.where(submission.request_id), submission.request_id)
            raise

    async def move_to(self, stream: Stream, replica_id: str | None = None) -> bool:
        """Move a live stream to another replica, to `replica_id` or to where the router says.

        The new one takes it with all tokens so far; the old one goes on until the new one speaks,
        so that the reader sees no pause. What both say is taken once. False when it stays: it has
        ended, is on no replica or moving already, or nobody takes it.
        """
        if stream.finish_reason is not None or stream.replica_id in (None, replica_id):
            return False
        if self._is_moving(stream):
            return False
        return await asyncio.shield(self._spawn(self._relocate(stream, replica_id)))

    async def _relocate(self, stream: Stream, target: str | None) -> bool:
        assert stream.replica_id is not None
        move = _Move(stream, stream.attempt_id, stream.replica_id)
        stream.kv_source = REGISTRY.node_of(stream.replica_id) or None
        self._moves[move.attempt_id] = move
        deadline = time.monotonic() + self._failover_timeout_s
        submission = self._submission(stream)
        self._streams[submission.request_id] = stream
        try:
            replica_id = await self._submit(submission, deadline, target)
        except Exception as error:
            logger.info("stream stays: %s", error, extra=about(stream.request_id))
            if stream.attempts is not None:
                stream.attempts.end(submission.request_id, "refused")
            self._streams.pop(submission.request_id, None)
            REGISTRY.finish(submission.request_id)
            if stream.attempt_id == submission.request_id:
                self._stay(move)
            return False
        moved = stream.finish_reason is None
        self.moves += moved
        if not moved or move.lost:
            self._end_move(move)
        self._placed(stream, submission.request_id, replica_id)
        return moved

    def _end_move(self, move: _Move) -> None:
        """The new replica has it, or nobody wants it any more: the old one is done."""
        if self._moves.pop(move.attempt_id, None) is None:
            return
        self._streams.pop(move.attempt_id, None)
        REGISTRY.finish(move.attempt_id)
        if move.stream.attempts is not None:
            move.stream.attempts.end(move.attempt_id, "lost" if move.lost else "moved")
        if not move.lost:
            self._cancel_on(move.replica_id, move.attempt_id)
        if move.stream.id in self._changes:
            self._tell(move.stream, ReaderChange())

    def _stay(self, move: _Move) -> None:
        """Nobody took it: the old replica goes on, if it can."""
        stream = move.stream
        if self._moves.pop(move.attempt_id, None) is None or move.lost:
            self._lose(stream)
            return
        stream.attempt_id = move.attempt_id
        self._tell(stream, ReaderChange(token_rate=stream.token_rate))

    # -- what replicas say ----------------------------------------------------------------------

    def _listen(self, replica_id: str) -> None:
        if replica_id not in self._pumps:
            self._watch.heard(replica_id, time.monotonic())
            self._pumps[replica_id] = self._spawn(self._pump(replica_id))
        if self._watcher is None:
            self._watcher = self._spawn(self._look_after_replicas())

    def hang_up(self) -> None:
        """Stop listening, since this process ends: replicas that are to stop as well would wait for
        its calls. Its streams stay where they are, for the ingress that their clients come back to.
        On the event loop's thread."""
        self._ends = True
        for pump in list(self._pumps.values()):
            pump.cancel()

    async def _pump(self, replica_id: str) -> None:
        """Fetch the frames of one replica until it is lost."""
        frames = self._calls.frames(self.ingress_id, replica_id)
        try:
            async for frame in frames:
                if self._watch.heard(replica_id, time.monotonic()):
                    self._heard_again(replica_id)
                events, notices, news = unpack(frame)
                if news is not None:
                    REGISTRY.report(replica_id, news.report, news.request_ids)
                else:
                    REGISTRY.confirm(replica_id)
                for event in events:
                    self._take(event)
                for notice in notices:
                    self._obey(notice)
        except asyncio.CancelledError:
            frames.cancel()
            raise
        except Exception as error:
            logger.warning("lost replica %s: %s", replica_id, type(error).__name__)
        finally:
            self._pumps.pop(replica_id, None)
            self._watch.forget(replica_id)
            REGISTRY.trust(replica_id)
            self._stale.pop(replica_id, None)
            if not self._ends:
                self._abandon(replica_id)

    def _take(self, event: TokenEvent) -> None:
        """Give an event to its stream."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            if self._adoptions:
                self._early[event.request_id].append(event)
            return
        event = stream.keep_notes(event)
        if event.request_id == stream.attempt_id:
            self._end_moves(stream)
        if 0 <= event.offset < len(stream.token_ids) and event.token_id >= 0:
            if event.token_id != stream.token_ids[event.offset]:
                # Two replicas that compute differently: it goes on after what the reader has.
                self._cancel_attempts(stream)
                self._lose(stream)
            return
        stream.deliver(event)
        if stream.finish_reason is not None:
            self._cancel_attempts(stream, but=event.request_id)
            self._streams.pop(event.request_id, None)
            self._open.pop(stream.id, None)
            REGISTRY.finish(event.request_id)

    def _end_moves(self, stream: Stream) -> None:
        for move in [m for m in self._moves.values() if m.stream is stream]:
            self._end_move(move)

    def _cancel_attempts(self, stream: Stream, but: str = "") -> None:
        """End what replicas have of it, but for the attempt `but`."""
        self._end_moves(stream)
        if stream.attempt_id != but:
            self._streams.pop(stream.attempt_id, None)
            REGISTRY.finish(stream.attempt_id)
            # One that is on its way to a replica is ended when it has arrived.
            self._cancel_on(stream.replica_id, stream.attempt_id)

    def _obey(self, notice: Notice) -> None:
        """Do what another ingress was asked about a stream of this one."""
        stream = self._streams.get(notice.request_id)
        if stream is None:
            return
        if notice.kind == "cancel":
            self.cancel(stream)
        elif notice.kind == "taken":
            stream.taken = True
            self._streams.pop(notice.request_id, None)
            self._open.pop(stream.id, None)
            REGISTRY.finish(notice.request_id)
            stream.fail(ReaderReplacedError("Another connection goes on with this request."))
        elif notice.change is not None:
            try:
                self.change(stream, notice.change)
            except InvalidRequestError as error:
                logger.info("change refused: %s", error, extra=about(stream.request_id))

    async def _look_after_replicas(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            losses = self._watch.look(REGISTRY.replicas, time.monotonic())
            for replica_id in losses.silent:
                logger.warning("replica %s is silent: its streams move", replica_id)
                REGISTRY.avoid(replica_id)
                self._stale[replica_id] += self._abandon(replica_id)
            for replica_id in losses.leaving:
                self._spawn(self._evacuate(replica_id))

    def _abandon(self, replica_id: str) -> list[str]:
        """Resubmit the streams of a lost replica; their attempts on it."""
        attempts = []
        for move in list(self._moves.values()):
            if move.replica_id == replica_id:
                move.lost = True
                attempts.append(move.attempt_id)
                if move.stream.replica_id != replica_id:
                    self._end_move(move)  # the new one has it, and will speak
        for stream in self.on_replica(replica_id):
            if any(m.stream is stream and m.lost for m in self._moves.values()):
                continue  # on its way to another one
            attempts.append(stream.attempt_id)
            self._end_moves(stream)
            self._lose(stream)
        return attempts

    def _lose(self, stream: Stream) -> None:
        """Its replica is lost: resubmit it."""
        self._streams.pop(stream.attempt_id, None)
        REGISTRY.finish(stream.attempt_id)
        if stream.attempts is not None:
            stream.attempts.end(stream.attempt_id, "lost")
        stream.kv_source = REGISTRY.node_of(stream.replica_id or "") or None
        stream.replica_id = None
        if stream.finish_reason is None:
            self.failovers += 1
            logger.info(
                "stream has lost its replica after %d tokens",
                len(stream.token_ids),
                extra=about(stream.request_id),
            )
            self._spawn(self._place_again(stream))

    async def _place_again(self, stream: Stream) -> None:
        try:
            await self._place(stream)
        except Exception as error:
            self._open.pop(stream.id, None)
            stream.fail(TokenFlowError(f"the stream lost its replica and found no other: {error}"))

    def _heard_again(self, replica_id: str) -> None:
        logger.warning("replica %s speaks again", replica_id)
        REGISTRY.trust(replica_id)
        if stale := self._stale.pop(replica_id, []):
            self._cancel_on(replica_id, *stale)

    async def _evacuate(self, replica_id: str) -> None:
        """Move all streams off a replica that is about to stop, then let it go."""

        async def leave(stream: Stream) -> None:
            async with self._moving:
                while stream.replica_id == replica_id and stream.finish_reason is None:
                    if not await self.move_to(stream):
                        await asyncio.sleep(_RETRY_PAUSE_S)

        while replica_id in self._pumps:
            if streams := self.on_replica(replica_id):
                await asyncio.gather(*(leave(stream) for stream in streams))
            elif any(move.replica_id == replica_id for move in self._moves.values()):
                await asyncio.sleep(self._look_s)
            else:
                break
        if replica_id not in REGISTRY.replicas and (pump := self._pumps.get(replica_id)):
            pump.cancel()

    def _cancel_on(self, replica_id: str | None, *attempt_ids: str) -> None:
        """End attempts on a replica, as soon as it listens."""
        if replica_id is None:
            return
        if REGISTRY.avoids(replica_id):
            self._stale[replica_id] += attempt_ids
        else:
            self._spawn(self._calls.cancel(list(attempt_ids), replica_id))

    def _spawn(self, coroutine: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        return self._calls.spawn(coroutine)
