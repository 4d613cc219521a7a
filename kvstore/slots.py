"""Who owns which slot of a segment: plain bookkeeping, no I/O, no clock, not thread-safe.

A slot is free or leased to exactly one owner (a replica). Owners take slots in bulk and hand them
to their own requests, so one call here stands for many blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenflow.replicas.errors import KVStoreError


@dataclass(frozen=True, slots=True)
class SlotStats:
    """Slots of a table; `free + leased == total` always."""

    total: int
    free: int
    leased_by: dict[str, int]

    @property
    def leased(self) -> int:
        return sum(self.leased_by.values())


class SlotTable:
    """Leases of `num_slots` slots. Every operation costs O(1) per slot it moves."""

    def __init__(self, num_slots: int, max_owner_fraction: float = 1.0) -> None:
        if num_slots <= 0:
            raise KVStoreError(f"a slot table needs at least one slot, got {num_slots}")
        if not 0 < max_owner_fraction <= 1:
            raise KVStoreError(f"max_owner_fraction must be in (0, 1], got {max_owner_fraction}")
        self.num_slots = num_slots
        self.quota = max(1, int(num_slots * max_owner_fraction))
        """Most slots one owner may hold, so that no replica can starve its neighbours."""
        # A stack: the slot given back last goes out first, while its pages are still in the cache.
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[str, set[int]] = {}

    def lease(self, owner: str, n: int) -> list[int]:
        """Up to `n` free slots for `owner`: fewer, or none, when the table or its quota is full."""
        if n < 0:
            raise KVStoreError(f"cannot lease {n} slots")
        held = self._held.setdefault(owner, set())
        left = len(self._free) - min(n, len(self._free), self.quota - len(held))
        slots = self._free[left:]
        del self._free[left:]
        held.update(slots)
        return slots

    def release(self, owner: str, slots: Sequence[int]) -> None:
        """Give slots back. Raises KVStoreError, and changes nothing, unless `owner` holds each.

        A slot released twice may already be another replica's; taking it would mix two texts' KV.
        """
        held = self._held.get(owner, set())
        returned = set(slots)
        if len(returned) != len(slots) or not returned <= held:
            wrong = sorted(returned - held) or sorted(s for s in returned if slots.count(s) > 1)
            raise KVStoreError(
                f"{owner} releases slots it does not hold, or twice: {wrong[:8]} of {len(slots)}"
            )
        held -= returned
        self._free.extend(slots)

    def release_owner(self, owner: str) -> int:
        """Free everything `owner` holds and forget it; returns how many slots that were."""
        slots = self._held.pop(owner, set())
        self._free.extend(slots)
        return len(slots)

    def held_by(self, owner: str) -> int:
        return len(self._held.get(owner, ()))

    def stats(self) -> SlotStats:
        held = {owner: len(slots) for owner, slots in self._held.items()}
        return SlotStats(total=self.num_slots, free=len(self._free), leased_by=held)
