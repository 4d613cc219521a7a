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
4. Readers are promised their rate in order of arrival, up to `load_factor` of the capacity. Those
   beyond are *parked*: they run on what the promised ones leave and are first to make room. Of
   several tenants each is promised its share (fairness.py). Where memory is short, the streams of
   a tenant that asks for no more than its share of it are *favoured*: they come first, and those
   of the others leave at once for them.
5. A step carries no more prompt tokens than its readers' slack allows. Only where readers ask for
   more than can be promised do prompts get most of the device all the same.

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
from typing import NamedTuple

import numpy as np

from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.capacity import (
    LOAD_FACTOR,
    Load,
    capacity,
    sustained,
    unpromised,
)
from tokenflow.replicas.scheduler.fairness import modest
from tokenflow.replicas.scheduler.playback import FULL_WEIGHT_SHARE
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
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
    load_factor: float = LOAD_FACTOR
    """Share of the capacity that is promised; more than all of it cannot be."""
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
        if tracker.shared_by_tenants:
            wants = (tracker.context + np.maximum(self.remaining, 0)) * ~tracker.paused
            self.favoured = modest(tracker.tenant, wants.astype(np.float64), view.kv_tokens)
        self.load = Load(gamma)
        if math.isinf(gamma):
            return
        gives = sustained(gamma, view.cost, view.lengths.prompts_per_output)
        parked = unpromised(tracker, min(params.load_factor, 1.0) * gives)
        if parked is not None:
            self.parked = parked
            self.favoured = self.favoured & ~parked
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
        mean = float(context.mean())
        together = max(1.0, min(view.kv_tokens / mean, len(tracker), view.max_num_seqs))
        base = fixed / together + per_sequence
        rate = tracker.rate
        spare = 1.0 - base * float(rate.sum()) - per_token * float(rate @ context)
        ahead: BoolArray = np.zeros(len(tracker), bool)
        if spare > 0:
            ends = context + self.remaining
            takes = np.maximum(1.0 / step_s - rate, 0.0) * (base + per_token * ends)
            if self.length is tracker.limit:
                longest = tracker.longest_first()
            else:
                longest = np.argsort(-self.length, kind="stable")
            ahead[longest[: int(np.searchsorted(np.cumsum(takes[longest]), spare))]] = True
        ahead &= ~tracker.paused
        alone_s = self.remaining * step_s
        work_s = float(self.remaining.sum()) / gamma
        ahead |= (alone_s >= work_s) & ~tracker.paused
        entitled = ahead | self.hungry
        entitled |= self.gains & (tracker.state == tracker.code(State.RUNNING))
        self.late = entitled & (alone_s * (1.0 + p.late_reserve) >= work_s)
        self.hungry |= ahead
        self.gains |= ahead


class _Victim(NamedTuple):
    """A stream on the device, and what its leaving means."""

    row: int
    blocks: int
    released: int
    """Blocks free at once."""
    slots: int
    """Host slots it still needs."""


class _Victims:
    """Streams that can leave, the first in line first; each is looked at closely when it goes. Last
    come those that `yields`: they leave for favoured ones only."""

    def __init__(self, view: View, rests: IntArray, yields: IntArray, outlook: _Outlook) -> None:
        self.view = view
        rows = np.concatenate([rests, yields])
        self.rows: list[int] = rows.tolist()
        self.blocks: list[int] = view.tracker.blocks[rows].tolist()
        self.slack_s: list[float] = outlook.slack[rows].tolist()
        self.gains: list[bool] = outlook.gains[rows].tolist()
        self.yields = [False] * len(rests) + [True] * len(yields)

    def take(self, chosen: list[int]) -> list[_Victim]:
        """Those at these places, ascending, who are in line no more."""
        rows = np.array([self.rows[i] for i in chosen], np.int64)
        columns = (
            rows,
            self.view.tracker.blocks[rows],
            self.view.released_now(rows),
            self.view.slots_to_offload(rows),
        )
        for i in reversed(chosen):
            for column in (self.rows, self.blocks, self.slack_s, self.gains, self.yields):
                del column[i]
        return list(map(_Victim._make, zip(*(c.tolist() for c in columns), strict=True)))


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
        self.on_device = view.on_device()
        self.free = view.free_blocks
        self.coming_free = view.releasing_blocks
        """Blocks of earlier victims that are still being copied out."""
        self.host_free = view.free_host_slots
        self.outlook = _Outlook(params, view, self.running, now)
        self.plan.load = self.outlook.load

    def run(self) -> Plan:
        self._make_room_for_growth()
        rows = self.running
        if len(self.waiting) or len(self.preempted):
            self._fill()
            rows = self._unheld(self.running)
        favoured = self.outlook.favoured[rows]
        if favoured.any():
            rows = rows[np.argsort(~favoured, kind="stable")]
        self.plan.batch = compose_batch(self.view, rows, prefill_tokens=self._chunk(rows))
        return self.plan

    def _chunk(self, rows: IntArray) -> int | None:
        """Rule 5: most prompt tokens of this step."""
        tracker, cost = self.tracker, self.view.cost
        decoding = self.pending[rows] == 1
        per_token = cost.prefill_s(1)
        if per_token <= 0 or decoding.all():
            return None
        favoured = self.outlook.favoured
        if favoured.any() and not favoured[rows[~decoding]].any():
            # One of them that comes now has the step of the others to wait for.
            decode_s = cost.step_s(int(decoding.sum()), float(self.context[rows[decoding]].sum()))
            return max(int(decode_s / per_token), self.view.block_size)
        rows = rows[decoding]
        hurried = ~(tracker.elastic[rows] | tracker.paused[rows] | self.outlook.parked[rows])
        readers = rows[hurried]
        if not len(readers):
            return None
        patience = np.maximum(self.outlook.slack[readers], 1.0 / tracker.rate[readers])
        decode_s = cost.step_s(len(rows), float(self.context[rows].sum()))
        contended = self.outlook.load.overloaded or bool(favoured.any())
        least_s = _PREFILL_SHARE * decode_s if contended else 0.0
        allowed_s = max(float(patience.min()), least_s) - decode_s
        return max(int(allowed_s / per_token), self.view.block_size)

    def _unheld(self, rows: IntArray) -> IntArray:
        """Rule 2; with nobody left, everybody runs."""
        tracker = self.tracker
        runs = self.outlook.gains[rows] | (self.pending[rows] > 1)
        runs |= tracker.elastic[rows] & ~tracker.paused[rows]
        return rows[runs] if runs.any() else rows

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
                leaving = _Victims(self.view, running[i : i + 1], running[:0], self.outlook)
                self._preempt(leaving.take([0])[0])
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

    def _preempt(self, victim: _Victim) -> None:
        how = Preempt.RECOMPUTE
        released = victim.blocks
        if victim.slots <= self.host_free:
            how = Preempt.OFFLOAD
            self.host_free -= victim.slots
            released = victim.released
        elif self.tracker.synced[victim.row]:
            # Without room for the rest it still keeps what the host has.
            how = Preempt.OFFLOAD
        self.free += released
        self.coming_free += victim.blocks - released
        self.on_device -= 1
        self.plan.preempt.append((self.tracker.sequences[victim.row], how))

    def _expendable(self) -> _Victims:
        """Streams that can leave unnoticed, the most slack first."""
        rows, tracker, cost = self.running, self.tracker, self.view.cost
        slack = self.outlook.slack[rows]
        leaves = slack > self.p.victim_slack_s
        # At least one token a stay: who leaves before it may never get any further.
        stayed = tracker.resident[rows] >= max(self.p.min_residency_tokens, 1)
        leaves &= stayed | tracker.paused[rows]
        leaves &= self.pending[rows] == 1
        leaves &= ~self.outlook.late[rows]
        blocks = tracker.blocks[rows]
        unsynced = blocks - self.view.released_now(rows)
        leaves &= slack > 2 * (cost.offload_s(1) * unsynced + cost.load_s(1) * blocks)
        rests = rows[leaves][np.argsort(-slack[leaves], kind="stable")]
        favoured = self.outlook.favoured
        if not favoured.any():
            return _Victims(self.view, rests, rows[:0], self.outlook)
        yields = ~(favoured[rows] | leaves) & stayed & (self.pending[rows] == 1)
        return _Victims(self.view, rests, rows[yields][::-1], self.outlook)

    def _evict_for(self, row: int, blocks: int, only_held: bool, victims: _Victims) -> list[int]:
        """Preempt until `blocks` and a place are free or on their way, or nobody; who left."""
        missing = blocks - self.free - self.coming_free
        needs_place = self.on_device >= self.view.max_num_seqs
        floor = self.p.margin_s
        if not self.outlook.late[row]:
            floor += max(float(self.outlook.slack[row]), 0.0)
        chosen: list[int] = []
        favoured = self.outlook.favoured[row]
        for i, (gains, yields) in enumerate(zip(victims.gains, victims.yields, strict=True)):
            if missing <= 0 and (chosen or not needs_place):
                break
            if yields and not favoured:
                break
            if not yields and gains and (only_held or victims.slack_s[i] < floor):
                continue
            chosen.append(i)
            missing -= victims.blocks[i]
        if not chosen or missing > 0:
            return []
        leaving = victims.take(chosen)
        for victim in leaving:
            self._preempt(victim)
        return [victim.row for victim in leaving]

    # -- who comes onto the device --------------------------------------------------------------

    def _fill(self) -> None:
        view, tracker = self.view, self.tracker
        victims: _Victims | None = None
        gone: set[int] = set()
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
                gone.update(self._evict_for(row, blocks, only_held, victims))
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
            stays = [row for row in self.running.tolist() if row not in gone]
            self.running = np.array(stays + admitted, np.int64)

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
        view, outlook = self.view, self.outlook
        rows, waiting = self.preempted, self.waiting
        slack, parked, late = outlook.slack[rows], outlook.parked[rows], outlook.late[rows]
        resume_at = self.p.resume_slack_s + view.cost.load_s(1) * view.blocks_needed(rows)
        urgent = ~parked & (slack <= resume_at)
        if outlook.favoured.any():
            first = outlook.favoured[rows] & urgent
            yield from self._in_turn(rows[first])
            new = waiting[outlook.favoured[waiting] & ~self.tracker.paused[waiting]]
            needs = view.blocks_needed(new).tolist()
            yield from zip(new.tolist(), needs, [False] * len(new), strict=True)
            waiting = waiting[~np.isin(waiting, new)]
            rows, slack, urgent = rows[~first], slack[~first], urgent[~first]
            parked, late = parked[~first], late[~first]
        yield from self._in_turn(rows[urgent])
        idle = waiting[self.tracker.paused[waiting]]
        if len(waiting) > len(idle):
            waiting = waiting[: len(waiting) - len(idle)]
            begun = self.tracker.generated[waiting] > 0
            for group in (waiting[begun], waiting[~begun]):
                needs = view.blocks_needed(group).tolist()
                yield from zip(group.tolist(), needs, outlook.parked[group].tolist(), strict=True)
        yield from self._in_turn(rows[late & ~urgent])
        hungry = outlook.hungry[rows] & ~urgent & ~late
        yield from self._in_turn(rows[hungry & ~parked], only_held=True)
        yield from self._in_turn(rows[hungry & parked], only_held=True)
        if not self.on_device:
            # Nobody has need of it, but a device is not left idle.
            yield from self._in_turn(rows[~(urgent | late | hungry)])
            yield from self._in_turn(idle)

    def _in_turn(
        self, rows: IntArray, *, only_held: bool = False
    ) -> Iterator[tuple[int, int, bool]]:
        """Least slack first; among those who have nothing, whoever came first."""
        if not len(rows):
            return
        if len(rows) > 1:
            rows = rows[np.lexsort((self.tracker.arrival_s[rows], self.outlook.slack[rows]))]
        for row, need in zip(rows.tolist(), self.view.blocks_needed(rows).tolist(), strict=True):
            yield row, need, only_held
