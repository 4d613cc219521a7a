"""The node's KV store dies under load: streams do not notice, and what it had is still there."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import pytest

from tests.support.processes import ray_pids
from tests.support.sse import Started

pytestmark = pytest.mark.cluster

TOKENS = 120
STORE = "ray::KVStoreActor"


async def test_streams_go_on_while_the_store_is_killed_and_it_keeps_its_blocks(server):
    limits = httpx.Limits(max_connections=100)
    client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)
    clients = Started(client, server.model)

    async def one(i: int, salt: str) -> tuple[str, int]:
        """(text, cached prompt tokens)"""
        reading = await clients.read(
            prompt=f"Chapter {i % 4}. It was late in the year, and the house was quiet when",
            max_tokens=TOKENS,
            token_rate=15,
            cache_salt=salt,
        )
        return reading.text, reading.usage["prompt_tokens_details"]["cached_tokens"]

    alone = [await one(i, "alone") for i in range(4)]
    await clients.wait(4)
    (pid,) = ray_pids(STORE)
    streams = [asyncio.create_task(one(i, f"{i}")) for i in range(16)]
    await clients.wait(16)
    pinned = server.metric("tokenflow_store_slots", state="pinned")
    assert pinned > 0
    os.kill(pid, signal.SIGKILL)
    texts = await asyncio.gather(*streams)
    assert [text for text, _ in texts] == [text for text, _ in alone] * 4
    assert server.metric("tokenflow_store_lost") == 0
    deadline = time.monotonic() + 30
    while not set(ray_pids(STORE)) - {pid}:
        assert time.monotonic() < deadline, "the store did not come back"
        await asyncio.sleep(0.1)
    server.wait_idle()
    slots = {
        state: server.metric("tokenflow_store_slots", state=state)
        for state in ("free", "leased", "pinned", "cached")
    }
    assert slots["pinned"] == 0, "holds outlived their requests"
    assert slots["cached"] > 0, "the blocks did not outlive their store"
    # What was committed before, and while nobody was there, is found again.
    again = await one(1, "1")
    assert again[0] == alone[1][0]
    assert again[1] > 0
    assert server.metric("tokenflow_corrupt_blocks_total") == 0
    await client.aclose()
