"""A client's request as streams, and what it is told to have used."""

from __future__ import annotations

import pytest

from tokenflow.cluster.generation import Generation, Usage
from tokenflow.cluster.streams import Stream
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.sampling.params import SamplingParams


class Manager:
    """Opens streams without replicas."""

    async def open(self, stream: Stream) -> None:
        pass

    def close(self, stream: Stream) -> None:
        pass


async def start(prompts: list[list[int]], n: int, salt: str | None = None) -> Generation:
    def sampling(prompt_tokens: int, choice: int) -> SamplingParams:
        return SamplingParams(max_tokens=8)

    manager = Manager()
    return await Generation.start(manager, "r", prompts, n, sampling, 20.0, salt)  # type: ignore[arg-type]


def tokens(n: int, cached: int) -> list[TokenEvent]:
    """A whole stream."""
    return [
        TokenEvent(
            "r", i, 100 + i, "x", 1e9, None, "stop" if i == n - 1 else None, None, cached * (i == 0)
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("n", "found", "expected"),
    [
        (1, [4, 0], 4),
        (1, [4, 8], 12),
        # The second choice of a prompt finds what the first has computed: that is no saving to
        # the prompt, which is counted once.
        (2, [0, 4, 0, 8], 0),
        (2, [4, 4, 8, 8], 12),
        (2, [4, 0, 0, 8], 4),
    ],
)
async def test_cached_tokens_are_those_of_each_prompts_first_choice(n, found, expected):
    generation = await start([[1] * 5, [2] * 9], n)
    for stream, cached in zip(generation.streams, found, strict=True):
        for event in tokens(3, cached):
            stream.deliver(event)
    counts = [generation.usage async for _ in generation.updates(0.01)]
    assert counts[-1] == Usage(14, 3 * 2 * n, expected)
    assert all(usage.cached_tokens <= usage.prompt_tokens for usage in counts)


async def test_before_the_first_token_nothing_is_known_to_be_cached():
    generation = await start([[1] * 5], 1)
    assert generation.usage == Usage(5, 0, 0)


async def test_every_stream_of_a_request_has_its_salt():
    assert {s.cache_salt for s in (await start([[1], [2]], 2, "salt")).streams} == {"salt"}
    assert (await start([[1]], 1)).streams[0].cache_salt is None
