"""How much one API key may use: token buckets for what counts per minute, sums for what runs now.
Pure: `now` in seconds of a monotonic clock is passed in, and nothing here knows of HTTP or streams.

Tokens are set aside when a request is taken, for the longest answer it may have, and what it did
not use is given back when it has ended. Whether it has is asked of the request itself (`Use`), so
no way of ending can be forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from tokenflow.replicas.errors import InvalidRequestError, QuotaError

_BUSY_RETRY_S = 1.0
"""When what runs now is too much, nobody knows when it will be less."""


class KeyLimits(BaseModel):
    """Limits of one key; null = none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens_per_minute: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Prompt and output together."
    )
    streams: int | None = Field(default=None, ge=1, description="Answers under way at once.")
    rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Sum of the token rates of its streams, tokens/s.",
    )


_NO_LIMITS = KeyLimits()


class TokenBucket:
    """Fills evenly, by `per_minute` a minute, up to what a minute gives. [Turner 1986]"""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until it holds `amount`; 0 = it does."""
        self._fill(now)
        return max(0.0, amount - self._level) * 60.0 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def resize(self, per_minute: float, now: float) -> None:
        """Another limit; what was used stays used."""
        self._fill(now)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def _fill(self, now: float) -> None:
        more = (now - self._at) * self.per_minute / 60.0
        self._level = min(self.per_minute, self._level + more)
        self._at = now


class Use(Protocol):
    """A request that was taken, as it is now."""

    @property
    def running(self) -> int:
        """Its answers that have not ended."""
        ...

    @property
    def rate(self) -> float:
        """Sum of their token rates, tokens/s."""
        ...

    @property
    def tokens(self) -> int:
        """Prompt and output tokens so far."""
        ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for."""

    streams: int
    rate: float
    """Sum over its streams, tokens/s."""
    tokens: int
    """Prompt and longest output, of all its streams."""


@dataclass(eq=False, slots=True)
class Grant:
    """What a request was given; `use` is set when it has begun."""

    demand: Demand
    use: Use | None = None

    @property
    def streams(self) -> int:
        return self.demand.streams if self.use is None else self.use.running

    @property
    def rate(self) -> float:
        return self.demand.rate if self.use is None else self.use.rate


class Quota:
    """The limits of one key and what it has used of them.

    `share` is the part of them that this process may give out, where several serve the same key.
    """

    def __init__(self, limits: KeyLimits, share: float, now: float) -> None:
        self._share = share
        self._grants: list[Grant] = []
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.set_limits(limits, now)

    def set_limits(self, limits: KeyLimits, now: float) -> None:
        self._limits = limits
        # With few requests a minute and many processes each of them still takes one.
        requests = limits.requests_per_minute
        least = min(requests or 1.0, 1.0)
        self._requests = self._bucket(self._requests, requests, least, now)
        self._tokens = self._bucket(self._tokens, limits.tokens_per_minute, 0.0, now)

    def _bucket(
        self, bucket: TokenBucket | None, per_minute: float | None, least: float, now: float
    ) -> TokenBucket | None:
        if per_minute is None:
            return None
        size = max(per_minute * self._share, least)
        if bucket is None:
            return TokenBucket(size, now)
        bucket.resize(size, now)
        return bucket

    def count_request(self, now: float) -> None:
        """One more request, whatever becomes of it. Raises QuotaError."""
        if self._requests is None:
            return
        if (wait_s := self._requests.wait_s(min(1.0, self._requests.per_minute), now)) > 0:
            limit = self._limits.requests_per_minute
            raise QuotaError(
                f"This key may make {limit:g} requests per minute.", retry_after_s=wait_s
            )
        self._requests.take(1.0, now)

    @contextlib.contextmanager
    def reserve(self, demand: Demand, now: float) -> Iterator[Grant]:
        """What a request needs is its own from now on, unless the body raises. Raises QuotaError,
        and InvalidRequestError (429) for more than the key may ever have."""
        grant = Grant(demand)
        if self._limits == _NO_LIMITS:
            yield grant
            return
        self.settle(now)
        self._check(demand, now)
        self._grants.append(grant)
        if self._tokens is not None:
            self._tokens.take(demand.tokens, now)
        try:
            yield grant
        except BaseException:
            self._grants.remove(grant)
            if self._tokens is not None:
                self._tokens.take(-demand.tokens, now)
            raise

    def hold(self, use: Use) -> None:
        """Count a request that was taken elsewhere, and goes on here. Idempotent."""
        if self._limits == _NO_LIMITS:
            return
        if all(grant.use is not use for grant in self._grants):
            self._grants.append(Grant(Demand(0, 0.0, use.tokens), use))

    def check_rate(self, before: float, after: float) -> None:
        """Whether running streams may go over from one sum of rates to another, tokens/s. Raises
        QuotaError."""
        if after > before:
            self._check_rate(after - before)

    def settle(self, now: float) -> None:
        """Give back what requests that have ended did not use."""
        ended = [g for g in self._grants if g.use is not None and not g.use.running]
        for grant in ended:
            self._grants.remove(grant)
            if self._tokens is not None and grant.use is not None:
                self._tokens.take(grant.use.tokens - grant.demand.tokens, now)

    def _check(self, demand: Demand, now: float) -> None:
        limits, bucket = self._limits, self._tokens
        if limits.streams is not None:
            most = max(1, int(limits.streams * self._share))
            if demand.streams > most:
                _never(f"{demand.streams} streams", f"{limits.streams} at once")
            if sum(grant.streams for grant in self._grants) + demand.streams > most:
                raise QuotaError(
                    f"This key may have {limits.streams} streams at once.",
                    retry_after_s=_BUSY_RETRY_S,
                )
        self._check_rate(demand.rate)
        if bucket is not None:
            if demand.tokens > bucket.per_minute:
                _never(f"{demand.tokens} tokens", f"{limits.tokens_per_minute:g} per minute")
            if (wait_s := bucket.wait_s(demand.tokens, now)) > 0:
                raise QuotaError(
                    f"This key may use {limits.tokens_per_minute:g} tokens per minute.",
                    retry_after_s=wait_s,
                )

    def _check_rate(self, more: float) -> None:
        if self._limits.rate is None:
            return
        most = self._limits.rate * self._share
        if more > most:
            _never(f"{more:g} tokens/s", f"{self._limits.rate:g} tokens/s over all its streams")
        if sum(grant.rate for grant in self._grants) + more > most:
            raise QuotaError(
                f"The streams of this key may be read at {self._limits.rate:g} tokens/s together.",
                retry_after_s=_BUSY_RETRY_S,
            )


def _never(asked: str, limit: str) -> None:
    raise InvalidRequestError(
        f"The request asks for {asked} (longest answer included), and this key may have {limit}; "
        "ask for less.",
        code="insufficient_quota",
        status=429,
    )
