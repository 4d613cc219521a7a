"""The device block pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.replicas.block_pool import BlockPool


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.free_blocks == 4
    assert len(set(pool.allocate(4))) == 4
    assert pool.allocate(1) is None


def test_shared_blocks_stay_until_the_last_holder_lets_go():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert pool.free_blocks == 1
    pool.release([block])
    assert pool.free_blocks == 2


def test_releasing_or_sharing_a_free_block_is_an_error():
    pool = BlockPool(1)
    with pytest.raises(ValueError):
        pool.release([0])
    with pytest.raises(ValueError):
        pool.share([0])


@given(st.lists(st.tuples(st.sampled_from(["alloc", "share", "release"]), st.integers(0, 7))))
def test_blocks_are_conserved(operations):
    pool = BlockPool(8)
    held: list[int] = []
    for what, n in operations:
        if what == "alloc":
            held += pool.allocate(n) or []
        elif held and what == "share":
            held.append(held[n % len(held)])
            pool.share([held[-1]])
        elif held:
            pool.release([held.pop(n % len(held))])
        pool.check()
        assert pool.free_blocks == 8 - len(set(held))
