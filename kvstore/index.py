"""From a key to its slot: one open-addressing hash table in shared memory.

The store alone writes it (`IndexWriter`), every replica reads it (`IndexReader`) without a lock or
a call. A reader may find a cell that is out of date; it must check what it found on the slot itself
(see `tables`), so that the worst of a stale index is a miss. Keys are digests: their first eight
bytes are used as the hash.

A cell holds slot + 1, 0 where nothing ever was, -1 where something was removed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenflow.kvstore.tables import BoolArray, IntArray, Tables

_EMPTY, _REMOVED = 0, -1


class IndexReader:
    """Looks keys up; keys are given as two u64 (the digest, little-endian)."""

    def __init__(self, tables: Tables) -> None:
        # Memoryviews, because numpy takes twice as long for a single element.
        self._cells = tables.cells.data
        self._keys = tables.keys.reshape(-1).data
        self._mask = len(tables.cells) - 1

    def find(self, low: int, high: int) -> int:
        """The slot that is, or lately was, indexed under this key; -1 if there is none."""
        cells, keys, mask = self._cells, self._keys, self._mask
        at = low & mask
        while (cell := cells[at]) != _EMPTY:
            if cell > 0 and keys[2 * cell - 2] == low and keys[2 * cell - 1] == high:
                return int(cell - 1)
            at = (at + 1) & mask
        return -1


class IndexWriter:
    """Adds and removes slots in bulk. Each key is there once; not thread-safe."""

    def __init__(self, tables: Tables) -> None:
        """An empty index; it does not look at what the cells hold (see `rebuild`)."""
        self._cells = tables.cells
        self._keys = tables.keys
        self._cell_of: IntArray = np.full(tables.num_slots, -1, np.int64)
        self._taken = 0  # cells that are not empty

    def holds(self, slots: IntArray) -> BoolArray:
        """Which of `slots` are indexed, bool [slots]."""
        held: BoolArray = self._cell_of[slots] >= 0
        return held

    def add(self, slots: IntArray) -> BoolArray:
        """Index `slots` by their keys; returns which were refused, bool [slots].

        A slot is refused if its key is there already, for a slot indexed before or beside it.
        """
        if self._taken + len(slots) > len(self._cells) // 2:
            self.rebuild(np.flatnonzero(self._cell_of >= 0))
        refused, claimed = self._insert(self._cells, slots)
        self._taken += claimed
        return refused

    def remove(self, slots: IntArray) -> None:
        """Take out those of `slots` that are indexed."""
        cells = self._cell_of[slots]
        self._cells[cells[cells >= 0]] = _REMOVED
        self._cell_of[slots] = -1

    def rebuild(self, slots: IntArray) -> BoolArray:
        """Index `slots` and nothing else; returns which were refused (see `add`).

        Made aside and copied at once: readers see misses for the time of a copy only.
        """
        self._cell_of[:] = -1
        cells = np.zeros_like(self._cells)
        refused, self._taken = self._insert(cells, slots)
        self._cells[:] = cells
        return refused

    def _insert(self, cells: NDArray[np.int32], slots: IntArray) -> tuple[BoolArray, int]:
        """Linear probing for all slots side by side; (refused, number of cells claimed)."""
        mask = len(cells) - 1
        keys = self._keys[slots]
        at = (keys[:, 0] & np.uint64(mask)).astype(np.int64)
        refused = np.zeros(len(slots), np.bool_)
        pending = np.arange(len(slots))
        claimed = 0
        while len(pending):
            found = cells[at[pending]]
            empty = found == _EMPTY
            same = (found > 0) & (self._keys[found - 1] == keys[pending]).all(axis=1)
            refused[pending[same]] = True
            claim = pending[empty]
            cells[at[claim]] = slots[claim] + 1
            # Of several that claim one cell the last is in; the others look at it again, because
            # theirs may be the same key.
            won = cells[at[claim]] == slots[claim] + 1
            self._cell_of[slots[claim[won]]] = at[claim[won]]
            claimed += int(won.sum())
            onward = pending[~(empty | same)]
            at[onward] = (at[onward] + 1) & mask
            pending = np.concatenate((claim[~won], onward))
        return refused, claimed
