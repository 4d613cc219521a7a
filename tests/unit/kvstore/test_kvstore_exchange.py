"""Blocks from store to store over loopback, and everything that can end a move in the middle."""

import contextlib
import hashlib
import socket
import threading
import time

import pytest
import xxhash

from tokenflow.kvstore import block_server, peer
from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import LocalStoreControl
from tokenflow.kvstore.exchange import Exchange
from tokenflow.kvstore.node import NodeStore, StoreConfig
from tokenflow.kvstore.peer import Endpoint
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit

SLOT_BYTES = 4096
SLOTS = 64
KEYS = [hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(SLOTS)]


def content(key):
    return key * (SLOT_BYTES // len(key))


class Node:
    """A store with one replica, and its door to the other node."""

    def __init__(self, name, directory, slots=SLOTS, slot_bytes=SLOT_BYTES):
        config = StoreConfig(
            slots * slot_bytes, slot_bytes, max_owner_fraction=1.0, directory=str(directory)
        )
        self.store = NodeStore.open(name, config)
        self.memory = self.store.memory()
        self.exchange = Exchange(self.store, "127.0.0.1")
        control = LocalStoreControl(self.store, "replica")
        self.replica = HostSlots(
            control, self.store.tables, slots, background=False, low_water=0, high_water=0
        )

    def at(self, slot):
        return self.memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]

    def write(self, keys, first=0):
        slots = self.replica.acquire(len(keys))
        for slot, key in zip(slots, keys, strict=True):
            self.at(slot)[:] = content(key)
        sums = [xxhash.xxh3_64_intdigest(self.at(slot)) for slot in slots]
        self.replica.commit(
            [
                Commit(slot, key, "r", first + i, checksum)
                for i, (slot, key, checksum) in enumerate(zip(slots, keys, sums, strict=True))
            ]
        )
        self.replica.release(slots)
        return slots

    def read(self, keys):
        """How many of `keys` are here; every one that is must have its content and checksum."""
        slots = self.replica.match(keys)
        sums = self.replica.checksums(slots)
        for slot, key, checksum in zip(slots, keys, sums, strict=False):
            assert self.at(slot) == content(key)
            assert checksum == xxhash.xxh3_64_intdigest(content(key))
        self.replica.release(slots)
        return len(slots)

    def fetch(self, keys, source, timeout_s=10.0):
        return self.exchange.fetch("f", keys, source, timeout_s)

    def check_nothing_held(self):
        """Neither pins nor leases: whatever was under way has given everything back."""
        deadline = time.monotonic() + 10
        while (info := self.store.info()).leased or info.pinned:
            assert time.monotonic() < deadline, info
            time.sleep(0.01)

    def close(self):
        self.exchange.close()
        self.replica.close()
        self.store.close()


@pytest.fixture
def node(tmp_path):
    nodes = []

    def make(*args, **kwargs):
        nodes.append(Node(f"n{len(nodes)}", tmp_path, *args, **kwargs))
        return nodes[-1]

    yield make
    for one in nodes:
        one.check_nothing_held()
        one.close()
        assert one.store.tables.pins.sum() == 0


@pytest.fixture(params=[1, 7, 4096])
def frame_blocks(request, monkeypatch):
    monkeypatch.setattr(block_server, "FRAME_BYTES", request.param * SLOT_BYTES)


def test_what_the_other_node_has_is_here_afterwards(node, frame_blocks):
    a, b = node(), node()
    a.write(KEYS[:20])
    result = b.fetch(KEYS, a.exchange.endpoint)
    assert (result.blocks, result.error) == (20, None)
    assert b.read(KEYS) == 20
    assert b.fetch(KEYS, a.exchange.endpoint).blocks == 0, "what is here is not sent again"
    assert a.exchange.stats().served_blocks == 20
    assert b.exchange.stats().fetched_blocks == 20


def test_only_the_part_that_is_missing_is_sent(node, frame_blocks):
    a, b = node(), node()
    a.write(KEYS[:20])
    b.write(KEYS[:12])
    assert b.fetch(KEYS[:15], a.exchange.endpoint).blocks == 3
    assert a.exchange.stats().served_blocks == 3
    assert b.read(KEYS) == 15
    positions = b.store.tables.position[b.store.tables.state == 2]
    assert sorted(positions) == list(range(15))


def test_a_chain_ends_where_the_source_has_evicted_a_block(node):
    a, b = node(), node()
    a.write(KEYS[:5])
    a.write(KEYS[6:10])
    result = b.fetch(KEYS[:10], a.exchange.endpoint)
    assert (result.blocks, result.error) == (5, None)


def test_a_full_node_takes_what_fits_and_nothing_of_its_own_goes(node, frame_blocks):
    a, b = node(), node(slots=16)
    a.write(KEYS[:20])
    b.write(KEYS[40:46])
    b.write(KEYS[:2])
    held = b.replica.match(KEYS[40:46])
    private = b.replica.acquire(4)
    result = b.fetch(KEYS[:20], a.exchange.endpoint)
    assert "no room" in result.error
    assert result.blocks == 4
    assert b.replica.match(KEYS[:20]) and b.read(KEYS[:20]) == 6, "its own blocks made no room"
    b.replica.release(b.replica.match(KEYS[:6]) * 2)
    b.replica.release(held + private)
    a.check_nothing_held()


def test_cached_blocks_make_room_for_what_is_fetched(node):
    a, b = node(), node(slots=16)
    a.write(KEYS[:10])
    b.write(KEYS[40:56])
    assert b.fetch(KEYS[:10], a.exchange.endpoint).blocks == 10
    assert b.read(KEYS[:10]) == 10


def test_a_block_that_is_not_what_was_written_is_not_shared(node, frame_blocks):
    a, b = node(), node()
    slots = a.write(KEYS[:20])
    a.at(slots[9])[100] ^= 1
    result = b.fetch(KEYS, a.exchange.endpoint)
    assert result.blocks == 9 and "block 9 of 64 did not arrive as it was written" in result.error
    assert b.read(KEYS) == 9
    assert b.exchange.stats().fetch_failures == 1


def test_blocks_without_a_checksum_are_taken_as_they_are(node):
    a, b = node(), node()
    (slot,) = a.replica.acquire(1)
    a.at(slot)[:] = content(KEYS[0])
    a.replica.commit([Commit(slot, KEYS[0], "r", 0, 0)])
    a.replica.release([slot])
    assert b.fetch(KEYS[:1], a.exchange.endpoint).blocks == 1
    (there,) = b.replica.match(KEYS[:1])
    assert b.at(there) == content(KEYS[0])
    b.replica.release([there])


def test_without_the_secret_nothing_is_sent(node):
    a, b = node(), node()
    a.write(KEYS[:5])
    real = a.exchange.endpoint
    result = b.fetch(KEYS, Endpoint(real.host, real.port, b"guessed"))
    assert result.blocks == 0 and result.error
    assert a.exchange.stats().served_blocks == 0
    deadline = time.monotonic() + 60
    while a.exchange.stats().serve_failures != 1:  # counted after the connection was cut
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "secret" not in repr(real).replace("secret=", "") and str(real.secret) not in repr(real)


def test_a_source_that_does_not_know_the_secret_is_not_believed(node):
    b = node()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(peer._MAGIC + bytes(16))
                connection.recv(1 << 16)
                connection.sendall(bytes(32) + peer._FRAME.pack(0))

        thread = threading.Thread(target=answer)
        thread.start()
        source = Endpoint("127.0.0.1", listener.getsockname()[1], b"x" * 32)
        assert "does not know" in b.fetch(KEYS, source).error
        thread.join()


def test_slots_of_another_size_are_refused(node):
    a, b = node(), node(slot_bytes=2 * SLOT_BYTES)
    result = b.fetch(KEYS, a.exchange.endpoint)
    assert result.blocks == 0 and result.error


def test_a_source_that_is_gone_fails_at_once(node):
    b = node()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    begun = time.monotonic()
    result = b.fetch(KEYS, Endpoint("127.0.0.1", port, b""))
    assert result.blocks == 0 and "refused" in result.error
    assert time.monotonic() - begun < 5


class Proxy:
    """Between two stores; stops after `limit` bytes from the source, as a dying machine would."""

    def __init__(self, source, limit, *, silent=False):
        self.stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.endpoint = Endpoint("127.0.0.1", port, source.secret)
        self._source, self._limit, self._silent = source, limit, silent
        self._release = threading.Event()
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self):
        client, _ = self._listener.accept()
        source = socket.create_connection((self._source.host, self._source.port))

        def up():
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 16):
                    source.sendall(data)

        thread = threading.Thread(target=up, daemon=True)
        thread.start()
        sent = 0
        while sent < self._limit:
            data = source.recv(min(1 << 12, self._limit - sent))
            client.sendall(data)
            sent += len(data)
        self.stopped.set()
        if self._silent:
            self._release.wait(30)
        for end in (client, source):
            with contextlib.suppress(OSError):  # its peer may have been first
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self):
        self._release.set()
        self._threads[0].join()
        self._listener.close()


@pytest.mark.parametrize("limit", [10, 200, 5000, 9 * SLOT_BYTES, 18 * SLOT_BYTES])
def test_a_source_that_dies_in_the_middle_leaves_whole_blocks_only(node, monkeypatch, limit):
    monkeypatch.setattr(block_server, "FRAME_BYTES", 4 * SLOT_BYTES)
    a, b = node(), node()
    a.write(KEYS[:20])
    proxy = Proxy(a.exchange.endpoint, limit)
    result = b.fetch(KEYS[:20], proxy.endpoint)
    proxy.close()
    assert result.error
    assert result.blocks == max(0, limit // SLOT_BYTES // 4 * 4)
    assert b.read(KEYS) == result.blocks
    a.check_nothing_held()
    b.check_nothing_held()


def test_a_source_that_falls_silent_is_given_up(node, monkeypatch):
    monkeypatch.setattr(peer, "IDLE_S", 0.2)
    a, b = node(), node()
    a.write(KEYS[:20])
    proxy = Proxy(a.exchange.endpoint, 3 * SLOT_BYTES, silent=True)
    result = b.fetch(KEYS[:20], proxy.endpoint)
    assert "timed out" in result.error
    proxy.close()


def test_a_fetch_ends_when_its_time_is_over_or_it_is_cancelled(node):
    a, b = node(), node()
    a.write(KEYS[:20])
    for end in ("time", "cancel", "close"):
        proxy = Proxy(a.exchange.endpoint, 3 * SLOT_BYTES, silent=True)
        results = []
        thread = threading.Thread(
            target=lambda proxy=proxy, results=results, end=end: results.append(
                b.fetch(KEYS[:20], proxy.endpoint, 0.3 if end == "time" else 20)
            )
        )
        begun = time.monotonic()
        thread.start()
        assert proxy.stopped.wait(5)
        b.exchange.cancel("another one")
        if end == "cancel":
            b.exchange.cancel("f")
        elif end == "close":
            b.exchange.close()
        thread.join(2.5)
        assert not thread.is_alive() and time.monotonic() - begun < 2.5
        assert results[0].error
        proxy.close()


def test_a_reader_that_dies_in_the_middle_holds_no_pin(node, monkeypatch):
    monkeypatch.setattr(block_server, "FRAME_BYTES", 4 * SLOT_BYTES)
    a = node()
    a.write(KEYS)
    connection = socket.create_connection((a.exchange.endpoint.host, a.exchange.endpoint.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.ask(connection, a.exchange.endpoint.secret, SLOT_BYTES, KEYS, time.monotonic() + 5)
    connection.close()
    a.check_nothing_held()


def test_more_peers_than_can_be_served_at_once_wait_for_their_turn(node):
    a, b = node(), node(slots=1024)
    a.write(KEYS)
    results = []
    threads = [
        threading.Thread(
            target=lambda i=i: results.append(
                b.exchange.fetch(str(i), KEYS, a.exchange.endpoint, 20)
            )
        )
        for i in range(3 * block_server.MAX_CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.error for r in results] == [None] * len(threads)
    assert b.read(KEYS) == SLOTS


def test_a_store_without_data_has_no_door():
    with pytest.raises(KVStoreError, match="no data"):
        Exchange(NodeStore.in_memory(4), "127.0.0.1")
