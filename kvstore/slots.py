"""What the store does with slots: lease, index, evict. No I/O, no processes, not thread-safe.

Works on the shared tables alone, so that a store that restarts finds everything there; what this
keeps for itself (which slots are indexed, which are second copies) it can work out again. Scans of
whole columns take the place of free lists: they are exact whatever the replicas did meanwhile, and
at a quarter of a million slots each costs tens of microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from tokenflow.kvstore.index import IndexWriter
from tokenflow.kvstore.tables import BoolArray, IntArray, SlotState, Tables
from tokenflow.replicas.errors import KVStoreError


class SlotTable:
    """The store's hand on the slots. Owners are rows of the owner table."""

    def __init__(
        self,
        tables: Tables,
        *,
        max_owner_fraction: float = 1.0,
        grace_s: float = 0.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take over whatever the tables hold: an eviction that was cut off is taken back.

        `grace_s` is the wait between EVICTING and the look at the pins (see `tables`); 0 where one
        thread does everything.
        """
        if not 0 < max_owner_fraction <= 1:
            raise KVStoreError(f"max_owner_fraction must be in (0, 1], got {max_owner_fraction}")
        self.quota = max(1, int(tables.num_slots * max_owner_fraction))
        """Most slots one owner may hold (leased, or committed and pinned by it), so that no replica
        can starve its neighbours."""
        self.evictions = 0
        """Cached blocks evicted to make room, since the start."""
        self.indexed = 0
        """Commits that were indexed, since the start."""
        self._tables = tables
        self._grace_s = grace_s
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._index = IndexWriter(tables)
        self._seen: BoolArray = np.zeros(tables.num_slots, np.bool_)
        """Committed slots that `index_commits` has dealt with."""
        self._duplicate: BoolArray = np.zeros(tables.num_slots, np.bool_)
        """Of these, the second copies of a key that is indexed."""
        self._take_over()

    # -- leases ---------------------------------------------------------------------------------

    def lease(self, row: int, n: int) -> list[int]:
        """Up to `n` slots for the owner, ascending, in few runs; evicts what nobody holds.

        Fewer, or none, when its quota or the table is full.
        """
        if n < 0:
            raise KVStoreError(f"cannot lease {n} slots")
        self.index_commits()
        n = min(n, self.quota - self.usage(row))
        if n <= 0:
            return []
        free = self._in_state(SlotState.FREE)
        if len(free) < n:
            self.evict(n - len(free))
            free = self._in_state(SlotState.FREE)
        slots = take_runs(free, n)
        tables = self._tables
        tables.corrupt[slots] = 0
        tables.owner[slots] = row
        tables.state[slots] = SlotState.LEASED
        leased: list[int] = slots.tolist()
        return leased

    def release(self, row: int, slots: Sequence[int]) -> None:
        """Take leased slots back. Raises KVStoreError, and changes nothing, unless all are the
        owner's: a slot released twice may already be another replica's."""
        returned = np.array(slots, np.int64)
        leased = returned[(returned >= 0) & (returned < self._tables.num_slots)]
        leased = leased[self._leased_by(row)[leased]]
        if len(np.unique(leased)) != len(returned):
            raise KVStoreError(
                f"owner {row} releases slots that are not leased to it, or twice: "
                f"{sorted(set(slots) - set(leased.tolist()))[:8]} of {len(slots)}"
            )
        self._tables.state[returned] = SlotState.FREE

    def reattach(self, row: int, held: Sequence[int]) -> int:
        """Free the slots leased to the owner that are not in `held`; returns how many.

        For an owner that does not know whether its last call was carried out.
        """
        forgotten = self._leased_by(row)
        forgotten[np.array(held, np.int64)] = False
        self._tables.state[forgotten] = SlotState.FREE
        return int(forgotten.sum())

    def drop_owner(self, row: int) -> int:
        """An owner is gone: free its leases, drop its pins; returns the leases that were freed.

        What it committed stays cached, used last at this moment: its end is no reason to think
        that the blocks it was reading are old.
        """
        self.index_commits()
        tables = self._tables
        tables.used[np.flatnonzero(tables.pins[row])] = self._clock_ns()
        freed = self.reattach(row, ())
        tables.pins[row] = 0
        return freed

    def usage(self, row: int) -> int:
        """Slots that count against the owner's quota."""
        return int(np.count_nonzero(self._leased_by(row) | (self._tables.pins[row] != 0)))

    # -- the index ------------------------------------------------------------------------------

    def index_commits(self) -> int:
        """Find what replicas committed or reported corrupt since the last call.

        Returns how many blocks are new. A second copy of a key is not indexed; it takes the place
        of the first should that go while it is still held.
        """
        tables = self._tables
        bad = np.flatnonzero(tables.corrupt)
        bad = bad[self._index.holds(bad)]
        if len(bad):
            self._unindex(bad)
        fresh = np.flatnonzero((tables.state == SlotState.COMMITTED) & ~self._seen)
        if not len(fresh):
            return 0
        self._seen[fresh] = True
        fresh = fresh[tables.corrupt[fresh] == 0]
        refused = self._index.add(fresh)
        self._duplicate[fresh[refused]] = True
        new = len(fresh) - int(refused.sum())
        self.indexed += new
        return new

    # -- eviction -------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Free second copies and corrupt blocks that nobody holds; returns how many."""
        if not self._duplicate.any() and not self._tables.corrupt.any():
            return 0
        return self._retire(np.flatnonzero(self._unpinned() & self._useless()))

    def evict(self, n: int) -> int:
        """Free `n` committed slots that nobody holds, or as many as there are; returns how many.

        What is of no use goes first, then the least recently used; of blocks used at the same
        moment the deeper in their sequence, so that leaves go before their parents.
        """
        unpinned = self._unpinned()
        useless = self._useless()
        freed = self._retire(np.flatnonzero(unpinned & useless))
        if freed < n:
            cached = np.flatnonzero(unpinned & ~useless)
            evicted = self._retire(self._oldest(cached, n - freed))
            self.evictions += evicted
            freed += evicted
        return freed

    def drop_cache(self) -> int:
        """Evict everything that nobody holds; returns how many slots that freed."""
        self.index_commits()
        return self.evict(self._tables.num_slots)

    # -- counts ---------------------------------------------------------------------------------

    def count(self, state: SlotState) -> int:
        return int(np.count_nonzero(self._tables.state == state))

    def leased(self, row: int) -> int:
        return int(np.count_nonzero(self._leased_by(row)))

    def cached(self) -> int:
        """Committed slots that nobody holds."""
        return int(np.count_nonzero(self._unpinned()))

    def duplicates(self) -> int:
        return int(np.count_nonzero(self._duplicate))

    def corrupt(self) -> int:
        """Committed slots that were reported corrupt and are still held."""
        tables = self._tables
        return int(np.count_nonzero((tables.state == SlotState.COMMITTED) & (tables.corrupt != 0)))

    # -- inside ---------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """A store that is cut off between EVICTING and FREE leaves whole blocks behind."""
        state = self._tables.state
        state[state == SlotState.EVICTING] = SlotState.COMMITTED
        committed = np.flatnonzero((state == SlotState.COMMITTED) & (self._tables.corrupt == 0))
        refused = self._index.rebuild(committed)
        self._duplicate[committed[refused]] = True
        self._seen[state == SlotState.COMMITTED] = True

    def _in_state(self, state: SlotState) -> IntArray:
        return np.flatnonzero(self._tables.state == state)

    def _leased_by(self, row: int) -> BoolArray:
        leased: BoolArray = self._tables.state == SlotState.LEASED
        leased &= self._tables.owner == row
        return leased

    def _unpinned(self) -> BoolArray:
        unpinned: BoolArray = self._tables.state == SlotState.COMMITTED
        unpinned &= ~self._tables.pinned()
        return unpinned

    def _useless(self) -> BoolArray:
        """Slots whose content nobody will be given again, if they are committed."""
        useless: BoolArray = self._duplicate | (self._tables.corrupt != 0)
        return useless

    def _unindex(self, slots: IntArray) -> None:
        self._index.remove(slots)
        # A second copy may now be the only one: have it looked at again.
        self._seen[self._duplicate] = False
        self._duplicate[:] = False

    def _oldest(self, slots: IntArray, n: int) -> IntArray:
        """The `n` of `slots` to go first."""
        if n >= len(slots):
            return slots
        used = self._tables.used[slots]
        last = np.partition(used, n - 1)[n - 1]
        older, same = slots[used < last], slots[used == last]
        deepest_first = np.argsort(-self._tables.position[same].astype(np.int64), kind="stable")
        return np.concatenate((older, same[deepest_first[: n - len(older)]]))

    def _retire(self, slots: IntArray) -> int:
        """Free committed slots, unless somebody pins them meanwhile; returns how many went."""
        if not len(slots):
            return 0
        tables = self._tables
        tables.state[slots] = SlotState.EVICTING
        self._unindex(slots)
        if self._grace_s:
            self._sleep(self._grace_s)
        pinned = tables.pinned()[slots]
        kept, gone = slots[pinned], slots[~pinned]
        self._seen[slots] = False
        tables.state[kept] = SlotState.COMMITTED
        tables.state[gone] = SlotState.FREE
        tables.corrupt[gone] = 0
        self.index_commits()
        return len(gone)


def take_runs(free: IntArray, n: int) -> IntArray:
    """`n` of the ascending `free` slots, ascending, in as few runs as can be.

    Copies of neighbouring slots join into one. The shortest run that is long enough is taken, else
    the longest ones.
    """
    if n >= len(free):
        return free
    starts = np.concatenate(([0], np.flatnonzero(np.diff(free) != 1) + 1))
    lengths = np.diff(np.append(starts, len(free)))
    fitting = np.flatnonzero(lengths >= n)
    if len(fitting):
        start = starts[fitting[np.argmin(lengths[fitting])]]
        return free[start : start + n]
    longest_first = np.argsort(-lengths, kind="stable")
    enough = int(np.searchsorted(np.cumsum(lengths[longest_first]), n)) + 1
    chosen = np.zeros(len(lengths), np.bool_)
    chosen[longest_first[:enough]] = True
    return free[np.repeat(chosen, lengths)][:n]
