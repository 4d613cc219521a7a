"""The replica's slots: never blocking, kept topped up from the background, lost with the store."""

import queue
import random
import threading
import time

import pytest

from tokenflow.kvstore.client import HostSlots, LocalStoreControl, NullHostSlots
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.replicas.errors import KVStoreError


class GatedControl:
    """A store of `total` slots whose answers wait at a gate; tells the test of every call."""

    def __init__(self, total):
        self.slots = list(range(total))
        self.gate = threading.Event()
        self.gate.set()
        self.error = None
        self.leases = queue.Queue()
        self.releases = queue.Queue()
        self.threads = set()

    def lease(self, n):
        self.threads.add(threading.get_ident())
        self.leases.put(n)
        assert self.gate.wait(60)
        if self.error:
            raise self.error
        granted, self.slots = self.slots[:n], self.slots[n:]
        return granted

    def release(self, slots):
        self.threads.add(threading.get_ident())
        assert self.gate.wait(60)
        if self.error:
            raise self.error
        self.slots.extend(slots)
        self.releases.put(list(slots))


def until(condition):
    """Wait for what another thread does without telling; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


@pytest.fixture
def control():
    control = GatedControl(100)
    yield control
    control.gate.set()


def test_the_first_lease_is_there_at_once(control):
    slots = HostSlots(control, 40)
    assert slots.capacity == 40
    assert slots.available() == control.leases.get() == 20
    assert len(set(slots.acquire(5))) == 5
    assert slots.available() == 15
    stats = slots.stats()
    assert (stats.leased, stats.free, stats.refused, stats.lost) == (20, 15, 0, False)
    slots.close()
    assert sorted(control.slots) == list(range(100))


def test_acquire_never_waits_for_the_store(control):
    slots = HostSlots(control, 40, low_water=10, high_water=20)
    control.leases.get()
    control.gate.clear()
    taken = slots.acquire(15)
    assert control.leases.get(timeout=60) == 15  # the background thread now hangs in the store
    # The gate stays shut: each of these calls returns, or the test never ends.
    taken += slots.acquire(5)
    assert slots.acquire(1) is None
    assert slots.available() == 0
    slots.release(taken[:2])
    assert slots.acquire(2) is not None
    assert not control.gate.is_set()
    assert slots.stats().refused == 1
    control.gate.set()
    until(lambda: slots.available() >= 15)
    assert control.threads - {threading.get_ident()} == {slots._thread.ident}
    slots.close()


def test_all_or_nothing(control):
    slots = HostSlots(control, 10, low_water=0, high_water=10)
    assert slots.acquire(11) is None
    assert len(slots.acquire(10)) == 10
    assert slots.acquire(0) == []
    assert slots.acquire(1) is None
    slots.close()


def test_a_refused_acquire_makes_a_later_one_succeed(control):
    slots = HostSlots(control, 80, low_water=2, high_water=4)
    assert control.leases.get() == 4
    assert slots.acquire(50) is None
    assert control.leases.get(timeout=60) == 46
    until(lambda: slots.available() == 50)
    assert len(slots.acquire(50)) == 50
    slots.close()


def test_what_can_never_be_granted_is_not_asked_for(control):
    slots = HostSlots(control, 30, low_water=2, high_water=10)
    held = slots.acquire(4)
    assert slots.acquire(27) is None  # with the four in use, 26 is all there can be
    assert slots.acquire(26) is None
    assert control.leases.get() == 10
    assert control.leases.get(timeout=60) == 20
    until(lambda: slots.available() == 26)
    slots.release(held)
    slots.close()


def test_the_capacity_is_never_exceeded(control):
    slots = HostSlots(control, 30, low_water=10, high_water=20)
    taken = []
    while len(taken) < 30:
        until(lambda: slots.available())
        taken += slots.acquire(slots.available())
    assert slots.acquire(1) is None
    assert slots.stats().leased == 30
    assert len(set(taken)) == 30
    slots.close()


def test_an_exhausted_store_is_asked_again_later(control):
    control.slots, rest = control.slots[:10], control.slots[10:]
    slots = HostSlots(control, 40, low_water=10, high_water=20, retry_s=0.001)
    assert slots.acquire(10) is not None
    for _ in range(3):
        control.leases.get(timeout=60)
    assert slots.available() == 0
    control.gate.clear()
    control.slots = rest
    control.gate.set()
    until(lambda: slots.available() == 20)
    slots.close()


def test_surplus_goes_back_when_idle(control):
    slots = HostSlots(control, 80, low_water=5, high_water=10, idle_s=0.001)
    until(lambda: slots.acquire(60) is not None or slots.available() >= 60)
    slots.release(sorted(slots._used))
    until(lambda: slots.available() == 10 and slots.stats().leased == 10)
    slots.close()
    assert sorted(control.slots) == list(range(100))


def watch_waits(slots):
    """The timeouts with which the background thread goes to wait, from its next round on."""
    timeouts = queue.Queue()
    wait = slots._wake.wait

    def told(timeout=None):
        timeouts.put(timeout)
        return wait(timeout)

    slots._wake.wait = told
    return timeouts


def test_an_idle_client_lets_the_store_alone(control):
    slots = HostSlots(control, 40, low_water=10, high_water=20, idle_s=0.001, retry_s=0.001)
    control.leases.get()
    timeouts = watch_waits(slots)
    slots.release(slots.acquire(3))
    slots._wake.set()  # one look round
    assert timeouts.get(timeout=60) is None  # and back to waiting, for as long as it takes
    assert control.leases.empty() and control.releases.empty()
    slots.close()


def test_refusals_do_not_hammer_an_exhausted_store(control):
    control.slots = control.slots[:10]
    slots = HostSlots(control, 40, low_water=10, high_water=20, retry_s=3600)
    control.leases.get()
    timeouts = watch_waits(slots)
    assert slots.acquire(10) is not None
    while timeouts.get(timeout=60) != 3600:
        pass
    while not control.leases.empty():
        control.leases.get()
    for _ in range(100):
        assert slots.acquire(1) is None
    assert not slots._wake.is_set()
    assert control.leases.empty()
    slots.close()


def test_wrong_releases_raise_and_change_nothing(control):
    slots = HostSlots(control, 40)
    taken = slots.acquire(3)
    free = next(iter(set(range(20)) - set(taken)))
    for wrong in ([taken[0], taken[0]], [taken[0], free], [999]):
        with pytest.raises(KVStoreError, match="not in use, or twice"):
            slots.release(wrong)
    assert slots.stats().free == 17
    slots.release(taken)
    with pytest.raises(KVStoreError):
        slots.release(taken)
    slots.close()


@pytest.mark.parametrize("error", [KVStoreError("restarted"), OSError("unexpected")])
def test_a_lost_store_leaves_no_free_slot_and_no_capacity(control, error):
    slots = HostSlots(control, 40, low_water=10, high_water=20)
    control.error = error
    taken = slots.acquire(15)
    until(lambda: slots.stats().lost)
    assert slots.capacity == slots.available() == 0
    assert slots.acquire(1) is None
    slots.release(taken)  # still accepted: the requests that hold them come to their end
    assert slots.available() == 0
    with pytest.raises(KVStoreError):
        slots.release(taken)
    slots.close()


def test_a_store_that_fails_at_the_start_is_an_error(control):
    control.error = KVStoreError("no room")
    with pytest.raises(KVStoreError, match="no room"):
        HostSlots(control, 40)


def test_close_gives_back_what_is_in_use_and_what_arrives_late(control):
    slots = HostSlots(control, 40, low_water=10, high_water=20)
    control.leases.get()
    control.gate.clear()
    taken = slots.acquire(15)
    control.leases.get(timeout=60)
    slots.close(timeout_s=0)  # the store does not answer; close does not wait for it
    assert slots.acquire(1) is None
    slots.release(taken)
    control.gate.set()
    slots.close()
    assert sorted(control.slots) == list(range(100))
    slots.release(taken)  # a straggler: they went back already


def test_two_replicas_share_a_store_under_load(tmp_path):
    config = StoreConfig(
        total_bytes=200 * 8, slot_bytes=8, max_owner_fraction=0.75, directory=str(tmp_path)
    )
    store = NodeStore("node", config)
    guard = threading.Lock()
    owner_of = {}
    failures = []

    def replica(name):
        control = LocalStoreControl(store, name)
        slots = HostSlots(
            control, control.info.owner_quota, high_water=40, idle_s=0.001, retry_s=0.001
        )
        rng = random.Random(name)
        held = []
        for _ in range(3000):
            taken = slots.acquire(rng.randint(1, 30))
            if taken is not None:
                with guard:
                    for slot in taken:
                        if owner_of.setdefault(slot, name) != name:
                            failures.append(slot)
                held.append(taken)
            if held and (taken is None or rng.random() < 0.4):
                given = held.pop(rng.randrange(len(held)))
                with guard:
                    for slot in given:
                        del owner_of[slot]
                slots.release(given)
        with guard:
            for slot in [slot for batch in held for slot in batch]:
                del owner_of[slot]
        slots.close()

    threads = [threading.Thread(target=replica, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    info = store.info()
    assert info.free == info.num_slots == 200
    assert all(owner.leased == 0 for owner in info.owners.values())
    store.close()


def test_the_host_tier_switched_off():
    slots = NullHostSlots()
    assert slots.capacity == slots.available() == 0
    assert slots.acquire(1) is None
    assert slots.acquire(0) == []
    slots.release([])
    with pytest.raises(KVStoreError):
        slots.release([1])
    slots.close()
