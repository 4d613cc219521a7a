"""The host side of KV copies: slots of whole blocks, of which a rank of a divided model has a part.

Only where the bytes are and what their checksums are; who copies when is in block_copies.py.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
import xxhash

from tokenflow.replicas.errors import KVStoreError
from tokenflow.replicas.executor.parallel.sharding import Shard

logger = logging.getLogger("tokenflow.engine")


class HostMemory:
    """The host side. Raises KVStoreError on use when there is none."""

    def __init__(
        self, host: torch.Tensor | None, shard: Shard | None = None, block_bytes: int = 0
    ) -> None:
        """`host` is uint8 `[slots, slot_bytes]`, contiguous. A rank's `block_bytes` of a slot lie
        behind those of the ranks before it. Raises KVStoreError when the parts of all ranks are not
        a slot."""
        self.divided = shard is not None
        self._bytes: np.ndarray | None = None if host is None else host.numpy()
        self._part = host
        if host is not None and shard is not None:
            if host.shape[1] != shard.size * block_bytes:
                raise KVStoreError(
                    f"host slots of {host.shape[1]} bytes do not hold the {block_bytes} bytes that "
                    f"each of {shard.size} ranks has of a block; make them for this model, block "
                    "size and dtype"
                )
            first = shard.rank * block_bytes
            self._part = host[:, first : first + block_bytes]

    @property
    def tensor(self) -> torch.Tensor:
        """What is copied from and to, uint8 `[slots, block_bytes]`."""
        if self._part is None:
            raise KVStoreError("this executor has no host memory to copy to")
        return self._part

    def checksums(self, slots: Seq[int]) -> tuple[int, ...]:
        """Of whole slots."""
        assert self._bytes is not None
        return tuple(xxhash.xxh3_64_intdigest(self._bytes[slot]) for slot in slots)

    def corrupt(self, slots: Seq[int], expected: Seq[int | None]) -> tuple[int, ...]:
        """Places in the job whose bytes are not what they were."""
        checked = [i for i, checksum in enumerate(expected) if checksum is not None]
        found = self.checksums([slots[i] for i in checked])
        return tuple(
            i for i, checksum in zip(checked, found, strict=True) if checksum != expected[i]
        )

    def to_come(self, expected: Seq[int | None] | None) -> tuple[int, ...] | None:
        """`CopyDone.checksums` of a copy that ended; `expected` None is one to the host."""
        return None if expected is None and not self.divided else ()


def pin(host: torch.Tensor) -> torch.Tensor | None:
    """Page-lock the host memory in place, so that the copy engines reach it at full speed.

    None when it is pinned already or cannot be: copies then work, at a fraction of the rate.
    """
    if host.is_pinned():
        return None
    size = host.numel() * host.element_size()
    begun = time.perf_counter()
    error = _code(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0))  # type: ignore[attr-defined]
    if error != 0:
        logger.warning(
            "cannot page-lock %.1f GiB of host KV (CUDA error %d): copies will be slow and hold up "
            "the engine; raise the locked-memory limit (ulimit -l, in a container --ulimit "
            "memlock=-1)",
            size / 2**30,
            error,
        )
        # CUDA keeps the error for whoever asks next, which is the next kernel's launch.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)
        return None
    logger.info(
        "page-locked %.1f GiB of host KV in %.1f s", size / 2**30, time.perf_counter() - begun
    )
    return host


def unpin(host: torch.Tensor) -> None:
    error = _code(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))  # type: ignore[attr-defined]
    if error != 0:
        logger.warning("cannot unlock the host KV's pages (CUDA error %d)", error)


def _code(error: Any) -> int:
    """The number of a `cudaError`, whichever kind of enumeration torch makes it."""
    return int(getattr(error, "value", error))
