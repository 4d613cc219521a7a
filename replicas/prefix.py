"""Names for blocks of KV by what they were computed from.

A key stands for all tokens up to the end of its block, under one model, layout and salt. Two blocks
with the same key hold the same KV, whichever request, replica or turn of a chat computed them. What
a request cannot name it cannot find: a salt of its own keeps a tenant's prompts unseen by others.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Seq
from pathlib import Path

from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.executor.shapes import is_shape, shape_config

KEY_BYTES = 16
_ORDER = b"layer,kv,head,token,dim"
"""Of the elements within a block. A store outlives a replica, and the next one may be of another
version: blocks that it would read in the wrong order must not be found."""


def model_root(fingerprint: bytes, layout: KVLayout) -> bytes:
    """What all keys of one model in one layout begin from."""
    return _digest(fingerprint, repr(layout).encode() + _ORDER)


def salted(root: bytes, salt: str | None) -> bytes:
    """The parent of a request's first block."""
    if salt is None:
        return root
    # Clients choose their salts: hashed like a block, one that spells a block's tokens would be
    # that block's key.
    person = b"cache_salt"
    return hashlib.blake2b(root + salt.encode(), digest_size=KEY_BYTES, person=person).digest()


def extend_keys(
    keys: list[bytes], root: bytes, tokens: Seq[int], block_size: int, blocks: int
) -> None:
    """Grow `keys` to one per leading block of `tokens`, `blocks` in all; about 1 us each."""
    parent = keys[-1] if keys else root
    for i in range(len(keys), blocks):
        block = array("i", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        parent = _digest(parent, block)
        keys.append(parent)


def checkpoint_fingerprint(directory: str | Path) -> bytes:
    """Tells checkpoints apart by content, wherever they lie; a shape has the same random weights
    every time.

    Reads config.json, the safetensors headers (names, shapes, places of all tensors) and a sample
    of the weights, not all of them: that would take minutes for a large model.
    """
    if is_shape(directory):
        return _digest(b"shape", repr(shape_config(directory)).encode())
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    root = Path(directory)
    weights = [*root.glob("*.safetensors"), *root.glob("*.bin")]
    for path in [root / "config.json", *sorted(weights)]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def _digest(parent: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(parent + content, digest_size=KEY_BYTES).digest()
