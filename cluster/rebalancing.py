"""Moving streams off replicas that are out of capacity: the policy, apart from Ray and clocks.

A stream is moved when it would be short of text for longer where it is than while it moves, and
only to a replica that keeps head-room with it. What follows from that: nothing moves between
replicas that are all full, or all have room; a move never overloads its target; and for a while a
stream that was moved stays, a replica that took streams sends none, and one that sent some takes
none. Each ingress runs the same policy on what all replicas report and carries out the moves of
its own streams, so that together they move as many as one would. [ours]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenflow.replicas.overload import Movable, OverloadReport


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica as it describes itself."""

    replica_id: str
    node_id: str
    report: OverloadReport


@dataclass(frozen=True, slots=True)
class Move:
    """A request, by its id on `source`, that is to go on at `target`."""

    request_id: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Limits:
    """When to move, and how much at once."""

    patience_s: float = 1.0
    """A replica must have been out of capacity for so long."""
    target_load: float = 0.8
    """Share of its capacity that a target may be asked for, with what it is sent."""
    least_gain_s: float = 1.0
    """A move must spare a reader that long a shortage of text."""
    fixed_s: float = 0.1
    """What a move takes whatever its size."""
    rest_s: float = 10.0
    """Time in which a replica that took streams sends none, and one that sent some takes none; what
    was sent counts as the target's for so long, whether it reports it or not."""
    stay_s: float = 30.0
    """A stream that was moved is not moved again for so long."""
    per_target: int = 4
    """Moves at once."""
    in_all: int = 16


@dataclass(slots=True)
class _Room:
    """What a target can still take in this round."""

    state: ReplicaState
    capacity: float
    rate: float
    tokens: int
    moves: int

    def takes(self, movable: Movable) -> bool:
        fits = self.rate >= movable.rate and self.tokens >= movable.need_tokens
        return self.moves > 0 and fits

    def take(self, movable: Movable) -> None:
        self.rate -= movable.rate
        self.tokens -= movable.need_tokens
        self.moves -= 1


@dataclass(frozen=True, slots=True)
class _Sent:
    at_s: float
    source: str
    target: str
    rate: float
    tokens: int


@dataclass(slots=True)
class Rebalancer:
    """Plans round by round; remembers what it has planned. `now` is any clock in seconds."""

    limits: Limits = field(default_factory=Limits)
    _short_since: dict[str, float] = field(default_factory=dict)
    _sent: dict[str, _Sent] = field(default_factory=dict)
    """The last move of each stream, for as long as it counts."""

    def plan(self, replicas: Sequence[ReplicaState], now: float) -> list[Move]:
        """The moves to make now, those who would be short of text for the longest first."""
        limits = self.limits
        self._forget(replicas, now)
        recent = [sent for sent in self._sent.values() if now - sent.at_s < limits.rest_s]
        took = {sent.target for sent in recent}
        sources = [
            state
            for state in replicas
            if state.replica_id not in took
            and now - self._short_since.get(state.replica_id, now) >= limits.patience_s
        ]
        if not sources:
            return []
        known = max(state.report.capacity for state in replicas)
        rooms = self._rooms(replicas, recent, known)
        waiting = [(movable, state) for state in sources for movable in state.report.movable]
        waiting.sort(key=lambda item: (item[0].buffer_s - item[0].wait_s, item[0].request_id))
        moves: list[Move] = []
        for movable, source in waiting:
            if len(moves) == limits.in_all:
                break
            stream = stream_of(movable.request_id)
            if stream in self._sent:
                continue
            room = self._best(rooms, movable, source)
            if room is None:
                continue
            room.take(movable)
            target = room.state.replica_id
            self._sent[stream] = _Sent(
                now, source.replica_id, target, movable.rate, movable.need_tokens
            )
            moves.append(Move(movable.request_id, source.replica_id, target))
        return moves

    def _forget(self, replicas: Sequence[ReplicaState], now: float) -> None:
        short = {state.replica_id for state in replicas if state.report.movable}
        self._short_since = {name: self._short_since.get(name, now) for name in short}
        kept = max(self.limits.stay_s, self.limits.rest_s)
        self._sent = {name: sent for name, sent in self._sent.items() if now - sent.at_s < kept}

    def _rooms(
        self, replicas: Sequence[ReplicaState], recent: Sequence[_Sent], known: float
    ) -> list[_Room]:
        """Replicas on which nobody waits, that sent nobody away lately, and their room."""
        limits = self.limits
        sent = {move.source for move in recent}
        rooms = []
        for state in replicas:
            report = state.report
            if report.movable or state.replica_id in sent:
                continue
            # One that has served nobody yet is taken to be like the others.
            capacity = report.capacity or known
            coming = [move for move in recent if move.target == state.replica_id]
            rooms.append(
                _Room(
                    state,
                    capacity,
                    limits.target_load * capacity - report.rate - sum(m.rate for m in coming),
                    report.room_tokens - sum(m.tokens for m in coming),
                    limits.per_target,
                )
            )
        return rooms

    def _best(self, rooms: Sequence[_Room], movable: Movable, source: ReplicaState) -> _Room | None:
        """Where the stream has its text soonest, if that is worth the move."""
        best: tuple[float, float, str] | None = None
        chosen = None
        for room in rooms:
            if not room.takes(movable):
                continue
            move_s = self._move_s(movable, source, room.state)
            gain_s = _short_s(movable, movable.wait_s) - _short_s(movable, move_s)
            if gain_s < self.limits.least_gain_s:
                continue
            rank = (move_s, -room.rate / room.capacity, room.state.replica_id)
            if best is None or rank < best:
                best, chosen = rank, room
        return chosen

    def _move_s(self, movable: Movable, source: ReplicaState, target: ReplicaState) -> float:
        """At most: KV is fetched only where that is faster than computing it."""
        if target.node_id == source.node_id:
            return self.limits.fixed_s
        token_s = target.report.prefill_s or source.report.prefill_s
        return self.limits.fixed_s + movable.kv_tokens * token_s


def stream_of(request_id: str) -> str:
    """The stream of an attempt: on each replica it has another number behind its id."""
    return request_id.rsplit("#", 1)[0]


def _short_s(movable: Movable, until_s: float) -> float:
    """Seconds without text for a reader whose next token comes in `until_s`."""
    return max(0.0, until_s - movable.buffer_s)
