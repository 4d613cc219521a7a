"""TokenFlow's own algorithm, as the paper gives it: the baseline that ours has to beat.

Every `interval_s`, and only under stress (somebody waits, or a reader is about to run dry), two
steps are run; otherwise prefills simply go first.

1. Working set: requests join in order of arrival as far as memory, the places that readers with a
   full buffer can give up, and the sum of rates allow. Beyond the capacity nobody is admitted and
   nobody is switched: first come, first served.
2. Balancing: the members are ranked by utility, taken greedily as they fit into memory, and the
   order is improved by swapping neighbours while the total utility rises.

A member comes back by load or by recompute, whichever is quicker. [TokenFlow §4.1-§4.3]

Where the paper is silent or can be read in two ways: the utility's buffer term enters as what *not*
running would cost, since with the printed sign an empty buffer would speak against running; beta is
the memory of a request half-way through its output; the bound `M / beta` grows by the places that
can be switched, as its scaling is given without a formula; Gamma is that of the streams as they are
now.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.playback import token_weights
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tracker import BoolArray, FloatArray, IntArray

_SWAP_WINDOW = 16
"""Neighbours either side of the first misfit that the local search tries to swap."""


@dataclass(frozen=True, slots=True)
class TokenFlowParams:
    """Tunables; names and ranges of the paper."""

    interval_s: float = 0.5
    """Reschedule interval; 0.5 to 1.5 s in the paper."""
    conservativeness: float = 1.0
    """mu: how many times over a buffer must cover a switch; 1 is agile, 20 hardly ever switches."""
    gamma: float = 50.0
    """Weight of an empty buffer against tokens."""


class TokenFlowPolicy:
    """See the module."""

    name = "tokenflow"
    write_through = True

    def __init__(self, params: TokenFlowParams | None = None) -> None:
        self.params = params or TokenFlowParams()
        self._next_s = -math.inf

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        running, free = self._make_room(view, view.running(), plan, now)
        waiting = view.waiting()
        preempted = view.tracker.rows(State.PREEMPTED)
        if len(waiting) or self._critical(view, preempted, now):
            # An idle device need not wait for the interval.
            if now >= self._next_s or not view.on_device():
                self._next_s = now + self.params.interval_s
                running = self._reschedule(view, running, preempted, waiting, free, plan, now)
        elif len(preempted):
            self._resume_in_order(view, preempted, free, plan)
        plan.batch = compose_batch(view, running, prefill_first=True)
        return plan

    # -- estimates ------------------------------------------------------------------------------

    def _load_s(self, view: View, rows: IntArray) -> FloatArray:
        """Expected time until each is back by load: queues, eviction, load. [TokenFlow §4.2.3]"""
        cost = view.cost
        needs = view.blocks_needed(rows)
        evict = cost.offload_s(view.offload_queue)
        queues_s = evict + cost.load_s(view.load_queue)
        return np.asarray(queues_s + cost.load_s(1) * needs, np.float64)

    def _recompute_s(self, view: View, rows: IntArray) -> FloatArray:
        return np.asarray(view.cost.prefill_s(1) * view.tracker.context[rows], np.float64)

    def _covers_switch(self, view: View, rows: IntArray, now: float) -> BoolArray:
        """Whether each buffer covers being switched out: mu * r * (evict + load + schedule)."""
        cost = view.cost
        left = view.tracker.blocks[rows] - view.released_now(rows)
        switch_s = cost.offload_s(1) * left + self._load_s(view, rows) + self.params.interval_s
        covers: BoolArray = view.slack_s(rows, now) >= self.params.conservativeness * switch_s
        return covers

    def _critical(self, view: View, preempted: IntArray, now: float) -> bool:
        """Whether a reader off the device will run dry before it could be back."""
        if not len(preempted):
            return False
        need_s = self._load_s(view, preempted) + self.params.interval_s
        return bool((view.slack_s(preempted, now) < need_s).any())

    def _utility(self, view: View, rows: IntArray, now: float) -> FloatArray:
        """U = v * (t - t_overhead) and what an empty buffer adds: gamma * exp(-b). v counts useful
        tokens only; b is the buffer after the overhead."""
        tracker, p = view.tracker, self.params
        running = tracker.state[rows] == tracker.code(State.RUNNING)
        recompute = self._recompute_s(view, rows)
        on_host = tracker.state[rows] == tracker.code(State.PREEMPTED)
        back = np.where(on_host, np.minimum(self._load_s(view, rows), recompute), recompute)
        overhead = np.where(running, 0.0, back)
        on_device = view.running()
        step_s = view.cost.step_s(max(len(on_device), 1), float(tracker.context[on_device].sum()))
        speed = 1.0 / (step_s or p.interval_s or 1.0)
        slack = np.maximum(view.slack_s(rows, now), 0.0)
        buffer = slack * tracker.rate[rows]
        weight = token_weights(buffer, tracker.limit[rows])
        tokens = weight * speed * np.maximum(p.interval_s - overhead, 0.0)
        after = np.maximum(buffer - tracker.rate[rows] * overhead, 0.0)
        utility: FloatArray = tokens + p.gamma * np.exp(-after)
        return utility

    # -- the two steps --------------------------------------------------------------------------

    def _reschedule(
        self,
        view: View,
        running: IntArray,
        preempted: IntArray,
        waiting: IntArray,
        free: int,
        plan: Plan,
        now: float,
    ) -> IntArray:
        tracker = view.tracker
        gone = {seq.row for seq, _ in plan.preempt}
        active = np.setdiff1d(np.arange(len(tracker)), np.concatenate([waiting, list(gone)]))
        promised = float(tracker.rate[active[~tracker.paused[active]]].sum())
        gamma = self._gamma(view)
        if promised > gamma:
            self._resume_in_order(view, preempted, free, plan)
            return running
        movable = running[self._movable(view, running, now)]
        joining = self._joining(view, active, movable, waiting, gamma - promised)
        return self._balance(view, running, movable, preempted, joining, free, plan, now)

    def _gamma(self, view: View) -> float:
        """Tokens/s of a device full of streams as they are now; infinite when it is empty, which so
        serves the first one whatever it asks for. [TokenFlow §4.3]"""
        running = view.running()
        if not len(running):
            return math.inf
        context = float(view.tracker.context[running].mean())
        fit = min(view.kv_tokens / context, len(view.tracker), view.max_num_seqs)
        return view.cost.capacity(max(fit, 1.0), context)

    def _movable(self, view: View, running: IntArray, now: float) -> BoolArray:
        tracker = view.tracker
        decoding = tracker.context[running] - tracker.computed[running] == 1
        movable: BoolArray = decoding & self._covers_switch(view, running, now)
        return movable

    def _joining(
        self, view: View, active: IntArray, movable: IntArray, waiting: IntArray, rate_left: float
    ) -> IntArray:
        """Waiting requests that enter the working set, in order of arrival."""
        everyone = np.concatenate([active, waiting])
        tracker = view.tracker
        remaining = (tracker.limit - tracker.generated)[everyone]
        beta = float((tracker.context[everyone] + remaining / 2).mean()) / view.block_size
        places = int(view.total_blocks / beta) - view.on_device() + len(movable)
        joining = waiting[: max(places, 0)]
        within = np.cumsum(view.tracker.rate[joining]) <= rate_left
        return joining[within]

    def _balance(
        self,
        view: View,
        running: IntArray,
        movable: IntArray,
        preempted: IntArray,
        joining: IntArray,
        free: int,
        plan: Plan,
        now: float,
    ) -> IntArray:
        tracker = view.tracker
        candidates = np.concatenate([movable, preempted, joining])
        if not len(candidates):
            return running
        step_s = view.cost.step_s(len(running), float(tracker.context[running].sum()))
        ahead = int(self.params.interval_s / step_s / view.block_size) + 1 if step_s > 0 else 1
        fixed = len(running) - len(movable)
        # `free` is without the next block of everyone on the device; who leaves needs none.
        held = tracker.blocks[movable] + view.growth(movable)
        room = free + view.releasing_blocks + int(held.sum()) - fixed * ahead
        places = view.max_num_seqs - view.on_device() + len(movable)
        needs = np.minimum(view.blocks_needed(candidates) + ahead, view.total_blocks)
        utility = self._utility(view, candidates, now)
        ranked = np.lexsort((-tracker.rate[candidates], -utility))
        chosen = _pack(ranked, needs, utility, room, places)
        if not chosen.any() and not fixed:
            # Alone it need not have room to grow.
            chosen = _pack(ranked, view.blocks_needed(candidates), utility, room, min(places, 1))
        for row in movable[~chosen[: len(movable)]].tolist():
            rows = np.array([row])
            free += self._leave(view, rows, plan) + int(view.growth(rows)[0])
        kept = np.concatenate([np.setdiff1d(running, movable), movable[chosen[: len(movable)]]])
        kept = kept[np.argsort(tracker.entered[kept])]
        return self._enter(view, kept, candidates, needs, chosen, ranked, len(movable), free, plan)

    def _enter(
        self,
        view: View,
        running: IntArray,
        candidates: IntArray,
        needs: IntArray,
        chosen: BoolArray,
        ranked: IntArray,
        num_movable: int,
        free: int,
        plan: Plan,
    ) -> IntArray:
        """Bring the chosen ones on as far as blocks are free now; the rest comes next time."""
        tracker = view.tracker
        admitted: list[int] = []
        for i in ranked.tolist():
            if i < num_movable or not chosen[i]:
                continue
            row = int(candidates[i])
            rows = candidates[i : i + 1]
            need = int(needs[i])
            if not (len(running) or admitted or plan.resume):
                # Alone it need not have room to grow.
                need = int(view.blocks_needed(rows)[0])
            if need > free:
                continue
            free -= need
            seq = tracker.sequences[row]
            if seq.state is State.PREEMPTED:
                if self._load_s(view, rows)[0] <= self._recompute_s(view, rows)[0] or not len(
                    running
                ):
                    plan.resume.append(seq)
                    continue
                plan.drop.append(seq)
            plan.admit.append(seq)
            admitted.append(row)
        return np.concatenate([running, np.array(admitted, np.int64)])

    # -- memory ---------------------------------------------------------------------------------

    def _make_room(
        self, view: View, running: IntArray, plan: Plan, now: float
    ) -> tuple[IntArray, int]:
        """Preempt the fullest buffers until the others can take their next step."""
        growth = view.growth(running)
        need, free = int(growth.sum()), view.free_blocks
        if need <= free:
            return running, free - need
        stays = np.ones(len(running), bool)
        order = np.lexsort((view.tracker.arrival_s[running], view.slack_s(running, now)))[::-1]
        for i in order[:-1].tolist():
            if need <= free:
                break
            stays[i] = False
            need -= int(growth[i])
            free += self._leave(view, running[i : i + 1], plan)
        if need > free:
            # The last one goes on when the blocks of the others have been copied.
            stays[:] = False
        return running[stays], max(free - need, 0)

    def _leave(self, view: View, row: IntArray, plan: Plan) -> int:
        """Preempt it, to the host if there is room; the blocks free at once."""
        tracker = view.tracker
        promised = sum(1 for _, how in plan.preempt if how is Preempt.OFFLOAD)
        slots = int(view.slots_to_offload(row)[0]) + promised * view.blocks_for(
            int(tracker.context.max())
        )
        seq = tracker.sequences[int(row[0])]
        if slots <= view.free_host_slots:
            plan.preempt.append((seq, Preempt.OFFLOAD))
            return int(view.released_now(row)[0])
        plan.preempt.append((seq, Preempt.RECOMPUTE))
        return int(tracker.blocks[row[0]])

    def _resume_in_order(self, view: View, preempted: IntArray, free: int, plan: Plan) -> None:
        """First come, first served, as memory allows."""
        tracker = view.tracker
        order = preempted[np.lexsort((tracker.order[preempted], tracker.arrival_s[preempted]))]
        places = view.max_num_seqs - view.on_device()
        reserve = tracker.count(State.RUNNING)
        for row, need in zip(order.tolist(), view.blocks_needed(order).tolist(), strict=True):
            if places <= 0 or need + reserve > free:
                break
            free -= need
            places -= 1
            plan.resume.append(tracker.sequences[row])


def _pack(
    ranked: IntArray, needs: IntArray, utility: FloatArray, room: int, places: int
) -> BoolArray:
    """Which entries to take: greedily in order, then with neighbours swapped near the first misfit
    while the total utility rises."""
    best, total, misfit = _greedy(ranked, needs, utility, room, places)
    if misfit is None:
        return best
    order = ranked.copy()
    for i in range(max(misfit - _SWAP_WINDOW, 0), min(misfit + _SWAP_WINDOW, len(order) - 1)):
        order[i], order[i + 1] = order[i + 1], order[i]
        taken, value, _ = _greedy(order, needs, utility, room, places)
        if value > total + 1e-9:
            best, total = taken, value
        else:
            order[i], order[i + 1] = order[i + 1], order[i]
    return best


def _greedy(
    order: IntArray, needs: IntArray, utility: FloatArray, room: int, places: int
) -> tuple[BoolArray, float, int | None]:
    """Take entries in order as they fit; (taken, total utility, first place that did not fit)."""
    taken = np.zeros(len(order), bool)
    total = 0.0
    misfit: int | None = None
    for place, i in enumerate(order.tolist()):
        if places <= 0:
            break
        if needs[i] <= room:
            room -= int(needs[i])
            places -= 1
            taken[i] = True
            total += float(utility[i])
        elif misfit is None:
            misfit = place
        if room <= 0:
            break
    return taken, total, misfit
