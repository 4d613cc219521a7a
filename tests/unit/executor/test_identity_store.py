"""Greedy text is transformers' own through everything that can happen to KV on a node.

Two replicas on one store in real shared memory, shared prefixes, random preemption, a store that
starts anew, and memory that is not what it was.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.chaos import Chaos
from tests.support.engines import make_request
from tests.support.one_node import Node
from tests.support.tiny_models import make_checkpoint, reference

TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


def random_tokens(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 500, (n,), generator=generator).tolist()


def prompts():
    """Three families that begin alike, and some that are like nothing else."""
    common = [random_tokens(family, 60) for family in range(3)]
    alike = [[*common[i % 3], *random_tokens(100 + i, 3 + 5 * (i % 4))] for i in range(12)]
    return alike + [random_tokens(200 + i, 10 + 17 * i) for i in range(4)]


@pytest.mark.parametrize("restart_every", [0, 7])
def test_two_replicas_one_store_random_preemption_and_restarts(checkpoint, tmp_path, restart_every):
    node = Node(checkpoint, tmp_path, slots=160)
    for name in ("a", "b"):
        node.replica(name, blocks=36, policy=Chaos(name), verify_loads="full")
    for i, prompt in enumerate(prompts()):
        # Everybody asks twice, once on each replica and somebody else first.
        node.engines[i % 2].add(make_request(f"{i}", prompt, TOKENS, rate=2.0))
    out = node.run(restart_every)
    for i, prompt in enumerate(prompts()):
        node.engines[(i + 1) % 2].add(make_request(f"{i}-again", prompt, TOKENS, rate=2.0))
    out |= node.run(restart_every)
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == out[f"{i}-again"] == reference(checkpoint, prompt, TOKENS)
    stats = [engine.stats for engine in node.engines]
    for name in (
        "preempted_offload",
        "preempted_recompute",
        "resumes",
        "loaded_bytes",
        "recomputed_tokens",
        "prefix_device_hit_tokens",
        "prefix_host_hit_tokens",
    ):
        # By whom, the measured costs of copying and computing decide.
        assert sum(getattr(counted, name) for counted in stats) > 0, name
    assert all(s.corrupt_blocks == s.transfer_errors == 0 for s in stats)
    node.close()


def test_a_flipped_byte_in_the_segment_never_changes_a_text(checkpoint, tmp_path):
    node = Node(checkpoint, tmp_path, slots=120)
    engine = node.replica("a", blocks=80, policy=Chaos("a", 0.0), verify_loads="full")
    other = node.replica("b", blocks=80, policy=Chaos("b", 0.0), verify_loads="full")
    prompt = prompts()[15]
    engine.add(make_request("first", prompt, TOKENS, rate=1000.0))
    expected = reference(checkpoint, prompt, TOKENS)
    assert node.run()["first"] == expected
    memory = node.segments[0].tensor()
    committed = [slot for slot in range(120) if memory[slot].any()]
    for slot in committed:
        memory[slot, 1000 % memory.shape[1]] ^= 64
    other.add(make_request("second", prompt, TOKENS, rate=1000.0))
    assert node.run()["second"] == expected
    assert other.stats.corrupt_blocks > 0
    # Found out once, they are nobody's any more: the third finds only sound blocks.
    engine.kv.pool.clear()
    engine.add(make_request("third", prompt, TOKENS, rate=1000.0))
    assert node.run()["third"] == expected
    assert engine.stats.corrupt_blocks == 0
    del memory
    node.close()


def test_a_store_that_is_too_small_for_anybody_changes_no_text(checkpoint, tmp_path):
    node = Node(checkpoint, tmp_path, slots=12)
    for name in ("a", "b"):
        node.replica(name, blocks=36, policy=Chaos(name), verify_loads="full")
    for i, prompt in enumerate(prompts()):
        node.engines[i % 2].add(make_request(f"{i}", prompt, TOKENS, rate=2.0))
    out = node.run()
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(checkpoint, prompt, TOKENS)
    assert all(engine.stats.recomputed_tokens > 0 for engine in node.engines)
    node.close()
