"""The node store against a dictionary: whatever owners do and however they end, slots are kept."""

import tempfile
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.replicas.errors import KVStoreError

SLOTS = 24
PIDS = range(1, 5)


class StoreMachine(RuleBasedStateMachine):
    """Processes are simulated: `self.started` is the process table (pid -> start time)."""

    leases = Bundle("leases")

    @initialize(fraction=st.sampled_from([0.3, 0.5, 1.0]))
    def start(self, fraction):
        self.tick = 0
        self.started = {}
        self.patch = patch("tokenflow.kvstore.process.start_ticks", self.started.get)
        self.directory = tempfile.TemporaryDirectory()
        self.store = NodeStore(
            "model",
            StoreConfig(
                total_bytes=SLOTS * 8,
                slot_bytes=8,
                max_owner_fraction=fraction,
                directory=self.directory.name,
            ),
        )
        self.patch.start()
        self.quota = max(1, int(SLOTS * fraction))
        self.held = {}
        self.process = {}  # owner -> (pid, start time) as registered

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.started.clear()
        self.store.reap_dead_owners()
        info = self.store.info()
        assert info.free == SLOTS
        assert info.owners == {}
        self.patch.stop()
        self.store.close()
        self.directory.cleanup()

    def alive(self, owner):
        pid, started = self.process[owner]
        return self.started.get(pid) == started

    @rule(pid=st.sampled_from(PIDS))
    def spawn(self, pid):
        """A process begins; its pid may be that of a dead owner."""
        if pid not in self.started:
            self.tick += 1
            self.started[pid] = self.tick

    @rule(pid=st.sampled_from(PIDS))
    def kill(self, pid):
        """Nothing is freed yet: only `reap` and a takeover of the name may do that."""
        self.started.pop(pid, None)

    @rule(owner=st.sampled_from("abc"), pid=st.sampled_from(PIDS))
    def register(self, owner, pid):
        identity = (pid, self.started.get(pid))
        taken = owner in self.process and self.process[owner] != identity and self.alive(owner)
        if identity[1] is None or taken:
            with pytest.raises(KVStoreError):
                self.store.register(owner, pid)
            return
        self.store.register(owner, pid)
        if self.process.get(owner) != identity:
            self.held[owner] = set()
        self.process[owner] = identity

    @rule(target=leases, owner=st.sampled_from("abc"), n=st.integers(0, SLOTS + 2))
    def lease(self, owner, n):
        if owner not in self.process:
            with pytest.raises(KVStoreError):
                self.store.lease(owner, n)
            return owner, ()
        taken = sum(map(len, self.held.values()))
        slots = self.store.lease(owner, n)
        assert len(slots) == len(set(slots))
        assert len(slots) == min(n, SLOTS - taken, self.quota - len(self.held[owner]))
        for others in self.held.values():
            assert not others & set(slots)
        self.held[owner] |= set(slots)
        return owner, tuple(slots)

    def give_back(self, owner, slots):
        if owner in self.process and set(slots) <= self.held[owner]:
            self.store.release(owner, slots)
            self.held[owner] -= set(slots)
        else:
            with pytest.raises(KVStoreError):
                self.store.release(owner, slots)

    @rule(lease=consumes(leases), part=st.floats(0, 1))
    def release(self, lease, part):
        owner, slots = lease
        self.give_back(owner, slots[: round(len(slots) * part)])

    @rule(lease=leases, thief=st.sampled_from("abc"))
    def release_again_or_by_another(self, lease, thief):
        self.give_back(thief, lease[1])

    @rule()
    def reap(self):
        dead = [owner for owner in self.process if not self.alive(owner)]
        assert self.store.reap_dead_owners() == sum(len(self.held.pop(o)) for o in dead)
        for owner in dead:
            del self.process[owner]

    @invariant()
    def nothing_is_lost_or_doubled(self):
        if not hasattr(self, "store"):
            return
        info = self.store.info()
        assert {owner: o.leased for owner, o in info.owners.items()} == {
            owner: len(slots) for owner, slots in self.held.items()
        }
        assert info.free + sum(o.leased for o in info.owners.values()) == SLOTS


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
