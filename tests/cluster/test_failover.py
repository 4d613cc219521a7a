"""A replica that dies costs no stream: not a token lost, doubled or changed."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest

from tests.support.processes import ray_pids
from tests.support.sse import Started

pytestmark = pytest.mark.cluster

TOKENS = 600
REPLICA = "ray::ServeReplica:tokenflow:replica"
BEGINNING = "you will be surprised to hear from me so soon, but the news cannot wait: " * 4


async def test_streams_survive_the_death_of_their_replica(server):
    limits = httpx.Limits(max_connections=100)
    client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)
    clients = Started(client, server.model)

    async def one(i: int) -> str:
        reading = await clients.read(
            prompt=f"Letter {i % 100 % 3}. My dear sister, " + BEGINNING,
            max_tokens=TOKENS,
            token_rate=30,
            cache_salt=f"failover-{i}",
        )
        return reading.text

    alone = [await one(i) for i in range(100, 103)]
    await clients.wait(3)
    failovers = server.metric("tokenflow_failovers_total")
    assert len(ray_pids(REPLICA)) == 2
    streams = [asyncio.create_task(one(i)) for i in range(12)]
    await clients.wait(12)
    before = server.by_replica("tokenflow_prefix_host_hit_tokens_total")
    os.kill(server.busiest(), signal.SIGKILL)
    assert await asyncio.gather(*streams) == alone * 4
    await client.aclose()
    assert server.metric("tokenflow_failovers_total") > failovers
    # Nobody else has these salts: what was loaded is what the dead replica had written.
    after = server.by_replica("tokenflow_prefix_host_hit_tokens_total")
    assert any(hits > before.get(replica, 0) for replica, hits in after.items())
    server.wait_idle()
