"""When a reader gets each token: the playback of the scheduler, on the reader's side. No clock."""

from __future__ import annotations

import math
from collections import deque

from tokenflow.client.types import Chunk, Token
from tokenflow.replicas.scheduler.playback import Playback


class Pacer:
    """Tokens in by `add`, out by `take` when their time has come. All times in seconds of one
    monotonic clock; `rate` in tokens/s, infinite = no reader, everything at once."""

    def __init__(self, rate: float) -> None:
        self.taken = 0
        """Tokens handed to the reader."""
        self._rate = rate
        self._waiting: deque[Token] = deque()
        self._playback: Playback | None = None if rate == math.inf else Playback(rate)
        self._paused = False
        self._earlier_stalls = 0
        self._earlier_stall_s = 0.0

    @property
    def waiting(self) -> int:
        """Tokens that lie ready."""
        return len(self._waiting)

    @property
    def stalls(self) -> int:
        """How often the reader had nothing to read."""
        return self._earlier_stalls + (self._playback.stalls if self._playback else 0)

    @property
    def stall_s(self) -> float:
        """For how long, seconds in all."""
        return self._earlier_stall_s + (self._playback.stall_s if self._playback else 0.0)

    def add(self, chunk: Chunk, now: float) -> None:
        """A message has arrived."""
        tokens = list(chunk.tokens())
        self._waiting.extend(tokens)
        if self._playback is not None and not self._paused and tokens:
            self._playback.generate(now, len(tokens))

    def next_at(self) -> float | None:
        """When `take` has the next token (possibly in the past); None: not before `add` or
        `resume`."""
        if self._paused or not self._waiting:
            return None
        if self._playback is None:
            return -math.inf
        return self._playback.due_s - len(self._waiting) / self._playback.rate

    def take(self) -> Token:
        token = self._waiting.popleft()
        self.taken += token.token_id is not None
        return token

    def set_rate(self, rate: float, now: float) -> None:
        """The reader is faster or slower from `now` on."""
        if self._playback is None or rate == math.inf:
            self._rate = rate
            self._restart(now)
        elif not self._paused:
            self._playback.set_rate(rate, now)
        self._rate = rate

    def pause(self) -> None:
        self._paused = True

    def resume(self, now: float) -> None:
        """Reading begins anew, with what lies there."""
        if self._paused:
            self._paused = False
            self._restart(now)

    def _restart(self, now: float) -> None:
        self._earlier_stalls, self._earlier_stall_s = self.stalls, self.stall_s
        self._playback = None if self._rate == math.inf else Playback(self._rate)
        if self._playback is not None and self._waiting and not self._paused:
            self._playback.generate(now, len(self._waiting))
