"""The request tracker: every active request as one row of a structure of arrays.

The engine owns it and brings changed rows up to date before each plan; policies read it. A row is
a request's place only between two removals: the last row moves into the gap of a removed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.fairness import turns

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CODES = {state: code for code, state in enumerate(State)}

# Columns that change while a request lives, and where they come from.
_INTS = {
    "computed": "num_computed",
    "held": "num_blocks",
    "shared": "shared_blocks",
    "synced": "synced_blocks",
    "resident": "resident_tokens",
    "entered": "entered",
}


class Tracker:
    """Columns over the active requests, each of shape [len(tracker)]; do not write to them."""

    def __init__(self, capacity: int = 256) -> None:
        self.sequences: list[Sequence] = []
        self._columns: dict[str, NDArray[np.generic]] = {}
        for name, dtype in {
            "order": np.int64,
            "arrival_s": np.float64,
            "prompt": np.int64,
            "limit": np.int64,
            "tenant": np.int64,
            "elastic": np.bool_,
            "paused": np.bool_,
            "rate": np.float64,
            "due_s": np.float64,
            "generated": np.int64,
            "state": np.int8,
            "slots": np.int64,
            **dict.fromkeys(_INTS, np.int64),
        }.items():
            self._columns[name] = np.zeros(capacity, dtype)
        self._added = 0
        self._tenants: dict[str, int] = {}
        """Their codes."""
        self._of_tenant: Counter[str] = Counter()
        """Requests of each tenant that has any."""
        self._changed: dict[Sequence, None] = {}
        # Derived from the columns when first asked for: until any of them changes, until somebody
        # changes place, and until a row comes or goes.
        self._context: IntArray | None = None
        self._alone: IntArray | None = None
        self._rows: dict[State, IntArray] = {}
        self._running: IntArray | None = None
        self._waiting: IntArray | None = None
        self._views: dict[str, NDArray[np.generic]] = {}
        self._arrived: IntArray | None = None
        self._in_turn: IntArray | None = None
        self._longest_first: IntArray | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    # -- the engine's side ----------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """A new row for `seq`."""
        row = len(self.sequences)
        if row == len(self._columns["state"]):
            for name, column in self._columns.items():
                self._columns[name] = np.concatenate([column, np.zeros_like(column)])
        self.sequences.append(seq)
        seq.row = row
        self._columns["order"][row] = self._added
        self._columns["arrival_s"][row] = seq.arrival_s
        self._columns["prompt"][row] = len(seq.prompt_ids)
        self._columns["limit"][row] = seq.params.max_tokens
        tenant = seq.request.tenant
        self._columns["tenant"][row] = self._tenants.setdefault(tenant, len(self._tenants))
        self._of_tenant[tenant] += 1
        self._added += 1
        self.touch(seq)
        self._forget_rows()

    def remove(self, seq: Sequence) -> None:
        """Drop the row of `seq`. Raises ValueError when it has none."""
        row, last = seq.row, len(self.sequences) - 1
        if not 0 <= row <= last or self.sequences[row] is not seq:
            raise ValueError(f"{seq.request_id} is not tracked")
        if row != last:
            for column in self._columns.values():
                column[row] = column[last]
            self.sequences[row] = self.sequences[last]
            self.sequences[row].row = row
        del self.sequences[last]
        seq.row = -1
        tenant = seq.request.tenant
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        self._changed.pop(seq, None)
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._context = self._alone = None
        self._arrived = self._in_turn = self._longest_first = None
        self._views.clear()
        self._forget_places()

    def _forget_places(self) -> None:
        self._running = self._waiting = None
        self._rows.clear()

    def touch(self, seq: Sequence) -> None:
        """`seq` has changed; its row follows at the next `refresh`."""
        self._changed[seq] = None

    def refresh(self) -> None:
        """Bring the rows of touched sequences up to date."""
        seqs = self._changed
        if not seqs:
            return
        n = len(seqs)
        rows = np.fromiter(map(attrgetter("row"), seqs), np.int64, n)
        columns = self._columns
        state, entered = columns["state"][rows], columns["entered"][rows]
        paused = columns["paused"][rows]
        for name, attribute in _INTS.items():
            columns[name][rows] = np.fromiter(map(attrgetter(attribute), seqs), np.int64, n)
        columns["generated"][rows] = [len(seq.output_ids) for seq in seqs]
        columns["slots"][rows] = [len(seq.host_slots) for seq in seqs]
        columns["state"][rows] = [CODES[seq.state] for seq in seqs]
        columns["elastic"][rows] = [seq.elastic for seq in seqs]
        columns["paused"][rows] = [seq.playback.paused for seq in seqs]
        columns["rate"][rows] = [seq.playback.rate for seq in seqs]
        columns["due_s"][rows] = [seq.playback.due_s for seq in seqs]
        seqs.clear()
        self._context = self._alone = None
        moved = state != columns["state"][rows]
        # Preempted and back within one step: the same state, another place in the order.
        moved |= entered != columns["entered"][rows]
        moved |= paused != columns["paused"][rows]
        if moved.any():
            self._forget_places()
            if self.shared_by_tenants:
                self._in_turn = None

    # -- the policies' side ---------------------------------------------------------------------

    def _ints(self, name: str) -> IntArray:
        return self._view(name)  # type: ignore[return-value]

    def _floats(self, name: str) -> FloatArray:
        return self._view(name)  # type: ignore[return-value]

    def _view(self, name: str) -> NDArray[np.generic]:
        column = self._views.get(name)
        if column is None:
            column = self._views[name] = self._columns[name][: len(self.sequences)]
        return column

    @property
    def order(self) -> IntArray:
        """The how-manieth request this engine was given."""
        return self._ints("order")

    @property
    def arrival_s(self) -> FloatArray:
        return self._floats("arrival_s")

    @property
    def rate(self) -> FloatArray:
        """Reading speed, tokens/s."""
        return self._floats("rate")

    @property
    def due_s(self) -> FloatArray:
        """When the reader needs a token that does not exist yet; -inf before the first token, inf
        while it is paused."""
        return self._floats("due_s")

    @property
    def paused(self) -> BoolArray:
        """Whether the reader consumes nothing for now: its stream is served after all others."""
        return self._view("paused")  # type: ignore[return-value]

    @property
    def elastic(self) -> BoolArray:
        """Whether the consumer is no reader; its rate is then a reference that the engine moves."""
        return self._view("elastic")  # type: ignore[return-value]

    @property
    def tenant(self) -> IntArray:
        """A number for each tenant."""
        return self._ints("tenant")

    @property
    def limit(self) -> IntArray:
        """Most tokens it may generate in all."""
        return self._ints("limit")

    @property
    def generated(self) -> IntArray:
        """Tokens generated so far, those of another replica included."""
        return self._ints("generated")

    @property
    def context(self) -> IntArray:
        """Tokens known: prompt and output."""
        if self._context is None:
            self._context = self._ints("prompt") + self._ints("generated")
        return self._context

    @property
    def computed(self) -> IntArray:
        """Tokens whose KV exists; of a waiting request, those a cache on the device has."""
        return self._ints("computed")

    @property
    def blocks(self) -> IntArray:
        """Device blocks it holds alone: free when it leaves."""
        if self._alone is None:
            held = np.maximum(self._ints("held") - self._ints("shared"), 0)
            self._alone = held
        return self._alone

    @property
    def held(self) -> IntArray:
        """Device blocks it holds, alone or with others."""
        return self._ints("held")

    @property
    def shared(self) -> IntArray:
        """Leading blocks of its text that others hold; it takes, or has taken, no memory for
        them."""
        return self._ints("shared")

    @property
    def synced(self) -> IntArray:
        """Leading blocks whose copy on the host is complete."""
        return self._ints("synced")

    @property
    def slots(self) -> IntArray:
        """Host slots held."""
        return self._ints("slots")

    @property
    def resident(self) -> IntArray:
        """Tokens generated since it last came onto the device."""
        return self._ints("resident")

    @property
    def entered(self) -> IntArray:
        """The how-manieth entry onto the device was its last."""
        return self._ints("entered")

    @property
    def state(self) -> NDArray[np.int8]:
        """Codes of CODES."""
        return self._view("state")  # type: ignore[return-value]

    @staticmethod
    def code(state: State) -> int:
        return CODES[state]

    def rows(self, state: State) -> IntArray:
        """Rows of the sequences in `state`, ascending."""
        rows = self._rows.get(state)
        if rows is None:
            rows = self._rows[state] = np.flatnonzero(self.state == CODES[state])
        return rows

    def running(self) -> IntArray:
        """Rows on the device, in the order they came onto it."""
        if self._running is None:
            rows = self.rows(State.RUNNING)
            self._running = rows[np.argsort(self.entered[rows])]
        return self._running

    def waiting(self) -> IntArray:
        """Rows without KV anywhere, in order of arrival; those whose reader pauses come last. Of
        several tenants, in turn by the tokens that each asks for."""
        if self._waiting is None:
            rows = self.rows(State.WAITING)
            keys: list[NDArray[np.generic]] = [
                self.order[rows],
                self.arrival_s[rows],
                self.paused[rows],
            ]
            if self.shared_by_tenants:
                keys.insert(2, self._turns(self._ints("prompt") + self.limit)[rows])
            self._waiting = rows[np.lexsort(keys)]
        return self._waiting

    def in_turn(self) -> IntArray:
        """All rows in the order in which rates are promised: of arrival, or of several tenants in
        turn by the rates that each asks for."""
        if self._in_turn is None:
            keys: list[NDArray[np.generic]] = [self.order, self.arrival_s]
            if self.shared_by_tenants:
                keys.append(self._turns(self.rate * ~self.paused))
            self._in_turn = np.lexsort(keys)
        return self._in_turn

    @property
    def shared_by_tenants(self) -> bool:
        """Whether there are requests of several tenants."""
        return len(self._of_tenant) > 1

    def requests_of(self, tenant: str) -> int:
        """Active requests of a tenant; safe from any thread."""
        return self._of_tenant[tenant]

    def _turns(self, cost: IntArray | FloatArray) -> FloatArray:
        return turns(self.tenant, self.arrived(), cost.astype(np.float64))

    def arrived(self) -> IntArray:
        """All rows in order of arrival."""
        if self._arrived is None:
            self._arrived = np.lexsort((self.order, self.arrival_s))
        return self._arrived

    def longest_first(self) -> IntArray:
        """All rows, the highest limit first."""
        if self._longest_first is None:
            self._longest_first = np.argsort(-self.limit, kind="stable")
        return self._longest_first

    def count(self, state: State) -> int:
        return len(self.rows(state))

    def take(self, rows: Collection[int] | IntArray) -> list[Sequence]:
        """The sequences of `rows`, in that order."""
        sequences = self.sequences
        if isinstance(rows, np.ndarray):
            rows = rows.tolist()
        return [sequences[row] for row in rows]
