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


def test_released_content_is_found_until_its_memory_is_needed():
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.publish(block, key)
    pool.release([a, b])
    assert (pool.free_blocks, pool.cached_blocks) == (2, 2)
    assert pool.peek([b"a", b"b", b"c", b"d"]) == (3, 1)
    assert pool.match([b"a", b"x", b"b"]) == [a]
    assert pool.allocate(1) == [b]
    assert not pool.holds(b"b")
    assert pool.match([b"b"]) == []
    pool.check()


def test_of_a_chain_the_last_block_is_forgotten_first():
    pool = BlockPool(3)
    chain = pool.allocate(3)
    for i, block in enumerate(chain):
        pool.publish(block, bytes([i]))
    pool.release(chain)
    assert pool.allocate(1) == [chain[2]]
    assert pool.match([bytes([i]) for i in range(3)]) == chain[:2]


def test_the_first_to_publish_a_key_keeps_it():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.publish(a, b"k")
    pool.publish(b, b"k")
    pool.release([b])
    assert pool.cached_blocks == 0
    assert pool.match([b"k"]) == [a]
    pool.release([a, a])
    pool.clear()
    assert (pool.free_blocks, pool.cached_blocks) == (2, 0)
    with pytest.raises(ValueError):
        pool.publish(a, b"k")


OPERATIONS = ["allocate", "share", "release", "publish", "match", "clear"]


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7)), max_size=60))
def test_blocks_are_conserved_and_keys_are_true(operations):
    pool = BlockPool(8)
    held: list[int] = []
    content: dict[int, int] = {}
    """Block -> what was last written to it."""
    written = 0
    for what, n in operations:
        if what == "allocate":
            for block in pool.allocate(n) or []:
                assert block not in held
                held.append(block)
                written += 1
                content[block] = written
        elif what == "match":
            # Keys name the content, so whatever is found must still be it.
            keys = [bytes([content[b]]) for b in sorted(content)[n:]]
            for key, block in zip(keys, pool.match(keys), strict=False):
                assert key == bytes([content[block]])
                held.append(block)
        elif what == "clear":
            pool.clear()
        elif held and what == "share":
            held.append(held[n % len(held)])
            pool.share([held[-1]])
        elif held and what == "publish":
            block = held[n % len(held)]
            pool.publish(block, bytes([content[block]]))
        elif held:
            pool.release([held.pop(n % len(held))])
        pool.check()
        assert pool.free_blocks == 8 - len(set(held))
