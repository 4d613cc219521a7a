"""First come, first served, the way SGLang schedules: the baseline.

Prefill goes before decode; a request is admitted when its prompt and a share of the tokens it may
still generate fit beside what the running ones are expected to need; when memory overflows all the
same, the requests with the fewest tokens so far are dropped and recomputed later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tracker import IntArray


@dataclass(frozen=True, slots=True)
class FCFSParams:
    """Tunables; SGLang's defaults. The "ratio" is the share of its remaining tokens that a running
    request is expected to use."""

    initial_ratio: float = 0.7
    min_ratio: float = 0.098
    decay_steps: int = 600
    """Steps in which the ratio falls from the one to the other."""
    retract_tokens: int = 20
    """Tokens each request is granted on top, when an overflow sets the ratio anew."""
    longest_output: int = 4096
    """No request is expected to use more than this."""


class FCFSPolicy:
    """See the module."""

    name = "fcfs"
    write_through = False
    prefill_first = True

    def __init__(self, params: FCFSParams | None = None) -> None:
        self.params = params or FCFSParams()
        self._ratio = self.params.initial_ratio

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        running, free = self._make_room(view, view.running(), plan)
        if not plan.preempt:
            running = self._admit(view, running, free, plan)
        plan.batch = compose_batch(view, running, prefill_first=self.prefill_first)
        return plan

    def _make_room(self, view: View, running: IntArray, plan: Plan) -> tuple[IntArray, int]:
        """Retract requests until every other one can take its next step; what stays, and the blocks
        free beside it."""
        tracker, p = view.tracker, self.params
        growth = view.growth(running)
        need = int(growth.sum())
        free = view.free_blocks
        if need <= free:
            decay = (p.initial_ratio - p.min_ratio) / max(p.decay_steps, 1)
            self._ratio = max(p.min_ratio, self._ratio - decay)
            return running, free - need
        generated = tracker.generated[running]
        granted = generated.sum() + p.retract_tokens * len(running)
        self._ratio = min(1.0, float(granted / (tracker.limit[running].sum() + 1)))
        stays = np.ones(len(running), bool)
        for i in np.lexsort((-tracker.context[running], generated))[:-1].tolist():
            if need <= free:
                break
            stays[i] = False
            need -= int(growth[i])
            free += int(tracker.blocks[running[i]])
            plan.preempt.append((tracker.sequences[running[i]], Preempt.RECOMPUTE))
        return running[stays], free - need

    def _admit(self, view: View, running: IntArray, free: int, plan: Plan) -> IntArray:
        tracker = view.tracker
        expected = int((self._later_blocks(view, running) - tracker.held[running]).clip(0).sum())
        waiting = view.waiting()[: view.max_num_seqs - view.on_device()]
        admitted: list[int] = []
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
        remaining = np.minimum(remaining, self.params.longest_output)
        tokens = tracker.context[rows] + (remaining * self._ratio).astype(np.int64)
        blocks: IntArray = (tokens + view.block_size - 1) // view.block_size
        return blocks


class ChunkedPolicy(FCFSPolicy):
    """The same with chunked prefill: prompts share every step with the decoding requests, which so
    never wait for one. [Agrawal et al., Sarathi-Serve, OSDI 2024]"""

    name = "chunked"
    prefill_first = False
