"""A move between the stores of two processes, one of which is killed in the middle of it."""

import hashlib
import pickle
import subprocess
import sys

import pytest
import xxhash

from tokenflow.kvstore import block_fetch, block_server
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.exchange import Exchange
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.replicas.transfers import Commit

SLOT_BYTES = 1 << 20
BLOCKS = 64
KEYS = [hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(BLOCKS)]

# Serves what it has written, or fetches from the endpoint that it is given.
CHILD = """
import pickle, sys
from tests.unit.kvstore.test_kvstore_exchange_kill import KEYS, start, write
store, exchange = start("child", sys.argv[1])
if sys.argv[2] == "serve":
    write(store)
    sys.stdout.buffer.write(pickle.dumps(exchange.endpoint))
    sys.stdout.flush()
    sys.stdin.read()
else:
    exchange.fetch("f", KEYS, pickle.load(sys.stdin.buffer), 30.0)
"""


def start(name, directory):
    config = StoreConfig(
        2 * BLOCKS * SLOT_BYTES, SLOT_BYTES, max_owner_fraction=1.0, directory=str(directory)
    )
    store = NodeStore.open(name, config)
    return store, Exchange(store, "127.0.0.1")


def write(store):
    """All of KEYS, cached."""
    host = HostSlots(LocalStoreControl(store, "writer"), store.tables, BLOCKS, background=False)
    memory = store.memory()
    slots = host.acquire(BLOCKS)
    blocks = []
    for i, (slot, key) in enumerate(zip(slots, KEYS, strict=True)):
        block = memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        block[:] = key * (SLOT_BYTES // len(key))
        blocks.append(Commit(slot, key, "r", i, xxhash.xxh3_64_intdigest(block)))
    host.commit(blocks)
    host.close()


@pytest.fixture
def node(tmp_path):
    store, exchange = start("parent", tmp_path)
    yield store, exchange
    info = store.info()
    assert (info.leased, info.pinned) == (0, 0)
    exchange.close()
    store.close()


@pytest.fixture
def child(tmp_path):
    children = []

    def spawn(what):
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(tmp_path), what],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        return children[-1]

    yield spawn
    for process in children:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_the_source_is_killed_in_the_middle(node, child, monkeypatch):
    store, exchange = node
    source = child("serve")
    endpoint = pickle.load(source.stdout)
    pieces = []
    receive = block_fetch.receive

    def then_kill(connection, view, deadline_s):
        receive(connection, view, deadline_s)
        pieces.append(len(view))
        if len(pieces) == 2:
            source.kill()
            source.wait()

    monkeypatch.setattr(block_fetch, "receive", then_kill)
    result = exchange.fetch("f", KEYS, endpoint, 30.0)
    assert result.error
    assert 16 <= result.blocks < BLOCKS
    info = store.info()
    assert (info.leased, info.pinned, info.cached) == (0, 0, result.blocks)
    memory = store.memory()
    for slot in (store.tables.state == 2).nonzero()[0].tolist():
        key = store.tables.keys[slot].tobytes()
        assert memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] == key * (SLOT_BYTES // 16)


def test_the_reader_is_killed_in_the_middle(node, child, monkeypatch):
    store, exchange = node
    write(store)
    reader = child("fetch")
    pieces = []
    send = block_server.send

    def then_kill(connection, view, deadline_s):
        assert store.info().pinned > 0, "what is being sent is pinned"
        pieces.append(len(view))
        if len(pieces) == 3:
            reader.kill()
            reader.wait()
        send(connection, view, deadline_s)

    monkeypatch.setattr(block_server, "send", then_kill)
    pickle.dump(exchange.endpoint, reader.stdin)
    reader.stdin.flush()
    reader.wait(60)
    exchange.close()  # waits for whoever is being served
    assert len(pieces) >= 3
    assert exchange.stats().serve_failures == 1
    assert exchange.stats().served_blocks < BLOCKS
