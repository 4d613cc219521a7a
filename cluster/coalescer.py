"""When tokens on their way to a reader are sent: the first at once, then as the reader needs them.

One message per token is what streaming costs most. While the reader's buffer is comfortable, tokens
wait a moment and travel together; a reader who is about to run dry gets each one at once. Pure: no
clock, no tasks.
"""

from __future__ import annotations

import math

from tokenflow.replicas.scheduler.playback import Playback


class StreamCoalescer:
    """Decides for one stream; all times in seconds of one monotonic clock. `rate` in tokens/s;
    infinite = no reader, for whom nothing is held back.

    A token is never held longer than `max_delay_s`, and never while what the client has would last
    less than `lead_s`, so holding tokens back cannot make a reader stall.
    """

    __slots__ = ("_client", "_lead_s", "_max_delay_s", "_oldest", "_pending")

    def __init__(self, rate: float, *, max_delay_s: float = 0.25, lead_s: float = 0.25) -> None:
        self._client = None if rate == math.inf else Playback(rate)
        self._max_delay_s = max_delay_s
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
        if self._client is None or not self._client.generated:
            return now
        comfortable_until = now + self._client.slack_s(now) - self._lead_s
        return min(self._oldest + self._max_delay_s, comfortable_until)

    def due(self, now: float) -> bool:
        """Whether the pending tokens must go now."""
        at = self.next_due(now)
        return at is not None and at <= now

    def sent(self, now: float) -> None:
        """All pending tokens were handed over."""
        if self._pending and self._client is not None:
            self._client.generate(now, self._pending)
        self._pending = 0
