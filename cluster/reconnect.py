"""Requests that outlive a lost connection: who may come back, to what, and until when.

Every ingress keeps those of its own clients here; one that it does not know it takes over from the
replicas (`StreamManager.adopt`), whose context says how the answer was begun. Ids are those that
requests have inside the cluster (`tenancy.scoped_id`).
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

from tokenflow.cluster.api.protocol import Call
from tokenflow.cluster.generation import Generation
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.streams import StreamManager
from tokenflow.cluster.tenancy import public_id
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.sampling.params import SamplingParams

_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True)
class Context:
    """What an ingress must know to go on with another one's answer."""

    call: Call
    created: int
    """Unix seconds."""
    prompts: list[list[int]]
    params: list[SamplingParams]
    """Of each choice, seeds included."""

    def to_bytes(self) -> bytes:
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def from_bytes(data: bytes) -> Context:
        context = pickle.loads(data)
        assert isinstance(context, Context)
        return context


@dataclass(slots=True)
class Kept:
    """A request that may be read again."""

    generation: Generation
    context: Context
    expiry: asyncio.TimerHandle | None = None


class Reconnections:
    """The resumable requests of one ingress; each is kept for `grace_s` after its reader left."""

    def __init__(self, manager: StreamManager, grace_s: float) -> None:
        self._manager = manager
        self._grace_s = grace_s
        self._kept: dict[str, Kept] = {}
        self._starting: set[str] = set()
        self._adopting = asyncio.Lock()

    @contextlib.contextmanager
    def starting(self, request_id: str) -> Iterator[None]:
        """While a request of that id is being started. Raises InvalidRequestError (409) when there
        is one already."""
        kept = self._kept.get(request_id)
        shown = public_id(request_id)[:_SHOWN_CHARS]
        if request_id in self._starting or (kept is not None and not kept.generation.taken):
            raise InvalidRequestError(
                f"A resumable request {shown!r} exists already; go on with it, or choose "
                "another id.",
                param="request_id",
                status=409,
            )
        self._starting.add(request_id)
        try:
            yield
        finally:
            self._starting.discard(request_id)

    def keep(self, generation: Generation, context: Context) -> Kept:
        """From now on its reader may leave and come back."""
        kept = self._kept[generation.id] = Kept(generation, context)
        return kept

    def leave(self, generation: Generation, reader: int) -> None:
        """The reader of that number (`Generation.reader`) is gone, whether it has all or not.
        Without effect when another one has come since."""
        kept = self._kept.get(generation.id)
        if kept is None or kept.generation is not generation or generation.reader != reader:
            return
        generation.pause_unread()
        if kept.expiry is not None:
            kept.expiry.cancel()
        loop = asyncio.get_running_loop()
        kept.expiry = loop.call_later(self._grace_s, self._expire, kept)

    def _expire(self, kept: Kept) -> None:
        kept.generation.close()
        if self._kept.get(kept.generation.id) is kept:
            del self._kept[kept.generation.id]

    async def find(self, request_id: str) -> Kept:
        """The request that a client comes back to. Raises InvalidRequestError (404) when nobody
        has it (any more)."""
        kept = self._kept.get(request_id)
        if kept is None or kept.generation.taken:
            async with self._adopting:
                kept = self._kept.get(request_id)
                if kept is None or kept.generation.taken:
                    kept = await self._adopt(request_id)
        return kept

    def read(self, kept: Kept, counts: list[int]) -> None:
        """A reader goes on with it; see `Generation.read_from`."""
        kept.generation.read_from(counts)
        if kept.expiry is not None:
            kept.expiry.cancel()
            kept.expiry = None

    async def _adopt(self, request_id: str) -> Kept:
        found = await self._manager.adopt(request_id)
        if not found:
            raise unknown_request(request_id)
        data = found[0].context
        context = Context.from_bytes(data)
        by_choice = {stream.choice: stream for stream in found}
        each = len(context.params) // len(context.prompts)
        lost = []
        for choice, params in enumerate(context.params):
            if choice in by_choice:
                continue
            # Its replica died with its ingress; made anew it is the same text.
            stream = by_choice[choice] = Stream(
                self._manager,
                request_id,
                tuple(context.prompts[choice // each]),
                params,
                context.call.token_rate,
                context.call.prefix_salt,
                choice=choice,
                context=data,
            )
            stream.remade = True
            lost.append(stream)
        streams = [by_choice[choice] for choice in range(len(context.params))]
        generation = Generation(self._manager, request_id, context.prompts, streams)
        await generation.open(lost)
        kept = self.keep(generation, context)
        # Should the client be refused, this is what ends the request.
        self.leave(generation, generation.reader)
        return kept


def unknown_request(request_id: str) -> InvalidRequestError:
    shown = public_id(request_id)[:_SHOWN_CHARS]
    return InvalidRequestError(
        f"There is no request {shown!r}, or its time to come back is over.",
        param="request_id",
        code="request_not_found",
        status=404,
    )
