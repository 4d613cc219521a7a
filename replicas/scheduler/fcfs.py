"""First come, first served, the way SGLang schedules: the baseline.

Prefill goes before decode; a request is admitted when its prompt and a share of the tokens it may
still generate fit beside what the running ones are expected to need; when memory overflows all the
same, the request that came last is dropped and recomputed later.
"""

from __future__ import annotations

from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch


class FCFSPolicy:
    """See the module. `new_token_ratio` is the share of its remaining tokens that a running request
    is expected to use: it starts at `initial_ratio`, decays to `min_ratio` over `decay_steps`, and
    starts again after an overflow."""

    name = "fcfs"
    write_through = False
    prefill_first = True

    def __init__(
        self, initial_ratio: float = 0.7, min_ratio: float = 0.1, decay_steps: int = 600
    ) -> None:
        self._initial = initial_ratio
        self._min = min_ratio
        self._decay = (initial_ratio - min_ratio) / decay_steps
        self._ratio = initial_ratio

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        running = list(view.running)
        free = self._make_room(view, running, plan)
        self._admit(view, running, free, plan)
        plan.batch = compose_batch(running, view.max_batch_tokens, prefill_first=self.prefill_first)
        return plan

    def _make_room(self, view: View, running: list[Sequence], plan: Plan) -> int:
        """Retract the newest requests until every other one can take its next step."""
        free = view.free_blocks
        need = sum(view.growth(seq) for seq in running)
        overflow = need > free
        while need > free and len(running) > 1:
            victim = max(running, key=lambda seq: seq.arrival_s)
            running.remove(victim)
            need -= view.growth(victim)
            free += view.released_now(victim, Preempt.RECOMPUTE)
            plan.preempt.append((victim, Preempt.RECOMPUTE))
        self._ratio = self._initial if overflow else max(self._min, self._ratio - self._decay)
        return free - need

    def _admit(self, view: View, running: list[Sequence], free: int, plan: Plan) -> None:
        if plan.preempt:
            return
        expected = sum(self._expected_blocks(view, seq) for seq in running)
        for seq in view.waiting:
            if len(running) >= view.max_num_seqs:
                break
            now_blocks = view.blocks_for(len(seq.tokens) + 1)
            later = view.blocks_for(len(seq.tokens) + int(seq.remaining_tokens * self._ratio))
            if running and free - expected < max(now_blocks, later):
                break
            if free < now_blocks:
                break
            free -= now_blocks
            expected += max(0, later - now_blocks)
            running.append(seq)
            plan.admit.append(seq)

    def _expected_blocks(self, view: View, seq: Sequence) -> int:
        """Blocks a running request is expected to take beyond those it holds."""
        total = view.blocks_for(len(seq.tokens) + int(seq.remaining_tokens * self._ratio))
        return max(0, total - seq.num_blocks)


class ChunkedPolicy(FCFSPolicy):
    """The same with chunked prefill: prompts share every step with the decoding requests, which so
    never wait for one. [Agrawal et al., Sarathi-Serve, OSDI 2024]"""

    name = "chunked"
    prefill_first = False
