"""Incremental detokenizing that never shows half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

_REPLACEMENT = "\ufffd"
_HELD_TOKENS = 12
"""Text that is still broken after this many tokens stays so, but for its last few bytes."""
_BEGUN_TOKENS = 3
"""A character has at most 4 bytes, so one that has only begun is no longer than this."""

_skipped: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def _skipped_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that `skip_special_tokens` leaves out."""
    ids = _skipped.get(tokenizer)
    if ids is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids = _skipped[tokenizer] = frozenset(i for i, token in added.items() if token.special)
    return ids


class IncrementalDetokenizer:
    """Turns one stream of token ids into text deltas.

    All deltas plus `flush` equal `tokenizer.decode(all ids)`: each delta is the difference of two
    decodings over a short window, taken only where the text does not end in a broken character.
    """

    __slots__ = ("_ids", "_options", "_prefix", "_read", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._options = {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": False,
        }
        # A window that began with a skipped token would lose the space of the word after it.
        self._skip = _skipped_ids(tokenizer) if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._prefix = 0
        """Start of the window; the text of ids before `_read` has been emitted."""
        self._read = 0

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], **self._options)
        return text

    def add(self, token_id: int) -> str:
        """Take the next id; returns the text that became final, possibly none."""
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        end = len(self._ids)
        window = self._decode(self._prefix, end)
        if not window.endswith(_REPLACEMENT):
            return self._emit(window, end)
        if end - self._read < _HELD_TOKENS:
            return ""
        for cut in range(end - _BEGUN_TOKENS, end):
            whole = self._decode(self._prefix, cut)
            if window.startswith(whole):
                return self._emit(whole, cut)
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
