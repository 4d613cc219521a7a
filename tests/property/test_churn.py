"""A day of requests in minutes: the real engine, block pool and store, two replicas on one node.

The model is the fake one whose text shows every misplaced block; so every one of the streams is
checked, not only the books. TOKENFLOW_CHURN_LIFETIMES sets how many there are.
"""

from __future__ import annotations

import gc
import os
import random
import sys

from tests.support.chaos import Chaos
from tests.support.engines import make_request, tokens_of
from tests.support.fake_executor import FakeExecutor, FakeTokenizer, expected_output
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine

LIFETIMES = int(os.environ.get("TOKENFLOW_CHURN_LIFETIMES", "10000"))
BLOCKS = 100
SLOTS = 400
BLOCK = 4
MAX_NUM_SEQS = 48
IN_FLIGHT = 96
"""Per replica; more than its memory holds."""
PROMPTS = [[(7 * i + j) % 250 + 1 for j in range(5 + 3 * (i % 5))] for i in range(40)]
TEXTS = [expected_output(prompt, 12) for prompt in PROMPTS]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Replica:
    """An engine that is always given a little more than it can hold."""

    def __init__(self, name: str, store: NodeStore, memory: FakeExecutor | None, clock: Clock):
        self.host = HostSlots(
            LocalStoreControl(store, name), store.tables, store.info().owner_quota, background=False
        )
        self.executor = FakeExecutor(BLOCKS, BLOCK, SLOTS, delay=1)
        if memory is not None:
            self.executor.host = memory.host
        self.engine = Engine(
            self.executor,
            Chaos(name),
            self.host,
            EngineConfig(
                block_size=BLOCK,
                max_num_seqs=MAX_NUM_SEQS,
                max_batch_tokens=256,
                verify_loads="full",
            ),
            tokenizer=FakeTokenizer(),
            eos_ids=(0,),
            max_model_len=64,
            clock=clock,
        )
        self.expected: dict[str, list[int]] = {}
        self.events: dict[str, list] = {}
        self.cancelled: set[str] = set()
        self.ended = 0

    def feed(self, name: str, rng: random.Random, now: float) -> None:
        i = rng.randrange(len(PROMPTS))
        tokens = rng.randint(1, 12)
        self.engine.add(
            make_request(
                name,
                PROMPTS[i],
                tokens,
                rate=rng.choice([0.5, 1.0, 4.0, 80.0, float("inf")]),
                arrival_s=now,
                salt=rng.choice([None, None, "a"]),
            )
        )
        self.expected[name] = TEXTS[i][:tokens]
        self.events[name] = []
        if rng.random() < 0.02:
            self.cancelled.add(name)

    def step(self) -> None:
        if not self.engine.step():
            self.engine.wait_for_transfers(0)
        self.executor.steps.clear()
        for event in self.engine.take_events():
            stream = self.events[event.request_id]
            stream.append(event)
            if event.finish_reason is not None:
                self._check(event.request_id)
            elif event.request_id in self.cancelled and len(stream) == 2:
                self.engine.cancel(event.request_id)

    def _check(self, name: str) -> None:
        events, expected = self.events.pop(name), self.expected.pop(name)
        self.cancelled.discard(name)
        self.ended += 1
        if events[-1].finish_reason == "cancelled":
            assert [e.token_id for e in events[:-1]] == expected[: len(events) - 1]
        else:
            assert tokens_of(events) == expected


def test_many_lifetimes_leak_nothing_and_mix_nothing_up():
    clock, rng = Clock(), random.Random(1)
    store = NodeStore.in_memory(SLOTS, max_owner_fraction=0.75)
    replicas = [Replica("a", store, None, clock)]
    replicas.append(Replica("b", store, replicas[0].executor, clock))
    born = 0
    sizes = []
    while any(r.engine.has_work for r in replicas) or born < LIFETIMES:
        for replica in replicas:
            while born < LIFETIMES and len(replica.events) < IN_FLIGHT:
                replica.feed(f"{born}", rng, clock.now)
                born += 1
                if born % (LIFETIMES // 8) == 0:
                    gc.collect()
                    sizes.append(sys.getallocatedblocks())
            replica.step()
        clock.now += 0.02
    assert sum(r.ended for r in replicas) == LIFETIMES
    stats = [r.engine.stats for r in replicas]
    for counted in stats:
        assert counted.preempted_offload > LIFETIMES / 20
        assert counted.resumes > LIFETIMES / 20
        assert counted.prefix_device_hit_tokens > 0
        assert counted.prefix_host_hit_tokens > 0
        assert counted.corrupt_blocks == counted.transfer_errors == 0
    # Nothing grows: not what is kept per request, nor per block.
    assert sizes[-1] < sizes[1] * 1.02, sizes
    for replica in replicas:
        pool = replica.engine.kv.pool
        pool.check()
        assert pool.free_blocks == pool.num_blocks
        assert replica.host.stats().held == 0
        assert not replica.engine.kv._hoping
    info = store.info()
    assert info.pinned == info.corrupt == 0
    assert info.evictions > LIFETIMES / 10, "the store was never full"
    for replica in replicas:
        replica.host.close()
    store.drop_cache()
    assert store.info().free == SLOTS
