"""The shared tables of a store: what every slot is, who holds it, and where to look for a key.

Columns of numpy over one buffer, mapped by the store and by every replica. Nothing here decides
anything (see `slots` for the store's side, `client` for a replica's); this is the layout, the
states, and the rule that lets many processes work on it without a lock:

**Every cell has one writer at a time.** A slot's cells belong to the store, except while it is
LEASED: then they belong to the replica in `owner`, whose last write is the state COMMITTED. Row i
of `pins` belongs to replica i for as long as that lives. `corrupt` is set by whoever holds a pin
and cleared by the store when nobody does. Any reader may write `used`; any of the values will do.

**Pinning against evicting.** A reader adds its pin, *then* looks at state and key, in this order,
and takes the pin back if they are not what it wants. The store writes EVICTING, waits a grace
period, *then* looks at the pins. A processor may show a store to others late, by nanoseconds, at
worst microseconds; a grace of milliseconds is beyond that. So if the reader still saw COMMITTED,
its pin, written before that look, is seen by the store after the grace, and the slot stays. If the
pin came too late to be seen, the look came later still and found EVICTING. The key is read after
the state because a slot that is COMMITTED once more under another key had its key written first.
This last relies on stores being seen in the order they were made, as x86-64 has it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

KEY_BYTES = 16
OWNER_ID_BYTES = 64
MAX_PINS = 65535
MAX_MEMBERS = 63
"""Processes of an owner besides its first."""
_ALIGN = 64
"""Columns begin on a cache line."""


class SlotState(IntEnum):
    """FREE -> LEASED -> COMMITTED -> EVICTING -> FREE, and back from LEASED and from EVICTING."""

    FREE = 0
    LEASED = 1
    """Private to one replica, which fills it."""
    COMMITTED = 2
    """Holds the KV of its key and never changes again; whoever pins it may read."""
    EVICTING = 3
    """Nobody may pin it any more; for the length of the grace period."""


class Tables:
    """Typed views of one buffer; all zero is a valid table in which every slot is FREE.

    Over N slots: `state` u8, `owner` u8, `corrupt` u8, `keys` u64 [N, 2], `checksum` u64,
    `request` u64 (hash of the id of the request that wrote the block, for people who look), `used`
    i64 (monotonic clock, ns), `position` u32 (index of the block in its sequence), `pins` u16
    [owners, N]. Over owners: `owner_id` (64 bytes), `owner_pid` i64, `owner_started` i64 (clock
    ticks since boot), `owner_active` u8; `member_pid` and `member_started` i64 [owners, 63] name
    further processes that copy into its slots, 0 where there is none: the owner writes them while
    it is active, the store before. `cells` i32 is the hash table of `index`. `store` i64 [3] says
    which process is the store: pid, start ticks, and its `incarnation`.
    """

    def __init__(self, buffer: Any, num_slots: int, max_owners: int, *, offset: int = 0) -> None:
        """View `buffer` (writable, `offset` a multiple of 64) of at least `nbytes` behind it."""
        self.num_slots = num_slots
        self.max_owners = max_owners
        columns, size = _columns(num_slots, max_owners)
        # `frombuffer` holds on to the buffer, so that a mapping cannot be closed underneath its
        # columns; `ndarray(buffer=...)` only keeps the object.
        raw = np.frombuffer(buffer, np.uint8, size, offset)
        views = {
            name: raw[begin : begin + int(np.prod(shape)) * np.dtype(dtype).itemsize]
            .view(dtype)
            .reshape(shape)
            for name, (begin, dtype, shape) in columns.items()
        }
        self.state: NDArray[np.uint8] = views["state"]
        self.owner: NDArray[np.uint8] = views["owner"]
        self.corrupt: NDArray[np.uint8] = views["corrupt"]
        self.keys: NDArray[np.uint64] = views["keys"]
        self.checksum: NDArray[np.uint64] = views["checksum"]
        self.request: NDArray[np.uint64] = views["request"]
        self.used: NDArray[np.int64] = views["used"]
        self.position: NDArray[np.uint32] = views["position"]
        self.pins: NDArray[np.uint16] = views["pins"]
        self.cells: NDArray[np.int32] = views["cells"]
        self.owner_id: NDArray[np.bytes_] = views["owner_id"]
        self.owner_pid: NDArray[np.int64] = views["owner_pid"]
        self.owner_started: NDArray[np.int64] = views["owner_started"]
        self.owner_active: NDArray[np.uint8] = views["owner_active"]
        self.member_pid: NDArray[np.int64] = views["member_pid"]
        self.member_started: NDArray[np.int64] = views["member_started"]
        self.store: NDArray[np.int64] = views["store"]

    @classmethod
    def in_memory(cls, num_slots: int, max_owners: int) -> Tables:
        """Fresh tables in plain memory, for one process."""
        return cls(bytearray(cls.nbytes(num_slots, max_owners)), num_slots, max_owners)

    @staticmethod
    def nbytes(num_slots: int, max_owners: int) -> int:
        return _columns(num_slots, max_owners)[1]

    @property
    def incarnation(self) -> int:
        """Grows each time a store takes these tables over."""
        return int(self.store[2])

    def counts(self) -> dict[str, int]:
        """Slots by what they are: free, leased, pinned (committed and held), cached (committed).

        About a millisecond for 262144 slots; a slot on its way between two states may be missed.
        """
        states = np.bincount(self.state, minlength=len(SlotState))
        pinned = int(((self.state == SlotState.COMMITTED) & self.pinned()).sum())
        return {
            "free": int(states[SlotState.FREE]),
            "leased": int(states[SlotState.LEASED]),
            "pinned": pinned,
            "cached": max(0, int(states[SlotState.COMMITTED]) - pinned),
        }

    def pinned(self) -> BoolArray:
        """Whether anybody holds a pin, bool [N]."""
        held = np.zeros(self.num_slots, np.bool_)
        for row in np.flatnonzero(self.owner_active):
            held |= self.pins[row] != 0
        return held


def _columns(
    num_slots: int, max_owners: int
) -> tuple[dict[str, tuple[int, str, tuple[int, ...]]], int]:
    """(name -> (offset, dtype, shape), bytes in all)."""
    n, owners = (num_slots,), (max_owners,)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "store": ("<i8", (3,)),
        "owner_id": (f"S{OWNER_ID_BYTES}", owners),
        "owner_pid": ("<i8", owners),
        "owner_started": ("<i8", owners),
        "owner_active": ("u1", owners),
        "member_pid": ("<i8", (max_owners, MAX_MEMBERS)),
        "member_started": ("<i8", (max_owners, MAX_MEMBERS)),
        "state": ("u1", n),
        "owner": ("u1", n),
        "corrupt": ("u1", n),
        "keys": ("<u8", (num_slots, 2)),
        "checksum": ("<u8", n),
        "request": ("<u8", n),
        "used": ("<i8", n),
        "position": ("<u4", n),
        "pins": ("<u2", (max_owners, num_slots)),
        # A quarter full at most: probes stay short and a rebuild pays for N removals or more.
        "cells": ("<i4", (1 << (4 * num_slots - 1).bit_length(),)),
    }
    columns = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        columns[name] = (offset, dtype, shape)
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        offset += -(-size // _ALIGN) * _ALIGN
    return columns, offset
