"""What leaves the engine: token events, one per drawn token (plus one to end a stream early)."""

from __future__ import annotations

from typing import NamedTuple

from tokenflow.replicas.executor.base import TokenLogprobs
from tokenflow.replicas.life import Note


class TokenEvent(NamedTuple):
    """One token of one request, or its end. A tuple, so that frames of them pickle cheaply."""

    request_id: str
    offset: int
    """Index of the token in the output; for an event without a token, the output's length."""
    token_id: int
    """-1 when the event carries no token (cancelled, failed)."""
    text: str
    """Text that became final with this token; may be empty."""
    generated_at: float
    """Unix time at which the token was drawn, seconds."""
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    """"stop", "length", "cancelled" or "error" on the last event of a request."""
    error: str | None = None
    cached_tokens: int = 0
    """Prompt tokens that a cache spared the request; on the event at offset 0 only."""
    notes: tuple[Note, ...] = ()
    """What happened to a traced request since its event before."""
