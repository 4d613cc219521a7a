"""The node store: leases of living and dead owners, and stores that come after a crash."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from tokenflow.kvstore import process
from tokenflow.kvstore.actor import KVStoreActor
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.index import IndexReader
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.segment import Segment
from tokenflow.kvstore.tables import SlotState
from tokenflow.replicas.errors import KVStoreError

SLOT = 64


@pytest.fixture
def config(tmp_path):
    return StoreConfig(total_bytes=100 * SLOT + 1, slot_bytes=SLOT, directory=str(tmp_path))


@pytest.fixture
def store(config):
    store = NodeStore.open("node", config)
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
    with pytest.raises(KVStoreError, match="not leased to it"):
        store.release("a", slots)


def test_strangers_get_nothing(store):
    for call in (
        lambda: store.lease("x", 1),
        lambda: store.release("x", []),
        lambda: store.reattach("x", []),
        lambda: store.unregister("x"),
    ):
        with pytest.raises(KVStoreError, match="not registered"):
            call()


def test_silence_is_told_but_frees_nothing(config):
    now = 0.0
    store = NodeStore.open("node", config, clock=lambda: now)
    store.register("a", os.getpid())
    store.lease("a", 5)
    now = 1000.0
    assert store.reap_dead_owners() == 0
    assert store.info().owners["a"].silent_s == 1000.0
    store.release("a", [])
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


def test_an_owner_lives_as_long_as_any_of_its_processes(config, other_process):
    member = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = NodeStore.open("node", config)
    control = LocalStoreControl(before, "pair", other_process.pid)
    replica = Segment.attach(control.info.path)
    slots = HostSlots(control, replica.tables(), 50, background=False, low_water=0, high_water=0)
    slots.add_members([member.pid])
    control.lease(20)
    other_process.kill()
    other_process.wait()
    assert before.reap_dead_owners() == 0
    with pytest.raises(KVStoreError, match="already registered"):
        before.register("pair", os.getpid())
    crash(before)
    after = NodeStore.adopt("node", config)
    assert after.info().leased == 20
    member.kill()
    member.communicate()
    assert after.reap_dead_owners() == 20
    # The next one in this row has no members yet.
    after.register("pair", os.getpid())
    assert not replica.tables().member_pid.any()
    after.close()


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
    crashed = NodeStore.open("node", config)
    crash(crashed)
    store = NodeStore.open("node", config)
    assert os.listdir(config.directory) == [os.path.basename(store.info().path)]
    store.close()


def test_beside_a_mapped_segment_of_a_crashed_store_a_new_one_needs_twice_the_room(config):
    crashed = NodeStore.open("node", config)
    replica = Segment.attach(crashed.info().path)
    crash(crashed)
    size = config.total_bytes
    with pytest.raises(KVStoreError, match="restart the replicas that still hold"):
        NodeStore.open("node", config, available_bytes=lambda: 2 * size - 1)
    store = NodeStore.open("node", config, available_bytes=lambda: 2 * size)
    assert store.info().path != replica.path
    assert len(os.listdir(config.directory)) == 2
    store.close()
    replica.close()
    NodeStore.open("node", config, available_bytes=lambda: size).close()
    assert os.listdir(config.directory) == []


def test_more_than_the_machine_has_is_refused_before_it_is_allocated(config):
    with pytest.raises(KVStoreError, match="--host-kv-gib"):
        NodeStore.open("node", config, available_bytes=lambda: config.total_bytes - 1)
    assert os.listdir(config.directory) == []


def test_the_actor_allocates_for_its_first_replica(config):
    actor = KVStoreActor("node", config)
    assert actor.info() is None
    assert os.listdir(config.directory) == []
    info = actor.register("a", os.getpid())
    slots = actor.lease("a", info.epoch, 4)
    actor.release("a", info.epoch, slots[:2])
    assert actor.info().free == 98
    assert actor.reattach("a", info.epoch, slots[2:3]) == 1
    actor.poll(info.epoch)
    actor.unregister("a", info.epoch)
    assert actor.info().free == 100
    assert actor.info().owners == {}
    actor.close()
    assert os.listdir(config.directory) == []
    with pytest.raises(KVStoreError, match="closed"):
        actor.register("b", os.getpid())


def crash(store):
    """What a SIGKILL does to a store or an actor: no thread, no mapping, but the file."""
    if isinstance(store, KVStoreActor):
        store._stopping.set()
        store._keeper.join()
        store = store._store
    store._segment.close()
    del store.tables, store._slots


def commit(store, tables, row, slot, key):
    """By hand, as a replica does it."""
    tables.keys[slot] = (key, key)
    tables.pins[row, slot] = 1
    tables.state[slot] = SlotState.COMMITTED


def test_a_restarted_actor_that_can_adopt_nothing_refuses_the_leases_of_its_former_life(
    config, other_process
):
    before = KVStoreActor("node", config)
    old = before.register("a", other_process.pid)
    slots = before.lease("a", old.epoch, 4)
    mapped = Segment.attach(old.path)
    crash(before)
    other_process.kill()
    other_process.wait()

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


def test_a_restarted_actor_goes_on_with_its_replicas(config):
    before = KVStoreActor("node", config)
    info = before.register("a", os.getpid())
    slots = before.lease("a", info.epoch, 6)
    replica = Segment.attach(info.path)
    tables = replica.tables()
    replica.tensor()[slots[0]] = 7
    commit(before, tables, 0, slots[0], 5)
    crash(before)
    commit(before, tables, 0, slots[1], 6)  # while no store is there
    incarnation = tables.incarnation

    after = KVStoreActor("node", config)
    assert tables.incarnation == incarnation + 1
    now = after.info()
    assert (now.path, now.epoch) == (info.path, info.epoch)
    assert (now.leased, now.pinned, now.free) == (4, 2, 94)
    assert now.owners["a"].pid == os.getpid()
    find = IndexReader(tables).find
    assert (find(5, 5), find(6, 6)) == (slots[0], slots[1])
    assert after.reattach("a", info.epoch, slots[2:5]) == 1  # one lease it did not hear of
    assert after.info().leased == 3
    assert not set(after.lease("a", info.epoch, 50)) & set(slots[:5])
    assert Segment.attach(info.path).tensor()[slots[0]].eq(7).all()
    assert after.register("b", os.getpid()).owners["b"].index == 1
    del tables, find
    replica.close()
    after.close()
    assert os.listdir(config.directory) == []


def test_a_restart_in_the_middle_of_an_eviction_keeps_the_block(config):
    before = NodeStore.open("node", config)
    before.register("a", os.getpid())
    replica = Segment.attach(before.info().path)
    tables = replica.tables()
    slots = before.lease("a", 2)
    for i, slot in enumerate(slots):
        commit(before, tables, 0, slot, 5 + i)
    before.poll()
    tables.pins[0, slots[0]] = 0
    tables.state[slots[0]] = SlotState.EVICTING
    crash(before)
    after = NodeStore.adopt("node", config)
    assert IndexReader(tables).find(5, 5) == slots[0]
    assert (after.info().cached, after.info().pinned) == (1, 1)
    assert after.drop_cache() == 1
    after.close()


def test_the_dead_are_reaped_when_a_segment_is_adopted(config, other_process):
    before = NodeStore.open("node", config)
    before.register("dead", other_process.pid)
    before.register("a", os.getpid())
    replica = Segment.attach(before.info().path)
    tables = replica.tables()
    slots = before.lease("dead", 9)
    commit(before, tables, 0, slots[0], 5)
    mine = before.lease("a", 3)
    crash(before)
    other_process.kill()
    other_process.wait()
    after = NodeStore.adopt("node", config)
    assert list(after.info().owners) == ["a"]
    assert (after.info().leased, after.info().cached, after.info().free) == (3, 1, 96)
    assert not tables.pins.any()
    after.release("a", mine)
    after.close()


def test_a_segment_is_not_adopted_from_a_living_store_or_with_other_slots(
    config, other_process, monkeypatch
):
    before = NodeStore.open("node", config)
    before.register("a", os.getpid())
    replica = Segment.attach(before.info().path)
    tables = replica.tables()
    crash(before)
    tables.store[:2] = (other_process.pid, process.start_ticks(other_process.pid))
    assert NodeStore.adopt("node", config) is None
    other_process.kill()
    other_process.wait()
    assert NodeStore.adopt("node", replace(config, slot_bytes=SLOT // 2)) is None
    assert NodeStore.adopt("another-node", config) is None
    after = NodeStore.adopt("node", config)
    assert after.info().path == replica.path
    after.close()


def test_there_is_a_row_for_so_many_owners_and_a_row_is_used_again(config):
    store = NodeStore.open("node", replace(config, max_owners=2))
    tables = Segment.attach(store.info().path).tables()
    assert store.register("a", os.getpid()).owners["a"].index == 0
    assert store.register("b", os.getpid()).owners["b"].index == 1
    with pytest.raises(KVStoreError, match="2 owners already"):
        store.register("c", os.getpid())
    (slot,) = store.lease("a", 1)
    commit(store, tables, 0, slot, 9)
    store.lease("a", 5)
    store.unregister("a")
    assert not tables.pins.any()
    assert store.register("c", os.getpid()).owners["c"].index == 0
    assert (store.info().cached, store.info().leased) == (1, 0)
    store.close()


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_must_fit_the_table(store, name):
    with pytest.raises(KVStoreError, match="1 to 64 bytes"):
        store.register(name, os.getpid())


def test_impossible_numbers_of_owners_are_refused(config):
    with pytest.raises(KVStoreError, match="max_owners"):
        replace(config, max_owners=257)


def test_slots_are_kept_spare_while_there_is_demand(config):
    store = NodeStore.open("node", replace(config, spare_fraction=0.1, grace_s=0.0))
    store.register("a", os.getpid())
    tables = Segment.attach(store.info().path).tables()
    for base in (0, 50):
        for slot in store.lease("a", 50):
            commit(store, tables, 0, slot, slot + base)
            tables.pins[0, slot] = 0
    assert (store.info().free, store.info().cached) == (0, 100)
    store.poll()
    assert (store.info().free, store.info().cached) == (20, 80)
    store.register("b", os.getpid())
    for slot in store.lease("b", 20):
        commit(store, tables, 1, slot, 1000 + slot)
    store.poll()
    assert store.info().free == 20
    before = store.info().free
    for row in (0, 1):
        tables.pins[row] = 0
    store.poll()  # nobody asked since: nothing more goes
    assert store.info().free == before
    assert store.info().evictions == 40
    store.close()


def test_a_store_in_memory_has_no_file_and_the_same_counts():
    store = NodeStore.in_memory(10, slot_bytes=4096, max_owner_fraction=0.5)
    info = store.register("a", os.getpid())
    assert (info.path, info.num_slots, info.owner_quota, info.slot_bytes) == ("", 10, 5, 4096)
    assert len(store.lease("a", 9)) == 5
    store.close()
    with pytest.raises(KVStoreError, match="closed"):
        store.lease("a", 1)


def test_the_store_imports_no_torch():
    code = "import sys, tokenflow.kvstore.actor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_actor_indexes_commits_by_itself(config):
    actor = KVStoreActor("node", config)
    info = actor.register("a", os.getpid())
    tables = Segment.attach(info.path).tables()
    (slot,) = actor.lease("a", info.epoch, 1)
    commit(actor, tables, 0, slot, 77)
    deadline = time.monotonic() + 60
    while IndexReader(tables).find(77, 77) != slot:
        assert time.monotonic() < deadline
    actor.close()


def test_the_actor_reaps_in_the_background(config, other_process, monkeypatch):
    reaped = threading.Event()
    reap = NodeStore.reap_dead_owners

    def told(self):
        freed = reap(self)
        if freed:
            reaped.set()
        return freed

    monkeypatch.setattr(NodeStore, "reap_dead_owners", told)
    actor = KVStoreActor("node", replace(config, reap_interval_s=0.001, poll_interval_s=0.001))
    info = actor.register("a", other_process.pid)
    actor.lease("a", info.epoch, 9)
    other_process.kill()
    other_process.wait()
    assert reaped.wait(30)
    assert actor.info().free == 100
    actor.close()


def test_two_nodes_on_one_machine_have_nothing_in_common(config):
    # One name begins like the other, as node ids may.
    nodes = {name: KVStoreActor(name, config) for name in ("node1", "node11")}
    infos = {name: actor.register("a", os.getpid()) for name, actor in nodes.items()}
    assert infos["node1"].path != infos["node11"].path
    replicas = {name: Segment.attach(info.path) for name, info in infos.items()}
    slots = {name: nodes[name].lease("a", infos[name].epoch, 3) for name in nodes}
    commit(nodes["node1"], replicas["node1"].tables(), 0, slots["node1"][0], 5)
    nodes["node1"]._store.poll()
    assert IndexReader(replicas["node1"].tables()).find(5, 5) == slots["node1"][0]
    assert IndexReader(replicas["node11"].tables()).find(5, 5) == -1
    for name in ("node11", "node1"):
        crash(nodes[name])
        after = KVStoreActor(name, config)
        assert after.info().path == infos[name].path
        nodes[name] = after
    nodes["node1"].close()
    assert nodes["node11"].info().leased == 3
    for replica in replicas.values():
        replica.close()
    nodes["node11"].close()
    assert os.listdir(config.directory) == []
