"""Ownership of slots: leases, quotas, and refusals that change nothing."""

import pytest

from tokenflow.kvstore.slots import SlotTable
from tokenflow.replicas.errors import KVStoreError


def test_leases_are_disjoint_and_may_be_short():
    table = SlotTable(10)
    a, b = table.lease("a", 6), table.lease("b", 6)
    assert len(a) == 6 and len(b) == 4
    assert sorted(a + b) == list(range(10))
    assert table.lease("c", 1) == []
    assert table.stats().free == 0
    assert table.stats().leased_by == {"a": 6, "b": 4, "c": 0}


def test_a_quota_leaves_room_for_the_neighbours():
    table = SlotTable(10, max_owner_fraction=0.6)
    assert table.quota == 6
    held = table.lease("a", 10)
    assert len(held) == 6
    assert table.lease("a", 1) == []
    assert len(table.lease("b", 10)) == 4
    table.release("a", held[:2])
    assert len(table.lease("a", 10)) == 2


def test_a_tiny_table_still_grants_one_slot():
    assert len(SlotTable(3, max_owner_fraction=0.1).lease("a", 3)) == 1


def test_zero_slots_is_a_lease_too():
    table = SlotTable(4)
    assert table.lease("a", 0) == []
    table.release("a", [])
    with pytest.raises(KVStoreError):
        table.lease("a", -1)


@pytest.mark.parametrize("wrong", [[0, 0], [99], [-1]])
def test_a_wrong_release_raises_and_changes_nothing(wrong):
    table = SlotTable(4)
    assert table.lease("a", 4) == [3, 2, 1, 0]
    with pytest.raises(KVStoreError, match="does not hold, or twice"):
        table.release("a", [1, *wrong])
    assert table.held_by("a") == 4
    assert table.stats().free == 0


def test_a_slot_is_released_once_and_by_its_owner():
    table = SlotTable(4)
    mine, theirs = table.lease("a", 2), table.lease("b", 2)
    with pytest.raises(KVStoreError):
        table.release("a", theirs)
    with pytest.raises(KVStoreError):
        table.release("nobody", mine)
    table.release("a", mine)
    with pytest.raises(KVStoreError):
        table.release("a", mine)


def test_an_owner_leaves_with_everything():
    table = SlotTable(8)
    table.lease("a", 3)
    kept = table.lease("b", 2)
    assert table.release_owner("a") == 3
    assert table.release_owner("a") == 0
    assert table.stats().leased_by == {"b": 2}
    assert not set(table.lease("c", 8)) & set(kept)


@pytest.mark.parametrize(("slots", "fraction"), [(0, 1.0), (4, 0.0), (4, 1.1)])
def test_impossible_tables_are_refused(slots, fraction):
    with pytest.raises(KVStoreError):
        SlotTable(slots, fraction)
