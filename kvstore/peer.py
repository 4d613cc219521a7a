"""What two stores say to each other: the frames of a move and the handshake before it.

Over one TCP connection a store asks another for the blocks of a chain of keys:

    server: greeting   magic, nonce
    client: request    nonce, proof, slot size, number of keys; the keys
    server: proof
    server: frames     number of blocks n, n checksums, n blocks; the last one has n = 0

Each side proves that it knows the server's secret, which travels by another way (see `actor`), and
never here. What follows is not encrypted: like Ray's own transfers it belongs on a network that
only the cluster sees. Integers are little-endian. Who holds which slot is not known here (see
`block_server`, `block_fetch`).
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tokenflow.kvstore.tables import KEY_BYTES
from tokenflow.replicas.errors import KVStoreError

MAX_KEYS = 1 << 20
"""Keys in one request; a million blocks are more than any sequence has."""
HANDSHAKE_S = 2.0
"""Longest time for the greeting and the request."""
IDLE_S = 3.0
"""A peer from which, or into which, no byte moves for so long is taken for dead."""

_MAGIC = b"TFKVPEER1"
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_REQUEST = struct.Struct("<QI")
_FRAME = struct.Struct("<I")
_SEND_BYTES = 1 << 20


class PeerError(KVStoreError):
    """The other store did not answer, went away, or is not what it should be."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a store can be asked for blocks, and the secret that opens it."""

    host: str
    port: int
    secret: bytes = field(repr=False)


def receive(connection: socket.socket, view: memoryview, deadline_s: float) -> None:
    """Fill `view`. Raises PeerError when the peer ends, is idle for IDLE_S, or at `deadline_s`
    (monotonic clock)."""
    while len(view):
        connection.settimeout(_patience(deadline_s))
        try:
            got = connection.recv_into(view)
        except OSError as error:
            raise PeerError(f"the connection to the other KV store failed: {error}") from error
        if not got:
            raise PeerError("the other KV store closed the connection")
        view = view[got:]


def send(connection: socket.socket, view: memoryview | bytes, deadline_s: float) -> None:
    """Send all of `view`; errors as in `receive`."""
    view = memoryview(view)
    while len(view):
        connection.settimeout(_patience(deadline_s))
        try:
            view = view[connection.send(view[:_SEND_BYTES]) :]
        except OSError as error:
            raise PeerError(f"the connection to the other KV store failed: {error}") from error


def ask(
    connection: socket.socket,
    secret: bytes,
    slot_bytes: int,
    keys: Sequence[bytes],
    deadline_s: float,
) -> None:
    """The client's side of the handshake; frames follow. Raises PeerError."""
    deadline_s = min(deadline_s, time.monotonic() + HANDSHAKE_S)
    greeting = _take(connection, len(_MAGIC) + _NONCE_BYTES, deadline_s)
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise PeerError("what answers there is not a KV store of this version")
    nonces = greeting[len(_MAGIC) :] + secrets.token_bytes(_NONCE_BYTES)
    body = _REQUEST.pack(slot_bytes, len(keys)) + b"".join(keys)
    proof = _proof(secret, b"client", nonces + body)
    send(connection, nonces[_NONCE_BYTES:] + proof + body, deadline_s)
    answer = _take(connection, _PROOF_BYTES, deadline_s)
    if not hmac.compare_digest(answer, _proof(secret, b"server", nonces)):
        raise PeerError("what answers there does not know the other KV store's secret")


def hear(connection: socket.socket, secret: bytes, slot_bytes: int) -> list[bytes]:
    """The server's side: the keys that are asked for. Raises PeerError for whoever does not know
    the secret or has slots of another size."""
    deadline_s = time.monotonic() + HANDSHAKE_S
    ours = secrets.token_bytes(_NONCE_BYTES)
    send(connection, _MAGIC + ours, deadline_s)
    theirs = _take(connection, _NONCE_BYTES, deadline_s)
    proof = _take(connection, _PROOF_BYTES, deadline_s)
    request = _take(connection, _REQUEST.size, deadline_s)
    wanted, count = _REQUEST.unpack(request)
    if count > MAX_KEYS:
        raise PeerError(f"a peer asks for {count} keys, at most {MAX_KEYS} are allowed")
    keys = _take(connection, count * KEY_BYTES, deadline_s)
    if not hmac.compare_digest(proof, _proof(secret, b"client", ours + theirs + request + keys)):
        raise PeerError("a peer does not know this KV store's secret")
    if wanted != slot_bytes:
        raise PeerError(
            f"a peer has slots of {wanted} bytes, this KV store of {slot_bytes}; serve one model, "
            "block size and dtype on all nodes"
        )
    send(connection, _proof(secret, b"server", ours + theirs), deadline_s)
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def send_head(connection: socket.socket, checksums: Sequence[int], deadline_s: float) -> None:
    """Begin a frame; its blocks follow."""
    n = len(checksums)
    send(connection, _FRAME.pack(n) + struct.pack(f"<{n}Q", *checksums), deadline_s)


def receive_head(connection: socket.socket, most: int, deadline_s: float) -> tuple[int, ...]:
    """Checksums of the blocks that follow, at most `most`; empty at the end. Raises PeerError."""
    (n,) = _FRAME.unpack(_take(connection, _FRAME.size, deadline_s))
    if n > most:
        raise PeerError(f"the other KV store sends {n} blocks, at most {most} were asked for")
    return struct.unpack(f"<{n}Q", _take(connection, 8 * n, deadline_s))


def runs(memory: memoryview, slots: Sequence[int], slot_bytes: int) -> Iterator[memoryview]:
    """The memory of `slots` in their order, neighbours as one piece."""
    begin = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1:
            yield memory[slots[begin] * slot_bytes : (slots[i - 1] + 1) * slot_bytes]
            begin = i


def _patience(deadline_s: float) -> float:
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise PeerError("the other KV store took too long")
    return min(left, IDLE_S)


def _take(connection: socket.socket, n: int, deadline_s: float) -> bytes:
    buffer = bytearray(n)
    receive(connection, memoryview(buffer), deadline_s)
    return bytes(buffer)


def _proof(secret: bytes, side: bytes, content: bytes) -> bytes:
    return hmac.digest(secret, side + content, "sha256")
