"""Has the streams of this ingress moved as `rebalancing` plans it: asks the replicas how they are,
now and then, and tells the streams."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from typing import Any, Protocol

from tokenflow.cluster.rebalancing import Move, Rebalancer, ReplicaState

logger = logging.getLogger("ray.serve")


class Streams(Protocol):
    """What is needed of a `StreamManager`."""

    @property
    def active(self) -> int: ...

    async def stats(self) -> list[dict[str, Any]]: ...

    def by_attempt(self, attempt_id: str) -> Any | None: ...

    async def move_to(self, stream: Any, replica_id: str) -> object: ...


class StreamMover:
    """One per ingress; its loop begins at the first `start`."""

    def __init__(self, streams: Streams, interval_s: float) -> None:
        """`interval_s` of 0: never move anything."""
        self._streams = streams
        self._interval_s = interval_s
        self._policy = Rebalancer()
        self._task: asyncio.Task[None] | None = None
        self._moving: set[asyncio.Task[object]] = set()

    def start(self) -> None:
        """Begin, or go on. Needs a running event loop."""
        if self._interval_s > 0 and (self._task is None or self._task.done()):
            # Not in the context of the request that happens to be current: Serve ends the calls
            # of a request with it.
            self._task = asyncio.get_running_loop().create_task(
                self._run(), context=contextvars.Context()
            )

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            if not self._streams.active:
                continue
            try:
                await self.round()
            except Exception:  # one failed round must not end the rounds after it
                logger.exception("cannot rebalance")

    async def round(self) -> list[Move]:
        """Plan once, and carry out what concerns this ingress's streams; returns those moves."""
        states = [
            ReplicaState(stats["replica_id"], stats["node_id"], stats["overload"])
            for stats in await self._streams.stats()
        ]
        moves = []
        for move in self._policy.plan(states, time.monotonic()):
            stream = self._streams.by_attempt(move.request_id)
            if stream is not None:
                moves.append((stream, move))
        for stream, move in moves:
            # Not waited for: one target that hangs must not end all rebalancing.
            task = asyncio.create_task(self._streams.move_to(stream, move.target))
            self._moving.add(task)
            task.add_done_callback(self._moving.discard)
        return [move for _, move in moves]
