"""Buffer-aware preemption by slack. (working version)"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.capacity import LOAD_FACTOR, capacity
from tokenflow.replicas.scheduler.playback import token_weights
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tracker import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class SlackParams:
    """Tunables; seconds where the name says so."""

    resume_slack_s: float = 1.0
    victim_slack_s: float = 2.0
    margin_s: float = 1.0
    min_residency_tokens: int = 8
    growth_steps: int = 8
    load_factor: float = LOAD_FACTOR
    hold: str = "stress"  # never, stress, always
    critical: str = "late"  # late, early, none
    kappa: float = 1.0
    order: str = "limit"
    late: float = 1.0
    rest: str = "slack"
    relaxed: str = "slack"
    min_room: int = 8
    min_share: float = 0.25
    sticky: float = 0.2


class SlackPolicy:
    """See the module."""

    name = "slack"
    write_through = True

    def __init__(self, params: SlackParams | None = None) -> None:
        self.params = params or SlackParams()

    def plan(self, view: View, now: float) -> Plan:
        return globals()["_Pass"](self.params, view, now).run()


class _Pass:
    """One scheduling pass: a ledger of blocks, slots and host memory while the plan is made."""

    def __init__(self, params: SlackParams, view: View, now: float) -> None:
        self.p = params
        self.view = view
        self.tracker = tracker = view.tracker
        self.plan = Plan()
        self.running = view.running()
        self.waiting = view.waiting()
        self.preempted = tracker.rows(State.PREEMPTED)
        self.on_device = view.on_device()
        self.free = view.free_blocks
        self.coming_free = view.releasing_blocks
        self.host_free = view.free_host_slots
        self.slack = tracker.due_s - now
        self.remaining = tracker.limit - tracker.generated
        self.buffer = np.maximum(self.slack, 0.0) * tracker.rate
        self.gamma = capacity(
            tracker, view.cost, view.total_blocks * view.block_size, view.max_num_seqs
        )
        self.parked = self._parked()
        self.useful = token_weights(self.buffer, tracker.limit) >= 1.0
        self.sprint = self._critical()
        self.late = self._late()
        self.sprint |= self.late
        self.useful |= self.sprint
        self.useful |= tracker.elastic

    def run(self) -> Plan:
        self._make_room_for_growth()
        stress = len(self.waiting) or len(self.preempted)
        if stress:
            self._fill()
        rows = self.running
        if self.p.hold == "always" or (self.p.hold == "stress" and stress):
            pending = self.tracker.context[rows] - self.tracker.computed[rows]
            keep = self.useful[rows] | (pending > 1)
            if keep.any():
                rows = rows[keep]
        self.plan.batch = compose_batch(self.view, rows)
        return self.plan

    def _critical(self) -> BoolArray:
        """Streams that take what capacity the readers leave, longest first: held, they would be the
        last ones and run alone."""
        tracker = self.tracker
        sprint = np.zeros(len(tracker), bool)
        if self.p.critical == "none" or math.isinf(self.gamma):
            return sprint
        if not len(self.running):
            return sprint
        cost = self.view.cost
        kv = self.view.total_blocks * self.view.block_size
        context = tracker.context
        together = max(1.0, min(kv / float(context.mean()), len(tracker), self.view.max_num_seqs))
        share = cost.step_s(0, 0) / together
        per_seq = cost.step_s(1, 0) - cost.step_s(0, 0)
        per_tok = (cost.step_s(0, 1e6) - cost.step_s(0, 0)) / 1e6
        demand = float((tracker.rate * (share + per_seq + per_tok * context)).sum())
        spare = self.p.kappa - demand
        if spare <= 0:
            return sprint
        run = context[self.running]
        step_s = cost.step_s(len(run), float(run.sum()))
        ends = context + self.remaining
        takes = np.maximum(1.0 / step_s - tracker.rate, 1e-3) * (share + per_seq + per_tok * ends)
        if self.p.order == "limit":
            order = np.argsort(-tracker.limit, kind="stable")
        else:
            resident = tracker.state == tracker.code(State.RUNNING)
            order = np.argsort(-self.remaining * (1.0 + self.p.sticky * resident), kind="stable")
        count = int(np.searchsorted(np.cumsum(takes[order]), spare))
        sprint[order[:count]] = True
        return sprint

    def _late(self) -> BoolArray:
        tracker = self.tracker
        if not len(self.running) or math.isinf(self.gamma) or self.p.late <= 0:
            return np.zeros(len(tracker), bool)
        run = tracker.context[self.running]
        step_s = self.view.cost.step_s(len(run), float(run.sum()))
        work_s = float(self.remaining.sum()) / self.gamma
        late: BoolArray = self.remaining * step_s * self.p.late >= work_s
        return late

    def _parked(self) -> BoolArray:
        tracker = self.tracker
        limit = self.p.load_factor * self.gamma
        rates = np.where(tracker.elastic, 0.0, tracker.rate)
        if rates.sum() <= limit:
            return np.zeros(len(tracker), bool)
        order = np.lexsort((tracker.order, tracker.arrival_s))
        promised = np.cumsum(rates[order])
        parked = np.zeros(len(tracker), bool)
        parked[order] = promised > limit
        parked[order[0]] = False
        return parked

    # -- memory for the streams that are on the device ------------------------------------------

    def _make_room_for_growth(self) -> None:
        running = self.running
        growth = self.view.growth(running)
        need = int(growth.sum())
        if need > self.free:
            parked = self.parked[running]
            order = np.lexsort(
                (
                    self.tracker.arrival_s[running],
                    np.where(parked, 0.0, np.maximum(self.slack[running], 0.0)),
                    parked,
                )
            )[::-1]
            stays = np.ones(len(running), bool)
            for i in order[:-1].tolist():
                if need <= self.free:
                    break
                stays[i] = False
                need -= int(growth[i])
                self._preempt(int(running[i]))
            self.running = running[stays]
        self.free -= min(need, self.free)

    def _preempt(self, row: int) -> None:
        one = np.array([row])
        slots = int(self.view.slots_to_offload(one)[0])
        blocks = int(self.tracker.blocks[row])
        how = Preempt.OFFLOAD if slots <= self.host_free else Preempt.RECOMPUTE
        released = blocks
        if how is Preempt.OFFLOAD:
            self.host_free -= slots
            released = int(self.view.released_now(one)[0])
        self.free += released
        self.coming_free += blocks - released
        self.on_device -= 1
        self.plan.preempt.append((self.tracker.sequences[row], how))

    # -- who comes onto the device --------------------------------------------------------------

    def _fill(self) -> None:
        view, tracker = self.view, self.tracker
        candidates, evict, surplus = self._candidates()
        if not len(candidates):
            return
        needs = view.blocks_needed(candidates).tolist()
        self._victims: list[int] | None = None
        admitted = []
        gone: set[int] = set()
        for row, need, may_evict, surplus_only in zip(
            candidates.tolist(), needs, evict.tolist(), surplus.tolist(), strict=True
        ):
            running = len(self.running) + len(admitted) - len(gone)
            headroom = view.blocks_for(running * self.p.growth_steps) if self.on_device else 0
            fresh = tracker.generated[row] == 0
            if self.on_device and fresh and self.parked[row]:
                headroom += view.blocks_for(int(self.remaining[row]))
            if not self._fits(need + headroom) and may_evict:
                missing = need + headroom - self.free - self.coming_free
                full = self.on_device >= view.max_num_seqs
                gone.update(self._evict_for(row, missing, full, surplus_only))
            if not self._fits(need + headroom):
                break
            self.free -= need
            self.on_device += 1
            seq = tracker.sequences[row]
            if seq.state is State.PREEMPTED:
                self.plan.resume.append(seq)
            else:
                self.plan.admit.append(seq)
                admitted.append(row)
        running = self.running
        if gone:
            running = running[~np.isin(running, list(gone))]
        self.running = np.concatenate([running, np.array(admitted, np.int64)])

    def _fits(self, blocks: int) -> bool:
        return self.on_device < self.view.max_num_seqs and self.free >= blocks

    def _candidates(self) -> tuple[IntArray, BoolArray, BoolArray]:
        tracker, view = self.tracker, self.view
        pre, wait = self.preempted, self.waiting
        parked = self.parked
        resume_at = self.p.resume_slack_s + view.cost.load_s(1) * view.blocks_needed(pre)
        promised = ~parked[pre]
        hungry = 0.1 * tracker.limit - self.buffer >= np.maximum(
            self.p.min_room, self.p.min_share * 0.1 * tracker.limit
        )
        hungry |= self.sprint
        urgent = pre[promised & (self.slack[pre] <= resume_at)]
        relaxed = pre[promised & (self.slack[pre] > resume_at) & hungry[pre] & ~self.late[pre]]
        late = pre[self.late[pre] & ~(promised & (self.slack[pre] <= resume_at))]
        begun = tracker.generated[wait] > 0
        dropped, fresh = wait[begun], wait[~begun]
        rest = pre[~promised & hungry[pre] & ~self.late[pre]]
        if self.p.rest == "fcfs":
            rest = rest[np.lexsort((tracker.order[rest], tracker.arrival_s[rest]))]
        elif self.p.rest == "slack":
            rest = rest[np.argsort(self.slack[rest])]
        else:
            rest = rest[np.argsort(-self.remaining[rest], kind="stable")]

        def by_slack(rows: IntArray) -> IntArray:
            return rows[np.lexsort((tracker.arrival_s[rows], self.slack[rows]))]

        relaxed = by_slack(relaxed) if self.p.relaxed == "slack" else relaxed[np.argsort(-self.remaining[relaxed], kind="stable")]
        groups = [by_slack(urgent), by_slack(dropped), fresh, late, relaxed, rest]
        rows = np.concatenate(groups)
        evict = np.ones(len(rows), bool)
        surplus = parked[rows].copy()
        start = len(urgent) + len(wait) + len(late)
        surplus[len(urgent) + len(wait) : start] = False
        surplus[start : start + len(relaxed)] = True
        return rows, evict, surplus

    # -- who leaves -----------------------------------------------------------------------------

    def _evict_for(self, row: int, missing: int, needs_place: bool, surplus_only: bool) -> list[int]:
        chosen: list[int] = []
        if self._victims is None:
            running = self.running
            tracker = self.tracker
            decoding = tracker.context[running] - tracker.computed[running] == 1
            settled = running[decoding & (tracker.resident[running] >= self.p.min_residency_tokens)]
            order = settled[np.argsort(-self.slack[settled], kind="stable")]
            self._victims = order[self._may_leave(order)].tolist()
        newcomer = 0.0 if self.late[row] else max(float(self.slack[row]), 0.0)
        for victim in self._victims:
            if missing <= 0 and (chosen or not needs_place):
                break
            if self.late[victim] or surplus_only and self.useful[victim]:
                continue
            if not surplus_only and self.useful[victim] and self.slack[victim] < newcomer + self.p.margin_s:
                continue
            chosen.append(victim)
            missing -= int(self.tracker.blocks[victim])
        if missing <= 0 and (chosen or not needs_place):
            for victim in chosen:
                self._victims.remove(victim)
                self._preempt(victim)
            return chosen
        return []

    def _may_leave(self, rows: IntArray) -> BoolArray:
        cost = self.view.cost
        blocks = self.view.blocks_needed(rows)
        unsynced = np.maximum(blocks - self.tracker.synced[rows], 0)
        switch_s = cost.offload_s(1) * unsynced + cost.load_s(1) * blocks
        return self.slack[rows] > np.maximum(self.p.victim_slack_s, 2 * switch_s)
