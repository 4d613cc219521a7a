"""Incremental detokenizing that never shows half a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_REPLACEMENT = "\ufffd"
_HELD_TOKENS = 12
"""Text that is still broken after this many tokens stays so, but for the character at its end."""
_CONTEXT_TOKENS = 8
"""Enough to decode the character at the end in the same way: it has at most 4 bytes."""

_skipped: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def _skipped_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that `skip_special_tokens` leaves out."""
    ids = _skipped.get(tokenizer)
    if ids is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids = _skipped[tokenizer] = frozenset(i for i, token in added.items() if token.special)
    return ids


def _decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """`tokenizer.decode` without cleaning up; straight from the library behind it where nothing is
    added on the way, which takes a quarter of the time."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    ):
        direct: Callable[..., str] = tokenizer.backend_tokenizer.decode
        return lambda ids: direct(ids, skip_special_tokens=skip_special_tokens)

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    return decode


class IncrementalDetokenizer:
    """Turns one stream of token ids into text deltas.

    All deltas plus `flush` equal `tokenizer.decode(all ids)`: each delta is the difference of two
    decodings over a short window, taken only where the text does not end in a broken character.
    """

    __slots__ = ("_decode", "_ids", "_prefix", "_read", "_shown", "_skip")

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens)
        # A window that began with a skipped token would lose the space of the word after it.
        self._skip = _skipped_ids(tokenizer) if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._prefix = 0
        """Start of the window."""
        self._read = 0
        self._shown = 0
        """Characters of the window's text that have been given out."""

    def add(self, token_id: int) -> str:
        """Take the next id; returns the text that became final, possibly none."""
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        end = len(self._ids)
        window = self._decode(self._ids[self._prefix : end])
        if not window.endswith(_REPLACEMENT):
            delta = window[self._shown :]
            self._move(self._read, end)
            return delta
        if end - self._read < _HELD_TOKENS:
            return ""
        delta = window[self._shown : -1]
        self._move(end - _CONTEXT_TOKENS, end)
        self._shown -= 1
        return delta

    def flush(self) -> str:
        """The rest, broken characters included."""
        end = len(self._ids)
        delta = self._decode(self._ids[self._prefix : end])[self._shown :]
        self._move(self._read, end)
        return delta

    def _move(self, prefix: int, read: int) -> None:
        """Start the window at `prefix`; its text up to `read` is done with."""
        self._prefix, self._read = prefix, read
        self._shown = len(self._decode(self._ids[prefix:read]))
