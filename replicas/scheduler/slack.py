"""Slack: the device goes to the readers who will run dry first, and is never left half empty.

A stream's slack is the time until its reader needs a token that does not exist yet. A stream with
much slack can leave the device unnoticed; the memory it frees gives a late request its first token.
The rules, in seconds rather than tokens so that they hold for every rate:

1. A stream comes back when its slack falls to `resume_slack_s` plus the time its load takes. It may
   then take the place of one that has more than `victim_slack_s`, covers its own switch twice over
   and is `margin_s` better off (the hysteresis).
2. While anybody is off the device, a stream is *held*, out of the batch, once its buffer covers a
   tenth of its output: what comes then is worth less to its reader than what another could be
   given. Anyone who lacks `refill` of that buffer may take the place of a held stream.
3. What the readers leave of the device goes to the longest outputs, which run ahead; and a stream
   with so much left that it would end alone, after all others, runs first (*late*).
4. Readers are promised their rate in order of arrival, up to LOAD_FACTOR of the capacity. Those
   beyond are *parked*: they run on what the promised ones leave and are first to make room.
5. A step carries no more prompt tokens than its readers' slack allows. Only where readers ask for
   more than can be promised do prompts get most of the device all the same.
6. Of several tenants each is promised its share (fairness.py). Where there is not enough for all,
   those that a share covers are *favoured*: they come first, others leave at once for them, and
   what their first tokens wait for is kept short (sharing.py).

A reader who pauses has no need of tokens: its stream comes onto the device only when nobody else
wants it, and is the first to leave.

An output's length is what is expected of it (lengths.py). Consumers that are no readers are never
held; their rate is a reference that the engine moves with the load. docs/scheduling.md has the
picture.
[TokenFlow §4.1-§4.3; the rules are ours]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.capacity import (
    LOAD_FACTOR,
    Load,
    capacity,
    sustained,
    unpromised,
)
from tokenflow.replicas.scheduler.playback import FULL_WEIGHT_SHARE
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch, decode_batch
from tokenflow.replicas.scheduler.sharing import share_step, within_share
from tokenflow.replicas.scheduler.tracker import BoolArray, FloatArray, IntArray

_PREFILL_SHARE = 4.0
"""While prompts wait on an overloaded device, a step may last this many times its decoding."""


@dataclass(frozen=True, slots=True)
class SlackParams:
    """Tunables; seconds where the name says so."""

    resume_slack_s: float = 1.0
    victim_slack_s: float = 2.0
    margin_s: float = 1.0
    refill: float = 0.25
    """Share of the useful buffer that must be missing before a stream displaces a held one."""
    late_reserve: float = 0.5
    """A stream is late when its own remaining steps, and this share of them again for the times
    that it cannot run, outlast the remaining work."""
    min_residency_tokens: int = 8
    """Tokens a stream generates on the device before it can be a victim again."""
    growth_steps: int = 8
    """Steps of growth of the running streams that an admission leaves free."""


class SlackPolicy:
    """See the module."""

    name = "slack"
    write_through = True

    def __init__(self, params: SlackParams | None = None) -> None:
        self.params = params or SlackParams()

    def plan(self, view: View, now: float) -> Plan:
        return _Pass(self.params, view, now).run()


class _Outlook:
    """What each stream needs, from the present state alone. Arrays over all rows."""

    def __init__(self, params: SlackParams, view: View, running: IntArray, now: float) -> None:
        tracker = view.tracker
        self.slack: FloatArray = tracker.due_s - now
        self.length = length = view.lengths.expected(tracker.limit, tracker.generated)
        self.remaining: IntArray | FloatArray = length - tracker.generated
        useful = FULL_WEIGHT_SHARE * length
        room = useful - np.maximum(self.slack, 0.0) * tracker.rate
        self.hungry: BoolArray = room >= params.refill * useful
        """Lacks enough of its useful buffer to be worth a switch."""
        self.gains: BoolArray = room > 0
        """Its next token counts in full."""
        self.late: BoolArray = np.zeros(len(tracker), bool)
        self.parked: BoolArray = self.late
        gamma = capacity(tracker, view.cost, view.kv_tokens, view.max_num_seqs, length)
        self.favoured: BoolArray = self.late
        self.favouring = False
        """Whether there is anybody to favour."""
        if tracker.shared_by_tenants:
            self.favoured = within_share(view, self.remaining)
            self.favouring = bool(self.favoured.any())
        self.load = Load(gamma)
        if math.isinf(gamma):
            return
        gives = sustained(gamma, view.cost, view.lengths.prompts_per_output)
        first = self.favoured if self.favouring else None
        parked = unpromised(tracker, LOAD_FACTOR * gives, first)
        if parked is not None:
            self.parked = parked
            self.load = Load(gamma, int(np.count_nonzero(parked)), overloaded=True)
        if len(running):
            self._look_ahead(params, view, running, gamma)

    def _look_ahead(self, p: SlackParams, view: View, running: IntArray, gamma: float) -> None:
        """Rule 3: who runs ahead of its reader, and who is late."""
        tracker, cost, context = view.tracker, view.cost, view.tracker.context
        fixed, per_sequence, per_token = cost.step_terms()
        on_device = context[running]
        step_s = fixed + per_sequence * len(running) + per_token * float(on_device.sum())
        if step_s <= 0:
            return
        # Device seconds per token of a stream: its share of a full step.
        mean = float(context.sum()) / len(tracker)
        together = max(1.0, min(view.kv_tokens / mean, len(tracker), view.max_num_seqs))
        base = fixed / together + per_sequence
        rate = tracker.rate
        spare = 1.0 - base * float(rate.sum()) - per_token * float(rate @ context)
        alone_s = self.remaining * step_s
        work_s = float(self.remaining.sum()) / gamma
        ahead: BoolArray = alone_s >= work_s
        if spare > 0:
            ends = context + self.remaining
            takes = np.maximum(1.0 / step_s - rate, 0.0) * (base + per_token * ends)
            if self.length is tracker.limit:
                longest = tracker.longest_first()
            else:
                longest = (-self.length).argsort(kind="stable")
            ahead[longest[: int(takes[longest].cumsum().searchsorted(spare))]] = True
        ahead &= ~tracker.paused
        entitled = self.gains & (tracker.state == tracker.code(State.RUNNING))
        entitled |= ahead
        entitled |= self.hungry
        self.late = entitled & (alone_s * (1.0 + p.late_reserve) >= work_s)
        self.hungry |= ahead
        self.gains |= ahead


class _Victims:
    """Streams that can leave, the first in line first; arrays over them. Last come those that leave
    for favoured ones only (`yields`)."""

    def __init__(self, view: View, rests: IntArray, yields: IntArray, outlook: _Outlook) -> None:
        self.rows = rows = np.concatenate([rests, yields])
        self.blocks = view.tracker.blocks[rows]
        self.slack_s = outlook.slack[rows]
        self.gains = outlook.gains[rows]
        self.rests = len(rests)
        self.here: BoolArray = np.ones(len(rows), bool)
        """Has not left yet."""


class _Pass:
    """One scheduling pass: a ledger of blocks, places and host slots while the plan is made."""

    def __init__(self, params: SlackParams, view: View, now: float) -> None:
        self.p = params
        self.view = view
        self.tracker = view.tracker
        self.plan = Plan()
        self.running = view.running()
        self.waiting = view.waiting()
        self.preempted = view.tracker.rows(State.PREEMPTED)
        self.context = view.tracker.context
        self.pending = self.context - view.tracker.computed
        """Tokens without KV: 1 for a decoding stream."""
        self.decoding: BoolArray = self.pending == 1
        self.needs = view.blocks_needed()
        """Blocks each takes to come onto the device."""
        self.on_device = view.on_device()
        self.free = view.free_blocks
        self.coming_free = view.releasing_blocks
        """Blocks of earlier victims that are still being copied out."""
        self.host_free = view.free_host_slots
        self.outlook = _Outlook(params, view, self.running, now)
        self.plan.load = self.outlook.load
        self.favouring = self.outlook.favouring

    def run(self) -> Plan:
        self._make_room_for_growth()
        rows = self.running
        if len(self.waiting) or len(self.preempted):
            self._fill()
            rows = self._unheld(self.running)
        if not self.favouring and self.decoding[rows].all():
            self.plan.batch = decode_batch(self.view, rows)
            return self.plan
        limit = self._chunk(rows)
        if self.tracker.shared_by_tenants:
            rows, limit = self._shared(rows, limit)
        self.plan.batch = compose_batch(self.view, rows, prefill_tokens=limit)
        return self.plan

    def _shared(self, rows: IntArray, limit: int | None) -> tuple[IntArray, int | None]:
        """Rule 6: who takes part in a step of several tenants, and its most prompt tokens."""
        outlook, tracker = self.outlook, self.tracker
        can_wait = tracker.elastic[rows] | outlook.parked[rows]
        pending, slack_s = self.pending[rows], outlook.slack[rows]
        return share_step(self.view, rows, pending, outlook.favoured, slack_s, can_wait, limit)

    def _chunk(self, rows: IntArray) -> int | None:
        """Rule 5: most prompt tokens of this step."""
        tracker, cost = self.tracker, self.view.cost
        decoding = self.decoding[rows]
        per_token = cost.prefill_s(1)
        if per_token <= 0:
            return None
        rows = rows[decoding]
        hurried = ~(tracker.elastic[rows] | tracker.paused[rows] | self.outlook.parked[rows])
        readers = rows[hurried]
        if not len(readers):
            return None
        patience = np.maximum(self.outlook.slack[readers], 1.0 / tracker.rate[readers])
        decode_s = cost.step_s(len(rows), float(self.context[rows].sum()))
        contended = self.outlook.load.overloaded or self.favouring
        least_s = _PREFILL_SHARE * decode_s if contended else 0.0
        allowed_s = max(float(patience.min()), least_s) - decode_s
        return max(int(allowed_s / per_token), self.view.block_size)

    def _unheld(self, rows: IntArray) -> IntArray:
        """Rule 2; with nobody left, everybody runs."""
        tracker = self.tracker
        runs = tracker.elastic & ~tracker.paused
        runs |= self.outlook.gains
        runs |= self.pending > 1
        unheld = rows[runs[rows]]
        return unheld if len(unheld) else rows

    # -- who leaves -----------------------------------------------------------------------------

    def _make_room_for_growth(self) -> None:
        """Preempt the fullest streams until the others can take their next step."""
        running = self.running
        growth = self.view.growth(running)
        need = int(growth.sum())
        if need > self.free:
            # Whoever was promised nothing, then the fullest buffer; among readers who have
            # nothing, whoever came last waits.
            parked = self.outlook.parked[running]
            buffered = np.where(parked, 0.0, np.maximum(self.outlook.slack[running], 0.0))
            order = np.lexsort((self.tracker.arrival_s[running], buffered, parked))[::-1]
            stays = np.ones(len(running), bool)
            for i in order[:-1].tolist():
                if need <= self.free + self.coming_free:
                    break
                stays[i] = False
                need -= int(growth[i])
                self._preempt(running[i : i + 1])
            # Until the blocks of the victims have been copied, the fullest sit out.
            left = max(self.free - need, 0)
            self.coming_free -= max(need - self.free, 0)
            for i in order.tolist():
                if need <= self.free:
                    break
                if stays[i] and growth[i]:
                    stays[i] = False
                    need -= int(growth[i])
            self.running = running[stays]
            self.free = left
        else:
            self.free -= need

    def _preempt(self, rows: IntArray) -> None:
        view, tracker = self.view, self.tracker
        columns = (rows, tracker.blocks[rows], self._released(rows), view.slots_to_offload(rows))
        for row, blocks, at_once, slots in zip(*(c.tolist() for c in columns), strict=True):
            how = Preempt.RECOMPUTE
            released = blocks
            if slots <= self.host_free:
                how = Preempt.OFFLOAD
                self.host_free -= slots
                released = at_once
            elif tracker.synced[row]:
                # Without room for the rest it still keeps what the host has.
                how = Preempt.OFFLOAD
            self.free += released
            self.coming_free += blocks - released
            self.on_device -= 1
            self.plan.preempt.append((tracker.sequences[row], how))

    def _released(self, rows: IntArray) -> IntArray:
        """Blocks that are free as soon as each of them leaves."""
        released = self.view.released_now(rows)
        if self.favouring:
            # Who has not begun leaves nothing to copy.
            begun = self.tracker.computed[rows] > 0
            released = np.where(begun, released, self.tracker.blocks[rows])
        return released

    def _expendable(self) -> _Victims:
        """Streams that can leave unnoticed, the most slack first."""
        rows, tracker, cost, outlook = self.running, self.tracker, self.view.cost, self.outlook
        # At least one token a stay: who leaves before it may never get any further.
        stayed = (tracker.resident >= max(self.p.min_residency_tokens, 1)) & self.decoding
        leaves = outlook.slack > self.p.victim_slack_s
        leaves &= stayed | (tracker.paused & self.decoding)
        leaves &= ~outlook.late
        rests = rows[leaves[rows]]
        slack, blocks = outlook.slack[rests], tracker.blocks[rests]
        unsynced = blocks - self.view.released_now(rests)
        covers = slack > 2 * (cost.offload_s(1) * unsynced + cost.load_s(1) * blocks)
        rests, slack = rests[covers], slack[covers]
        rests = rests[(-slack).argsort(kind="stable")]
        if not self.favouring:
            return _Victims(self.view, rests, rows[:0], outlook)
        # For those they leave after a single token, too, but last.
        stayed |= tracker.computed == 0
        yields = stayed | ((tracker.resident > 0) & self.decoding)
        yields &= ~outlook.favoured
        yields[rests] = False
        leaving = rows[yields[rows]][::-1]
        leaving = leaving[(~stayed[leaving]).argsort(kind="stable")]
        return _Victims(self.view, rests, leaving, outlook)

    def _evict_for(self, row: int, blocks: int, only_held: bool, victims: _Victims) -> list[int]:
        """Preempt until `blocks` and a place are free or on their way, or nobody; who left."""
        favoured = self.favouring and bool(self.outlook.favoured[row])
        missing, gives = blocks - self.free - self.coming_free, victims.blocks
        if favoured:
            released = self._released(victims.rows)
            if released[victims.here].sum() >= blocks - self.free:
                # Its first token does not wait for copies.
                missing, gives = blocks - self.free, released
        needs_place = self.on_device >= self.view.max_num_seqs
        floor = self.p.margin_s
        if not self.outlook.late[row]:
            floor += max(float(self.outlook.slack[row]), 0.0)
        leaves = ~victims.gains
        if not only_held:
            leaves |= victims.slack_s >= floor
        leaves[victims.rests :] = favoured
        leaves &= victims.here
        chosen = leaves.nonzero()[0]
        enough = int(needs_place)
        if missing > 0:
            enough = int(gives[chosen].cumsum().searchsorted(missing)) + 1
        if not 0 < enough <= len(chosen):
            return []
        victims.here[chosen[:enough]] = False
        leaving = victims.rows[chosen[:enough]]
        self._preempt(leaving)
        gone: list[int] = leaving.tolist()
        return gone

    # -- who comes onto the device --------------------------------------------------------------

    def _fill(self) -> None:
        view, tracker = self.view, self.tracker
        victims: _Victims | None = None
        gone: list[int] = []
        admitted: list[int] = []
        for row, need, only_held in self._candidates():
            blocks = need
            if self.on_device:
                growing = len(self.running) - len(gone) + len(admitted)
                blocks += view.blocks_for(growing * self.p.growth_steps)
                if not tracker.generated[row]:
                    blocks += self._start_headroom(row, admitted)
            seq = tracker.sequences[row]
            # Loads begin in the blocks that are free while others are still being copied out.
            loads = seq.state is State.PREEMPTED and view.overlap
            if not self._fits(blocks):
                if victims is None:
                    victims = self._expendable()
                gone.extend(self._evict_for(row, blocks, only_held, victims))
            if not self._fits(blocks, self.coming_free if loads else 0):
                # Whoever is first in line keeps its place until the blocks are there.
                break
            self.coming_free -= max(need - self.free, 0)
            self.free = max(self.free - need, 0)
            self.on_device += 1
            if seq.state is State.PREEMPTED:
                self.plan.resume.append(seq)
            else:
                self.plan.admit.append(seq)
                admitted.append(row)
        if gone or admitted:
            stays = np.ones(len(tracker), bool)
            stays[gone] = False
            begins = np.array(admitted, np.int64)
            self.running = np.concatenate([self.running[stays[self.running]], begins])

    def _start_headroom(self, row: int, admitted: list[int]) -> int:
        """Further blocks that must be free before a request begins."""
        if self.outlook.parked[row]:
            # Begun, it would stall half-way; so it begins when it can also end.
            return self.view.blocks_for(int(self.outlook.remaining[row]))
        # For so long nobody may have slack enough to make room for the others.
        rate = self.tracker.rate * ~self.tracker.paused
        if self.outlook.favoured[row]:
            # The others make room for it at any time.
            rate = rate * self.outlook.favoured
        grows = np.minimum(rate * self.p.victim_slack_s, np.maximum(self.outlook.remaining, 0))
        return self.view.blocks_for(int(grows[self.running].sum() + grows[admitted].sum()))

    def _fits(self, blocks: int, coming: int = 0) -> bool:
        return self.on_device < self.view.max_num_seqs and self.free + coming >= blocks

    def _candidates(self) -> Iterator[tuple[int, int, bool]]:
        """Who should come onto the device, most urgent first: (row, blocks it takes, whether it may
        displace held streams only). Lazy: mostly the first few fill the device."""
        outlook, paused = self.outlook, self.tracker.paused
        rows, waiting = self.preempted, self.waiting
        parked, late = outlook.parked, outlook.late
        resume_at = self.p.resume_slack_s + self.view.cost.load_s(1) * self.needs
        urgent = (outlook.slack <= resume_at) & ~parked
        if self.favouring:
            first = outlook.favoured[rows] & urgent[rows]
            yield from self._in_turn(rows[first])
            new = waiting[outlook.favoured[waiting] & ~paused[waiting]]
            needs = self.needs[new].tolist()
            yield from zip(new.tolist(), needs, [False] * len(new), strict=True)
            waiting = waiting[~np.isin(waiting, new)]
            rows = rows[~first]
        yield from self._in_turn(rows[urgent[rows]])
        idle = waiting[paused[waiting]]
        if len(waiting) > len(idle):
            waiting = waiting[: len(waiting) - len(idle)]
            begun = self.tracker.generated[waiting] > 0
            for group in (waiting[begun], waiting[~begun]):
                needs = self.needs[group].tolist()
                yield from zip(group.tolist(), needs, parked[group].tolist(), strict=True)
        rows = rows[~urgent[rows]]
        yield from self._in_turn(rows[late[rows]])
        rows = rows[~late[rows]]
        hungry = rows[outlook.hungry[rows]]
        if len(hungry):
            promised = ~parked[hungry]
            yield from self._in_turn(hungry[promised], only_held=True)
            yield from self._in_turn(hungry[~promised], only_held=True)
        if not self.on_device:
            # Nobody has need of it, but a device is not left idle.
            yield from self._in_turn(rows[~outlook.hungry[rows]])
            yield from self._in_turn(idle)

    def _in_turn(
        self, rows: IntArray, *, only_held: bool = False
    ) -> Iterator[tuple[int, int, bool]]:
        """Least slack first; among those who have nothing, whoever came first."""
        if not len(rows):
            return
        if len(rows) > 1:
            rows = rows[np.lexsort((self.tracker.arrival_s[rows], self.outlook.slack[rows]))]
        for row, need in zip(rows.tolist(), self.needs[rows].tolist(), strict=True):
            yield row, need, only_held
