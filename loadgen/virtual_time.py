"""An event loop on a virtual clock: timers cost no time, and what is timed is exact.

For programs whose two ends of every connection are on this one loop, as the self-test's client and
server: time jumps to the next timer as soon as no socket has anything to say.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_SETTLE_S = 0.0005
"""Real seconds a socket gets to deliver before time moves on. Loopback delivers at once."""


class _Selector(selectors.DefaultSelector):
    """Waits for sockets hardly at all, and moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(_SETTLE_S)
        if not ready:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` begins at 0 and only moves when everybody waits for a timer."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
