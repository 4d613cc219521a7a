"""One sequence on its way to one client: the tokens it was promised, and who reads them.

A stream knows nothing of replicas; `streams.py` brings its events here and moves it about.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Protocol

from tokenflow.cluster.attempts import Attempts
from tokenflow.cluster.coalescer import StreamCoalescer
from tokenflow.replicas.errors import InvalidRequestError, ReaderReplacedError, TokenFlowError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import SamplingParams


class Closer(Protocol):
    """What a stream needs of its manager."""

    def close(self, stream: Stream) -> None: ...


class Stream:
    """`StreamManager.open` starts it. With a `context` it may be read again after its reader left,
    by this ingress or by another one: then its events are kept."""

    def __init__(
        self,
        manager: Closer,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        token_rate: float,
        cache_salt: str | None = None,
        *,
        choice: int = 0,
        context: bytes = b"",
        traced: bool = False,
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
        self.choice = choice
        self.context = context
        """See `Submission.context`."""
        self.attempts = Attempts() if traced else None
        """What it went through, if it is traced."""
        self.token_ids: list[int] = []
        """All tokens received so far."""
        self.history: list[TokenEvent] = []
        """Their events, with a context."""
        self.cached_tokens = 0
        """Prompt tokens that a cache spared it, as told with the first token."""
        self.finish_reason: str | None = None
        self.arrived_s = time.monotonic()
        self.paused = False
        """Whether its reader has asked for a pause."""
        self.unread = False
        """Whether it has no reader for now."""
        self.taken = False
        """Whether another ingress goes on with it."""
        self.attempt = 0
        self.attempt_id = ""
        """The request id on the replica; new for each attempt."""
        self.replica_id: str | None = None
        self.kv_source: str | None = None
        """The node of the replica that it was on before."""
        self.remade = False
        """Whether it is made anew, since what had been made is lost."""
        self._manager = manager
        self._from = 0
        """Tokens its reader came with."""
        self._reader: object | None = None
        self._coalescer = StreamCoalescer(token_rate)
        self._pending: list[TokenEvent] = []
        self._ready = asyncio.Event()
        self._held = False
        """Pending tokens have a time at which they go, which more of them do not change: they wake
        nobody, or every stream would be woken with every step."""
        self._error: Exception | None = None

    def next_attempt(self) -> str:
        """A new `attempt_id`."""
        self.attempt += 1
        self.attempt_id = f"{self.id}#{self.attempt}"
        if self.attempts is not None:
            self.attempts.begin(self.attempt_id)
        return self.attempt_id

    @property
    def resumable(self) -> bool:
        return bool(self.context)

    # -- what comes from replicas ---------------------------------------------------------------

    def keep_notes(self, event: TokenEvent) -> TokenEvent:
        """The event without what it tells of the stream's life, which is kept for its trace."""
        if not event.notes:
            return event
        if self.attempts is not None:
            self.attempts.note(event.request_id, event.notes)
        return event._replace(notes=())

    def deliver(self, event: TokenEvent) -> None:
        """Take an event of the present attempt."""
        event = self.keep_notes(event)
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
        if self.resumable:
            self.history.append(event)
        self._queue(event)
        if not self._held or self.finish_reason is not None:
            self._ready.set()

    def fail(self, error: Exception) -> None:
        """No more tokens will come."""
        if self.finish_reason is None:
            self.finish_reason = "error"
            self._error = error
            self._ready.set()

    # -- its reader -----------------------------------------------------------------------------

    @property
    def stands_still(self) -> bool:
        """Whether nobody consumes it for now."""
        return self.paused or self.unread

    def consumed(self) -> int:
        """Tokens its reader has consumed, as far as is known."""
        return self._coalescer.consumed(time.monotonic())

    def change(self, change: ReaderChange) -> None:
        """What the reader does from now on. Raises InvalidRequestError when it has consumed more
        than it was sent."""
        try:
            self._coalescer.change(change, time.monotonic())
        except ValueError:
            sent = self._coalescer.tokens_sent
            raise InvalidRequestError(
                f"consumed is {change.consumed}, but only {sent} tokens were sent.",
                param="consumed",
            ) from None
        if change.token_rate is not None:
            self.token_rate = change.token_rate
        if change.paused is not None:
            self.paused = change.paused
        self._ready.set()

    def check_place(self, count: int) -> None:
        """Raise InvalidRequestError (416) when nobody can have so many tokens (one more for the
        end) yet."""
        most = len(self.token_ids) + (self.finish_reason is not None)
        if count > most and not self.remade:
            raise InvalidRequestError(
                f"Choice {self.choice} has made {len(self.token_ids)} tokens; it cannot go on "
                f"after {count}.",
                status=416,
            )

    def attach(self, count: int) -> None:
        """A new reader comes, who has so many tokens, and if it has one more the end: the batches
        go on from there, and those of an earlier reader end. Needs a context."""
        self._from = count
        self._pending = []
        for event in self.history:
            self._queue(event)
        has = min(count, len(self.token_ids))
        self._coalescer = StreamCoalescer(self.token_rate)
        self._coalescer.has(has, time.monotonic())
        if self.paused:
            self._coalescer.change(ReaderChange(paused=True), time.monotonic())
        self._reader = None
        self.unread = False
        self._ready.set()

    def _queue(self, event: TokenEvent) -> None:
        """Give the reader what it does not have."""
        tokens = event.offset + (event.token_id >= 0)
        if event.offset >= self._from:
            self._pending.append(event)
        elif event.finish_reason is not None and tokens >= self._from:
            # It has the last token, but not the news that it was.
            tail = event._replace(token_id=-1, text="", logprobs=None, offset=tokens)
            self._pending.append(tail)

    async def batches(
        self, max_delay_s: float, heartbeat_s: float | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Events in batches as the reader needs them: the first at once, later ones together while
        its buffer is comfortable, never held longer than `max_delay_s`, and never without a reader.
        Ends after the last event.

        With `heartbeat_s`, an empty batch comes whenever there was nothing for that long.

        Raises TokenFlowError when the stream cannot be finished, ReaderReplacedError when another
        reader came. Closing it early cancels the request, unless it may be read again.
        """
        reader = self._reader = object()
        coalescer = self._coalescer
        coalescer.max_delay_s = max_delay_s
        seen = 0
        silence_s = heartbeat_s or math.inf
        beat_at = time.monotonic() + silence_s
        try:
            while True:
                if self._reader is not reader:
                    raise ReaderReplacedError("Another connection goes on with this request.")
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
                self._held = due is not None
                await self._wait(beat_at if due is None else min(due, beat_at), now)
                self._held = False
        finally:
            if not self.resumable:
                self._manager.close(self)

    async def _wait(self, until: float, now: float) -> None:
        if until == math.inf:
            await self._ready.wait()
            return
        # Cheaper than a timeout, and made for every message.
        alarm = asyncio.get_running_loop().call_later(max(0.0, until - now), self._ready.set)
        try:
            await self._ready.wait()
        finally:
            alarm.cancel()
