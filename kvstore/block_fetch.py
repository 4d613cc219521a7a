"""Fetching blocks from another node's store into this one.

Received straight into slots of the segment, checked against the writer's checksums, and committed
frame by frame: what arrived before a failure stays, and any replica of this node finds it like a
block written here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.peer import (
    HANDSHAKE_S,
    MAX_KEYS,
    Endpoint,
    PeerError,
    ask,
    receive,
    receive_head,
    runs,
)
from tokenflow.replicas.transfers import Commit


class Fetched(NamedTuple):
    """What came of a fetch."""

    blocks: int
    """Blocks that are on this node now and were not before."""
    seconds: float
    """From the connection to the last block."""
    error: str | None = None
    """Why it ended early; None when all came that the other store has."""


class Cancelled:
    """Ends a fetch from another thread, also one that waits for its peer. Used once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._set = False

    def set(self) -> None:
        with self._lock:
            self._set = True
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def watch(self, connection: socket.socket) -> None:
        """Raises PeerError when it is set already."""
        with self._lock:
            if self._set:
                raise PeerError("the fetch was cancelled")
            self._connection = connection

    def forget(self) -> None:
        with self._lock:
            self._connection = None


def fetch_blocks(
    slots: HostSlots,
    memory: memoryview,
    slot_bytes: int,
    keys: Sequence[bytes],
    source: Endpoint,
    *,
    timeout_s: float,
    cancelled: Cancelled,
) -> Fetched:
    """Bring the blocks of the chain `keys` that are missing here, from its front on.

    Blocks until all is there, `timeout_s` is over, `cancelled` is set, or the source fails or has
    no more. Never raises for any of these: what came before is kept, and the result says so. What
    is here already is held meanwhile, so that it does not make room for what comes.
    """
    begun = time.monotonic()
    deadline_s = begun + timeout_s
    keys = keys[:MAX_KEYS]
    held = slots.match(keys)
    first = len(held)
    error: str | None = None
    try:
        if first < len(keys):
            address = (source.host, source.port)
            with socket.create_connection(address, min(timeout_s, HANDSHAKE_S)) as connection:
                cancelled.watch(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ask(connection, source.secret, slot_bytes, keys[first:], deadline_s)
                while sums := receive_head(connection, len(keys) - len(held), deadline_s):
                    _take_frame(
                        connection, slots, memory, slot_bytes, keys, held, sums, deadline_s, source
                    )
    except (OSError, PeerError) as failure:
        error = str(failure)
    finally:
        cancelled.forget()
        slots.release(held)
    return Fetched(len(held) - first, time.monotonic() - begun, error)


def _take_frame(
    connection: socket.socket,
    slots: HostSlots,
    memory: memoryview,
    slot_bytes: int,
    keys: Sequence[bytes],
    held: list[int],
    sums: Sequence[int],
    deadline_s: float,
    source: Endpoint,
) -> None:
    """Receive the blocks of a frame and commit those that are intact; `held` grows by them.

    Raises PeerError when not all of them could be taken.
    """
    fresh = _acquire(slots, len(sums))
    position = len(held)
    good = 0
    try:
        for piece in runs(memory, fresh, slot_bytes):
            receive(connection, piece, deadline_s)
        for slot, checksum in zip(fresh, sums, strict=False):
            # 0: the writer computed none.
            block = memory[slot * slot_bytes : (slot + 1) * slot_bytes]
            if checksum and xxhash.xxh3_64_intdigest(block) != checksum:
                raise PeerError(
                    f"block {position + good} of {len(keys)} did not arrive as it was written"
                )
            good += 1
        if good < len(sums):
            raise PeerError("no room for more blocks on this node")
    finally:
        slots.commit(
            [
                Commit(slot, keys[position + i], f"from {source.host}", position + i, sums[i])
                for i, slot in enumerate(fresh[:good])
            ]
        )
        held += fresh[:good]
        slots.release(fresh[good:])


def _acquire(slots: HostSlots, n: int) -> list[int]:
    """`n` slots, or as many as there are."""
    n = min(n, slots.capacity - slots.stats().held)
    taken = slots.acquire(n) if n > 0 else None
    if taken is None:  # what the store could give is at hand now
        taken = slots.acquire(max(0, min(n, slots.available())))
    return taken or []
