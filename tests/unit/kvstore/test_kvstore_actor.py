"""What a replica makes of Ray's errors: wait for the store, or give it up."""

import os

import pytest
import ray

from tokenflow.kvstore.actor import KVStoreActor, RayStoreControl
from tokenflow.kvstore.control import StoreUnavailableError
from tokenflow.kvstore.node import StoreConfig
from tokenflow.replicas.errors import KVStoreError


class Handle:
    """An actor handle whose actor is in this process and can be made to fail."""

    def __init__(self, actor):
        self.actor = actor
        self.error = None

    def __getattr__(self, name):
        handle = self

        class Method:
            def remote(self, *args):
                return lambda: handle.call(name, args)

        return Method()

    def call(self, name, args):
        if self.error:
            raise self.error
        try:
            return getattr(self.actor, name)(*args)
        except Exception as error:
            raise ray.exceptions.RayTaskError(name, "traceback", error) from error


@pytest.fixture
def handle(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer())
    config = StoreConfig(total_bytes=100 * 64, slot_bytes=64, directory=str(tmp_path))
    handle = Handle(KVStoreActor("node", config))
    yield handle
    handle.actor.close()


def test_every_call_carries_the_owner_and_the_epoch(handle):
    control = RayStoreControl(handle, "a", slot_bytes=64)
    assert control.owner_index == 0
    assert control.info.owners["a"].pid == os.getpid()
    slots = control.lease(5)
    control.release(slots[:1])
    control.reattach(slots[2:])
    control.poll()
    assert handle.actor.info().owners["a"].leased == 3
    control.unregister()
    assert handle.actor.info().free == 100


def test_slots_of_another_size_are_refused(handle):
    with pytest.raises(KVStoreError, match="slots of 64 bytes"):
        RayStoreControl(handle, "a", slot_bytes=128)


def test_an_actor_that_is_away_may_come_back(handle):
    control = RayStoreControl(handle, "a", slot_bytes=64)
    for error in (
        ray.exceptions.ActorUnavailableError("restarting", b"\0" * 16),
        ray.exceptions.ActorDiedError(),
    ):
        handle.error = error
        with pytest.raises(StoreUnavailableError, match="before it answered lease"):
            control.lease(1)


def test_what_the_store_refuses_and_what_ray_cannot_reach_is_final(handle):
    control = RayStoreControl(handle, "a", slot_bytes=64)
    with pytest.raises(KVStoreError, match="not leased to it"):
        control.release([1])
    with pytest.raises(KVStoreError, match="failed in reattach: TypeError"):
        control.reattach(None)
    handle.error = ray.exceptions.ActorUnschedulableError("the node is gone")
    with pytest.raises(KVStoreError, match="ActorUnschedulableError") as caught:
        control.lease(1)
    assert not isinstance(caught.value, StoreUnavailableError)
