"""Calls to replicas through Serve's handle: to one, to all, with a time limit.

Every call is made in a task of its own, outside the request that happens to be current: Serve
cancels a request's own calls together with it, and two that are made at once would share one id,
upon which its router spins for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.wire import Submission
from tokenflow.replicas.errors import EngineDeadError

logger = logging.getLogger("ray.serve")

_Result = TypeVar("_Result")

_TIMEOUT_S = 2.0
"""Of a question to a replica that is not silent."""


class ReplicaCalls:
    """`look_s`: how often a submission that is not answered is looked after."""

    def __init__(self, handle: Any, *, look_s: float) -> None:
        self._handle = handle
        self._look_s = look_s
        self.tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        """Run in the background, outside the current request."""
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """What some replica says about the model. Raises EngineDeadError when none answers in
        time."""
        return await self.spawn(self._info(timeout_s))

    async def _info(self, timeout_s: float) -> dict[str, Any]:
        from ray.exceptions import RayActorError

        response = self._handle.info.remote()
        try:
            async with asyncio.timeout(timeout_s):
                info: dict[str, Any] = await response
                return info
        except (TimeoutError, RayActorError) as error:
            response.cancel()
            raise EngineDeadError("no replica answers") from error

    def frames(self, ingress_id: str, replica_id: str) -> Any:
        """A replica's frame subscription: iterate over it, or cancel it."""
        frames = self._handle.options(stream=True, method_name="frames")
        return frames.remote(ingress_id, target=replica_id)

    async def ask_all(self, method: str, *args: Any) -> list[tuple[str, Any]]:
        """(replica id, its answer or the exception) of all replicas that are not silent."""
        asked = [name for name in REGISTRY.replicas if not REGISTRY.avoids(name)]
        answers = await asyncio.gather(
            *(self.spawn(self.ask(name, method, *args)) for name in asked), return_exceptions=True
        )
        return list(zip(asked, answers, strict=True))

    async def ask(self, replica_id: str, method: str, *args: Any) -> Any:
        """The answer of one replica; to be spawned. Raises TimeoutError."""
        response = getattr(self._handle, method).remote(*args, target=replica_id)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await response
        except TimeoutError:
            response.cancel()
            raise

    async def cancel(self, attempt_ids: list[str], replica_id: str) -> None:
        """End attempts on a replica, if it can be told; to be spawned."""
        try:
            await self._handle.cancel.remote(attempt_ids, target=replica_id)
        except Exception as error:
            logger.info("cancel not delivered to %s: %s", replica_id, type(error).__name__)

    async def submit(self, submission: Submission, deadline: float, target: str | None) -> str:
        """The id of the replica that took it: `target`, or the one that the router chose. To be
        spawned. Raises what the replica refuses it with, and EngineDeadError when none took it in
        time or the one that was asked fell silent."""
        attempt_id = submission.request_id
        response = self._handle.submit.remote(submission, target=target)
        answer = self.spawn(_answer(response))
        try:
            while True:
                left = deadline - time.monotonic()
                done, _ = await asyncio.wait([answer], timeout=max(0.0, min(left, self._look_s)))
                if done:
                    replica_id: str = answer.result()
                    return replica_id
                where = REGISTRY.where(attempt_id)
                if left <= 0 or (where is not None and REGISTRY.avoids(where)):
                    response.cancel()
                    raise EngineDeadError("no replica took the request in time")
        finally:
            answer.cancel()


async def _answer(response: Any) -> Any:
    return await response
