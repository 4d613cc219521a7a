"""Two nodes: each has its own store, KV follows a stream from one to the other, streams leave a
replica that is out of capacity, and a node that is lost costs no stream."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import openai
import pytest
import ray

from tests.support.two_nodes import TwoNodes, two_nodes

pytestmark = pytest.mark.cluster

BEGINNING = "you will be surprised to hear from me so soon, but the news cannot wait: " * 6


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes(engine__kv_tokens=16 * 256, engine__max_num_seqs=32) as server:
        yield server


class Reader:
    """Streams of a few letters, each under a salt of its own: no other stream spares it a token."""

    def __init__(self, server: TwoNodes, tokens: int, rate: float) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=server.base_url, api_key="none", max_retries=0, timeout=240
        )
        self._model, self._tokens, self._rate = server.model, tokens, rate
        self._started = asyncio.Semaphore(0)
        self._salts = 0

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def read(self, letter: int) -> str:
        self._salts += 1
        stream = await self._client.completions.create(
            model=self._model,
            prompt=f"Letter {letter}. My dear sister, " + BEGINNING,
            max_tokens=self._tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "ignore_eos": True,
                "token_rate": self._rate,
                "cache_salt": f"{id(self)}-{self._salts}",
            },
        )
        text, count, chunks = "", 0, 0
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
                chunks += 1
                if chunks == 2:
                    self._started.release()
            if chunk.usage:
                count = chunk.usage.completion_tokens
        assert count == self._tokens
        return text

    async def under_way(self, streams: int, wait_for: int) -> list[asyncio.Task[str]]:
        """So many streams, of which `wait_for` have begun; there are three letters."""
        self._started = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(self.read(i % 3)) for i in range(streams)]
        for _ in range(wait_for):
            await asyncio.wait_for(self._started.acquire(), 100)
        return tasks


def replicas(server: TwoNodes) -> dict[str, int]:
    """Process of each live replica, by node."""
    found = {}
    for actor in ray._private.state.actors().values():
        is_replica = actor["ActorClassName"].startswith("ServeReplica:tokenflow:replica")
        if is_replica and actor["State"] == "ALIVE":
            found[actor["Address"]["NodeID"]] = actor["Pid"]
    return found


def until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def test_each_node_has_a_store_and_its_replica_uses_it(nodes):
    assert sorted(nodes.actors("KVStoreActor")) == sorted(nodes.node_ids) == sorted(replicas(nodes))
    async with Reader(nodes, 100, 30) as reader:
        await asyncio.gather(*await reader.under_way(6, 6))
        for node in nodes.node_ids:
            assert nodes.metric("tokenflow_store_slots", node=node, state="cached") > 0


async def test_kv_follows_a_stream_to_another_node(nodes):
    async with Reader(nodes, 200, 30) as reader:
        alone = [await reader.read(i) for i in range(3)]
        fetched = nodes.metric("tokenflow_kv_fetched_blocks_total")
        hits = nodes.by_replica("tokenflow_prefix_host_hit_tokens_total")
        running = await reader.under_way(6, 6)
        victim, survivor = replicas(nodes).items()
        os.kill(victim[1], signal.SIGKILL)
        assert await asyncio.gather(*running) == alone * 2
        assert nodes.metric("tokenflow_failovers_total") > 0
        assert nodes.metric("tokenflow_kv_fetched_blocks_total") > fetched
        # What the survivor loaded was written on the other node: nobody else has these salts.
        after = nodes.by_replica("tokenflow_prefix_host_hit_tokens_total")
        assert any(after[name] > hits[name] for name in after if name in hits)
        assert nodes.metric("tokenflow_corrupt_blocks_total") == 0
        until(lambda: len(replicas(nodes)) == 2)
        assert survivor[0] in replicas(nodes)
        nodes.wait_idle()


async def test_streams_leave_a_replica_that_is_out_of_capacity(nodes):
    async with Reader(nodes, 400, 80) as reader:
        alone = [await reader.read(i) for i in range(3)]
        # One replica is away for some seconds and comes back idle, while the other has all streams.
        os.kill(next(iter(replicas(nodes).values())), signal.SIGKILL)
        running = await reader.under_way(36, 4)
        assert await asyncio.gather(*running) == alone * 12
        assert nodes.metric("tokenflow_moves_total") > 0
        until(lambda: len(replicas(nodes)) == 2)
        assert all(n > 0 for n in nodes.by_replica("tokenflow_generated_tokens_total").values())
        nodes.wait_idle()


async def test_a_lost_node_costs_no_stream(nodes):
    async with Reader(nodes, 200, 30) as reader:
        alone = [await reader.read(i) for i in range(3)]
        front = set(nodes.actors("ServeReplica:tokenflow:ingress"))
        assert front, "the ingress must outlive the node that is lost"
        lost = next(node for node in nodes.node_ids if node not in front)
        until(lambda: len(nodes.by_replica("tokenflow_running_requests")) == 2)
        running = await reader.under_way(8, 6)
        placed = nodes.by_replica("tokenflow_running_requests")
        assert all(placed.values()), placed
        failovers = nodes.metric("tokenflow_failovers_total")
        nodes.kill_node(lost)
        assert await asyncio.gather(*running) == (alone * 3)[:8]
        assert nodes.metric("tokenflow_failovers_total") > failovers
        nodes.wait_idle()
