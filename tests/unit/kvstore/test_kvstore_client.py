"""The replica's slots: never blocking, kept topped up from the background, lost with the store."""

import hashlib
import os
import queue
import random
import threading
import time

import pytest

from tokenflow.kvstore.client import EXTENT, HostSlots, NullHostSlots
from tokenflow.kvstore.control import LocalStoreControl, StoreUnavailableError
from tokenflow.kvstore.node import NodeStore
from tokenflow.kvstore.tables import SlotState
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit


def key(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


def block(slot, i):
    return Commit(slot, key(i), "r", 0, slot)


class GatedControl(LocalStoreControl):
    """A store of `total` slots whose answers wait at a gate; tells the test of every call."""

    def __init__(self, total):
        self.store = NodeStore.in_memory(total)
        super().__init__(self.store, "us")
        self.gate = threading.Event()
        self.gate.set()
        self.error = None
        self.lose_answers = False  # the call is carried out, and then fails
        self.leases = queue.Queue()
        self.releases = queue.Queue()
        self.attached = queue.Queue()
        self.threads = set()

    def _pass(self):
        self.threads.add(threading.get_ident())
        assert self.gate.wait(60)
        if self.error and not self.lose_answers:
            raise self.error

    def _answer(self):
        if self.error:
            raise self.error

    def lease(self, n):
        self.leases.put(n)
        self._pass()
        slots = super().lease(n)
        self._answer()
        return slots

    def release(self, slots):
        self._pass()
        super().release(slots)
        self._answer()
        self.releases.put(list(slots))

    def reattach(self, held):
        self._pass()
        self._answer()
        super().reattach(held)
        self.attached.put(sorted(held))

    def unregister(self):
        self._pass()
        super().unregister()

    def hog(self, n):
        """Another replica takes that much; returns how to give it back."""
        self.store.register("hog", os.getpid())
        slots = self.store.lease("hog", n)
        assert len(slots) == n
        return lambda: self.store.release("hog", slots)

    def free(self):
        return self.store.info().free


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
    slots = HostSlots(control, control.store.tables, 40)
    assert slots.capacity == 40
    assert slots.available() == control.leases.get() == 20
    assert len(set(slots.acquire(5))) == 5
    assert slots.available() == 15
    stats = slots.stats()
    assert (stats.leased, stats.free, stats.refused, stats.lost) == (20, 15, 0, False)
    slots.close()
    assert control.free() == 100


def test_acquire_never_waits_for_the_store(control):
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20)
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
    slots = HostSlots(control, control.store.tables, 10, low_water=0, high_water=10)
    assert slots.acquire(11) is None
    assert len(slots.acquire(10)) == 10
    assert slots.acquire(0) == []
    assert slots.acquire(1) is None
    slots.close()


def test_a_refused_acquire_makes_a_later_one_succeed(control):
    slots = HostSlots(control, control.store.tables, 80, low_water=2, high_water=4)
    assert control.leases.get() == 4
    assert slots.acquire(50) is None
    assert control.leases.get(timeout=60) == 46
    until(lambda: slots.available() == 50)
    assert len(slots.acquire(50)) == 50
    slots.close()


def test_what_can_never_be_granted_is_not_asked_for(control):
    slots = HostSlots(control, control.store.tables, 30, low_water=2, high_water=10)
    held = slots.acquire(4)
    assert slots.acquire(27) is None  # with the four in use, 26 is all there can be
    assert slots.acquire(26) is None
    assert control.leases.get() == 10
    assert control.leases.get(timeout=60) == 20
    until(lambda: slots.available() == 26)
    slots.release(held)
    slots.close()


def test_the_capacity_is_never_exceeded(control):
    slots = HostSlots(control, control.store.tables, 30, low_water=10, high_water=20)
    taken = []
    while len(taken) < 30:
        until(lambda: slots.available())
        taken += slots.acquire(slots.available())
    assert slots.acquire(1) is None
    assert slots.stats().leased == 30
    assert len(set(taken)) == 30
    slots.close()


def test_an_exhausted_store_is_asked_again_later(control):
    give_back = control.hog(90)
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20, retry_s=0.001)
    assert slots.acquire(10) is not None
    for _ in range(3):
        control.leases.get(timeout=60)
    assert slots.available() == 0
    give_back()
    until(lambda: slots.available() == 20)
    slots.close()


def test_surplus_goes_back_when_idle(control):
    slots = HostSlots(control, control.store.tables, 80, low_water=5, high_water=10, idle_s=0.001)
    taken = []
    until(lambda: taken.extend(slots.acquire(60) or []) or taken)
    slots.release(taken)
    until(lambda: slots.available() == 10 and slots.stats().leased == 10)
    slots.close()
    assert control.free() == 100


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
    slots = HostSlots(
        control, control.store.tables, 40, low_water=10, high_water=20, idle_s=0.001, retry_s=0.001
    )
    control.leases.get()
    timeouts = watch_waits(slots)
    slots.release(slots.acquire(3))
    slots._wake.set()  # one look round
    assert timeouts.get(timeout=60) is None  # and back to waiting, for as long as it takes
    assert control.leases.empty() and control.releases.empty()
    slots.close()


def test_refusals_do_not_hammer_an_exhausted_store(control):
    control.hog(90)
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20, retry_s=3600)
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
    slots = HostSlots(control, control.store.tables, 40)
    taken = slots.acquire(3)
    free = next(iter(set(range(20)) - set(taken)))
    for wrong in ([taken[0], taken[0]], [taken[0], free], [999]):
        with pytest.raises(KVStoreError, match="not held"):
            slots.release(wrong)
    assert slots.stats().free == 17
    slots.release(taken)
    with pytest.raises(KVStoreError):
        slots.release(taken)
    slots.close()


@pytest.mark.parametrize("error", [KVStoreError("restarted"), OSError("unexpected")])
def test_a_lost_store_leaves_no_free_slot_and_no_capacity(control, error):
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20)
    control.error = error
    taken = slots.acquire(15)
    until(lambda: slots.stats().lost)
    assert slots.capacity == slots.available() == 0
    slots._wake.clear()
    assert slots.acquire(1) is None
    assert not slots._wake.is_set()
    slots.release(taken)  # still accepted: the requests that hold them come to their end
    assert slots.available() == 0
    with pytest.raises(KVStoreError):
        slots.release(taken)
    slots.close()


def test_a_store_that_fails_at_the_start_is_an_error(control):
    control.error = KVStoreError("no room")
    with pytest.raises(KVStoreError, match="no room"):
        HostSlots(control, control.store.tables, 40)


def test_close_gives_back_what_is_in_use_and_what_arrives_late(control):
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20)
    control.leases.get()
    control.gate.clear()
    taken = slots.acquire(15)
    control.leases.get(timeout=60)
    slots.close(timeout_s=0)  # the store does not answer; close does not wait for it
    assert slots.acquire(1) is None
    slots.release(taken)
    control.gate.set()
    slots.close()
    assert control.free() == 100
    assert slots.available() == 0
    slots.release(taken)  # stragglers: they went back already
    slots.report_corrupt(taken)
    slots.commit([block(slot, slot) for slot in taken])
    assert not control.store.tables.corrupt.any()
    assert control.free() == 100


# -- blocks that are shared -------------------------------------------------------------------


def single(num_slots=200, names="ab", fraction=1.0, **marks):
    """Replicas in one thread on one store in memory."""
    store = NodeStore.in_memory(num_slots, max_owner_fraction=fraction)
    replicas = []
    for name in names:
        control = LocalStoreControl(store, name)
        replicas.append(
            HostSlots(control, store.tables, control.info.owner_quota, background=False, **marks)
        )
    return store, *replicas


def test_a_block_committed_by_one_replica_is_read_by_the_other_and_outlives_it():
    store, ours, theirs = single()
    slots = ours.acquire(3)
    ours.commit([block(slot, i) for i, slot in enumerate(slots)])
    assert theirs.match([key(i) for i in range(4)]) == slots
    assert theirs.checksums(slots) == slots
    assert (theirs.stats().matched, theirs.stats().held, theirs.stats().leased) == (3, 3, 100)
    ours.close()
    theirs.release(slots)
    info = store.info()
    assert (info.cached, info.pinned) == (3, 0)
    assert theirs.match([key(0)]) == slots[:1]


def test_committed_slots_do_not_come_back_to_the_free_ones():
    store, ours, _ = single(64, names="ab", low_water=0, high_water=8)
    first = ours.acquire(8)
    ours.commit([block(first[0], 0)])
    ours.release(first)
    assert ours.available() == 7
    assert ours.stats().leased == 7
    assert store.info().cached == 1


def test_a_corrupt_block_is_matched_no_more_and_its_holders_keep_it():
    store, ours, theirs = single()
    (slot,) = ours.acquire(1)
    ours.commit([block(slot, 0)])
    assert theirs.match([key(0)]) == [slot]
    theirs.report_corrupt([slot])
    assert ours.match([key(0)]) == []
    store.poll()
    assert store.tables.state[slot] == SlotState.COMMITTED
    with pytest.raises(KVStoreError, match="not held"):
        ours.report_corrupt([slot + 1])
    ours.release([slot])
    theirs.release([slot])
    store.poll()
    assert store.tables.state[slot] == SlotState.FREE


def test_matches_count_against_the_capacity_and_push_free_slots_back():
    _, ours, theirs = single(100, fraction=0.5, low_water=0, high_water=10)
    for base in range(0, 40, 10):
        slots = ours.acquire(10)
        ours.commit([block(slot, base + i) for i, slot in enumerate(slots)])
        ours.release(slots)
    assert theirs.available() == 10
    held = theirs.match([key(i) for i in range(40)])
    assert len(held) == 40
    assert theirs.available() == 10
    more = ours.acquire(10)
    ours.commit([block(slot, 40 + i) for i, slot in enumerate(more)])
    held += theirs.match([key(i) for i in range(40, 50)])
    assert len(held) == 50
    assert theirs.available() == 0
    assert theirs.stats().leased == 0
    last = ours.acquire(1)
    ours.commit([block(last[0], 50)])
    assert theirs.match([key(50)]) == []  # not one slot beyond the capacity
    assert theirs.match([key(3)]) == held[3:4]
    assert theirs.acquire(1) is None
    theirs.release([*held, held[3]])
    assert theirs.acquire(1) is not None


def test_the_background_thread_pushes_free_slots_back_too(control):
    tables = control.store.tables
    writer = LocalStoreControl(control.store, "writer")
    theirs = HostSlots(writer, tables, 40, background=False, low_water=0, high_water=30)
    slots = theirs.acquire(30)
    theirs.commit([block(slot, i) for i, slot in enumerate(slots)])
    ours = HostSlots(control, tables, 40, low_water=0, high_water=20)
    assert len(ours.match([key(i) for i in range(30)])) == 30
    until(lambda: ours.available() == ours.stats().leased == 10)
    ours.close()
    assert control.store.info().pinned == 30


def test_a_cache_in_the_way_is_evicted_for_leases_oldest_first():
    store, ours = single(32, names="a", low_water=0, high_water=8)
    for i in range(0, 64, 8):
        slots = ours.acquire(8)
        ours.commit([block(slot, i + n) for n, slot in enumerate(slots)])
        ours.release(slots)
    assert store.info().free + store.info().leased + store.info().cached == 32
    kept = [i for i in range(64) if ours.match([key(i)])]
    assert kept == list(range(64 - len(kept), 64))
    assert len(kept) >= 24


def test_calls_are_in_bulk_over_a_long_run():
    _, ours, theirs = single(4096, fraction=0.75)
    rng = random.Random(1)
    for i in range(600):
        slots = ours.acquire(rng.randint(1, 60))
        if i % 3:
            ours.commit([block(slot, (i, slot)) for slot in slots])
        assert theirs.match([key((i, slots[0]))]) == (slots[:1] if i % 3 else [])
        ours.release(slots)
    stats = ours.stats()
    assert stats.acquired > 15_000
    assert stats.refused == 0
    assert stats.calls <= stats.acquired / EXTENT


def test_calls_are_in_bulk_from_the_background_too(control):
    store = NodeStore.in_memory(4096)
    control = LocalStoreControl(store, "a")
    ours = HostSlots(control, store.tables, 4096, idle_s=0.001)
    for i in range(200):
        until(lambda: ours.available() >= 60)
        slots = ours.acquire(60)
        if i % 4:
            ours.commit([block(slot, (i, slot)) for slot in slots])
        ours.release(slots)
        store.poll()
    stats = ours.stats()
    ours.close()
    assert stats.acquired == 12_000
    assert stats.calls <= stats.acquired / EXTENT


def test_at_the_capacity_the_store_is_not_asked_for_crumbs(control):
    """Every release opens room for a little; only a refused acquire may ask for so little."""
    slots = HostSlots(control, control.store.tables, 40, low_water=20, high_water=40, retry_s=3600)
    assert control.leases.get() == 40
    taken = slots.acquire(40)
    slots.commit([block(slot, slot) for slot in taken])
    timeouts = watch_waits(slots)
    for slot in taken[:15]:
        slots.release([slot])
        slots._wake.set()
    assert timeouts.get(timeout=60) is None
    assert control.leases.empty()
    assert slots.acquire(2) is None
    assert control.leases.get(timeout=60) == 15
    until(lambda: slots.available() == 15)
    slots.close()


def test_fresh_slots_come_in_ascending_runs():
    _, ours = single(4096, names="a")
    runs = [ours.acquire(10) for _ in range(20)]
    assert runs == [list(range(i, i + 10)) for i in range(0, 200, 10)]
    ours.release(runs[3])
    assert ours.acquire(10) == runs[3]  # still warm


# -- a store that goes away ----------------------------------------------------------------------


def test_a_store_that_was_away_is_told_what_is_still_leased(control):
    """The answer to a lease is lost: the slots must not be."""
    tables = control.store.tables
    slots = HostSlots(control, tables, 80, low_water=10, high_water=20)
    committed, private = slots.acquire(2)
    slots.commit([block(committed, 0)])
    control.lose_answers = True
    control.error = StoreUnavailableError("away")
    taken = slots.acquire(15)
    until(lambda: control.store.info().owners["us"].leased > 19)
    assert slots.stats().leased == 19
    assert slots.capacity == 80  # not lost
    control.error = None
    assert control.attached.get(timeout=60) == sorted(s for s in range(20) if s != committed)
    until(lambda: slots.available() >= 10)
    until(lambda: control.store.info().owners["us"].leased == slots.stats().leased)
    slots.release([*taken, private, committed])
    slots.close()
    assert control.store.info().leased == 0


def test_a_give_back_whose_answer_is_lost_leaks_nothing(control):
    slots = HostSlots(control, control.store.tables, 80, low_water=5, high_water=10, idle_s=0.001)
    taken = []
    until(lambda: taken.extend(slots.acquire(60) or []) or taken)
    control.error = StoreUnavailableError("away")  # not even carried out
    slots.release(taken)
    until(lambda: slots.stats().leased < 60)
    control.error = None
    control.attached.get(timeout=60)
    until(lambda: control.store.info().owners["us"].leased == slots.stats().leased == 10)
    slots.close()


def test_the_engine_does_not_notice_a_store_that_is_away(control):
    tables = control.store.tables
    slots = HostSlots(control, tables, 80, low_water=10, high_water=20)
    control.error = StoreUnavailableError("away")
    taken = slots.acquire(15)
    slots.commit([block(slot, i) for i, slot in enumerate(taken)])
    slots.release(taken[:5])
    assert len(slots.acquire(5)) == 5
    assert slots.acquire(1) is None
    control.store.poll()
    assert slots.match([key(i) for i in range(15)]) == taken
    assert not slots.stats().lost
    control.error = None
    until(lambda: slots.available() >= 10)
    slots.close()


def test_a_store_that_stays_away_is_lost(control):
    slots = HostSlots(
        control, control.store.tables, 40, low_water=10, high_water=20, retry_for_s=0.0
    )
    control.error = StoreUnavailableError("away")
    taken = slots.acquire(15)
    slots.commit([block(taken[0], 0)])
    control.store.poll()
    until(lambda: slots.stats().lost)
    assert slots.capacity == slots.available() == 0
    assert slots.match([key(0)]) == []
    assert slots.checksums(taken[:1]) == taken[:1]
    slots.release(taken)
    slots.close()


def test_close_does_not_wait_for_a_store_that_is_away(control):
    slots = HostSlots(control, control.store.tables, 40, low_water=10, high_water=20)
    control.error = StoreUnavailableError("away")
    slots.acquire(15)
    until(lambda: slots.stats().calls >= 2)
    started = time.monotonic()
    slots.close(timeout_s=60)
    assert time.monotonic() - started < 30


def test_a_new_store_of_the_same_tables_is_told_without_a_failed_call(control):
    slots = HostSlots(control, control.store.tables, 80, low_water=10, high_water=20)
    control.store.tables.store[2] += 1  # what a store does when it takes the tables over
    slots.acquire(15)
    assert control.attached.get(timeout=60) == list(range(20))
    slots.close()


# -- together -----------------------------------------------------------------------------------


def test_three_replicas_share_a_store_under_load():
    """Every slot that is held holds what its holder thinks; nothing is left over in the end."""
    store = NodeStore.in_memory(200, max_owner_fraction=0.75)
    store._slots._grace_s = 0.001
    content = [None] * 200
    failures = []
    done = threading.Event()

    def keep():
        while not done.wait(0.001):
            store.poll()

    def replica(name):
        control = LocalStoreControl(store, name)
        slots = HostSlots(
            control, store.tables, control.info.owner_quota, high_water=40, idle_s=0.001,
            retry_s=0.001,
        )  # fmt: skip
        rng = random.Random(name)
        held = []
        for turn in range(1000):
            taken = slots.acquire(rng.randint(1, 20))
            for slot in taken or []:
                content[slot] = (name, turn, slot)
            if taken and rng.random() < 0.7:
                wanted = rng.sample(range(500), len(taken))
                for slot, i in zip(taken, wanted, strict=True):
                    content[slot] = i
                slots.commit([block(slot, i) for slot, i in zip(taken, wanted, strict=True)])
                held += zip(taken, wanted, strict=True)
            elif taken:
                held += [(slot, (name, turn, slot)) for slot in taken]
            i = rng.randrange(500)
            held += [(slot, i) for slot in slots.match([key(i)])]
            rng.shuffle(held)
            count = len(held) if taken is None else rng.randint(0, len(held))
            failures.extend((slot, what) for slot, what in held if content[slot] != what)
            slots.release([slot for slot, _ in held[:count]])
            del held[:count]
            if taken is None:
                done.wait(0.0005)
        slots.close()

    keeper = threading.Thread(target=keep)
    keeper.start()
    threads = [threading.Thread(target=replica, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    keeper.join()
    assert not failures
    assert store.info().owners == {}
    assert store.info().evictions > 100
    store.drop_cache()
    assert store.info().free == 200
    assert not store.tables.pins.any()


def test_the_host_tier_switched_off():
    slots = NullHostSlots()
    assert slots.capacity == slots.available() == 0
    assert slots.acquire(1) is None
    assert slots.acquire(0) == []
    assert slots.match([key(1)]) == slots.checksums([]) == []
    slots.release([])
    slots.commit([])
    for call in (
        lambda: slots.release([1]),
        lambda: slots.report_corrupt([1]),
        lambda: slots.checksums([1]),
        lambda: slots.commit([block(1, 1)]),
    ):
        with pytest.raises(KVStoreError, match="the host tier is off"):
            call()
    assert slots.stats().free == 0
    slots.close()
