"""The hash table of keys: what is in it is found, what is not is not, and each key once."""

import random
import struct

import numpy as np
import pytest

from tokenflow.kvstore.index import IndexReader, IndexWriter
from tokenflow.kvstore.tables import Tables


def make(num_slots):
    tables = Tables.in_memory(num_slots, 1)
    return tables, IndexReader(tables), IndexWriter(tables)


def array(*slots):
    return np.array(slots, np.int64)


def test_added_slots_are_found_by_their_key_and_removed_ones_are_not():
    tables, reader, writer = make(8)
    tables.keys[:, 0] = np.arange(8) * 1_000_003
    tables.keys[:, 1] = np.arange(8)
    assert reader.find(0, 0) == -1
    assert not writer.add(np.arange(6)).any()
    for slot in range(8):
        assert reader.find(slot * 1_000_003, slot) == (slot if slot < 6 else -1)
        assert reader.find(slot * 1_000_003, slot + 1) == -1
    writer.remove(array(2, 7))
    assert reader.find(2 * 1_000_003, 2) == -1
    assert reader.find(3 * 1_000_003, 3) == 3
    assert writer.holds(np.arange(8)).tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_keys_that_collide_are_kept_apart_also_when_one_goes():
    tables, reader, writer = make(8)
    tables.keys[:, 0] = len(tables.cells) - 1  # all begin in the last cell and wrap round
    tables.keys[:, 1] = np.arange(8)
    assert not writer.add(np.arange(8)).any()
    writer.remove(array(0, 3, 4))
    found = [reader.find(len(tables.cells) - 1, i) for i in range(8)]
    assert found == [-1, 1, 2, -1, -1, 5, 6, 7]
    writer.add(array(3))
    assert reader.find(len(tables.cells) - 1, 3) == 3


def test_a_key_is_indexed_once_whether_it_comes_later_or_beside():
    tables, reader, writer = make(6)
    tables.keys[:, 0] = (7, 7, 9, 7, 9, 5)
    assert not writer.add(array(0)).any()
    refused = writer.add(array(1, 2, 3, 4, 5))
    assert refused[[0, 2]].all() and not refused[4]
    assert refused[[1, 3]].sum() == 1
    assert reader.find(7, 0) == 0
    assert reader.find(9, 0) in (2, 4)
    writer.remove(array(0))
    assert reader.find(7, 0) == -1
    assert not writer.add(array(3)).any()
    assert reader.find(7, 0) == 3


@pytest.mark.parametrize("spread", [1, 2, 1 << 40])
def test_a_long_life_against_a_dictionary(spread):
    """Removed cells fill the table over and over, so that it is rebuilt; also with bad hashes."""
    num_slots = 40
    tables, reader, writer = make(num_slots)
    rng = random.Random(spread)
    where = {}
    for _ in range(600):
        free = [s for s in range(num_slots) if s not in where.values()]
        chosen = rng.sample(free, rng.randint(0, len(free)))
        for slot in chosen:
            tables.keys[slot] = (rng.randrange(60) * spread, 3)
        refused = writer.add(np.array(chosen, np.int64))
        for slot, no in zip(chosen, refused, strict=True):
            key = int(tables.keys[slot, 0])
            if no:
                assert key in where or key in [int(tables.keys[s, 0]) for s in chosen if s != slot]
            else:
                assert key not in where
                where[key] = slot
        gone = rng.sample(sorted(where), rng.randint(0, len(where)))
        writer.remove(np.array([where.pop(key) for key in gone], np.int64))
        for key in range(60):
            assert reader.find(key * spread, 3) == where.get(key * spread, -1)
    assert (tables.cells > 0).sum() == len(where)


def test_a_rebuild_knows_the_slots_it_was_given_and_no_other():
    tables, reader, writer = make(5)
    tables.keys[:, 0] = (1, 2, 3, 3, 4)
    writer.add(array(0, 1))
    assert writer.rebuild(array(1, 2, 3)).sum() == 1
    assert reader.find(1, 0) == -1
    assert reader.find(2, 0) == 1
    assert reader.find(3, 0) in (2, 3)
    assert (tables.cells == -1).sum() == 0


def test_a_key_read_as_two_words_is_the_digest():
    tables, reader, writer = make(1)
    key = bytes(range(16))
    tables.keys[0] = struct.unpack("<QQ", key)
    writer.add(array(0))
    assert tables.keys[0].tobytes() == key
    assert reader.find(*struct.unpack("<QQ", key)) == 0
