"""The device's KV blocks: who holds which. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """A free list with reference counts over blocks `0 .. num_blocks - 1`.

    Every block is free, or held with a count of at least one; `check` proves it.
    """

    __slots__ = ("_free", "_refs", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks with a count of one each, or None (and no change) when fewer are free."""
        if n > len(self._free):
            return None
        if n <= 0:
            return []
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

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder less of each block; at zero it is free. Raises ValueError for a free block."""
        for block in block_ids:
            if self._refs[block] < 1:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)

    def check(self) -> None:
        """Raise RuntimeError unless every block is exactly free or held."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a block is in the free list twice")
        for block, refs in enumerate(self._refs):
            if (block in free) == (refs > 0) or refs < 0:
                raise RuntimeError(
                    f"block {block} has {refs} holders, in free list: {block in free}"
                )
