"""A replica's share of the node's store: private slots to fill, and everybody's blocks to read.

The engine thread calls `HostSlots` between two forward passes; every method takes a short lock and
works on the shared tables (see `holds`), none waits for the store. A background thread talks to
the store: it tops the free slots up when they fall below the low-water mark and gives back what
has lain idle above the high-water mark.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenflow.kvstore import process
from tokenflow.kvstore.control import StoreControl, StoreHungError, StoreUnavailableError
from tokenflow.kvstore.holds import Holds
from tokenflow.kvstore.tables import Tables
from tokenflow.replicas.errors import KVStoreError

if TYPE_CHECKING:
    from tokenflow.replicas.transfers import Commit

logger = logging.getLogger(__name__)

EXTENT = 64
"""Slots per call to the store, at least, wherever the capacity allows it."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class HostSlotStats:
    """Counters for metrics, in slots except where said; those after `lost` since the start."""

    leased: int = 0
    """Private to this replica, in use or free."""
    free: int = 0
    held: int = 0
    """Slots with at least one hold, private or committed."""
    lost: bool = False
    """True once the store was lost; this client takes no more slots until it is rebuilt."""
    refused: int = 0
    """Calls of `acquire` that returned None."""
    calls: int = 0
    """Control calls to the store."""
    acquired: int = 0
    committed: int = 0
    matched: int = 0


class HostSlots:
    """Slots of this replica; thread-safe. No method waits for the store.

    A slot is *private* from `acquire` to `commit`, and then belongs to everybody. Each `acquire`
    and `match` is one *hold*; a slot with a hold keeps its content. When the store goes away for
    good the client is *lost*: capacity, free slots and matches are zero, so the engine falls back
    to recomputing. Slots that are held stay readable, because the mapping of the segment does and
    nobody else can be given them.
    """

    def __init__(
        self,
        control: StoreControl,
        tables: Tables,
        capacity: int,
        *,
        background: bool = True,
        low_water: int | None = None,
        high_water: int | None = None,
        idle_s: float = 2.0,
        retry_s: float = 0.1,
        retry_for_s: float = 30.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Lease up to the high-water mark (this call blocks) and start the background thread.

        `capacity` is the most slots to hold at any time (`StoreInfo.owner_quota`). The marks
        count free private slots, which are missing from everybody's cache: the high one defaults
        to an eighth of the capacity (128 at least, half at most), the low one to half of that.
        Free slots above the high-water mark that went unneeded for `idle_s` are given back. An
        exhausted store is asked again every `retry_s`, as long as slots are wanted. A store that
        is away is waited for up to `retry_for_s`.

        With `background=False` there is no thread: the one thread that uses this client calls the
        store itself, when `acquire` is short and after each `commit`.
        """
        high = max(capacity // 8, min(2 * EXTENT, (capacity + 1) // 2))
        self._high = min(capacity, high if high_water is None else high_water)
        self._low = min(self._high, (self._high + 1) // 2 if low_water is None else low_water)
        self._extent = max(1, min(EXTENT, self._high // 2))
        self._control = control
        self._tables = tables
        self._holds = Holds(tables, control.owner_index)
        self._capacity = capacity
        self._background = background
        self._idle_s = idle_s
        self._retry_s = retry_s
        self._retry_for_s = retry_for_s
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._demand = 0  # size of the largest acquire refused since the store was last asked
        self._starved = False  # the last lease was a small one; ask again by the clock only
        self._settling = False  # far more than the high mark is free; a window is being watched
        self._low_tide = 0  # fewest free slots since that window began
        self._lost = False
        self._refused = self._calls = self._acquired = self._committed = self._matched = 0
        self._incarnation = tables.incarnation
        self._free: list[int] = []  # a stack, each lease with its lowest slot on top
        self._put(self._lease(self._high))
        self._thread = threading.Thread(target=self._run, name="kv-host-slots", daemon=True)
        if background:
            self._thread.start()

    def add_members(self, pids: Sequence[int]) -> None:
        """Name, once and before they copy, all processes that copy into this replica's slots
        besides its own. Slots are not handed on while one of them lives."""
        tables, row = self._tables, self._control.owner_index
        for i, pid in enumerate(pids):
            tables.member_started[row, i] = process.start_ticks(pid) or 0
            tables.member_pid[row, i] = pid

    # -- the engine's side ----------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Most slots this client may ever hold; zero once the store is lost."""
        return 0 if self._lost else self._capacity

    def available(self) -> int:
        """Slots `acquire` can hand out at this moment."""
        return len(self._free)

    def acquire(self, n: int) -> list[int] | None:
        """Exactly `n` private slots, ascending, with one hold each; None if fewer are free here.

        A refusal tells the background thread to fetch that many, so that a later try can succeed.
        """
        slots: list[int] | None = None
        with self._lock:
            if len(self._free) < n <= self._capacity - self._holds.count:  # else never possible
                self._demand = max(self._demand, n)
                if not self._background:
                    self._fetch()
            left = len(self._free) - n
            if left >= 0 and not self._closing.is_set():
                slots = sorted(self._free[left:])
                del self._free[left:]
                self._holds.take(slots)
                self._acquired += n
                self._low_tide = min(self._low_tide, left)
            else:
                self._refused += 1
            wake = self._missing() > 0 and not self._starved
            if wake and not self._background:
                self._fetch()
        if wake:
            self._wake.set()
        return slots

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Slots of the longest prefix of `keys` committed on this node, each with one hold more.

        By whichever replica. They count as used now. The prefix also ends where this replica's
        capacity does. Raises KVStoreError for a key that has not 16 bytes.
        """
        with self._lock:
            if self._lost or self._closing.is_set():
                return []
            found = self._holds.match(keys, self._capacity, self._clock_ns())
            self._matched += len(found)
            over = self._over()
            if over and not self._background:
                self._give_back(self._take(over))
        if over and self._background:
            self._wake.set()
        return found

    def commit(self, blocks: Sequence[Commit]) -> None:
        """Share private slots that have been filled; the holds stay.

        Raises KVStoreError, and changes nothing, if one is not private to this replica, is there
        twice or has a key of another size than 16 bytes. The content must not change afterwards.
        """
        with self._lock:
            if self._closing.is_set():
                return
            self._holds.commit(blocks, self._clock_ns())
            self._committed += len(blocks)
            if blocks and not self._background:
                self._control.poll()

    def checksums(self, slots: Sequence[int]) -> list[int]:
        """What `commit` was told about these committed slots, u64."""
        return self._holds.checksums(slots)

    def report_corrupt(self, slots: Sequence[int]) -> None:
        """The content of these held slots is not what it should be: nobody shall get them again.

        Holders keep their holds. Raises KVStoreError, and changes nothing, for a slot not held.
        """
        with self._lock:
            if not self._closing.is_set():
                self._holds.report_corrupt(slots)

    def release(self, slots: Sequence[int]) -> None:
        """One hold less of each slot, which may be listed as often as it is held.

        Without holds, a private slot is free for the next `acquire`, a committed one stays cached
        for whoever asks. Only for slots that no copy reads or writes any more. Raises
        KVStoreError, and changes nothing, for a slot that is not held: it may be another's.
        """
        with self._lock:
            if self._closing.is_set():
                return
            private = self._holds.release(slots, self._clock_ns())
            if self._lost:
                return
            self._put(private)
            wake = self._overflowing() and not self._settling
            if wake and not self._background:
                self._give_back(self._take(len(self._free) - self._high))
        if wake and self._background:
            self._wake.set()

    def stats(self) -> HostSlotStats:
        with self._lock:
            return HostSlotStats(
                leased=len(self._free) + self._holds.private,
                free=len(self._free),
                held=self._holds.count,
                lost=self._lost,
                refused=self._refused,
                calls=self._calls,
                acquired=self._acquired,
                committed=self._committed,
                matched=self._matched,
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """Give everything back, also what is held: call it after the executor has been closed.

        Waits at most `timeout_s` for a store that does not answer; such a store frees the slots
        when this process ends.
        """
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
            self._free.clear()
        self._wake.set()
        if self._background:
            self._thread.join(timeout_s)
        elif first:
            self._control.unregister()

    # -- free slots; all of these hold the lock --------------------------------------------------

    def _put(self, slots: list[int]) -> None:
        """Onto the stack of free slots, the lowest on top; `slots` ascend."""
        self._free.extend(reversed(slots))

    def _take(self, n: int) -> list[int]:
        """Off the bottom of that stack, where the longest unused are."""
        slots = self._free[:n]
        del self._free[:n]
        return slots

    def _missing(self) -> int:
        """Slots to ask the store for; fewer than an extent only if they are wanted right now."""
        free = len(self._free)
        if self._lost or self._closing.is_set() or free >= max(self._low, self._demand):
            return 0
        wanted = max(max(self._high, self._demand) - free, self._extent)
        missing = max(0, min(wanted, self._capacity - free - self._holds.count))
        return missing if missing >= self._extent or free < self._demand else 0

    def _over(self) -> int:
        """Free slots to give back because matches used the capacity up; an extent if possible."""
        over = len(self._free) + self._holds.count - self._capacity
        return min(len(self._free), max(over, self._extent)) if over > 0 else 0

    def _overflowing(self) -> bool:
        return len(self._free) >= self._high + self._extent

    # -- towards the store ----------------------------------------------------------------------

    def _lease(self, n: int) -> list[int]:
        self._calls += 1
        return self._control.lease(n)

    def _give_back(self, slots: list[int]) -> None:
        self._calls += 1
        self._control.release(slots)

    def _fetch(self) -> None:
        """Without a thread: lease what is missing, now. Holds the lock."""
        missing = self._missing()
        self._demand = 0
        if missing:
            self._put(self._lease(missing))

    def _run(self) -> None:
        try:
            timeout: float | None = None
            while not self._closing.is_set():
                woken = self._wake.wait(timeout)
                self._wake.clear()
                try:
                    if self._incarnation != self._tables.incarnation:
                        self._reattach()
                    timeout = self._round(woken)
                except StoreUnavailableError as error:
                    self._await_store(error)
                    timeout = 0.0
            self._control.unregister()
        except Exception as error:  # whatever it was, the leases can no longer be managed
            self._lose(error)

    def _round(self, woken: bool) -> float | None:
        """Give back or lease; returns after how many seconds to look again, unless woken before."""
        with self._lock:
            missing = self._missing()
            self._demand = 0
            if missing == 0:
                self._starved = False
            idle = self._low_tide - self._high if self._settling and not woken else 0
            back = self._take(max(self._over(), idle if idle >= self._extent else 0))
            self._settling = missing == 0 and self._overflowing()
            self._low_tide = len(self._free)
        if back:
            self._give_back(back)
        if missing == 0:
            return self._idle_s if self._settling else None
        slots = self._lease(missing)
        with self._lock:
            if not self._closing.is_set():
                self._put(slots)
            self._starved = len(slots) < max(missing, self._extent)
            return self._retry_s if self._starved else 0.0

    def _await_store(self, error: StoreUnavailableError) -> None:
        """Wait for a store that is away, then tell it what is still leased here.

        Raises the last error when it stays away too long.
        """
        logger.warning("KV store is away, waiting for it: %s", error)
        self._end_if_hung(error)
        pause = _FIRST_PAUSE_S
        deadline = time.monotonic() + self._retry_for_s
        while not self._closing.wait(pause):
            try:
                self._reattach()
            except StoreUnavailableError as again:
                self._end_if_hung(again)
                if time.monotonic() > deadline:
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                logger.warning("KV store is back")
                return

    def _end_if_hung(self, error: StoreUnavailableError) -> None:
        """Kill a store that lives and does not answer: whoever watches over it starts another,
        which goes on with these tables. One that has followed it already is left alone."""
        if not isinstance(error, StoreHungError) or self._incarnation != self._tables.incarnation:
            return
        pid, started = int(self._tables.store[0]), int(self._tables.store[1])
        if process.kill(pid, started):
            logger.error("KV store: process %d hung and was killed", pid)

    def _reattach(self) -> None:
        incarnation = self._tables.incarnation
        with self._lock:
            leased = [*self._holds.private_slots(), *self._free]
        self._calls += 1
        self._control.reattach(leased)
        self._incarnation = incarnation

    def _lose(self, error: Exception) -> None:
        with self._lock:
            self._lost = True
            self._free.clear()
        if not self._closing.is_set():
            logger.error("KV store lost, preempted requests will be recomputed: %s", error)


class NullHostSlots:
    """The host tier switched off: no slot, ever."""

    capacity = 0

    def add_members(self, pids: Sequence[int]) -> None:
        """Nobody copies."""

    def available(self) -> int:
        return 0

    def acquire(self, n: int) -> list[int] | None:
        return [] if n == 0 else None

    def match(self, keys: Sequence[bytes]) -> list[int]:
        return []

    def commit(self, blocks: Sequence[Commit]) -> None:
        _refuse("committed", len(blocks))

    def checksums(self, slots: Sequence[int]) -> list[int]:
        _refuse("asked about", len(slots))
        return []

    def report_corrupt(self, slots: Sequence[int]) -> None:
        _refuse("reported corrupt", len(slots))

    def release(self, slots: Sequence[int]) -> None:
        _refuse("released", len(slots))

    def stats(self) -> HostSlotStats:
        return HostSlotStats()

    def close(self) -> None:
        """Nothing to give back."""


def _refuse(what: str, n: int) -> None:
    if n:
        raise KVStoreError(f"{n} host slots {what}, but the host tier is off")
