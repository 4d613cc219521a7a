"""A store's door for other nodes' stores: reads of committed blocks over TCP.

Blocks are pinned for as long as the frame they are in is being sent, a frame at a time, straight
from the segment. `send` copies them into the socket: with sendfile the kernel would go on reading
from the slot after it returned, when another block may be in it.

Threads of its own serve the connections, so that no control call of the store waits for a peer.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from tokenflow.kvstore.client import HostSlots
from tokenflow.kvstore.peer import IDLE_S, Endpoint, PeerError, hear, runs, send, send_head

logger = logging.getLogger(__name__)

FRAME_BYTES = 8 << 20
"""Blocks pinned at one time for one peer, in bytes; one block at least."""
_MAX_FRAME_BLOCKS = 4096
MAX_CONNECTIONS = 4
"""Peers served at one time; others wait in the listen queue."""


@dataclass(slots=True)
class ServedStats:
    """Counters since the start."""

    blocks: int = 0
    failures: int = 0
    """Connections that ended before their last frame, or never got as far."""


class BlockServer:
    """Serves until `close`. `slots` holds the pins, `memory` is the data area of its segment."""

    def __init__(
        self, slots: HostSlots, memory: memoryview, slot_bytes: int, host: str, port: int = 0
    ) -> None:
        """Listen on `host`, an address that the other nodes reach. Raises OSError."""
        self.stats = ServedStats()
        self._slots = slots
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._frame_blocks = max(1, min(FRAME_BYTES // slot_bytes, _MAX_FRAME_BLOCKS))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=64)
        self.endpoint = Endpoint(
            host, int(self._listener.getsockname()[1]), secrets.token_bytes(32)
        )
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="kv-block-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut off whoever is being served; their pins are gone when it
        returns. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        # Closing alone would not wake the thread that waits in `accept`.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for _ in range(MAX_CONNECTIONS):
            self._free.acquire(timeout=2 * IDLE_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._free.acquire()
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                self._free.release()
                if not self._closing.wait(0.1):  # say, out of file descriptors
                    logger.warning("KV store: cannot accept a peer: %s", error)
                continue
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection, peer), name="kv-block-send", daemon=True
            ).start()

    def _serve(self, connection: socket.socket, peer: object) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keys = hear(connection, self.endpoint.secret, self._slot_bytes)
                self._send_blocks(connection, keys)
        except Exception as error:  # whatever it was, it must not end the server
            with self._lock:
                self.stats.failures += 1
            if not self._closing.is_set():
                expected = isinstance(error, PeerError)
                logger.warning("KV store: peer %s: %s", peer, error, exc_info=not expected)
        finally:
            with self._lock:
                self._connections.discard(connection)
            self._free.release()

    def _send_blocks(self, connection: socket.socket, keys: list[bytes]) -> None:
        """The longest prefix of `keys` that is there, as far as the peer takes it."""
        for i in range(0, len(keys), self._frame_blocks):
            wanted = keys[i : i + self._frame_blocks]
            slots = self._slots.match(wanted)
            try:
                if slots:
                    # Progress is enough: a slow peer may take as long as it likes.
                    send_head(connection, self._slots.checksums(slots), time.monotonic() + IDLE_S)
                    for piece in runs(self._memory, slots, self._slot_bytes):
                        send(connection, piece, float("inf"))
            finally:
                self._slots.release(slots)
            with self._lock:
                self.stats.blocks += len(slots)
            if len(slots) < len(wanted):
                break
        send_head(connection, (), time.monotonic() + IDLE_S)
