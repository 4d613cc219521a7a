"""Replicas' clients on one store against a dictionary, through the interface the engine uses."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit

SLOTS = 40
KEYS = [bytes([i]) * 16 for i in range(30)]
clients = st.integers(0, 2)
chains = st.tuples(st.integers(0, 4), st.integers(1, 6))
picks = st.lists(st.integers(0, 999), max_size=8)


def chain(which):
    """Keys of a sequence; several sequences share none, a longer one begins like a shorter."""
    first, length = which
    return KEYS[6 * first : 6 * first + length]


class ClientMachine(RuleBasedStateMachine):
    @initialize(fraction=st.sampled_from([0.4, 1.0]), high=st.sampled_from([None, 2, 12]))
    def start(self, fraction, high):
        self.store = NodeStore.in_memory(SLOTS, max_owner_fraction=fraction)
        self.high = high
        self.names = 0
        self.ticks = 0
        self.clients = [self.new() for _ in range(3)]
        self.held = [Counter() for _ in range(3)]
        """(slot, content) -> holds, by client; what is private has itself as content."""
        self.data = {}

    def new(self):
        self.names += 1
        control = LocalStoreControl(self.store, str(self.names))
        return HostSlots(
            control,
            self.store.tables,
            control.info.owner_quota,
            background=False,
            low_water=0,
            high_water=self.high,
            clock_ns=self.tick,
        )

    def tick(self):
        self.ticks += 1
        return self.ticks

    def distinct(self, i):
        return len({slot for slot, _ in self.held[i]})

    @rule(i=clients, n=st.integers(0, 12))
    def acquire(self, i, n):
        client = self.clients[i]
        slots = client.acquire(n)
        if slots is None:
            others = sum(c.stats().leased for c in self.clients) - client.stats().leased
            pinned = {s for held in self.held for s, what in held if isinstance(what, bytes)}
            private = client.stats().leased - client.stats().free
            room = SLOTS - others - len(pinned) - private
            assert n > min(room, client.capacity - self.distinct(i))
            return
        assert slots == sorted(set(slots)) and len(slots) == n
        for slot in slots:
            assert all(slot != other for held in self.held for other, _ in held)
            self.data[slot] = (i, slot)
            self.held[i][slot, self.data[slot]] += 1

    @rule(i=clients, which=chains)
    def write(self, i, which):
        """What an engine does: read what is there, compute the rest, share it."""
        client, keys = self.clients[i], chain(which)
        found = self.match(i, keys)
        slots = client.acquire(len(keys) - len(found))
        if slots is None:
            return
        blocks = []
        for position, slot in enumerate(slots, start=len(found)):
            self.data[slot] = keys[position]
            self.held[i][slot, keys[position]] += 1
            blocks.append(Commit(slot, keys[position], "r", position, keys[position][0]))
        client.commit(blocks)
        if blocks:
            with pytest.raises(KVStoreError):
                client.commit(blocks[:1])

    def match(self, i, keys):
        client = self.clients[i]
        before = self.distinct(i)
        slots = client.match(keys)
        for slot, key in zip(slots, keys, strict=False):
            assert self.data[slot] == key
            self.held[i][slot, key] += 1
        assert client.checksums(slots) == [key[0] for key in keys[: len(slots)]]
        assert self.distinct(i) <= max(before, client.capacity)
        return slots

    @rule(i=clients, which=chains)
    def read(self, i, which):
        self.match(i, chain(which))

    @rule(i=clients, chosen=picks)
    def release(self, i, chosen):
        everything = sorted(self.held[i].elements(), key=str)
        gone = [everything.pop(pick % len(everything)) for pick in chosen if everything]
        self.clients[i].release([slot for slot, _ in gone])
        self.held[i] -= Counter(gone)

    @rule(i=clients)
    def release_too_much(self, i):
        for slot, _ in self.held[i]:
            times = sum(n for (other, _), n in self.held[i].items() if other == slot)
            with pytest.raises(KVStoreError):
                self.clients[i].release([slot] * (times + 1))

    @rule(i=clients, chosen=picks)
    def corrupt(self, i, chosen):
        shared = sorted(slot for slot, what in self.held[i] if isinstance(what, bytes))
        slots = [shared[pick % len(shared)] for pick in chosen if shared]
        self.clients[i].report_corrupt(slots)
        for slot in slots:
            assert slot not in [found[0] for found in [self.match(i, [self.data[slot]])] if found]

    @rule(i=clients)
    def close(self, i):
        client = self.clients[i]
        client.close()
        client.close()
        assert client.acquire(1) is None
        assert client.match(KEYS) == []
        client.release([s for s, _ in self.held[i]])
        self.clients[i] = self.new()
        self.held[i] = Counter()

    @rule()
    def restart(self):
        config = StoreConfig(total_bytes=SLOTS, slot_bytes=1, grace_s=0.0)
        quota = self.store.info().owner_quota
        store = NodeStore(self.store.tables, config, epoch=self.store.epoch)
        store._slots.quota = quota
        self.store = store
        for client in self.clients:
            client._control._store = store

    @rule()
    def drop_cache(self):
        self.store.drop_cache()

    @precondition(lambda self: hasattr(self, "data"))
    @invariant()
    def counts_agree(self):
        info = self.store.info()
        assert info.free + info.leased + info.cached + info.pinned == SLOTS
        assert info.leased == sum(client.stats().leased for client in self.clients)
        for i, client in enumerate(self.clients):
            stats = client.stats()
            assert stats.held == self.distinct(i)
            assert stats.free == client.available()
            assert stats.free + stats.held <= client.capacity
        for held in self.held:
            for slot, what in held:
                assert self.data[slot] == what

    def teardown(self):
        if not hasattr(self, "data"):
            return
        for client in self.clients:
            client.close()
        self.store.drop_cache()
        assert self.store.info().free == SLOTS
        assert not self.store.tables.pins.any()


TestClients = ClientMachine.TestCase
TestClients.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
