"""The request tracker: every active request as one row of a structure of arrays.

The engine owns it and brings changed rows up to date before each plan; policies read it. A row is
a request's place only between two removals: the last row moves into the gap of a removed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.fairness import turns

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CODES = {state: code for code, state in enumerate(State)}

_COLUMNS = {
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
    "computed": np.int64,
    "held": np.int64,
    "shared": np.int64,
    "synced": np.int64,
    "resident": np.int64,
    "entered": np.int64,
}
# Those that are an attribute of the sequence.
_ATTRIBUTES = {
    "computed": "num_computed",
    "held": "num_blocks",
    "shared": "shared_blocks",
    "synced": "synced_blocks",
    "resident": "resident_tokens",
    "entered": "entered",
}


class Tracker:
    """Columns over the active requests, each of shape [len(tracker)]; do not write to them."""

    order: IntArray
    """The how-manieth request this engine was given."""
    arrival_s: FloatArray
    prompt: IntArray
    """Tokens of the prompt."""
    limit: IntArray
    """Most tokens it may generate in all."""
    tenant: IntArray
    """A number for each tenant."""
    elastic: BoolArray
    """Whether the consumer is no reader; its rate is then a reference that the engine moves."""
    paused: BoolArray
    """Whether the reader consumes nothing for now: its stream is served after all others."""
    rate: FloatArray
    """Reading speed, tokens/s."""
    due_s: FloatArray
    """When the reader needs a token that does not exist yet; -inf before the first token, inf
    while it is paused."""
    generated: IntArray
    """Tokens generated so far, those of another replica included."""
    state: NDArray[np.int8]
    """Codes of CODES."""
    slots: IntArray
    """Host slots held."""
    computed: IntArray
    """Tokens whose KV exists; of a waiting request, those a cache on the device has."""
    held: IntArray
    """Device blocks it holds, alone or with others."""
    shared: IntArray
    """Leading blocks of its text that others hold; it takes, or has taken, no memory for them."""
    synced: IntArray
    """Leading blocks whose copy on the host is complete."""
    resident: IntArray
    """Tokens generated since it last came onto the device."""
    entered: IntArray
    """The how-manieth entry onto the device was its last."""

    def __init__(self, capacity: int = 256) -> None:
        self.sequences: list[Sequence] = []
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros(capacity, dtype) for name, dtype in _COLUMNS.items()
        }
        """With room for more rows."""
        self._added = 0
        self._tenants: dict[str, int] = {}
        """Their codes."""
        self._of_tenant: Counter[str] = Counter()
        """Requests of each tenant that has any."""
        self._changed: dict[Sequence, None] = {}
        # Derived from the columns when first asked for: until any of them changes, until somebody
        # changes place, until a reader does, and until a row comes or goes.
        self._context: IntArray | None = None
        self._alone: IntArray | None = None
        self._rows: dict[State, IntArray] = {}
        self._running: IntArray | None = None
        self._waiting: IntArray | None = None
        self._arrived: IntArray | None = None
        self._claims: tuple[IntArray, FloatArray] | None = None
        self._in_turn: IntArray | None = None
        self._longest_first: IntArray | None = None
        self._forget_rows()

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
        for name, column in self._columns.items():
            setattr(self, name, column[: len(self.sequences)])
        self._context = self._alone = None
        self._arrived = self._longest_first = None
        self._forget_places()
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._claims = self._in_turn = None

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
        paused, elastic = columns["paused"][rows], columns["elastic"][rows]
        rate = columns["rate"][rows]
        for name, attribute in _ATTRIBUTES.items():
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
        read_on = paused == columns["paused"][rows]
        # Preempted and back within one step: the same state, another place in the order.
        stayed = (state == columns["state"][rows]) & (entered == columns["entered"][rows])
        if not (stayed & read_on).all():
            self._forget_places()
        read_on &= (rate == columns["rate"][rows]) & (elastic == columns["elastic"][rows])
        if not read_on.all():
            self._forget_readers()

    # -- the policies' side ---------------------------------------------------------------------

    @property
    def context(self) -> IntArray:
        """Tokens known: prompt and output."""
        if self._context is None:
            self._context = self.prompt + self.generated
        return self._context

    @property
    def blocks(self) -> IntArray:
        """Device blocks it holds alone: free when it leaves."""
        if self._alone is None:
            self._alone = np.maximum(self.held - self.shared, 0)
        return self._alone

    @staticmethod
    def code(state: State) -> int:
        return CODES[state]

    def rows(self, state: State) -> IntArray:
        """Rows of the sequences in `state`, ascending."""
        rows = self._rows.get(state)
        if rows is None:
            rows = self._rows[state] = (self.state == CODES[state]).nonzero()[0]
        return rows

    def running(self) -> IntArray:
        """Rows on the device, in the order they came onto it."""
        if self._running is None:
            rows = self.rows(State.RUNNING)
            self._running = rows[self.entered[rows].argsort()]
        return self._running

    def waiting(self) -> IntArray:
        """Rows without KV anywhere, in order of arrival; those whose reader pauses come last. Of
        several tenants, in turn by the tokens that each asks for."""
        if self._waiting is None:
            rows = self._waiting = self.rows(State.WAITING)
            if len(rows) < 2:
                return rows
            keys: list[NDArray[np.generic]] = [
                self.order[rows],
                self.arrival_s[rows],
                self.paused[rows],
            ]
            if self.shared_by_tenants:
                keys.insert(2, self._turns(self.prompt + self.limit)[rows])
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

    def claims(self) -> tuple[IntArray, FloatArray]:
        """The rows of those who do not pause, in turn, and what the readers up to and including
        each ask for together, tokens/s."""
        if self._claims is None:
            rows = self.in_turn()
            rows = rows[~self.paused[rows]]
            self._claims = rows, (self.rate[rows] * ~self.elastic[rows]).cumsum()
        return self._claims

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
            self._longest_first = (-self.limit).argsort(kind="stable")
        return self._longest_first

    def count(self, state: State) -> int:
        return len(self.rows(state))

    def take(self, rows: Collection[int] | IntArray) -> list[Sequence]:
        """The sequences of `rows`, in that order."""
        sequences = self.sequences
        if isinstance(rows, np.ndarray):
            rows = rows.tolist()
        return [sequences[row] for row in rows]
