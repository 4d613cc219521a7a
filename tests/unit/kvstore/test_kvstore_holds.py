"""One replica's cells: holds, matches that check what they found, commits, refusals."""

import hashlib

import numpy as np
import pytest

from tokenflow.kvstore.holds import Holds
from tokenflow.kvstore.slots import SlotTable
from tokenflow.kvstore.tables import MAX_PINS, SlotState, Tables
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit


def key(i):
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


def block(slot, i, position=0, request_id="r", checksum=0):
    return Commit(slot, key(i), request_id, position, checksum)


@pytest.fixture
def tables():
    tables = Tables.in_memory(12, 2)
    tables.owner_active[:] = 1
    return tables


@pytest.fixture
def store(tables):
    return SlotTable(tables)


@pytest.fixture
def ours(tables, store):
    """Row 0, holding six private slots."""
    holds = Holds(tables, 0)
    holds.take(store.lease(0, 6))
    return holds


def test_a_block_committed_by_one_is_matched_by_the_other(tables, store, ours):
    theirs = Holds(tables, 1)
    ours.commit([block(s, s, position=s, checksum=2**64 - 1 - s) for s in range(4)], now=5)
    assert (ours.count, ours.private) == (6, 2)
    assert theirs.match([key(0)], 9, now=6) == []  # the store has not looked yet
    store.index_commits()
    assert theirs.match([key(i) for i in (0, 1, 2, 9, 3)], 9, now=6) == [0, 1, 2]
    assert (theirs.count, theirs.private) == (3, 0)
    assert tables.pins[1].tolist() == [1, 1, 1] + [0] * 9
    assert tables.used[:4].tolist() == [6, 6, 6, 5]
    assert tables.position[:4].tolist() == [0, 1, 2, 3]
    assert theirs.checksums([1, 0]) == [2**64 - 2, 2**64 - 1]
    assert len(set(tables.request[:4].tolist())) == 1 and tables.request[0] != 0
    assert theirs.match([key(1)], 9, now=7) == [1]
    assert (theirs.count, tables.pins[1, 1]) == (3, 2)


def test_releases_count_down_and_tell_the_private_slots(tables, store, ours):
    ours.commit([block(0, 0)], now=1)
    store.index_commits()
    assert ours.match([key(0)], 9, now=2) == [0]
    assert ours.release([0, 4, 2], now=3) == [2, 4]
    assert (ours.count, ours.private) == (4, 3)
    assert tables.pins[0, 0] == 1
    assert ours.release([0], now=4) == []
    assert tables.used[0] == 4
    assert store.cached() == 1
    assert ours.private_slots() == [1, 3, 5]


def test_a_slot_may_be_released_as_often_as_it_is_held_and_no_more(tables, store, ours):
    ours.commit([block(0, 0)], now=1)
    store.index_commits()
    ours.match([key(0)], 9, now=1)
    before = tables.pins.copy()
    for wrong in ([0, 0, 0], [6], [-1], [12], [1, 1]):
        with pytest.raises(KVStoreError, match="not held"):
            ours.release(wrong, now=2)
        assert (tables.pins == before).all()
    assert ours.release([0, 0], now=2) == []
    assert tables.pins[0, 0] == 0


def test_wrong_commits_raise_and_change_nothing(tables, store, ours):
    ours.commit([block(0, 0)], now=1)
    wrongs = [
        [block(0, 1)],  # committed already
        [block(1, 1), block(1, 2)],
        [block(7, 1)],
        [block(1, 1), Commit(2, b"short", "r", 0, 0)],
    ]
    state = tables.state.copy()
    for wrong in wrongs:
        with pytest.raises(KVStoreError):
            ours.commit(wrong, now=2)
        assert (tables.state == state).all() and ours.private == 5
    with pytest.raises(KVStoreError, match="16 bytes"):
        ours.match([b"short"], 9, now=2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tables: tables.state.__setitem__(0, SlotState.EVICTING),
        lambda tables: tables.state.__setitem__(0, SlotState.LEASED),
        lambda tables: tables.corrupt.__setitem__(0, 1),
        lambda tables: tables.pins.__setitem__((0, 0), MAX_PINS),
    ],
)
def test_a_stale_index_is_a_miss_that_leaves_no_pin(tables, store, ours, spoil):
    ours.commit([block(0, 0)], now=1)
    store.index_commits()
    spoil(tables)
    before = tables.pins.copy()
    assert ours.match([key(0)], 9, now=2) == []
    assert (tables.pins == before).all()
    assert ours.count == 6


def test_a_slot_that_changed_its_key_behind_the_index_is_a_miss(tables, store, ours):
    ours.commit([block(0, 0)], now=1)
    store.index_commits()
    find = ours._index.find

    class Late:
        """Between the look at the index and the pin, the slot is evicted and filled anew."""

        def find(self, low, high):
            slot = find(low, high)
            tables.keys[slot] = (low, high + 1)
            return slot

    ours._index = Late()
    assert ours.match([key(0)], 9, now=2) == []
    assert tables.pins[0, 0] == 1


def test_a_match_ends_where_the_limit_does(tables, store, ours):
    theirs = Holds(tables, 1)
    ours.commit([block(s, s) for s in range(4)], now=1)
    store.index_commits()
    assert theirs.match([key(i) for i in range(4)], 2, now=2) == [0, 1]
    assert theirs.match([key(i) for i in range(4)], 2, now=2) == [0, 1]  # held: no more slots
    assert theirs.count == 2


def test_only_holders_report_and_the_report_ends_the_matches(tables, store, ours):
    theirs = Holds(tables, 1)
    ours.commit([block(0, 0)], now=1)
    store.index_commits()
    with pytest.raises(KVStoreError, match="not held"):
        theirs.report_corrupt([0])
    theirs.match([key(0)], 9, now=1)
    theirs.report_corrupt([0])
    assert ours.match([key(0)], 9, now=2) == []
    assert tables.pins[:, 0].tolist() == [1, 1]


def test_a_private_slot_reported_corrupt_is_clean_when_it_is_used_again(tables, store, ours):
    ours.report_corrupt([3])
    assert ours.release([3], now=1) == [3]
    ours.take([3])
    ours.commit([block(3, 3)], now=2)
    store.index_commits()
    assert ours.match([key(3)], 9, now=3) == [3]


def test_every_key_of_a_big_table_is_found_at_its_slot():
    tables = Tables.in_memory(3000, 1)
    tables.owner_active[:] = 1
    store, holds = SlotTable(tables), Holds(tables, 0)
    slots = store.lease(0, 3000)
    holds.take(slots)
    holds.commit([block(s, s) for s in slots], now=1)
    store.index_commits()
    assert holds.match([key(s) for s in slots], 3000, now=2) == slots
    assert (tables.pins[0] == 2).all()
    assert np.array_equal(tables.state, np.full(3000, SlotState.COMMITTED))
