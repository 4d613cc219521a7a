"""A request's KV is fetched from another node when that is faster, and never waited for longer."""

import asyncio
import time

import pytest

from tokenflow.cluster import kv_fetch
from tokenflow.cluster.kv_fetch import KVFetcher
from tokenflow.kvstore.block_fetch import Fetched
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.scheduler.cost import CostModel, LinkCost
from tokenflow.replicas.scheduler.restore import fetch_prefix

KEYS = [bytes([i]) * 16 for i in range(100)]
BLOCK = 16


def cost(prefill_s=0.0, load_s=0.0):
    """A model that has seen that many seconds per token and per block."""
    model = CostModel()
    if prefill_s:
        model.observe_step(0, 0, 1000, prefill_s * 1000)
    if load_s:
        model.observe_load(1, load_s)
    return model


class Host:
    """Has the first blocks of KEYS; counts holds."""

    def __init__(self, blocks=0):
        self.blocks = blocks
        self.held = 0

    def match(self, keys):
        found = list(range(min(self.blocks, len(keys))))
        self.held += len(found)
        return found

    def release(self, slots):
        self.held -= len(slots)


class Store:
    def __init__(self, *results):
        self.results = list(results)
        self.calls = []

    async def fetch(self, keys, source, timeout_s):
        self.calls.append((keys, source, timeout_s))
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def fetcher(store, model=None, host=None, others=0):
    return KVFetcher(
        store, host or Host(), model or cost(), block_size=BLOCK, others=lambda: others
    )


def test_the_faster_way_is_taken():
    link = LinkCost()
    model = cost(prefill_s=1e-3, load_s=1e-3)
    assert fetch_prefix(model, link, 10, 160, others=0), "optimistic while the link is unknown"
    link.observe(10, 0.01, 0.06)
    assert link.fetch_s(100) == pytest.approx(0.05 + 0.1)
    assert fetch_prefix(model, link, 10, 160, others=0)
    assert not fetch_prefix(model, link, 2, 32, others=0), "the call alone takes longer"
    assert fetch_prefix(model, link, 2, 32, others=3), "a prefill keeps the others waiting"
    assert fetch_prefix(cost(), link, 2, 32, others=0), "the cost of computing is unknown"


async def test_what_comes_is_counted_and_the_link_is_learned():
    store = Store(Fetched(40, 0.4), Fetched(100, 1.0))
    host = Host(blocks=60)
    one = fetcher(store, cost(prefill_s=1e-2), host)
    assert await one.bring(KEYS, "b") == 40
    keys, source, timeout_s = store.calls[0]
    assert keys == KEYS and source == "b"
    assert timeout_s == kv_fetch.MOST_WAITED_S
    assert host.held == 0
    assert (one.stats.fetches, one.stats.fetched_blocks, one.stats.fetch_failures) == (1, 40, 0)
    # 10 ms a block are slower than a prefill of 0.1 ms a token.
    one._cost = cost(prefill_s=1e-4)
    assert await one.bring(KEYS, "b") == 0
    assert one.stats.recomputed_instead == 1 and len(store.calls) == 1
    assert await one.bring(KEYS, "c") == 100, "another link is unknown"


async def test_nothing_is_asked_for_when_all_is_here():
    store = Store()
    assert await fetcher(store, host=Host(100)).bring(KEYS, "b") == 0
    assert await fetcher(store).bring([], "b") == 0
    assert store.calls == []


async def test_it_is_not_waited_longer_than_computing_takes():
    store = Store(Fetched(100, 0.1), Fetched(100, 0.1))
    await fetcher(store, cost(prefill_s=1e-3)).bring(KEYS, "b")
    await fetcher(store, cost(prefill_s=1e-6)).bring(KEYS, "b")
    assert store.calls[0][2] == pytest.approx(1e-3 * 100 * BLOCK)
    assert store.calls[1][2] == kv_fetch.LEAST_WAITED_S


@pytest.mark.parametrize("error", [KVStoreError("gone"), TimeoutError(), Fetched(0, 0.0, "cut")])
async def test_a_node_that_gives_nothing_is_left_alone_for_a_while(error, monkeypatch):
    store = Store(error, Fetched(100, 0.1), Fetched(100, 0.1))
    one = fetcher(store)
    assert await one.bring(KEYS, "b") == 0
    assert await one.bring(KEYS, "b") == 0
    assert len(store.calls) == 1
    assert await one.bring(KEYS, "c") == 100
    assert one.stats.fetch_failures == 1
    later = time.monotonic() + 60
    monkeypatch.setattr(kv_fetch.time, "monotonic", lambda: later)
    assert await one.bring(KEYS, "b") == 100


async def test_a_part_is_better_than_nothing():
    store = Store(Fetched(30, 0.1, "cut off"), Fetched(70, 0.1))
    one = fetcher(store)
    assert await one.bring(KEYS, "b") == 30
    assert await one.bring(KEYS, "b") == 70, "a node that gave something is asked again"
    assert one.stats.fetch_failures == 1


async def test_a_cancelled_wait_ends():
    class Slow(Store):
        async def fetch(self, keys, source, timeout_s):
            await asyncio.Event().wait()

    task = asyncio.create_task(fetcher(Slow()).bring(KEYS, "b"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
