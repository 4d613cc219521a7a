"""Streams go on, whole and unchanged, while replicas hang, come, go and are replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import pytest

from tests.support.processes import ray_pids
from tests.support.sse import Reading, begin
from tokenflow.cluster.config import ClusterConfig

pytestmark = pytest.mark.cluster

REPLICA = "ray::ServeReplica:tokenflow:replica"
TOKENS = 600


def changed(config: ClusterConfig, **sections: dict) -> ClusterConfig:
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        tree[section] |= values
    return ClusterConfig.model_validate(tree)


@pytest.fixture
async def client(server):
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        yield client


class Load:
    """Streams without end: whenever one ends the next one begins."""

    def __init__(self, server, client: httpx.AsyncClient, name: str) -> None:
        self.server, self.client, self.name = server, client, name
        self.read: list[tuple[int, Reading]] = []
        self.stopping = False
        self.alone: list[str] = []

    async def one(self, kind: int, name: str) -> Reading:
        body = {
            "model": self.server.model,
            "prompt": f"Chapter {kind}. It was late, and the house was quiet when",
            "max_tokens": TOKENS,
            "temperature": 1.0,
            "seed": kind,
            "ignore_eos": True,
            "token_rate": 30,
            "stream_options": {"include_usage": True},
            "cache_salt": name,
        }
        reading = await begin(self.client, f"{self.name}-{name}", body)
        assert reading.error is None, reading.error
        assert reading.done and reading.usage["completion_tokens"] == TOKENS
        return reading

    async def __aenter__(self) -> Load:
        self.alone = [(await self.one(kind, f"alone-{kind}")).text for kind in range(3)]
        self.tasks = [asyncio.create_task(self._again(lane)) for lane in range(6)]
        await asyncio.sleep(1.5)
        return self

    async def _again(self, lane: int) -> None:
        turn = 0
        while not self.stopping:
            kind = (lane + turn) % 3
            self.read.append((kind, await self.one(kind, f"{lane}-{turn}")))
            turn += 1

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        await asyncio.gather(*self.tasks)
        for kind, reading in self.read:
            assert reading.text == self.alone[kind]

    @property
    def longest_pause_s(self) -> float:
        return max(
            later - earlier
            for _, reading in self.read
            for earlier, later in zip(reading.arrivals, reading.arrivals[1:], strict=False)
        )


async def test_the_streams_of_a_replica_that_hangs_move_and_it_is_avoided(server, client):
    moved = server.metric("tokenflow_failovers_total")
    async with Load(server, client, "hang") as load:
        pid = server.busiest()
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(server.config.ingress.replica_silence_s + 4)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert server.metric("tokenflow_failovers_total") > moved
    print(f"longest pause {load.longest_pause_s:.1f} s")
    await asyncio.to_thread(server.wait_idle)


async def test_replicas_go_and_come_under_load(server, client):
    before = server.config
    update = server.cluster.update
    try:
        await asyncio.to_thread(update, changed(before, replicas={"count": 4}))
        failovers = server.metric("tokenflow_failovers_total")
        async with Load(server, client, "scale") as load:
            for count in (1, 4):
                await asyncio.to_thread(update, changed(before, replicas={"count": count}))
                deadline = time.monotonic() + 60
                while len(ray_pids(REPLICA)) != count:
                    assert time.monotonic() < deadline, "no drain"
                    await asyncio.sleep(0.2)
        print(f"longest pause {load.longest_pause_s:.1f} s")
        assert server.metric("tokenflow_moves_total") > 0
        assert server.metric("tokenflow_failovers_total") == failovers, "a stream was cut off"
    finally:
        await asyncio.to_thread(update, before)


async def test_a_rolling_update_drops_no_stream_and_leaves_the_ingress(server, client):
    before = server.config
    ingress = ray_pids("ray::ServeReplica:tokenflow:ingress")
    old = set(ray_pids(REPLICA))
    try:
        async with Load(server, client, "roll") as load:
            await asyncio.to_thread(
                server.cluster.update, changed(before, engine={"max_num_seqs": 24})
            )
            deadline = time.monotonic() + 60
            while old & set(ray_pids(REPLICA)):
                assert time.monotonic() < deadline, "no update"
                await asyncio.sleep(0.2)
        print(f"longest pause {load.longest_pause_s:.1f} s")
        assert ray_pids("ray::ServeReplica:tokenflow:ingress") == ingress
        assert len(ray_pids(REPLICA)) == len(old)
    finally:
        await asyncio.to_thread(server.cluster.update, before)
