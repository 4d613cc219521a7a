"""What a node's store does with the stores of other nodes: lends them blocks, fetches theirs.

It takes part in its own store as one more owner, like a replica: pins and leases are its own, and
end with its process. Knows nothing of how the stores find each other (see `actor`).
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tokenflow.kvstore.block_fetch import Cancelled, Fetched, fetch_blocks
from tokenflow.kvstore.block_server import BlockServer
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore
from tokenflow.kvstore.peer import Endpoint


@dataclass(frozen=True, slots=True)
class ExchangeStats:
    """Counters since the start, in blocks except where said."""

    served_blocks: int = 0
    serve_failures: int = 0
    """Connections of peers that ended badly."""
    fetched_blocks: int = 0
    fetches: int = 0
    fetch_failures: int = 0
    """Fetches that ended early."""


class Exchange:
    """One per store. Thread-safe."""

    def __init__(self, store: NodeStore, host: str) -> None:
        """Serve on `host`, an address that the other nodes reach. Raises OSError or KVStoreError;
        `store` must have a segment."""
        control = LocalStoreControl(store, f"exchange-{uuid.uuid4().hex}")
        self._slot_bytes = control.info.slot_bytes
        self._memory = store.memory()
        # No slot is kept in reserve: what is not being filled is everybody's.
        self._slots = HostSlots(
            control,
            store.tables,
            control.info.owner_quota,
            background=False,
            low_water=0,
            high_water=0,
        )
        self._server = BlockServer(self._slots, self._memory, self._slot_bytes, host)
        self._lock = threading.Lock()
        self._running: dict[str, Cancelled] = {}
        self._fetched_blocks = self._fetches = self._fetch_failures = 0

    @property
    def endpoint(self) -> Endpoint:
        """What another store needs to fetch from this one."""
        return self._server.endpoint

    def fetch(
        self, fetch_id: str, keys: Sequence[bytes], source: Endpoint, timeout_s: float
    ) -> Fetched:
        """See `fetch_blocks`; blocks for at most `timeout_s`. `fetch_id` is for `cancel`."""
        cancelled = Cancelled()
        with self._lock:
            self._running[fetch_id] = cancelled
        try:
            result = fetch_blocks(
                self._slots,
                self._memory,
                self._slot_bytes,
                keys,
                source,
                timeout_s=timeout_s,
                cancelled=cancelled,
            )
        finally:
            with self._lock:
                self._running.pop(fetch_id, None)
        with self._lock:
            self._fetches += 1
            self._fetched_blocks += result.blocks
            self._fetch_failures += result.error is not None
        return result

    def cancel(self, fetch_id: str) -> None:
        """End a fetch; one that is not under way is ignored."""
        with self._lock:
            cancelled = self._running.get(fetch_id)
        if cancelled is not None:
            cancelled.set()

    def stats(self) -> ExchangeStats:
        with self._lock:
            return ExchangeStats(
                served_blocks=self._server.stats.blocks,
                serve_failures=self._server.stats.failures,
                fetched_blocks=self._fetched_blocks,
                fetches=self._fetches,
                fetch_failures=self._fetch_failures,
            )

    def close(self) -> None:
        """End what is under way, and give everything back to the store."""
        with self._lock:
            running = list(self._running.values())
        for cancelled in running:
            cancelled.set()
        self._server.close()
        self._slots.close()
