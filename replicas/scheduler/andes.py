"""Andes: serve whoever gains most quality of experience for the memory it takes. A baseline.

A reader's quality is how closely its tokens follow the line "first token after `target_ttft_s`,
then one every `1 / rate`". Under pressure every request is scored by what being served over the
next `horizon_s` would gain it over waiting, per block of KV, and the best that fit are served;
preempted ones are recomputed. A swap is made only if it gains more than the stall costs the others.
[Liu et al., Andes, arXiv 2404.16283 v2: greedy packing by gain per memory, overhead-aware refiner;
the quality over a horizon in closed form, as in the authors' scheduler]
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch


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
        running = list(view.running)
        free = self._make_room(view, running, plan, now)
        self._steps += 1
        if not plan.preempt and view.waiting:
            if not self._pressed(view):
                self._admit_in_order(view, running, free, plan)
            elif self._steps % self.params.period == 0:
                self._swap(view, running, free, plan, now)
        self._admitted += sum(seq.preemptions == 0 for seq in plan.admit)
        plan.batch = compose_batch(running, view.max_batch_tokens, prefill_first=True)
        return plan

    # -- quality --------------------------------------------------------------------------------

    def serve_quality(self, seq: Sequence, view: View, now: float) -> float:
        """Quality after the horizon if served, in [0, 1]."""
        p = self.params
        elapsed, produced = now - seq.arrival_s, len(seq.output_ids)
        gap = 1.0 / seq.playback.rate
        if produced and elapsed < p.target_ttft_s + produced * gap:
            return 1.0
        expected = (elapsed + p.horizon_s) / gap
        step_s = view.cost.step_s(max(1, len(view.running)), 0)
        made = produced + p.horizon_s / max(gap, step_s)
        return min(1.0, (made / expected) ** 2)

    def wait_quality(self, seq: Sequence, now: float, wait_s: float) -> float:
        """Quality after `wait_s` without a token, in [0, 1]."""
        elapsed, produced = now - seq.arrival_s, len(seq.output_ids)
        if produced == 0:
            return 1.0 if elapsed + wait_s <= self.params.target_ttft_s else 0.0
        expected = (elapsed + wait_s) * seq.playback.rate
        if expected <= produced:
            return 1.0
        return 1.0 - ((expected - produced) / expected) ** 2

    def gain(self, seq: Sequence, view: View, now: float, running: bool) -> float:
        """What serving it over the horizon is worth."""
        worth = self.serve_quality(seq, view, now) - self.wait_quality(
            seq, now, self.params.horizon_s
        )
        return max(worth, 0.0) * (self.params.running_bonus if running else 1.0)

    # -- plans ----------------------------------------------------------------------------------

    def _pressed(self, view: View) -> bool:
        used = 1.0 - view.free_blocks / view.total_blocks
        if used > self.params.occupancy or len(view.running) >= view.max_num_seqs:
            return True
        if not view.running:
            return False
        strictest = min(1.0 / seq.playback.rate for seq in view.running)
        return view.cost.step_s(len(view.running), 0) > strictest

    def _make_room(self, view: View, running: list[Sequence], plan: Plan, now: float) -> int:
        """Preempt the least deserving until the others can take their next step."""
        free = view.free_blocks
        need = sum(view.growth(seq) for seq in running)
        while need > free and len(running) > 1:
            victim = min(
                running,
                key=lambda s: (self._priority(s, view, now, running=True), -s.arrival_s),
            )
            need -= view.growth(victim)
            free += self._preempt(view, victim, running, plan)
        return max(free - need, 0)

    def _admit_in_order(self, view: View, running: list[Sequence], free: int, plan: Plan) -> None:
        for seq in view.waiting:
            need = view.blocks_for(len(seq.tokens) + 1)
            if need > free or len(running) >= view.max_num_seqs:
                break
            free -= need
            running.append(seq)
            plan.admit.append(seq)

    def _swap(self, view: View, running: list[Sequence], free: int, plan: Plan, now: float) -> None:
        """Pack by gain per block; admit what the packing adds if the swap pays."""
        on_device = {seq.request_id for seq in running}
        everyone = [*running, *view.waiting]
        ranked = sorted(
            everyone,
            key=lambda s: (-self._priority(s, view, now, s.request_id in on_device), s.arrival_s),
        )
        room = view.total_blocks
        picked: set[str] = set()
        for seq in ranked:
            need = view.blocks_for(len(seq.tokens) + 1)
            if need <= room and len(picked) < view.max_num_seqs:
                room -= need
                picked.add(seq.request_id)
        leaving = [s for s in reversed(ranked) if s in running and s.request_id not in picked]
        victims_left = min(
            self.params.victims_per_plan,
            int(self.params.preemptions_per_request * self._admitted) - self._preempted,
        )
        for seq in ranked:
            if seq.request_id not in picked or seq.request_id in on_device:
                continue
            need = view.blocks_for(len(seq.tokens) + 1)
            chosen: list[Sequence] = []
            freed = free
            full = len(running) >= view.max_num_seqs
            while (freed < need or (full and not chosen)) and len(chosen) < len(leaving):
                chosen.append(leaving[len(chosen)])
                freed += chosen[-1].num_blocks
            if freed < need or (full and not chosen) or len(chosen) > victims_left:
                break
            if chosen and not self._pays(seq, chosen, view, running, now):
                break
            for victim in chosen:
                leaving.remove(victim)
                free += self._preempt(view, victim, running, plan)
            victims_left -= len(chosen)
            free -= need
            running.append(seq)
            plan.admit.append(seq)

    def _pays(
        self, seq: Sequence, victims: Seq[Sequence], view: View, running: Seq[Sequence], now: float
    ) -> bool:
        """Whether the newcomer gains more than the others lose while prefills run."""
        overhead_s = sum(view.cost.prefill_s(len(s.tokens)) for s in (*victims, seq))
        loss = sum(
            self.wait_quality(other, now, 0.0) - self.wait_quality(other, now, overhead_s)
            for other in running
            if other not in victims
        )
        return self.gain(seq, view, now, running=False) > loss

    def _priority(self, seq: Sequence, view: View, now: float, running: bool) -> float:
        return self.gain(seq, view, now, running) / view.blocks_for(len(seq.tokens) + 1)

    def _preempt(self, view: View, victim: Sequence, running: list[Sequence], plan: Plan) -> int:
        running.remove(victim)
        plan.preempt.append((victim, Preempt.RECOMPUTE))
        self._preempted += 1
        return view.released_now(victim, Preempt.RECOMPUTE)
