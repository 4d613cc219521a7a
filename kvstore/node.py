"""The store of one node without Ray: a segment, its slots, and which of the owners still lives.

Leases and pins end when their owner gives them back or is known to be dead, never by a timeout: a
process that merely hangs may still have a copy under way into a slot, and a slot handed on too
early would mix two requests' KV. Data never passes through here; all calls are control calls, in
bulk. Everything that counts is in the shared tables, so that a store that was killed is followed by
one that goes on where it ended (`NodeStore.adopt`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenflow.kvstore import process
from tokenflow.kvstore.segment import (
    FILE_PREFIX,
    SHM_DIRECTORY,
    Segment,
    reap_orphans,
    segment_bytes,
    segment_files,
)
from tokenflow.kvstore.sizing import available_memory_bytes
from tokenflow.kvstore.slots import SlotTable
from tokenflow.kvstore.tables import OWNER_ID_BYTES, SlotState, Tables
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
    max_owners: int = 32
    """Replicas registered at one time, at most 256; each costs two bytes a slot."""
    grace_s: float = 0.002
    """Wait between withdrawing a block and the last look at its pins; see `tables`."""
    spare_fraction: float = 1 / 32
    """Share of the slots that is kept free while replicas ask for leases."""
    directory: str = SHM_DIRECTORY
    poll_interval_s: float = 0.01
    """How often the store looks for commits; a block can be matched that much later."""
    reap_interval_s: float = 1.0
    """How often the store looks for owners that died and for files nobody maps any more."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_owners <= 256:
            raise KVStoreError(f"StoreConfig.max_owners must be 1 to 256, got {self.max_owners}")


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    index: int
    """Row in the tables."""
    pid: int
    leased: int
    pinned: int
    """Committed slots it holds."""
    silent_s: float
    """Seconds since the owner's last call."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A snapshot of a store, picklable; what a replica needs to map it, and its metrics.

    Counts are in slots; `free + leased + cached + pinned` is `num_slots`.
    """

    path: str
    """Empty for a store in plain memory."""
    epoch: int
    slot_bytes: int
    num_slots: int
    owner_quota: int
    """Most slots one owner may hold."""
    free: int
    leased: int
    cached: int
    """Committed slots that nobody holds."""
    pinned: int
    """Committed slots that somebody holds."""
    evictions: int
    """Cached blocks evicted to make room, since this process is the store."""
    indexed: int
    """Blocks that became known under a new key, since this process is the store."""
    duplicates: int
    """Second copies of a key, still held."""
    corrupt: int
    """Blocks reported corrupt, still held."""
    owners: dict[str, OwnerInfo]


@dataclass(slots=True)
class _Owner:
    row: int
    pid: int
    started: int
    seen_s: float


class NodeStore:
    """Owners and slots of one node. Thread-safe; no call waits longer than a grace period."""

    def __init__(
        self,
        tables: Tables,
        config: StoreConfig,
        *,
        epoch: int,
        segment: Segment | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Become the store of `tables`; see `open`, `adopt` and `in_memory`."""
        self.tables = tables
        self.epoch = epoch
        self._segment = segment
        self._slot_bytes = config.slot_bytes
        self._spare = int(tables.num_slots * config.spare_fraction)
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._asked = False  # leases since the last poll
        pid = os.getpid()
        tables.store[:] = (pid, process.start_ticks(pid) or 0, tables.incarnation + 1)
        self._slots = SlotTable(
            tables, max_owner_fraction=config.max_owner_fraction, grace_s=config.grace_s
        )
        self._owners = {
            bytes(tables.owner_id[row]).decode(): _Owner(
                row, int(tables.owner_pid[row]), int(tables.owner_started[row]), clock()
            )
            for row in np.flatnonzero(tables.owner_active).tolist()
        }
        self.reap_dead_owners()

    @classmethod
    def open(
        cls,
        name: str,
        config: StoreConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        available_bytes: Callable[[], int] = available_memory_bytes,
    ) -> NodeStore:
        """The store `name` that was killed, if its replicas live on, or a new one.

        A new one reaps what dead stores left behind and allocates the segment `<name>-<epoch>`.
        Raises KVStoreError when memory or /dev/shm is short. If replicas still map a segment of
        this name that cannot be adopted, theirs stays and counts against the memory of this one.
        """
        adopted = cls.adopt(name, config, clock=clock)
        if adopted is not None:
            return adopted
        earlier = segment_bytes(config.directory, f"{FILE_PREFIX}{name}-")
        _check_room(config.total_bytes, available_bytes(), earlier)
        epoch = time.time_ns()
        segment = Segment.create(
            f"{name}-{epoch:x}",
            slot_bytes=config.slot_bytes,
            num_slots=config.total_bytes // config.slot_bytes,
            epoch=epoch,
            max_owners=config.max_owners,
            directory=config.directory,
        )
        return cls(segment.tables(), config, epoch=epoch, segment=segment, clock=clock)

    @classmethod
    def adopt(
        cls, name: str, config: StoreConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> NodeStore | None:
        """Go on with the segment of a store of this name that was killed; None if there is none.

        There is one if its slots have the size asked for and an owner of it still lives. Leases,
        pins and commits stay valid, also those made while no store was there.
        """
        reap_orphans(config.directory)
        for path in segment_files(config.directory, f"{FILE_PREFIX}{name}-"):
            try:
                segment = Segment.attach(path, slot_bytes=config.slot_bytes, prefault=False)
            except KVStoreError as error:
                logger.warning("KV store: leaving an earlier segment alone: %s", error)
                continue
            tables = segment.tables()
            if _has_store(tables) or not _has_owner(tables):
                del tables
                segment.close()
                continue
            store = cls(tables, config, epoch=segment.header.epoch, segment=segment, clock=clock)
            logger.warning("KV store: went on with %s: %s", path, store.info())
            return store
        return None

    @classmethod
    def in_memory(
        cls,
        num_slots: int,
        *,
        slot_bytes: int = 1,
        max_owner_fraction: float = 1.0,
        max_owners: int = 32,
    ) -> NodeStore:
        """A store over plain memory without data, for one thread: no file, no grace, no thread."""
        config = StoreConfig(
            total_bytes=num_slots * slot_bytes,
            slot_bytes=slot_bytes,
            max_owner_fraction=max_owner_fraction,
            max_owners=max_owners,
            grace_s=0.0,
        )
        return cls(Tables.in_memory(num_slots, max_owners), config, epoch=time.time_ns())

    # -- owners ---------------------------------------------------------------------------------

    def register(self, owner_id: str, pid: int) -> StoreInfo:
        """Make the living process `pid` an owner under the name `owner_id`.

        Raises KVStoreError if no such process is visible here, a living one has the name, or there
        are too many owners. A name whose process died is taken over, and its leases are freed.
        """
        name = owner_id.encode()
        if not 0 < len(name) <= OWNER_ID_BYTES:
            raise KVStoreError(
                f"an owner's name has 1 to {OWNER_ID_BYTES} bytes in UTF-8, got {owner_id!r}"
            )
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
                if _lives(self.tables, known.row):
                    raise KVStoreError(f"{owner_id} is already registered by process {known.pid}")
                self._drop(owner_id)
                known = None
            if known is None:
                row = self._free_row()
                tables = self.tables
                tables.owner_id[row] = name
                tables.owner_pid[row] = pid
                tables.owner_started[row] = started
                tables.member_pid[row] = 0
                tables.owner_active[row] = 1
                self._owners[owner_id] = _Owner(row, pid, started, self._clock())
        return self.info()

    def unregister(self, owner_id: str) -> None:
        """Free what `owner_id` has leased, drop its pins and forget it."""
        with self._lock:
            self._touch(owner_id)
            self._drop(owner_id)

    def reap_dead_owners(self) -> int:
        """Forget owners whose processes are all gone; returns the number of leased slots freed."""
        freed = 0
        with self._lock:
            for owner_id, owner in list(self._owners.items()):
                if _lives(self.tables, owner.row):
                    continue
                slots = self._drop(owner_id)
                freed += slots
                logger.warning(
                    "KV store: process %d of %s is gone; freed its %d leased slots",
                    owner.pid,
                    owner_id,
                    slots,
                )
        return freed

    # -- slots ----------------------------------------------------------------------------------

    def lease(self, owner_id: str, n: int) -> list[int]:
        """Up to `n` slots (see `SlotTable.lease`); KVStoreError if the owner is not registered."""
        with self._lock:
            self._asked = True
            return self._slots.lease(self._touch(owner_id).row, n)

    def release(self, owner_id: str, slots: Sequence[int]) -> None:
        """Take leased slots back that no copy reads or writes any more (`SlotTable.release`)."""
        with self._lock:
            self._slots.release(self._touch(owner_id).row, slots)

    def reattach(self, owner_id: str, held: Sequence[int]) -> int:
        """Free what is leased to `owner_id` and not in `held`; returns how many slots.

        An owner calls it after any call that failed: slots whose lease it never heard of, or whose
        release never arrived, would be lost otherwise.
        """
        with self._lock:
            return self._slots.reattach(self._touch(owner_id).row, held)

    def poll(self) -> None:
        """What the store does by itself: index commits, free what is of no use, keep slots spare.

        To be called every few milliseconds while replicas work.
        """
        with self._lock:
            self._check_open()
            self._slots.index_commits()
            self._slots.sweep()
            if self._asked:
                self._asked = False
                free = self._slots.count(SlotState.FREE)
                if free < self._spare:
                    self._slots.evict(2 * self._spare - free)

    def drop_cache(self) -> int:
        """Evict every block that nobody holds; returns how many slots that freed."""
        with self._lock:
            self._check_open()
            return self._slots.drop_cache()

    def info(self) -> StoreInfo:
        segment, slots, tables = self._segment, self._slots, self.tables
        with self._lock:
            now = self._clock()
            free, leased = slots.count(SlotState.FREE), slots.count(SlotState.LEASED)
            committed, cached = slots.count(SlotState.COMMITTED), slots.cached()
            return StoreInfo(
                path=segment.path if segment else "",
                epoch=self.epoch,
                slot_bytes=self._slot_bytes,
                num_slots=tables.num_slots,
                owner_quota=slots.quota,
                free=free,
                leased=leased,
                cached=cached,
                pinned=committed - cached,
                evictions=slots.evictions,
                indexed=slots.indexed,
                duplicates=slots.duplicates(),
                corrupt=slots.corrupt(),
                owners={
                    owner_id: OwnerInfo(
                        index=owner.row,
                        pid=owner.pid,
                        leased=slots.leased(owner.row),
                        pinned=slots.usage(owner.row) - slots.leased(owner.row),
                        silent_s=now - owner.seen_s,
                    )
                    for owner_id, owner in self._owners.items()
                },
            )

    def memory(self) -> memoryview:
        """The data area of the segment; see `Segment.memory`. KVStoreError if there is none."""
        if self._segment is None:
            raise KVStoreError("a KV store in plain memory has no data to move")
        return self._segment.memory()

    def close(self) -> None:
        """Unlink the segment; replicas that map it keep their memory, but no new lease is given."""
        with self._lock:
            self._closed = True
        if self._segment is not None:
            self._segment.unlink()
            self._segment.close()

    # -- inside; all hold the lock --------------------------------------------------------------

    def _touch(self, owner_id: str) -> _Owner:
        self._check_open()
        owner = self._owners.get(owner_id)
        if owner is None:
            raise KVStoreError(f"{owner_id} is not registered with the KV store; register it first")
        owner.seen_s = self._clock()
        return owner

    def _drop(self, owner_id: str) -> int:
        owner = self._owners.pop(owner_id)
        freed = self._slots.drop_owner(owner.row)
        self.tables.owner_active[owner.row] = 0
        return freed

    def _free_row(self) -> int:
        rows = np.flatnonzero(self.tables.owner_active == 0)
        if not len(rows):
            raise KVStoreError(
                f"the KV store has {self.tables.max_owners} owners already; run fewer replicas on "
                "this node, or raise StoreConfig.max_owners"
            )
        return int(rows[0])

    def _check_open(self) -> None:
        if self._closed:
            raise KVStoreError("the KV store was closed")


def _has_store(tables: Tables) -> bool:
    """Whether another process is the store of these tables, though it may hang."""
    pid, started = int(tables.store[0]), int(tables.store[1])
    return pid != os.getpid() and process.is_alive(pid, started)


def _has_owner(tables: Tables) -> bool:
    return any(_lives(tables, row) for row in np.flatnonzero(tables.owner_active).tolist())


def _lives(tables: Tables, row: int) -> bool:
    """Whether a process of an owner is alive: each may have a copy under way into its slots."""
    members = np.flatnonzero(tables.member_pid[row])
    pids = [tables.owner_pid[row], *tables.member_pid[row, members]]
    started = [tables.owner_started[row], *tables.member_started[row, members]]
    return any(process.is_alive(int(p), int(s)) for p, s in zip(pids, started, strict=True))


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
