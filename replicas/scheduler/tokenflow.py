"""Buffer-aware preemption: the device goes to the readers who will run dry first.

Every stream's slack is the time until its reader needs a token that does not exist yet. A stream
with much slack can leave the device unnoticed; the memory it frees gives a late request its first
token. Four rules, in seconds rather than tokens so that they hold for every rate:

1. A stream comes back when its slack falls to `resume_slack_s` plus the time the switch takes.
2. A victim must have more than `victim_slack_s`, must cover the switch `conservativeness` times
   over, and must be `margin_s` better off than the stream it makes room for (without that
   hysteresis streams chase each other on and off the device).
3. Past `useful_fraction` of its output a buffer is worth nothing more: such a stream also makes
   room for one that is in no hurry but has less.
4. Readers are promised their rate in order of arrival, up to `load_factor` of the capacity. Streams
   beyond that are *parked*: they run on what the others leave and are the first to make room, so
   overload degrades to first come, first served instead of stalling everybody.

[TokenFlow §4.1-§4.3; slack, hysteresis and the useful-token cap are ours]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch


@dataclass(frozen=True, slots=True)
class TokenFlowParams:
    """Tunables; seconds where the name says so."""

    resume_slack_s: float = 1.0
    victim_slack_s: float = 2.0
    margin_s: float = 1.0
    conservativeness: float = 2.0
    """mu of the paper: how many times over a victim's slack must cover the switch."""
    useful_fraction: float = 0.15
    """A buffer beyond this share of the output limit is surplus."""
    load_factor: float = 0.92
    min_residency_tokens: int = 8
    """Tokens a stream generates on the device before it can be a victim again."""
    growth_steps: int = 8
    """Steps of growth of the running streams that an admission leaves free."""


class TokenFlowPolicy:
    """See the module."""

    name = "tokenflow"
    write_through = True

    def __init__(self, params: TokenFlowParams | None = None) -> None:
        self.params = params or TokenFlowParams()

    def plan(self, view: View, now: float) -> Plan:
        return _Pass(self.params, view, now).run()


class _Pass:
    """One scheduling pass: a ledger of blocks, slots and host memory while the plan is made."""

    def __init__(self, params: TokenFlowParams, view: View, now: float) -> None:
        self.p = params
        self.view = view
        self.now = now
        self.plan = Plan()
        self.running = list(view.running)
        self.free = view.free_blocks
        self.coming_free = view.releasing_blocks
        """Blocks of earlier victims that are still being copied out."""
        self.host_free = view.free_host_slots
        self.parked = self._parked()

    def run(self) -> Plan:
        self._make_room_for_growth()
        if self.view.waiting or self.view.preempted:
            self._fill()
        self.plan.batch = compose_batch(self.running, self.view.max_batch_tokens)
        return self.plan

    def slack(self, seq: Sequence) -> float:
        return seq.playback.slack_s(self.now)

    # -- memory for the streams that are on the device ------------------------------------------

    def _make_room_for_growth(self) -> None:
        """Preempt the fullest streams until the others can take their next step."""
        need = sum(self.view.growth(seq) for seq in self.running)
        while need > self.free and len(self.running) > 1:
            # Whoever was promised nothing, then the fullest buffer; among readers who have
            # nothing, whoever came last waits.
            victim = max(
                self.running,
                key=lambda s: (
                    s.request_id in self.parked,
                    0.0 if s.request_id in self.parked else max(self.slack(s), 0.0),
                    s.arrival_s,
                ),
            )
            need -= self.view.growth(victim)
            self._preempt(victim)
        self.free -= min(need, self.free)

    def _preempt(self, victim: Sequence) -> None:
        slots = self.view.slots_to_offload(victim)
        how = Preempt.OFFLOAD if slots <= self.host_free else Preempt.RECOMPUTE
        if how is Preempt.OFFLOAD:
            self.host_free -= slots
        released = self.view.released_now(victim, how)
        self.free += released
        self.coming_free += victim.num_blocks - released
        self.running.remove(victim)
        self.plan.preempt.append((victim, how))

    # -- who comes onto the device --------------------------------------------------------------

    def _fill(self) -> None:
        on_device = len(self.running) + len(self.view.loading)
        for seq, may_evict, surplus_only in self._candidates():
            need = self.view.blocks_for(len(seq.tokens) + 1)
            headroom = self._headroom() if on_device else 0
            if on_device and not seq.output_ids and seq.request_id in self.parked:
                # Begun, it would stall half-way; so it begins when it can also end.
                headroom += self.view.blocks_for(seq.remaining_tokens)
            has_slot = on_device < self.view.max_num_seqs
            if has_slot and self.free - headroom >= need:
                self.free -= need
                on_device += 1
                self._take(seq)
                continue
            if may_evict:
                missing = need + headroom - self.free - self.coming_free
                self._evict_for(seq, missing, not has_slot, surplus_only)
            # Whoever is first in line keeps its place until the blocks are there.
            break

    def _take(self, seq: Sequence) -> None:
        if seq.num_computed:
            self.plan.resume.append(seq)
        else:
            self.plan.admit.append(seq)
            self.running.append(seq)

    def _headroom(self) -> int:
        """Blocks left free so that the running streams can grow for a few steps."""
        return self.view.blocks_for(len(self.running) * self.p.growth_steps)

    def _candidates(self) -> Iterator[tuple[Sequence, bool, bool]]:
        """(sequence, may displace others, only those with surplus), most urgent first."""

        def by_slack(seqs: Iterable[Sequence]) -> list[Sequence]:
            return sorted(seqs, key=lambda s: (self.slack(s), s.arrival_s))

        promised = [s for s in self.view.preempted if s.request_id not in self.parked]
        urgent = [s for s in promised if self.slack(s) <= self._resume_at(s)]
        relaxed = [s for s in promised if self.slack(s) > self._resume_at(s)]
        dropped = [s for s in self.view.waiting if s.output_ids]
        fresh = [s for s in self.view.waiting if not s.output_ids]
        for seq in by_slack(urgent):
            yield seq, True, False
        for seq in by_slack(dropped):
            yield seq, seq.request_id not in self.parked, False
        for seq in fresh:
            yield seq, seq.request_id not in self.parked, False
        for seq in by_slack(relaxed):
            yield seq, True, True
        for seq in self.view.preempted:
            if seq.request_id in self.parked:
                yield seq, False, False

    def _resume_at(self, seq: Sequence) -> float:
        return self.p.resume_slack_s + self.view.cost.load_s(self.view.blocks_for(len(seq.tokens)))

    def _parked(self) -> frozenset[str]:
        """Ids of the requests that came after the capacity was promised away. [TokenFlow §4.3]"""
        view = self.view
        groups = (view.running, view.preempted, view.offloading, view.loading, view.waiting)
        everyone = [seq for group in groups for seq in group]
        limit = self.p.load_factor * self._capacity()
        if sum(seq.playback.rate for seq in everyone) <= limit:
            return frozenset()
        parked = set()
        promised = 0.0
        for seq in sorted(everyone, key=lambda s: s.arrival_s):
            promised += seq.playback.rate
            # The first one is served whatever it asks for.
            if promised > limit and promised > seq.playback.rate:
                parked.add(seq.request_id)
        return frozenset(parked)

    def _capacity(self) -> float:
        """Gamma with as many streams decoding as memory holds."""
        streams = [*self.view.running, *self.view.preempted]
        if not streams:
            return math.inf
        mean_blocks = sum(self.view.blocks_for(len(s.tokens)) for s in streams) / len(streams)
        fit = self.view.total_blocks / max(mean_blocks, 1.0)
        return self.view.cost.capacity(min(fit, self.view.max_num_seqs))

    # -- who leaves -----------------------------------------------------------------------------

    def _evict_for(self, seq: Sequence, missing: int, needs_slot: bool, surplus_only: bool) -> None:
        """Preempt the fullest streams until `missing` blocks are on their way, or nobody."""
        chosen: list[Sequence] = []
        for victim in self._victims_by_slack():
            if missing <= 0 and (chosen or not needs_slot):
                break
            if not self._may_leave(victim, seq, surplus_only):
                break
            chosen.append(victim)
            missing -= victim.num_blocks
        if missing <= 0 and (chosen or not needs_slot):
            for victim in chosen:
                self._preempt(victim)

    def _victims_by_slack(self) -> list[Sequence]:
        settled = [
            s
            for s in self.running
            if s.decoding and s.resident_tokens >= self.p.min_residency_tokens
        ]
        return sorted(settled, key=self.slack, reverse=True)

    def _may_leave(self, victim: Sequence, newcomer: Sequence, surplus_only: bool) -> bool:
        slack = self.slack(victim)
        blocks = self.view.blocks_for(len(victim.tokens))
        cost = self.view.cost
        switch_s = cost.offload_s(blocks - victim.synced_blocks) + cost.load_s(blocks)
        if slack <= max(self.p.victim_slack_s, self.p.conservativeness * switch_s):
            return False
        if surplus_only:
            cap = self.p.useful_fraction * victim.params.max_tokens
            if victim.playback.buffer(self.now) < cap:
                return False
        newcomer_slack = max(self.slack(newcomer), 0.0)
        return slack >= newcomer_slack + self.p.margin_s
