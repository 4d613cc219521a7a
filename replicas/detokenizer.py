"""Incremental detokenizing that never shows half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_REPLACEMENT = "\ufffd"
_HELD_TOKENS = 12
"""A character has at most 4 bytes; text that is still broken after this many tokens stays so."""


class IncrementalDetokenizer:
    """Turns one stream of token ids into text deltas.

    All deltas plus `flush` equal `tokenizer.decode(all ids)`: each delta is the difference of two
    decodings over a short window, taken only where the text does not end in a broken character.
    """

    __slots__ = ("_ids", "_options", "_prefix", "_read", "_tokenizer")

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": False,
        }
        self._ids: list[int] = []
        self._prefix = 0
        """Start of the window; the text of ids before `_read` has been emitted."""
        self._read = 0

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], **self._options)
        return text

    def add(self, token_id: int) -> str:
        """Take the next id; returns the text that became final, possibly none."""
        self._ids.append(token_id)
        end = len(self._ids)
        window = self._decode(self._prefix, end)
        if window.endswith(_REPLACEMENT) and end - self._read < _HELD_TOKENS:
            return ""
        return self._emit(window, end)

    def flush(self) -> str:
        """The rest, broken characters included."""
        end = len(self._ids)
        return self._emit(self._decode(self._prefix, end), end)

    def _emit(self, window: str, end: int) -> str:
        before = self._decode(self._prefix, self._read)
        self._prefix, self._read = self._read, end
        return window[len(before) :]

    def prime(self, token_ids: Iterable[int]) -> str:
        """Replay ids whose text was delivered before; returns that text."""
        return "".join(self.add(token_id) for token_id in token_ids)
