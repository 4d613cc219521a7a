"""What every target of a benchmark is: something that streams an answer into a record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenflow.loadgen.metrics import LEFT, StreamRecord
from tokenflow.loadgen.readers import Behaviour, ChangesSpeed, Disconnects, Pauses
from tokenflow.loadgen.workload import Ask
from tokenflow.replicas.errors import TokenFlowError

Clock = Callable[[], float]
"""Monotonic seconds."""


class TargetError(TokenFlowError):
    """A target cannot be benchmarked: it does not answer, refuses, or lacks what is needed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said before in a conversation."""

    asked: str
    answered: str


@dataclass(slots=True)
class Opened:
    """What is known of a target once it has answered."""

    name: str
    """Address, or machine."""
    model: str
    notes: list[str] = field(default_factory=list)
    """What the reader of the report must know, sentence by sentence."""


class Target(Protocol):
    """Streams answers. One object serves all requests of a run, on one event loop."""

    async def open(self) -> Opened:
        """Connect and look. Raises TargetError."""

    def build(self, ask: Ask) -> Any:
        """All of a request that can be made before it is due, so that making it delays nobody."""

    async def stream(self, ask: Ask, built: Any, history: Seq[Turn], record: StreamRecord) -> None:
        """Ask and fill the record as the answer comes in, `finished_s` at the end.

        Never raises for what the server or the network does: that is in `record.error`.
        """

    def asked(self, built: Any) -> str:
        """The text of a request that was built, for the turns after it."""

    async def sample(self) -> dict[str, float] | None:
        """How many requests wait, run and are preempted there now, by the target's own word; None
        where it has none."""

    async def close(self) -> None: ...


class Behaver:
    """Does what one client does in the middle of its answer."""

    __slots__ = ("_clock", "_done", "_what")

    def __init__(self, what: Behaviour | None, clock: Clock) -> None:
        self._what = what
        self._clock = clock
        self._done = what is None

    async def leaves(self, record: StreamRecord) -> bool:
        """To be awaited after each arrival. True when the client hangs up now; a client that
        pauses comes back from this later."""
        if self._done or record.tokens < self._what.after_tokens:  # type: ignore[union-attr]
            return False
        self._done = True
        match self._what:
            case Disconnects():
                record.finish_reason = LEFT
                return True
            case Pauses(seconds=seconds):
                begun = self._clock()
                await asyncio.sleep(seconds)
                record.pauses.append((begun, self._clock() - begun))
            case ChangesSpeed(token_rate=rate) if record.reads:
                record.rate_changes.append((self._clock(), rate))
        return False
