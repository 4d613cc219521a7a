"""The slots a replica may use right now: leased in bulk, handed out without ever blocking.

The engine thread calls `HostSlots.acquire` and `release` between two forward passes; both only take
a short lock. A background thread talks to the store: it tops the free slots up when they fall below
the low-water mark and gives back what has lain idle above the high-water mark.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import Protocol

from tokenflow.kvstore.node import NodeStore, StoreInfo
from tokenflow.replicas.errors import KVStoreError

logger = logging.getLogger(__name__)


class StoreControl(Protocol):
    """The way to the store; calls may block, and raise KVStoreError once the leases are void."""

    def lease(self, n: int) -> list[int]:
        """Up to `n` more slots."""
        ...

    def release(self, slots: list[int]) -> None: ...


class LocalStoreControl:
    """A store in this process: tests, notebooks, a single engine without Ray."""

    def __init__(self, store: NodeStore, owner_id: str) -> None:
        self._store = store
        self._owner_id = owner_id
        self.info: StoreInfo = store.register(owner_id, os.getpid())

    def lease(self, n: int) -> list[int]:
        return self._store.lease(self._owner_id, n)

    def release(self, slots: list[int]) -> None:
        self._store.release(self._owner_id, slots)


@dataclass(frozen=True, slots=True)
class HostSlotStats:
    """Counters for metrics, in slots, except `refused`."""

    leased: int
    """Held from the store, in use or free."""
    free: int
    refused: int
    """Calls of `acquire` that returned None, since the start."""
    lost: bool
    """True once the store was lost; this client takes no more slots until it is rebuilt."""


class HostSlots:
    """Slots leased by this replica; thread-safe. `acquire` and `release` never wait for the store.

    When the store goes away (closed, crashed, restarted) the client is *lost*: capacity and free
    slots are zero, so the engine falls back to recomputing. Slots in use stay readable, because
    the mapping of the old segment does and nobody else can be given them.
    """

    def __init__(
        self,
        control: StoreControl,
        capacity: int,
        *,
        low_water: int | None = None,
        high_water: int | None = None,
        idle_s: float = 2.0,
        retry_s: float = 0.1,
    ) -> None:
        """Lease up to the high-water mark (this call blocks) and start the background thread.

        `capacity` is the most slots to hold at any time (`StoreInfo.owner_quota`). The marks
        count free slots; the high one defaults to a half and the low one to a quarter of it.
        Free slots above the high-water mark that went unneeded for `idle_s` are given back. An
        exhausted store is asked again every `retry_s`, as long as slots are wanted.
        """
        self._high = min(capacity, high_water if high_water is not None else (capacity + 1) // 2)
        self._low = min(self._high, low_water if low_water is not None else (self._high + 1) // 2)
        self._control = control
        self._capacity = capacity
        self._idle_s = idle_s
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._used: set[int] = set()
        self._demand = 0  # size of the largest acquire refused since the store was last asked
        self._refused = 0
        self._starved = False  # the store gave too little; ask again by the clock only
        self._settling = False  # more than the high-water mark is free; a window is being watched
        self._low_tide = 0  # fewest free slots since that window began
        self._lost = False
        self._closing = False
        self._free = control.lease(self._high)
        self._thread = threading.Thread(target=self._run, name="kv-host-slots", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """Most slots this client may ever hold; zero once the store is lost."""
        return 0 if self._lost else self._capacity

    def available(self) -> int:
        """Slots `acquire` can hand out at this moment."""
        return len(self._free)

    def acquire(self, n: int) -> list[int] | None:
        """Exactly `n` slots, or None if fewer are free here. Never blocks.

        A refusal tells the background thread to fetch that many, so that a later try can succeed.
        """
        slots: list[int] | None = None
        with self._lock:
            left = len(self._free) - n
            if left >= 0 and not self._closing:
                slots = self._free[left:]
                del self._free[left:]
                self._used.update(slots)
                self._low_tide = min(self._low_tide, left)
            else:
                self._refused += 1
                if n <= self._capacity - len(self._used):  # more can never be granted
                    self._demand = max(self._demand, n)
            wake = self._missing() > 0 and not self._starved
        if wake:
            self._wake.set()
        return slots

    def release(self, slots: list[int]) -> None:
        """Take slots back that no copy reads or writes any more.

        Raises KVStoreError, and changes nothing, if one is not in use: it may be another request's.
        """
        returned = set(slots)
        with self._lock:
            if self._closing:
                return
            if len(returned) != len(slots) or not returned <= self._used:
                raise KVStoreError(
                    f"slots released that are not in use, or twice: "
                    f"{sorted(returned - self._used)[:8]} of {len(slots)}"
                )
            self._used -= returned
            if self._lost:
                return
            self._free.extend(slots)
            wake = len(self._free) > self._high and not self._settling
        if wake:
            self._wake.set()

    def stats(self) -> HostSlotStats:
        with self._lock:
            leased = len(self._free) + len(self._used)
            return HostSlotStats(leased, len(self._free), self._refused, self._lost)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give every slot back, also those in use: call it after the executor has been closed.

        Waits at most `timeout_s` for a store that does not answer; such a store frees the slots
        when this process ends.
        """
        with self._lock:
            self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _missing(self) -> int:
        """Slots to ask the store for. Holds the lock."""
        free = len(self._free)
        if self._lost or self._closing or free >= max(self._low, self._demand):
            return 0
        room = self._capacity - free - len(self._used)
        return min(max(self._high, self._demand) - free, room)

    def _run(self) -> None:
        try:
            timeout: float | None = None
            while True:
                woken = self._wake.wait(timeout)
                self._wake.clear()
                with self._lock:
                    if self._closing:
                        break
                    missing = self._missing()
                    self._demand = 0
                    if missing == 0:
                        self._starved = False
                    idle = self._take_idle() if self._settling and not woken else []
                    self._settling = missing == 0 and len(self._free) > self._high
                    self._low_tide = len(self._free)
                if idle:
                    self._control.release(idle)
                if missing > 0:
                    timeout = self._refill(missing)
                else:
                    timeout = self._idle_s if self._settling else None
            self._give_all_back()
        except Exception as error:  # whatever it was, the leases can no longer be managed
            self._lose(error)

    def _take_idle(self) -> list[int]:
        """Remove the surplus that no `acquire` of the last window needed. Holds the lock."""
        surplus = max(0, self._low_tide - self._high)
        # The longest unused lie at the front; those used last stay, still warm in the cache.
        slots = self._free[:surplus]
        del self._free[:surplus]
        return slots

    def _refill(self, n: int) -> float:
        """Lease `n` slots; returns after how many seconds to look again, unless woken before."""
        slots = self._control.lease(n)
        with self._lock:
            self._free.extend(slots)
            self._starved = len(slots) < n
            return self._retry_s if self._starved else 0.0

    def _give_all_back(self) -> None:
        with self._lock:
            slots = [*self._free, *self._used]
            self._free.clear()
            self._used.clear()
        self._control.release(slots)

    def _lose(self, error: Exception) -> None:
        with self._lock:
            self._lost = True
            self._free.clear()
            closing = self._closing
        if not closing:
            logger.error("KV store lost, preempted requests will be recomputed: %s", error)


class NullHostSlots:
    """The host tier switched off: no slot, ever."""

    capacity = 0

    def available(self) -> int:
        return 0

    def acquire(self, n: int) -> list[int] | None:
        return [] if n == 0 else None

    def release(self, slots: list[int]) -> None:
        if slots:
            raise KVStoreError(f"{len(slots)} host slots released, but the host tier is off")

    def close(self) -> None:
        """Nothing to give back."""
