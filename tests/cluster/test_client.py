"""The client library against a running cluster."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support import node_client
from tokenflow.client import AsyncClient, Client, InvalidRequest, NotFound

pytestmark = pytest.mark.cluster


@pytest.fixture
async def client(server):
    async with AsyncClient(server.grpc) as client:
        yield client


async def test_both_clients_get_the_same_text(server, client):
    options = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    stream = client.generate("The old man", **options)
    text = await stream.text()
    assert text and stream.usage.completion_tokens == 24 and stream.finish_reason == "length"

    def read() -> str:
        with Client(server.grpc) as plain:
            return "".join(t.text for t in plain.generate("The old man", **options).paced("max"))

    assert await asyncio.to_thread(read) == text


async def test_token_ids_chats_and_logprobs(client):
    stream = client.generate([300, 301, 302], max_tokens=4, logprobs=2, ignore_eos=True)
    tokens = [token async for token in stream.paced("max")]
    assert stream.usage.prompt_tokens == 3
    assert [len(token.logprobs.top) for token in tokens] == [2] * 4
    chat = client.generate([{"role": "user", "content": "Hello"}], max_tokens=4)
    await chat.text()
    assert chat.usage.prompt_tokens > 1


async def test_paced_reading_takes_the_readers_time(client):
    stream = client.generate("The old man", token_rate=40, max_tokens=30, ignore_eos=True)
    times = [time.monotonic() async for _ in stream.paced()]
    assert len(times) == 30 and times[-1] - times[0] >= 29 / 40 - 0.01


async def test_errors_are_typed(client):
    with pytest.raises(NotFound):
        await client.generate("x", model="nobody").text()
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await client.generate("x", max_tokens=100_000).text()


async def test_leaving_early_frees_the_blocks(server, client):
    server.wait_idle()
    async with client.generate("The", max_tokens=900, ignore_eos=True) as stream:
        async for _ in stream:
            break
    assert await asyncio.to_thread(server.wait_idle) < 1.0


async def test_what_is_served(server, client):
    info = await client.model_info()
    assert (info.model, info.max_model_len, info.default_token_rate) == (server.model, 1024, 20)


async def test_node_clients_get_the_same_text(server, client):
    expected = await client.generate(
        "The old man", max_tokens=24, temperature=0.0, ignore_eos=True
    ).text()
    status, text, end = await node_client.run(*node_client.bare(), server.grpc, "The old man", "24")
    assert (status, text) == (0, expected), end
    command = node_client.installed()
    options = ("--max-tokens", "24", "--temperature", "0", "--rate", "50")
    status, text, end = await node_client.run(*command, server.grpc, "The old man", *options)
    assert (status, text) == (0, expected), end
    assert end["usage"]["completion_tokens"] == 24
