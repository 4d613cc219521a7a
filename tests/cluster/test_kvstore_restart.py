"""A store actor that is killed, or hangs and is killed for it: Ray restarts it, it adopts its
segment, and its replica goes on."""

import hashlib
import os
import signal
import time
import uuid

import pytest
import ray

from tokenflow.kvstore import actor as store_actor
from tokenflow.kvstore.actor import KVStoreActor, RayStoreControl
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.node import StoreConfig
from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.transfers import Commit

pytestmark = pytest.mark.cluster


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_rides_over_the_end_of_its_store(server, tmp_path, monkeypatch, end):
    monkeypatch.setattr(store_actor, "HUNG_AFTER_S", 3.0)
    config = StoreConfig(total_bytes=1000 * 64, slot_bytes=64, directory=str(tmp_path))
    actor = ray.remote(KVStoreActor).options(max_restarts=-1, num_cpus=0)
    handle = actor.remote(uuid.uuid4().hex, config)
    control = RayStoreControl(handle, "replica", slot_bytes=64)
    segment = Segment.attach(control.info.path)
    tables = segment.tables()
    host = HostSlots(control, tables, control.info.owner_quota)

    def share(n):
        slots = host.acquire(n)
        keys = [hashlib.blake2b(str(s).encode(), digest_size=16).digest() for s in slots]
        host.commit([Commit(s, keys[i], "r", i, s) for i, s in enumerate(slots)])
        return slots, keys

    slots, keys = share(10)
    store = int(tables.store[0])
    assert store != os.getpid()
    os.kill(store, end)
    more = share(100)  # below the low-water mark: leases are asked for while nobody is there
    until(lambda: tables.incarnation == 2 and host.available() >= 64)
    slots, keys = slots + more[0], keys + more[1]
    until(lambda: ray.get(handle.info.remote()).pinned == len(slots))
    found = host.match(keys)
    assert found == slots
    assert host.checksums(found) == slots
    assert not host.stats().lost
    info = ray.get(handle.info.remote())
    assert (info.path, info.epoch) == (control.info.path, control.info.epoch)
    assert info.leased == host.stats().leased
    host.close()
    assert ray.get(handle.info.remote()).owners == {}
    ray.kill(handle, no_restart=True)
