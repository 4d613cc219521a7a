"""What the store does with slots: leases, quotas, the index, and who is evicted in which order."""

import numpy as np
import pytest

from tokenflow.kvstore.index import IndexReader
from tokenflow.kvstore.slots import SlotTable, take_runs
from tokenflow.kvstore.tables import SlotState, Tables
from tokenflow.replicas.errors import KVStoreError

A, B, C = range(3)


class Bench:
    """A table and the hands of three replicas on it."""

    def __init__(self, num_slots, fraction=1.0, **options):
        self.tables = Tables.in_memory(num_slots, 3)
        self.tables.owner_active[:] = 1
        self.table = SlotTable(self.tables, max_owner_fraction=fraction, **options)

    def restart(self):
        self.table = SlotTable(self.tables)

    def commit(self, row, slot, key, used=0, position=0, pinned=True):
        tables = self.tables
        assert tables.state[slot] == SlotState.LEASED and tables.owner[slot] == row
        tables.keys[slot] = (key, key)
        tables.used[slot] = used
        tables.position[slot] = position
        tables.pins[row, slot] = pinned
        tables.state[slot] = SlotState.COMMITTED

    def cached(self, *keys):
        """Blocks of these keys, committed one after the other and let go; their slots."""
        slots = self.table.lease(A, len(keys))
        for i, (slot, key) in enumerate(zip(slots, keys, strict=True)):
            self.commit(A, slot, key, used=i, pinned=False)
        self.table.index_commits()
        return slots

    def find(self, key):
        return IndexReader(self.tables).find(key, key)

    def states(self):
        return [SlotState(s).name[0] for s in self.tables.state]


def test_leases_are_disjoint_ascending_and_may_be_short():
    table = Bench(10).table
    a, b = table.lease(A, 6), table.lease(B, 6)
    assert (a, b) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert table.lease(C, 1) == []
    assert table.count(SlotState.FREE) == 0
    assert [table.usage(row) for row in (A, B, C)] == [6, 4, 0]


def test_a_quota_counts_leases_and_pinned_commits_but_not_the_cache():
    bench = Bench(10, fraction=0.6)
    table = bench.table
    assert table.quota == 6
    held = table.lease(A, 10)
    assert len(held) == 6
    assert table.lease(A, 1) == []
    bench.commit(A, held[0], 1)
    assert table.lease(A, 1) == []
    bench.tables.pins[A, held[0]] = 0
    assert len(table.lease(A, 3)) == 1
    bench.tables.pins[B, held[0]] = 2
    assert table.usage(B) == 1
    assert len(table.lease(B, 10)) == 3


def test_a_tiny_table_still_grants_one_slot():
    assert len(Bench(3, fraction=0.1).table.lease(A, 3)) == 1


def test_zero_slots_is_a_lease_too():
    table = Bench(4).table
    assert table.lease(A, 0) == []
    table.release(A, [])
    with pytest.raises(KVStoreError):
        table.lease(A, -1)


@pytest.mark.parametrize("wrong", [[0], [99], [-1], [3]])
def test_a_wrong_release_raises_and_changes_nothing(wrong):
    table = Bench(4).table
    table.lease(A, 3)
    table.lease(B, 1)
    with pytest.raises(KVStoreError, match=r"not leased to it, or twice"):
        table.release(A, [1, 0, *wrong])
    assert table.usage(A) == 3
    table.release(A, [0, 1])
    with pytest.raises(KVStoreError):
        table.release(A, [0])
    assert table.count(SlotState.FREE) == 2


def test_a_committed_slot_is_no_lease_any_more():
    bench = Bench(4)
    slots = bench.table.lease(A, 4)
    bench.commit(A, slots[1], 7)
    with pytest.raises(KVStoreError):
        bench.table.release(A, slots)
    assert bench.table.reattach(A, [slots[0]]) == 2
    assert bench.states() == ["L", "C", "F", "F"]


def test_commits_are_found_by_scan_and_a_second_copy_is_not_indexed():
    bench = Bench(6)
    a, b = bench.table.lease(A, 2), bench.table.lease(B, 2)
    bench.commit(A, a[0], 5)
    assert bench.find(5) == -1
    assert bench.table.index_commits() == 1
    assert bench.find(5) == a[0]
    bench.commit(B, b[0], 5)
    bench.commit(B, b[1], 6)
    assert bench.table.index_commits() == 1
    assert bench.table.index_commits() == 0
    assert bench.table.indexed == 2
    assert (bench.find(5), bench.find(6)) == (a[0], b[1])
    assert bench.table.duplicates() == 1
    assert bench.table.sweep() == 0  # still held
    bench.tables.pins[B] = 0
    assert bench.table.sweep() == 1
    assert bench.states() == ["C", "L", "F", "C", "F", "F"]
    assert bench.table.evictions == 0


def test_a_second_copy_takes_over_when_the_first_goes():
    bench = Bench(2)
    a, b = bench.table.lease(A, 1), bench.table.lease(B, 1)
    bench.commit(A, a[0], 5)
    bench.table.index_commits()
    bench.commit(B, b[0], 5)
    bench.table.index_commits()
    bench.tables.pins[A] = 0
    assert bench.table.evict(2) == 1
    assert bench.find(5) == b[0]
    assert bench.table.duplicates() == 0
    bench.tables.pins[B] = 0
    assert bench.table.evict(1) == 1
    assert bench.find(5) == -1


@pytest.mark.parametrize("indexed_before", [True, False])
def test_a_corrupt_block_is_found_no_more_and_goes_once_nobody_holds_it(indexed_before):
    bench = Bench(3)
    (slot,) = bench.table.lease(A, 1)
    bench.commit(A, slot, 5)
    if indexed_before:
        bench.table.index_commits()
    bench.tables.corrupt[slot] = 1
    bench.table.index_commits()
    assert bench.find(5) == -1
    assert bench.table.sweep() == 0
    assert bench.table.corrupt() == 1
    bench.tables.pins[A] = 0
    assert bench.table.sweep() == 1
    assert bench.states() == ["F", "F", "F"]
    assert not bench.tables.corrupt.any()
    (again,) = bench.table.lease(B, 1)
    assert again == slot
    bench.commit(B, again, 5)
    bench.table.index_commits()
    assert bench.find(5) == again


def test_the_second_copy_of_a_corrupt_block_is_good():
    bench = Bench(2)
    for row in (A, B):
        bench.commit(row, bench.table.lease(row, 1)[0], 5)
        bench.table.index_commits()
    bench.tables.corrupt[bench.find(5)] = 1
    bench.table.index_commits()
    assert bench.find(5) == 1


def test_the_least_recently_used_goes_first_and_what_is_held_never():
    bench = Bench(8)
    slots = bench.cached(*range(10, 18))
    bench.tables.used[slots[0]] = 100
    bench.tables.pins[C, slots[1]] = 1
    assert bench.table.evict(3) == 3
    assert [bench.find(key) >= 0 for key in range(10, 18)] == [True, True] + [False] * 3 + [
        True
    ] * 3
    assert bench.table.evictions == 3
    assert bench.table.evict(99) == 4
    assert bench.states().count("C") == 1
    assert bench.find(11) == slots[1]


def test_of_blocks_used_together_the_deeper_goes_first():
    bench = Bench(6)
    slots = bench.cached(*range(10, 16))
    bench.tables.used[slots] = 7
    bench.tables.position[slots] = (0, 1, 2, 0, 1, 2)
    bench.table.evict(3)
    assert [bench.find(10 + i) >= 0 for i in (0, 3)] == [True, True]
    assert sum(bench.find(10 + i) >= 0 for i in (1, 4)) == 1
    assert [bench.find(10 + i) >= 0 for i in (2, 5)] == [False, False]


def test_a_lease_evicts_just_what_it_lacks_and_never_for_more_than_the_quota():
    bench = Bench(8, fraction=0.5)
    bench.cached(*range(10, 14))
    bench.cached(*range(14, 18))
    assert bench.table.count(SlotState.FREE) == 0
    assert len(bench.table.lease(B, 3)) == 3
    assert bench.table.cached() == 5
    assert len(bench.table.lease(B, 3)) == 1
    assert bench.table.cached() == 4


def test_a_pin_within_the_grace_keeps_the_block():
    """The sleep stands for the time in which a reader's pin becomes visible."""

    def pin_the_second(seconds):
        assert seconds == 0.5
        assert bench.states() == ["E", "E", "E"]
        assert [bench.find(key) for key in (10, 11, 12)] == [-1, -1, -1]
        bench.tables.pins[B, 1] += 1

    bench = Bench(3, grace_s=0.5, sleep=pin_the_second)
    bench.cached(10, 11, 12)
    assert bench.table.evict(3) == 2
    assert bench.states() == ["F", "C", "F"]
    assert bench.find(11) == 1
    assert bench.find(10) == -1


def test_an_owner_leaves_its_commits_and_nothing_else():
    bench = Bench(8)
    mine = bench.table.lease(A, 4)
    bench.commit(A, mine[0], 5)
    bench.commit(A, mine[1], 6)
    kept = bench.table.lease(B, 2)
    assert bench.table.drop_owner(A) == 2
    assert bench.table.usage(A) == 0
    assert (bench.find(5), bench.find(6)) == (mine[0], mine[1])
    assert bench.table.cached() == 2
    assert not set(bench.table.lease(C, 4)) & {*kept, *mine[:2]}


def test_what_a_dead_owner_held_counts_as_used_at_its_end():
    bench = Bench(4, clock_ns=lambda: 50)
    slots = bench.cached(10, 11, 12, 13)
    bench.tables.used[slots] = (1, 2, 3, 4)
    bench.tables.pins[B, slots[0]] = 1
    bench.table.drop_owner(B)
    assert bench.tables.used[slots].tolist() == [50, 2, 3, 4]


def test_a_new_store_finds_everything_in_the_tables():
    bench = Bench(8)
    leased = bench.table.lease(A, 2)
    cached = bench.cached(10, 11, 12)
    (second,) = bench.table.lease(B, 1)
    bench.commit(B, second, 10)
    bench.tables.state[cached[1]] = SlotState.EVICTING  # a restart in the middle of an eviction
    bench.tables.corrupt[cached[2]] = 1
    bench.restart()
    assert bench.states() == ["L", "L", "C", "C", "C", "C", "F", "F"]
    assert bench.table.usage(A) == len(leased)
    assert bench.find(10) in (cached[0], second)
    assert bench.find(11) == cached[1]
    assert bench.find(12) == -1
    assert bench.table.duplicates() == 1
    assert bench.table.index_commits() == 0
    assert bench.table.drop_cache() >= 2
    bench.tables.pins[B] = 0
    bench.table.drop_cache()
    assert bench.states() == ["L", "L"] + ["F"] * 6


def test_a_flag_left_by_a_store_that_was_killed_does_not_spoil_the_next_block():
    bench = Bench(1)
    bench.tables.corrupt[0] = 1  # freed, and killed before the flag was cleared
    bench.restart()
    bench.cached(10)
    assert bench.find(10) == 0


def test_runs_are_kept_together():
    free = np.array([0, 1, 4, 5, 6, 9, 12, 13, 14, 15, 16])
    assert take_runs(free, 2).tolist() == [0, 1]
    assert take_runs(free, 1).tolist() == [9]
    assert take_runs(free, 3).tolist() == [4, 5, 6]
    assert take_runs(free, 4).tolist() == [12, 13, 14, 15]
    assert take_runs(free, 7).tolist() == [4, 5, 6, 12, 13, 14, 15]
    assert take_runs(free, 11).tolist() == take_runs(free, 50).tolist() == free.tolist()
    assert take_runs(free[:0], 3).tolist() == []


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_impossible_quotas_are_refused(fraction):
    with pytest.raises(KVStoreError):
        Bench(4, fraction)
