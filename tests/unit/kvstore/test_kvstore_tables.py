"""The layout of the shared tables: columns that do not touch, on every size."""

import numpy as np
import pytest

from tokenflow.kvstore.tables import SlotState, Tables


def columns(tables):
    return {name: a for name, a in vars(tables).items() if isinstance(a, np.ndarray)}


@pytest.mark.parametrize(("slots", "owners"), [(1, 1), (5, 32), (64, 3), (1000, 256)])
def test_columns_are_aligned_apart_and_inside_the_buffer(slots, owners):
    size, offset = Tables.nbytes(slots, owners), 128
    buffer = bytearray(offset + size + 1)
    tables = Tables(buffer, slots, owners, offset=offset)
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    end = start + offset
    by_address = sorted(columns(tables).items(), key=lambda item: item[1].ctypes.data)
    for name, column in by_address:
        begin = column.ctypes.data
        assert begin >= end, name
        assert (begin - start) % 64 == 0
        assert column.flags.c_contiguous and column.flags.writeable
        end = begin + column.nbytes
    assert end <= start + offset + size
    assert len(columns(tables)) == 17
    assert tables.pins.shape == (owners, slots)
    assert tables.keys.shape == (slots, 2)
    assert len(tables.cells) >= 2 * slots and len(tables.cells).bit_count() == 1


def test_two_views_of_one_buffer_are_one_table():
    buffer = bytearray(Tables.nbytes(7, 2))
    ours, theirs = Tables(buffer, 7, 2), Tables(buffer, 7, 2)
    assert (ours.state == SlotState.FREE).all()
    for i, (name, column) in enumerate(columns(theirs).items()):
        column[...] = str(i).encode() if name == "owner_id" else i
    for i, (name, column) in enumerate(columns(ours).items()):
        assert (column == (str(i).encode() if name == "owner_id" else i)).all(), name
    assert ours.incarnation == list(columns(ours)).index("store")


def test_pinned_counts_the_rows_of_living_owners_only():
    tables = Tables.in_memory(4, 3)
    tables.owner_active[:] = (1, 0, 1)
    tables.pins[0, 1] = 1
    tables.pins[1, 2] = 1
    tables.pins[2, 3] = 65535
    assert tables.pinned().tolist() == [False, True, False, True]


def test_counts_are_by_what_a_slot_is():
    tables = Tables.in_memory(20, 2)
    tables.owner_active[1] = 1
    tables.state[:3] = SlotState.LEASED
    tables.state[3:8] = SlotState.COMMITTED
    tables.state[8] = SlotState.EVICTING
    tables.pins[1, 2:5] = 1
    assert tables.counts() == {"free": 11, "leased": 3, "pinned": 2, "cached": 3}
