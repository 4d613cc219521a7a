"""A replica that dies costs no stream: not a token lost, doubled or changed."""

from __future__ import annotations

import asyncio
import os
import signal

import openai
import pytest

from tests.support.processes import ray_pids

pytestmark = pytest.mark.cluster

TOKENS = 160
REPLICA = "ray::ServeReplica:tokenflow:replica"
BEGINNING = "you will be surprised to hear from me so soon, but the news cannot wait: " * 4


async def test_streams_survive_the_death_of_their_replica(server):
    client = openai.AsyncOpenAI(
        base_url=server.base_url, api_key="none", max_retries=0, timeout=120
    )
    started = asyncio.Semaphore(0)

    async def one(i: int) -> str:
        stream = await client.completions.create(
            model=server.model,
            prompt=f"Letter {i % 100 % 3}. My dear sister, " + BEGINNING,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "token_rate": 30, "cache_salt": f"failover-{i}"},
        )
        text, count, chunks = "", 0, 0
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
                chunks += 1
                if chunks == 2:
                    started.release()
            if chunk.usage:
                count = chunk.usage.completion_tokens
        assert count == TOKENS
        return text

    alone = [await one(i) for i in range(100, 103)]
    started = asyncio.Semaphore(0)
    failovers = server.metric("tokenflow_failovers_total")
    pids = ray_pids(REPLICA)
    assert len(pids) == 2
    streams = [asyncio.create_task(one(i)) for i in range(12)]
    for _ in range(12):
        await asyncio.wait_for(started.acquire(), 60)
    before = server.by_replica("tokenflow_prefix_host_hit_tokens_total")
    os.kill(pids[0], signal.SIGKILL)
    assert await asyncio.gather(*streams) == alone * 4
    await client.close()
    assert server.metric("tokenflow_failovers_total") > failovers
    # Nobody else has these salts: what was loaded is what the dead replica had written.
    after = server.by_replica("tokenflow_prefix_host_hit_tokens_total")
    assert any(hits > before.get(replica, 0) for replica, hits in after.items())
    server.wait_idle()
