"""The streams of one ingress process: every token a client was promised, exactly once, in order.

The ingress owns a stream. It remembers each token that arrived; when the replica that made them is
lost, it resubmits prompt + tokens so far and goes on at the next one. Per replica there is one
frame subscription (the pump), whatever the number of streams.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.watch import ReplicaWatch
from tokenflow.cluster.wire import Holding, Notice, Submission, unpack, unpack_events
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
_CALL_TIMEOUT_S = 2.0
"""Of a question to a replica that other replicas can answer as well."""
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
        self._handle = handle
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
        self._watch = ReplicaWatch(replica_silence_s)
        self._look_s = min(replica_silence_s / _LOOKS_PER_SILENCE, _LONGEST_LOOK_S)
        self._watcher: asyncio.Task[None] | None = None
        self._moving = asyncio.Semaphore(_MOVES_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def active(self) -> int:
        return len(self._open)

    def find(self, request_id: str) -> list[Stream]:
        """Live streams of a client's request."""
        return [s for s in self._open.values() if s.request_id == request_id]

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

    def cancel(self, stream: Stream) -> None:
        """End a stream on someone else's word; its reader gets RequestCancelledError."""
        self._release(stream)
        stream.fail(RequestCancelledError("The request was cancelled."))

    def _release(self, stream: Stream) -> None:
        self._open.pop(stream.id, None)
        known = self._streams.pop(stream.attempt_id, None)
        REGISTRY.finish(stream.attempt_id)
        self._end_moves(stream)
        if known is not None and stream.finish_reason is None and stream.replica_id is not None:
            self._cancel([stream.attempt_id], stream.replica_id)

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
                await self._ask("change", (stream.attempt_id, change), stream.replica_id)
            except Exception as error:
                logger.info("change of %s not delivered: %s", stream.id, type(error).__name__)
        self._telling.discard(stream.id)

    def _is_moving(self, stream: Stream) -> bool:
        return any(move.stream is stream for move in self._moves.values())

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """What a replica says about the model. Raises EngineDeadError when none answers in time."""
        return await self._spawn(self._info(timeout_s))

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

    async def stats(self) -> list[dict[str, Any]]:
        """Counters of every replica that answers."""
        return [r for r in await self._ask_all("stats") if isinstance(r, dict)]

    async def _ask_all(self, method: str, *args: Any) -> list[Any]:
        """The answers, or the exceptions, of all replicas that are not silent."""
        asked = [name for name in REGISTRY.replicas if not REGISTRY.avoids(name)]
        return await asyncio.gather(
            *(self._spawn(self._ask(method, args, name)) for name in asked),
            return_exceptions=True,
        )

    async def _ask(self, method: str, args: tuple[Any, ...], replica_id: str) -> Any:
        response = getattr(self._handle, method).remote(*args, target=replica_id)
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await response
        except TimeoutError:
            response.cancel()
            raise

    # -- requests of other ingresses ------------------------------------------------------------

    async def control(self, request_id: str, change: ReaderChange | None) -> bool:
        """Have a client's request changed, or (None) ended, whichever ingress it belongs to. False
        when no replica knows it. Raises InvalidRequestError."""
        answers = await self._ask_all("control", request_id, change)
        for answer in answers:
            if isinstance(answer, InvalidRequestError):
                raise answer
        return any(answer is True for answer in answers)

    async def adopt(self, request_id: str) -> list[Stream]:
        """Take a client's request over from an ingress that is gone, or that its client left: the
        streams of the choices that replicas still have. They have no reader yet."""
        self._adoptions += 1
        try:
            asked = [name for name in REGISTRY.replicas if not REGISTRY.avoids(name)]
            answers = await asyncio.gather(
                *(self._spawn(self._ask("adopt", (request_id, self.ingress_id), n)) for n in asked),
                return_exceptions=True,
            )
            found = [
                (holding, name)
                for name, answer in zip(asked, answers, strict=True)
                if not isinstance(answer, BaseException)
                for holding in answer
            ]
            return self._adopted(found)
        finally:
            self._adoptions -= 1
            if not self._adoptions:
                self._early.clear()

    def _adopted(self, found: list[tuple[Holding, str]]) -> list[Stream]:
        if not found:
            return []
        # Clients may use an id again: it means the request that came last.
        context = min(found, key=lambda item: item[0].age_s)[0].submission.context
        newest: dict[int, Stream] = {}
        for holding, replica_id in found:
            submission = holding.submission
            stream = self._from_holding(holding, replica_id)
            rival = newest.get(submission.choice)
            if submission.context != context or (rival and rival.attempt > stream.attempt):
                # A request of old, or an attempt that its ingress had given up.
                self._cancel([stream.attempt_id], replica_id)
                continue
            if rival is not None and rival.replica_id is not None:
                self._cancel([rival.attempt_id], rival.replica_id)
            newest[submission.choice] = stream
        for stream in newest.values():
            early = self._early.pop(stream.attempt_id, [])
            if stream.finish_reason is None:
                self._open[stream.id] = self._streams[stream.attempt_id] = stream
                if stream.replica_id is not None:
                    self._listen(stream.replica_id)
                for event in early:
                    self._take(event)
        return [newest[choice] for choice in sorted(newest)]

    def _from_holding(self, holding: Holding, replica_id: str) -> Stream:
        submission = holding.submission
        stream = Stream(
            self,
            submission.client_id,
            submission.prompt_ids,
            submission.params,
            submission.token_rate,
            submission.cache_salt,
            choice=submission.choice,
            context=submission.context,
        )
        stream.attempt_id = submission.request_id
        stream.id, _, attempt = submission.request_id.rpartition("#")
        stream.attempt = int(attempt)
        stream.paused = submission.paused
        stream.unread = True
        stream.replica_id = replica_id
        stream.arrived_s = time.monotonic() - holding.age_s
        for event in unpack_events(holding.events):
            stream.deliver(event)
        return stream

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
            past=tuple(tuple(event) for event in stream.history),
            consumed=stream.consumed(),
            paused=stream.stands_still,
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
            self._cancel([attempt_id], replica_id)
            return
        stream.replica_id = replica_id
        self._listen(replica_id)
        if stream.id in self._changes:
            self._tell(stream, ReaderChange())

    async def _submit(
        self, submission: Submission, deadline: float, target: str | None = None
    ) -> str:
        """The id of the replica that took it. Raises EngineDeadError when none is there in time."""
        attempt_id, rate = submission.request_id, submission.token_rate
        if target is not None:
            REGISTRY.assign(attempt_id, rate, [target])
        response = self._handle.submit.remote(submission, route=(attempt_id, rate), target=target)
        answer = self._spawn(_answer(response))
        try:
            while True:
                left = deadline - time.monotonic()
                done, _ = await asyncio.wait([answer], timeout=max(0.0, min(left, self._look_s)))
                if done:
                    replica_id: str = answer.result()
                    return replica_id
                where = REGISTRY.where(attempt_id)
                # Asked of one that fell silent: it may never answer.
                if left <= 0 or (where is not None and REGISTRY.avoids(where)):
                    response.cancel()
                    if where is not None:
                        self._cancel([attempt_id], where)
                    raise EngineDeadError("no replica took the request in time")
        finally:
            answer.cancel()

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
        self._moves[move.attempt_id] = move
        deadline = time.monotonic() + self._failover_timeout_s
        submission = self._submission(stream)
        self._streams[submission.request_id] = stream
        try:
            replica_id = await self._submit(submission, deadline, target)
        except Exception as error:
            logger.info("stream %s stays: %s", stream.id, error)
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
        if not move.lost:
            self._cancel([move.attempt_id], move.replica_id)
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

    async def _pump(self, replica_id: str) -> None:
        """Fetch the frames of one replica until it is lost."""
        frames = self._handle.options(stream=True, method_name="frames").remote(
            self.ingress_id, target=replica_id
        )
        try:
            async for frame in frames:
                if self._watch.heard(replica_id, time.monotonic()):
                    self._heard_again(replica_id)
                events, notices = unpack(frame)
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
            self._abandon(replica_id)

    def _take(self, event: TokenEvent) -> None:
        """Give an event to its stream."""
        stream = self._streams.get(event.request_id)
        if stream is None:
            if self._adoptions:
                self._early[event.request_id].append(event)
            return
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
            if stream.replica_id is not None:
                # One that is on its way to a replica is ended when it has arrived.
                self._cancel([stream.attempt_id], stream.replica_id)

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
                logger.info("change of %s: %s", stream.id, error)

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
        stream.replica_id = None
        if stream.finish_reason is None:
            self.failovers += 1
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
            self._cancel(stale, replica_id)

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

    def _cancel(self, attempt_ids: list[str], replica_id: str) -> None:
        """End attempts on a replica, as soon as it listens."""
        if REGISTRY.avoids(replica_id):
            self._stale[replica_id] += attempt_ids
        else:
            self._spawn(self._send_cancel(attempt_ids, replica_id))

    async def _send_cancel(self, attempt_ids: Iterable[str], replica_id: str) -> None:
        try:
            await self._handle.cancel.remote(list(attempt_ids), target=replica_id)
        except Exception as error:
            logger.info("cancel not delivered to %s: %s", replica_id, type(error).__name__)

    def _spawn(self, coroutine: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        """Run in the background, outside the request that happens to be current.

        Every call to a replica is made this way: Serve cancels a request's own calls together with
        it, and two that are made at once would share one id, upon which its router spins for ever.
        """
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _answer(response: Any) -> Any:
    return await response
