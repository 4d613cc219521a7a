"""How much of a prompt came out of a cache, as the request is told with its first token."""

from __future__ import annotations

from array import array

import pytest

from tests.support.engines import fake_engine, make_request, run_to_end, tokens_of
from tests.support.fake_executor import expected_output
from tokenflow.replicas.engine import Engine

BLOCK = 4
PROMPT = list(range(1, 15))
"""Three full blocks and two tokens."""


def cached(engine: Engine, host, prompt: list[int] = PROMPT, **fields) -> int:
    """Serve one request to its end; its text is right, and what it reports is returned."""
    engine.add(make_request("r", prompt, 6, **fields))
    (events,) = run_to_end(engine, host).values()
    assert tokens_of(events) == expected_output(prompt, 6)
    assert all(event.cached_tokens == 0 for event in events[1:])
    return events[0].cached_tokens


def test_the_same_prompt_again_comes_out_of_the_cache():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    assert [cached(engine, host) for _ in range(3)] == [0, 12, 12]


def test_a_prompt_that_begins_alike_gets_what_is_alike():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    cached(engine, host)
    assert cached(engine, host, [*PROMPT[:9], 77, 78, 79, 80]) == 8
    assert cached(engine, host, [77, *PROMPT[1:]]) == 0


def test_at_least_one_token_is_computed():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    assert [cached(engine, host, PROMPT[:12]) for _ in range(2)] == [0, 8]


def test_a_prompt_shorter_than_a_block_is_never_cached():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    assert [cached(engine, host, PROMPT[: BLOCK - 1]) for _ in range(2)] == [0, 0]


def test_without_the_prefix_cache_nothing_is_cached():
    engine, _, host, _ = fake_engine(block_size=BLOCK, prefix_cache=False)
    assert [cached(engine, host) for _ in range(2)] == [0, 0]


def test_of_two_at_once_the_second_takes_what_the_first_computes():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    for name in "ab":
        engine.add(make_request(name, PROMPT, 6))
    events = run_to_end(engine, host)
    assert sorted(stream[0].cached_tokens for stream in events.values()) == [0, 12]


def test_what_the_host_has_counts_as_cached():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    cached(engine, host)
    engine.kv.pool.clear()
    assert cached(engine, host) == 12
    assert engine.stats.prefix_host_hit_tokens == 12


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_blocks_of_the_host_that_are_corrupt_are_not_counted(broken):
    engine, executor, host, _ = fake_engine(block_size=BLOCK, verify_loads="full")
    cached(engine, host)
    engine.kv.pool.clear()
    key = engine.kv.keys_of(tuple(PROMPT), None)[broken]
    executor.host[host.slot_of[key]] += 1
    assert cached(engine, host) == broken * BLOCK
    assert engine.stats.corrupt_blocks == 1


def test_a_moved_request_leaves_the_figure_to_where_it_began():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    cached(engine, host)
    engine.add(make_request("r", PROMPT, 6, resumed=expected_output(PROMPT, 6)[:2]))
    (events,) = run_to_end(engine, host).values()
    assert engine.stats.prefix_device_hit_tokens == 12
    assert [event.cached_tokens for event in events] == [0] * 4


def test_only_requests_with_the_same_salt_share():
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    salts = [None, "a", "b", "a", None, "b", ""]
    assert [cached(engine, host, salt=salt) for salt in salts] == [0, 0, 0, 12, 12, 12, 0]


def test_a_salt_that_spells_a_block_is_not_that_block():
    spelt = array("i", PROMPT[:BLOCK]).tobytes().decode()
    engine, _, host, _ = fake_engine(block_size=BLOCK)
    assert cached(engine, host) == 0
    assert cached(engine, host, PROMPT[BLOCK:], salt=spelt) == 0
