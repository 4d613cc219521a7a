"""The node store: leases of living and dead owners, and stores that come after a crash."""

import os
import subprocess
import sys

import pytest

from tokenflow.kvstore.actor import KVStoreActor
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.errors import KVStoreError

SLOT = 64


@pytest.fixture
def config(tmp_path):
    return StoreConfig(total_bytes=100 * SLOT + 1, slot_bytes=SLOT, directory=str(tmp_path))


@pytest.fixture
def store(config):
    store = NodeStore("node", config)
    yield store
    store.close()


@pytest.fixture
def other_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def test_slots_are_counted_from_bytes_and_quota_from_the_fraction(store):
    info = store.info()
    assert info.num_slots == info.free == 100
    assert info.owner_quota == 75
    assert info.slot_bytes == SLOT
    assert Segment.attach(info.path).header.epoch == info.epoch == store.epoch


def test_lease_and_release(store):
    assert store.register("a", os.getpid()).free == 100
    slots = store.lease("a", 30)
    info = store.info()
    assert info.free == 70
    assert info.owners["a"].leased == 30
    assert info.owners["a"].pid == os.getpid()
    store.release("a", slots)
    assert store.info().free == 100
    with pytest.raises(KVStoreError, match="does not hold"):
        store.release("a", slots)


def test_strangers_get_nothing(store):
    for call in (
        lambda: store.lease("x", 1),
        lambda: store.release("x", []),
        lambda: store.renew("x"),
    ):
        with pytest.raises(KVStoreError, match="not registered"):
            call()


def test_silence_is_told_but_frees_nothing(config):
    now = 0.0
    store = NodeStore("node", config, clock=lambda: now)
    store.register("a", os.getpid())
    store.lease("a", 5)
    now = 1000.0
    assert store.reap_dead_owners() == 0
    assert store.info().owners["a"].silent_s == 1000.0
    store.renew("a")
    assert store.info().owners["a"].silent_s == 0.0
    store.close()


def test_only_the_dead_are_reaped(store, other_process):
    store.register("me", os.getpid())
    store.register("other", other_process.pid)
    mine = store.lease("me", 10)
    store.lease("other", 20)
    assert store.reap_dead_owners() == 0
    other_process.kill()
    other_process.wait()
    assert store.reap_dead_owners() == 20
    assert store.reap_dead_owners() == 0
    assert list(store.info().owners) == ["me"]
    assert store.info().free == 90
    store.release("me", mine)


def test_a_name_belongs_to_one_living_process(store, other_process):
    store.register("a", other_process.pid)
    store.register("a", other_process.pid)
    store.lease("a", 7)
    with pytest.raises(KVStoreError, match="already registered"):
        store.register("a", os.getpid())
    other_process.kill()
    other_process.wait()
    assert store.register("a", os.getpid()).free == 100
    with pytest.raises(KVStoreError, match="no process"):
        store.register("b", other_process.pid)


def test_a_closed_store_gives_nothing_and_leaves_no_file(store, config):
    store.register("a", os.getpid())
    mapped = Segment.attach(store.info().path)
    store.close()
    store.close()
    assert os.listdir(config.directory) == []
    mapped.tensor()[0] = 1
    for call in (lambda: store.lease("a", 1), lambda: store.register("b", os.getpid())):
        with pytest.raises(KVStoreError, match="closed"):
            call()


def test_a_store_removes_the_file_of_one_that_crashed(config):
    crashed = NodeStore("node", config)
    crashed._segment.close()  # what a SIGKILL does: unmapped, not unlinked
    store = NodeStore("node", config)
    assert os.listdir(config.directory) == [os.path.basename(store.info().path)]
    store.close()


def test_beside_a_mapped_segment_of_a_crashed_store_a_new_one_needs_twice_the_room(config):
    crashed = NodeStore("node", config)
    replica = Segment.attach(crashed.info().path)
    crashed._segment.close()
    size = config.total_bytes
    with pytest.raises(KVStoreError, match="restart the replicas that still hold"):
        NodeStore("node", config, available_bytes=lambda: 2 * size - 1)
    store = NodeStore("node", config, available_bytes=lambda: 2 * size)
    assert store.info().path != replica.path
    assert len(os.listdir(config.directory)) == 2
    store.close()
    replica.close()
    NodeStore("node", config, available_bytes=lambda: size).close()
    assert os.listdir(config.directory) == []


def test_more_than_the_machine_has_is_refused_before_it_is_allocated(config):
    with pytest.raises(KVStoreError, match="--host-kv-gib"):
        NodeStore("node", config, available_bytes=lambda: config.total_bytes - 1)
    assert os.listdir(config.directory) == []


def test_the_actor_allocates_for_its_first_replica(config):
    actor = KVStoreActor("node", config)
    assert actor.info() is None
    assert os.listdir(config.directory) == []
    info = actor.register("a", os.getpid())
    slots = actor.lease("a", info.epoch, 4)
    actor.renew("a", info.epoch)
    actor.release("a", info.epoch, slots)
    assert actor.info().free == 100
    actor.close()
    assert os.listdir(config.directory) == []
    with pytest.raises(KVStoreError, match="closed"):
        actor.register("b", os.getpid())


def test_a_restarted_actor_refuses_the_leases_of_its_former_life(config):
    before = KVStoreActor("node", config)
    old = before.register("a", os.getpid())
    slots = before.lease("a", old.epoch, 4)
    mapped = Segment.attach(old.path)
    before._stopping.set()
    before._store._segment.close()

    after = KVStoreActor("node", config)
    for _ in range(2):  # before and after somebody new made it allocate again
        with pytest.raises(KVStoreError, match="restarted"):
            after.lease("a", old.epoch, 1)
        with pytest.raises(KVStoreError, match="restarted"):
            after.release("a", old.epoch, slots)
        new = after.register("b", os.getpid())
    assert new.path != old.path
    assert new.free == 100
    mapped.tensor()[slots[0]] = 1
    assert not Segment.attach(new.path).tensor().any()
    after.close()


def test_the_actor_reaps_in_the_background(config, other_process, monkeypatch):
    import threading
    from dataclasses import replace

    reaped = threading.Event()
    reap = NodeStore.reap_dead_owners

    def told(self):
        freed = reap(self)
        if freed:
            reaped.set()
        return freed

    monkeypatch.setattr(NodeStore, "reap_dead_owners", told)
    actor = KVStoreActor("node", replace(config, reap_interval_s=0.001))
    info = actor.register("a", other_process.pid)
    actor.lease("a", info.epoch, 9)
    other_process.kill()
    other_process.wait()
    assert reaped.wait(30)
    assert actor.info().free == 100
    actor.close()
