"""A request inside the engine: its tokens, its blocks, its state, its reader.

Not here: decisions (scheduler/) and effects (engine.py). `Sequence.move` is the only way to change
a state, and ARCS the only place that says which changes exist.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.executor.base import UNKNOWN
from tokenflow.replicas.life import Life, Note
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.playback import STALL_EPSILON_S, Playback


class State(Enum):
    """Where a request's KV is, and so what may happen to it next."""

    WAITING = "waiting"
    """Holds no KV: new, or preempted for recompute."""
    RUNNING = "running"
    """Its KV is on the device; it may take part in steps."""
    OFFLOADING = "offloading"
    """Preempted; the rest of its KV is on its way to the host."""
    PREEMPTED = "preempted"
    """Its KV, or the leading part that was worth keeping, is on the host."""
    LOADING = "loading"
    """KV is on its way to its device blocks: its own, or a cached prefix of its text."""
    FINISHED = "finished"

    # The tracker looks up every sequence's state; an Enum would hash its name, in Python.
    __hash__ = object.__hash__


ARCS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.LOADING, State.FINISHED}),
    State.RUNNING: frozenset({State.OFFLOADING, State.PREEMPTED, State.WAITING, State.FINISHED}),
    State.OFFLOADING: frozenset({State.PREEMPTED, State.WAITING, State.FINISHED}),
    State.PREEMPTED: frozenset({State.LOADING, State.RUNNING, State.WAITING, State.FINISHED}),
    State.LOADING: frozenset({State.RUNNING, State.PREEMPTED, State.FINISHED}),
    State.FINISHED: frozenset(),
}


FIRST_REFERENCE = 20.0
"""Reference rate of a consumer that is no reader until the capacity is known, tokens/s."""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, as the engine takes it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    token_rate: float
    """Tokens per second the reader consumes; infinite = as fast as it can be had (no reader)."""
    resumed_ids: tuple[int, ...] = ()
    """Tokens another replica already delivered; generation continues after them."""
    consumed: int | None = None
    """How many of those its reader has consumed; None = all."""
    paused: bool = False
    """Whether its reader consumes nothing for now."""
    cache_salt: str | None = None
    """Only requests with the same salt share cached prefixes."""
    tenant: str = ""
    """Who takes turns with others where not everybody can be served at once."""
    arrival_s: float = field(default_factory=time.monotonic)
    """Engine clock."""
    traced: bool = False
    """Whether its events tell what happened to it (`TokenEvent.notes`)."""


@dataclass(frozen=True, slots=True)
class ReaderChange:
    """News of a request's reader; None = as it was."""

    token_rate: float | None = None
    """tokens/s; infinite = no reader."""
    paused: bool | None = None
    consumed: int | None = None
    """Tokens of the output that it has consumed by its own account."""


class Sequence:
    """A request in the engine. Mutated by the engine thread only."""

    __slots__ = (
        "arrival_s",
        "awaited",
        "block_ids",
        "buffers",
        "cached_tokens",
        "cancelled",
        "elastic",
        "entered",
        "first_token_s",
        "host_slots",
        "in_flight",
        "keys",
        "life",
        "num_blocks",
        "num_computed",
        "output_ids",
        "params",
        "playback",
        "preemptions",
        "prompt_ids",
        "request",
        "request_id",
        "resident_tokens",
        "root",
        "row",
        "sent_blocks",
        "shared_blocks",
        "slot",
        "state",
        "synced_blocks",
        "tokens",
    )

    def __init__(self, request: Request, max_blocks: int) -> None:
        self.request = request
        self.request_id = request.request_id
        self.params = request.params
        self.prompt_ids = request.prompt_ids
        self.output_ids: list[int] = list(request.resumed_ids)
        self.tokens: list[int] = [*request.prompt_ids, *request.resumed_ids]
        self.arrival_s = request.arrival_s
        self.state = State.WAITING
        self.life = Life() if request.traced else None
        self.note(State.WAITING.value)
        self.elastic = math.isinf(request.token_rate)
        """Whether its consumer is no reader: its rate is then a reference that moves with load."""
        self.playback = Playback(FIRST_REFERENCE if self.elastic else request.token_rate)
        self.row = -1
        """Its row in the tracker."""
        self.entered = 0
        """The how-manieth entry onto the device was its last."""
        self.first_token_s: float | None = None
        self.slot = -1
        """Row on the device while resident, else -1."""
        self.block_ids: NDArray[np.int32] = np.zeros(max_blocks, dtype=np.int32)
        """Device block table; the first `num_blocks` entries are held."""
        self.num_blocks = 0
        self.num_computed = 0
        """Tokens whose KV exists (on the device, or on the host while off it); while it waits,
        tokens that are believed to be cached on the device."""
        self.shared_blocks = 0
        """Leading blocks that others hold as well: they take no memory, and free none."""
        self.host_slots: list[int] = []
        """Host slots held, one per leading block."""
        self.sent_blocks = 0
        """Leading blocks whose copy to the host was started, or found there."""
        self.in_flight: set[int] = set()
        """Those of them whose copy has not ended."""
        self.synced_blocks = 0
        """Leading blocks whose copy on the host is complete."""
        self.root = b""
        """Parent of the first key."""
        self.keys: list[bytes] = []
        """Keys of leading full blocks, as far as they were needed (see prefix.py)."""
        self.cached_tokens = 0
        """Prompt tokens that a cache spared it before its first token."""
        self.buffers: list[int] = []
        """The reader's buffer just after each token, for effective throughput."""
        self.preemptions = 0
        self.resident_tokens = 0
        """Tokens generated since it last came onto the device."""
        self.cancelled = False
        self.awaited = False
        """Whether its last token is UNKNOWN: a step that draws it was launched."""

    def move(self, to: State) -> None:
        """Change state. Raises RuntimeError on a change ARCS does not list."""
        if to not in ARCS[self.state]:
            raise RuntimeError(f"{self.request_id}: no way from {self.state.name} to {to.name}")
        self.state = to
        self.note(to.value, computed_tokens=self.num_computed, output_tokens=self.drawn)

    def note(self, what: str, **values: float | str) -> None:
        """Something happens to it now, which a trace of it shows."""
        if self.life is not None:
            self.life.note(what, **values)

    def take_notes(self) -> tuple[Note, ...]:
        """Notes since the last call; none when it is not traced."""
        return () if self.life is None else self.life.take()

    def set_rate(self, token_rate: float, now: float) -> None:
        """Change the consumer's speed; infinite = no reader."""
        self.elastic = math.isinf(token_rate)
        if not self.elastic:
            self.playback.set_rate(token_rate, now)

    def read_before(self, now: float) -> None:
        """Bring the playback of a moved request to where its reader is."""
        request = self.request
        if request.resumed_ids:
            self.playback.generate(now, len(request.resumed_ids))
            consumed = request.consumed
            self.playback.report(len(request.resumed_ids) if consumed is None else consumed, now)
        if request.paused:
            self.playback.pause(now)

    @property
    def pending_tokens(self) -> int:
        """Tokens known but without KV: 1 for a decoding sequence, more while it prefills."""
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        return bool(self.output_ids) and self.pending_tokens == 1

    @property
    def drawn(self) -> int:
        """Tokens of the output that are known."""
        return len(self.output_ids) - self.awaited

    @property
    def remaining_tokens(self) -> int:
        """Tokens it may still generate."""
        return self.params.max_tokens - len(self.output_ids)

    def await_token(self) -> None:
        """A step was launched that draws its next token."""
        self.tokens.append(UNKNOWN)
        self.output_ids.append(UNKNOWN)
        self.awaited = True

    def append(self, token_id: int, now: float) -> None:
        """A token, the awaited one if there is one, was drawn at `now`."""
        if self.awaited:
            self.tokens[-1] = self.output_ids[-1] = token_id
            self.awaited = False
        else:
            self.tokens.append(token_id)
            self.output_ids.append(token_id)
        self.resident_tokens += 1
        if self.first_token_s is None:
            self.first_token_s = now
        stalled_s = -self.playback.stall_s
        self.playback.generate(now)
        stalled_s += self.playback.stall_s
        if stalled_s > STALL_EPSILON_S:
            self.note("stalled", seconds=stalled_s)
        self.buffers.append(self.playback.buffer(now))

    def add_blocks(self, block_ids: Seq[int]) -> None:
        n = self.num_blocks + len(block_ids)
        self.block_ids[self.num_blocks : n] = block_ids
        self.num_blocks = n

    def take_blocks(self) -> list[int]:
        """Give up the whole device block table."""
        blocks: list[int] = self.block_ids[: self.num_blocks].tolist()
        self.num_blocks = 0
        return blocks
