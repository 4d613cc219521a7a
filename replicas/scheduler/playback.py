"""One definition of a reader's token buffer, used by scheduler, metrics, load generator and pacer.

A reader starts with the first token and consumes one token every `1 / rate` seconds. A token that
comes late stalls the reader; reading goes on from the moment it arrives. With `a_i` the arrival of
token i, its consumption time is `c_1 = a_1`, `c_i = max(a_i, c_{i-1} + 1/rate)`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the client library goes without numpy
    import numpy as np
    from numpy.typing import NDArray

FULL_WEIGHT_SHARE = 0.1
"""A token counts in full while the buffer is within this share of the output. [TokenFlow §7.1.3]"""
STALL_EPSILON_S = 1e-3
"""Gaps shorter than this are not counted as stalls (their seconds still are)."""


class Playback:
    """The buffer of one stream. All times in seconds of one monotonic clock; O(1) per token.

    The buffer at time t counts the tokens generated and not yet consumed at t. [TokenFlow §3.2]
    """

    __slots__ = ("_held", "_last_consumed", "_run", "generated", "rate", "stall_s", "stalls")

    def __init__(self, rate: float) -> None:
        self.rate = _checked(rate)
        self.generated = 0
        self.stall_s = 0.0
        """Seconds the reader has waited at an empty buffer, after its first token."""
        self.stalls = 0
        self._last_consumed = -math.inf
        """When the newest generated token is (or will be) consumed: c_n."""
        self._run = 0
        """Tokens since the last stall; only these can still be unread."""
        self._held: tuple[int, float] | None = None
        """While paused: tokens consumed, and seconds of reading until the next one would be."""

    def generate(self, now: float, n: int = 1) -> None:
        """`n` tokens arrive at `now` (not before earlier ones)."""
        if self._held is not None:
            self.generated += n
            return
        period = 1.0 / self.rate
        due = self._last_consumed + period
        if now > due:
            self._note_stall(now - due)
            self._run = 0
            due = now
        self._last_consumed = due + (n - 1) * period
        self._run += n
        self.generated += n

    def _note_stall(self, seconds: float) -> None:
        if self.generated:
            self.stall_s += seconds
            if seconds > STALL_EPSILON_S:
                self.stalls += 1

    @property
    def paused(self) -> bool:
        """Whether the reader consumes nothing until `resume`."""
        return self._held is not None

    @property
    def due_s(self) -> float:
        """When the reader needs a token that does not exist yet; -inf before the first token, inf
        while it is paused."""
        if self._held is not None:
            return math.inf
        return self._last_consumed + 1.0 / self.rate if self.generated else -math.inf

    def buffer(self, now: float) -> int:
        """Tokens generated and not consumed at `now`."""
        if self._held is not None:
            return self.generated - self._held[0]
        ahead = (self._last_consumed - now) * self.rate
        if ahead <= 0:
            return 0
        return min(self._run, math.ceil(ahead - 1e-9))

    def consumed(self, now: float) -> int:
        """Tokens the reader has consumed at `now`."""
        return self.generated - self.buffer(now)

    def slack_s(self, now: float) -> float:
        """Seconds until the reader needs a token that does not exist yet.

        Negative once the reader stalls; -inf before the first token; inf while it is paused. This
        is buffer / rate in continuous time. [TokenFlow §4.1, in seconds]
        """
        return self.due_s - now

    def set_rate(self, rate: float, now: float) -> None:
        """Change the reading speed at `now`; what is buffered is read at the new speed."""
        rate = _checked(rate)
        if self._held is not None:
            consumed, wait_s = self._held
            self._held = (consumed, wait_s * self.rate / rate)
        elif self._last_consumed > now:
            self._last_consumed = now + (self._last_consumed - now) * self.rate / rate
        self.rate = rate

    def pause(self, now: float) -> None:
        """The reader stops at `now`: what is buffered stays, what comes is added to it, and no
        pause of the generator is a stall. Idempotent."""
        if self._held is not None:
            return
        buffer, wait_s = self.buffer(now), 0.0
        if self.generated and self.due_s < now:
            self._note_stall(now - self.due_s)
        elif self.generated:
            wait_s = self._last_consumed - now - (buffer - 1) / self.rate
        self._held = (self.generated - buffer, wait_s)

    def resume(self, now: float) -> None:
        """The reader goes on at `now`, at the place and in the token where it stopped.
        Idempotent."""
        if self._held is None:
            return
        (consumed, wait_s), self._held = self._held, None
        self._go_on(consumed, now + wait_s)

    def report(self, consumed: int, now: float) -> None:
        """The reader says that it has consumed `consumed` tokens at `now`, more or fewer than was
        thought; it goes on from there at its rate. What agrees with `consumed(now)` changes
        nothing. Raises ValueError for more tokens than there are."""
        if not 0 <= consumed <= self.generated:
            raise ValueError(f"{consumed} of {self.generated} tokens cannot have been consumed")
        if consumed == self.consumed(now):
            return
        if self._held is not None:
            self._held = (consumed, 1.0 / self.rate)
        else:
            self._go_on(consumed, now + 1.0 / self.rate)

    def _go_on(self, consumed: int, next_s: float) -> None:
        """`consumed` tokens are read, and the next one, if there is any, is at `next_s`."""
        if self.generated:
            self._run = self.generated - consumed
            self._last_consumed = next_s + (self._run - 1) / self.rate


def _checked(rate: float) -> float:
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be a finite number above 0 tokens/s, got {rate}")
    return rate


def token_weight(buffer: float, output_tokens: int) -> float:
    """Weight of a token generated while `buffer` tokens were unread, for an output of that length.

    1 up to 10 % of the output length, falling linearly to 0 at 20 %. [TokenFlow §7.1.3]
    """
    low = FULL_WEIGHT_SHARE * output_tokens
    if buffer <= low:
        return 1.0
    return max(0.0, 2.0 - buffer / low) if low > 0 else 0.0


def token_weights(
    buffers: NDArray[np.float64], output_tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`token_weight` over arrays of the same shape."""
    import numpy as np

    low = np.maximum(FULL_WEIGHT_SHARE * output_tokens, 1e-9)
    weights: NDArray[np.float64] = np.clip(2.0 - buffers / low, 0.0, 1.0)
    return weights


def buffers_at_generation(times: list[float], rate: float) -> list[int]:
    """The buffer just after each token of a stream arrives; `times` ascending, seconds."""
    playback = Playback(rate)
    buffers = []
    for at in times:
        playback.generate(at)
        buffers.append(playback.buffer(at))
    return buffers


def effective_tokens(buffers: list[int]) -> float:
    """Sum of token weights of one finished stream from its buffers at generation."""
    return sum(token_weight(b, len(buffers)) for b in buffers)
