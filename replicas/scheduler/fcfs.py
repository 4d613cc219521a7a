"""First come, first served, the way SGLang schedules: the baseline.

Prefill goes before decode; a request is admitted when its prompt and a share of the tokens it may
still generate fit beside what the running ones are expected to need; when memory overflows all the
same, the request that came last is dropped and recomputed later.
"""

from __future__ import annotations

import numpy as np

from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tracker import IntArray


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
        running, free = self._make_room(view, view.running(), plan)
        if not plan.preempt:
            running = self._admit(view, running, free, plan)
        plan.batch = compose_batch(view, running, prefill_first=self.prefill_first)
        return plan

    def _make_room(self, view: View, running: IntArray, plan: Plan) -> tuple[IntArray, int]:
        """Retract the newest requests until every other one can take its next step; what stays,
        and the blocks free beside it."""
        tracker = view.tracker
        growth = view.growth(running)
        need = int(growth.sum())
        free = view.free_blocks
        if need <= free:
            self._ratio = max(self._min, self._ratio - self._decay)
            return running, free - need
        self._ratio = self._initial
        newest = np.lexsort((tracker.order[running], tracker.arrival_s[running]))[::-1]
        stays = np.ones(len(running), bool)
        for i in newest[:-1].tolist():
            if need <= free:
                break
            stays[i] = False
            need -= int(growth[i])
            free += int(tracker.blocks[running[i]])
            plan.preempt.append((tracker.sequences[running[i]], Preempt.RECOMPUTE))
        return running[stays], free - need

    def _admit(self, view: View, running: IntArray, free: int, plan: Plan) -> IntArray:
        tracker = view.tracker
        expected = int((self._later_blocks(view, running) - tracker.blocks[running]).clip(0).sum())
        waiting = view.waiting()[: view.max_num_seqs - view.on_device()]
        admitted = []
        needs, laters = view.blocks_needed(waiting), self._later_blocks(view, waiting)
        for row, need, later in zip(waiting.tolist(), needs, laters, strict=True):
            alone = not len(running) and not admitted
            if free < need or (not alone and free - expected < max(need, later)):
                break
            free -= int(need)
            expected += max(0, int(later) - int(need))
            admitted.append(row)
        plan.admit = tracker.take(admitted)
        return np.concatenate([running, np.array(admitted, np.int64)])

    def _later_blocks(self, view: View, rows: IntArray) -> IntArray:
        """Blocks each is expected to hold in the end."""
        tracker = view.tracker
        remaining = tracker.limit[rows] - tracker.generated[rows]
        tokens = tracker.context[rows] + (remaining * self._ratio).astype(np.int64)
        blocks: IntArray = (tokens + view.block_size - 1) // view.block_size
        return blocks


class ChunkedPolicy(FCFSPolicy):
    """The same with chunked prefill: prompts share every step with the decoding requests, which so
    never wait for one. [Agrawal et al., Sarathi-Serve, OSDI 2024]"""

    name = "chunked"
    prefill_first = False
