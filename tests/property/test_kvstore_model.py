"""The node store against a dictionary: whatever replicas do and however anybody ends.

Replicas are simulated by what they may do to the tables (`Holds`) and to the store; their leases
are known to the test, also the ones they never heard of.
"""

import struct
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tokenflow.kvstore.holds import Holds
from tokenflow.kvstore.index import IndexReader
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.tables import SlotState, Tables
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit

SLOTS = 16
KEYS = [bytes([i]) * 16 for i in range(10)]
NAMES = ("a", "b", "c")
names = st.sampled_from(NAMES)
picks = st.lists(st.integers(0, 99), max_size=6)


class Replica:
    """What one replica knows."""

    def __init__(self, tables, pid, row):
        self.pid = pid
        self.row = row
        self.holds = Holds(tables, row)
        self.free = []
        self.private = set()
        self.unheard = set()
        """Leased to it, but the answer was lost."""
        self.held = Counter()
        """Committed slot -> holds."""


class StoreMachine(RuleBasedStateMachine):
    """`started` is the process table (pid -> start time)."""

    @initialize(fraction=st.sampled_from([0.3, 0.5, 1.0]))
    def start(self, fraction):
        self.started = {}
        self.patch = patch("tokenflow.kvstore.process.start_ticks", self.started.get)
        self.patch.start()
        self.config = StoreConfig(
            total_bytes=SLOTS, slot_bytes=1, max_owner_fraction=fraction, max_owners=3, grace_s=0.0
        )
        self.tables = Tables.in_memory(SLOTS, 3)
        self.store = NodeStore(self.tables, self.config, epoch=1)
        self.quota = max(1, int(SLOTS * fraction))
        self.replicas = {}
        self.pids = 0
        self.content = {}
        """Committed slot -> key, as far as anybody may still hold it; evictions are not told."""
        for i, name in enumerate(NAMES):
            self.register(name)
            self.write(name, n=3, keys=[0, i, i + 1])

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.started.clear()
        self.store.reap_dead_owners()
        self.store.drop_cache()
        info = self.store.info()
        assert (info.free, info.owners) == (SLOTS, {})
        assert not self.tables.pins.any()
        assert (self.tables.cells <= 0).all()
        self.patch.stop()

    def living(self, name):
        replica = self.replicas.get(name)
        return replica if replica and replica.pid in self.started else None

    # -- processes --------------------------------------------------------------------------------

    @rule(name=names)
    def register(self, name):
        """A process begins; the name may be that of a dead one."""
        if self.living(name):
            self.pids += 1
            self.started[self.pids] = 1
            with pytest.raises(KVStoreError, match="already registered"):
                self.store.register(name, self.pids)
            del self.started[self.pids]
            return
        self.pids += 1
        self.started[self.pids] = 1
        info = self.store.register(name, self.pids)
        self.replicas[name] = Replica(self.tables, self.pids, info.owners[name].index)

    @rule(name=names)
    def kill(self, name):
        """Nothing is freed yet: only a reaper may do that."""
        if replica := self.living(name):
            del self.started[replica.pid]

    @rule()
    def reap(self):
        dead = [name for name in self.replicas if not self.living(name)]
        freed = self.store.reap_dead_owners()
        assert freed == sum(
            len(r.free) + len(r.private) + len(r.unheard)
            for r in (self.replicas.pop(name) for name in dead)
        )

    @rule(name=names)
    def unregister(self, name):
        if self.living(name):
            self.store.unregister(name)
            del self.replicas[name]

    @rule(cut=picks)
    def restart_store(self, cut):
        """Killed, perhaps in the middle of an eviction; the dead are reaped by the next one."""
        state = self.tables.state
        unheld = np.flatnonzero((state == SlotState.COMMITTED) & ~self.tables.pinned())
        for i in cut:
            if len(unheld):
                state[unheld[i % len(unheld)]] = SlotState.EVICTING
        incarnation = self.tables.incarnation
        self.store = NodeStore(self.tables, self.config, epoch=1)
        assert self.tables.incarnation == incarnation + 1
        assert not (state == SlotState.EVICTING).any()
        for name in [name for name in self.replicas if not self.living(name)]:
            del self.replicas[name]

    # -- leases -----------------------------------------------------------------------------------

    @rule(name=names, n=st.integers(0, SLOTS + 1), answered=st.booleans())
    def lease(self, name, n, answered):
        replica = self.living(name)
        if replica is None:
            return
        usage = len(replica.free) + len(replica.private) + len(replica.unheard) + len(replica.held)
        held = {slot for other in self.replicas.values() for slot in other.held}
        leased = {
            slot
            for other in self.replicas.values()
            for slot in (*other.free, *other.private, *other.unheard)
        }
        slots = self.store.lease(name, n)
        assert slots == sorted(set(slots))
        assert not set(slots) & (held | leased)
        # What nobody holds can be had, all of it, within the quota.
        assert len(slots) == max(0, min(n, self.quota - usage, SLOTS - len(held | leased)))
        for slot in slots:
            self.content.pop(slot, None)
        if answered:
            replica.free += slots
        else:
            replica.unheard.update(slots)

    @rule(name=names)
    def reattach(self, name):
        if replica := self.living(name):
            freed = self.store.reattach(name, [*replica.free, *replica.private])
            assert freed == len(replica.unheard)
            replica.unheard.clear()

    @rule(name=names, part=st.floats(0, 1), thief=names)
    def give_back(self, name, part, thief):
        replica = self.living(name)
        if replica is None:
            return
        slots = replica.free[: round(len(replica.free) * part)]
        if slots and thief != name and self.living(thief):
            with pytest.raises(KVStoreError):
                self.store.release(thief, slots)
        self.store.release(name, slots)
        del replica.free[: len(slots)]
        for wrong in [*slots[:1], *list(replica.held)[:1]]:
            with pytest.raises(KVStoreError):
                self.store.release(name, [wrong])

    # -- slots ------------------------------------------------------------------------------------

    @rule(name=names, n=st.integers(1, 6))
    def acquire(self, name, n):
        if replica := self.living(name):
            slots = [replica.free.pop() for _ in range(min(n, len(replica.free)))]
            replica.holds.take(slots)
            replica.private.update(slots)

    @rule(name=names, keys=picks)
    def commit(self, name, keys):
        replica = self.living(name)
        if replica is None:
            return
        blocks = [
            Commit(slot, KEYS[i % len(KEYS)], name, i, i)
            for slot, i in zip(sorted(replica.private), keys, strict=False)
        ]
        replica.holds.commit(blocks, now=self.now())
        for block in blocks:
            replica.private.remove(block.slot)
            replica.held[block.slot] = 1
            self.content[block.slot] = block.key

    @rule(name=names, n=st.integers(1, 6), keys=picks)
    def write(self, name, n, keys):
        """What a replica does most of all."""
        if not self.living(name):
            return
        self.lease(name, n, answered=True)
        self.acquire(name, n)
        self.commit(name, keys)

    @rule(name=names, keys=picks)
    def match(self, name, keys):
        replica = self.living(name)
        if replica is None:
            return
        wanted = [KEYS[i % len(KEYS)] for i in keys]
        before = replica.holds.count
        slots = replica.holds.match(wanted, self.quota, now=self.now())
        assert replica.holds.count <= max(before, self.quota)
        for slot, key in zip(slots, wanted, strict=False):
            assert self.content[slot] == key
            assert not self.tables.corrupt[slot]
            replica.held[slot] += 1
        if len(slots) < len(wanted) and replica.holds.count < self.quota:
            # It missed: then the store does not know a good block of that key, or not yet.
            missed = wanted[len(slots)]
            self.store.poll()
            again = replica.holds.match([missed], self.quota, now=self.now())
            assert bool(again) == any(
                key == missed
                and self.tables.state[slot] == SlotState.COMMITTED
                and not self.tables.corrupt[slot]
                for slot, key in self.content.items()
            )
            replica.held.update(again)

    @rule(name=names, chosen=picks)
    def release(self, name, chosen):
        replica = self.living(name)
        if replica is None:
            return
        everything = sorted([*replica.held.elements(), *replica.private])
        slots = [everything.pop(i % len(everything)) for i in chosen if everything]
        private = replica.holds.release(slots, now=self.now())
        assert private == sorted(set(slots) & replica.private)
        replica.private -= set(private)
        replica.free += private
        replica.held -= Counter(slots)
        for wrong in (SLOTS, -1, next((s for s in replica.free), SLOTS)):
            with pytest.raises(KVStoreError):
                replica.holds.release([wrong], now=self.now())

    @rule(name=names, chosen=picks)
    def report_corrupt(self, name, chosen):
        replica = self.living(name)
        if replica and replica.held:
            held = sorted(replica.held)
            slots = [held[i % len(held)] for i in chosen]
            replica.holds.report_corrupt(slots)
            for slot in slots:
                found = replica.holds.match([self.content[slot]], self.quota, now=self.now())
                assert slot not in found
                replica.held.update(found)

    # -- the store --------------------------------------------------------------------------------

    @rule()
    def poll(self):
        """Then every good block is indexed, once, and only what somebody holds is there twice."""
        self.store.poll()
        tables = self.tables
        committed = np.flatnonzero(tables.state == SlotState.COMMITTED).tolist()
        pinned = tables.pinned()
        assert all(pinned[slot] for slot in committed if tables.corrupt[slot])
        good = [slot for slot in committed if not tables.corrupt[slot]]
        find = IndexReader(tables).find
        for key in KEYS:
            slots = [slot for slot in good if tables.keys[slot].tobytes() == key]
            found = find(*struct.unpack("<QQ", key))
            assert found in slots if slots else found == -1
            assert all(pinned[slot] for slot in slots if slot != found)

    @rule()
    def drop_cache(self):
        self.store.drop_cache()
        assert self.store.info().cached == 0

    def now(self):
        self.clock = getattr(self, "clock", 0) + 1
        return self.clock

    # -- what always holds ------------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def nothing_is_lost_or_doubled(self):
        tables, info = self.tables, self.store.info()
        assert info.free + info.leased + info.cached + info.pinned == SLOTS
        leased = Counter()
        pins = np.zeros((3, SLOTS), int)
        for name, replica in self.replicas.items():
            mine = [*replica.free, *replica.private, *replica.unheard]
            leased.update(mine)
            assert (tables.state[mine] == SlotState.LEASED).all()
            assert (tables.owner[mine] == replica.row).all()
            for slot, count in replica.held.items():
                assert tables.state[slot] == SlotState.COMMITTED
                assert tables.keys[slot].tobytes() == self.content[slot]
                pins[replica.row, slot] = count
            pins[replica.row, sorted(replica.private)] = 1
            assert info.owners[name].leased == len(mine)
            assert info.owners[name].pinned == len(replica.held)
            assert replica.holds.count == len(replica.held) + len(replica.private)
            assert replica.holds.private == len(replica.private)
        assert set(leased.values()) <= {1}
        assert info.leased == len(leased)
        assert (tables.pins == pins).all()
        assert info.pinned == len({slot for r in self.replicas.values() for slot in r.held})


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
