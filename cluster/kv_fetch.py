"""KV that a request left on another node is brought here before the engine sees the request.

Whether that is faster than computing it again is decided by `fetch_prefix`, from what earlier
fetches from that node took; how blocks travel is the stores' business (kvstore/). Runs on the
replica's event loop; the engine's loop never waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from tokenflow.kvstore.block_fetch import Fetched
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.scheduler.cost import CostModel, LinkCost
from tokenflow.replicas.scheduler.restore import fetch_prefix
from tokenflow.replicas.transfers import HostSlots

logger = logging.getLogger("ray.serve")

MOST_WAITED_S = 5.0
"""Longest time a request waits for its KV; what has come by then is used."""
LEAST_WAITED_S = 0.5
_AVOIDED_S = 5.0
"""A node from which nothing could be fetched is not asked again for so long."""
_REMEMBERED_S = 60.0
"""A link that was not used for so long may have become another."""


class StoreFetch(Protocol):
    """How this node's store is told to fetch; see `kvstore.actor.RayStoreFetch`."""

    async def fetch(self, keys: Sequence[bytes], source_node: str, timeout_s: float) -> Fetched:
        """Raises KVStoreError or TimeoutError."""
        ...


@dataclass(slots=True)
class FetchStats:
    """Totals since start."""

    fetches: int = 0
    """Requests whose KV was asked for on another node."""
    fetched_blocks: int = 0
    fetch_seconds: float = 0.0
    fetch_failures: int = 0
    """Of these, ended early or without any block."""
    recomputed_instead: int = 0
    """Requests from another node whose KV was not asked for, since computing it is faster."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class _Link:
    __slots__ = ("cost", "used_s")

    def __init__(self) -> None:
        self.cost = LinkCost()
        self.used_s = time.monotonic()


class KVFetcher:
    """One per replica."""

    def __init__(
        self,
        store: StoreFetch,
        host: HostSlots,
        cost: CostModel,
        *,
        block_size: int,
        others: Callable[[], int],
    ) -> None:
        """`cost` is the engine's, `others` says how many requests are on its device."""
        self.stats = FetchStats()
        self._store = store
        self._host = host
        self._cost = cost
        self._block_size = block_size
        self._others = others
        self._links: dict[str, _Link] = {}
        self._avoided_until: dict[str, float] = {}

    async def bring(self, keys: Sequence[bytes], source: str) -> int:
        """Have those of the blocks `keys`, a chain from its beginning, that are missing on this
        node fetched from the node `source`, if that is worth it; returns how many came. Never
        raises: what does not come is computed."""
        now = time.monotonic()
        here = self._host.match(keys)
        self._host.release(here)
        missing = len(keys) - len(here)
        if not missing or now < self._avoided_until.get(source, 0.0):
            return 0
        link = self._links.get(source)
        if link is None or now - link.used_s > _REMEMBERED_S:
            link = self._links[source] = _Link()
        tokens, others = missing * self._block_size, self._others()
        if not fetch_prefix(self._cost, link.cost, missing, tokens, others=others):
            self.stats.recomputed_instead += 1
            return 0
        # Waiting for longer than the prefill would take is of no use.
        compute_s = self._cost.prefill_s(tokens) * (1 + others) or MOST_WAITED_S
        timeout_s = min(max(compute_s, LEAST_WAITED_S), MOST_WAITED_S)
        self.stats.fetches += 1
        try:
            fetched = await self._store.fetch(keys, source, timeout_s)
        except (KVStoreError, TimeoutError) as error:
            fetched = Fetched(0, 0.0, str(error) or f"nothing came in {timeout_s:.1f} s")
        ended = time.monotonic()
        self.stats.fetch_seconds += ended - now
        self.stats.fetched_blocks += fetched.blocks
        link.used_s = ended
        if fetched.blocks:
            link.cost.observe(fetched.blocks, fetched.seconds, ended - now)
        if fetched.error is not None:
            self.stats.fetch_failures += 1
            logger.warning(
                "fetched %d of %d KV blocks from node %s: %s",
                fetched.blocks,
                missing,
                source,
                fetched.error,
            )
            if not fetched.blocks:
                self._avoided_until[source] = ended + _AVOIDED_S
        return fetched.blocks
