"""When tokens on their way to a reader are sent: the first at once, then as the reader needs them.

One message per token is what streaming costs most. While the reader's buffer is comfortable, tokens
wait a moment and travel together; a reader who is about to run dry gets each one at once. A
consumer that is no reader has no buffer to go by: a message comes a moment after the one before at
the earliest. Pure: no clock, no tasks.
"""

from __future__ import annotations

import math

from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.scheduler.playback import Playback

_NO_READER_DELAY_S = 0.1
"""Least time between the messages of a consumer that is no reader; should somebody look, it still
seems to flow."""


class StreamCoalescer:
    """Decides for one stream; all times in seconds of one monotonic clock. `rate` in tokens/s;
    infinite = no reader.

    A token is never held longer than `max_delay_s`, and never while what the client has would last
    less than `lead_s`, so holding tokens back cannot make a reader stall.
    """

    __slots__ = ("_client", "_lead_s", "_oldest", "_pending", "_sent", "_sent_s", "max_delay_s")

    def __init__(self, rate: float, *, max_delay_s: float = 0.25, lead_s: float = 0.25) -> None:
        self._client = None if rate == math.inf else Playback(rate)
        self._sent = 0
        self._sent_s = -math.inf
        self.max_delay_s = max_delay_s
        """Longest time a token is held."""
        self._lead_s = lead_s
        self._pending = 0
        self._oldest = 0.0

    @property
    def pending(self) -> int:
        """Tokens that wait to be sent."""
        return self._pending

    def add(self, tokens: int, now: float) -> None:
        """`tokens` more are ready to be sent."""
        if tokens and not self._pending:
            self._oldest = now
        self._pending += tokens

    def next_due(self, now: float) -> float | None:
        """When the pending tokens must go (possibly in the past), None when there are none."""
        if not self._pending:
            return None
        if self._client is None:
            return self._sent_s + min(self.max_delay_s, _NO_READER_DELAY_S)
        if not self._client.generated:
            return now
        comfortable_until = now + self._client.slack_s(now) - self._lead_s
        return min(self._oldest + self.max_delay_s, comfortable_until)

    def due(self, now: float) -> bool:
        """Whether the pending tokens must go now."""
        at = self.next_due(now)
        return at is not None and at <= now

    def sent(self, now: float) -> None:
        """All pending tokens were handed over."""
        if self._pending and self._client is not None:
            self._client.generate(now, self._pending)
        self._sent += self._pending
        self._sent_s = now
        self._pending = 0

    @property
    def tokens_sent(self) -> int:
        return self._sent

    def consumed(self, now: float) -> int:
        """Tokens the client's reader has consumed of those sent."""
        return self._sent if self._client is None else self._client.consumed(now)

    def has(self, tokens: int, now: float) -> None:
        """The client came with so many tokens, all of them consumed."""
        self._sent += tokens
        if tokens and self._client is not None:
            self._client.generate(now, tokens)
            self._client.report(tokens, now)

    def change(self, change: ReaderChange, now: float) -> None:
        """What the client's reader does from now on. Raises ValueError when it has consumed more
        than it was sent."""
        if change.consumed is not None and change.consumed > self._sent:
            raise ValueError(f"{change.consumed} of {self._sent} tokens cannot have been consumed")
        if change.token_rate is not None:
            if math.isinf(change.token_rate):
                self._client = None
            elif self._client is None:
                self._client = Playback(change.token_rate)
                if self._sent:
                    self._client.generate(now, self._sent)
                    self._client.report(self._sent, now)
            else:
                self._client.set_rate(change.token_rate, now)
        if self._client is None:
            return
        if change.consumed is not None:
            self._client.report(change.consumed, now)
        if change.paused is not None:
            (self._client.pause if change.paused else self._client.resume)(now)
