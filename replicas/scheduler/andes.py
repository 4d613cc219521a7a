"""Andes: serve whoever gains most quality of experience for the memory it takes. A baseline.

A reader's quality is how closely its tokens follow the line "first token after `target_ttft_s`,
then one every `1 / rate`". Under pressure every request is scored by what being served over the
next `horizon_s` would gain it over waiting, per block of KV, and the best that fit are served;
preempted ones are recomputed. A swap is made only if it gains more than the stall costs the others.
[Liu et al., Andes, arXiv 2404.16283 v2: greedy packing by gain per memory, overhead-aware refiner;
the quality over a horizon in closed form, as in the authors' scheduler]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class AndesParams:
    """Tunables; defaults of the authors' code where it has them."""

    target_ttft_s: float = 1.3
    horizon_s: float = 10.0
    occupancy: float = 0.9
    """Share of KV in use above which there is pressure."""
    period: int = 10
    """Steps between two plans that may preempt."""
    victims_per_plan: int = 2
    preemptions_per_request: float = 1.0
    """Preemptions allowed so far, for each request admitted so far."""
    running_bonus: float = 1.1
    """Factor on the gain of requests that run already, against churn."""


class AndesPolicy:
    """See the module."""

    name = "andes"
    write_through = False

    def __init__(self, params: AndesParams | None = None) -> None:
        self.params = params or AndesParams()
        self._steps = 0
        self._admitted = 0
        self._preempted = 0

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        running, free = self._make_room(view, view.running(), plan, now)
        self._steps += 1
        waiting = view.waiting()
        if not plan.preempt and len(waiting):
            if not self._pressed(view, running):
                running = self._admit_in_order(view, running, waiting, free, plan)
            elif self._steps % max(self.params.period, 1) == 0:
                running = self._swap(view, running, waiting, free, plan, now)
        self._admitted += sum(seq.preemptions == 0 for seq in plan.admit)
        plan.batch = compose_batch(view, running, prefill_first=True)
        return plan

    # -- quality --------------------------------------------------------------------------------

    def serve_quality(self, view: View, rows: IntArray, now: float) -> FloatArray:
        """Quality of each after the horizon if served, in [0, 1]."""
        p = self.params
        tracker = view.tracker
        elapsed = now - tracker.arrival_s[rows]
        produced = tracker.generated[rows]
        gap = 1.0 / tracker.rate[rows]
        on_device = view.running()
        step_s = view.cost.step_s(max(1, len(on_device)), float(tracker.context[on_device].sum()))
        expected = (elapsed + p.horizon_s) / gap
        made = produced + p.horizon_s / np.maximum(gap, step_s)
        ahead = (produced > 0) & (elapsed < p.target_ttft_s + produced * gap)
        quality: FloatArray = np.where(ahead, 1.0, np.minimum(1.0, (made / expected) ** 2))
        return quality

    def wait_quality(self, view: View, rows: IntArray, now: float, wait_s: float) -> FloatArray:
        """Quality of each after `wait_s` without a token, in [0, 1]."""
        tracker = view.tracker
        elapsed = now - tracker.arrival_s[rows]
        produced = tracker.generated[rows]
        expected = np.maximum((elapsed + wait_s) * tracker.rate[rows], 1e-9)
        behind = np.clip((expected - produced) / expected, 0.0, 1.0)
        unborn = np.where(elapsed + wait_s <= self.params.target_ttft_s, 1.0, 0.0)
        quality: FloatArray = np.where(produced == 0, unborn, 1.0 - behind**2)
        return quality

    def gain(self, view: View, rows: IntArray, now: float, runs: bool) -> FloatArray:
        """What serving each over the horizon is worth."""
        worth = self.serve_quality(view, rows, now) - self.wait_quality(
            view, rows, now, self.params.horizon_s
        )
        gain: FloatArray = np.maximum(worth, 0.0) * (self.params.running_bonus if runs else 1.0)
        return gain

    def _priority(self, view: View, rows: IntArray, now: float, runs: bool) -> FloatArray:
        priority: FloatArray = self.gain(view, rows, now, runs) / view.blocks_needed(rows)
        return priority

    # -- plans ----------------------------------------------------------------------------------

    def _pressed(self, view: View, running: IntArray) -> bool:
        used = 1.0 - view.free_blocks / view.total_blocks
        if used > self.params.occupancy or len(running) >= view.max_num_seqs:
            return True
        if not len(running):
            return False
        tracker = view.tracker
        strictest = 1.0 / float(tracker.rate[running].max())
        return view.cost.step_s(len(running), float(tracker.context[running].sum())) > strictest

    def _make_room(
        self, view: View, running: IntArray, plan: Plan, now: float
    ) -> tuple[IntArray, int]:
        """Preempt the least deserving until the others can take their next step; who stays, and
        the blocks free beside them."""
        growth = view.growth(running)
        need, free = int(growth.sum()), view.free_blocks
        if need <= free:
            return running, free - need
        tracker = view.tracker
        priority = self._priority(view, running, now, runs=True)
        worst_first = np.lexsort((-tracker.arrival_s[running], priority))
        stays = np.ones(len(running), bool)
        for i in worst_first[:-1].tolist():
            if need <= free:
                break
            stays[i] = False
            need -= int(growth[i])
            free += self._preempt(view, int(running[i]), plan)
        return running[stays], max(free - need, 0)

    def _admit_in_order(
        self, view: View, running: IntArray, waiting: IntArray, free: int, plan: Plan
    ) -> IntArray:
        places = view.max_num_seqs - len(running)
        waiting = waiting[:places]
        fits = np.cumsum(view.blocks_needed(waiting)) <= free
        admitted = waiting[: int(fits.sum())]
        plan.admit = view.tracker.take(admitted)
        return np.concatenate([running, admitted])

    def _swap(
        self, view: View, running: IntArray, waiting: IntArray, free: int, plan: Plan, now: float
    ) -> IntArray:
        """Pack by gain per block; admit what the packing adds if the swap pays."""
        tracker = view.tracker
        everyone = np.concatenate([running, waiting])
        priority = np.concatenate(
            [
                self._priority(view, running, now, runs=True),
                self._priority(view, waiting, now, runs=False),
            ]
        )
        ranked = everyone[np.lexsort((tracker.arrival_s[everyone], -priority))]
        picked = self._pack(view, ranked)
        on_device = dict.fromkeys(running.tolist())
        leaving = [row for row in ranked[::-1].tolist() if row in on_device and row not in picked]
        victims_left = min(
            self.params.victims_per_plan,
            int(self.params.preemptions_per_request * self._admitted) - self._preempted,
        )
        for row in ranked.tolist():
            if row not in picked or row in on_device:
                continue
            need = int(view.blocks_needed(np.array([row]))[0])
            chosen: list[int] = []
            freed = free
            full = len(on_device) >= view.max_num_seqs
            while (freed < need or (full and not chosen)) and len(chosen) < len(leaving):
                chosen.append(leaving[len(chosen)])
                freed += int(tracker.blocks[chosen[-1]])
            if freed < need or (full and not chosen) or len(chosen) > victims_left:
                break
            if chosen and not self._pays(view, row, chosen, list(on_device), now):
                break
            del leaving[: len(chosen)]
            for victim in chosen:
                del on_device[victim]
                free += self._preempt(view, victim, plan)
            victims_left -= len(chosen)
            free -= need
            on_device[row] = None
            plan.admit.append(tracker.sequences[row])
        return np.array(list(on_device), np.int64)

    def _pack(self, view: View, ranked: IntArray) -> set[int]:
        """Rows that fit into memory, the best first."""
        room = view.total_blocks
        picked: set[int] = set()
        for row, need in zip(ranked.tolist(), view.blocks_needed(ranked).tolist(), strict=True):
            if len(picked) >= view.max_num_seqs or room <= 0:
                break
            if need <= room:
                room -= need
                picked.add(row)
        return picked

    def _pays(
        self, view: View, row: int, victims: list[int], running: list[int], now: float
    ) -> bool:
        """Whether the newcomer gains more than the others lose while prefills run."""
        tokens = int(view.tracker.context[[*victims, row]].sum())
        others = np.array([r for r in running if r not in victims], np.int64)
        loss = self.wait_quality(view, others, now, 0.0) - self.wait_quality(
            view, others, now, view.cost.prefill_s(tokens)
        )
        gain = self.gain(view, np.array([row]), now, runs=False)
        return float(gain[0]) > float(loss.sum())

    def _preempt(self, view: View, row: int, plan: Plan) -> int:
        """Drop it; the blocks that frees."""
        plan.preempt.append((view.tracker.sequences[row], Preempt.RECOMPUTE))
        self._preempted += 1
        return int(view.tracker.blocks[row])
