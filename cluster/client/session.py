"""One request over any number of connections: what to send next, which tokens are new, what a
failure means. No sockets, no clock, no sleeping: the two clients do that, in their own ways.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tokenflow.client.errors import (
    ClientError,
    DeadlineExceeded,
    Failure,
    ProtocolError,
    Unavailable,
)
from tokenflow.client.types import Chunk, Usage, chunk_of, usage_of
from tokenflow.cluster.rpc import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Retries:
    """How hard a client tries. Pauses double from `backoff_s` to `max_backoff_s`, each shortened
    at random by up to half, so that the clients of a dead server do not come back all at once."""

    attempts: int = 3
    """More tries of a request that was refused for now, or lost before its first token."""
    reconnect_s: float = 30.0
    """How long a lost stream is tried to be continued; the server's own grace period may be
    shorter. Counted anew after each message."""
    backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    max_retry_after_s: float = 30.0
    """A server that asks for more patience than this is not tried again."""


class Session:
    """The state of one stream. Use: send `next_call()`; feed each message to `take`, the end of
    the call to `failed`, which tells when to send the next one.

    The first call is Generate; once the server has the request, Resume with the number of tokens
    that are here, so that no token is lost or repeated however often the connection breaks.
    """

    def __init__(
        self,
        request: pb.GenerateRequest | None,
        *,
        request_id: str,
        offset: int = 0,
        targets: int = 1,
        first_target: int = 0,
        retries: Retries | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`request` None: continue the request of that id, which exists, at token `offset`."""
        self.request_id = request_id
        self.received = offset
        """Tokens that have arrived, and those before `offset`."""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.reconnects = 0
        """Calls that went on after a lost one."""
        self.target = first_target
        """Index of the address to use next."""
        self._request = request
        self._resumable = request is None or request.resumable
        self._targets = targets
        self._retries = retries or Retries()
        self._jitter = jitter
        self._resuming = request is None
        """Whether the next (or present) call is Resume."""
        self._started = request is None
        """Whether the server is known to have the request."""
        self._attempts_left = self._retries.attempts
        self._failures = 0
        """Since the last message."""
        self._lost: tuple[float, Failure] | None = None
        """When and how the connection was lost that could not be continued so far."""
        self._dead = False

    @property
    def finished(self) -> bool:
        """Whether the last message is here."""
        return self.finish_reason is not None

    @property
    def over(self) -> bool:
        """Finished, or failed for good."""
        return self.finished or self._dead

    @property
    def resumable(self) -> bool:
        """Whether the server keeps the request when its connection ends."""
        return self._resumable

    def next_call(self) -> pb.GenerateRequest | pb.ResumeRequest:
        """The request of the call to make now: Generate or Resume, by its type."""
        if self._resuming or self._request is None:
            return pb.ResumeRequest(request_id=self.request_id, offset=self.received)
        return self._request

    def take(self, message: pb.GenerateResponse) -> Chunk | None:
        """What is new in a message of the present call, None where nothing is. Raises
        ProtocolError."""
        if self._lost is not None:
            self.reconnects += self._resuming
            self._lost = None
        self._started = True
        self._failures = 0
        chunk = chunk_of(message)
        end = chunk.offset + len(chunk.token_ids)
        if chunk.token_ids and end <= self.received and chunk.finish_reason is None:
            return None
        if chunk.offset > self.received or (chunk.token_ids and chunk.offset < self.received):
            raise ProtocolError(
                f"{len(chunk.token_ids)} tokens of request {self.request_id} arrived for offset "
                f"{chunk.offset} when {self.received} was next."
            )
        self.received = max(self.received, end)
        self.finish_reason = chunk.finish_reason
        if message.HasField("usage"):
            self.usage = usage_of(message.usage)
        return chunk

    def failed(self, failure: Failure, now: float) -> float:
        """The present call has ended before the last message, at `now` in seconds of one monotonic
        clock. Returns the seconds to wait before `next_call`. Raises the ClientError when there
        is nothing more to try."""
        try:
            return self._wait_s(failure, now)
        except ClientError:
            self._dead = True
            raise

    def _wait_s(self, failure: Failure, now: float) -> float:
        if self._resuming and failure.code in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.UNIMPLEMENTED,
        ):
            return self._not_kept(failure)
        if failure.lost and not self._resumable and self._started:
            raise Unavailable(
                f"The stream was lost after {self.received} tokens and is not resumable: "
                f"{failure.details}",
                code=failure.code,
            )
        if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceeded(
                f"Time is over after {self.received} tokens: {failure.details}", code=failure.code
            )
        overloaded = (
            failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and failure.retry_after_s is not None
        )
        if not failure.lost and not overloaded:
            raise failure.error()
        wait_s = self._backoff_s()
        if overloaded:
            assert failure.retry_after_s is not None
            if failure.retry_after_s > self._retries.max_retry_after_s:
                raise failure.error()
            wait_s = max(wait_s, failure.retry_after_s)
        if self._lost is None:
            self._lost = (now, failure)
        if self._started:
            if now + wait_s - self._lost[0] > self._retries.reconnect_s:
                raise Unavailable(
                    f"The stream was lost after {self.received} tokens and could not be continued "
                    f"within {self._retries.reconnect_s:g} s: {failure.details}",
                    code=failure.code,
                )
        else:
            if not self._attempts_left:
                raise failure.error()
            self._attempts_left -= 1
        if failure.lost:
            # Whether the request arrived is not known; if it did, its work is not done twice.
            self._resuming = self._resumable
            self.target = (self.target + 1) % self._targets
        return wait_s

    def _not_kept(self, failure: Failure) -> float:
        """The server knows nothing of the request that was to be continued."""
        if self._started:
            if self._lost is None:
                raise failure.error()
            raise Unavailable(
                f"The stream was lost after {self.received} tokens and the server has not kept it: "
                f"{self._lost[1].details}",
                code=self._lost[1].code,
            )
        self._resuming = False
        return 0.0

    def _backoff_s(self) -> float:
        retries = self._retries
        pause: float = min(retries.backoff_s * 2.0**self._failures, retries.max_backoff_s)
        self._failures += 1
        return pause * (1.0 - self._jitter() / 2)
