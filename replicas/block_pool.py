"""The device's KV blocks: who holds which, and what the free ones still hold.

Pure bookkeeping, no tensors. A full block can be published under the key of its content (see
prefix.py); it is then found by `match`, also after its last holder let go, until the memory is
needed for something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq


class BlockPool:
    """A free list with reference counts over blocks `0 .. num_blocks - 1`.

    Every block is free, or held with a count of at least one; `check` proves it.
    """

    __slots__ = ("_block_of", "_cached", "_free", "_key_of", "_refs", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        """Free blocks whose content nobody can ask for."""
        self._cached: dict[int, None] = {}
        """Free blocks with a key, least recently used first."""
        self._refs = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def cached_blocks(self) -> int:
        """Those of them whose content can still be found."""
        return len(self._cached)

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks with a count of one each, or None (and no change) when fewer are free."""
        if n > self.free_blocks:
            return None
        if n <= 0:
            return []
        while len(self._free) < n:
            self._uncache(next(iter(self._cached)))
        blocks = self._free[-n:][::-1]
        del self._free[-n:]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder of each block. Raises ValueError for a free block."""
        for block in block_ids:
            if self._refs[block] < 1:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._refs[block] += 1

    def release(self, block_ids: Seq[int]) -> None:
        """One holder less of each block; at zero it is free. Raises ValueError for a free block.

        Of several the last is forgotten first: without the blocks before it, it is of no use.
        """
        for block in reversed(block_ids):
            if self._refs[block] < 1:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def holders(self, block: int) -> int:
        return self._refs[block]

    # -- content --------------------------------------------------------------------------------

    def publish(self, block: int, key: bytes) -> None:
        """`block` holds the content named `key` and will not be written again while it is held.

        Where another block already holds it, this one stays unnamed. Raises ValueError for a free
        block.
        """
        if self._refs[block] < 1:
            raise ValueError(f"block {block} is free and holds nothing")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def holds(self, key: bytes) -> bool:
        return key in self._block_of

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is here, each with one holder more."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def peek(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """What `match` would find: (blocks, how many of them somebody holds). Changes nothing."""
        found = held = 0
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found += 1
            held += self._refs[block] > 0
        return found, held

    def clear(self) -> None:
        """Forget all content that nobody holds."""
        for block in list(self._cached):
            self._uncache(block)

    def _uncache(self, block: int) -> None:
        del self._cached[block]
        del self._block_of[self._key_of.pop(block)]
        self._free.append(block)

    def check(self) -> None:
        """Raise RuntimeError unless every block is exactly free or held, and every key is true."""
        free = {*self._free, *self._cached}
        if len(free) != self.free_blocks:
            raise RuntimeError("a block is in the free list twice")
        for block, refs in enumerate(self._refs):
            if (block in free) == (refs > 0) or refs < 0:
                raise RuntimeError(
                    f"block {block} has {refs} holders, in free list: {block in free}"
                )
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise RuntimeError("keys and blocks do not agree")
        for block in self._free:
            if block in self._key_of:
                raise RuntimeError(f"block {block} has a key, yet it is not in the cache")
