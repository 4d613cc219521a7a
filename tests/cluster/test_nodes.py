"""Two nodes: each has its own store, KV follows a stream from one to the other, and a node that is
lost costs no stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.two_nodes import TwoNodes, two_nodes

pytestmark = pytest.mark.cluster

TOKENS = 160
BEGINNING = "you will be surprised to hear from me so soon, but the news cannot wait: " * 6


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes(engine__kv_tokens=16 * 256, engine__max_num_seqs=32) as server:
        yield server


async def test_each_node_has_a_store_and_its_replica_uses_it(nodes):
    assert sorted(nodes.actors("KVStoreActor")) == sorted(nodes.node_ids)
    print(nodes._scrape())
