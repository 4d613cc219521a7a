"""From tokens to final text: incremental detokenizing and stop conditions of one request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenflow.replicas.detokenizer import IncrementalDetokenizer
from tokenflow.replicas.request import FinishReason
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.sampling.stop import StopChecker


class TextStream:
    """Turns one request's tokens into text and tells when it stops.

    Deterministic in the tokens alone, so a request that moves to another replica is replayed with
    `prime` and goes on at the exact character.
    """

    __slots__ = ("_count", "_detokenizer", "_params", "_stop", "_stop_ids")

    def __init__(self, tokenizer: Any, params: SamplingParams, eos_ids: Iterable[int]) -> None:
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._stop = (
            StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        )
        self._stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_ids)
        )
        self._count = 0

    def suppressed_ids(self, awaited: int = 0) -> tuple[int, ...]:
        """Ids that must not be drawn for the next token, after `awaited` ones that are still to be
        pushed: those that would end it too early."""
        early = self._count + awaited < self._params.min_tokens
        return tuple(self._stop_ids) if early else ()

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Take the next token; returns the text that is now final and why it stops, if it does."""
        self._count += 1
        early = self._count < self._params.min_tokens
        ended = token_id in self._stop_ids and not early
        text = self._detokenizer.add(token_id)
        matched = False
        if self._stop is not None:
            text, match = self._stop.feed(text, armed=not early)
            matched = match is not None
        if matched:
            return text, FinishReason.STOP
        reason: FinishReason | None = None
        if ended:
            reason = FinishReason.STOP
        elif self._count >= self._params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            return text, None
        rest, stopped = self._finish()
        if stopped:
            reason = FinishReason.STOP
        return text + rest, reason

    def _finish(self) -> tuple[str, bool]:
        """Text still held back, and whether a stop string completes in it."""
        tail = self._detokenizer.flush()
        if self._stop is None:
            return tail, False
        text, match = self._stop.feed(tail)
        if match is not None:
            return text, True
        return text + self._stop.flush(), False

    def prime(self, token_ids: Iterable[int]) -> None:
        """Replay tokens whose text the client already has."""
        for token_id in token_ids:
            self.push(token_id)
