"""The store of one node without Ray: a segment, who leases its slots, and who of them still lives.

Leases end when their owner gives them back or is known to be dead, never by a timeout: a process
that merely hangs may still have a copy under way into a slot, and a slot handed on too early would
mix two requests' KV. Data never passes through here; all calls are control calls, in bulk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenflow.kvstore import process
from tokenflow.kvstore.segment import (
    FILE_PREFIX,
    SHM_DIRECTORY,
    Segment,
    reap_orphans,
    segment_bytes,
)
from tokenflow.kvstore.sizing import available_memory_bytes
from tokenflow.kvstore.slots import SlotTable
from tokenflow.replicas.errors import KVStoreError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store is made from; the first replica of a node decides for the others."""

    total_bytes: int
    """Host memory of the data area; see `sizing.default_host_bytes`."""
    slot_bytes: int
    """Bytes of one block of KV (`KVLayout.block_bytes`)."""
    max_owner_fraction: float = 0.75
    """Most of the store one replica may hold; see `sizing.default_owner_fraction`."""
    directory: str = SHM_DIRECTORY
    reap_interval_s: float = 1.0
    """How often the store looks for owners that died and for files nobody maps any more."""


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    pid: int
    leased: int
    silent_s: float
    """Seconds since the owner's last call."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A snapshot of a store, picklable; what a replica needs to map it, and its metrics."""

    path: str
    epoch: int
    slot_bytes: int
    num_slots: int
    owner_quota: int
    """Most slots one owner may hold."""
    free: int
    owners: dict[str, OwnerInfo]


@dataclass(slots=True)
class _Owner:
    pid: int
    started: int
    seen_s: float


class NodeStore:
    """One segment and its leases. Thread-safe; every call is short except the constructor."""

    def __init__(
        self,
        name: str,
        config: StoreConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        available_bytes: Callable[[], int] = available_memory_bytes,
    ) -> None:
        """Reap what dead stores left behind and allocate the segment `<name>-<epoch>`.

        Raises KVStoreError when memory or /dev/shm is short. If replicas still map a segment of an
        earlier store of this name, theirs stays and counts against the memory of this one.
        """
        num_slots = config.total_bytes // config.slot_bytes
        reap_orphans(config.directory)
        earlier = segment_bytes(config.directory, f"{FILE_PREFIX}{name}-")
        _check_room(config.total_bytes, available_bytes(), earlier)
        self._clock = clock
        self._lock = threading.Lock()
        self._owners: dict[str, _Owner] = {}
        self._closed = False
        epoch = time.time_ns()
        self._segment = Segment.create(
            f"{name}-{epoch:x}",
            slot_bytes=config.slot_bytes,
            num_slots=num_slots,
            epoch=epoch,
            directory=config.directory,
        )
        self._slots = SlotTable(num_slots, config.max_owner_fraction)

    @property
    def epoch(self) -> int:
        return self._segment.header.epoch

    def register(self, owner_id: str, pid: int) -> StoreInfo:
        """Make the living process `pid` an owner under the name `owner_id`.

        Raises KVStoreError if no such process is visible here, or a living one has the name. A name
        whose process died is taken over, and its leases are freed.
        """
        started = process.start_ticks(pid)
        if started is None:
            raise KVStoreError(
                f"no process {pid} for {owner_id} on this node; the store and the replicas must "
                "share one pid namespace"
            )
        with self._lock:
            self._check_open()
            known = self._owners.get(owner_id)
            if known and (known.pid, known.started) != (pid, started):
                if process.is_alive(known.pid, known.started):
                    raise KVStoreError(f"{owner_id} is already registered by process {known.pid}")
                self._slots.release_owner(owner_id)
            self._owners[owner_id] = _Owner(pid, started, self._clock())
        return self.info()

    def renew(self, owner_id: str) -> None:
        """Say that `owner_id` is there. Raises KVStoreError if it is not, or no longer, known."""
        with self._lock:
            self._touch(owner_id)

    def lease(self, owner_id: str, n: int) -> list[int]:
        """Up to `n` slots (see `SlotTable.lease`); KVStoreError if the owner is not registered."""
        with self._lock:
            self._touch(owner_id)
            return self._slots.lease(owner_id, n)

    def release(self, owner_id: str, slots: Sequence[int]) -> None:
        """Give slots back that no copy reads or writes any more (see `SlotTable.release`)."""
        with self._lock:
            self._touch(owner_id)
            self._slots.release(owner_id, slots)

    def reap_dead_owners(self) -> int:
        """Free the leases of owners whose process is gone; returns the number of slots freed."""
        freed = 0
        with self._lock:
            for owner_id, owner in list(self._owners.items()):
                if process.is_alive(owner.pid, owner.started):
                    continue
                del self._owners[owner_id]
                slots = self._slots.release_owner(owner_id)
                freed += slots
                logger.warning(
                    "KV store: process %d of %s is gone; freed its %d slots",
                    owner.pid,
                    owner_id,
                    slots,
                )
        return freed

    def info(self) -> StoreInfo:
        header = self._segment.header
        with self._lock:
            now = self._clock()
            return StoreInfo(
                path=self._segment.path,
                epoch=header.epoch,
                slot_bytes=header.slot_bytes,
                num_slots=header.num_slots,
                owner_quota=self._slots.quota,
                free=self._slots.stats().free,
                owners={
                    owner_id: OwnerInfo(
                        owner.pid, self._slots.held_by(owner_id), now - owner.seen_s
                    )
                    for owner_id, owner in self._owners.items()
                },
            )

    def close(self) -> None:
        """Unlink the segment; replicas that map it keep their memory, but no new lease is given."""
        with self._lock:
            self._closed = True
        self._segment.unlink()
        self._segment.close()

    def _touch(self, owner_id: str) -> None:
        self._check_open()
        owner = self._owners.get(owner_id)
        if owner is None:
            raise KVStoreError(f"{owner_id} is not registered with the KV store; register it first")
        owner.seen_s = self._clock()

    def _check_open(self) -> None:
        if self._closed:
            raise KVStoreError("the KV store was closed")


def _check_room(asked: int, available: int, earlier: int) -> None:
    """Refuse a size that would drive the node out of memory.

    `earlier` bytes are still mapped from stores before this one; after repeated crashes each would
    add another full segment, so beside an earlier one only half of what is left may be taken.
    """
    limit = available // 2 if earlier else available
    if asked <= limit:
        return
    message = (
        f"the KV store needs {asked / 2**30:.2f} GiB of host memory, "
        f"{available / 2**30:.2f} GiB are available; lower kvstore.host_kv_gib (--host-kv-gib)"
    )
    if earlier:
        message += (
            f", or restart the replicas that still hold {earlier / 2**30:.2f} GiB of a store "
            "that crashed"
        )
    raise KVStoreError(message)
