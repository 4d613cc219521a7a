"""One replica's own cells of the shared tables: what it holds, and what it shares with the others.

Knows nothing of leases or of the store's process (see `client`). Not thread-safe. Every write here
keeps to the rule of `tables`, one writer to a cell; the order of the writes is part of it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from tokenflow.kvstore.index import IndexReader
from tokenflow.kvstore.tables import KEY_BYTES, MAX_PINS, SlotState, Tables
from tokenflow.replicas.errors import KVStoreError

if TYPE_CHECKING:
    from tokenflow.replicas.transfers import Commit

_KEY = struct.Struct("<QQ")
_LEASED, _COMMITTED = int(SlotState.LEASED), int(SlotState.COMMITTED)


class Holds:
    """Holds on private and on committed slots, counted in this replica's row of `Tables.pins`."""

    def __init__(self, tables: Tables, row: int) -> None:
        self.count = 0
        """Slots with at least one hold."""
        self.private = 0
        """Of these, the private ones."""
        self._tables = tables
        self._row = row
        self._index = IndexReader(tables)
        # Memoryviews, because numpy takes twice as long for a single element.
        self._pins = tables.pins[row].data
        self._state = tables.state.data
        self._corrupt = tables.corrupt.data
        self._words = tables.keys.reshape(-1).data
        self._used = tables.used.data

    def take(self, slots: Sequence[int]) -> None:
        """One hold on each of these leased slots, none of which is held."""
        for slot in slots:
            self._pins[slot] += 1
        self.count += len(slots)
        self.private += len(slots)

    def match(self, keys: Sequence[bytes], limit: int, now: int) -> list[int]:
        """Slots of the longest committed prefix of `keys`, each with one hold more.

        The prefix also ends before more than `limit` slots were held. `now` (ns) is their use.
        """
        found: list[int] = []
        pins, state, corrupt, words = self._pins, self._state, self._corrupt, self._words
        used, find = self._used, self._index.find
        for key in keys:
            low, high = _split(key)
            slot = find(low, high)
            if slot < 0:
                break
            held = pins[slot]
            if held == MAX_PINS or (held == 0 and self.count >= limit):
                break
            # The pin first, then the state, then the key: see `tables`.
            pins[slot] = held + 1
            if (
                state[slot] != _COMMITTED
                or words[2 * slot] != low
                or words[2 * slot + 1] != high
                or corrupt[slot]
            ):
                pins[slot] = held
                break
            used[slot] = now
            self.count += held == 0
            found.append(slot)
        return found

    def commit(self, blocks: Sequence[Commit], now: int) -> None:
        """Make private slots committed ones; see `HostSlots.commit`."""
        tables = self._tables
        slots = [block.slot for block in blocks]
        self._check(slots, private=True)
        words = [_split(block.key) for block in blocks]
        request_id, request = None, 0
        for block, (low, high) in zip(blocks, words, strict=True):
            if block.request_id != request_id:
                request_id, request = block.request_id, _hash(block.request_id)
            slot = block.slot
            self._words[2 * slot] = low
            self._words[2 * slot + 1] = high
            tables.checksum[slot] = block.checksum
            tables.request[slot] = request
            tables.position[slot] = block.position
            self._used[slot] = now
        # Every cell before any state: the state says that the rest is there.
        for slot in slots:
            self._state[slot] = _COMMITTED
        self.private -= len(slots)

    def checksums(self, slots: Sequence[int]) -> list[int]:
        sums: list[int] = self._tables.checksum[list(slots)].tolist()
        return sums

    def report_corrupt(self, slots: Sequence[int]) -> None:
        self._check(list(set(slots)))
        for slot in slots:
            self._corrupt[slot] = 1

    def release(self, slots: Sequence[int], now: int) -> list[int]:
        """One hold less of each; returns the private slots that nobody holds any more, ascending.

        See `HostSlots.release`.
        """
        pins, state = self._pins, self._state
        private: list[int] = []
        self._check(slots)
        for slot in slots:
            left = pins[slot] - 1
            if left == 0:
                self.count -= 1
                if state[slot] == _LEASED:
                    self._corrupt[slot] = 0
                    private.append(slot)
            # The use before the pin: who sees the slot let go also sees when it was used.
            self._used[slot] = now
            pins[slot] = left
        self.private -= len(private)
        private.sort()
        return private

    def private_slots(self) -> list[int]:
        """The private slots that are held, ascending."""
        tables = self._tables
        leased = (tables.state == SlotState.LEASED) & (tables.owner == self._row)
        slots: list[int] = np.flatnonzero(leased & (tables.pins[self._row] > 0)).tolist()
        return slots

    def _check(self, slots: Sequence[int], *, private: bool = False) -> None:
        """Raise KVStoreError unless every slot has a hold for each time it is listed.

        With `private`, unless each is listed once and private.
        """
        pins, num_slots = self._pins, self._tables.num_slots
        wrong = [slot for slot in slots if not 0 <= slot < num_slots or pins[slot] == 0]
        if not wrong and len(set(slots)) != len(slots):
            times = Counter(slots)
            wrong = [slot for slot, n in times.items() if n > (1 if private else pins[slot])]
        if not wrong and private:
            wrong = [slot for slot in slots if self._state[slot] != _LEASED]
        if wrong:
            what = "committed that are not private" if private else "named that are not held"
            raise KVStoreError(
                f"slots {what} by this replica, or named too often: {wrong[:8]} of {len(slots)}"
            )


def _split(key: bytes) -> tuple[int, int]:
    """A key as the two u64 of the tables."""
    try:
        low, high = _KEY.unpack(key)
    except struct.error:
        raise KVStoreError(f"a key has {KEY_BYTES} bytes, this one {len(key)}: {key!r}") from None
    return low, high


def _hash(request_id: str) -> int:
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")
