"""Which replica has computed the beginning of a text before: a bounded memory of text prefixes.

Pure data; what a hit is worth is the router's business. It may be wrong, as a replica drops KV
when it needs the memory: a wrong guess costs the prefill that it hoped to save.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from tokenflow.replicas.prefix import extend_keys, salted

CHUNK_TOKENS = 64
"""Prefixes are told apart in steps of that many tokens."""
MAX_PREFIXES = 1 << 16
_MAX_CHUNKS = 512
"""Beyond that the text is not looked at: 32 Ki tokens."""


def prefix_keys(tokens: Seq[int], salt: str | None = None) -> list[bytes]:
    """A key for each leading chunk; equal keys mean equal text up to there, and equal salt."""
    keys: list[bytes] = []
    chunks = min(len(tokens) // CHUNK_TOKENS, _MAX_CHUNKS)
    extend_keys(keys, salted(b"", salt), tokens, CHUNK_TOKENS, chunks)
    return keys


class PrefixMap:
    """The replica that each prefix was sent to last; the least recently used ones are forgotten."""

    def __init__(self, capacity: int = MAX_PREFIXES) -> None:
        self._capacity = capacity
        self._places: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: Seq[bytes]) -> tuple[str, int]:
        """(replica, tokens) of the longest prefix that was sent anywhere; ("", 0) if none was."""
        for chunks in range(len(keys), 0, -1):
            replica = self._places.get(keys[chunks - 1])
            if replica is not None:
                return replica, chunks * CHUNK_TOKENS
        return "", 0

    def remember(self, keys: Seq[bytes], replica: str) -> None:
        """The text with these prefixes goes to that replica."""
        for key in keys:
            self._places[key] = replica
            self._places.move_to_end(key)
        while len(self._places) > self._capacity:
            self._places.popitem(last=False)
