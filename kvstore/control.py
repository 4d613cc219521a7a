"""The way from a replica to its store: leases in bulk, and nothing else.

Looking keys up, pinning, committing and releasing need no call; see `client`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from tokenflow.kvstore.node import NodeStore, StoreInfo
from tokenflow.replicas.errors import KVStoreError


class StoreUnavailableError(KVStoreError):
    """The store did not answer and may come back; whether it did what was asked is not known."""


class StoreHungError(StoreUnavailableError):
    """The store lives and does not answer: somebody has to end it, so that it is replaced."""


class StoreControl(Protocol):
    """Calls of one registered owner. They may block.

    They raise StoreUnavailableError while the store is away, and KVStoreError once the owner's
    leases are void.
    """

    @property
    def owner_index(self) -> int:
        """The owner's row in the tables."""
        ...

    def lease(self, n: int) -> list[int]:
        """Up to `n` more slots."""
        ...

    def release(self, slots: Sequence[int]) -> None:
        """Give leased slots back."""
        ...

    def reattach(self, held: Sequence[int]) -> None:
        """After a failed call: of the slots leased to this owner, keep those in `held` only."""
        ...

    def poll(self) -> None:
        """Have the store index what was committed, now rather than within milliseconds."""
        ...

    def unregister(self) -> None:
        """Give everything back, leases and pins; no further call is allowed."""
        ...


class LocalStoreControl:
    """A store in this process: the simulator, tests, notebooks, a single engine without Ray."""

    def __init__(self, store: NodeStore, owner_id: str, pid: int | None = None) -> None:
        """Register `owner_id` as living as long as process `pid`, by default this one."""
        self._store = store
        self._owner_id = owner_id
        self.info: StoreInfo = store.register(owner_id, os.getpid() if pid is None else pid)
        self.owner_index = self.info.owners[owner_id].index

    def lease(self, n: int) -> list[int]:
        return self._store.lease(self._owner_id, n)

    def release(self, slots: Sequence[int]) -> None:
        self._store.release(self._owner_id, slots)

    def reattach(self, held: Sequence[int]) -> None:
        self._store.reattach(self._owner_id, held)

    def poll(self) -> None:
        self._store.poll()

    def unregister(self) -> None:
        self._store.unregister(self._owner_id)
