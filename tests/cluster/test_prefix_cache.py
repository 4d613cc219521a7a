"""Cached prompt tokens and salts, over HTTP and gRPC."""

from __future__ import annotations

import uuid

import grpc
import openai
import pytest

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

pytestmark = pytest.mark.cluster

PROMPT = "The house stood by the river, and in the evening the old man sat by its door. " * 4
BLOCK_TOKENS = 16


async def over_http(server, salt: str) -> list[tuple[int, int]]:
    """(prompt tokens, cached tokens): of a whole answer, of a stream, of each of its chunks."""
    found = []
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", timeout=60) as client:
        asked = dict(model=server.model, prompt=PROMPT, max_tokens=32)
        whole = await client.completions.create(**asked, extra_body={"cache_salt": salt})
        found.append(whole.usage)
        stream = await client.completions.create(
            **asked,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            extra_body={"cache_salt": salt},
        )
        found += [chunk.usage async for chunk in stream]
    return [(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) for usage in found]


async def over_grpc(server, salt: str) -> list[tuple[int, int]]:
    """(prompt tokens, cached tokens) of two calls."""
    message = pb.GenerateRequest(
        text=PROMPT, sampling=pb.SamplingParams(max_tokens=32), cache_salt=salt
    )
    usages = []
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        for _ in range(2):
            *_, last = [answer async for answer in InferenceStub(channel).Generate(message)]
            usages.append(last.usage)
    return [(usage.prompt_tokens, usage.cached_tokens) for usage in usages]


@pytest.mark.parametrize("ask", [over_http, over_grpc])
async def test_the_second_time_a_prompt_is_cached_for_its_salt_only(server, ask):
    server.wait_idle()
    for salt in (uuid.uuid4().hex, uuid.uuid4().hex):
        (tokens, first), *others = await ask(server, salt)
        assert first == 0
        # All blocks on the replica that served the first; on another one those that the first had
        # written to the store before it ended.
        ((again, cached),) = set(others)
        assert again == tokens and cached % BLOCK_TOKENS == 0
        assert 0 < cached <= (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


async def test_http_and_grpc_share_by_salt(server):
    salt = uuid.uuid4().hex
    (_, first), *_ = await over_http(server, salt)
    (_, second), *_ = await over_grpc(server, salt)
    assert first == 0 < second
