"""A KV store and its replicas as real processes, to be killed: a script run by the process tests.

    kvstore_process.py store DIRECTORY SOCKET NUM_SLOTS
    kvstore_process.py replica SOCKET SEED ROUNDS

The store serves a `KVStoreActor` over a Unix socket in the place of Ray. A replica reads and writes
blocks whose bytes follow from their keys, more of them than the store has slots, and checks every
block it is given. It prints "ready" once it works, ends after so many rounds, but not before its
standard input does, and prints a line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import threading
import time
import uuid
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.control import StoreHungError, StoreUnavailableError
from tokenflow.kvstore.node import StoreConfig
from tokenflow.kvstore.segment import Segment
from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.transfers import Commit

SLOT_BYTES = 4096
CHAINS, DEPTH = 40, 4
HUNG_AFTER_S = 5.0


def serve(directory: str, socket: str, num_slots: int) -> None:
    from tokenflow.kvstore.actor import KVStoreActor  # imports Ray, which replicas do without

    config = StoreConfig(
        total_bytes=num_slots * SLOT_BYTES,
        slot_bytes=SLOT_BYTES,
        max_owner_fraction=0.6,
        directory=directory,
        poll_interval_s=0.001,
        reap_interval_s=0.05,
    )
    actor = KVStoreActor("node", config)
    guard = threading.Lock()  # an actor runs one call at a time
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)

    def answer(connection: Connection) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                method, args = connection.recv()
                try:
                    with guard:
                        result = getattr(actor, method)(*args)
                except KVStoreError as error:
                    result = error
                connection.send(result)

    with Listener(socket) as listener:
        while True:
            threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()


class SocketControl:
    """A `StoreControl` over the socket of `serve`."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._connection: Any = None
        self._owner_id = uuid.uuid4().hex
        self.info = self.call("register", self._owner_id, os.getpid())
        self.owner_index = self.info.owners[self._owner_id].index
        self._who = (self._owner_id, self.info.epoch)

    def lease(self, n: int) -> list[int]:
        return self.call("lease", *self._who, n)

    def release(self, slots: list[int]) -> None:
        self.call("release", *self._who, slots)

    def reattach(self, held: list[int]) -> None:
        self.call("reattach", *self._who, held)

    def poll(self) -> None:
        self.call("poll", self.info.epoch)

    def unregister(self) -> None:
        self.call("unregister", *self._who)

    def call(self, method: str, *args: object) -> Any:
        try:
            if self._connection is None:
                self._connection = Client(self._socket)
            self._connection.send((method, args))
            if not self._connection.poll(HUNG_AFTER_S):
                self._connection = None
                raise StoreHungError(f"no answer to {method} for {HUNG_AFTER_S:g} s")
            result = self._connection.recv()
        except (OSError, EOFError) as error:
            self._connection = None
            raise StoreUnavailableError(f"no store: {error!r}") from error
        if isinstance(result, KVStoreError):
            raise result
        return result


def key(chain: int, depth: int) -> bytes:
    return hashlib.blake2b(f"{chain}/{depth}".encode(), digest_size=16).digest()


def content(key: bytes) -> np.ndarray:
    """The bytes of the block with this key, u8 `[SLOT_BYTES]`."""
    return np.frombuffer(key * (SLOT_BYTES // len(key)), np.uint8)


def work(socket: str, seed: int, least: int) -> dict[str, Any]:
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), told.set()), daemon=True).start()
    control = SocketControl(socket)
    segment = Segment.attach(control.info.path, slot_bytes=SLOT_BYTES)
    header = segment.header
    data = np.frombuffer(segment._open_mapping(), np.uint8, offset=header.data_offset)
    data = data.reshape(header.num_slots, SLOT_BYTES)
    host = HostSlots(control, segment.tables(), control.info.owner_quota, retry_s=0.001)
    rng = random.Random(seed)
    rounds = wrong = 0
    print("ready", flush=True)
    while rounds < least or not told.is_set():
        rounds += 1
        chain = min(rng.randrange(CHAINS), rng.randrange(CHAINS))
        keys = [key(chain, depth) for depth in range(DEPTH)]
        found = host.match(keys)
        sums = host.checksums(found)
        missing = range(len(found), DEPTH)
        fresh = host.acquire(len(missing)) if missing else []
        for depth, slot in zip(missing, fresh or [], strict=False):
            data[slot] = content(keys[depth])
        if rounds % 2:
            time.sleep(0)
        for depth, slot in enumerate(found):
            expected = content(keys[depth])
            wrong += not np.array_equal(data[slot], expected) or sums[depth] != keys[depth][0]
        if fresh:
            host.commit(
                [
                    Commit(slot, keys[depth], str(seed), depth, keys[depth][0])
                    for depth, slot in zip(missing, fresh, strict=True)
                ]
            )
        host.release([*found, *(fresh or [])])
    stats = host.stats()
    host.close()
    return {
        "rounds": rounds,
        "wrong": wrong,
        "matched": stats.matched,
        "committed": stats.committed,
        "lost": stats.lost,
        "left": stats.held,
    }


if __name__ == "__main__":
    if sys.argv[1] == "store":
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        print(json.dumps(work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
