"""From a checked call to running streams, and their events merged: one path for HTTP and gRPC.

Who may read a generation again, and until when, is in `reconnect.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from tokenflow.cluster.deadline import before, until
from tokenflow.cluster.routing import counted_rate
from tokenflow.cluster.stream import Stream
from tokenflow.cluster.streams import StreamManager
from tokenflow.cluster.tenancy import public_id
from tokenflow.replicas.errors import TokenFlowError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Update:
    """News of one choice."""

    choice: int
    events: list[TokenEvent]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that came out of a cache, at most `prompt_tokens`."""


class Generation:
    """The streams of one client request: choice `i` answers prompt `i // n`. Made by `start`."""

    def __init__(
        self,
        manager: StreamManager,
        request_id: str,
        prompts: list[list[int]],
        streams: list[Stream],
        deadline_s: float | None = None,
    ) -> None:
        self._manager = manager
        self.id = request_id
        """Inside the cluster (`tenancy.scoped_id`); its client knows it as `public_id`."""
        self.prompts = prompts
        self.streams = streams
        self.reader = 0
        """The how-manieth reader has it; only of those that may be read again."""
        self._delivered = 0
        self._deadline_s = deadline_s

    @property
    def usage(self) -> Usage:
        """Prompt and cached tokens once per prompt, the latter as its first choice found them;
        completion tokens of the updates so far."""
        firsts = self.streams[:: len(self.streams) // len(self.prompts)]
        return Usage(
            prompt_tokens=sum(len(prompt) for prompt in self.prompts),
            completion_tokens=self._delivered,
            cached_tokens=sum(stream.cached_tokens for stream in firsts),
        )

    @classmethod
    async def start(
        cls,
        manager: StreamManager,
        request_id: str,
        prompts: list[list[int]],
        n: int,
        sampling: Callable[[int, int], SamplingParams],
        token_rate: float,
        cache_salt: str | None = None,
        context: bytes = b"",
        deadline_s: float | None = None,
        *,
        traced: bool = False,
    ) -> Generation:
        """Open `n` streams per prompt: all of them, or none and the first refusal is raised.

        `sampling(prompt_tokens, choice)` gives a choice's parameters. With a `context` the streams
        outlive their reader (see `Submission.context`); those that are `traced` say what they went
        through (`Stream.attempts`). At `deadline_s`, on the monotonic clock,
        all ends with DeadlineExceededError, now or in `updates`.
        """
        streams = [
            Stream(
                manager,
                request_id,
                tuple(prompt),
                sampling(len(prompt), i),
                token_rate,
                cache_salt,
                choice=i,
                context=context,
                traced=traced,
            )
            for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n))
        ]
        generation = cls(manager, request_id, prompts, streams, deadline_s)
        await generation.open(streams)
        return generation

    async def open(self, streams: list[Stream]) -> None:
        """Submit those of its streams: all of them, or the generation is closed and the first
        refusal raised."""
        try:
            async with before(self._deadline_s):
                results = await asyncio.gather(
                    *(self._manager.open(stream) for stream in streams), return_exceptions=True
                )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        for stream in self.streams:
            self._manager.close(stream)

    def fail(self, error: TokenFlowError) -> None:
        """Cancel what still runs; its reader gets `error`. Idempotent."""
        for stream in self.streams:
            if stream.finish_reason is None:
                self._manager.cancel(stream, error)

    def read_from(self, counts: list[int]) -> None:
        """A reader comes who has so many tokens of each choice, one more if it was told of the end
        as well. Raises InvalidRequestError (416) when there were not so many; nothing has changed
        then."""
        for stream, count in zip(self.streams, counts, strict=True):
            stream.check_place(count)
        for stream, count in zip(self.streams, counts, strict=True):
            self._manager.read_again(stream, count)
        self.reader += 1
        self._delivered = sum(counts)

    @property
    def public_id(self) -> str:
        return public_id(self.id)

    # What the quota of its key asks for.

    @property
    def running(self) -> int:
        """Streams that have not ended."""
        return sum(stream.finish_reason is None for stream in self.streams)

    @property
    def rate(self) -> float:
        """Sum of the token rates of those, tokens/s."""
        running = (stream for stream in self.streams if stream.finish_reason is None)
        return sum(counted_rate(stream.token_rate) for stream in running)

    @property
    def tokens(self) -> int:
        """Prompt and output tokens so far, of each stream."""
        return sum(len(stream.prompt_ids) + len(stream.token_ids) for stream in self.streams)

    @property
    def resumable(self) -> bool:
        """Whether it outlives its reader."""
        return any(stream.resumable for stream in self.streams)

    @property
    def taken(self) -> bool:
        """Whether another ingress goes on with it."""
        return any(stream.taken for stream in self.streams)

    def pause_unread(self) -> None:
        """Its reader is gone for now."""
        for stream in self.streams:
            self._manager.set_unread(stream)

    async def updates(
        self, max_delay_s: float, heartbeat_s: float | None = None
    ) -> AsyncGenerator[Update, None]:
        """Batches of events of all choices until every one has ended.

        With `heartbeat_s`, an update without events comes when a choice was silent for that long.

        Closing it early cancels what still runs. Raises TokenFlowError when a stream fails,
        DeadlineExceededError at the deadline.
        """
        merged = self._merged(max_delay_s, heartbeat_s)
        timed = merged if self._deadline_s is None else until(merged, self._deadline_s)
        try:
            async for update in timed:
                self._delivered += sum(event.token_id >= 0 for event in update.events)
                yield update
            self._delivered = sum(len(stream.token_ids) for stream in self.streams)
        finally:
            await merged.aclose()

    async def _merged(
        self, max_delay_s: float, heartbeat_s: float | None
    ) -> AsyncGenerator[Update, None]:
        if len(self.streams) == 1:
            batches = self.streams[0].batches(max_delay_s, heartbeat_s)
            try:
                async for events in batches:
                    yield Update(0, events)
            finally:
                await batches.aclose()
            return
        merged: asyncio.Queue[Update | Exception | None] = asyncio.Queue()

        async def forward(choice: int, stream: Stream) -> None:
            try:
                async for events in stream.batches(max_delay_s, heartbeat_s):
                    merged.put_nowait(Update(choice, events))
                merged.put_nowait(None)
            except Exception as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(i, s)) for i, s in enumerate(self.streams)]
        try:
            running = len(tasks)
            while running:
                item = await merged.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def choice_seed(seed: int | None, choice: int) -> int:
    """The sampler's seed of one choice. A request without a seed gets a random one here, so that
    its text goes on unchanged when it moves to another replica."""
    if seed is None:
        return random.getrandbits(63)
    # Distinct streams for distinct choices; choice 0 keeps the client's seed.
    value = (seed + choice * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return value - (1 << 64) if value >= 1 << 63 else value
